"""Lightning logger for trackio, which has W&B's API, keeps runs locally and needs no account."""

import contextlib
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from magnet_train.common.errors import UserError


class TrackioLogger(Logger):
    """Logs metrics, settings and clips to a local trackio project; `trackio show` displays them."""

    def __init__(self, project: str = "magnet_train", save_dir: str = ".", resumes: bool = False):
        """
        Args:
            project: Name of trackio's project.
            save_dir: Run folder, whose name is that of the run.
            resumes: Whether to continue the last run of this name.

        Raises:
            UserError: if trackio is not installed.
        """
        super().__init__()
        self._project, self._name = project, Path(save_dir).expanduser().resolve().name
        self._resumes = resumes
        self._config: dict[str, Any] = {}
        self._run: Any = None
        try:
            import trackio  # type: ignore[import-not-found]
        except ImportError as error:
            raise UserError(f"--tracker trackio: {error}; pip install -e '.[trackio]'") from error
        self._trackio = trackio

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str:
        return self._name

    @property
    def experiment(self) -> Any:
        """The run, started at the first use on rank 0."""
        if self._run is None:
            # The validation before training finishes the run, and training resumes it.
            resume = "allow" if self._resumes else "never"
            with contextlib.redirect_stdout(io.StringIO()):
                self._run = self._trackio.init(
                    self._project, self._name, config=self._config, resume=resume, embed=False
                )
            self._resumes = True
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **_: Any) -> None:
        self._config |= params if isinstance(params, dict) else vars(params)
        if self._run is not None:  # Lightning starts it before there are settings
            self._run.config |= self._config  # sent with the first metrics

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step)

    @rank_zero_only
    def log_clips(self, clips: list[tuple[str, Path, Path]], step: int) -> None:
        """Log audio as `gen/audio/NAME` and its plot as `gen/plots/NAME`.

        Args:
            clips: caption, audio file and plot of each clip.
            step: optimizer steps.
        """
        media = {}
        for caption, audio, plot in clips:
            media[f"gen/audio/{audio.stem}"] = self._trackio.Audio(str(audio), caption=caption)
            media[f"gen/plots/{audio.stem}"] = self._trackio.Image(str(plot), caption=caption)
        self.experiment.log(media, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            with contextlib.redirect_stdout(io.StringIO()):
                self._trackio.finish()
            self._run = None
