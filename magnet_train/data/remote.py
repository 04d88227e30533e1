"""Where shards lie: folders as people name them, and the bytes of a shard, local or at an address.

An address has `://` in it; fsspec reads it. What is fetched is kept whole under the name of its SHA-256, in `shards`
of the project's cache, so that a file there is right or is noticed, and several processes that fetch the same do no
harm: each writes aside and moves into place what the others would have. Errors that may pass are tried again, with
growing pauses.
"""

import errno
import glob
import hashlib
import json
import random
import re
import shutil
import time
import uuid
import warnings
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from magnet_train.common.downloads import cache_dir
from magnet_train.common.errors import UserError
from magnet_train.common.pretrained import one_line

SHARD_PATIENCE_S, INDEX_PATIENCE_S = 60.0, 15.0
"""Seconds within which a fetch is tried again; an index is wanted at the start, when somebody looks."""
FIRST_PAUSE_S = 1.0
"""Before the second try; each further pause is twice as long, give or take a half."""
STALL_S = 20.0
"""Seconds in which an HTTP server must answer, and between two pieces of what it sends."""
SPARE_BYTES = 2_000_000_000
"""Left free on the cache's disk, which may be that of the checkpoints."""

_jitter = random.Random()  # its own: drawing from the common one would change what a run draws


def is_address(place: str | Path) -> bool:
    """Whether it is to be fetched, and no path."""
    return "://" in str(place)


# --- what people write --------------------------------------------------------------------------------------------


def find_folders(given: str) -> list[tuple[str, str]]:
    """Folders that a text names, in its order, each with a pattern for the names of its shards.

    Braces are alternatives (`{a,b}`) or a range (`{00..07}`), in the order written; `*`, `?` and `[…]` match names,
    sorted. A last part that ends in `.tar` picks shards of its folder; their names are matched with the folder's
    index, so that needs no listing. A folder that exists under the very name is that one.

    Raises:
        UserError: if nothing matches, braces do not pair, or a place that cannot list is asked to.

    >>> find_folders("music/part-{0..1}")
    [('music/part-0', '*'), ('music/part-1', '*')]
    >>> find_folders("https://host/music/shard-{008..009}.tar")
    [('https://host/music', 'shard-008.tar'), ('https://host/music', 'shard-009.tar')]
    """
    if Path(given).expanduser().is_dir():
        return [(given, "*")]
    from braceexpand import braceexpand

    try:
        parts = list(braceexpand(given))
    except ValueError as error:
        raise UserError(f"{given}: its braces do not pair; write {{a,b}} or {{00..07}}") from error
    found = []
    for part in parts:
        folder, _, name = part.rpartition("/") if part.endswith(".tar") else (part, "", "*")
        found += [(one, name) for one in ([folder or "."] if not has_wildcard(folder) else _listed(folder))]
    return found


def has_wildcard(text: str) -> bool:
    """Whether it stands for several names."""
    return re.search(r"[*?\[]", text) is not None


def _listed(pattern: str) -> list[str]:
    """Folders that match, sorted."""
    if not is_address(pattern):
        path = str(Path(pattern).expanduser())
        found = [name for name in glob.glob(path) if Path(name).is_dir()]
    elif pattern.startswith(("http:", "https:")):
        raise UserError(f"{pattern}: a web server does not list folders; name them with braces, as part-{{00..07}}")
    else:
        try:
            store, path = _store(pattern)
            names = store.glob(path, detail=True)
            found = [store.unstrip_protocol(k) for k, about in names.items() if about["type"] == "directory"]
        except Exception as error:  # each store has errors of its own
            raise _explained(pattern, error) from error
    if not found:
        raise UserError(f"{pattern}: no folder matches; correct the pattern")
    return sorted(found)


# --- bytes --------------------------------------------------------------------------------------------------------


def read_index(folder: str) -> Any:
    """The index.json of a folder. At an address it is fetched anew, or if that cannot be reached taken from the cache.

    Raises:
        UserError: if it is at an address, and cannot be fetched or is not cached.
        OSError, ValueError: if it is missing elsewhere, or is no JSON.
    """
    if not is_address(folder):
        return json.loads((Path(folder).expanduser() / "index.json").read_bytes())
    address = f"{folder.rstrip('/')}/index.json"
    kept = _cache() / "index" / f"{hashlib.sha256(address.encode()).hexdigest()}.json"
    try:
        content = _fetched(address, INDEX_PATIENCE_S)
    except Exception as error:  # each store has errors of its own
        if not (_may_pass(error) or _lacks_credentials(error)) or not kept.is_file():
            raise _explained(address, error) from error
        warnings.warn(f"{address}: cannot be reached ({one_line(error)}); going on with {kept}", stacklevel=2)
        return json.loads(kept.read_bytes())
    index = json.loads(content)
    _keep(content, kept)
    return index


