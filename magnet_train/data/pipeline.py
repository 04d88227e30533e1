"""Shards to batches, as stages of a WebDataset pipeline: order -> read -> batch -> crop -> collate.

Training data is endless: in each epoch, every worker reads its part of the shards. Evaluation reads
every item exactly once. The order is a function of (seed, rank, world size, worker, workers), so a
resumed run can compute its position without reading data.

A stage maps an iterator to an iterator. Examples are dicts between reading and collating, so that
other stages such as `webdataset.map` can be inserted.

Shapes: b examples, k codebooks, t frames.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.pipeline import DataPipeline

from magnet_train.common.errors import UserError
from magnet_train.common.redact import redact
from magnet_train.data.captions import CaptionAugmentation, augmented
from magnet_train.data.shards import Item, ShardSet

CropStart = Literal["anywhere", "bar"]
SHARDS_MIXED = 4
"""Shards that a worker shuffles together: 1000 crops of 30 s take 14 MB."""
MAX_UNREADABLE, MAX_UNREADABLE_S = 100, 900.0
"""Consecutive unreadable shards, and seconds, after which a reader ends the run; the other ranks
wait for it and would time out after half an hour."""


class Batch(TypedDict):
    """What the loader yields."""

    codes: Tensor
    """`b k t`, int64."""
    valid: Tensor
    """`b t` bool, False = padding; stays on the host."""
    captions: list[str]
    keys: list[str]
    """Ids of the items, unique in a split."""
    indices: list[int]
    """Positions of the items in the split, 0 … num_items - 1."""
    infos: list[dict[str, Any]]
    """All fields of KEY.json."""
    references: list[dict[str, Tensor] | None]
    """Embeddings and tags of the original audio, if requested and in the shard."""
    shards_skipped: int
    """Shards that the worker failed to read since its last batch."""
    items_skipped: int
    """Items of these shards, which were replaced by others."""


class Example(TypedDict):
    """An item between reading and collating."""

    codes: np.ndarray
    """uint16, `k t`."""
    info: dict[str, Any]
    reference: dict[str, Tensor] | None
    index: int
    """Position of the item in the split."""
    rng: np.random.Generator | None
    """For crop and caption; depends only on seed, epoch and item; None = no random choices."""
    skipped: tuple[int, int]
    """Shards and items skipped just before it."""
    num_frames: int
    """T, crop length of its batch, in frames."""
    ends_batch: bool


class Place(NamedTuple):
    """A position in the training order."""

    epoch: int
    shard: int
    item: int
    """Position in the shard."""


# --- order ----------------------------------------------------------------------------------------


def training_order(
    counts: list[int], seed: int, part: int, parts: int, done: int = 0
) -> Iterator[tuple[list[Place], int]]:
    """Endless groups of positions for one of `parts` readers, each with the number to skip.

    Shards are assigned to readers again in each epoch, so that unequal shares average out. A group
    has `SHARDS_MIXED` shards, which are read and shuffled together.

    Args:
        counts: items per shard.
        seed: seed of the order.
        part: index of the reader.
        parts: number of readers.
        done: items of this reader to skip; groups without other items are omitted.

    Raises:
        ValueError: if there are more readers than shards, or no items, which would loop forever.
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
        for first in range(0, len(shards), SHARDS_MIXED):
            group = shards[first : first + SHARDS_MIXED].tolist()
            order = rng.permutation(sum(counts[shard] for shard in group))
            if done < len(order):
                places = [Place(epoch, shard, i) for shard in group for i in range(counts[shard])]
                yield [places[i] for i in order.tolist()], done
            done = max(0, done - len(order))


# --- read -----------------------------------------------------------------------------------------


def read_training(
    groups: Iterator[tuple[list[Place], int]], shards: ShardSet, seed: int
) -> Iterator[Example]:
    """Stage: groups of positions -> examples of readable shards.

    An unreadable shard is skipped with a warning and tried again in the next epoch. Its items are
    replaced by others of the same group or of the next group with a readable shard, so the order of
    all other items does not change. A run resumed while the same shards are unreadable has the same
    examples as an uninterrupted one.
    """
    reader = _Reader(shards)
    waiting: list[tuple[list[Place], int]] = []
    first_index = np.cumsum([0, *shards.counts]).tolist()
    shards_skipped = items_skipped = 0
    for places, done in groups:
        numbers = {place.shard for place in places}
        content = reader.read(numbers)
        waiting.append((places, done))
        shards_skipped += len(numbers) - len(content)
        items_skipped += sum(place.shard not in content for place in places[done:])
        readable = [place for place in places if place.shard in content]
        if not readable:
            continue
        for group, group_done in waiting:
            for number in range(group_done, len(group)):
                place = group[number]
                variant = []
                if place.shard not in content:
                    place = readable[number % len(readable)]
                    variant = [number + 1]  # another crop than at its own position
                yield {
                    **content[place.shard][place.item],
                    "index": first_index[place.shard] + place.item,
                    "rng": np.random.default_rng([seed, *place, *variant]),
                    "skipped": (shards_skipped, items_skipped),
                    "num_frames": 0,
                    "ends_batch": False,
                }
                shards_skipped = items_skipped = 0
        waiting = []


