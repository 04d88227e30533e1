"""Shards to batches, in named stages: order -> read -> crop -> collate.

Training is endless: epoch after epoch of all shards, each worker walking its own share. Validation is finite: every
item exactly once. Which item comes when is computed before anything is read, from (seed, rank, world size, worker,
workers) alone, so a resumed run skips to its place by arithmetic.

Shapes: b examples, k codebooks, t frames.
"""

import hashlib
import io
import json
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
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


def training_order(counts: list[int], seed: int, part: int, parts: int) -> Iterator[list[tuple[int, int, int]]]:
    """Endless groups of (epoch, shard, place in it) for one of `parts` readers; a group is read at once.

    In each epoch the shards are dealt out anew, so that unequal shares even out over time. Within a group of
    `SHARDS_MIXED` shards the items are shuffled.
    """
    for epoch in count():
        shards = np.random.default_rng([seed, epoch]).permutation(len(counts))[part::parts]
        rng = np.random.default_rng([seed, epoch, part, parts])
        for first in range(0, len(shards), SHARDS_MIXED):
            items = [(epoch, int(s), i) for s in shards[first : first + SHARDS_MIXED] for i in range(counts[s])]
            yield [items[i] for i in rng.permutation(len(items))]


def skipped(groups: Iterator[list], number: int) -> Iterator[list]:
    """The groups without their first `number` items."""
    for group in groups:
        if number >= len(group):
            number -= len(group)
            continue
        yield group[number:]
        number = 0


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
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                if member.isfile() and (kind != "reference.npz" or with_references):
                    parts.setdefault(key, {})[kind] = tar.extractfile(member).read()  # type: ignore[union-attr]
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


def _codes(content: bytes) -> np.ndarray:
    codes = np.load(io.BytesIO(content), allow_pickle=False)
    if codes.dtype != np.uint16 or codes.ndim != 2:
        raise ValueError(f"codes are {codes.dtype} {codes.shape}, not uint16 [K, T]")
    return codes


def _arrays(content: bytes) -> dict[str, Tensor]:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


# --- crop and collate ---------------------------------------------------------------------------------------------


def crop(item: Item, num_frames: int, frame_rate: float, rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
    """Codes `k t` and valid `t`: a random part where the item is longer, padding where it is shorter.

    Args:
        item: see there.
        num_frames: T, in frames.
        frame_rate: of the codec, in Hz; tells how many of the item's frames hold audio.
        rng: where the crop begins; None = at the beginning.
    """
    codes = item["codes"]
    real = min(codes.shape[1], int(np.ceil(round(item["info"]["duration_s"] * frame_rate, 6))))
    start = int(rng.integers(real - num_frames + 1)) if rng is not None and real > num_frames else 0
    piece = codes[:, start : min(real, start + num_frames)].astype(np.int64)
    length = piece.shape[1]
    padded = np.pad(piece, ((0, 0), (0, num_frames - length)))
    return torch.from_numpy(padded), torch.arange(num_frames) < length


def collate(items: list[tuple[Item, int, Tensor, Tensor]]) -> Batch:
    """Items with their index, codes and validity -> a batch."""
    return {
        "codes": torch.stack([codes for *_, codes, _ in items]),
        "valid": torch.stack([valid for *_, valid in items]),
        "captions": [item["info"].get("caption", "") for item, *_ in items],
        "keys": [item["info"]["key"] for item, *_ in items],
        "indices": [index for _, index, *_ in items],
        "infos": [item["info"] for item, *_ in items],
        "references": [item["reference"] for item, *_ in items],
    }


# --- the two datasets ---------------------------------------------------------------------------------------------


class TrainingStream(IterableDataset):
    """Endless batches of random crops; put into a DataLoader with `batch_size=None`.

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
        groups = training_order(self.shards.counts, self.seed, part, parts)
        items = self._items(skipped(groups, done * self.batch_size))
        while batch := list(islice(items, self.batch_size)):
            yield collate(batch)

    def _items(self, groups: Iterator[list[tuple[int, int, int]]]) -> Iterator[tuple[Item, int, Tensor, Tensor]]:
        paths, frame_rate = self.shards.paths, self.shards.index["codec"]["frame_rate"]
        before = np.cumsum([0, *self.shards.counts])
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
                    if len(broken) == len(paths):
                        raise UserError(f"{self.shards.folder}: no readable shard left, the last: {error}") from error
            for epoch, shard, place in group:
                if shard in content and place < len(content[shard]):
                    item = content[shard][place]
                    rng = np.random.default_rng([self.seed, epoch, shard, place])
                    cropped = crop(item, self.num_frames, frame_rate, rng)
                    info = item["info"] | {"caption": augmented(item["info"], self.augmentation, rng)}
                    varied: Item = {"codes": item["codes"], "info": info, "reference": None}
                    yield varied, int(before[shard]) + place, *cropped


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
        counts, frame_rate = self.shards.counts, self.shards.index["codec"]["frame_rate"]
        mine = range(self.rank, sum(counts), self.world_size)
        # Whole batches go to workers in turn, as the loader asks for them.
        wanted = {i for n, i in enumerate(mine) if n // self.batch_size % workers == worker}
        batch, index = [], 0
        for shard, (path, number) in enumerate(zip(self.shards.paths, counts, strict=True)):
            if any(i in wanted for i in range(index, index + number)):
                items = self.shards.read(shard, with_references=True)
                if len(items) != number:
                    raise UserError(f"{path}: {len(items)} items, its index says {number}; run tokenize again")
                for place, item in enumerate(items):
                    if index + place in wanted:
                        batch.append((item, index + place, *crop(item, self.num_frames, frame_rate, None)))
                        if len(batch) == self.batch_size:
                            yield collate(batch)
                            batch = []
            index += number
        if batch:
            yield collate(batch)
