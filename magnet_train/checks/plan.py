"""What a run of `fit` will do, derived from its options.

`fit` calls `check_settings` before it creates anything. `doctor` reports the same errors, and uses
`Plan` for further checks and estimates.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from magnet_train.adapters import LoraConfig
from magnet_train.callbacks.validation import check_epoch, check_validation
from magnet_train.checks.cost import num_parameters
from magnet_train.checks.estimate import available_memory, gigabytes
from magnet_train.codec.base import CodecFacts, load_codec_facts
from magnet_train.common.errors import UserError
from magnet_train.conditioning import TextEncoder, load_text_encoder
from magnet_train.data.datamodule import MagnetDataModule, check_codec
from magnet_train.data.shards import Item, ShardSet
from magnet_train.decoding.autoregressive import check_decoding
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.decoding.load_rescorer import check_rescorer
from magnet_train.model import MagnetConfig
from magnet_train.module import check_lora
from magnet_train.optimizer import OptimizerConfig
from magnet_train.resume import newest_intact_checkpoint, requeue_count
from magnet_train.sharding import check_shardable
from magnet_train.tracking.logged import find as find_logged

T = TypeVar("T")

PRECISIONS = (None, "32", "32-true", "16", "16-mixed", "bf16", "bf16-mixed")
"""Supported names of Lightning's precisions; None is 32-true."""
MAX_DEVICES = 100_000
"""Maximum of devices per node and of nodes."""
MAX_SEED = 2**32 - 1
"""Maximum of NumPy's seeds."""
LOGGER_FOLDER = "--trainer.logger.init_args.save_dir"
"""Option of `logger_folders`, for messages."""


# --- devices --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Devices:
    """The devices that a trainer is configured for."""

    kind: str
    """cpu or gpu; Lightning's other accelerators are not checked."""
    per_node: int
    nodes: int

    @property
    def ranks(self) -> int:
        return self.per_node * self.nodes

    @property
    def visible(self) -> int:
        """Number of such devices on this machine."""
        return torch.cuda.device_count() if self.kind == "gpu" else self.per_node

    @property
    def available(self) -> bool:
        return self.visible >= self.per_node


def parse_devices(trainer: Any) -> Devices:
    """Parse `accelerator`, `devices` and `num_nodes` as Lightning does.

    Raises:
        UserError: if there is no device.
    """
    kind = str(trainer.accelerator)
    given = trainer.devices
    if kind in ("auto", "cuda"):
        kind = "gpu" if kind == "cuda" or torch.cuda.is_available() else "cpu"
    try:
        number = _num_devices(given, kind)
    except ValueError as error:
        raise UserError(f"trainer.devices={given}: give a number of devices, or auto") from error
    if not 1 <= number <= MAX_DEVICES or not 1 <= int(trainer.num_nodes) <= MAX_DEVICES:
        raise UserError(
            f"trainer.devices={given}, trainer.num_nodes={trainer.num_nodes}: both must be from 1 "
            f"to {MAX_DEVICES:,}; give a number, or --trainer.devices auto"
        )
    return Devices(kind, number, int(trainer.num_nodes))


def _num_devices(given: Any, kind: str) -> int:
    """Number of devices: all, a list of their indices, or a number."""
    if given in ("auto", -1, "-1"):
        return max(1, torch.cuda.device_count()) if kind == "gpu" else 1
    if isinstance(given, str) and "," in given:
        return len([part for part in given.split(",") if part.strip()])
    return len(given) if isinstance(given, list) else int(given)


def is_sharded(strategy: Any) -> bool:
    """Whether a strategy, given by name or class, shards the weights."""
    name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", "")
    return any(part in name.lower() for part in ("fsdp", "modelparallel"))


def num_steps(trainer: Any, accumulated: int = 1) -> float:
    """Optimizer steps of a run; infinite if only time limits them.

    Args:
        trainer: settings of the trainer.
        accumulated: batches accumulated per step.
    """
    if trainer.fast_dev_run:
        return float(trainer.fast_dev_run)
    limits = [math.inf]
    if trainer.max_steps >= 0:
        limits.append(trainer.max_steps)
    if isinstance(trainer.limit_train_batches, int) and (trainer.max_epochs or -1) >= 0:
        limits.append(trainer.max_epochs * trainer.limit_train_batches / accumulated)
    return min(limits)