class _Reader:
    """Reads shards, warns about unreadable ones, and gives up after many in a row."""

    def __init__(self, shards: ShardSet):
        self.shards = shards
        self.named: set[int] = set()
        self.unreadable = 0
        self.unreadable_since = 0.0

    def read(self, numbers: set[int]) -> dict[int, list[Item]]:
        """Items of the readable shards; failed shards are tried again at each call.

        Raises:
            UserError: if no shard could be read for long.
        """
        content: dict[int, list[Item]] = {}
        for number in sorted(numbers):
            try:
                content[number] = self.shards.read(number)
            except UserError as error:
                if number not in self.named:
                    warnings.warn(f"skipping shard {error}", stacklevel=2)
                self.named.add(number)
                if not content:
                    self._count(error)
            else:
                self.named.discard(number)
                self.unreadable = 0
        return content

    def _count(self, error: UserError) -> None:
        now = time.monotonic()
        if self.unreadable == 0:
            self.unreadable_since = now
        self.unreadable += 1
        spent = now - self.unreadable_since
        if self.unreadable >= MAX_UNREADABLE or spent > MAX_UNREADABLE_S:
            raise UserError(
                f"{self.shards.name}: none of the last {self.unreadable} shards could be read, in "
                f"{spent:.0f} s; the last: {error}"
            ) from error


def read_evaluation(shards: ShardSet, is_mine: Callable[[int], bool]) -> Iterator[Example]:
    """First stage: the items whose index satisfies `is_mine`, in order.

    Raises:
        UserError: if a shard is unreadable, because metrics over fewer items are not comparable, or
            if two items have the same key.
    """
    first = 0
    shard_by_key: dict[str, int] = {}
    for shard, number in enumerate(shards.counts):
        if any(map(is_mine, range(first, first + number))):
            for index, item in enumerate(shards.read(shard, with_references=True), first):
                key = item["info"]["key"]
                if key in shard_by_key:
                    paths = redact(shards.paths[shard]), redact(shards.paths[shard_by_key[key]])
                    raise UserError(
                        f"{paths[0]}: {key} is in {paths[1]} too, but metrics need unique keys; "
                        "rename the audio files of one set and tokenize it again"
                    )
                shard_by_key[key] = shard
                if is_mine(index):
                    yield {
                        **item,
                        "index": index,
                        "rng": None,
                        "skipped": (0, 0),
                        "num_frames": 0,
                        "ends_batch": False,
                    }
        first += number


# --- batch ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CropPhase:
    """A part of training with one crop length."""

    num_batches: int | None
    """Batches of this phase; None = all further batches."""
    num_frames: int
    """Length of a crop, in frames."""
    batch_size: int
    """Crops in a batch."""


def find_phase(phases: Sequence[CropPhase], batch: int) -> CropPhase:
    """The phase of a batch, numbered from 0.

    >>> find_phase([CropPhase(2, 50, 8), CropPhase(None, 100, 4)], 2).num_frames
    100
    """
    for phase in phases:
        if phase.num_batches is None or batch < phase.num_batches:
            return phase
        batch -= phase.num_batches
    return phases[-1]


def items_before(phases: Sequence[CropPhase], batch: int, role: int, workers: int) -> int:
    """Items in the batches role, role + workers, … below `batch`, which one worker yielded.

    >>> items_before([CropPhase(2, 50, 8), CropPhase(None, 100, 4)], batch=5, role=1, workers=2)
    12
    """
    items = 0
    first = 0
    for phase in phases:
        end = batch if phase.num_batches is None else min(batch, first + phase.num_batches)
        num_batches = len(range(role, end, workers)) - len(range(role, first, workers))
        items += max(0, num_batches) * phase.batch_size
        first = end
    return items


