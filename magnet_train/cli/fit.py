"""`fit`, `validate`, `test`, `predict` as a LightningCLI; `doctor` builds it without training."""

import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry

from magnet_train.callbacks.averaging import WeightEMA
from magnet_train.callbacks.baselines import CountBaselines
from magnet_train.callbacks.checkpoint import RunCheckpoint
from magnet_train.callbacks.checkpoint_io import AtomicCheckpointIO
from magnet_train.callbacks.generation import GenerationCallback, PredictionWriter
from magnet_train.callbacks.nan_guard import NanGuard
from magnet_train.callbacks.phases import Phases
from magnet_train.callbacks.preemption import Preempted, Preemption
from magnet_train.callbacks.resume import ExactResume
from magnet_train.callbacks.throughput import Throughput
from magnet_train.callbacks.tracking import SaveConfig, Tracking, run_locations
from magnet_train.callbacks.validation import ValidationSchedule
from magnet_train.callbacks.watchdog import Watchdog
from magnet_train.checks.plan import (
    LOGGER_FOLDER,
    Plan,
    check_accelerator,
    check_generation,
    check_seed,
    check_settings,
    check_trainer,
    logger_folders,
    none_if_missing,
    parse_devices,
)
from magnet_train.cli.inherited import AUTO, fit_defaults
from magnet_train.cli.parser import ConfigFile, OneLineErrors, class_problem, config_help
from magnet_train.cli.run_folder import RunFolderLock, lock_run, prepare_run_folder
from magnet_train.cli.summary import closing_block, summary_text
from magnet_train.codec.base import load_codec_facts
from magnet_train.common import private_api
from magnet_train.common.errors import UserError, integer_from_environment, user_error_from
from magnet_train.common.folders import writable_folder, write_json
from magnet_train.common.pretrained import one_line
from magnet_train.common.products import choose_products
from magnet_train.common.ranges import as_tuple
from magnet_train.conditioning import load_text_encoder
from magnet_train.data.datamodule import MagnetDataModule, check_shards_per_worker
from magnet_train.evaluation.report import write_report
from magnet_train.evaluation.run_report import report_from_run
from magnet_train.model import MagnetConfig
from magnet_train.module import MagnetModule
from magnet_train.resume import check_named_checkpoint, requeue_count
from magnet_train.tracking.wandb_session import finish_wandb, prepare_wandb, wandb_loggers

DESCRIPTIONS = {
    "fit": "Train a model; without options, train the demo.",
    "validate": "Compute the validation metrics of a checkpoint.",
    "test": "Compute the validation metrics of a checkpoint on the test split.",
    "predict": "Generate audio for every caption of a split.",
}
LOGGERS: list[dict[str, Any]] = [
    {"class_path": "lightning.pytorch.loggers.WandbLogger"},
    {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        # Flushed at each row: a row lost in a kill would not be logged again.
        "init_args": {"save_dir": ".", "name": "csv", "flush_logs_every_n_steps": 1},
    },
]
"""Default loggers of `fit`; they write into the run folder."""
CSV = {LOGGERS[1]["class_path"]: LOGGERS[1]["init_args"]}
TRACKERS = {
    "wandb": {LOGGERS[0]["class_path"]: {}} | CSV,
    "trackio": {"magnet_train.callbacks.trackio_logger.TrackioLogger": {}} | CSV,
    "tensorboard": {"lightning.pytorch.loggers.TensorBoardLogger": {"save_dir": "."}} | CSV,
    "csv": CSV,
}
"""Classes and settings of loggers by the value of --tracker."""
Trackers = Literal["wandb", "trackio", "tensorboard", "csv"]

StrategyRegistry.register(
    "fsdp2",
    ModelParallelStrategy,
    "weights sharded over all ranks",
    override=True,
    save_distributed_checkpoint=False,
)


def run_lightning(verb: str, args: list[str]) -> None:
    """Run `fit`, `validate`, `test` or `predict` with its options.

    Raises:
        UserError: if an option, or a file that it names, is invalid.
    """
    _refuse_interactive_srun()
    try:
        with _as_command_line(verb, args):
            MagnetCLI(verb, args)
    except Preempted as stopped:
        finish_wandb(int(stopped.code or 0), quickly=True)
        raise
    finish_wandb(0)


