"""Shards to batches, in named stages: order -> read -> crop -> collate.

Training is endless: epoch after epoch of all shards, each worker walking its own share. Validation is finite: every
item exactly once. Which item comes when is computed before anything is read, from (seed, rank, world size, worker,
workers) alone, so a resumed run skips to its place by arithmetic.

Shapes: b examples, k codebooks, t frames.
"""

import hashlib
import io
import json
import math
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from magnet_train.data.captions import CaptionAugmentation, augmented
from magnet_train.errors import UserError

SHARDS_MIXED = 4  # shards that a worker reads and shuffles together: 1000 crops of 30 s are 14 MB


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


class Item(TypedDict):
    """One example as it lies in a shard."""

    codes: np.ndarray
    info: dict[str, Any]
    reference: dict[str, Tensor] | None


@dataclass(frozen=True)
class ShardSet:
    """A folder of shards with its index."""

    folder: Path
    index: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> "ShardSet":
        """Read the index.

        Raises:
            UserError: if the folder or its index is missing, unreadable, or empty.
        """
        folder = Path(folder).expanduser()
        path = folder / "index.json"
        try:
            index = json.loads(path.read_text())
            shards = cls(folder, index)
            if not shards.counts or not index["codec"]["hash"]:
                raise UserError(f"{path}: lists no shards; run tokenize again")
        except FileNotFoundError as error:
            has_shards = folder.is_dir() and any(folder.glob("*.tar"))
            remedy = "run tokenize again to finish it" if has_shards else "make it with tokenize, or correct the path"
            raise UserError(f"{path}: not there; {remedy}") from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: broken ({type(error).__name__}: {error}); run tokenize again") from error
        return shards

    @property
    def paths(self) -> list[Path]:
        """Of the shards, in their order."""
        return [self.folder / shard["name"] for shard in self.index["shards"]]

    def read(self, number: int, with_references: bool = False) -> list[Item]:
        """All items of a shard, in its order, checked against the index.

        Raises:
            UserError: if the shard is missing, broken, or not what the index says.
        """
        entry, codec = self.index["shards"][number], self.index["codec"]
        path = self.folder / entry["name"]
        items = read_shard(path, with_references, entry.get("sha256"))
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
    """
    size = np.asarray(counts)
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


def read_shard(path: Path, with_references: bool = False, sha256: str | None = None) -> list[Item]:
    """All items of a shard, in its order.

    Raises:
        UserError: if it is missing, truncated, not a shard, or has another SHA-256 than the one given.
    """
    parts: dict[str, dict[str, bytes]] = {}
    try:
        content = path.read_bytes()
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError("its bytes are not those that the index counted")
        for name, data in tar_members(content):
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
        raise UserError(
            f"{path}: broken ({type(error).__name__}: {error}); copy it again, or run tokenize again"
        ) from error


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


def collate(items: list[tuple[Item, int, np.ndarray]], num_frames: int) -> Batch:
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

    A shard that cannot be read is left out with a warning; a folder without any readable one ends the run.
    """

    def __init__(
        self, shards: ShardSet, num_frames: int, batch_size: int, seed: int,
        rank: int = 0, world_size: int = 1, start_batch: int = 0,
        augmentation: CaptionAugmentation = CaptionAugmentation(),  # noqa: B008  frozen
    ):  # fmt: skip
        """Args as of the data module; `start_batch` counts the batches of this rank that are already done."""
        self.shards, self.num_frames, self.batch_size, self.seed = shards, num_frames, batch_size, seed
        self.rank, self.world_size, self.start_batch = rank, world_size, start_batch
        self.augmentation = augmentation

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info is not None else (1, 0)
        # The loader asks its workers in turn, the first for the first batch after a resume.
        role = (worker + self.start_batch) % workers
        done = len(range(role, self.start_batch, workers))
        part, parts = self.rank * workers + role, self.world_size * workers
        items = self._items(training_order(self.shards.counts, self.seed, part, parts, done * self.batch_size))
        while batch := list(islice(items, self.batch_size)):
            yield collate(batch, self.num_frames)

    def _items(self, groups: Iterator[list[tuple[int, int, int]]]) -> Iterator[tuple[Item, int, np.ndarray]]:
        counts, frame_rate = self.shards.counts, self.shards.index["codec"]["frame_rate"]
        before = np.cumsum([0, *counts])
        broken: set[int] = set()
        for group in groups:
            content = {}
            for shard in sorted({s for _, s, _ in group}):
                try:  # anew each time: a network's file system may come back
                    content[shard] = self.shards.read(shard)
                    broken.discard(shard)
                except UserError as error:
                    if shard not in broken:
                        warnings.warn(f"left out: {error}", stacklevel=1)
                    broken.add(shard)
                    if len(broken) == len(counts):
                        raise UserError(f"{self.shards.folder}: no readable shard left, the last: {error}") from error
            for epoch, shard, place in group:
                if shard in content and place < len(content[shard]):
                    item = content[shard][place]
                    rng = np.random.default_rng([self.seed, epoch, shard, place])
                    cropped = crop(item, self.num_frames, frame_rate, rng)
                    info = item["info"] | {"caption": augmented(item["info"], self.augmentation, rng)}
                    varied: Item = {"codes": item["codes"], "info": info, "reference": None}
                    yield varied, int(before[shard]) + place, cropped


class EveryItemOnce(IterableDataset):
    """Finite batches of a split, each item once over all ranks and workers; the last one may be short.

    Raises UserError while iterating if a shard cannot be read: a metric over fewer items is another metric.
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
        for shard, (path, number) in enumerate(zip(self.shards.paths, self.shards.counts, strict=True)):
            if any(map(is_wanted, range(first, first + number))):
                items = self.shards.read(shard, with_references=True)
                if len(items) != number:
                    raise UserError(f"{path}: {len(items)} items, its index says {number}; run tokenize again")
                for index, item in enumerate(items, first):
                    if is_wanted(index):
                        batch.append((item, index, crop(item, self.num_frames, frame_rate, None)))
                        if len(batch) == self.batch_size:
                            yield collate(batch, self.num_frames)
                            batch = []
            first += number
        if batch:
            yield collate(batch, self.num_frames)
