"""How fast a run is, what it waits for, and how much audio it has heard."""

import resource
import sys
import time
from statistics import fmean
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback

from magnet_train.cost import peak_flop, training_flop
from magnet_train.model import MagnetConfig
from magnet_train.module import MagnetModule


class Throughput(Callback):
    """Logs speed over the steps since the last logging, every `trainer.log_every_n_steps`; validation is left out.

    Over all ranks, the others taken to be as fast as the first and their items as long: `speed/examples_per_s`,
    `speed/frames_per_s` (without padding), `speed/audio_hours_per_s`, and `train/audio_hours` (heard since the run
    began). Of the rank that has most: `speed/data_share` (of the time, spent waiting for a batch) and
    `speed/peak_memory_gb` (of the GPU's allocator, or of the process on a CPU). And `speed/mfu` where the device's peak
    is known: floating-point operations that the model needs, not those that were done, over those the device could do
    at best.

    And, since the process began, `data/shards_left_out` and `data/items_left_out`: what loader processes of all ranks
    could not read, each time it was its turn.
    """

    def __init__(self) -> None:
        self.frames = 0
        """Heard by all ranks until the last optimizer step; what came after is done again by a resume."""
        self._open = self._step = 0
        self._since: float | None = None
        self._spent = 0.0
        self._examples = self._frames = 0
        self._waited = 0.0
        self._logged = 0
        self._left_out = {"data/shards_left_out": 0.0, "data/items_left_out": 0.0}

    def state_dict(self) -> dict[str, Any]:
        return {"frames": self.frames}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.frames = state_dict["frames"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._logged = self._step = trainer.global_step
        self._since, self._waited = time.monotonic(), _waited(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._since is not None:
            self._spent, self._since = self._spent + time.monotonic() - self._since, None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._since = time.monotonic()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hours beside the figures of a validation, so that they can be drawn over them."""
        assert isinstance(pl_module, MagnetModule)
        if self.frames or not pl_module.trained_steps:  # else the weights came without their count
            pl_module.log("train/audio_hours", _hours(self.frames, trainer))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        size, _ = batch["valid"].shape
        frames = int(batch["valid"].sum()) * trainer.world_size
        self._examples += size * trainer.world_size
        self._frames += frames
        self._open += frames
        self._left_out["data/shards_left_out"] += batch["shards_left_out"]
        self._left_out["data/items_left_out"] += batch["items_left_out"]
        step = trainer.global_step
        if step != self._step:
            self.frames, self._open, self._step = self.frames + self._open, 0, step
        if step == self._logged or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, MagnetModule) and self._since is not None
        now, waited = time.monotonic(), _waited(trainer)
        spent = self._spent + now - self._since
        values = {
            "speed/examples_per_s": self._examples / spent,
            "speed/frames_per_s": self._frames / spent,
            "speed/audio_hours_per_s": _hours(self._frames, trainer) / spent,
            "train/audio_hours": _hours(self.frames, trainer),
        }
        if (peak := peak_flop(pl_module.device, str(trainer.precision))) is not None:
            flop = self._examples / trainer.world_size * _flop(pl_module.config, batch["valid"].shape[1])
            values["speed/mfu"] = flop / spent / peak
        most = {
            "speed/data_share": (waited - self._waited) / spent,
            "speed/peak_memory_gb": _peak_memory(pl_module.device) / 1e9,
        }
        pl_module.log_dict(values)
        pl_module.log_dict(most, sync_dist=True, reduce_fx="max")
        pl_module.log_dict(self._left_out, sync_dist=True, reduce_fx="sum")
        self._logged, self._since, self._waited, self._spent = step, now, waited, 0.0
        self._examples = self._frames = 0


def _hours(frames: int, trainer: L.Trainer) -> float:
    split = "train" if trainer.state.fn == "fit" else "validation"  # of one codec
    facts = trainer.datamodule.shards(split).index["codec"]  # type: ignore[attr-defined]
    return frames / facts["frame_rate"] / 3600


def _flop(config: MagnetConfig, num_frames: int) -> float:
    """Of training with one example, at the mean stage."""
    return fmean(training_flop(config, num_frames, stage) for stage in range(config.num_codebooks))


def _waited(trainer: L.Trainer) -> float:
    return getattr(trainer.train_dataloader, "waited_s", 0.0)


def _peak_memory(device: torch.device) -> int:
    """In bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