def build_without_training(args: list[str], errors: list[Exception]) -> "DryRunCLI":
    """Parse the options of `fit` and build everything that it needs, without training.

    Args:
        args: options of `fit`.
        errors: errors in --ckpt_path or --model.init_from are appended here; the other options are
            then checked without these two.

    Raises:
        Exception: if the configuration is invalid; of any type that the parser or Lightning raises.
    """
    with _as_command_line("fit", args):
        return DryRunCLI("fit", args, errors)


def _refuse_interactive_srun() -> None:
    """Refuse several tasks in interactive SLURM jobs: Lightning would start one run per task."""
    name = os.environ.get("SLURM_JOB_NAME")
    several = (
        integer_from_environment("SLURM_STEP_NUM_TASKS", 1) > 1
        and not TorchElasticEnvironment.detect()
    )
    if several and name in ("bash", "interactive"):
        raise UserError(
            f"srun with several tasks in a job named {name!r}: Lightning ignores SLURM there; "
            "write SLURM_JOB_NAME=magnet srun …"
        )


def check_unguided(decoding: Namespace) -> None:
    """Check that a model which learns guided logits is decoded without guidance.

    Raises:
        UserError: if not.
    """
    for name in ("max_cfg_coef", "min_cfg_coef"):
        value = decoding[name]
        if set(as_tuple(value)) != {1}:
            raise UserError(
                f"--generation.decoding.{name} {value}: with --model.distil_guidance true the "
                "model learns the guided logits, so set it to 1"
            )


def check_launch(trainer: Any) -> None:
    """Whether the processes of the run were started as Lightning needs it.

    Args:
        trainer: Lightning's, built for the run.

    Raises:
        UserError: in an interactive SLURM job with several tasks, or with several nodes if this
            process was started alone: it would wait for the others.
    """
    _refuse_interactive_srun()
    environment = getattr(trainer.strategy, "cluster_environment", None)
    is_alone = isinstance(environment, LightningEnvironment) and "MASTER_ADDR" not in os.environ
    if trainer.num_nodes > 1 and is_alone:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}: started on one node; start it on all of them "
            "with srun or torchrun (docs/clusters.md), or set --trainer.num_nodes 1"
        )


@contextmanager
def _as_command_line(verb: str, args: list[str]) -> Iterator[None]:
    """Sets sys.argv, which Lightning's DDP launcher uses to start the other ranks."""
    before = sys.argv
    sys.argv = [sys.argv[0], verb, *args]
    try:
        yield
    finally:
        sys.argv = before


# --- LightningCLI ---------------------------------------------------------------------------------


@lru_cache
def text_dim(name: str) -> int:
    return load_text_encoder(name).dim