def assign_batches(
    examples: Iterator[Example], phases: Sequence[CropPhase], numbers: Iterator[int]
) -> Iterator[Example]:
    """Stage: sets `num_frames` and `ends_batch` of examples, for the batches of these numbers."""
    for number in numbers:
        phase = find_phase(phases, number)
        position = 0
        for position, example in enumerate(islice(examples, phase.batch_size), 1):
            example["num_frames"] = phase.num_frames
            example["ends_batch"] = position == phase.batch_size
            yield example
        if position < phase.batch_size:
            return


def crop_examples(
    examples: Iterator[Example], frame_rate: float, crop_start: CropStart = "anywhere"
) -> Iterator[Example]:
    """Stage: crop longer examples to `num_frames`, at a random start if they have an `rng`.

    Args:
        examples: without `rng`, they are cropped at their beginning.
        frame_rate: of the codec, in Hz; gives the number of frames that hold audio.
        crop_start: where random crops begin.
    """
    for example in examples:
        codes, num_frames, rng = example["codes"], example["num_frames"], example["rng"]
        duration = math.ceil(round(example["info"]["duration_s"] * frame_rate, 6))
        end = min(codes.shape[1], duration)
        start = 0
        if rng is not None and end > num_frames:
            bars: list[int] = []
            if crop_start == "bar":
                bars = bar_starts(example["info"], frame_rate, end - num_frames)
            starts = bars or range(end - num_frames + 1)
            start = starts[rng.integers(len(starts))]
        example["codes"] = codes[:, start : min(end, start + num_frames)]
        yield example


def bar_starts(info: dict[str, Any], frame_rate: float, last: int) -> list[int]:
    """Frames up to `last` at which a bar begins; the start of the audio file is included.

    Args:
        info: of the item: `bar_s`, length of a bar in seconds; `first_bar_s`, time of the first bar
            line in its audio file (default 0); `offset_s`, where the item begins in it (default 0).
            Numbers below 0 or from 1e6 on give no bars.
        frame_rate: of the codec, in Hz.
        last: last possible frame.

    >>> bar_starts({"bar_s": 2.0, "first_bar_s": 0.48, "offset_s": 0.0}, 25.0, 120)
    [0, 12, 62, 112]
    """
    numbers: Any = (info.get("bar_s"), info.get("first_bar_s", 0.0), info.get("offset_s", 0.0))
    if not all(isinstance(x, int | float) and 0 <= x < 1e6 for x in numbers):
        return []
    bar, first, offset = numbers
    if bar * frame_rate < 1:
        return []
    number = math.floor((offset - first) / bar)
    starts = {0} if offset == 0 else set()
    while (frame := round((first + number * bar - offset) * frame_rate)) <= last:
        if frame >= 0:
            starts.add(frame)
        number += 1
    return sorted(starts)


def vary_captions(
    examples: Iterator[Example], augmentation: CaptionAugmentation
) -> Iterator[Example]:
    """Stage: caption augmentation with each example's own generator."""
    for example in examples:
        rng = example["rng"]
        assert rng is not None
        info = example["info"]
        example["info"] = info | {"caption": augmented(info, augmentation, rng)}
        yield example


def collate_batches(examples: Iterator[Example]) -> Iterator[Batch]:
    """Stage: examples -> batches; the last batch may be short."""
    batch: list[Example] = []
    for example in examples:
        batch.append(example)
        if example["ends_batch"]:
            yield collate(batch)
            batch = []
    if batch:
        yield collate(batch)


def collate(examples: list[Example]) -> Batch:
    """Collate examples into a batch, padded to its crop length."""
    num_frames = examples[0]["num_frames"]
    codes = torch.zeros(len(examples), len(examples[0]["codes"]), num_frames, dtype=torch.int64)
    valid = torch.zeros(len(examples), num_frames, dtype=torch.bool)
    for row, is_valid, example in zip(codes.numpy(), valid.numpy(), examples, strict=True):
        length = example["codes"].shape[1]
        row[:, :length] = example["codes"]
        is_valid[:length] = True
    return {
        "codes": codes,
        "valid": valid,
        "captions": [example["info"]["caption"] for example in examples],
        "keys": [example["info"]["key"] for example in examples],
        "indices": [example["index"] for example in examples],
        "infos": [example["info"] for example in examples],
        "references": [example["reference"] for example in examples],
        "shards_skipped": sum(example["skipped"][0] for example in examples),
        "items_skipped": sum(example["skipped"][1] for example in examples),
    }


