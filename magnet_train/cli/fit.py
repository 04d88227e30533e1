"""`fit`, `validate`, `test` and `predict`: LightningCLI with what this project links, defaults and sums up.

`doctor` has it make all that a `fit` would, and go no further.
"""

import itertools
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from magnet_train.callbacks.averaging import WeightEMA
from magnet_train.callbacks.checkpoint import RunCheckpoint
from magnet_train.callbacks.checkpoint_io import AtomicCheckpointIO
from magnet_train.callbacks.generation import GenerationCallback, PredictionWriter
from magnet_train.callbacks.nan_guard import NanGuard
from magnet_train.callbacks.preemption import Preempted, Preemption
from magnet_train.callbacks.resume import ExactResume
from magnet_train.callbacks.throughput import Throughput
from magnet_train.callbacks.tracking import SaveConfig, Tracking
from magnet_train.callbacks.validation import ValidationSchedule
from magnet_train.callbacks.watchdog import Watchdog
from magnet_train.checks.plan import check_settings, parse_devices
from magnet_train.cli.options import completed, from_nothing, given_checkpoints
from magnet_train.codec.base import load_codec
from magnet_train.common import private_api
from magnet_train.common.errors import UserError, message_of, user_error_of
from magnet_train.common.folders import writable_folder, write_json
from magnet_train.conditioning import load_text_encoder
from magnet_train.data.datamodule import MagnetDataModule
from magnet_train.evaluation.report import write_report
from magnet_train.evaluation.run_report import report_from_run
from magnet_train.model import MagnetConfig
from magnet_train.module import MagnetModule
from magnet_train.resume import newest_whole_checkpoint, requeue_count
from magnet_train.tracking.wandb_session import finish_wandb, prepare_wandb

T = TypeVar("T")

LOGGERS = [
    {"class_path": "lightning.pytorch.loggers.WandbLogger"},
    {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        # Written at once: what a kill takes would not be logged again after a checkpoint that was saved since.
        "init_args": {"save_dir": ".", "name": "csv", "flush_logs_every_n_steps": 1},
    },
]
"""Of `fit`, unless a configuration says otherwise; they write into the run folder."""

StrategyRegistry.register(
    "fsdp2",
    ModelParallelStrategy,
    "weights sharded over all ranks",
    override=True,
    save_distributed_checkpoint=False,
)


def run_lightning(verb: str, args: list[str]) -> None:
    """Runs a verb with its options.

    Raises:
        UserError: for every mistake in them, or in the files they name.
    """
    name = os.environ.get("SLURM_JOB_NAME")
    several = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and not TorchElasticEnvironment.detect()
    if several and name in ("bash", "interactive"):
        # For Lightning each of them is then a user at a shell, and each would begin the whole run.
        raise UserError(
            f"srun with several tasks in a job of the name {name!r}: Lightning takes no part in those; write "
            "SLURM_JOB_NAME=magnet srun …"
        )
    args = completed(args)
    try:
        with _as(verb, args):
            MagnetCLI(verb)
    except Preempted as stopped:
        finish_wandb(int(stopped.code or 0), quickly=True)
        raise
    finish_wandb(0)


def try_fit(args: list[str], passed_over: list[Exception]) -> "Trial":
    """Parses and makes all that `fit` would with these options, and goes no further.

    Args:
        args: of `fit`.
        passed_over: gets a mistake without which there is more to learn.

    Raises:
        Exception: whatever the parser and Lightning make of a configuration that does not hold.
    """
    try:
        args = completed(args)
    except UserError as error:
        passed_over.append(error)
        args = completed(from_nothing(args))
    with _as("fit", args):
        return Trial("fit")


@contextmanager
def _as(verb: str, args: list[str]) -> Iterator[None]:
    """Lightning reads the command line; its errors about what the user gave leave as one line."""
    argv, sys.argv = sys.argv, [sys.argv[0], verb, *args]
    try:
        yield
    except Exception as error:
        _explain(error, args)
        raise
    finally:
        sys.argv = argv


