"""Shards of codes in WebDataset's format: index, reading, checking and writing.

A shard is a tar of `KEY.codes.npy` (uint16, codebooks x frames), `KEY.json` and, if metrics need
it, `KEY.reference.npz`. Reading is a list of WebDataset stages (`read_stages`) into which users can
insert others. Shards are untrusted: sizes, names and types in the tar, arrays and JSON are checked
before use.
"""

import fnmatch
import hashlib
import io
import json
import math
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import numpy as np
import torch
from torch import Tensor
from webdataset.autodecode import DecodingError
from webdataset.filters import decode
from webdataset.filters import map as map_stage
from webdataset.pipeline import DataPipeline
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import TarWriter

from magnet_train.common.errors import UserError
from magnet_train.common.redact import redact
from magnet_train.data.remote import find_folders, is_address, read_bytes, read_index

CODES, INFO, REFERENCE = "codes.npy", "json", "reference.npz"
"""Parts of an item: file suffixes after its key."""
REFERENCES = {"embeddings", "tags"}
"""Arrays of a reference."""
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,200}")
SHARD_NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.tar")
MAX_JSON_BYTES = 1 << 20
MAX_MEMBER_BYTES = 1 << 28
MAX_EXAMPLES = 1_000_000
"""Items in one shard."""
MIN_DURATION_S, MAX_DURATION_S = 1e-6, 1e6
"""Limits of an item's length, in seconds; one audio sample is longer than the minimum."""
MAX_HELD_OUT = 0.5
"""Largest share of the data that can be held out for validation."""
LONG_NAME_KINDS = (b"x", b"g", b"L")
"""Types of tar headers that only give the next member a long name or a precise time."""


class Item(TypedDict):
    """One example of a shard."""

    codes: np.ndarray
    """uint16, `k t`."""
    info: dict[str, Any]
    """KEY.json; only `key`, `caption` and `duration_s` are checked."""
    reference: dict[str, Tensor] | None
    """Embeddings and tags of the original audio."""


# --- the set --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardSet:
    """Shards of one or several folders, in the given order."""

    name: str
    """As given."""
    index: dict[str, Any]
    """Index of the folder; for several folders or some shards, only `codec` and `shards`."""
    paths: list[Path | str]
    """Paths or URLs of the shards."""

    @classmethod
    def open(cls, given: str | Path | Sequence[str | Path]) -> "ShardSet":
        """Read the index of each folder; for the syntax of patterns see `remote.find_folders`.

        Raises:
            UserError: if a folder or its index is missing, unreadable or empty, if two folders have
                different codecs, or if a shard is named twice.
        """
        names = [str(given)] if isinstance(given, (str, Path)) else [str(name) for name in given]
        folders = [found for name in names for found in find_folders(name)]
        if not folders:
            raise UserError(f"shards {names}: no folder given; give one made by tokenize")
        first = folders[0][0]
        indexes: dict[str, dict[str, Any]] = {}
        listed: dict[str, dict[str, dict[str, Any]]] = {}
        chosen: dict[Path | str, dict[str, Any]] = {}
        for folder, pattern in folders:
            if folder not in indexes:
                indexes[folder] = open_index(folder)
                _check_same_codec(first, folder, indexes)
                listed[folder] = {shard["name"]: shard for shard in indexes[folder]["shards"]}
            for name in _matching_names(folder, pattern, listed[folder]):
                path = _join(folder, name)
                if path in chosen:
                    raise UserError(f"{redact(path)}: named twice; name each shard once")
                chosen[path] = listed[folder][name]
        is_whole = len(folders) == 1 and folders[0][1] == "*"
        parts = {"codec": indexes[first]["codec"], "shards": list(chosen.values())}
        name = redact(", ".join(names))
        return cls(name, indexes[first] if is_whole else parts, list(chosen))

    def read(self, number: int, with_references: bool = False) -> list[Item]:
        """All items of a shard, in its order, checked against the index.

        Raises:
            UserError: if the shard is missing or damaged, or does not match the index.
        """
        entry, codec, path = self.index["shards"][number], self.index["codec"], self.paths[number]
        items = read_shard(path, with_references, entry.get("sha256"))
        if len(items) != entry["num_examples"]:
            raise UserError(
                f"{redact(path)}: {len(items)} items, its index says {entry['num_examples']}; "
                "run tokenize again"
            )
        for item in items:
            codes = item["codes"]
            if len(codes) != codec["num_codebooks"] or codes.max() >= codec["codebook_size"]:
                raise UserError(
                    f"{redact(path)}: {item['info']['key']} has {len(codes)} codebooks up to "
                    f"{codes.max()}, its codec {codec['num_codebooks']} of "
                    f"{codec['codebook_size']}; run tokenize again"
                )
        return items

    def subset(self, chosen: Sequence[bool]) -> "ShardSet":
        """Only the chosen shards."""
        shards = list(compress(self.index["shards"], chosen))
        index = {"codec": self.index["codec"], "shards": shards}
        return ShardSet(self.name, index, list(compress(self.paths, chosen)))

    @property
    def counts(self) -> list[int]:
        """Items in each shard."""
        return [shard["num_examples"] for shard in self.index["shards"]]


