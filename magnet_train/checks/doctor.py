"""`doctor`: whether a run of `fit` would start and last, and what it would take, before hours are spent on it.

A check is a function of a `Plan` that yields findings; a UserError that it meets is a finding too, so that each check
runs whatever the others found. Nothing is trained, nothing is written but a probe that is removed, and nothing is
downloaded unless the plan says so.
"""

import contextlib
import importlib.metadata
import io
import math
import os
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

from magnet_train import cost as estimate
from magnet_train.callbacks import validation
from magnet_train.callbacks.resume import ExactResume
from magnet_train.checks.measure import matmul_limit, peak_mb, timed, training_pass
from magnet_train.codec.base import CodecFacts, load_codec
from magnet_train.common.downloads import CLAP_MUSIC, PASST_10S, PASST_20S, VGGISH, Weights, cached, find_weights
from magnet_train.common.errors import UserError
from magnet_train.common.pretrained import one_line
from magnet_train.common.torchaudio_import import import_torchaudio
from magnet_train.conditioning import TextEncoder, load_text_encoder
from magnet_train.cost import PEAK_TFLOP, peak_flop
from magnet_train.data.datamodule import MagnetDataModule
from magnet_train.data.pipeline import Item, ShardSet
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.metrics.embedders import load_listener
from magnet_train.metrics.scoring import NEEDS_REFERENCE, parse_metric
from magnet_train.model import MagnetConfig
from magnet_train.module import MagnetModule
from magnet_train.release import SavedModel, check_codec, check_weights, read_checkpoint
from magnet_train.resume import check_same_model, newest_whole_checkpoint
from magnet_train.sharding import check_shardable
from magnet_train.tracking.wandb_session import REMEDY, try_key

WEIGHTS: dict[str, Weights] = {
    "vggish": VGGISH, "torchvggish": VGGISH, "passt": PASST_20S, "passt-10s": PASST_10S, "clap": CLAP_MUSIC,
}  # fmt: skip
"""Of each listener that does not ship."""
SAMPLED_SHARDS, SAMPLING_S = 5, 10.0
"""Shards of a split that are read: first, last, and others at random; and seconds after which no more are."""
MEASURED_LAYERS, MEASURED_S = 2, 3.0
"""Blocks of the network with which speed and memory are measured, and seconds that a pass of them may take."""
SUPPOSED_GPU, SUPPOSED_SHARE, SUPPOSED_CPU_FLOP = "A100", 0.35, 2e10
"""Where nothing can be measured: a GPU, the share of its best that is reached, and what one CPU core is sure to do."""
FREE_GPU = 0.1
"""Share of a GPU's memory that may be in use before anything is trained on it."""
LEAST_SHM, LEAST_FILES, LEAST_INODES = 1e9, 1024, 1000
"""Of /dev/shm in bytes, as NCCL's manual has it for containers; of files that a process may open; of files that the
file system may still take."""


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    status: Literal["ok", "warning", "missing", "failed"]
    """A run would start with warnings; not with what is missing or failed."""
    what: str
    detail: str
    """Numbers or a place; and the remedy where something is wrong."""

    def __str__(self) -> str:
        return f"{self.status:<8} {self.what}: {self.detail}"


@dataclass(frozen=True)
class Devices:
    """What a trainer asks for."""

    kind: str
    """cpu or gpu; or another of Lightning's accelerators, which is not looked at."""
    per_node: int
    nodes: int

    @property
    def ranks(self) -> int:
        return self.per_node * self.nodes

    @property
    def visible(self) -> int:
        """Of them, on this machine."""
        return torch.cuda.device_count() if self.kind == "gpu" else self.per_node

    @property
    def are_here(self) -> bool:
        return self.visible >= self.per_node


def devices_of(trainer: Any) -> Devices:
    """From `accelerator`, `devices` and `num_nodes` as Lightning takes them."""
    kind, asked = str(trainer.accelerator), trainer.devices
    if kind in ("auto", "cuda"):
        kind = "gpu" if kind == "cuda" or torch.cuda.is_available() else "cpu"
    if asked in ("auto", -1, "-1"):
        number = max(1, torch.cuda.device_count()) if kind == "gpu" else 1
    elif isinstance(asked, str):
        number = len([part for part in asked.split(",") if part.strip()]) if "," in asked else int(asked)
    else:
        number = len(asked) if isinstance(asked, list) else int(asked)
    return Devices(kind, number, int(trainer.num_nodes))


