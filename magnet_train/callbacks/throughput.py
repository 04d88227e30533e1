"""Logs training speed, waiting times and the amount of audio seen."""

import resource
import sys
import time
from statistics import fmean
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback

from magnet_train.checks.cost import peak_flop, training_flop
from magnet_train.model import MagnetConfig
from magnet_train.module import MagnetModule, is_logged


class Throughput(Callback):
    """Logs speed every `trainer.log_every_n_steps`, without the time of validations.

    Rank 0's values times the number of ranks: `speed/examples_per_s`, `speed/frames_per_s` (without
    padding), `speed/audio_hours_per_s`, and `train/audio_hours` (since the run began). Maximum over
    ranks: `speed/data_share` (share of time spent waiting for a batch) and `speed/peak_memory_gb`
    (of the GPU's allocator, or of the process on a CPU). `speed/mfu`, if the device's peak is
    known: FLOP that the model needs (without recomputation) over the peak of the device.

    `data/shards_skipped` and `data/items_skipped`: failed reads of all data workers since the
    process started.
    """

    def __init__(self) -> None:
        self.frames = 0
        """Frames of all ranks up to the last optimizer step; a resumed run repeats later ones."""
        self._open_frames = 0
        """Frames since that step."""
        self._step = 0
        self._logged_step = 0
        self._running_since: float | None = None
        """Time at which training started or last continued; None during a validation."""
        self._seconds = 0.0
        """Training time before that, since the last row."""
        self._examples = 0
        self._frames = 0
        self._waited_s = 0.0
        self._skipped = {"data/shards_skipped": 0.0, "data/items_skipped": 0.0}

    def state_dict(self) -> dict[str, Any]:
        return {"frames": self.frames}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.frames = int(state_dict["frames"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._logged_step = trainer.global_step
        self._running_since = time.monotonic()
        self._waited_s = _waited_s(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._running_since is not None:
            self._seconds += time.monotonic() - self._running_since
            self._running_since = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._running_since = time.monotonic()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log hours with each validation, as an axis for its metrics."""
        assert isinstance(pl_module, MagnetModule)
        if self.frames or not pl_module.trained_steps:  # otherwise the count is unknown
            pl_module.log("train/audio_hours", _hours(self.frames, trainer))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, MagnetModule)
        self._count(batch, trainer.world_size)
        step = trainer.global_step
        if step != self._step:
            self.frames += self._open_frames
            self._open_frames = 0
            self._step = step
        if step != self._logged_step and is_logged(trainer, step):
            self._log(trainer, pl_module, batch["valid"].shape[1])

    def _count(self, batch: Any, world_size: int) -> None:
        frames = int(batch["valid"].numpy().sum()) * world_size
        self._examples += len(batch["valid"]) * world_size
        self._frames += frames
        self._open_frames += frames
        self._skipped["data/shards_skipped"] += batch["shards_skipped"]
        self._skipped["data/items_skipped"] += batch["items_skipped"]

    def _log(self, trainer: L.Trainer, module: MagnetModule, num_frames: int) -> None:
        assert self._running_since is not None
        now = time.monotonic()
        waited_s = _waited_s(trainer)
        seconds = self._seconds + now - self._running_since
        values = {
            "speed/examples_per_s": self._examples / seconds,
            "speed/frames_per_s": self._frames / seconds,
            "speed/audio_hours_per_s": _hours(self._frames, trainer) / seconds,
            "train/audio_hours": _hours(self.frames, trainer),
        }
        peak = peak_flop(module.device, str(trainer.precision))
        if peak is not None:
            flop = (
                self._examples / trainer.world_size * _flop_per_example(module.config, num_frames)
            )
            values["speed/mfu"] = flop / seconds / peak
        maxima = {
            "speed/data_share": (waited_s - self._waited_s) / seconds,
            "speed/peak_memory_gb": _peak_memory_bytes(module.device) / 1e9,
        }
        module.log_dict(values)
        module.log_dict(maxima, sync_dist=True, reduce_fx="max")
        module.log_dict(self._skipped, sync_dist=True, reduce_fx="sum")
        self._logged_step = trainer.global_step
        self._running_since = now
        self._waited_s = waited_s
        self._seconds = 0.0
        self._examples = 0
        self._frames = 0


def _hours(frames: int, trainer: L.Trainer) -> float:
    split = "train" if trainer.state.fn == "fit" else "validation"  # both use the same codec
    codec = trainer.datamodule.shards(split).index["codec"]  # type: ignore[attr-defined]
    return frames / codec["frame_rate"] / 3600


def _flop_per_example(config: MagnetConfig, num_frames: int) -> float:
    """FLOP of a training step, mean over stages."""
    return fmean(training_flop(config, num_frames, stage) for stage in range(config.num_codebooks))


def _waited_s(trainer: L.Trainer) -> float:
    return getattr(trainer.train_dataloader, "waited_s", 0.0)


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