def _init_args(given: Any) -> Any:
    """The arguments of a class that is given as class_path and init_args, by name."""
    return getattr(given, "init_args", None) or {}


def _listed(given: Any) -> list[Any]:
    """An option that takes one value, a list, or null, as list."""
    return given if isinstance(given, list) else [given]


def logger_folders(config: Any) -> list[Path]:
    """Local folders into which loggers are told to write, except for the run folder (".")."""
    loggers = map(_init_args, _listed(config.trainer.logger))
    given = [str(logger.get("save_dir") or ".") for logger in loggers]
    return [Path(name).expanduser() for name in given if name != "." and "://" not in name]


def none_if_missing(load: Callable[[], T]) -> T | None:
    """`load()`, or None if it raises a UserError."""
    try:
        return load()
    except UserError:
        return None


# --- settings -------------------------------------------------------------------------------------


def check_seed(config: Any) -> None:
    seed = config.seed_everything
    if type(seed) is int and not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed_everything={seed}: must be from 0 to {MAX_SEED}")


def check_trainer(config: Any) -> None:
    """Trainer settings that do not work here, or that Lightning rejects with a traceback."""
    trainer = config.trainer
    if trainer.precision not in PRECISIONS:
        raise UserError(
            f"trainer.precision={trainer.precision}: weights stay in float32; choose 32-true, "
            "bf16-mixed or 16-mixed"
        )
    if trainer.overfit_batches:
        raise UserError(
            f"trainer.overfit_batches={trainer.overfit_batches}: training data has no end, so each "
            "epoch would have other batches; to overfit a few items, give --data.train a set with "
            "only these"
        )
    at_least = {
        "accumulate_grad_batches": 1,
        "log_every_n_steps": 1,
        "max_steps": -1,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "num_sanity_val_steps": -1,
        "gradient_clip_val": 0,
    }
    for name, lowest in at_least.items():
        value = getattr(trainer, name)
        if isinstance(value, int | float) and not lowest <= value < math.inf:
            raise UserError(f"trainer.{name}={value}: must be a number of at least {lowest}")


def check_validation_schedule(config: Any) -> None:
    trainer = config.trainer
    if not trainer.fast_dev_run:
        check_validation(
            trainer.val_check_interval, trainer.check_val_every_n_epoch, trainer.limit_val_batches
        )
        check_epoch(trainer.limit_train_batches, trainer.accumulate_grad_batches)


def check_end(config: Any) -> None:
    """Whether the number of steps is limited, if epochs or the schedule need that."""
    trainer = config.trainer
    steps = num_steps(trainer)
    if math.isinf(steps) and (trainer.max_epochs or -1) >= 0:
        raise UserError(
            f"trainer.max_epochs={trainer.max_epochs}: training data has no end; set "
            "--trainer.max_steps, or the batches of an epoch with --trainer.limit_train_batches"
        )
    OptimizerConfig(**vars(config.model.optimizer)).warmup_within(steps)


def check_monitor(config: Any) -> None:
    """Whether the metrics of checkpoint.monitor and of callbacks will be logged, and somewhere."""
    monitors = {"checkpoint": config.checkpoint.monitor}
    for callback in _listed(config.trainer.callbacks):
        name = str(getattr(callback, "class_path", "")).rpartition(".")[2]
        if name in ("LearningRateMonitor", "DeviceStatsMonitor") and not config.trainer.logger:
            raise UserError(
                f"trainer.callbacks: {name} needs a logger; remove it, or give --trainer.logger"
            )
        monitors[name] = _init_args(callback).get("monitor")
    for name, monitor in monitors.items():
        if monitor is not None:
            _check_logged(config, f"{name}.monitor={monitor}", monitor)


