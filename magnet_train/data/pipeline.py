"""Shards to batches, in named stages: order -> read -> crop -> collate.

Training is endless: epoch after epoch of all shards, each worker walking its own share. Validation is finite: every
item exactly once. Which item comes when is computed before anything is read, from (seed, rank, world size, worker,
workers) alone, so a resumed run skips to its place by arithmetic.

Shapes: b examples, k codebooks, t frames.
"""

import fnmatch
import io
import json
import math
import tarfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from magnet_train.common.errors import UserError
from magnet_train.data.captions import CaptionAugmentation, augmented
from magnet_train.data.remote import find_folders, is_address, read_bytes, read_index

SHARDS_MIXED = 4  # shards that a worker reads and shuffles together: 1000 crops of 30 s are 14 MB
MOST_UNREAD, MOST_WAIT_S = 100, 900.0
"""Shards in a row, and seconds, after which a reader that could read nothing ends the run: all ranks wait for it, and
give up by themselves after half an hour."""


class Batch(TypedDict):
    """What the loader yields."""

    codes: Tensor
    """`b k t`, int64."""
    valid: Tensor
    """`b t` bool, False = padding."""
    captions: list[str]
    keys: list[str]
    """Ids of the items, unique in a split."""
    indices: list[int]
    """Places of the items in the split, 0 … num_items - 1."""
    infos: list[dict[str, Any]]
    """All fields of KEY.json."""
    references: list[dict[str, Tensor] | None]
    """Embeddings and tags of the original audio, where the shard has them and they were asked for."""
    shards_left_out: int
    """Shards that the loader process could not read since its last batch."""
    items_left_out: int
    """Items that it would have yielded from them."""


class Item(TypedDict):
    """One example as it lies in a shard."""

    codes: np.ndarray
    info: dict[str, Any]
    reference: dict[str, Tensor] | None


@dataclass(frozen=True)
class ShardSet:
    """Shards of one folder or of several, in the order in which they were named."""

    name: str
    """As it was given."""
    index: dict[str, Any]
    """Of the folder; of several, or of some of its shards, no more than `codec` and `shards`."""
    paths: list[Path | str]
    """Of the shards, or their addresses."""

    @classmethod
    def open(cls, given: str | Path | Sequence[str | Path]) -> "ShardSet":
        """Read the index of each folder that is named; `places.find_folders` says how they may be named.

        Raises:
            UserError: if a folder or its index is missing, unreadable, or empty; if two folders have codes of
                different codecs; if a shard is named twice.
        """
        names = [str(given)] if isinstance(given, (str, Path)) else [str(name) for name in given]
        folders = [found for name in names for found in find_folders(name)]
        if not folders:
            raise UserError(f"shards {names}: names no folder; give one that tokenize made")
        first = folders[0][0]
        indexes: dict[str, dict[str, Any]] = {}
        listed: dict[str, dict[str, dict[str, Any]]] = {}
        chosen: dict[Path | str, dict[str, Any]] = {}
        for folder, pattern in folders:
            if folder not in indexes:
                index = indexes[folder] = _open_index(folder)
                listed[folder] = {shard["name"]: shard for shard in index["shards"]}  # looked up thousands of times
                made, there = index["codec"], indexes[first]["codec"]
                if made["hash"] != there["hash"]:
                    raise UserError(
                        f"{folder}: made with codec {made['id']!r} ({made['hash']}), but {first} with {there['id']!r} "
                        f"({there['hash']}): join only shards of one codec"
                    )
            for name in _picked(folder, pattern, listed[folder]):
                place = f"{folder.rstrip('/')}/{name}" if is_address(folder) else Path(folder).expanduser() / name
                if place in chosen:
                    raise UserError(f"{place}: named twice; name each shard once")
                chosen[place] = listed[folder][name]
        whole = len(folders) == 1 and folders[0][1] == "*"
        index = indexes[first] if whole else {"codec": indexes[first]["codec"], "shards": list(chosen.values())}
        return cls(", ".join(names), index, list(chosen))

    def read(self, number: int, with_references: bool = False) -> list[Item]:
        """All items of a shard, in its order, checked against the index.

        Raises:
            UserError: if the shard is missing, broken, or not what the index says.
        """
        entry, codec, path = self.index["shards"][number], self.index["codec"], self.paths[number]
        items = read_shard(path, with_references, entry.get("sha256"))
        if len(items) != entry["num_examples"]:
            raise UserError(f"{path}: {len(items)} items, its index says {entry['num_examples']}; run tokenize again")
        for item in items:
            codes = item["codes"]
            if len(codes) != codec["num_codebooks"] or (codes.size and codes.max() >= codec["codebook_size"]):
                raise UserError(
                    f"{path}: {item['info']['key']} has {len(codes)} codebooks up to {codes.max(initial=0)}, its codec "
                    f"{codec['num_codebooks']} of {codec['codebook_size']}: run tokenize again"
                )
        return items

    @property
    def counts(self) -> list[int]:
        """Items in each shard."""
        return [shard["num_examples"] for shard in self.index["shards"]]


