"""Logging to W&B, TensorBoard and trackio: settings, environment, generated clips, checkpoints."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from magnet_train.callbacks.generation import GenerationCallback
from magnet_train.callbacks.trackio_logger import TrackioLogger
from magnet_train.common import private_api
from magnet_train.common.folders import write_text
from magnet_train.common.redact import redact
from magnet_train.evaluation.scorer import CODEC_FOLDER
from magnet_train.module import MagnetModule
from magnet_train.resume import shards_hash
from magnet_train.tracking.environment import add_environment, environment
from magnet_train.tracking.logged import HOURS, LOGGED, STEP, find
from magnet_train.tracking.wandb_session import run_location


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml`, without credentials, into the run folder, to W&B and trackio."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        text = redact(self.parser.dump(self.config, skip_none=False))
        write_text(Path(trainer.default_root_dir) / "config.yaml", text)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(yaml.safe_load(text), allow_val_change=True)
            elif isinstance(logger, TrackioLogger):
                logger.log_hyperparams(yaml.safe_load(text))


def run_locations(trainer: L.Trainer) -> dict[str, str]:
    """The address of the run, or the command that shows or uploads it, by the tracker's name."""
    found: dict[str, str] = {}
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and (location := run_location()) is not None:
            found["W&B"] = location
        elif isinstance(logger, TrackioLogger):
            found["trackio"] = f"trackio show --project {logger.name}"
        elif isinstance(logger, TensorBoardLogger):
            found["tensorboard"] = f"tensorboard --logdir {logger.save_dir}"
    return found


def wandb_runs(trainer: L.Trainer) -> list[Any]:
    """The W&B runs that a trainer logs to."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]


MAX_TAG = 64
"""Maximum length of a tag in W&B, in characters."""


@dataclass(frozen=True)
class GeneratedClip:
    """A generated clip on disk, with the content of its JSON file."""

    audio: Path
    caption: str
    item: str
    score: float | None
    """FAD of this single clip; None if it could not be computed."""

    @property
    def title(self) -> str:
        return self.caption or "(no text)"

    @property
    def plot(self) -> Path:
        return self.audio.with_suffix(".png")

    @property
    def real(self) -> Path:
        """The codec's reconstruction of the real clip."""
        return self.audio.parent.parent / CODEC_FOLDER / self.audio.name

    @classmethod
    def read(cls, audio: Path) -> "GeneratedClip":
        about = json.loads(audio.with_suffix(".json").read_text())
        return cls(audio, about["prompt"], about["item"], about.get("score"))


def run_tags(module: MagnetModule) -> list[str]:
    """Tags of a run in W&B: the codec, and "hybrid", "fine-tuned" and "LoRA" where they apply."""
    kinds = {
        "hybrid": module.config.order == "hybrid",
        "fine-tuned": bool(module.hparams["init_from"]),
        "LoRA": module.lora.rank > 0,
    }
    codec = Path(module.codec_name).name[:MAX_TAG]
    return [codec, *(kind for kind, applies in kinds.items() if applies)]