@dataclass(frozen=True)
class Plan:
    """A run of `fit` as it was asked for."""

    config: Any
    """All options, under their names."""
    data: MagnetDataModule
    module: MagnetModule
    """With all its settings, but with a network of one number."""
    decoding: DecodingConfig
    samples: dict[str, list[Item]] = field(default_factory=dict)
    """Items that were read, by split."""

    @cached_property
    def network(self) -> MagnetConfig:
        return MagnetConfig(**vars(self.config.model.network))

    @cached_property
    def devices(self) -> Devices:
        return devices_of(self.config.trainer)

    @property
    def is_sharded(self) -> bool:
        """Whether weights are divided among the ranks."""
        strategy = self.config.trainer.strategy
        name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", "")
        return any(mark in name.lower() for mark in ("fsdp", "modelparallel"))

    @cached_property
    def facts(self) -> CodecFacts | None:
        """Of the codec; None if it is not to be had, which is its own check's to say."""
        return _or_none(lambda: load_codec(self.config.model.codec).facts)

    @cached_property
    def text_encoder(self) -> TextEncoder | None:
        """None if it is not to be had."""
        return _or_none(lambda: load_text_encoder(self.config.model.text_encoder))

    @property
    def num_frames(self) -> int:
        """Of an example; at the published 50 Hz if the codec is not here."""
        return round(self.config.model.crop_s * (50.0 if self.facts is None else self.facts.frame_rate))

    @cached_property
    def trainer(self) -> Any:
        """What data module and optimizer ask of a trainer: its settings, and its answers as on all devices."""
        given = self.config.trainer
        progress = SimpleNamespace(total=SimpleNamespace(processed=0))
        limits = ("limit_train_batches", "limit_val_batches")
        filled = {name: 1.0 if (value := getattr(given, name)) is None else value for name in limits}
        more = filled | {
            "world_size": self.devices.ranks,
            "global_rank": 0,
            "is_global_zero": False,
            "fit_loop": SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        }
        return SimpleNamespace(**vars(given) | more)

    @property
    def num_steps(self) -> float:
        """Optimizer steps of the run; infinite if nothing bounds them but time."""
        given, limits = self.config.trainer, [math.inf]
        if given.max_steps >= 0:
            limits.append(given.max_steps)
        if isinstance(given.limit_train_batches, int) and (given.max_epochs or -1) >= 0:
            limits.append(given.max_epochs * given.limit_train_batches / self.trainer.accumulate_grad_batches)
        return float(given.fast_dev_run) if given.fast_dev_run else min(limits)

    @property
    def steps_between_validations(self) -> float:
        """Infinite if none happens."""
        given = self.config.trainer
        return math.inf if given.limit_val_batches == 0 else given.val_check_interval

    @property
    def ckpt_path(self) -> str | None:
        """As given; a job that was queued again goes on, as `fit` has it."""
        is_again = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        return "auto" if self.config.ckpt_path is None and is_again else self.config.ckpt_path

    @cached_property
    def checkpoint(self) -> str | None:
        """That the run goes on from; None if it begins."""
        if self.ckpt_path != "auto":
            return self.ckpt_path
        found = newest_whole_checkpoint([self.run_folder, self.checkpoint_folder])
        return None if found is None else str(found)

    def goes_by(self, name: str) -> bool:
        """Whether the best checkpoint is chosen by a metric of this listener."""
        monitor = self.config.checkpoint.monitor or ""
        return monitor.startswith("val/") and f"/{name}" in monitor

    @property
    def run_folder(self) -> Path:
        return Path(self.config.trainer.default_root_dir or "runs/run").expanduser()

    @property
    def checkpoint_folder(self) -> Path:
        return Path(self.config.checkpoint.dirpath or self.run_folder / "checkpoints").expanduser()

    def shards(self, split: str) -> ShardSet:
        """Of a split, held to the codec if that is here."""
        if self.facts is None and self.data.folders[split] is not None:
            codec = ShardSet.open(self.data.folders[split] or "").index["codec"]
            self.data._facts = CodecFacts.from_dict(codec)
        return self.data.shards(split)


def _or_none(load: Callable[[], Any]) -> Any:
    try:
        return load()
    except UserError:
        return None


# --- configuration ------------------------------------------------------------------------------------------------


def check_batch(plan: Plan) -> Iterator[Finding]:
    """First of all, because accumulation follows from the global batch."""
    if plan.data.global_batch_size is not None:
        plan.data.share_out(plan.data.global_batch_size, plan.trainer)
    ranks, size, accumulated = plan.devices.ranks, plan.data.batch_size, plan.trainer.accumulate_grad_batches
    number = ranks * size * accumulated
    text = f"{ranks} devices x {size} examples x {accumulated} accumulated batches = {number} for each step"
    yield Finding("ok", "batch", text)


