"""Finds the files that are bundled with the package."""

from pathlib import Path

from magnet_train.common.errors import UserError


def demo_path(name: str = "") -> Path:
    """The demo's folder, or the file or folder `name` in it.

    A wheel has it inside the package, a checkout under `data/demo`.

    Raises:
        UserError: if it does not exist.
    """
    path = _find("_demo", "data/demo", name)
    if path is None:
        raise UserError(
            f"the bundled demo has no {name or 'folder'!r}: reinstall magnet-train, "
            "or run from a full checkout"
        )
    return path


def conf_path(name: str) -> Path:
    """Path of a bundled configuration, in `conf/` of a checkout.

    Raises:
        UserError: if it does not exist.
    """
    path = _find("_conf", "conf", name)
    if path is None or not path.is_file():
        raise UserError(
            f"no bundled configuration {name!r}: reinstall magnet-train, or run from a full "
            "checkout"
        )
    return path


def shipped_configurations() -> dict[str, Path]:
    """Files of the bundled configurations of `fit` by name, such as `hardware/gpu_1x24gb.yaml`."""
    folder = _find("_conf", "conf", "")
    if folder is None:
        return {}
    files = sorted(folder.glob("*.yaml")) + sorted(folder.glob("*/*.yaml"))
    names = {file.relative_to(folder).as_posix(): file for file in files}
    return {name: file for name, file in names.items() if not name.startswith(("sweep/", "slurm/"))}


def _find(in_wheel: str, in_checkout: str, name: str) -> Path | None:
    package = Path(__file__).resolve().parents[1]
    roots = (package / in_wheel, package.parent / in_checkout)
    return next((root / name for root in roots if (root / name).exists()), None)
