"""Finds the files that are bundled with the package."""

from pathlib import Path

from magnet_train.common.errors import UserError


def demo_path(name: str = "") -> Path:
    """The demo's folder, or the file or folder `name` in it.

    A wheel has it inside the package, a checkout under `data/demo`.

    Raises:
        UserError: if it does not exist.
    """
    package = Path(__file__).resolve().parents[1]
    for root in (package / "_demo", package.parent / "data" / "demo"):
        if (root / name).exists():
            return root / name
    raise UserError(
        f"the embedded demo has no {name or 'folder'!r}: reinstall magnet-train, "
        "or run from a full checkout"
    )


def conf_path(name: str) -> Path:
    """A file of the shipped configurations, `conf/` in a checkout.

    Raises:
        UserError: if it does not exist.
    """
    package = Path(__file__).resolve().parents[1]
    for root in (package / "_conf", package.parent / "conf"):
        if (root / name).is_file():
            return root / name
    raise UserError(
        f"no shipped configuration {name!r}: reinstall magnet-train, or run from a full checkout"
    )


def shipped_configurations() -> dict[str, Path]:
    """Files of the shipped configurations of `fit` by name, such as `hardware/gpu_1x24gb.yaml`."""
    package = Path(__file__).resolve().parents[1]
    folders = [package / "_conf", package.parent / "conf"]
    folder = next((f for f in folders if f.is_dir()), folders[0])
    files = sorted(folder.glob("*.yaml")) + sorted(folder.glob("*/*.yaml"))
    names = {file.relative_to(folder).as_posix(): file for file in files}
    return {name: file for name, file in names.items() if not name.startswith(("sweep/", "slurm/"))}