def _open_index(folder: str) -> dict[str, Any]:
    """The index of a folder that is known to hold what is read of it."""
    path = f"{folder.rstrip('/')}/index.json" if is_address(folder) else Path(folder).expanduser() / "index.json"
    try:
        index = read_index(folder)
        if not index["codec"]["hash"] or not sum(shard["num_examples"] for shard in index["shards"]):
            raise UserError(f"{path}: lists no shards with items; run tokenize again")
        if len({shard["name"] for shard in index["shards"]}) < len(index["shards"]):
            raise UserError(f"{path}: lists a shard twice; run tokenize again")
    except FileNotFoundError as error:
        own = Path(folder).expanduser()
        has_shards = own.is_dir() and any(own.glob("*.tar"))
        remedy = "run tokenize again to finish it" if has_shards else "make it with tokenize, or correct the path"
        raise UserError(f"{path}: not there; {remedy}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: broken ({type(error).__name__}: {error}); run tokenize again") from error
    return index


def _picked(folder: str, pattern: str, listed: dict[str, Any]) -> list[str]:
    """Names of shards that a pattern matches, of those that a folder's index lists."""
    if pattern in listed:
        return [pattern]
    if names := fnmatch.filter(listed, pattern):
        return names
    known = list(listed)
    raise UserError(f"{folder}: its index lists no {pattern}, but {known[0]} … {known[-1]}; correct the name")


# --- order --------------------------------------------------------------------------------------------------------


def training_order(
    counts: list[int], seed: int, part: int, parts: int, done: int = 0
) -> Iterator[list[tuple[int, int, int]]]:
    """Endless groups of (epoch, shard, place in it) for one of `parts` readers; a group is read at once.

    In each epoch the shards are dealt out anew, so that unequal shares even out over time. Within a group of
    `SHARDS_MIXED` shards the items are shuffled.

    Args:
        counts: items in each shard.
        seed: of the order.
        part: number of the reader.
        parts: readers.
        done: items of this reader to leave out at the beginning; what they are is not worked out.

    Raises:
        ValueError: if there are more readers than shards, or no items: some reader would look for its first for ever.
    """
    size = np.asarray(counts)
    if parts > len(counts) or not size.any():
        raise ValueError(f"parts={parts} readers for {len(counts)} shards with {size.sum()} items")
    for epoch in count():
        shards = np.random.default_rng([seed, epoch]).permutation(len(counts))[part::parts]
        if done >= (total := int(size[shards].sum())):
            done -= total
            continue
        rng = np.random.default_rng([seed, epoch, part, parts])
        for group in (shards[i : i + SHARDS_MIXED] for i in range(0, len(shards), SHARDS_MIXED)):
            order = rng.permutation(int(size[group].sum()))
            if done < len(order):
                items = [(epoch, s, i) for s in group.tolist() for i in range(counts[s])]
                yield [items[i] for i in order[done:].tolist()]
            done = max(0, done - len(order))


# --- read ---------------------------------------------------------------------------------------------------------


