"""Where the weights of the published metrics' networks come from: a path, else the cache, else one download.

The cache is `MAGNET_TRAIN_CACHE`, or `~/.cache/magnet_train`. Beside each downloaded file stands `FILE.sha256`, as
`sha256sum --check` reads it; a file is held to that and to the hash that its publisher gave.
"""

import hashlib
import os
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock

from magnet_train.common.errors import UserError
from magnet_train.common.pretrained import offline_switch, one_line


@dataclass(frozen=True)
class Weights:
    """A published file of weights."""

    name: str
    """What messages call it."""
    url: str
    """Where it is published; the last part is the name of the file."""
    size: int
    """Bytes, about: known from its number of parameters. For showing, not for checking."""
    licence: str
    """As its publisher states it."""
    sha256: str
    """Hex digits that its SHA-256 begins with: all 64, those in the file's name, or none where none are published."""
    used_for: str
    """The metrics that need it."""

    @property
    def file(self) -> str:
        """The file's name, in the cache as at its publisher."""
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights that is there and is the right one."""

    path: Path
    sha256: str
    """All 64 hex digits."""

    @property
    def hash(self) -> str:
        """The first 16 hex digits, as figures carry it."""
        return self.sha256[:16]


VGGISH = Weights(
    name="VGGish",
    url="https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth",
    size=288_570_000,
    licence="Apache-2.0",
    sha256="10086976",
    used_for="FAD",
)
PASST_10S = Weights(
    name="PaSST for 10 s",
    url="https://github.com/kkoutini/PaSST/releases/download/v0.0.1-audioset/passt-s-f128-p16-s10-ap.476-swa.pt",
    size=344_600_000,
    licence="not stated (code Apache-2.0)",
    sha256="",
    used_for="KL of sound",
)
PASST_20S = Weights(
    name="PaSST for 20 s",
    url="https://github.com/kkoutini/PaSST/releases/download/v0.0.5/passt-s-f128-20sec-p16-s10-ap.474-swa.pt",
    size=344_900_000,
    licence="not stated (code Apache-2.0)",
    sha256="",
    used_for="KL of music",
)
CLAP_MUSIC = Weights(
    name="CLAP for music",
    url="https://huggingface.co/lukewys/laion_clap/resolve/main/music_audioset_epoch_15_esc_90.14.pt",
    size=2_350_000_000,
    licence="CC0-1.0",
    sha256="fae3e9c087f2909c28a09dc31c8dfcdacbc42ba44c70e972b58c1bd1caf6dedd",
    used_for="CLAP score",
)
PUBLISHED = (VGGISH, PASST_10S, PASST_20S, CLAP_MUSIC)
"""All of them."""


def cache_dir() -> Path:
    """Where what was downloaded lies, weights and shards: `MAGNET_TRAIN_CACHE`, or `~/.cache/magnet_train`."""
    return Path(os.environ.get("MAGNET_TRAIN_CACHE") or "~/.cache/magnet_train").expanduser()


def find_weights(weights: Weights, path: str | Path | None = None) -> WeightsFile:
    """The file at `path` if one is given, else the one in the cache, downloaded if it is not yet there.

    Any number of processes may ask at once: one downloads, under a file lock, and the others wait for it.

    Raises:
        UserError: if the file is missing and cannot be fetched, or its SHA-256 is not the expected one.
    """
    if path is not None:
        given = Path(path).expanduser()
        if not given.is_file():
            raise UserError(
                f"{weights.name} weights {str(given)!r}: no such file; {_where(weights, given)}"
            )
        return _checked(
            weights, given, "give the published file, or no path at all to have it downloaded"
        )
    target = cache_dir() / weights.file
    if not target.is_file():
        if switch := offline_switch():
            raise UserError(
                f"{weights.name} weights: not at {target}, and {switch} is set; {_where(weights, target)}"
            )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{target}.lock"):
                if not target.is_file():  # another process may have been faster
                    _download(weights, target)
        except OSError as error:  # what urllib raises included
            raise UserError(
                f"{weights.name} weights: not at {target}, and the download fails ({one_line(error)}); "
                f"{_where(weights, target)}"
            ) from error
    return _checked(weights, target, "delete it to have it downloaded again")


def load_tensors(file: WeightsFile) -> dict[str, Any]:
    """What the file holds, on the CPU: tensors and plain numbers only, no code of the file's is run.

    Raises:
        UserError: if it is broken, cut short, or holds anything else.
    """
    with torch.serialization.safe_globals(_numpy_scalars()):
        try:
            try:  # mapped where the format can be: a checkpoint may be mostly its optimizer's state
                content = torch.load(file.path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # torch's format of before 2020
                content = torch.load(file.path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever broken bytes lead to
            raise UserError(
                f"{file.path}: not a file of weights that torch can read ({one_line(error)})"
            ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{file.path}: holds a {type(content).__name__}, not named tensors")
    return dict(content)


def load_network(network: torch.nn.Module, file: WeightsFile) -> None:
    """Fills `network` with the file's tensors, every name and shape as expected; evaluation only from here on.

    Raises:
        UserError: if a name or a shape differs, or the file is broken.
    """
    try:
        network.load_state_dict(load_tensors(file))
    except (RuntimeError, TypeError) as error:
        found = " ".join(str(error).split())[:300]
        raise UserError(f"{file.path}: weights of another network: {found}") from error
    network.eval().requires_grad_(False)


def _where(weights: Weights, target: Path) -> str:
    known = (
        f"its SHA-256 begins with {weights.sha256}"
        if weights.sha256
        else "no SHA-256 of it is published"
    )
    return f"fetch {weights.url} ({known}) and put it at {target}"


def _checked(weights: Weights, path: Path, remedy: str) -> WeightsFile:
    """The file with its hash, if that is what is known of it."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        wrong = _mismatch(weights, path, found)
    except OSError as error:
        raise UserError(
            f"{weights.name} weights {path}: cannot be read ({one_line(error)}); {remedy}"
        ) from error
    if wrong:
        raise UserError(f"{weights.name} weights {path}: {wrong}; {remedy}")
    return WeightsFile(path, found)