def check_schedule(plan: Plan) -> Iterator[Finding]:
    """Optimizer and learning rate by the module's own rules; and whether there is a validation at all."""
    if plan.is_sharded:
        check_shardable(str(plan.config.trainer.precision or 32), plan.module.optimizer_config.name)
    plan.trainer.estimated_stepping_batches = plan.num_steps
    plan.module._trainer = plan.trainer
    with contextlib.redirect_stdout(io.StringIO()):  # an optimizer that tells of itself
        plan.module.configure_optimizers()
    optimizer = plan.module.optimizer_config
    text = f"{optimizer.name}, {optimizer.schedule} after {optimizer.warmup_steps} steps of warm-up"
    if plan.num_steps == math.inf and plan.config.trainer.max_time is None:
        yield Finding("warning", "schedule", f"{text}; the run has no end: give --trainer.max_steps or max_time")
    else:
        yield Finding("ok", "schedule", f"{text}, {plan.num_steps:,.0f} steps")


def check_validation(plan: Plan) -> Iterator[Finding]:
    given = plan.config.trainer
    if not given.fast_dev_run:
        validation.check_validation(given.val_check_interval, given.check_val_every_n_epoch, given.limit_val_batches)
    every, generation = plan.steps_between_validations, plan.config.generation
    prompts = f"{generation.num_prompts} prompts"
    if given.limit_val_batches == 0:
        yield Finding("warning", "validation", "this run does not validate: trainer.limit_val_batches=0")
    elif given.fast_dev_run:
        yield Finding("ok", "validation", f"once, at the end, {prompts}")
    else:
        yield Finding("ok", "validation", f"every {every:,.0f} steps, {prompts}")
    plan.decoding.steps_per_stage(plan.network.num_codebooks)
    monitor = plan.config.checkpoint.monitor
    generated = [f"val/{metric}" for metric in generation.metrics] if generation.num_prompts else []
    if monitor in (None, "step", "epoch"):
        return
    if not monitor.startswith(("val/ce", "val/accuracy/", "train/", *generated, *["val/num_clips"] * bool(generated))):
        few = "" if generation.num_prompts else ", or set --generation.num_prompts above 0"
        raise UserError(
            f"checkpoint.monitor={monitor}: nothing of that name is logged; choose "
            f"{', '.join(('val/ce', *generated))}{few}"
        )


def check_start(plan: Plan) -> Iterator[Finding]:
    """What training begins with: a checkpoint of the run, other weights, or nothing."""
    config = plan.config
    path = plan.checkpoint
    if path in ("last", "best", "hpc", "registry"):
        yield Finding("ok", "start", f"--ckpt_path {path}: Lightning will look for it")
    elif path is not None:
        checkpoint = read_checkpoint(Path(path))
        if "network" not in checkpoint.get("hyper_parameters", {}):
            raise UserError(f"{path}: not a checkpoint of magnet_train; choose another")
        own = {"network": asdict(plan.network), "optimizer": {"name": config.model.optimizer.name}}
        check_same_model(checkpoint["hyper_parameters"], own)
        if "run" in checkpoint:
            plan.shards("train")
            ExactResume.check_data(plan.data, checkpoint["run"], plan.text_encoder)
        yield Finding("ok", "start", f"goes on after step {checkpoint.get('global_step')} of {path}")
    elif config.model.init_from is not None:
        start = SavedModel.open(config.model.init_from)
        check_weights(start.weights(), plan.network, start.file)
        if plan.facts is not None:
            check_codec(start.codec, plan.facts, start.file)
        yield Finding("ok", "start", f"weights of {start.file}, which fit the network")
    else:
        yield Finding("ok", "start", "with fresh weights" + (", no checkpoint yet" if plan.ckpt_path else ""))


# --- weights and data ---------------------------------------------------------------------------------------------


def check_components(plan: Plan) -> Iterator[Finding]:
    """Codec, text encoder and the metrics' networks: tried by loading them, as a node without network will."""
    config = plan.config
    listeners = dict.fromkeys(parse_metric(metric)[1] for metric in config.generation.metrics)
    if not config.generation.num_prompts:
        listeners = {}
    tries: list[tuple[str, Callable[[], str]]] = [
        (f"codec {config.model.codec}", lambda: load_codec(config.model.codec).facts.hash),
        (f"text encoder {config.model.text_encoder}", lambda: load_text_encoder(config.model.text_encoder).id),
        *((f"metrics of {name}", lambda name=name: _listener(name, config.prefetch)) for name in listeners),
    ]
    optional = {f"metrics of {name}" for name in listeners if not plan.goes_by(name)}
    for what, load in tries:
        try:
            yield Finding("ok", what, str(load()))
        except UserError as error:
            remedy = "" if config.prefetch or "--prefetch" in str(error) else "; or fetch it with doctor --prefetch"
            if what in optional:
                yield Finding("warning", what, f"{error}{remedy}; without it these metrics are left out")
            else:
                yield Finding("missing", what, f"{error}{remedy}")