def _check_logged(config: Any, setting: str, monitor: str) -> None:
    generation = config.generation
    generated = [f"val/{metric}" for metric in generation.metrics] if generation.num_prompts else []
    logged = ("val/ce", "val/accuracy/", "train/", *generated)
    is_expected = monitor.startswith(logged) or (generated and monitor == "val/num_clips")
    stage = re.search(r"/stage(\d+)", monitor)
    has_stage = stage is None or int(stage[1]) < config.model.network.num_codebooks
    if is_expected and has_stage and find_logged(monitor) is not None:
        return
    more = "" if generation.num_prompts else ", or set --generation.num_prompts above 0"
    choices = ", ".join(("val/ce", *generated))
    raise UserError(f"{setting}: nothing of that name is logged; choose {choices}{more}")


def check_network_size(config: Any) -> None:
    """Whether the weights fit into this machine's memory."""
    size = 4.0 * num_parameters(MagnetConfig(**vars(config.model.network)))
    memory = available_memory()
    if size > memory:
        raise UserError(
            f"model.network: its weights take {gigabytes(size)}, this machine has "
            f"{gigabytes(memory)}; set a smaller --model.network.dim or num_layers"
        )


def check_span(config: Any) -> None:
    """Whether a masked span fits into the shortest example."""
    codec = none_if_missing(lambda: load_codec_facts(config.model.codec))
    if codec is None:  # reported elsewhere
        return
    crop_s, name = config.model.crop_s, "--model.crop_s"
    for length_s, _ in config.data.crop_schedule or []:
        if length_s < crop_s:
            crop_s, name = length_s, "crops in --data.crop_schedule"
    num_frames = round(crop_s * codec.frame_rate)
    longest = max((config.model.span_len, *config.model.more_span_lens))
    if longest > num_frames:
        raise UserError(
            f"model.span_len={longest}: longer than an example, crop_s={crop_s:g} s are "
            f"{num_frames} frames; set a smaller --model.span_len or larger {name}"
        )


def check_sharding(config: Any) -> None:
    strategy = config.trainer.strategy
    if is_sharded(strategy):
        saves_folders = _init_args(strategy).get("save_distributed_checkpoint", False)
        check_shardable(str(config.trainer.precision or 32), config.model.lora.rank, saves_folders)


def check_accelerator(config: Any) -> None:
    """Whether this machine has the requested devices."""
    devices = parse_devices(config.trainer)
    if devices.kind not in ("cpu", "gpu", "mps"):
        raise UserError(
            f"trainer.accelerator={devices.kind}: not supported; choose auto, cpu, gpu or mps"
        )
    if devices.kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("trainer.accelerator=mps: not available here; choose auto, cpu or gpu")
    if devices.kind != "gpu":
        return
    if not torch.backends.cuda.is_built():
        raise UserError(
            f"{devices.per_node} GPUs per node requested, but torch {torch.__version__} is built "
            "without CUDA; install the build for your CUDA version, or set --trainer.accelerator "
            "cpu"
        )
    if not devices.available:
        raise UserError(
            f"{devices.per_node} GPUs per node requested, {devices.visible} visible here; run this "
            f"where the job will run (srun --gpus-per-node {devices.per_node} …), or set "
            "--trainer.devices"
        )


def check_adapters(config: Any) -> None:
    model = config.model
    check_lora(LoraConfig(**vars(model.lora)), model.init_from, bool(model.distil_guidance))


def check_generation(config: Any) -> None:
    """Whether the network can be decoded, and rescored, with the settings of validation."""
    values = config.generation.decoding
    codec = none_if_missing(lambda: load_codec_facts(config.model.codec))
    if values is None or codec is None:  # the codec is reported elsewhere
        return
    decoding = DecodingConfig(**vars(values))
    check_decoding(MagnetConfig(**vars(config.model.network)), decoding, config.model.crop_s)
    if config.generation.num_prompts and decoding.rescorer is not None:
        check_rescorer(decoding.rescorer, codec.to_dict())


SETTINGS_CHECKS: tuple[Callable[[Any], None], ...] = (
    check_seed,
    check_trainer,
    check_validation_schedule,
    check_end,
    check_monitor,
    check_network_size,
    check_sharding,
    check_accelerator,
    check_span,
    check_adapters,
)


def check_settings(config: Any) -> None:
    """Check everything that can be checked before anything is loaded.

    Args:
        config: parsed options of `fit`.

    Raises:
        UserError: for the first invalid setting.
    """
    for check in SETTINGS_CHECKS:
        check(config)