def held_out(names: Sequence[str], share: float, option: str) -> list[bool]:
    """Whether each name is held out for validation: a hash of it is below `share`.

    New names do not change the choice for others.

    Raises:
        UserError: if no name or every name is held out; the message has the smallest share that
            works.

    >>> held_out(["a", "b", "c"], 0.3, "--validation")
    [False, True, True]
    """
    places = [int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name in names]
    chosen = [place < share for place in places]
    if not any(chosen):
        least = math.ceil(min(places) * 1000 + 1e-6) / 1000
        remedy = f"give at least {least:g}, or add more" if least <= MAX_HELD_OUT else "add more"
        raise UserError(f"{option} {share:g}: holds out none of {len(names)}; {remedy}")
    if all(chosen):
        raise UserError(f"{option} {share:g}: holds out all of {len(names)}; give a smaller share")
    return chosen


def open_index(folder: str) -> dict[str, Any]:
    """Read and check the index of a folder.

    Raises:
        UserError: if it is missing, unreadable or invalid, or lists no items.
    """
    path = redact(_join(folder, "index.json"))
    try:
        index = read_index(folder)
        _check_index(index)
    except FileNotFoundError as error:
        local = Path(folder).expanduser()
        has_shards = local.is_dir() and any(local.glob("*.tar"))
        finish = "run tokenize again to finish it"
        remedy = finish if has_shards else "make it with tokenize, or correct the path"
        raise UserError(f"{path}: not there; {remedy}") from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be read ({reason}); make it readable") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken ({error}); run tokenize again") from error
    return index


def _check_index(index: Any) -> None:
    """Raise a ValueError that names the first problem."""
    codec = _typed(index, "codec", dict)
    for name in ("id", "hash"):
        _typed(codec, name, str)
    for name, most in (("num_codebooks", 1024), ("codebook_size", 1 << 16)):
        _within(name, _typed(codec, name, int), 1, most)
    _within("frame_rate", _typed(codec, "frame_rate", (int, float)), 1e-3, 1e6)
    names: set[str] = set()
    total = 0
    for shard in _typed(index, "shards", list):
        name = _typed(shard, "name", str)
        if not SHARD_NAME_PATTERN.fullmatch(name):
            raise ValueError(f"invalid shard name {name[:80]!r}")
        if name in names:
            raise ValueError(f"it lists {name} twice")
        names.add(name)
        total += _within("num_examples", _typed(shard, "num_examples", int), 0, MAX_EXAMPLES)
        if shard.get("sha256") is not None:
            _typed(shard, "sha256", str)
    if total == 0:
        raise ValueError("it lists no shards with items")


def _typed(parent: Any, name: str, kind: Any) -> Any:
    """`parent[name]`, if it has that type."""
    if not isinstance(parent, dict):
        raise ValueError(f"a {type(parent).__name__} instead of an object")
    if name not in parent:
        raise ValueError(f"{name} is missing")
    value = parent[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} has the wrong type, {type(value).__name__}")
    return value


def _within(name: str, value: float, least: float, most: float) -> Any:
    if not least <= value <= most:
        raise ValueError(f"{name}={value} is not within {least:g} and {most:g}")
    return value


def _check_same_codec(first: str, folder: str, indexes: dict[str, dict[str, Any]]) -> None:
    made, expected = indexes[folder]["codec"], indexes[first]["codec"]
    if made["hash"] != expected["hash"]:
        raise UserError(
            f"{redact(folder)}: made with codec {made['id']!r} ({made['hash']}), but "
            f"{redact(first)} with {expected['id']!r} ({expected['hash']}): "
            "join only shards of one codec"
        )


