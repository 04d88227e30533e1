"""LightningDataModule for shards of codes."""

import math
from collections.abc import Iterator
from typing import Any, get_args

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from magnet_train.codec.base import CodecFacts, load_codec_facts
from magnet_train.common.assets import demo_path
from magnet_train.common.devices import to_device
from magnet_train.common.errors import UserError
from magnet_train.common.ranges import check_values
from magnet_train.data.captions import CaptionAugmentation
from magnet_train.data.pipeline import (
    CropPhase,
    CropStart,
    EvaluationDataset,
    ShardSet,
    TrainingStream,
    compress_for_worker,
)
from magnet_train.data.shards import held_out
from magnet_train.data.timed_loader import TimedLoader
from magnet_train.metrics.baselines import CountTables
from magnet_train.resume import shards_hash


def split_global_batch(
    global_batch_size: int, world_size: int, max_batch_size: int
) -> tuple[int, int]:
    """Examples per batch on each device, and batches to accumulate, for one optimizer step.

    >>> split_global_batch(192, world_size=8, max_batch_size=16)
    (12, 2)

    Raises:
        UserError: if the global batch cannot be divided equally.
    """
    share, rest = divmod(global_batch_size, world_size)
    if rest:
        below = share * world_size
        raise UserError(
            f"data: global_batch_size={global_batch_size} cannot be divided equally among "
            f"{world_size} devices; "
            f"give {below or world_size} or {below + world_size}, or use other devices"
        )
    accumulated = next(
        n for n in range(math.ceil(share / max_batch_size), share + 1) if share % n == 0
    )
    return share // accumulated, accumulated


def check_shards_per_worker(found: ShardSet, world_size: int, num_workers: int) -> None:
    """Check that every data worker of every rank gets a shard.

    Args:
        found: training shards.
        world_size: number of ranks.
        num_workers: data workers of each rank; 0 = the rank reads the data itself.

    Raises:
        UserError: if there are too few shards.
    """
    available = len(found.counts) // world_size
    if available == 0:
        raise UserError(
            f"{found.name}: {len(found.counts)} shards for {world_size} ranks: use fewer devices, "
            "or tokenize with a smaller --shard_size"
        )
    if max(1, num_workers) > available:
        raise UserError(
            f"{found.name}: {len(found.counts)} shards for {world_size} ranks x "
            f"{max(1, num_workers)} data workers: set --data.num_workers {available}, use fewer "
            "devices, or tokenize with a smaller --shard_size"
        )


def check_codec(found: ShardSet, codec: CodecFacts) -> None:
    """Check that shards were made with the model's codec.

    Raises:
        UserError: if they were not.
    """
    made = found.index["codec"]
    if made["hash"] != codec.hash:
        raise UserError(
            f"{found.name}: made with codec {made['id']!r} ({made['hash']}), but --model.codec "
            f"{codec.id!r} is {codec.hash}: tokenize again with it, or train with theirs"
        )
    for name in ("num_codebooks", "codebook_size", "frame_rate"):
        if made[name] != getattr(codec, name):
            raise UserError(
                f"{found.name}: its index says {name}={made[name]}, but --model.codec {codec.id!r} "
                f"has {getattr(codec, name)}; tokenize again"
            )


def check_crop_schedule(
    schedule: list[tuple[float, int]], crop_s: float
) -> list[tuple[float, int]]:
    """The schedule with crops of at most `crop_s` seconds.

    Raises:
        UserError: for a length or a number of steps that is not positive.
    """
    for length, steps in schedule:
        if not length > 0 or steps < 1:  # NaN too
            raise UserError(
                f"data: crop_schedule=[{length}, {steps}]: the length must be above 0 seconds, "
                "and the number of steps at least 1"
            )
    return [(min(float(length), crop_s), int(steps)) for length, steps in schedule]