def _listener(name: str, prefetch: bool) -> str:
    """Where its weights are, hash and licence included."""
    weights = WEIGHTS.get(name)
    if weights is None:
        return f"ships ({load_listener(name).hash})"
    if not prefetch and cached(weights) is None:
        size = f"{weights.size / 1e6:,.0f} MB, licence {weights.licence}"
        raise UserError(f"not in the cache; doctor --prefetch downloads {weights.url} ({size})")
    file = find_weights(weights)
    if name == "clap":  # its tokenizer comes from the hub
        load_listener(name)
    return f"{file.path} ({file.hash}, licence {weights.licence})"


def check_shards(plan: Plan) -> Iterator[Finding]:
    """Each split: its index, the codec, and some of its shards, whole and with their checksums."""
    for split in ("train", "validation", "test"):
        what, given = f"{split} shards", plan.data.folders[split]
        if given is None and split == "test":
            yield Finding("ok", what, "none given, and `fit` needs none")
            continue
        if given is None and split == "validation" and plan.trainer.limit_val_batches == 0:
            yield Finding("ok", what, "none given, and a `fit` that does not validate needs none")
            continue
        try:
            found = plan.shards(split)
            items, read = _sample(found)
        except (UserError, OSError) as error:
            yield Finding("failed", what, str(error))
            continue
        plan.samples[split] = items
        codec = found.index["codec"]["id"]
        text = f"{sum(found.counts):,} items in {len(found.counts):,} shards of {given}, codec {codec}"
        if not items:
            yield Finding("failed", what, f"{text}: no item in the {read} that were read; run tokenize again")
            continue
        frames = sorted(item["codes"].shape[1] for item in items)
        short = sum(n < plan.num_frames for n in frames) / len(frames)
        text += f"; {read} read whole: {len(items)} items of {frames[0]} to {frames[-1]} frames"
        if short:
            text += f", {short:.0%} of them shorter than the {plan.num_frames} of an example, and padded"
        bad = short > 0.5
        remedy = (
            f"; tokenize with --crop_s {plan.config.model.crop_s:g} or more, or set --model.crop_s lower" if bad else ""
        )
        yield Finding("warning" if bad else "ok", what, text + remedy)


def _sample(found: ShardSet) -> tuple[list[Item], int]:
    """Items of the first shard, the last, and others at random; and how many shards that were."""
    count = len(found.counts)
    others = random.Random(0).sample(range(1, max(1, count - 1)), max(0, min(SAMPLED_SHARDS, count) - 2))
    numbers, start, items = list(dict.fromkeys([0, count - 1, *others])), time.monotonic(), []
    for done, number in enumerate(numbers):
        if time.monotonic() - start > SAMPLING_S:
            return items, done
        items += found.read(number, with_references=True)
    return items, len(numbers)


def check_deal(plan: Plan) -> Iterator[Finding]:
    """Whether every loader process of every rank gets a shard, by the data module's own rule."""
    if (found := _or_none(lambda: plan.shards("train"))) is None:  # which the check before has told
        return
    plan.data.trainer = plan.trainer
    plan.data.train_dataloader()
    ranks, workers = plan.devices.ranks, plan.data.workers
    share = len(found.counts) / (ranks * max(1, workers))
    text = f"{len(found.counts):,} shards for {ranks} ranks x {max(1, workers)} readers"
    if len(found.counts) % (ranks * max(1, workers)):
        text += "; unequal shares even out over the epochs"
    yield Finding("ok", "shares", f"{text}, {share:.3g} each")


def check_references(plan: Plan) -> Iterator[Finding]:
    """What the metrics compare with."""
    given = plan.config.generation
    needing = [m for m in given.metrics if parse_metric(m)[0] in NEEDS_REFERENCE]
    if not given.num_prompts or not needing or "validation" not in plan.samples:
        return
    for name in dict.fromkeys(parse_metric(m)[1] for m in needing):
        metrics = ", ".join(m for m in needing if m.endswith(f"/{name}"))
        if name == "musicnn" and any(item["reference"] for item in plan.samples["validation"]):
            yield Finding("ok", f"references of {name}", f"in the validation shards, for {metrics}")
        elif given.reference is None:
            remedy = "tokenize with --embedder musicnn" if name == "musicnn" else "give --generation.reference"
            monitor = str(plan.config.checkpoint.monitor)
            monitored = any(monitor.startswith(f"val/{m}") for m in needing if m.endswith(f"/{name}"))
            yield Finding(
                "failed" if monitored else "warning", f"references of {name}", f"none, so no {metrics}; {remedy}"
            )
        elif not (file := Path(given.reference).expanduser() / f"{name}.safetensors").is_file():
            text = f"{file}: not there; write it with evaluate --save_reference, or leave {metrics} out"
            yield Finding("failed", f"references of {name}", text)
        else:
            yield Finding("ok", f"references of {name}", f"{file}, for {metrics}")