def _matching_names(folder: str, pattern: str, listed: dict[str, Any]) -> list[str]:
    """Names of shards in a folder's index that match a pattern."""
    if pattern in listed:
        return [pattern]
    if names := fnmatch.filter(listed, pattern):
        return names
    known = list(listed)
    raise UserError(
        f"{redact(folder)}: its index has no {pattern}, only {known[0]} … {known[-1]}; correct the "
        "name"
    )


def _join(folder: str, name: str) -> Path | str:
    return (
        f"{folder.rstrip('/')}/{name}" if is_address(folder) else Path(folder).expanduser() / name
    )


# --- reading --------------------------------------------------------------------------------------


def read_shard(
    path: Path | str, with_references: bool = False, sha256: str | None = None
) -> list[Item]:
    """All items of a shard, in its order.

    Raises:
        UserError: if it is missing, truncated, not a shard, has another SHA-256 than given, or
            cannot be downloaded.
    """
    source = {"url": path, "sha256": sha256}
    try:
        return list(DataPipeline(lambda: iter([source]), *read_stages(with_references)))
    except FileNotFoundError as error:
        raise UserError(f"{redact(path)}: missing; copy it again, or run tokenize again") from error
    except OSError as error:
        raise UserError(f"{redact(path)}: cannot be read ({error.strerror or error})") from error
    except (tarfile.TarError, DecodingError, ValueError, EOFError, RecursionError) as error:
        raise UserError(
            f"{redact(path)}: broken ({_reason(error)}); copy it again, or run tokenize again"
        ) from error


def read_stages(with_references: bool = False) -> list[Callable[..., Any]]:
    """WebDataset stages: sources {"url": path or URL} -> items.

    `DataPipeline(SimpleShardList(urls), *read_stages(), shuffle(1000), ...)` is a dataset.
    """

    def is_wanted(name: str) -> bool:
        return with_references or not name.endswith(f".{REFERENCE}")

    return [
        open_shards,
        partial(tar_file_expander, select_files=is_wanted),
        group_by_keys,
        decode(decode_part, pre=[], post=[]),
        map_stage(checked_item),
    ]


def open_shards(sources: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Stage: reads each shard, and verifies its checksum and the sizes of its members."""
    for source in sources:
        content = read_bytes(source["url"], source.get("sha256"))
        check_headers(content)
        yield source | {"stream": io.BytesIO(content)}


def check_headers(content: bytes) -> None:
    """Check checksum, type and size of each member's header before the tar is read.

    `tarfile`, which WebDataset uses, decompresses, expands sparse files, seeks to any size in a
    header, and treats a damaged header as the end.

    Raises:
        ValueError: that names the problem.
    """
    at = 0
    while (header := content[at : at + 512]) != bytes(512):
        digits, checksum = header[124:136].strip(b" \0"), header[148:156].strip(b" \0")
        is_file = header[156:157] in (b"0", b"\0")
        found = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if not digits.isdigit() or not checksum.isdigit() or found != int(checksum, 8):
            raise ValueError(f"truncated, not a tar, or damaged at byte {at}")
        if not is_file and header[156:157] not in LONG_NAME_KINDS:
            raise ValueError(f"the member at byte {at} is not a regular file")
        size = int(digits, 8)
        start = at + 512
        if start + size > len(content) or size > (MAX_MEMBER_BYTES if is_file else 1 << 16):
            raise ValueError(f"truncated, or the member at byte {at} has {size} bytes")
        if not is_file and re.search(rb"size=|GNU\.", content[start : start + size]):
            raise ValueError(f"the member at byte {at} has another size than its header")
        at = start + -(-size // 512) * 512


def decode_part(name: str, content: bytes) -> Any:
    """WebDataset's decoding hook for a part of an item, such as ".json"."""
    decoder = {CODES: decode_codes, INFO: decode_info, REFERENCE: decode_reference}.get(name[1:])
    return None if decoder is None else decoder(content)


def decode_codes(content: bytes) -> np.ndarray:
    """Codes `k t`, uint16, with at least one frame."""
    codes = _decode_npy(content, np.dtype(np.uint16))
    if codes.size == 0:
        raise ValueError(f"no codes: shape {codes.shape}")
    return codes


def decode_info(content: bytes) -> dict[str, Any]:
    """KEY.json, after checking that caption and duration are a string and a number."""
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"{len(content)} bytes")
    # NaN, which Python writes for missing numbers, would become a word of the caption.
    try:
        info = json.loads(content.decode(), parse_constant=lambda name: None)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    if b"\\ud" in content.lower():  # a lone surrogate, which cannot be encoded as UTF-8
        info = json.loads(json.dumps(info, ensure_ascii=False).encode(errors="replace"))
    duration_s = _typed(info, "duration_s", (int, float))
    if not MIN_DURATION_S <= duration_s <= MAX_DURATION_S:
        raise ValueError(f"duration_s={duration_s} must be above 0 s")
    _typed(info, "key", str)
    info["caption"] = _typed({"caption": ""} | info, "caption", str)
    return info