def _explain(error: Exception, args: list[str]) -> None:
    """Turn the user's mistakes that come wrapped, and Lightning's errors about files the user named, into one line.

    Raises:
        UserError: if it is such an error.
    """
    if (mistake := user_error_of(error)) is not None:
        raise mistake
    text, given = str(error), given_checkpoints(args)
    for sign in ("PytorchStreamReader", "Error(s) in loading state_dict", "checkpoint", "Weights only load failed"):
        if given and sign in text and ("load" in text.lower() or "reader" in text.lower()):
            raise UserError(
                f"--ckpt_path {given[-1]}: {text.splitlines()[0][:300]}; choose another checkpoint"
            ) from error
    if type(error).__module__.startswith("wandb."):  # which is imported in callbacks only
        text = " ".join(text.split())[:300]
        raise UserError(f"W&B: {text}; or set WANDB_MODE=offline and `wandb sync` later") from error


# --- LightningCLI -------------------------------------------------------------------------------------------------


@lru_cache
def _codec_facts(name: str) -> Any:
    return load_codec(name).facts


@lru_cache
def _text_dim(name: str) -> int:
    return load_text_encoder(name).dim


def _or_else(find: Callable[[str], T], otherwise: Callable[[], T]) -> Callable[[str], T]:
    """`find`, and `otherwise` where that meets a mistake of the user's."""

    def found(name: str) -> T:
        try:
            return find(name)
        except UserError:
            return otherwise()

    return found


class Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> Any:
        cause: BaseException | None = ex
        while cause is not None:  # a dataclass that refuses its values, wrapped by the parser
            if isinstance(cause, UserError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        raise UserError(message_of(message)) from ex


class MagnetCLI(private_api.lightning_cli()):
    """Does a verb, from the command line to its end, when it is made."""

    is_trial = False

    def __init__(self, verb: str):
        self.verb = verb
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*isinstance.*LeafSpec.*")
        # What is logged has been summed over ranks already.
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
        callbacks = [PredictionWriter(), ExactResume(), Throughput(), ValidationSchedule()]
        if verb == "fit":
            callbacks.append(Preemption())
        super().__init__(
            MagnetModule,
            MagnetDataModule,
            parser_class=Parser,
            seed_everything_default=2036,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={
                "logger": LOGGERS if verb == "fit" else None,
                "callbacks": callbacks,
                "val_check_interval": 1000,  # optimizer steps, see ValidationSchedule
                "check_val_every_n_epoch": None,
                "use_distributed_sampler": False,  # the data module deals out items itself, each exactly once
                "inference_mode": False,  # under which sharded weights cannot be gathered
            },
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the one that is asked for: each takes as long to set up."""
        return {self.verb: LightningCLI.subcommands()[self.verb]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.crop_s", "data.crop_s")
        parser.link_arguments("model.codec", "data.codec")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")
        codec, text = "model.codec", "model.text_encoder"
        facts, dim = _codec_facts, _text_dim
        if self.is_trial:  # whether they are here is for doctor to say; as published if not
            facts, dim = _or_else(_codec_facts, MagnetConfig), _or_else(_text_dim, lambda: MagnetConfig.text_dim)
            parser.add_argument("--prefetch", action="store_true", help="Fetch the weights that are missing.")
            price = "Price of one GPU for an hour, in any currency, for the estimate of what the run costs."
            parser.add_argument("--gpu_hour_price", type=float, help=price)
        parser.link_arguments(codec, "model.network.num_codebooks", lambda n: facts(n).num_codebooks)
        parser.link_arguments(codec, "model.network.codebook_size", lambda n: facts(n).codebook_size)
        parser.link_arguments(text, "model.network.text_dim", dim)
        parser.add_lightning_class_args(GenerationCallback, "generation")
        parser.add_lightning_class_args(WeightEMA, "averaging")
        parser.add_lightning_class_args(NanGuard, "nan_guard")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.add_lightning_class_args(Tracking, "tracking")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        given = kwargs.pop("plugins", None) or self.config_init[self.verb].trainer.plugins or []
        plugins = [*given] if isinstance(given, list) else [given]
        return super().instantiate_trainer(plugins=[*plugins, AtomicCheckpointIO()], **kwargs)

    def run_verb(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception:
            private_api.kill_launched_ranks(self.trainer)
            raise

    def before_instantiate_classes(self) -> None:
        config = self.config[self.verb]
        if self.verb == "fit":
            check_settings(config)
        self.run_folder = writable_folder(Path(config.trainer.default_root_dir or "runs/run").expanduser())
        config.trainer.default_root_dir = str(self.run_folder)
        own_folder = self.run_folder / "checkpoints"
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(own_folder)
        config.checkpoint.dirpath = str(Path(config.checkpoint.dirpath).expanduser())
        if self.verb == "fit" and config.ckpt_path is None and requeue_count():
            config.ckpt_path = "auto"  # queued again: whoever wrote the job meant it to go on
        goes_on = config.ckpt_path is not None
        if config.ckpt_path == "auto":
            newest = newest_whole_checkpoint([self.run_folder, Path(config.checkpoint.dirpath)])
            config.ckpt_path = None if newest is None else str(newest)
            rank_zero_info(f"--ckpt_path auto: {newest or 'no checkpoint yet, training begins'}")
        if config.ckpt_path is None and self.verb == "fit" and not config.trainer.fast_dev_run:
            if _is_in(config.model.init_from, own_folder):
                raise UserError(
                    f"--model.init_from {config.model.init_from}: is in the run folder {self.run_folder}, which a new "
                    "run would overwrite; set --trainer.default_root_dir to another folder"
                )
            if Path(config.checkpoint.dirpath) == own_folder:
                _set_aside(own_folder)
            elif any(Path(config.checkpoint.dirpath).glob("*.ckpt")):
                raise UserError(
                    f"checkpoint.dirpath={config.checkpoint.dirpath}: has checkpoints of an earlier run; give another "
                    "folder, or --ckpt_path auto to resume that run"
                )
        loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
        loggers = [logger for logger in loggers if hasattr(logger, "class_path")]
        for logger in loggers:
            if logger.init_args.get("save_dir") in (None, "."):  # CSVLogger knows no default
                logger.init_args.save_dir = str(self.run_folder)
        of_wandb = [logger for logger in loggers if logger.class_path.endswith(".WandbLogger")]
        if of_wandb and not config.trainer.fast_dev_run:
            online = not all(logger.init_args.get("offline") for logger in of_wandb)
            prepare_wandb(self.run_folder, self.verb, goes_on, online, config.tracking.upload_checkpoints)

    def fit(self, model: Any, **kwargs: Any) -> None:
        """Validate the untrained model, train, and sum up."""
        kwargs["datamodule"].resumes_from = kwargs.get("ckpt_path")
        start = time.monotonic()
        generation = self.config_init[self.verb].generation
        generation.within_fit = True
        before: dict[str, float] = {}
        seconds: dict[str, float] = {}
        trial: Any = self.trainer
        validates = trial.limit_val_batches > 0 and not trial.fast_dev_run
        if generation.at_start and validates and not kwargs.get("ckpt_path"):
            before = dict(self.trainer.validate(model, datamodule=kwargs["datamodule"], verbose=False)[0])
            seconds["validation before training"] = time.monotonic() - start
        start = time.monotonic()
        self.trainer.fit(model, **kwargs)
        if not self.trainer.callback_metrics and validates:
            # Resumed after the last step, as killed in its validation: Lightning has nothing left to do.
            self.trainer.validate(model, datamodule=kwargs["datamodule"], verbose=False)
        spent = generation.seconds
        seconds["validation in training"] = spent
        seconds["training"] = time.monotonic() - start - spent
        if self.trainer.is_global_zero:
            self._sum_up(before, seconds)

    def _sum_up(self, before: dict[str, float], seconds: dict[str, float]) -> None:
        generation = self.config_init[self.verb].generation
        after = {k: v.item() for k, v in self.trainer.callback_metrics.items() if k.startswith("val/")}
        saved: Any = self.trainer.checkpoint_callback
        summary = {
            "metrics": {k: {"before": before.get(k), "after": after[k]} for k in sorted(after)},
            "audio": [str(p) for p in generation.audio],
            "checkpoint": saved.last_model_path,
            "pictures": [str(p) for p in generation.plots],
            "seconds": {k: round(v, 1) for k, v in seconds.items()},
        }
        write_json(self.run_folder / "summary.json", summary)
        print(_summary_text(summary, self.run_folder))
        if summary["audio"]:
            write_report(self.run_folder / "report.html", report_from_run(self.run_folder))
            print(f"report      {self.run_folder / 'report.html'}")


class Trial(MagnetCLI):
    """Makes what `fit` makes, but weights without memory, and one process where the devices are not here."""

    is_trial = True

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        super().setup_parser(*args, **kwargs)
        parser = self.parser_of(self.verb)
        parser.prog = "python -m magnet_train doctor"
        parser.description = (
            "Check whether a run of `fit` with these options would start and last, and estimate its memory, time and "
            "cost. Nothing is trained."
        )

    def before_instantiate_classes(self) -> None:
        self.parsed = self.config[self.verb].clone()
        given = self.config[self.verb].model
        if not given.start_from_codec or given.init_from is None:  # both are a mistake, which the module names
            given.start_from_codec = False
            given.init_from = None
        given.compiled = False

    def instantiate_classes(self) -> None:
        with torch.device("meta"):  # a network of any size, without memory
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        if not parse_devices(self.parsed.trainer).available:
            kwargs |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": None}
            kwargs["plugins"] = [LightningEnvironment()]
        return super().instantiate_trainer(**kwargs)

    def run_verb(self, run: Callable[[], None]) -> None:
        """Nothing: all is made, which is what was asked."""


def _is_in(path: str | None, folder: Path) -> bool:
    """Whether it names something in the folder, or a folder that has it."""
    given = None if path is None else Path(path).resolve()
    return given is not None and (
        given in [folder.resolve(), *folder.resolve().parents] or folder.resolve() in given.parents
    )


@rank_zero_only
def _set_aside(folder: Path) -> None:
    """An earlier run's checkpoints are kept, and `--ckpt_path auto` does not take them for this run's."""
    if folder.is_dir() and any(folder.glob("*.ckpt")):
        free = next(p for n in itertools.count(1) if not (p := folder.with_name(f"{folder.name}-{n}")).exists())
        with suppress(FileNotFoundError):  # without a launcher the first process of each node is here
            folder.rename(free)
        rank_zero_info(f"{folder.parent} has an earlier run; its checkpoints are in {free} now")


def _summary_text(summary: dict[str, Any], run_folder: Path) -> str:
    """The summary as people read it; rates by mask rate and intervals stay in the JSON."""
    lines = ["", f"run folder  {run_folder}", f"checkpoint  {summary['checkpoint']}"]
    for name in ("audio", "pictures"):
        if summary[name]:
            folder = Path(summary[name][0]).parent
            lines.append(f"{name:<11} {len(summary[name])} files in {folder}, e.g. {Path(summary[name][0]).name}")
    lines += ["", f"{'metric':<44}{'before':>10}{'after':>10}"]
    for key, pair in summary["metrics"].items():
        if "/rate" not in key and not key.endswith("_ci95"):
            before = "" if pair["before"] is None else f"{pair['before']:.4g}"
            lines.append(f"{key:<44}{before:>10}{pair['after']:>10.4g}")
    lines += ["", "  ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items())]
    return "\n".join(lines)
