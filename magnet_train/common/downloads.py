"""Weights of the metrics' networks: from a given path, the cache, or a download.

CLAP is downloaded by huggingface_hub, which has its own cache; the others are cached in
`MAGNET_TRAIN_CACHE` (default `~/.cache/magnet_train`). Interrupted downloads are resumed. Files are
verified by their published SHA-256 at every use. If none is published, the download's size is
checked, and its SHA-256 is recorded in `FILE.sha256` (the format of `sha256sum --check`) and
checked later.
"""

import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tqdm import tqdm

from magnet_train.common.errors import UserError
from magnet_train.common.pretrained import offline_variable, one_line
from magnet_train.common.tensor_files import file_sha256, read_pickle

TIMEOUT_S = 60.0
"""Timeout for a server's answers during a download."""
CHUNK_BYTES = 1 << 20
MIN_BYTES_PER_S, SLOW_AFTER_S = 10_000, 60.0
"""Minimum speed of a download, and the seconds after which it is required."""


@dataclass(frozen=True)
class Weights:
    """A published file of weights."""

    name: str
    """For messages."""
    url: str
    """URL; its last part is the file name."""
    size: int
    """Bytes; approximate if a SHA-256 is published."""
    licence: str
    """As stated by the publisher."""
    sha256: str
    """SHA-256: all 64 hex digits, its first ones from the file name, or empty."""
    hub_id: str | None = None
    """Repository on the Hugging Face Hub, if it is published there."""

    @property
    def file(self) -> str:
        """Name of the file."""
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class WeightsFile:
    """A verified file of weights."""

    path: Path
    sha256: str
    """All 64 hex digits."""

    @property
    def hash(self) -> str:
        """The first 16 hex digits, as in metric records."""
        return self.sha256[:16]


VGGISH = Weights(
    name="VGGish",
    url="https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth",
    size=288_570_000,
    licence="Apache-2.0",
    sha256="10086976",
)
PASST_10S = Weights(
    name="PaSST for 10 s",
    url="https://github.com/kkoutini/PaSST/releases/download/v0.0.1-audioset/"
    "passt-s-f128-p16-s10-ap.476-swa.pt",
    size=344_665_734,
    licence="not stated (code Apache-2.0)",
    # Not published by its authors, but by several public evaluations.
    sha256="302903fa8c4aee817b11dc982da0b29aaf8d11a3e722420476d0a12c9db70c2c",
)
PASST_20S = Weights(
    name="PaSST for 20 s",
    url="https://github.com/kkoutini/PaSST/releases/download/v0.0.5/"
    "passt-s-f128-20sec-p16-s10-ap.474-swa.pt",
    size=344_975_942,
    licence="not stated (code Apache-2.0)",
    sha256="",
)
CLAP_MUSIC = Weights(
    name="CLAP for music",
    url="https://huggingface.co/lukewys/laion_clap/resolve/main/"
    "music_audioset_epoch_15_esc_90.14.pt",
    size=2_350_000_000,
    licence="CC0-1.0",
    sha256="fae3e9c087f2909c28a09dc31c8dfcdacbc42ba44c70e972b58c1bd1caf6dedd",
    hub_id="lukewys/laion_clap",
)
PUBLISHED = (VGGISH, PASST_10S, PASST_20S, CLAP_MUSIC)


def cache_dir() -> Path:
    """Folder of downloads: `MAGNET_TRAIN_CACHE`, or `~/.cache/magnet_train`."""
    return Path(os.environ.get("MAGNET_TRAIN_CACHE") or "~/.cache/magnet_train").expanduser()


def cached(weights: Weights) -> Path | None:
    """Path of the file in the cache; None if it was not downloaded."""
    if weights.hub_id is None:
        path = cache_dir() / weights.file
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(weights.hub_id, weights.file)
    return Path(found) if isinstance(found, str) else None


def find_weights(weights: Weights, path: str | Path | None = None) -> WeightsFile:
    """The file at `path` if one is given, else the cached one, else a download; verified.

    Any number of processes may call it at once: one downloads, and the others wait for it.

    Raises:
        UserError: if the file is missing and cannot be downloaded, or has another SHA-256.
    """
    if path is not None:
        given = Path(path).expanduser()
        if not given.is_file():
            raise UserError(
                f"{weights.name} weights {str(given)!r}: no such file; {_by_hand(weights)}"
            )
        return _verified(weights, given, "give the published file, or none to download it")
    file = cached(weights)
    if file is None:
        if variable := offline_variable():
            raise UserError(
                f"{weights.name} weights: not in the cache, and {variable} is set; "
                f"{_by_hand(weights)}"
            )
        file = _download(weights)
    return _verified(weights, file, "delete it to download it again")


def _by_hand(weights: Weights) -> str:
    known = "no SHA-256 of it is published"
    if weights.sha256:
        known = f"its SHA-256 begins with {weights.sha256}"
    place = "and give its path"
    if weights.hub_id is None:
        place = f"to {cache_dir() / weights.file}"
    return f"download {weights.url} ({known}) {place}"