class MagnetDataModule(L.LightningDataModule):
    """Training, validation and test data."""

    def __init__(  # noqa: PLR0913  each is an option of the command line
        self,
        train: list[str] | str | None = None,
        validation: list[str] | str | None = None,
        test: list[str] | str | None = None,
        val_split: float = 0.0,
        batch_size: int = 8,
        global_batch_size: int | None = None,
        augmentation: CaptionAugmentation = CaptionAugmentation(),
        num_workers: int | None = None,
        crop_s: float = 10.0,
        crop_schedule: list[tuple[float, int]] | None = None,
        crop_start: CropStart = "anywhere",
        codec: str = "demo",
        seed: int = 2036,
        predict_split: str = "test",
    ):
        """
        Args:
            train: Folder of training shards made by `tokenize`, local or at s3://, gs://, http://
                or https://. Several folders as a pattern (shards/train_*, part-{00..07}) or a list;
                some shards of a folder by name (train/shard-{000000..000099}.tar). The demo's
                shards if train, validation and test are all omitted.
            validation: Validation shards; same syntax as `train`.
            test: Test shards; same syntax as `train`.
            val_split: Share of the training shards to hold out for validation, 0 to 0.5, instead of
                `validation`; chosen by a hash of each shard; added shards do not move others.
            batch_size: Examples per batch on each device; with global_batch_size, the maximum that
                fits on a device. Larger batches give low mask rates less weight in the loss
                (docs/training.md).
            global_batch_size: Examples per optimizer step over all devices. The batch per device
                and gradient accumulation follow from it.
            augmentation: Caption augmentation in training.
            num_workers: DataLoader workers per device (default: 2, fewer if there are fewer
                shards).
            crop_s: Length of an example, in seconds; linked to the model's.
            crop_schedule: Pairs of crop length in seconds and number of optimizer steps. Training
                uses these crops in order, then crop_s. The number of seconds per batch is constant,
                so shorter crops mean more examples. Validation always uses crop_s.
            crop_start: Where training crops begin: "anywhere", or on a "bar" line, so that a model
                learns where the beats are. Bar lines come from the items' fields first_bar_s and
                bar_s; items without them are cropped anywhere.
            codec: Codec of the shards; linked to the model's.
            seed: Seed of order and crops.
            predict_split: Split whose captions `predict` uses: train, validation or test.
        """
        super().__init__()
        for name, value, known in (
            ("predict_split", predict_split, ("train", "validation", "test")),
            ("crop_start", crop_start, get_args(CropStart)),
        ):
            if value not in known:
                raise UserError(f"data: {name}={value}: choose {' or '.join(known)}")
        if not 0 <= val_split <= 0.5 or (val_split and (train is None or validation is not None)):
            raise UserError(
                f"data: val_split={val_split} must be from 0 to 0.5, with train and without "
                "validation"
            )
        self.val_split = val_split
        validation = train if val_split else validation
        demo = train is None and validation is None and test is None
        self.folders = {
            name: str(demo_path(f"shards/{name}")) if demo else given
            for name, given in (("train", train), ("validation", validation), ("test", test))
        }
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.crop_s = crop_s
        self.global_batch_size = global_batch_size
        check_values(
            self,
            "data: ",
            batch_size="[1, 100000]",
            num_workers="[0, inf)",
            global_batch_size="[1, 100000000]",
        )
        self.augmentation = augmentation
        self.crop_start: CropStart = crop_start
        self.crop_schedule = check_crop_schedule(crop_schedule or [], crop_s)
        self._is_batch_split = False
        self.codec_name = codec
        self.seed = seed
        self.predict_split = predict_split
        self.resumes_from: str | None = None
        """Checkpoint from which `fit` resumes, as found by this rank."""
        self._sets: dict[str, ShardSet] = {}
        self._tables: CountTables | None = None

    def shards(self, split: str) -> ShardSet:
        """The shard set of a split, checked against the codec.

        Raises:
            UserError: if it is missing, or was made with another codec.
        """
        if split not in self._sets:
            folder = self.folders[split]
            if folder is None:
                raise UserError(
                    f"no {split} shards: give --data.{split} FOLDER (made with tokenize)"
                    + (", or --data.val_split 0.05" if split == "validation" else "")
                )
            found = ShardSet.open(folder)
            if self.val_split and split != "test":
                hashes = [shard.get("sha256") or shard["name"] for shard in found.index["shards"]]
                chosen = held_out(hashes, self.val_split, f"{found.name}: --data.val_split")
                found = found.subset([is_held == (split == "validation") for is_held in chosen])
            check_codec(found, load_codec_facts(self.codec_name))
            self._sets[split] = found
        return self._sets[split]

    def count_tables(self) -> CountTables:
        """Counts of up to baselines.MAX_FRAMES training codes, from shards in random order.

        The counts are the same on every rank. Unreadable shards are skipped with a warning.

        Raises:
            UserError: if there are no training shards, or none can be read.
        """
        if self._tables is None:
            size = self.shards("train").index["codec"]["codebook_size"]
            self._tables = CountTables.count(self._train_codes(), size)
        return self._tables

    def _train_codes(self) -> Iterator[torch.Tensor]:
        found = self.shards("train")
        frame_rate = self.num_frames / self.crop_s
        for number in np.random.default_rng(0).permutation(len(found.counts)).tolist():
            try:
                items = found.read(number)
            except UserError as error:
                rank_zero_warn(f"baselines are counted without shard {error}")
                continue
            for item in items:
                num_frames = math.ceil(round(item["info"]["duration_s"] * frame_rate, 6))
                yield torch.from_numpy(item["codes"][:, :num_frames].astype(np.int64))

    def num_items(self, split: str) -> int:
        """Items in a split over all shards."""
        return sum(self.shards(split).counts)

    @property
    def num_frames(self) -> int:
        """Length of an example, in frames."""
        facts = load_codec_facts(self.codec_name)
        return round(self.crop_s * facts.frame_rate)

    def setup(self, stage: str) -> None:
        """Open the shards that the stage needs, so that errors are found before weights load."""
        needed = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"]}
        trainer: Any = self.trainer
        if trainer is not None:
            self._check_checkpoint_of_ranks(trainer)
        if stage == "fit" and trainer is not None and trainer.limit_val_batches == 0:
            needed["fit"] = ["train"]
        found = [self.shards(split) for split in needed.get(stage, [self.predict_split])]
        if trainer is None:
            return
        self._check_shards_of_ranks(trainer, found)
        if stage == "fit":
            self._apply_batch_split(trainer)
        # With limit_train_batches each epoch has a new loader, which continues after the last one.
        trainer.reload_dataloaders_every_n_epochs = 1

    def _check_checkpoint_of_ranks(self, trainer: Any) -> None:
        """Check that all ranks resume from the same checkpoint. Collective."""
        first = trainer.strategy.broadcast(self.resumes_from)
        if first != self.resumes_from:
            raise UserError(
                f"--ckpt_path: rank {trainer.global_rank} resumes from {self.resumes_from}, "
                f"rank 0 from {first}; the run folder must be shared by all nodes"
            )

    @staticmethod
    def _check_shards_of_ranks(trainer: Any, found: list[ShardSet]) -> None:
        """Check that nodes with separate copies or caches have the same shards. Collective."""
        for shards in found:
            local = shards_hash(shards.index)
            if trainer.strategy.broadcast(local) != local:
                raise UserError(
                    f"{shards.name}: rank {trainer.global_rank} finds other shards there than "
                    "rank 0; all nodes need the same copies"
                )

    def batch_split(self, world_size: int, accumulated: int) -> tuple[int, int]:
        """Examples per batch on each device, and batches to accumulate, for one optimizer step.

        Args:
            world_size: devices.
            accumulated: trainer.accumulate_grad_batches as given.

        Raises:
            UserError: if the global batch cannot be divided equally, or accumulation is given too.
        """
        if self.global_batch_size is None:
            return self.batch_size, accumulated
        if accumulated != 1:
            raise UserError(
                f"data.global_batch_size={self.global_batch_size} and "
                f"trainer.accumulate_grad_batches={accumulated}: "
                "give only one of them; the other follows"
            )
        return split_global_batch(self.global_batch_size, world_size, self.batch_size)

    def _apply_batch_split(self, trainer: Any) -> None:
        """Set batch size and accumulation, once, before the trainer counts batches."""
        if self.global_batch_size is None or self._is_batch_split:
            return
        self.batch_size, trainer.accumulate_grad_batches = self.batch_split(
            trainer.world_size, trainer.accumulate_grad_batches
        )
        self._is_batch_split = True
        if trainer.is_global_zero:
            print(
                f"global batch of {self.global_batch_size} = {trainer.world_size} devices x "
                f"{self.batch_size} examples "
                f"x {trainer.accumulate_grad_batches} accumulated batches"
            )

    def crop_phases(self, accumulated: int) -> list[CropPhase]:
        """The crop schedule in batches; an optimizer step has `accumulated` of them."""
        frame_rate = self.num_frames / self.crop_s
        return [
            CropPhase(
                steps * accumulated,
                round(length * frame_rate),
                round(self.batch_size * self.crop_s / length),
            )
            for length, steps in self.crop_schedule
        ]

    def workers_per_rank(self, world_size: int) -> int:
        """Data workers of each rank in training."""
        if self.num_workers is not None:
            return self.num_workers
        return min(2, len(self.shards("train").counts) // world_size)

    def train_dataloader(self) -> DataLoader:
        found = self.shards("train")
        trainer: Any = self.trainer
        workers = self.workers_per_rank(trainer.world_size)
        check_shards_per_worker(found, trainer.world_size, workers)
        # Completed batches; a resumed run continues with the next one.
        start = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        stream = TrainingStream(
            found,
            self.num_frames,
            self.batch_size,
            self.seed,
            trainer.global_rank,
            trainer.world_size,
            start,
            self.augmentation,
            self.crop_phases(trainer.accumulate_grad_batches),
            self.crop_start,
        )
        return TimedLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            collate_fn=compress_for_worker,
            persistent_workers=workers > 0,
        )

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move only the codes. Lengths stay on the host, so that no step waits for the device."""
        return batch | {"codes": to_device(batch["codes"], device)}

    def _evaluation_loader(self, split: str) -> DataLoader:
        trainer: Any = self.trainer
        workers = min(1, self.num_workers) if self.num_workers is not None else 0
        items = EvaluationDataset(
            self.shards(split),
            self.num_frames,
            self.batch_size,
            trainer.global_rank,
            trainer.world_size,
        )
        return TimedLoader(
            items, batch_size=None, num_workers=workers, collate_fn=compress_for_worker
        )

    def val_dataloader(self) -> DataLoader:
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._evaluation_loader(self.predict_split)