def decode_reference(content: bytes) -> dict[str, Tensor]:
    """Embeddings and tags by name, float32."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        parts = file.infolist()
        if sum(part.file_size for part in parts) > MAX_MEMBER_BYTES:
            raise ValueError("has too many entries")
        arrays = {
            part.filename.removesuffix(".npy"): _decode_npy(file.read(part), np.dtype(np.float32))
            for part in parts
        }
    shapes = {name: array.shape for name, array in arrays.items()}
    if set(shapes) != REFERENCES or len({len(array) for array in arrays.values()}) != 1:
        raise ValueError(f"has {shapes}, not {' and '.join(sorted(REFERENCES))} of equal lengths")
    if not all(array.size and np.isfinite(array).all() for array in arrays.values()):
        raise ValueError("has NaN or infinite values, or none")
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def _decode_npy(content: bytes, dtype: np.dtype) -> np.ndarray:
    """A read-only view of a 2-D array, after checking its header against its size."""
    file = io.BytesIO(content)
    if (version := np.lib.format.read_magic(file)) != (1, 0):
        raise ValueError(f".npy version {version}, not 1.0")
    shape, is_fortran, found = np.lib.format.read_array_header_1_0(file)
    if found != dtype or len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"{found} {shape}, not {dtype} with two axes")
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(
        shape, order="F" if is_fortran else "C"
    )


def checked_item(sample: dict[str, Any]) -> Item:
    """Check a decoded WebDataset sample and convert it to an item.

    Raises:
        ValueError: if a part is missing, or its KEY.json has another key.
    """
    key = sample["__key__"]
    if not KEY_PATTERN.fullmatch(key):
        raise ValueError(f"{key[:80]!r}: a key has letters, digits, - and _ only")
    if missing := [part for part in (CODES, INFO) if part not in sample]:
        raise ValueError(f"{key} has no {missing[0]}")
    if sample[INFO]["key"] != key:
        raise ValueError(f"{key}.json has the key {sample[INFO]['key'][:80]!r}")
    return {"codes": sample[CODES], "info": sample[INFO], "reference": sample.get(REFERENCE)}


def _reason(error: BaseException) -> str:
    """The reason of an error, without WebDataset's additions."""
    if isinstance(error, DecodingError) and error.__cause__ is not None:
        return " ".join(f"{error.key}.{error.k}: {_reason(error.__cause__)}".split())
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = str(error.args[0]).partition(" @ <")[0] if error.args else ""
    return " ".join(text.split())[:200] or type(error).__name__


# --- writing --------------------------------------------------------------------------------------


class ShardWriter:
    """Writes items into a tar without times or owners: the same items give the same bytes."""

    def __init__(self, file: BinaryIO):
        self.num_examples = 0
        self.num_frames = 0
        self.seconds = 0.0
        self._tar = TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False)

    def write(
        self, codes: np.ndarray, info: dict[str, Any], reference: dict[str, np.ndarray] | None
    ) -> None:
        """Add an item: codes `k t`, fields of KEY.json, and references for metrics."""
        parts = {CODES: _encode(partial(np.save, arr=codes, allow_pickle=False))}
        parts[INFO] = json.dumps(info, ensure_ascii=False, allow_nan=False).encode()
        if reference is not None:
            parts[REFERENCE] = _encode(partial(np.savez, allow_pickle=False, **reference))
        self._tar.write({"__key__": info["key"]} | parts)
        self.num_examples += 1
        self.num_frames += codes.shape[1]
        self.seconds += info["duration_s"]

    def close(self) -> None:
        """Write the end of the tar."""
        self._tar.close()


def _encode(save: Callable[[BinaryIO], Any]) -> bytes:
    file = io.BytesIO()
    save(file)
    return file.getvalue()