def _verified(weights: Weights, path: Path, remedy: str) -> WeightsFile:
    """The file, after comparing its SHA-256 with the published and the recorded one."""
    try:
        sha256 = file_sha256(path)
        note = _note(path)
        recorded = note.read_text(errors="replace").partition(" ")[0] if note.is_file() else sha256
    except OSError as error:
        raise UserError(
            f"{weights.name} weights {path}: cannot be read ({one_line(error)}); {remedy}"
        ) from error
    expected = {"as published": weights.sha256, f"as recorded in {note}": recorded}
    for origin, digits in expected.items():
        if not sha256.startswith(digits):
            raise UserError(
                f"{weights.name} weights {path}: SHA-256 is {sha256}, not {digits} {origin}; "
                f"{remedy}"
            )
    return WeightsFile(path, sha256)


def _note(path: Path) -> Path:
    """The file with the SHA-256 of `path` recorded at its first download."""
    return path.with_name(f"{path.name}.sha256")


def _download(weights: Weights) -> Path:
    """Download into the cache atomically, after verification."""
    try:
        if weights.hub_id is not None:
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(weights.hub_id, weights.file))
        target = cache_dir() / weights.file
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_file():  # another process may have downloaded it meanwhile
                _download_from_url(weights, target)
        return target
    except Exception as error:  # OSError, HTTPException, a dozen kinds of the hub's
        raise UserError(
            f"{weights.name} weights: not in the cache, and the download failed "
            f"({one_line(error)}); {_by_hand(weights)}"
        ) from error


def _download_from_url(weights: Weights, target: Path) -> None:
    note = _note(target)
    expected = weights.sha256
    if not expected and note.is_file():
        expected = note.read_text(errors="replace").partition(" ")[0]
    arrived = target.with_name(f"{target.name}.part")
    _fetch_rest(weights.url, arrived, 2 * weights.size)
    size, sha256 = arrived.stat().st_size, file_sha256(arrived)
    if not sha256.startswith(expected) or (not expected and size != weights.size):
        arrived.unlink()
        if expected:
            raise ConnectionError(f"SHA-256 of the download is {sha256}, not {expected}")
        raise ConnectionError(f"received {size} bytes, not {weights.size}")
    note.write_text(f"{sha256}  {target.name}\n")
    arrived.replace(target)


def _fetch_rest(url: str, arrived: Path, max_bytes: int) -> None:
    """Download the rest of a file; after a failure, received bytes are kept for the next try.

    Raises:
        OSError: if the connection fails, or breaks off.
    """
    start = arrived.stat().st_size if arrived.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            is_rest = answer.status == HTTPStatus.PARTIAL_CONTENT
            expected = int(answer.headers.get("Content-Length") or 0)
            with (
                arrived.open("ab" if is_rest else "wb") as file,
                tqdm(total=expected, unit="B", unit_scale=True, disable=None, leave=False) as bar,
            ):
                begin, start_s = file.tell(), time.monotonic()
                while piece := answer.read1(CHUNK_BYTES):
                    spent_s = time.monotonic() - start_s
                    if spent_s > SLOW_AFTER_S and file.tell() - begin < MIN_BYTES_PER_S * spent_s:
                        raise ConnectionError(f"slower than {MIN_BYTES_PER_S:,} bytes per second")
                    if file.tell() + len(piece) > max_bytes:
                        raise ConnectionError(f"received more than {max_bytes:,} bytes")
                    file.write(piece)
                    bar.update(len(piece))
                got = file.tell() - begin
            if got < expected:
                raise ConnectionError(f"received {got} of {expected} bytes; try again to continue")
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # already complete
            raise


def load_tensors(file: WeightsFile) -> dict[str, Any]:
    """Load tensors and plain numbers from the file, on the CPU, without executing code in it.

    Raises:
        UserError: if the file is damaged or contains other objects.
    """
    with torch.serialization.safe_globals(_numpy_scalars()):
        content = read_pickle(file.path, "give the published file of weights")
    if not isinstance(content, Mapping):
        raise UserError(f"{file.path}: contains a {type(content).__name__}, not named tensors")
    return dict(content)


def load_network(network: torch.nn.Module, file: WeightsFile) -> None:
    """Load the file's tensors into `network` and freeze it in evaluation mode.

    Raises:
        UserError: if a name or a shape differs, or the file is damaged.
    """
    try:
        network.load_state_dict(load_tensors(file))
    except (RuntimeError, TypeError) as error:
        found = " ".join(str(error).split())[:300]
        raise UserError(f"{file.path}: weights of another network: {found}") from error
    network.eval().requires_grad_(False)


def _numpy_scalars() -> list[Any]:
    """NumPy's scalar classes under their names in NumPy 1 and 2, for LAION's files."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")]
    return [np.dtype, *kinds, *((scalar, name) for name in names)]