def check_captions(plan: Plan) -> Iterator[Finding]:
    """Of the items that were read."""
    for split in ("train", "validation"):
        if not (items := plan.samples.get(split)):
            continue
        captions = [str(item["info"].get("caption") or "").strip() for item in items]
        some = [caption for caption in captions if caption]
        empty, again = 1 - len(some) / len(captions), 1 - len(set(some)) / max(1, len(some))
        text = f"{len(captions)} read: {empty:.0%} empty, {again:.0%} that repeat another"
        problems = []
        if empty:
            problems.append("an empty one teaches nothing of text: give it in the manifest and tokenize again")
        if again > 0.5:
            problems.append("more variety teaches more: caption each file by itself")
        if plan.text_encoder is not None and some:
            limit, lengths = plan.text_encoder.max_length, sorted(plan.text_encoder.num_tokens(some))
            text += f", {lengths[len(lengths) // 2]} tokens in the median and {lengths[-1]} at most"
            if cut := sum(n > limit for n in lengths):
                problems.append(f"{cut / len(captions):.0%} are cut off after {limit} tokens: what matters goes first")
        yield Finding("warning" if problems else "ok", f"{split} captions", "; ".join([text, *problems]))


# --- machine ------------------------------------------------------------------------------------------------------


def check_devices(plan: Plan) -> Iterator[Finding]:
    devices, precision = plan.devices, str(plan.config.trainer.precision or "32-true")
    if devices.kind not in ("cpu", "gpu"):
        yield Finding("warning", "devices", f"accelerator {devices.kind} is not looked at")
        return
    if devices.kind == "cpu":
        if precision == "16-mixed":
            yield Finding("warning", "precision", "16-mixed is not to be had on a CPU, Lightning takes bf16-mixed")
        yield Finding("ok", "devices", f"{devices.ranks} on the CPU, precision {precision}")
        return
    if not torch.backends.cuda.is_built():
        raise UserError(
            f"{devices.per_node} GPUs a node asked for, but torch {torch.__version__} is built without CUDA; install "
            "the build for your CUDA, or set --trainer.accelerator cpu"
        )
    if not devices.are_here:
        raise UserError(
            f"{devices.per_node} GPUs a node asked for, {devices.visible} visible here; run doctor where the job will "
            f"run (srun --gpus-per-node {devices.per_node} …), or set --trainer.devices"
        )
    if devices.ranks > 1 and not torch.distributed.is_nccl_available():
        raise UserError(
            f"{devices.ranks} GPUs asked for, but torch {torch.__version__} is built without NCCL, by which they talk; "
            "install the build for your CUDA, or set --trainer.devices 1"
        )
    properties = [torch.cuda.get_device_properties(i) for i in range(devices.per_node)]
    names = sorted({f"{p.name} with {p.total_memory / 1e9:.0f} GB" for p in properties})
    nodes = f" on each of {devices.nodes} nodes, of which this one was looked at" if devices.nodes > 1 else ""
    yield Finding("ok", "devices", f"{devices.per_node} GPUs{nodes}: {', '.join(names)}, precision {precision}")
    used = [1 - free / total for free, total in map(torch.cuda.mem_get_info, range(devices.per_node))]
    if max(used) > FREE_GPU:
        yield Finding("warning", "devices", f"others use {max(used):.0%} of a GPU's memory: ask for GPUs of your own")
    if precision.startswith("bf16") and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"trainer.precision={precision}: {properties[0].name} computes no bfloat16; set --trainer.precision "
            "16-mixed"
        )


def check_packages() -> Iterator[Finding]:
    """Versions of what training stands on, held to what the package asks for."""
    from packaging.requirements import Requirement

    for line in _requirements():
        need = Requirement(line)
        if need.marker is not None:
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("failed", "packages", f"{need.name} is missing: pip install '{line}'")
            continue
        if not need.specifier.contains(version, prereleases=True):
            yield Finding("failed", "packages", f"{need.name} {version} is installed, {need.specifier} is needed: "
                          f"pip install '{need.name}{need.specifier}'")  # fmt: skip
    names = ("torch", "lightning", "transformers", "wandb")
    text = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    if torch.backends.cuda.is_built():
        from torch.cuda import nccl

        version = ".".join(map(str, nccl.version())) if torch.distributed.is_nccl_available() else "missing"
        text += f", CUDA {torch.version.cuda}, NCCL {version}"
    yield Finding("ok", "packages", text)
    try:
        twin = importlib.metadata.version("pytorch-lightning")
    except importlib.metadata.PackageNotFoundError:
        twin = None
    if twin not in (None, own := importlib.metadata.version("lightning")):
        yield Finding(
            "warning", "packages", f"lightning {own} beside pytorch-lightning {twin}: install one version of both"
        )
    try:
        audio = import_torchaudio()
    except ModuleNotFoundError:
        return  # nothing here needs it
    # From 2.11 on torchaudio is one build for all later torch.
    if audio.__version__.split("+")[0] < "2.11":
        text = (
            f"{audio.__version__} is older than 2.11 and made for one torch only: pip install 'torchaudio>=2.11,<2.12'"
        )
        yield Finding("warning", "torchaudio", text)


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("magnet-train") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return []