def read_shard(path: Path | str, with_references: bool = False, sha256: str | None = None) -> list[Item]:
    """All items of a shard, in its order.

    Raises:
        UserError: if it is missing, truncated, not a shard, has another SHA-256 than the one given, or lies at an
            address that cannot be reached.
    """
    parts: dict[str, dict[str, bytes]] = {}
    try:
        for name, data in tar_members(read_bytes(path, sha256)):
            key, _, kind = name.partition(".")
            if kind != "reference.npz" or with_references:
                parts.setdefault(key, {})[kind] = data
        return [
            {
                "codes": _codes(part["codes.npy"]),
                "info": json.loads(part["json"]),
                "reference": _arrays(part["reference.npz"]) if "reference.npz" in part else None,
            }
            for part in parts.values()
        ]
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; copy it again, or run tokenize again") from error
    except (OSError, tarfile.TarError, ValueError, KeyError, EOFError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: broken ({reason}); copy it again, or run tokenize again") from error


def tar_members(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in a tar, in its order; ten times as fast as tarfile on the tars we write.

    Raises:
        ValueError, tarfile.TarError: if it is no tar, or one that is damaged or cut off.
    """
    at = 0
    while (header := content[at : at + 512]) != bytes(512):
        if len(header) < 512:
            raise ValueError("cut off")
        if sum(header) - sum(header[148:156]) + 8 * ord(" ") != int(header[148:156].rstrip(b"\0 "), 8):
            raise ValueError("no tar, or a damaged one")
        if header[156:157] != b"0" or header[345]:  # a long name, or another tool's ways
            with tarfile.open(fileobj=io.BytesIO(content[at:])) as tar:
                yield from ((m.name, tar.extractfile(m).read()) for m in tar if m.isfile())  # type: ignore[union-attr]
            return
        first, size = at + 512, int(header[124:136].rstrip(b"\0 "), 8)
        if first + size > len(content):
            raise ValueError("cut off")
        yield header[:100].rstrip(b"\0").decode(), content[first : first + size]
        at = first + -(-size // 512) * 512


def _codes(content: bytes) -> np.ndarray:
    begin = 10 + int.from_bytes(content[8:10], "little")
    shape, is_fortran, dtype = _npy_header(content[:begin])
    if dtype != np.uint16 or len(shape) != 2:
        raise ValueError(f"codes are {dtype} {shape}, not uint16 [K, T]")
    return np.frombuffer(content, np.uint16, offset=begin).reshape(shape, order="F" if is_fortran else "C")


@lru_cache(maxsize=64)  # crops of one length have one header, and to parse it takes longer than to read the codes
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    file = io.BytesIO(header)
    if (version := np.lib.format.read_magic(file)) != (1, 0):
        raise ValueError(f"codes are of .npy version {version}, not 1.0")
    return np.lib.format.read_array_header_1_0(file)


def _arrays(content: bytes) -> dict[str, Tensor]:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


# --- crop lengths -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CropPhase:
    """A part of training in which all crops have one length."""

    num_batches: int | None
    """Batches of this phase; None = all that follow."""
    num_frames: int
    """Length of a crop, in frames."""
    batch_size: int
    """Crops in a batch."""


def phase_of(phases: Sequence[CropPhase], batch: int) -> CropPhase:
    """The phase of the batch with this number, from 0.

    >>> phase_of([CropPhase(2, 50, 8), CropPhase(None, 100, 4)], 2).num_frames
    100
    """
    for phase in phases:
        if phase.num_batches is None or batch < phase.num_batches:
            return phase
        batch -= phase.num_batches
    return phases[-1]


def items_before(phases: Sequence[CropPhase], batch: int, role: int, workers: int) -> int:
    """Items in the batches role, role + workers, … below `batch`: what one loader process has yielded by then.

    >>> items_before([CropPhase(2, 50, 8), CropPhase(None, 100, 4)], batch=5, role=1, workers=2)
    12
    """
    items, first = 0, 0
    for phase in phases:
        end = batch if phase.num_batches is None else min(batch, first + phase.num_batches)
        num_batches = len(range(role, end, workers)) - len(range(role, first, workers))
        items += max(0, num_batches) * phase.batch_size
        first = end
    return items


# --- crop and collate ---------------------------------------------------------------------------------------------


def crop(item: Item, num_frames: int, frame_rate: float, rng: np.random.Generator | None) -> np.ndarray:
    """Codes `k t`, uint16: a random part of `num_frames` where the item is longer, all its audio where it is not.

    Args:
        item: see there.
        num_frames: T, in frames.
        frame_rate: of the codec, in Hz; tells how many of the item's frames hold audio.
        rng: where the crop begins; None = at the beginning.
    """
    codes = item["codes"]
    real = min(codes.shape[1], math.ceil(round(item["info"]["duration_s"] * frame_rate, 6)))
    start = int(rng.integers(real - num_frames + 1)) if rng is not None and real > num_frames else 0
    return codes[:, start : min(real, start + num_frames)]


def collate(
    items: list[tuple[Item, int, np.ndarray]], num_frames: int, shards_left_out: int = 0, items_left_out: int = 0
) -> Batch:
    """Items with their index and cropped codes -> a batch, padded to `num_frames`."""
    codes = torch.zeros(len(items), len(items[0][2]), num_frames, dtype=torch.int64)
    valid = torch.zeros(len(items), num_frames, dtype=torch.bool)
    for row, real, (_, _, piece) in zip(codes.numpy(), valid.numpy(), items, strict=True):
        row[:, : piece.shape[1]] = piece
        real[: piece.shape[1]] = True
    return {
        "codes": codes,
        "valid": valid,
        "captions": [item["info"].get("caption", "") for item, *_ in items],
        "keys": [item["info"]["key"] for item, *_ in items],
        "indices": [index for _, index, _ in items],
        "infos": [item["info"] for item, *_ in items],
        "references": [item["reference"] for item, *_ in items],
        "shards_left_out": shards_left_out,
        "items_left_out": items_left_out,
    }


def packed(batch: Any) -> Any:
    """The same batch, packed for its way if this is a loader process: the `collate_fn` of a DataLoader of ours.

    Otherwise each tensor would travel as a file of shared memory, and torch would look at each string of the batch;
    either takes longer than to read and crop the codes.
    """
    return batch if get_worker_info() is None else _Packed(batch)


class _Packed(dict):
    """A batch that is pickled with codes as uint16 and the lengths of what is valid, and unpickled as it was."""

    def __reduce__(self) -> tuple[Any, ...]:
        rest = {name: value for name, value in self.items() if name not in ("codes", "valid")}
        return _unpacked, (self["codes"].numpy().astype(np.uint16), self["valid"].sum(1).tolist(), rest)


def _unpacked(codes: np.ndarray, lengths: list[int], rest: dict[str, Any]) -> dict[str, Any]:
    valid = torch.arange(codes.shape[2]) < torch.tensor(lengths)[:, None]
    return {"codes": torch.from_numpy(codes.astype(np.int64)), "valid": valid, **rest}


# --- the two datasets ---------------------------------------------------------------------------------------------


class TrainingStream(IterableDataset):
    """Endless batches of random crops; put into a DataLoader with `batch_size=None` and `collate_fn=packed`.

    A shard that cannot be read is left out with a warning, counted in the next batch, and tried again when its turn
    comes again. A reader that can read nothing for long ends the run: the other ranks would wait for it.
    """

    def __init__(
        self, shards: ShardSet, num_frames: int, batch_size: int, seed: int,
        rank: int = 0, world_size: int = 1, start_batch: int = 0,
        augmentation: CaptionAugmentation = CaptionAugmentation(),  # noqa: B008  frozen
        shorter: Sequence[CropPhase] = (),
    ):  # fmt: skip
        """Args as of the data module.

        `start_batch` counts the batches of this rank that are already done; `shorter` are phases that come before the
        crops of `num_frames`.
        """
        self.shards, self.seed = shards, seed
        self.phases = (*shorter, CropPhase(None, num_frames, batch_size))
        self.rank, self.world_size, self.start_batch = rank, world_size, start_batch
        self.augmentation = augmentation

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info is not None else (1, 0)
        # The loader asks its workers in turn, the first for the first batch after a resume.
        role = (worker + self.start_batch) % workers
        done = items_before(self.phases, self.start_batch, role, workers)
        part, parts = self.rank * workers + role, self.world_size * workers
        left_out: Counter[str] = Counter()
        groups = training_order(self.shards.counts, self.seed, part, parts, done)
        items = self._items(groups, left_out)
        frame_rate = self.shards.index["codec"]["frame_rate"]
        for number in count(self.start_batch + worker, workers):
            phase = phase_of(self.phases, number)
            batch = []
            for item, index, rng in islice(items, phase.batch_size):
                cropped = crop(item, phase.num_frames, frame_rate, rng)
                info = item["info"] | {"caption": augmented(item["info"], self.augmentation, rng)}
                batch.append(({"codes": item["codes"], "info": info, "reference": None}, index, cropped))
            yield collate(batch, phase.num_frames, left_out["shards"], left_out["items"])
            left_out.clear()

    def _items(
        self, groups: Iterator[list[tuple[int, int, int]]], left_out: Counter[str]
    ) -> Iterator[tuple[Item, int, np.random.Generator]]:
        before = np.cumsum([0, *self.shards.counts])
        broken: set[int] = set()
        unread, start = 0, time.monotonic()
        for group in groups:
            content = {}
            for shard, number in sorted(Counter(s for _, s, _ in group).items()):
                try:  # anew each time: a network's file system may come back
                    content[shard] = self.shards.read(shard)
                    broken.discard(shard)
                except UserError as error:
                    left_out.update(shards=1, items=number)
                    unread += 1
                    if shard not in broken:
                        warnings.warn(f"left out: {error}", stacklevel=1)
                    broken.add(shard)
                    spent = time.monotonic() - start
                    if not content and (unread >= MOST_UNREAD or spent > MOST_WAIT_S):
                        raise UserError(
                            f"{self.shards.name}: no readable shard among the last {unread}, tried for {spent:.0f} s; "
                            f"the last: {error}"
                        ) from error
            for epoch, shard, place in group:
                if shard in content:
                    item = content[shard][place]
                    rng = np.random.default_rng([self.seed, epoch, shard, place])
                    yield item, int(before[shard]) + place, rng
            if content:
                unread, start = 0, time.monotonic()


class EveryItemOnce(IterableDataset):
    """Finite batches of a split, each item once over all ranks and workers; the last one may be short.

    Raises UserError while iterating if a shard cannot be read, since a metric over fewer items is another metric, or if
    two items have one key, since by their keys they are told apart.
    """

    def __init__(self, shards: ShardSet, num_frames: int, batch_size: int, rank: int = 0, world_size: int = 1):
        """Args as of the data module."""
        self.shards, self.num_frames, self.batch_size = shards, num_frames, batch_size
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info is not None else (1, 0)
        frame_rate = self.shards.index["codec"]["frame_rate"]

        def is_wanted(index: int) -> bool:
            """Items go to ranks in turn, and whole batches to workers in turn, as the loader asks for them."""
            number, rank = divmod(index, self.world_size)
            return rank == self.rank and number // self.batch_size % workers == worker

        batch, first = [], 0
        seen: dict[str, int] = {}
        paths = self.shards.paths
        for shard, number in enumerate(self.shards.counts):
            if any(map(is_wanted, range(first, first + number))):
                items = self.shards.read(shard, with_references=True)
                for index, item in enumerate(items, first):
                    if (key := item["info"]["key"]) in seen:
                        raise UserError(
                            f"{paths[shard]}: {key} is in {paths[seen[key]]} too, and metrics go by keys; "
                            "give the audio files of one set other names and tokenize it again"
                        )
                    seen[key] = shard
                    if is_wanted(index):
                        batch.append((item, index, crop(item, self.num_frames, frame_rate, None)))
                        if len(batch) == self.batch_size:
                            yield collate(batch, self.num_frames)
                            batch = []
            first += number
        if batch:
            yield collate(batch, self.num_frames)