class FitParser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser with one-line errors; --lora.X is short for --model.lora.X."""

    def _normalized(self, args: Sequence[str]) -> list[str]:
        return super()._normalized([re.sub(r"^--lora(?=[.=]|$)", "--model.lora", a) for a in args])


class MagnetCLI(private_api.lightning_cli()):
    """LightningCLI that runs one verb when it is constructed."""

    def __init__(self, verb: str, args: list[str]):
        self.verb = verb
        self.locks: list[RunFolderLock] = []
        quiet_lightning()
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*isinstance.*LeafSpec.*")
        # Logged values are already summed over ranks.
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
        # Preemption runs after averaging, so that the checkpoint includes this step's update.
        callbacks = [PredictionWriter(), CountBaselines(), ExactResume()]
        callbacks += [Throughput(), ValidationSchedule()]
        if verb == "fit":
            callbacks += [Phases(), Preemption()]
        try:
            super().__init__(
                MagnetModule,
                MagnetDataModule,
                args=[verb, *args],
                parser_class=FitParser,
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
                    "use_distributed_sampler": False,  # the data module gives each item to one rank
                    "inference_mode": False,  # sharded weights cannot be gathered in it
                },
            )
        finally:
            for lock in self.locks:
                lock.release()

    def subcommands(self) -> dict[str, set[str]]:
        """Only the requested subcommand, because each takes a second to set up."""
        return {self.verb: LightningCLI.subcommands()[self.verb]}

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        super().setup_parser(*args, **kwargs)
        parser = self.subcommand_parser(self.verb)
        parser.prog = f"python -m magnet_train {self.verb}"
        parser.description = DESCRIPTIONS[self.verb]

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = FitParser(**kwargs)
        parser.add_argument("-c", "--config", action=ConfigFile, help=config_help(with_names=True))
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        options = self.subcommand_parser(self.verb)
        assert isinstance(options, FitParser)
        options.set_defaults(self.defaults(options.given(args[1:])))
        self.config = parser.parse_args(args)
        if (tracker := self.config[self.verb].tracker) is not None:
            self.config[self.verb].trainer.logger = [
                Namespace(class_path=path, init_args=Namespace(**settings))
                for path, settings in TRACKERS[tracker].items()
            ]
        self.check(self.config[self.verb])

    def check(self, options: Namespace) -> None:
        """Check the options before anything is loaded."""
        check_generation(options)
        if self.verb == "fit":
            check_settings(options)
            return
        for check in (check_seed, check_trainer, check_accelerator):
            check(options)
        if options.ckpt_path is None and options.model.init_from is None:
            raise UserError(
                f"{self.verb}: no trained weights; give --ckpt_path CHECKPOINT or "
                "--model.init_from RELEASE"
            )

    def defaults(self, given: Namespace) -> dict[str, Any]:
        """Defaults that depend on the given options; see `fit_defaults`."""
        return fit_defaults(given)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        tracker = "Log to this and to CSV files instead of the loggers of the configuration."
        parser.add_argument("--tracker", type=Trackers, help=tracker)
        parser.link_arguments("model.crop_s", "data.crop_s")
        parser.link_arguments("model.codec", "data.codec")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")
        facts, text_dim = self.component_sizes()

        def num_codebooks(codec: str) -> int:
            return facts(codec).num_codebooks

        def codebook_size(codec: str) -> int:
            return facts(codec).codebook_size

        # `--help` shows the names of these functions.
        parser.link_arguments("model.codec", "model.network.num_codebooks", num_codebooks)
        parser.link_arguments("model.codec", "model.network.codebook_size", codebook_size)
        parser.link_arguments("model.text_encoder", "model.network.text_dim", text_dim)
        parser.add_lightning_class_args(GenerationCallback, "generation")
        parser.add_lightning_class_args(WeightEMA, "averaging")
        parser.add_lightning_class_args(NanGuard, "nan_guard")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.add_lightning_class_args(Tracking, "tracking")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")

    def component_sizes(self) -> tuple[Callable[[str], Any], Callable[[str], int]]:
        """Functions that return the facts of a codec and the width of a text encoder by name."""
        return load_codec_facts, text_dim

    def instantiate_classes(self) -> None:
        """Build trainer, model and data.

        Raises:
            UserError: if a logger or callback cannot be built, as if its package is missing.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse's, with a reason for each type in a union
            reasons = re.findall(r"^  - (?!Expected a|Not a valid)(.+)", str(error), re.MULTILINE)
            if "Union subtypes" not in str(error) or not reasons:
                raise
            raise UserError(f"trainer: {class_problem(str(error)) or reasons[0]}") from error

    def after_instantiate_classes(self) -> None:
        """Check the launch, the data and the validation before a logger writes anything."""
        check_launch(self.trainer)
        data, world_size = self.datamodule, self.trainer.world_size
        settings = self.config_init[self.verb]
        monitor = settings.checkpoint.monitor if self.verb == "fit" else None
        settings.generation.check(self.model, monitor)
        if self.verb != "fit":
            data.shards(
                {"validate": "validation", "test": "test"}.get(self.verb, data.predict_split)
            )
            return
        check_shards_per_worker(data.shards("train"), world_size, data.workers_per_rank(world_size))
        data.batch_split(world_size, self.trainer.accumulate_grad_batches)
        if self.trainer.limit_val_batches != 0:
            data.shards("validation")

    def run_verb(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception as error:
            private_api.kill_launched_ranks(self.trainer)
            if private_api.failed_while_restoring(error) and user_error_from(error) is None:
                raise UserError(
                    f"--ckpt_path {self.config[self.verb].ckpt_path}: not a checkpoint of such a "
                    f"run ({type(error).__name__}: {one_line(error)}); use another"
                ) from error
            raise

    def before_instantiate_classes(self) -> None:
        config, is_fit = self.config[self.verb], self.verb == "fit"
        if is_fit and config.ckpt_path is None and requeue_count():
            config.ckpt_path = AUTO
        checkpoint: str | None = config.ckpt_path
        if is_fit and config.model.distil_guidance and config.model.init_from is not None:
            check_unguided(config.generation.decoding)
        if checkpoint is not None and checkpoint != AUTO:
            # Both need the weights of init_from, which the checkpoint does not contain.
            if not (config.model.distil_guidance or config.model.lora.rank):
                config.model.init_from = None
            check_named_checkpoint(Path(checkpoint).expanduser(), is_fit)
        if is_fit and not config.trainer.fast_dev_run:
            self.locks = lock_run(config)
        self.run_folder = prepare_run_folder(config, is_fit)
        if not is_fit and config.ckpt_path is None and config.model.init_from is None:
            raise UserError(
                f"--ckpt_path auto: no checkpoint in {self.run_folder}; give --ckpt_path "
                "CHECKPOINT or --model.init_from RELEASE"
            )
        prepare_loggers(config, self.run_folder, self.verb, checkpoint is not None)
        choose_products()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The trainer.

        Raises:
            UserError: if Lightning refuses a setting.
        """
        given = kwargs.pop("plugins", None) or self.config_init[self.verb].trainer.plugins or []
        plugins = [*given] if isinstance(given, list) else [given]
        try:
            plugins.append(AtomicCheckpointIO())
            trainer = super().instantiate_trainer(plugins=plugins, **kwargs)
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(f"trainer: {one_line(error)}") from error
        private_api.count_steps_in_bar(trainer)
        if self.verb == "fit":
            private_api.omit_sigterm_broadcast(trainer)
        for logger in trainer.loggers:
            private_api.omit_anonymous(logger)
        return trainer

    def fit(self, model: Any, **kwargs: Any) -> None:
        """Validate the untrained model, train, and write the summary."""
        kwargs["datamodule"].resumes_from = kwargs.get("ckpt_path")
        start = time.monotonic()
        generation = self.config_init[self.verb].generation
        generation.within_fit = True
        before: Mapping[str, float] = {}
        seconds: dict[str, float] = {}
        trainer: Any = self.trainer
        validates = trainer.limit_val_batches > 0 and not trainer.fast_dev_run
        if generation.at_start and validates and not kwargs.get("ckpt_path"):
            before = trainer.validate(model, datamodule=kwargs["datamodule"], verbose=False)[0]
            seconds["validation before training"] = time.monotonic() - start
        start = time.monotonic()
        trainer.fit(model, **kwargs)
        if not trainer.callback_metrics and validates:
            # Resumed after a kill in the final validation: no training step is left.
            trainer.validate(model, datamodule=kwargs["datamodule"], verbose=False)
        seconds["validation in training"] = generation.seconds
        seconds["training"] = time.monotonic() - start - generation.seconds
        if trainer.is_global_zero:
            self._write_summary(before, seconds)

    def _write_summary(self, before: Mapping[str, float], seconds: dict[str, float]) -> None:
        generation = self.config_init[self.verb].generation
        after = {
            k: v.item() for k, v in self.trainer.callback_metrics.items() if k.startswith("val/")
        }
        saved: Any = self.trainer.checkpoint_callback
        summary = {
            "metrics": {k: {"before": before.get(k), "after": after[k]} for k in sorted(after)},
            "audio": [str(p) for p in generation.audio],
            "checkpoint": saved.last_model_path or str(self.datamodule.resumes_from or ""),
            "plots": [str(p) for p in generation.plots],
            "seconds": {k: round(v, 1) for k, v in seconds.items()},
        }
        write_json(self.run_folder / "summary.json", summary)
        print(summary_text(summary, self.run_folder))
        if summary["audio"]:
            write_report(self.run_folder / "report.html", report_from_run(self.run_folder))
        if self.model.lora.rank:
            self.model.write_adapter(self.run_folder / "adapter")
            print(f"adapter     {self.run_folder / 'adapter'}")
        print(closing_block(self.run_folder, run_locations(self.trainer)))


@lru_cache
def quiet_lightning() -> None:
    """Hide Lightning's advertisements, and file and line in front of our own warnings."""
    hidden = ("💡 Tip", "TPU available", "HPU available")
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(lambda record: not record.getMessage().startswith(hidden))
    before = warnings.formatwarning

    def plain(message: Any, category: Any, filename: str, *rest: Any) -> str:
        ours = Path(filename).is_relative_to(Path(__file__).parents[1])
        return f"warning: {message}\n" if ours else before(message, category, filename, *rest)

    warnings.formatwarning = plain


class DryRunCLI(MagnetCLI):
    """Builds what `fit` builds, with weights on the meta device.

    If the requested devices are not available, it builds for one process on the CPU.
    """

    def __init__(self, verb: str, args: list[str], errors: list[Exception]):
        self.errors = errors
        super().__init__(verb, args)

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        super().setup_parser(*args, **kwargs)
        parser = self.subcommand_parser(self.verb)
        parser.prog = "python -m magnet_train doctor"
        parser.description = (
            "Check whether `fit` with these options would start and keep running, and estimate its "
            "memory, time and cost, without training."
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--prefetch", action="store_true", help="Download missing weights.")
        price = "Price of one GPU-hour, in any currency, to estimate the cost of the run."
        parser.add_argument("--gpu_hour_price", type=float, help=price)

    def component_sizes(self) -> tuple[Callable[[str], Any], Callable[[str], int]]:
        """Published sizes for missing components, which doctor reports separately."""

        def facts(name: str) -> Any:
            return none_if_missing(lambda: load_codec_facts(name)) or MagnetConfig()

        def dim(name: str) -> int:
            return none_if_missing(lambda: text_dim(name)) or MagnetConfig.text_dim

        return facts, dim

    def defaults(self, given: Namespace) -> dict[str, Any]:
        try:
            return fit_defaults(given)
        except UserError as error:
            self.errors.append(error)
            for name in ("ckpt_path", "model.init_from"):
                given.pop(name, None)
            return fit_defaults(given)

    def check(self, options: Namespace) -> None:
        """Check only the seed, which is used at once; doctor reports all other errors together."""
        check_seed(options)

    def before_instantiate_classes(self) -> None:
        options = self.config[self.verb]
        if self.errors:
            options.ckpt_path = options.model.init_from = None
        self.parsed = options.clone()
        # The module refuses both settings together.
        if not options.model.start_from_codec or options.model.init_from is None:
            options.model.start_from_codec = False
            options.model.init_from = None
        options.model.compiled = False
        options.model.lora.rank = 0
        if self.parsed.model.init_from is not None:  # without it the module raises an error
            options.model.distil_guidance = False

    def instantiate_classes(self) -> None:
        with torch.device("meta"):  # a network of any size, without memory
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        parse_devices(self.parsed.trainer)
        try:
            check_accelerator(self.parsed)
        except UserError:  # doctor reports it with the devices
            kwargs |= {
                "accelerator": "cpu",
                "devices": 1,
                "num_nodes": 1,
                "strategy": "auto",
                "precision": None,
            }
            kwargs["plugins"] = [LightningEnvironment()]
        return super().instantiate_trainer(**kwargs)

    def after_instantiate_classes(self) -> None:
        """No check: doctor checks the data."""

    def run_verb(self, run: Callable[[], None]) -> None:
        """Does nothing: doctor only builds."""

    def plan(self) -> Plan:
        """Build the plan of the run without starting it."""
        decoding = self.config_init[self.verb].generation.decoding
        return Plan(self.parsed, self.datamodule, decoding)


def prepare_loggers(config: Any, run_folder: Path, verb: str, resumes: bool) -> None:
    """Point the loggers at the run folder, and check W&B's login before anything is trained.

    Args:
        config: options of the verb; changed in place.
        run_folder: folder of the run.
        verb: fit, validate, test or predict.
        resumes: whether the run resumes from a checkpoint.

    Raises:
        UserError: if W&B refuses the key, or a folder cannot be written.
    """
    given = config.trainer.logger
    loggers = [
        logger
        for logger in (given if isinstance(given, list) else [given])
        if hasattr(logger, "class_path")
    ]
    for logger in loggers:
        if logger.init_args.get("save_dir") in (None, "."):  # CSVLogger has no default
            logger.init_args.save_dir = str(run_folder)
        if logger.class_path.endswith(".TrackioLogger"):
            logger.init_args.resumes = resumes
    for folder in logger_folders(config):
        writable_folder(folder, LOGGER_FOLDER)
    ours = wandb_loggers(given)
    if ours and not config.trainer.fast_dev_run:
        online = not all(settings.get("offline") for settings in ours)
        prepare_wandb(run_folder, verb, resumes, online, config.tracking.upload_checkpoints)