def check_host(plan: Plan) -> Iterator[Finding]:
    """CPU cores, shared memory, open files."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = plan.data.num_workers
    ranks, computing = plan.devices.per_node, plan.devices.kind == "cpu"  # else a rank mostly waits for its GPU
    workers = (2 if given is None else given) * ranks
    text = f"{cores} cores for {ranks} ranks and {workers} loader processes"
    if (workers + ranks if computing else max(workers, ranks)) > max(cores, 2):
        fits = max(0, cores // ranks - computing)
        yield Finding(
            "warning", "CPU", f"{text}: ask for more cores (--cpus-per-task), or set --data.num_workers {fits}"
        )
    else:
        yield Finding("ok", "CPU", text)
    shm = Path("/dev/shm")
    if shm.is_dir() and plan.devices.per_node > 1:
        free = shutil.disk_usage(shm).free
        text = f"{free / 1e9:.1f} GB of shared memory free in {shm}"
        few = free < LEAST_SHM
        more = "; NCCL's ranks exchange through it: start the container with --shm-size 8g" if few else ""
        yield Finding("warning" if few else "ok", "shared memory", text + more)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = 0 <= files < LEAST_FILES
    more = f"; raise it with ulimit -n {4 * LEAST_FILES}" if few else ""
    yield Finding("warning" if few else "ok", "open files", f"{files} for each process{more}")


def check_disk(plan: Plan) -> Iterator[Finding]:
    """Whether the run folder can be written, and holds the checkpoints that are kept."""
    folder = plan.run_folder
    try:
        with tempfile.NamedTemporaryFile(dir=_existing(folder), prefix=".magnet_train_doctor_") as probe:
            probe.write(bytes(4096))
            probe.flush()
    except OSError as error:
        raise UserError(
            f"run folder {folder}: cannot be written ({error.strerror}); set --trainer.default_root_dir to another"
        ) from error
    place = _existing(plan.checkpoint_folder)
    size, kept = _checkpoint_bytes(plan), _kept_checkpoints(plan)
    free, inodes = shutil.disk_usage(place).free, os.statvfs(place)
    text = f"{kept:.0f} checkpoints of {gb(size)} in {plan.checkpoint_folder}, one of them being written"
    # Those of a run that goes on are replaced; those of an earlier one are set aside and stay.
    there = sum(file.stat().st_size for file in plan.checkpoint_folder.glob("*.ckpt")) if plan.checkpoint else 0
    if there:
        text += f"; {gb(there)} of them are there"
    if free < max(size, kept * size - there):
        raise UserError(
            f"{gb(free)} free for {text}: free some space, keep fewer with --checkpoint.save_top_k, or set "
            "--trainer.default_root_dir to another disk"
        )
    if inodes.f_files > 0 and inodes.f_favail < LEAST_INODES:
        raise UserError(f"{place}: {inodes.f_favail} inodes are left; remove files you need no more")
    yield Finding("ok", "disk", f"{gb(free)} free for {text}")


def _existing(folder: Path) -> Path:
    """The folder, or what there is of the way to it."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _checkpoint_bytes(plan: Plan) -> float:
    optimizer = plan.module.optimizer_config.name
    return estimate.checkpoint_bytes(plan.network, optimizer, precision=plan.config.trainer.precision)


def _kept_checkpoints(plan: Plan) -> float:
    """The best, the last, and one that is being written."""
    given = plan.config.checkpoint
    best = given.save_top_k
    if best == -1:  # all
        every = given.every_n_train_steps or plan.steps_between_validations
        best = plan.num_steps // every if math.isfinite(plan.num_steps / every) else 1
    return best + 2


def check_wandb(plan: Plan) -> Iterator[Finding]:
    """Mode and key, as `fit` will find them; a key is shown to the server."""
    given = plan.config.trainer.logger
    loggers = given if isinstance(given, list) else [given]
    ours = [one.init_args for one in loggers if str(getattr(one, "class_path", "")).endswith(".WandbLogger")]
    if not ours or plan.config.trainer.fast_dev_run:
        yield Finding("ok", "W&B", "is no logger of this run")
        return
    later = f"wandb sync {plan.run_folder}/wandb/offline-* sends it later"
    if all(args.get("offline") for args in ours):
        yield Finding("ok", "W&B", f"offline: {later}")
        return
    with contextlib.redirect_stderr(io.StringIO()):  # it tells of itself
        state, text = try_key()
    goes_on = plan.ckpt_path is not None and (plan.run_folder / "wandb_run_id").is_file()
    if state == "online":
        yield Finding("ok", "W&B", f"online at {text}, which takes the key")
    elif state == "off" and text in ("offline", "dryrun"):
        yield Finding("ok", "W&B", f"offline: {later}")
    elif state == "off":
        yield Finding("warning", "W&B", f"{text} by its settings: nothing will be kept")
    elif state == "refused" and not goes_on:
        yield Finding("failed", "W&B", f"{text}; {REMEDY}")
    else:
        yield Finding("warning", "W&B", f"{text}: the run will be logged offline; {later}")


