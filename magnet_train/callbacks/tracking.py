"""A run as W&B and TensorBoard show it: one W&B run over all its sessions, what it was made with, clips to be heard."""

import json
import os
import re
import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from magnet_train.callbacks.generation import GenerationCallback
from magnet_train.environment import environment, note_environment
from magnet_train.errors import UserError
from magnet_train.folders import write_whole
from magnet_train.logged import HOURS, LOGGED, STEP
from magnet_train.module import MagnetModule
from magnet_train.resume import fingerprint

REMEDY = "set another WANDB_API_KEY, or WANDB_MODE=offline and `wandb sync` later, or --trainer.logger false"


# --- before a run begins ------------------------------------------------------------------------------------------


def prepare_wandb(folder: Path, verb: str, goes_on: bool, online: bool, uploads: bool = False) -> None:
    """Sets W&B's environment variables for this process, as far as they are not set, and tries the key.

    A training run has one id, kept in `wandb_run_id` in its folder, so that its sessions are one run of W&B, online
    and offline. What artifacts hold waits in the run folder until it is sent: W&B's own place for it is the home
    folder, which is small on clusters, and not where the run is synchronised from.

    Args:
        folder: of the run.
        verb: fit, validate …; only `fit` has an id of its own.
        goes_on: whether a checkpoint is gone on from, if there is one.
        online: whether a logger may want the network; WANDB_MODE has a say in it.
        uploads: whether checkpoints are sent at the end, which may take an hour.

    Raises:
        UserError: see `check_key`.
    """
    values = {
        "WANDB_PROJECT": "magnet_train",
        "WANDB_JOB_TYPE": verb,
        "WANDB_DATA_DIR": str((folder / "wandb").absolute()),
        "WANDB_X_SERVICE_WAIT": "300",  # seconds in which its service must start; 30 by default, too few on a busy disk
        "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1",  # seconds of rows that a SIGKILL may cost; 15 by default
        "WANDB_FINISH_TIMEOUT": "0" if uploads else "900",  # seconds; 0 = W&B tries for as long as it likes
        "WANDB_FINISH_TIMEOUT_RAISES": "true",
    }
    file = folder / "wandb_run_id"
    known = verb == "fit" and goes_on and file.is_file()
    if "WANDB_SWEEP_ID" not in os.environ:  # whose agent names its runs
        values["WANDB_NAME"] = folder.resolve().name
        if verb == "fit" and rank_zero_only.rank == 0:
            values["WANDB_RUN_ID"] = file.read_text().strip() if known else secrets.token_hex(5)
            values["WANDB_RESUME"] = "allow"
    for name, value in values.items():
        os.environ.setdefault(name, value)
    if rank_zero_only.rank != 0:
        return
    if online:
        check_key(folder, known)
    if verb == "fit":
        write_whole(file, f"{os.environ.get('WANDB_RUN_ID', '')}\n")


def check_key(folder: Path, goes_on: bool) -> None:
    """Whether W&B takes the run, found out within seconds and before anything is trained.

    Without a key a run is logged offline. A key that is refused, or a server that is not to be reached, ends a run that
    begins; one that goes on, perhaps requeued at night, does so offline, and its W&B run loses nothing by that.

    Args:
        folder: of the run.
        goes_on: whether it is not its first session.

    Raises:
        UserError: if the key is refused or the server is not to be reached.
    """
    import wandb

    state, why = try_key()
    if state in ("online", "off"):
        return
    if state == "refused" and not goes_on:
        raise UserError(f"W&B: {why}; {REMEDY}")
    wandb.setup().settings.mode = "offline"
    rank_zero_warn(f"W&B: {why}; this run is logged offline, and `wandb sync {folder / 'wandb'}` sends it")


def try_key() -> tuple[Literal["online", "off", "no key", "refused"], str]:
    """Whether W&B can be online by its own settings, wherever they stand, and words for it.

    `off` is a mode that needs no network, which is then the text; `refused` is a key that the server does not take, or
    a server that is not to be reached. A key is shown to the server, which takes seconds where that does not answer.
    """
    import wandb
    from wandb.errors import CommError

    settings = wandb.setup().settings
    if settings.mode not in ("online", "run", "shared"):
        return "off", settings.mode
    try:
        with _answers_in_time(settings):
            if wandb.login(verify=True, prompt=False):  # a question would wait all night for an answer
                return "online", settings.base_url
    except CommError as error:
        return "refused", f"the key is refused, or there is no network ({' '.join(str(error).split()).rstrip('.')})"
    return "no key", "no API key (`wandb login` sets one)"


@contextmanager
def _answers_in_time(settings: Any) -> Iterator[None]:
    """W&B's service process tries twice, each time for WANDB_HTTP_TIMEOUT seconds, and says why it failed.

    Left to itself it tries for minutes, and `wandb.login` stops waiting after WANDB_HTTP_TIMEOUT. What it says then is
    that the service is busy; and a process that ends soon after may wait ten minutes for the service to end (wandb
    0.31, a third of the times). A server that asks for a long pause (Retry-After) still has that happen.
    """
    from wandb.env import HTTP_TIMEOUT, get_http_timeout

    attempt = get_http_timeout(10)
    quick = {
        "x_graphql_retry_max": 1,
        "x_graphql_timeout_seconds": attempt,
        "x_graphql_retry_wait_min_seconds": 1,
        "x_graphql_retry_wait_max_seconds": 1,
    }
    before, waits = {name: getattr(settings, name) for name in quick}, os.environ.get(HTTP_TIMEOUT)
    try:
        for name, value in quick.items():
            setattr(settings, name, value)
        os.environ[HTTP_TIMEOUT] = str(2 * attempt + 10)  # not the first to give up
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)
        os.environ.pop(HTTP_TIMEOUT)
        if waits is not None:
            os.environ[HTTP_TIMEOUT] = waits


IN_A_HURRY_S = 60.0
"""Seconds that W&B gets of a run that has to end: its GPUs are wanted elsewhere, or other ranks wait for it."""


def finish_wandb(status: int, in_a_hurry: bool = False) -> None:
    """Ends this process's W&B run, if it has one, and says how to send what could not be sent.

    Args:
        status: exit status of the process, of which W&B is told.
        in_a_hurry: within a minute, whatever WANDB_FINISH_TIMEOUT says. If not all is sent by then this ends the
            process, at whose exit W&B would go on trying.
    """
    wandb: Any = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    again = f"it is kept, and `wandb sync --include-online {wandb.run.settings.sync_dir}` sends it"
    if not in_a_hurry:
        _finish(wandb, status, again)
        return
    finishing = threading.Thread(target=_finish, args=(wandb, status, again), daemon=True)
    finishing.start()
    finishing.join(IN_A_HURRY_S)
    if finishing.is_alive():
        rank_zero_warn(f"W&B: not all was sent within {IN_A_HURRY_S:g} s; {again}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _finish(wandb: Any, status: int, again: str) -> None:
    settings = wandb.run.settings
    try:
        wandb.finish(exit_code=status)
    except TimeoutError:
        wandb.teardown(exit_code=status)  # which writes what its service still holds
        rank_zero_warn(f"W&B: not all was sent within {settings.finish_timeout:g} s; {again}")
    except Exception as error:  # its service was killed, as by a signal to all processes
        rank_zero_warn(f"W&B: not all may have been sent ({type(error).__name__}: {error}); {again}")


# --- while it runs ------------------------------------------------------------------------------------------------


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
                self._table._increment_num = self._logged["count"]
                self._table._previous_increments_paths = list(self._logged["parts"])
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
