"""Patterns for shard folders, and reading of local and remote files.

URLs (with `://`) are read by fsspec, with limits on bytes and seconds. Shards are cached under
their SHA-256, so that cached files can be verified and several processes may download the same.
Temporary errors are retried with increasing pauses. Messages never contain the passwords and
signatures of URLs.
"""

import errno
import glob
import hashlib
import json
import math
import os
import random
import re
import shutil
import stat
import time
import warnings
from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from magnet_train.common.downloads import cache_dir
from magnet_train.common.errors import UserError
from magnet_train.common.folders import replacing
from magnet_train.common.pretrained import one_line
from magnet_train.common.redact import redact

SHARD_PATIENCE_S, INDEX_PATIENCE_S = 60.0, 15.0
"""Seconds during which a download is retried; shorter for the index, for which a user waits."""
FIRST_PAUSE_S = 1.0
"""Pause before the first retry; it doubles with each retry, with random jitter."""
STALL_S = 20.0
"""Timeout of an HTTP server's answer and of each further chunk, in seconds."""
MIN_BYTES_PER_S, MAX_FETCH_S = 10_000, 900.0
"""Minimum speed and maximum duration of a download; otherwise it counts as failed."""
MAX_SHARD_BYTES, MAX_INDEX_BYTES = 1 << 30, 1 << 28
CHUNK_BYTES = 1 << 23
MAX_NAMES = 100_000
"""Maximum number of names that braces stand for."""
MIN_FREE_BYTES = 2_000_000_000
"""Free space to leave on the cache's disk, which may also have the checkpoints."""

_jitter = random.Random()  # separate: must not change the run's random numbers


def is_address(url_or_path: str | Path) -> bool:
    """Whether this is a URL and not a local path."""
    return "://" in str(url_or_path)


# --- patterns -------------------------------------------------------------------------------------


def find_folders(given: str) -> list[tuple[str, str]]:
    """Folders that match a pattern, in order, each with a pattern for its shard names.

    Braces are alternatives (`{a,b}`) or a range (`{00..07}`), in the order written; `*`, `?` and
    `[…]` match names, sorted. If the last part ends in `.tar`, it selects shards by the names in
    the folder's index, which needs no listing. An existing folder with exactly this name has
    precedence.

    Raises:
        UserError: if nothing matches, braces are unbalanced, or the store cannot list folders.

    >>> find_folders("music/part-{0..1}")
    [('music/part-0', '*'), ('music/part-1', '*')]
    >>> find_folders("https://host/music/shard-{008..009}.tar")
    [('https://host/music', 'shard-008.tar'), ('https://host/music', 'shard-009.tar')]
    """
    if os.path.isdir(Path(given).expanduser()):
        return [(given, "*")]
    from braceexpand import braceexpand

    try:
        if math.prod(_brace_counts(given)) > MAX_NAMES:
            raise UserError(f"{redact(given)}: more than {MAX_NAMES:,} names; give fewer")
        parts = list(braceexpand(given))
    except ValueError as error:
        raise UserError(
            f"{redact(given)}: unbalanced braces; write {{a,b}} or {{00..07}}"
        ) from error
    found = []
    for part in parts:
        folder, _, name = part.rpartition("/") if part.endswith(".tar") else (part, "", "*")
        found += [
            (one, name)
            for one in ([folder or "."] if not has_wildcard(folder) else _listed(folder))
        ]
    return found


def _brace_counts(pattern: str) -> Iterator[int]:
    """Number of names in each innermost pair of braces, or more."""
    for inner in re.findall(r"\{([^{}]*)\}", pattern):
        ends = re.match(r"(-?\d+)\.\.(-?\d+)", inner)
        yield abs(int(ends[1]) - int(ends[2])) + 1 if ends else inner.count(",") + 1


def has_wildcard(text: str) -> bool:
    """Whether the text has wildcards or braces."""
    return re.search(r"[*?\[]", text) is not None