# --- estimate -----------------------------------------------------------------------------------------------------


def gb(size: float) -> str:
    """Bytes as people read them.

    >>> gb(6.72e9), gb(3.1e7)
    ('6.7 GB', '31 MB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


@dataclass(frozen=True)
class Speed:
    """Floating-point operations per second on one device, and how that is known."""

    first: float
    """At stage 0."""
    others: float
    memory_factor: float
    """Measured activations over calculated ones; 1 where nothing was measured."""
    how: str


def speed(plan: Plan) -> Speed:
    """Measured with a network of a few blocks of the configured width, where that takes seconds; else supposed."""
    network, precision = plan.network, plan.config.trainer.precision
    half = estimate.bytes_of(precision)[1] < estimate.FULL
    device = "cuda" if plan.devices.kind == "gpu" else "cpu"
    best = peak_flop(torch.device(device), str(precision)) if device == "cpu" or torch.cuda.is_available() else None
    few = MagnetConfig(**network.to_dict() | {"num_layers": min(network.num_layers, MEASURED_LAYERS)})
    size = 1 if device == "cpu" else min(plan.data.batch_size, 4)
    flop = [size * estimate.training_flop(few, plan.num_frames, stage) for stage in (0, 1)]
    likely = best or (SUPPOSED_CPU_FLOP if device == "cpu" else 1e12 * PEAK_TFLOP[SUPPOSED_GPU])
    if device == "cuda" and not torch.cuda.is_available():
        rate = SUPPOSED_SHARE * likely
        how = f"calculated for a GPU of {likely / 1e12:.0f} TFLOP/s ({SUPPOSED_GPU}) used at {SUPPOSED_SHARE:.0%}"
        return Speed(rate, rate, 1.0, how)
    if device == "cpu" and flop[0] / likely > MEASURED_S:
        rate = matmul_limit("cpu") / 2
        return Speed(rate, rate, 1.0, "calculated at half the speed of a matrix product on this CPU")
    num_predicted = round(estimate.MEAN_MASK_RATE * plan.num_frames)
    step, weights = training_pass(few, size, plan.num_frames, num_predicted, estimate.NUM_TEXT, device, half)
    other = min(1, network.num_codebooks - 1)
    seconds = timed([lambda: step(0), lambda: step(other)], 2, device)
    peak = peak_mb(lambda: step(0), device) * 1e6 - (weights / 2 if half else 0)  # autocast's copies of the weights
    factor = peak / estimate.activation_bytes(few, size, plan.num_frames, precision)
    how = f"measured here on {few.num_layers} of {network.num_layers} blocks"
    return Speed(flop[0] / min(seconds[0]), flop[other] / min(seconds[1]), max(0.5, factor), how)


def estimates(plan: Plan) -> Iterator[Finding | str]:
    """Lines on memory, time and cost; and a finding where the device is too small."""
    network, data, ranks = plan.network, plan.data, plan.devices.ranks
    found = speed(plan)
    optimizer, precision = plan.module.optimizer_config.name, plan.config.trainer.precision
    frozen = 0.0 if plan.text_encoder is None else sum(p.numel() * 4.0 for p in plan.text_encoder.parameters())
    needed = estimate.memory(
        network, data.batch_size, plan.num_frames, precision, optimizer, ranks, plan.is_sharded, frozen=frozen,
        factor=found.memory_factor,
    )  # fmt: skip
    parts = ", ".join(f"{name} {gb(value)}" for name, value in needed.in_training.items() if value)
    if needed.validation:
        parts += f"; in a validation, with all weights whole, {gb(needed.validation)}"
    parameters = estimate.num_parameters(network)
    yield f"model: {parameters / 1e6:,.1f} M parameters, {gb(_checkpoint_bytes(plan))} a checkpoint"
    how = "calculated" if found.memory_factor == 1 else f"calculated x {found.memory_factor:.2f} as measured"
    yield f"memory of each device: {gb(needed.total)} at {data.batch_size} examples (activations {how}): {parts}"
    capacities = _capacities(plan)
    fits = [f"{estimate.largest_batch(needed, data.batch_size, size)} in {gb(size)}" for size in capacities]
    yield f"largest batch of a device, with a tenth to spare: {', '.join(fits)}"
    if len(capacities) == 1 and needed.total > capacities[0] * (1 - estimate.RESERVE):
        most = estimate.largest_batch(needed, data.batch_size, capacities[0])
        remedy = f"set --data.batch_size {most}" if most else "shard the model over more devices, or use larger ones"
        text = f"{gb(needed.total)} are needed, {gb(capacities[0])} are there and a tenth stays free (estimated)"
        is_too_much = not most or needed.total > capacities[0]
        yield Finding("failed" if is_too_much else "warning", "memory", f"{text}; {remedy}")
    stages = network.num_codebooks
    examples = data.batch_size * plan.trainer.accumulate_grad_batches
    flop = [estimate.training_flop(network, plan.num_frames, stage) for stage in range(stages)]
    seconds = examples * (flop[0] / found.first + sum(flop[1:]) / found.others) / stages
    yield f"time of a step: {_duration(seconds)} ({found.how}; without exchange between devices and waiting for data)"
    if not math.isfinite(plan.num_steps):
        return
    validations = plan.num_steps // plan.steps_between_validations + plan.config.generation.at_start
    clips = math.ceil(plan.config.generation.num_prompts / ranks)
    steps = plan.decoding.steps_per_stage(stages)
    decoding = validations * clips * estimate.decoding_flop(network, plan.num_frames, steps) / found.first
    hours = (plan.num_steps * seconds + decoding) / 3600
    text = f"run: {_duration(3600 * hours)} for {plan.num_steps:,.0f} steps"
    text += f", {_duration(decoding)} of it decoding in {validations:.0f} validations"
    if plan.devices.kind == "gpu":
        text += f"; {hours * ranks:,.0f} GPU-hours"
        if plan.config.gpu_hour_price is not None:
            text += f", {hours * ranks * plan.config.gpu_hour_price:,.0f} at {plan.config.gpu_hour_price:g} each"
    yield text


def _capacities(plan: Plan) -> list[float]:
    """Memory of a device, in bytes: what is here, or what GPUs usually have."""
    if plan.devices.kind == "gpu":
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        return [float(min(sizes))] if sizes else [24e9, 40e9, 80e9]
    return [available_memory() / plan.devices.per_node]


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that a process may still get: of the machine, or up to a limit of its cgroups if that is less.

    Args:
        root: of the file system that has /proc and /sys.
    """
    found = [float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))]
    with contextlib.suppress(OSError, KeyError):  # no Linux
        lines = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        found.append(1024.0 * int(lines["MemAvailable"].split()[0]))
    with contextlib.suppress(OSError):
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        # "0::" is of cgroups' second version; the first one's limits are not looked at.
        own = root / "sys/fs/cgroup" / next((g[3:].strip("/") for g in groups if g.startswith("0::")), "")
        files = [folder / "memory.max" for folder in (own, *own.parents)]  # a job's, or a container's, is above its own
        limits = [file.read_text().strip() for file in files if file.is_file()]
        found += [float(limit) for limit in limits if limit != "max"]
    return min(found)