class Tracking(Callback):
    """Logging to W&B, TensorBoard and trackio.

    W&B gets axes, environment, clips, best values and, optionally, checkpoints; TensorBoard and
    trackio get clips. With any logger, `environment.json` in the run folder has the environment of
    each session. The clips of all ranks are read from the shared run folder.
    """

    COLUMNS = ("step", "item", "caption", "audio", "plot", "FAD of the single clip")

    def __init__(self, upload_checkpoints: bool = False):
        """
        Args:
            upload_checkpoints: Upload the last and the best checkpoint to W&B after training, as
                versions of an artifact with the aliases latest, best and step-N. Each takes 16
                bytes per parameter, or 20 with D-Adaptation (8 GB for the small published model);
                until the upload is finished, a copy takes the same space in the run folder.
        """
        self.upload_checkpoints = upload_checkpoints
        self._is_set_up = False
        self._has_real = False
        self._table: Any = None
        self._unwritten_row: dict[str, Any] | None = None
        self._logged: dict[str, Any] = {}
        """Number of logged parts of the table, and their W&B run."""
        self._best: dict[str, float] = {}
        """Lowest or highest value of each validation metric."""

    def state_dict(self) -> dict[str, Any]:
        """Best values and position in the table, which a resumed run continues, also offline."""
        return {"table": self._logged, "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._logged = dict(state_dict["table"])
        self._best = {name: float(value) for name, value in state_dict.get("best", {}).items()}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero or self._is_set_up:
            return
        self._is_set_up = True
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        session = environment(trainer.world_size)
        splits = [split for split in ("train", "validation") if data.folders[split] is not None]
        session["data"] = {split: shards_hash(data.shards(split).index) for split in splits}
        add_environment(Path(trainer.default_root_dir), session)
        for run in wandb_runs(trainer):
            run.config.update({"environment": session}, allow_val_change=True)
            assert isinstance(pl_module, MagnetModule)
            run.tags = tuple(dict.fromkeys((*(run.tags or ()), *run_tags(pl_module))))
            _define_metrics(run)
            if "://" in (location := run_location() or ""):
                rank_zero_info(f"W&B: {location}")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Clear earlier values, so that a row has only what was measured at its step."""
        private_api.forget_logged(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the row that loggers do not have yet, so that a kill cannot lose it."""
        checkpoint["unwritten_row"] = private_api.unwritten_row(trainer)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if (row := checkpoint.get("unwritten_row")) is not None:
            self._unwritten_row = {"values": dict(row["values"]), "step": int(row["step"])}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._unwritten_row:
            return
        values = self._unwritten_row["values"] | {"epoch": trainer.current_epoch}
        for logger in trainer.loggers:
            logger.log_metrics(values, self._unwritten_row["step"])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        self._update_best(trainer)
        callbacks: list[Any] = trainer.callbacks  # type: ignore
        generation = next((c for c in callbacks if isinstance(c, GenerationCallback)), None)
        if generation is None or not generation.audio:
            return
        assert isinstance(pl_module, MagnetModule)
        step = generation.step(trainer, pl_module)
        clips = [GeneratedClip.read(path) for path in generation.audio]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                self._to_wandb(logger.experiment, clips, step)
            elif isinstance(logger, TensorBoardLogger):
                to_tensorboard(logger.experiment, clips, step)
            elif isinstance(logger, TrackioLogger):
                logger.log_clips([(clip.caption, clip.audio, clip.plot) for clip in clips], step)

    on_test_end = on_validation_end

    def _update_best(self, trainer: L.Trainer) -> None:
        """Write the best value of each validation metric into W&B's summary, as `best/NAME`.

        W&B's own `summary="min"` would replace the last value, which its sweeps read, by a group.
        """
        for name, tensor in trainer.callback_metrics.items():
            entry, value = find(name), float(tensor)
            if name.startswith("val/") and entry and entry.better and math.isfinite(value):
                better = min if entry.better == "lower" else max
                self._best[name] = better(value, self._best.get(name, value))
        for run in wandb_runs(trainer):
            run.summary.update({f"best/{name}": value for name, value in self._best.items()})

    def _to_wandb(self, run: Any, clips: list[GeneratedClip], step: int) -> None:
        """Log lists of media at the step, and append the new rows to the table."""
        import wandb

        if self._table is None:
            self._table = wandb.Table(columns=list(self.COLUMNS), log_mode="INCREMENTAL")
            if self._logged.get("run") == run.id:
                # W&B can do this itself, but then keeps rows of steps that are repeated.
                private_api.continue_table(
                    self._table, self._logged["count"], self._logged["parts"]
                )
        for clip in clips:
            audio = wandb.Audio(str(clip.audio))
            self._table.add_data(
                step, clip.item, clip.caption, audio, wandb.Image(str(clip.plot)), clip.score
            )
        media = {
            "gen/clips": self._table,
            "gen/audio": [wandb.Audio(str(clip.audio), caption=clip.title) for clip in clips],
            "gen/plots": [wandb.Image(str(clip.plot), caption=clip.title) for clip in clips],
        }
        if not self._has_real:  # the same in every validation
            self._has_real = True
            media["gen/real"] = [
                wandb.Audio(str(clip.real), caption=clip.title)
                for clip in clips
                if clip.real.is_file()
            ]
        run.log(media | {STEP: step})
        if (logged := run.summary.get("gen/clips")) is not None:  # None with WANDB_MODE=disabled
            parts = [*logged["previous_increments_paths"], logged["artifact_path"]]
            self._logged = {"run": run.id, "count": len(parts), "parts": parts}

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.upload_checkpoints or not trainer.is_global_zero:
            return
        saved: Any = trainer.checkpoint_callback
        for run in wandb_runs(trainer):
            if saved.best_model_path:
                upload(run, Path(saved.best_model_path), "best")
            # W&B gives the alias "latest" to the last version, so this one comes last.
            upload(run, Path(saved.last_model_path), "latest")


def _define_metrics(run: Any) -> None:
    """Use optimizer steps as the axis of every metric."""
    # The summary is only the last value: a group of several is not visible to W&B sweeps.
    run.define_metric(STEP)
    for name in dict.fromkeys([HOURS, *(entry.name.split("{")[0] for entry in LOGGED)]):
        glob = name if any(entry.name == name for entry in LOGGED) else f"{name}*"
        run.define_metric(glob, step_metric=STEP, step_sync=True)


def upload(run: Any, checkpoint: Path, alias: str) -> None:
    """Upload a version of the artifact `checkpoint-ID` with aliases `alias` and `step-N`."""
    import wandb

    from magnet_train.release import read_checkpoint

    step = int(read_checkpoint(checkpoint)["global_step"])
    artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata={"step": step})
    # W&B's cache is in the home folder.
    artifact.add_file(str(checkpoint), name="model.ckpt", skip_cache=True)
    run.log_artifact(artifact, aliases=[alias, f"step-{step}"])


def to_tensorboard(writer: Any, clips: list[GeneratedClip], step: int) -> None:
    """Log audio, mixed to mono, as `gen/audio/NAME` and its spectrogram as `gen/plots/NAME`.

    `writer` is torch's SummaryWriter.
    """
    import matplotlib.image
    import soundfile
    import torch

    for clip in clips:
        wav, sample_rate = soundfile.read(clip.audio, dtype="float32", always_2d=True)
        writer.add_audio(
            f"gen/audio/{clip.audio.stem}", torch.from_numpy(wav.mean(1))[None], step, sample_rate
        )
        picture = matplotlib.image.imread(clip.plot)  # height, width, channels; 0 to 1
        writer.add_image(
            f"gen/plots/{clip.audio.stem}", torch.from_numpy(picture), step, dataformats="HWC"
        )