def _listed(pattern: str) -> list[str]:
    """Folders that match, sorted."""
    if not is_address(pattern):
        path = str(Path(pattern).expanduser())
        found = [name for name in glob.glob(path) if Path(name).is_dir()]
    elif pattern.startswith(("http:", "https:")):
        raise UserError(
            f"{redact(pattern)}: a web server does not list folders; name them with braces, as "
            "part-{00..07}"
        )
    else:
        try:
            store, path = _store(pattern)
            names = store.glob(path, detail=True)
            found = [
                store.unstrip_protocol(k)
                for k, about in names.items()
                if about["type"] == "directory"
            ]
        except Exception as error:  # each store has its own types
            raise _explain(pattern, error) from error
    if not found:
        raise UserError(f"{redact(pattern)}: no folder matches; correct the pattern")
    return sorted(found)


# --- bytes ----------------------------------------------------------------------------------------


def read_index(folder: str) -> Any:
    """The index.json of a folder; if it is remote, downloaded, or from the cache if that fails.

    Raises:
        UserError: if it is remote, cannot be downloaded and is not cached.
        OSError, ValueError: if it is local and cannot be read, or is not JSON.
    """
    if not is_address(folder):
        return json.loads(_read_local(Path(folder).expanduser() / "index.json", MAX_INDEX_BYTES))
    address = f"{folder.rstrip('/')}/index.json"
    cached = _cache() / "index" / f"{hashlib.sha256(address.encode()).hexdigest()}.json"
    try:
        content = _fetch(address, INDEX_PATIENCE_S, MAX_INDEX_BYTES)
    except Exception as error:  # each store has its own types
        may_use_cache = _is_transient(error) or _lacks_credentials(error)
        if not may_use_cache or not cached.is_file():
            raise _explain(address, error) from error
        reason = redact(one_line(error))
        warnings.warn(
            f"{redact(address)}: cannot be reached ({reason}); using {cached}", stacklevel=2
        )
        return json.loads(cached.read_bytes())
    index = json.loads(content)
    _keep(content, cached)
    return index


def read_bytes(url_or_path: str | Path, sha256: str | None) -> bytes:
    """Read a shard; if its SHA-256 is given, verify it, and cache a remote shard.

    Raises:
        UserError: if it is remote and cannot be downloaded.
        OSError: if it is local and cannot be read.
        ValueError: if it is too large, or has another SHA-256.
    """
    if not is_address(url_or_path):
        return _checked(_read_local(Path(url_or_path), MAX_SHARD_BYTES), sha256)
    cached = _cache() / f"{sha256}.tar"
    if sha256 is not None:
        try:
            return _checked(_read_local(cached, MAX_SHARD_BYTES), sha256)
        except (OSError, ValueError):  # missing or damaged
            pass
    try:
        content = _fetch(str(url_or_path), SHARD_PATIENCE_S, MAX_SHARD_BYTES, sha256)
    except (_WrongHash, _TooLarge):
        raise
    except Exception as error:  # each store has its own types
        raise _explain(str(url_or_path), error) from error
    # The name is the verified SHA-256, so an untrusted index cannot choose a path.
    if sha256 is not None:
        _keep(content, cached)
    return content


class _WrongHash(ValueError):
    """The content does not match the index."""


class _TooLarge(ValueError):
    """The content is larger than the limit."""


def _checked(content: bytes, sha256: str | None) -> bytes:
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise _WrongHash("its SHA-256 differs from the index")
    return content


def _read_local(path: Path, max_bytes: int) -> bytes:
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):  # opening a named pipe would block
        raise ValueError("not a regular file")
    if about.st_size > max_bytes:
        raise _TooLarge(f"contains more than {max_bytes:,} bytes")
    return path.read_bytes()


def _fetch(address: str, patience_s: float, max_bytes: int, sha256: str | None = None) -> bytes:
    """Download, with retries within the patience for temporary errors, and one for a wrong hash."""
    start = time.monotonic()
    wrong_hashes = 0
    for number in count():
        try:
            return _checked(_download(address, max_bytes), sha256)
        except _WrongHash:  # a silently interrupted connection, or another file
            wrong_hashes += 1
            if wrong_hashes == 2:
                raise
        except Exception as error:  # each store has its own types
            pause = FIRST_PAUSE_S * 2**number * _jitter.uniform(0.5, 1.5)
            is_late = number > 0 and time.monotonic() + pause > start + patience_s
            if is_late or not _is_transient(error):
                raise
            time.sleep(pause)
    raise AssertionError