def _duration(seconds: float) -> str:
    """As people read it.

    >>> [_duration(s) for s in (0.0123, 75.0, 7100.0, 9000.0, 4e6)]
    ['0.012 s', '75 s', '118 min', '2.5 h', '46 days']
    """
    for unit, size, most in (("s", 1.0, 120.0), ("min", 60.0, 7200.0), ("h", 3600.0, 3 * 86400.0)):
        if seconds < most:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.2g} {unit}"
    return f"{seconds / 86400:.0f} days"


# --- all of them --------------------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[Plan], Iterator[Finding]]] = {
    "batch": check_batch,
    "schedule": check_schedule,
    "validation": check_validation,
    "components": check_components,
    "shards": check_shards,
    "shares": check_deal,
    "start": check_start,
    "references": check_references,
    "captions": check_captions,
    "devices": check_devices,
    "packages": lambda plan: check_packages(),
    "CPU": check_host,
    "disk": check_disk,
    "W&B": check_wandb,
}
"""In the order in which they run: the first ones find out what the others ask."""


def doctor(plan: Plan | None, told: Collection[str] = ()) -> Iterator[Finding | str]:
    """Findings of every check but those in `told`, then lines of an estimate; without a plan, of what needs none."""
    for what, check in CHECKS.items():
        if what in told or (plan is None and what != "packages"):
            continue
        try:
            yield from check(plan)  # type: ignore[arg-type]
        except (UserError, OSError) as error:
            yield Finding("failed", what, str(error))
    if plan is None:
        return
    try:
        yield from estimates(plan)
    except (UserError, RuntimeError) as error:  # out of memory, for one
        yield Finding("warning", "estimate", f"cannot be measured here ({one_line(error)})")
