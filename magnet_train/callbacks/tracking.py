"""A run as W&B and TensorBoard show it: one W&B run over all its sessions, what it was made with, clips to be heard."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from magnet_train.callbacks.generation import GenerationCallback
from magnet_train.common import private_api
from magnet_train.module import MagnetModule
from magnet_train.resume import fingerprint
from magnet_train.tracking.environment import environment, note_environment
from magnet_train.tracking.logged import HOURS, LOGGED, STEP


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml`, as Lightning does, and gives W&B the same."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        config = yaml.safe_load(without_secrets(self.parser.dump(self.config, skip_none=False)))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(config, allow_val_change=True)


def without_secrets(text: str) -> str:
    """Addresses without user, password and query, where credentials may stand.

    >>> without_secrets("train: https://me:secret@host/shards?X-Amz-Signature=abc")
    'train: https://host/shards'
    """
    return re.sub(r"(\w+://)(?:[^/\s@'\"]+@)?([^\s?'\"]*)(?:\?[^\s'\"]*)?", r"\1\2", text)


@dataclass(frozen=True)
class GeneratedClip:
    """One generated clip on the disk, with what stands in the note beside it."""

    audio: Path
    caption: str
    item: str
    score: float | None
    """FAD of the clip alone, where it could be computed."""

    @property
    def picture(self) -> Path:
        return self.audio.with_suffix(".png")

    @classmethod
    def read(cls, audio: Path) -> "GeneratedClip":
        about = json.loads(audio.with_suffix(".json").read_text())
        return cls(audio, about["prompt"], about["item"], about.get("score"))


class Tracking(Callback):
    """Gives W&B the axes, environment, clips and, if asked, checkpoints of a run; TensorBoard the clips.

    For every logger `environment.json` in the run folder says what each session was made with. The clips of all ranks
    are logged, from the folder that the ranks share.
    """

    COLUMNS = ("step", "item", "caption", "audio", "picture", "FAD of the clip alone")

    def __init__(self, upload_checkpoints: bool = False):
        """What W&B gets beside figures and clips.

        Args:
            upload_checkpoints: whether the last and the best checkpoint are uploaded to W&B when training has ended, as
                versions of an artifact with the aliases latest, best and step-N. Each takes 16 bytes for each
                parameter, or 20 with D-Adaptation (8 GB for the small published model), and until it is sent as much
                again in the run folder.
        """
        self.upload_checkpoints = upload_checkpoints
        self._is_set_up = False
        self._table: Any = None
        self._unwritten_row: dict[str, Any] | None = None
        self._logged: dict[str, Any] = {}
        """Parts of the table that were logged, and in which W&B run."""

    def state_dict(self) -> dict[str, Any]:
        """So that the table of a resumed run goes on after the rows that it had at the checkpoint, offline too."""
        return {"table": self._logged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._logged = state_dict["table"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero or self._is_set_up:
            return
        self._is_set_up = True
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        found = environment(trainer.world_size)
        given = [split for split in ("train", "validation") if data.folders[split] is not None]
        found["data"] = {split: fingerprint(data.shards(split).index) for split in given}
        note_environment(Path(trainer.default_root_dir), found)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                run: Any = logger.experiment
                run.config.update({"environment": found}, allow_val_change=True)
                # No summary but the last value: another would turn it into a group, which sweeps do not look into.
                run.define_metric(STEP)
                for name in dict.fromkeys([HOURS, *(entry.name.split("{")[0] for entry in LOGGED)]):
                    glob = name if any(entry.name == name for entry in LOGGED) else f"{name}*"
                    run.define_metric(glob, step_metric=STEP, step_sync=True)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """A logged row has what was measured at its step, and nothing of an earlier one."""
        private_api.forget_logged(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Loggers get the row of a step after its checkpoint is written; a kill in between would lose it."""
        checkpoint["unwritten_row"] = private_api.unwritten_row(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._unwritten_row = checkpoint.get("unwritten_row")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._unwritten_row:
            return
        values = self._unwritten_row["values"] | {"epoch": trainer.current_epoch}
        for logger in trainer.loggers:
            logger.log_metrics(values, self._unwritten_row["step"])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        generation = next((c for c in trainer.callbacks if isinstance(c, GenerationCallback)), None)  # type: ignore[attr-defined]
        if generation is None or not generation.audio or not trainer.is_global_zero or trainer.sanity_checking:
            return
        assert isinstance(pl_module, MagnetModule)
        step, clips = generation.step(trainer, pl_module), [GeneratedClip.read(path) for path in generation.audio]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                self._to_wandb(logger.experiment, clips, step)
            elif isinstance(logger, TensorBoardLogger):
                to_tensorboard(logger.experiment, clips, step)

    on_test_end = on_validation_end

    def _to_wandb(self, run: Any, clips: list[GeneratedClip], step: int) -> None:
        """Lists under the step, and rows of a table of which only the new ones are sent."""
        import wandb

        if self._table is None:
            self._table = wandb.Table(columns=list(self.COLUMNS), log_mode="INCREMENTAL")
            if self._logged.get("run") == run.id:
                # W&B does this of itself where a server tells it so; it then has rows of steps that are done again too.
                private_api.continue_table(self._table, self._logged["count"], self._logged["parts"])
        for clip in clips:
            audio, picture = wandb.Audio(str(clip.audio)), wandb.Image(str(clip.picture))
            self._table.add_data(step, clip.item, clip.caption, audio, picture, clip.score)
        names = [clip.audio.stem for clip in clips]
        media = {
            "gen/clips": self._table,
            "gen/audio": [wandb.Audio(str(c.audio), caption=n) for c, n in zip(clips, names, strict=True)],
            "gen/pictures": [wandb.Image(str(c.picture), caption=n) for c, n in zip(clips, names, strict=True)],
        }
        run.log(media | {STEP: step})
        if (logged := run.summary.get("gen/clips")) is not None:  # with WANDB_MODE=disabled there is nothing
            parts = [*logged["previous_increments_paths"], logged["artifact_path"]]
            self._logged = {"run": run.id, "count": len(parts), "parts": parts}

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.upload_checkpoints or not trainer.is_global_zero:
            return
        saved: Any = trainer.checkpoint_callback
        found: dict[str, list[str]] = {}
        # W&B calls the version that came last the latest, whatever it is.
        for alias, path in (("best", saved.best_model_path), ("latest", saved.last_model_path)):
            if path:
                found.setdefault(str(Path(path).resolve()), []).append(alias)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                for path, aliases in found.items():
                    upload(logger.experiment, Path(path), aliases)


def upload(run: Any, checkpoint: Path, aliases: list[str]) -> None:
    """Logs a checkpoint as a version of the run's artifact `checkpoint-ID`, with `step-N` among its aliases."""
    import wandb

    from magnet_train.release import read_checkpoint

    step = int(read_checkpoint(checkpoint)["global_step"])
    artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata={"step": step})
    artifact.add_file(str(checkpoint), name="model.ckpt", skip_cache=True)  # which is in the home folder
    run.log_artifact(artifact, aliases=[*aliases, f"step-{step}"])


def to_tensorboard(writer: Any, clips: list[GeneratedClip], step: int) -> None:
    """Audio, its channels mixed, and pictures, under `gen/audio/NAME` and `gen/pictures/NAME`.

    Args:
        writer: torch's SummaryWriter.
        clips: as written.
        step: optimizer steps.
    """
    import matplotlib.image
    import soundfile
    import torch

    for clip in clips:
        wav, sample_rate = soundfile.read(clip.audio, dtype="float32", always_2d=True)
        writer.add_audio(f"gen/audio/{clip.audio.stem}", torch.from_numpy(wav.mean(1))[None], step, sample_rate)
        picture = matplotlib.image.imread(clip.picture)  # height, width, channels; 0 to 1
        writer.add_image(f"gen/pictures/{clip.audio.stem}", torch.from_numpy(picture), step, dataformats="HWC")