def _download(address: str, max_bytes: int) -> bytes:
    """Download in chunks, with limits on size and speed."""
    store, path = _store(address)
    # Web servers: one streamed request without a size query; other stores: ranges.
    options = {"block_size": 0, "size": 1} if _is_http(address) else {"block_size": CHUNK_BYTES}
    start = time.monotonic()
    content = bytearray()
    with store.open(path, "rb", **options) as file:
        while piece := file.read(CHUNK_BYTES):
            content += piece
            spent = time.monotonic() - start
            if len(content) > max_bytes:
                raise _TooLarge(f"contains more than {max_bytes:,} bytes")
            is_slow = spent > STALL_S and len(content) < MIN_BYTES_PER_S * spent
            if is_slow or spent > MAX_FETCH_S:
                raise TimeoutError(f"only {len(content):,} bytes in {spent:.0f} s")
    return bytes(content)


def _is_http(address: str) -> bool:
    return address.startswith(("http:", "https:"))


def _store(address: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Created in each process, because its threads do not survive a fork.
    """
    import fsspec

    if not _is_http(address):
        return fsspec.core.url_to_fs(address)
    import aiohttp

    limits = aiohttp.ClientTimeout(total=None, sock_connect=STALL_S, sock_read=STALL_S)
    return fsspec.core.url_to_fs(address, client_kwargs={"timeout": limits, "trust_env": True})


def _status(error: BaseException) -> int | None:
    """HTTP status of an error; aiohttp and gcsfs use different names."""
    status = str(getattr(error, "status", None) or getattr(error, "code", None))
    return int(status) if status.isdigit() else None


def _is_transient(error: BaseException) -> bool:
    """Whether a retry may help."""
    permanent = (FileNotFoundError, PermissionError, ImportError, ValueError)
    if isinstance(error, permanent) or _lacks_credentials(error):
        return False
    status = _status(error)
    too_many_requests, timed_out = 429, 408
    return status is None or not 400 <= status < 500 or status in (timed_out, too_many_requests)


def _lacks_credentials(error: BaseException) -> bool:
    """Whether this is an error of botocore or google-auth for missing credentials."""
    return type(error).__name__.endswith("CredentialsError")


def _explain(address: str, error: BaseException) -> UserError:
    """The UserError for an error of a store."""
    shown = redact(address)
    reason = redact(one_line(error))
    if isinstance(error, TimeoutError):
        reason = f"no answer in time: {reason}"
    if isinstance(error, _TooLarge):
        return UserError(f"{shown}: {reason}; not an index written by tokenize")
    if isinstance(error, FileNotFoundError) or _status(error) in (404, 410):
        return UserError(
            f"{shown}: not there; copy the whole folder that tokenize made, or correct the address"
        )
    is_denied = isinstance(error, PermissionError) or _status(error) in (401, 403)
    if is_denied or _lacks_credentials(error):
        return UserError(
            f"{shown}: access denied ({reason}); give credentials, or correct the address"
        )
    if isinstance(error, ImportError):
        extras = {"s3": "-e '.[s3]'", "gs": "-e '.[gs]'"}
        extra = extras.get(address.partition("://")[0], "it")
        return UserError(f"{shown}: a package is missing ({reason}); pip install {extra}")
    if not _is_transient(error):
        return UserError(
            f"{shown}: no such address ({reason}); give a folder, s3://, gs://, http:// or https://"
        )
    return UserError(
        f"{shown}: cannot be reached ({reason}); check the store, or copy the shards to a folder"
    )


# --- cache ----------------------------------------------------------------------------------------


def _cache() -> Path:
    return cache_dir() / "shards"


def _keep(content: bytes, path: Path) -> None:
    """Write a file of the cache atomically; if space or permission is missing, warn once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < MIN_FREE_BYTES + len(content):
            raise OSError(errno.ENOSPC, f"less than {MIN_FREE_BYTES / 1e9:g} GB are free")
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        _warn_once(
            f"{_cache()}: caches no more shards ({error.strerror}); each is fetched again when it "
            "is used again: free some space, or set MAGNET_TRAIN_CACHE to a folder on another disk"
        )


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=3)