def compress_for_worker(batch: Any) -> Any:
    """Compact form of a batch for transfer from a worker: the `collate_fn` of our DataLoaders.

    Otherwise torch sends each tensor as a shared-memory file and inspects each string of the batch,
    which takes longer than reading and cropping the codes.
    """
    return batch if get_worker_info() is None else _CompressedBatch(batch)


class _CompressedBatch(dict):
    """A batch that is pickled with codes as uint16 and with lengths instead of `valid`."""

    def __reduce__(self) -> tuple[Any, ...]:
        rest = {name: value for name, value in self.items() if name not in ("codes", "valid")}
        lengths = self["valid"].sum(1).tolist()
        return _decompress, (self["codes"].numpy().astype(np.uint16), lengths, rest)


def _decompress(codes: np.ndarray, lengths: list[int], rest: dict[str, Any]) -> dict[str, Any]:
    valid = torch.arange(codes.shape[2]) < torch.tensor(lengths)[:, None]
    return {"codes": torch.from_numpy(codes.astype(np.int64)), "valid": valid, **rest}


# --- the two data sets ----------------------------------------------------------------------------


@dataclass(eq=False)
class TrainingStream(IterableDataset):
    """Endless batches of random crops.

    Put it into a DataLoader with `batch_size=None` and `collate_fn=compress_for_worker`.
    """

    shards: ShardSet
    num_frames: int
    """Length of a crop, in frames."""
    batch_size: int
    """Crops in a batch."""
    seed: int
    """Seed of order, crops and captions."""
    rank: int = 0
    world_size: int = 1
    start_batch: int = 0
    """Completed batches of this rank."""
    augmentation: CaptionAugmentation = CaptionAugmentation()
    shorter: Sequence[CropPhase] = ()
    """Initial phases with shorter crops."""
    crop_start: CropStart = "anywhere"
    """Start positions of crops from longer items."""

    @property
    def phases(self) -> list[CropPhase]:
        """All phases of training."""
        return [*self.shorter, CropPhase(None, self.num_frames, self.batch_size)]

    def stages(self, worker: int = 0, workers: int = 1) -> list[Any]:
        """The stages of one worker, for a `webdataset.DataPipeline` with further stages."""
        # The loader reads from its workers in turn, starting with the first after a resume.
        role = (worker + self.start_batch) % workers
        done = items_before(self.phases, self.start_batch, role, workers)
        part = self.rank * workers + role
        parts = self.world_size * workers
        numbers = count(self.start_batch + worker, workers)
        frame_rate = self.shards.index["codec"]["frame_rate"]
        return [
            lambda: training_order(self.shards.counts, self.seed, part, parts, done),
            lambda groups: read_training(groups, self.shards, self.seed),
            lambda examples: assign_batches(examples, self.phases, numbers),
            lambda examples: crop_examples(examples, frame_rate, self.crop_start),
            lambda examples: vary_captions(examples, self.augmentation),
            collate_batches,
        ]

    def __iter__(self) -> Iterator[Batch]:
        return iter(DataPipeline(*self.stages(*_worker())))


@dataclass(eq=False)
class EvaluationDataset(IterableDataset):
    """Finite batches of a split, each item once over all ranks and workers; the last may be short.

    Raises UserError while iterating, as `read_evaluation`.
    """

    shards: ShardSet
    num_frames: int
    """Length of a crop, in frames; crops start at the first frame."""
    batch_size: int
    """Items in a batch."""
    rank: int = 0
    world_size: int = 1

    def stages(self, worker: int = 0, workers: int = 1) -> list[Any]:
        """The stages of one worker, for a `webdataset.DataPipeline` with further stages."""
        frame_rate = self.shards.index["codec"]["frame_rate"]

        def is_mine(index: int) -> bool:
            """Items are assigned to ranks in turn, and batches to workers in turn."""
            number, rank = divmod(index, self.world_size)
            return rank == self.rank and number // self.batch_size % workers == worker

        phase = CropPhase(None, self.num_frames, self.batch_size)

        return [
            lambda: read_evaluation(self.shards, is_mine),
            lambda examples: assign_batches(examples, [phase], count()),
            lambda examples: crop_examples(examples, frame_rate),
            collate_batches,
        ]

    def __iter__(self) -> Iterator[Batch]:
        return iter(DataPipeline(*self.stages(*_worker())))


def _worker() -> tuple[int, int]:
    """Index of this data worker, and number of workers."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
