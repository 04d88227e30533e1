"""Atomic writing of files and folders, and safe file names."""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from magnet_train.common.errors import UserError

MAX_NAME_BYTES = 120
"""Maximum length of a name from `safe_name` without its hash; file systems allow 255 bytes."""
MIN_FREE_BYTES = 2**20
"""Free space below which a failed write is reported as a full disk."""


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Context that yields a temporary file, which replaces `path` at the end of the context.

    On an exception it is removed. Readers see either the previous or the new file. The temporary
    file is hidden in the same folder, and its name ends with ".part", so that no search by suffix
    finds it.

    Args:
        path: the file to write; its folder must exist.
        durable: sync the content to disk before replacing `path`.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
        if durable:
            with suppress(OSError):  # some file systems cannot sync folders
                _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """As `replacing`, for an output path given by the user: creates its folder if needed.

    Raises:
        UserError: if the file cannot be written.
    """
    import soundfile

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            yield temporary
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(
            f"{path}: cannot be written ({error}); choose another folder or free some space"
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of processes that were killed in `replacing`."""
    for temporary in folder.glob(".*.part"):
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def require_file(path: Path) -> None:
    """Raise FileNotFoundError unless it is a regular file: opening a named pipe would block."""
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))


def check_local(path: Path, option: str) -> None:
    """Raise a UserError if the path is a URL.

    It would be created as a local folder whose name contains the URL's credentials.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise UserError(f"{option} {path}: a URL; give a folder on this machine")


def writable_folder(folder: Path, option: str) -> Path:
    """Create the folder if it is missing, and check that it is writable.

    Args:
        folder: the folder.
        option: the option that names it, such as `--out`, for messages.

    Raises:
        UserError: if the folder is not writable.
    """
    check_local(folder, option)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{socket.gethostname()}-{os.getpid()}"  # one per rank
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{option} {folder}: cannot be written ({error.strerror}); choose another folder"
        ) from error
    return folder


def check_new(out: Path) -> Path:
    """Check that an output folder can be created; returns its absolute path.

    Raises:
        UserError: if it is not empty, or cannot be created.
    """
    check_local(out, "--out")
    out = out.expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent)
        os.rmdir(probe)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be created ({error.strerror}); choose another --out"
        ) from error
    return out


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Context with a temporary folder that becomes `out` at its end; removed on an exception.

    Raises:
        UserError: if `out` is not empty, or cannot be created.
        OSError: if the disk is full.
    """
    out = check_new(out)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp gives 0o700
        os.replace(temporary, out)
    except (shutil.Error, RuntimeError) as error:  # shutil and torch.save on a full disk
        if shutil.disk_usage(temporary).free < MIN_FREE_BYTES:
            raise OSError(errno.ENOSPC, "no space left", str(out)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def safe_name(text: str) -> str:
    """A unique file name for untrusted text, such as an item's key.

    Plain file names are not changed. Other texts keep their letters and digits, followed by the
    first digits of their SHA-256.

    >>> safe_name("clip_07.a"), safe_name("../../x")
    ('clip_07.a', 'x_9cdf6a50100a')
    """
    name = re.sub(r"[^\w.+=,@-]+", "-", text).lstrip(".-")
    name = name.encode(errors="replace")[:MAX_NAME_BYTES].decode(errors="ignore")
    could_be_hashed = re.search(r"_[0-9a-f]{12}$", name)
    if name and name == text and not could_be_hashed:
        return name
    return f"{name or 'unnamed'}_{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:12]}"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