def _mismatch(weights: Weights, path: Path, found: str) -> str | None:
    """What is wrong with a file of hash `found` at `path`: it is not what was published, or not what once was here."""
    if not found.startswith(weights.sha256):
        expected = weights.sha256 if len(weights.sha256) == 64 else f"{weights.sha256}…"
        return f"SHA-256 is {found}, not {expected} as published"
    note = _note(path)
    recorded = note.read_text(errors="replace").partition(" ")[0] if note.is_file() else found
    return (
        None if found == recorded else f"SHA-256 is {found}, not {recorded} as {note} has recorded"
    )


def _note(path: Path) -> Path:
    """The file that keeps the hash of `path` since its first download."""
    return path.with_name(f"{path.name}.sha256")


def _download(weights: Weights, target: Path) -> None:
    """Writes aside, checks, moves into place: what stands at `target` is whole at every moment.

    Raises:
        OSError: if the server or the disk fails.
        UserError: if what arrives is not the published file.
    """
    aside = target.with_name(f"{target.name}.part")
    try:
        with aside.open("wb") as file:
            digest = _fetch(weights, file)
        if wrong := _mismatch(weights, target, digest):
            raise UserError(
                f"{weights.name} weights from {weights.url}: {wrong}; nothing is kept: "
                f"fetch the file by other means and put it at {target}"
            )
        _note(target).write_text(f"{digest}  {target.name}\n")
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def _fetch(weights: Weights, file: IO[bytes]) -> str:
    """Copies the file at the URL into `file` and returns its SHA-256."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    with urllib.request.urlopen(weights.url, timeout=60) as answer:
        announced = int(answer.headers.get("Content-Length") or 0)
        bar = tqdm(
            desc=weights.file, total=announced or None, unit="B", unit_scale=True, disable=None
        )
        with bar:
            while piece := answer.read(1 << 20):
                file.write(piece)
                digest.update(piece)
                bar.update(len(piece))
    if announced and file.tell() != announced:
        raise ConnectionError(f"{file.tell()} of {announced} bytes arrived")
    return digest.hexdigest()


def _numpy_scalars() -> list[Any]:
    """What plain numbers of numpy's are pickled with, under the names of numpy 1 and 2: LAION's files hold some."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")]
    return [np.dtype, *kinds, *((scalar, name) for name in names)]