def read_bytes(place: str | Path, sha256: str | None) -> bytes:
    """A file, checked if its SHA-256 is given; one at an address is cached then, and fetched if the cache has it not.

    Raises:
        UserError: if it is at an address and cannot be fetched.
        OSError: if it is elsewhere and cannot be read.
        ValueError: if it has another SHA-256.
    """
    if not is_address(place):
        return _checked(Path(place).read_bytes(), sha256)
    kept = _cache() / f"{sha256}.tar"
    if sha256 is not None:
        try:
            return _checked(kept.read_bytes(), sha256)
        except (OSError, ValueError):  # not there, or damaged
            pass
    try:
        content = _fetched(str(place), SHARD_PATIENCE_S, sha256)
    except _OtherBytes:
        raise
    except Exception as error:  # each store has errors of its own
        raise _explained(str(place), error) from error
    if sha256 is not None:  # and it is its SHA-256: an index from elsewhere cannot choose another name
        _keep(content, kept)
    return content


class _OtherBytes(ValueError):
    """Bytes that the index has not counted."""


def _checked(content: bytes, sha256: str | None) -> bytes:
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise _OtherBytes("its bytes are not those that the index counted")
    return content


def _fetched(address: str, patience_s: float, sha256: str | None = None) -> bytes:
    """Tried again while that may help: once, then within the patience; once after other bytes than expected."""
    start, others = time.monotonic(), 0
    for number in count():
        try:
            store, path = _store(address)
            return _checked(store.cat_file(path), sha256)
        except _OtherBytes:  # a connection that was cut without a word, or really another file
            others += 1
            if others == 2:
                raise
        except Exception as error:  # each store has errors of its own
            pause = FIRST_PAUSE_S * 2**number * _jitter.uniform(0.5, 1.5)
            if not _may_pass(error) or (number and time.monotonic() + pause > start + patience_s):
                raise
            time.sleep(pause)
    raise AssertionError


def _store(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it. Anew in each process: its threads survive no fork."""
    import fsspec

    if not address.startswith(("http:", "https:")):
        return fsspec.core.url_to_fs(address)
    import aiohttp

    limits = aiohttp.ClientTimeout(total=None, sock_connect=STALL_S, sock_read=STALL_S)
    return fsspec.core.url_to_fs(address, client_kwargs={"timeout": limits, "trust_env": True})


def _status(error: BaseException) -> int | None:
    """HTTP status of an error; aiohttp and gcsfs call it differently."""
    status = str(getattr(error, "status", None) or getattr(error, "code", None))
    return int(status) if status.isdigit() else None


def _may_pass(error: BaseException) -> bool:
    """Whether it makes sense to try again."""
    if isinstance(error, (FileNotFoundError, PermissionError, ImportError, ValueError)) or _lacks_credentials(error):
        return False
    status = _status(error)
    return status is None or not 400 <= status < 500 or status in (408, 429)  # timeout, too many requests


def _lacks_credentials(error: BaseException) -> bool:
    """botocore's and google-auth's errors before anything is asked of the store."""
    return type(error).__name__.endswith("CredentialsError")


def _explained(address: str, error: BaseException) -> UserError:
    """What the user reads."""
    reason = "no answer in time" if isinstance(error, TimeoutError) else one_line(error)
    if isinstance(error, FileNotFoundError) or _status(error) in (404, 410):
        return UserError(f"{address}: not there; copy the whole folder that tokenize made, or correct the address")
    if isinstance(error, PermissionError) or _status(error) in (401, 403) or _lacks_credentials(error):
        return UserError(f"{address}: may not be read ({reason}); give credentials that may, or correct the address")
    if isinstance(error, ImportError):
        extra = {"s3": "'magnet-train[s3]'", "gs": "'magnet-train[gs]'"}.get(address.partition("://")[0], "it")
        return UserError(f"{address}: a package is missing ({reason}); pip install {extra}")
    if not _may_pass(error):
        return UserError(f"{address}: no such address ({reason}); give a folder, or s3://, gs://, http:// or https://")
    return UserError(
        f"{address}: cannot be reached ({reason}); look whether the store answers, or copy the shards to a folder"
    )


# --- cache --------------------------------------------------------------------------------------------------------


def _cache() -> Path:
    return cache_dir() / "shards"


def _keep(content: bytes, path: Path) -> None:
    """Writes a file of the cache whole or not at all; if there is no room or no right to, one warning is all."""
    aside = path.with_name(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < SPARE_BYTES + len(content):
            raise OSError(errno.ENOSPC, f"less than {SPARE_BYTES / 1e9:g} GB are free")
        try:
            aside.write_bytes(content)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        _warn_once(
            f"{_cache()}: keeps no more shards ({error.strerror}); each is fetched again when it is used again: free "
            "some space, or set MAGNET_TRAIN_CACHE to a folder on another disk"
        )


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=3)