def settings_errors(config: Any, without: Callable[[Any], None] | None = None) -> list[UserError]:
    """All errors that `check_settings` could raise, except for those of the check `without`."""
    found = []
    for check in SETTINGS_CHECKS:
        try:
            if check is not without:
                check(config)
        except UserError as error:
            found.append(error)
    return found


# --- the run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A run of `fit` as configured."""

    config: Any
    """All options, by name."""
    data: MagnetDataModule
    """Has no trainer."""
    decoding: DecodingConfig
    samples: dict[str, list[Item]] = field(default_factory=dict)
    """Items read so far, by split."""

    @cached_property
    def network(self) -> MagnetConfig:
        return MagnetConfig(**vars(self.config.model.network))

    @cached_property
    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(**vars(self.config.model.optimizer))

    @cached_property
    def devices(self) -> Devices:
        return parse_devices(self.config.trainer)

    @property
    def is_sharded(self) -> bool:
        return is_sharded(self.config.trainer.strategy)

    @cached_property
    def batch(self) -> tuple[int, int]:
        """Examples per batch on each device, and batches accumulated for an optimizer step.

        Raises:
            UserError: if the global batch cannot be divided equally among the devices.
        """
        return self.data.batch_split(
            self.devices.ranks, self.config.trainer.accumulate_grad_batches
        )

    @cached_property
    def codec(self) -> CodecFacts | None:
        """None if the codec is not available."""
        return none_if_missing(lambda: load_codec_facts(self.config.model.codec))

    @cached_property
    def text_encoder(self) -> TextEncoder | None:
        """None if it is not available."""
        return none_if_missing(lambda: load_text_encoder(self.config.model.text_encoder))

    @property
    def num_frames(self) -> int:
        """Frames of an example; at the published 50 Hz if the codec is not available."""
        return round(
            self.config.model.crop_s * (50.0 if self.codec is None else self.codec.frame_rate)
        )

    @property
    def num_steps(self) -> float:
        """Optimizer steps of the run; infinite if only time limits them."""
        return num_steps(self.config.trainer, self.batch[1])

    @property
    def steps_between_validations(self) -> float:
        """Optimizer steps; infinite if the run does not validate."""
        trainer = self.config.trainer
        return math.inf if trainer.limit_val_batches == 0 else trainer.val_check_interval

    @property
    def num_validations(self) -> int:
        """Number of validations of a finite run, including those before training and at the end."""
        if math.isinf(self.steps_between_validations):
            return 0
        return (
            math.ceil(self.num_steps / self.steps_between_validations)
            + self.config.generation.at_start
        )

    @property
    def ckpt_path(self) -> str | None:
        """As given, or "auto" for a requeued job."""
        return (
            "auto" if self.config.ckpt_path is None and requeue_count() else self.config.ckpt_path
        )

    @cached_property
    def checkpoint(self) -> str | None:
        """Checkpoint from which the run resumes; None for a new run."""
        if self.ckpt_path != "auto":
            return self.ckpt_path
        found = newest_intact_checkpoint([self.run_folder, self.checkpoint_folder])
        return None if found is None else str(found)

    @property
    def run_folder(self) -> Path:
        return Path(self.config.trainer.default_root_dir or "runs/run").expanduser()

    @property
    def checkpoint_folder(self) -> Path:
        return Path(self.config.checkpoint.dirpath or self.run_folder / "checkpoints").expanduser()

    def monitors(self, embedder: str) -> bool:
        """Whether checkpoint.monitor is a metric of this embedder."""
        monitor = self.config.checkpoint.monitor or ""
        return monitor.startswith("val/") and f"/{embedder}" in monitor

    def shards(self, split: str) -> ShardSet:
        """Shards of a split, checked against the codec, or the training shards if it is missing.

        Raises:
            UserError: if they are missing, or were made with another codec.
        """
        if self.codec is not None:
            return self.data.shards(split)
        folder = self.data.folders[split]
        if folder is None:
            raise UserError(f"no {split} shards: give --data.{split} FOLDER (made with tokenize)")
        found = ShardSet.open(folder)
        train = self.data.folders["train"]
        if train is not None and split != "train":
            check_codec(found, CodecFacts.from_dict(ShardSet.open(train).index["codec"]))
        return found
