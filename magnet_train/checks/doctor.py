"""`doctor`: checks whether `fit` would start and keep running, and estimates its cost.

A check is a function of a `Plan` that yields findings. A UserError in a check becomes a finding
too, so that the other checks still run. `doctor` does not train, writes only a temporary file, and
downloads only with `--prefetch`.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from magnet_train.callbacks.generation import how_to_give_reference
from magnet_train.callbacks.resume import check_data
from magnet_train.checks import cost
from magnet_train.checks.estimate import checkpoint_bytes, estimate_run, gigabytes
from magnet_train.checks.plan import (
    LOGGER_FOLDER,
    Plan,
    check_accelerator,
    logger_folders,
    none_if_missing,
    settings_errors,
)
from magnet_train.codec.base import load_codec_facts
from magnet_train.common.downloads import (
    CLAP_MUSIC,
    PASST_10S,
    PASST_20S,
    VGGISH,
    Weights,
    cached,
    find_weights,
)
from magnet_train.common.errors import UserError
from magnet_train.common.pretrained import one_line
from magnet_train.common.redact import redact
from magnet_train.common.torchaudio_import import import_torchaudio
from magnet_train.conditioning import load_text_encoder
from magnet_train.data.datamodule import check_shards_per_worker
from magnet_train.data.shards import Item, ShardSet
from magnet_train.decoding.autoregressive import check_decoding
from magnet_train.decoding.load_rescorer import check_rescorer
from magnet_train.metrics.embedders import load_embedder
from magnet_train.metrics.scoring import REFERENCE_METRICS, parse_metric
from magnet_train.release import SavedModel, initial_weights
from magnet_train.resume import check_named_checkpoint, check_same_model
from magnet_train.tracking.wandb_session import (
    LOGIN_HINT,
    check_wandb_environment,
    check_wandb_login,
    wandb_loggers,
)

WEIGHTS: dict[str, Weights] = {
    "vggish": VGGISH,
    "torchvggish": VGGISH,
    "passt": PASST_20S,
    "passt-10s": PASST_10S,
    "clap": CLAP_MUSIC,
}
"""Weight file of each embedder that is not bundled."""
SAMPLED_SHARDS = 5
"""Shards read per split: first, last, and others at random."""
SAMPLING_S = 10.0
"""Seconds after which no more shards are read."""
GPU_BUSY_SHARE = 0.1
"""Share of a GPU's memory that other processes may use."""
MIN_SHM = 1e9
"""Bytes of /dev/shm that NCCL's manual recommends for containers."""
MIN_FILES = 1024
"""Limit of open files per process."""
MIN_INODES = 1000
"""Free inodes of the file system."""


@dataclass(frozen=True)
class Finding:
    """Result of a check."""

    status: Literal["ok", "warning", "missing", "failed"]
    """A run would start with warnings, but not if anything is missing or failed."""
    what: str
    detail: str
    """Numbers or a path, and the remedy if something is wrong."""

    def __str__(self) -> str:
        return redact(f"{self.status:<8} {self.what}: {self.detail}")


def warn_if(is_bad: bool, what: str, detail: str) -> Finding:
    return Finding("warning" if is_bad else "ok", what, detail)


# --- configuration --------------------------------------------------------------------------------


def check_options(plan: Plan) -> Iterator[Finding]:
    """Everything that `fit` checks before it starts, except for devices."""
    errors = settings_errors(plan.config, without=check_accelerator)
    yield from (Finding("failed", "settings", str(error)) for error in errors)
    if not errors:
        yield Finding("ok", "settings", "valid")


def check_batch(plan: Plan) -> Iterator[Finding]:
    batch_size, accumulated = plan.batch
    ranks = plan.devices.ranks
    text = f"{ranks} devices x {batch_size} examples x {accumulated} accumulated batches"
    yield Finding("ok", "batch", f"{text} = {ranks * batch_size * accumulated} per step")


def check_schedule(plan: Plan) -> Iterator[Finding]:
    """Optimizer, learning rate, and number of steps."""
    optimizer = plan.optimizer
    text = f"{optimizer.name}, {optimizer.schedule}"
    if math.isfinite(plan.num_steps):
        warmup_steps = optimizer.warmup_within(plan.num_steps)
        yield Finding(
            "ok",
            "schedule",
            f"{text} after {warmup_steps} steps of warm-up, {plan.num_steps:,.0f} steps",
        )
    else:
        text += "; the run has no end: give --trainer.max_steps or max_time"
        yield warn_if(plan.config.trainer.max_time is None, "schedule", text)


def check_validation(plan: Plan) -> Iterator[Finding]:
    trainer = plan.config.trainer
    prompts = f"{plan.config.generation.num_prompts} prompts"
    if trainer.limit_val_batches == 0:
        yield Finding(
            "warning", "validation", "this run does not validate: trainer.limit_val_batches=0"
        )
    elif trainer.fast_dev_run:
        yield Finding("ok", "validation", f"once, at the end, {prompts}")
    else:
        every = f"every {trainer.val_check_interval:,.0f} steps and at the end"
        yield Finding("ok", "validation", f"{every}, {prompts}")
    if isinstance(trainer.limit_val_batches, int) and trainer.limit_val_batches:
        num_items = sum(plan.shards("validation").counts)
        num_seen = trainer.limit_val_batches * plan.batch[0] * plan.devices.ranks
        if num_seen < num_items:
            limit = f"trainer.limit_val_batches={trainer.limit_val_batches}"
            text = f"sees {num_seen} of {num_items} items: {limit}"
            yield Finding("warning", "validation", text)
    check_decoding(plan.network, plan.decoding, plan.config.model.crop_s)
    if plan.decoding.rescorer is not None:
        codec = {} if plan.codec is None else plan.codec.to_dict()
        check_rescorer(plan.decoding.rescorer, codec)
        yield Finding("ok", "rescorer", f"{plan.decoding.rescorer}: reads the same codes")


def check_start(plan: Plan) -> Iterator[Finding]:
    """Initial weights: a checkpoint of the run, other weights, or random ones."""
    config = plan.config
    if plan.checkpoint is not None:
        checkpoint = check_named_checkpoint(Path(plan.checkpoint).expanduser(), is_fit=True)
        current = {"network": asdict(plan.network), "optimizer": {"name": plan.optimizer.name}}
        check_same_model(checkpoint["hyper_parameters"], current)
        if "run" in checkpoint:
            check_data(plan.shards("train"), checkpoint["run"], plan.text_encoder)
        yield Finding(
            "ok", "start", f"resumes after step {checkpoint['global_step']} of {plan.checkpoint}"
        )
    elif config.model.init_from is not None:
        start = SavedModel.open(config.model.init_from)
        initial_weights(start, plan.network, plan.codec)
        yield Finding("ok", "start", f"weights of {start.file}: shapes match")
    else:
        yield Finding(
            "ok", "start", "random weights" + (", no checkpoint yet" if plan.ckpt_path else "")
        )


# --- weights and data -----------------------------------------------------------------------------


def check_components(plan: Plan) -> Iterator[Finding]:
    """Load codec, text encoder and metric networks from local files."""
    config = plan.config
    metrics = config.generation.metrics if config.generation.num_prompts else []
    embedders = dict.fromkeys(parse_metric(metric)[1] for metric in metrics)
    loads: dict[str, Callable[[], str]] = {
        f"codec {config.model.codec}": lambda: load_codec_facts(config.model.codec).hash,
        f"text encoder {config.model.text_encoder}": lambda: (
            load_text_encoder(config.model.text_encoder).id
        ),
    }
    loads |= {
        f"metrics of {name}": lambda name=name: _embedder(name, config.prefetch)
        for name in embedders
    }
    optional = {f"metrics of {name}" for name in embedders if not plan.monitors(name)}
    for what, load in loads.items():
        try:
            yield Finding("ok", what, load())
        except UserError as error:
            text = str(error)
            if not config.prefetch and "--prefetch" not in text:
                text += "; or fetch it with doctor --prefetch"
            if what in optional:
                yield Finding("warning", what, f"{text}; without it these metrics are skipped")
            else:
                yield Finding("missing", what, text)


def _embedder(name: str, prefetch: bool) -> str:
    """Path of an embedder's weights, with hash and licence."""
    weights = WEIGHTS.get(name)
    if weights is None:
        return f"ships ({load_embedder(name).hash})"
    if not prefetch and cached(weights) is None:
        size = f"{weights.size / 1e6:,.0f} MB, licence {weights.licence}"
        raise UserError(f"not in the cache; doctor --prefetch downloads {weights.url} ({size})")
    file = find_weights(weights)
    if name == "clap":  # its tokenizer is on the hub
        load_embedder(name)
    return f"{file.path} ({file.hash}, licence {weights.licence})"


def check_shards(plan: Plan) -> Iterator[Finding]:
    """Index and codec of each split, and the checksums of a sample of its shards."""
    validates = plan.config.trainer.limit_val_batches != 0
    for split, needed in (("train", True), ("validation", validates), ("test", False)):
        what = f"{split} shards"
        if plan.data.folders[split] is None and not needed:
            yield Finding("ok", what, "none given and none needed")
            continue
        try:
            yield _check_split(plan, split)
        except (UserError, OSError) as error:
            # `fit` does not open the test split
            yield Finding("warning" if split == "test" else "failed", what, str(error))


def _check_split(plan: Plan, split: str) -> Finding:
    found = plan.shards(split)
    items, num_read = _sample(found)
    plan.samples[split] = items
    text = (
        f"{sum(found.counts):,} items in {len(found.counts):,} shards of {plan.data.folders[split]}"
    )
    text += f", codec {found.index['codec']['id']}"
    if not items:
        return Finding(
            "failed", f"{split} shards", f"{text}: no item in {num_read} shards; run tokenize again"
        )
    frames = sorted(item["codes"].shape[1] for item in items)
    text += f"; {num_read} read in full: {len(items)} items of {frames[0]} to {frames[-1]} frames"
    short = sum(n < plan.num_frames for n in frames) / len(frames)
    if short:
        text += (
            f", {short:.0%} of them shorter than an example ({plan.num_frames} frames) and padded"
        )
    if short > 0.5:
        crop_s = f"{plan.config.model.crop_s:g}"
        text += f"; tokenize with --crop_s {crop_s} or more, or set --model.crop_s lower"
    return warn_if(short > 0.5, f"{split} shards", text)


def _sample(found: ShardSet) -> tuple[list[Item], int]:
    """Items of the first, the last and some random shards, and the number of these shards."""
    count = len(found.counts)
    others = random.Random(0).sample(
        range(1, max(1, count - 1)), max(0, min(SAMPLED_SHARDS, count) - 2)
    )
    numbers = list(dict.fromkeys([0, count - 1, *others]))
    start = time.monotonic()
    items: list[Item] = []
    for done, number in enumerate(numbers):
        if time.monotonic() - start > SAMPLING_S:
            return items, done
        items += found.read(number, with_references=True)
    return items, len(numbers)


def check_workers(plan: Plan) -> Iterator[Finding]:
    """Whether every data worker of every rank gets a shard."""
    found = none_if_missing(lambda: plan.shards("train"))
    if found is None:  # reported by the check of shards
        return
    ranks = plan.devices.ranks
    given = plan.data.num_workers
    workers = min(2, len(found.counts) // ranks) if given is None else given
    check_shards_per_worker(found, ranks, workers)
    readers = ranks * max(1, workers)
    text = f"{len(found.counts):,} shards for {ranks} ranks x {max(1, workers)} readers"
    if len(found.counts) % readers:
        text += "; unequal shares average out over epochs"
    yield Finding("ok", "shards per worker", f"{text}, {len(found.counts) / readers:.3g} each")


def check_references(plan: Plan) -> Iterator[Finding]:
    """Reference statistics of the metrics."""
    generation = plan.config.generation
    if not generation.num_prompts or "validation" not in plan.samples:
        return
    needing: dict[str, list[str]] = {}
    for metric in generation.metrics:
        kind, embedder = parse_metric(metric)
        if kind in REFERENCE_METRICS:
            needing.setdefault(embedder, []).append(metric)
    for embedder, metrics in needing.items():
        yield _check_reference(plan, embedder, metrics)


def _check_reference(plan: Plan, name: str, metrics: list[str]) -> Finding:
    what = f"references of {name}"
    names = ", ".join(metrics)
    folder = plan.config.generation.reference
    if name == "musicnn" and any(item["reference"] for item in plan.samples["validation"]):
        return Finding("ok", what, f"in the validation shards, for {names}")
    file = None if folder is None else Path(folder).expanduser() / f"{name}.safetensors"
    if file is not None and file.is_file():
        return Finding("ok", what, f"{file}, for {names}")
    if name == "music" and plan.config.generation.baselines:
        return Finding("ok", what, f"the codec's reconstructions of validation clips, for {names}")
    if file is None:
        remedy = how_to_give_reference(name)
        monitor = str(plan.config.checkpoint.monitor)
        is_monitored = any(monitor.startswith(f"val/{metric}") for metric in metrics)
        return Finding(
            "failed" if is_monitored else "warning", what, f"none, so no {names}; {remedy}"
        )
    remedy = f"write it with evaluate --save_reference, or remove {names} from --generation.metrics"
    return Finding("failed", what, f"{file}: no such file; {remedy}")


def check_captions(plan: Plan) -> Iterator[Finding]:
    """Captions of the items that were read."""
    for split in ("train", "validation"):
        if items := plan.samples.get(split):
            yield _check_split_captions(plan, split, items)


def _check_split_captions(plan: Plan, split: str, items: list[Item]) -> Finding:
    captions = [str(item["info"].get("caption") or "").strip() for item in items]
    filled = [caption for caption in captions if caption]
    empty = 1 - len(filled) / len(captions)
    repeated = 1 - len(set(filled)) / max(1, len(filled))
    text = f"{len(captions)} read: {empty:.0%} empty, {repeated:.0%} repeat another"
    problems = []
    if empty:
        problems.append(
            "empty captions do not train the text condition: add them and tokenize again"
        )
    if repeated > 0.5:
        problems.append("captions vary little: caption each file individually")
    if plan.text_encoder is not None and filled:
        limit = plan.text_encoder.max_length
        lengths = sorted(plan.text_encoder.num_tokens(filled))
        text += f", {lengths[len(lengths) // 2]} tokens in the median and {lengths[-1]} at most"
        if cut := sum(n > limit for n in lengths):
            problems.append(
                f"{cut / len(captions):.0%} are cut after {limit} tokens: put important words first"
            )
    return warn_if(bool(problems), f"{split} captions", "; ".join([text, *problems]))


# --- machine --------------------------------------------------------------------------------------


def check_devices(plan: Plan) -> Iterator[Finding]:
    devices = plan.devices
    precision = str(plan.config.trainer.precision or "32-true")
    check_accelerator(plan.config)
    if devices.kind == "gpu":
        yield from _gpus(devices.per_node, devices.nodes, precision)
    elif devices.kind == "cpu":
        if precision == "16-mixed":
            yield Finding(
                "warning",
                "precision",
                "16-mixed is not available on a CPU, Lightning uses bf16-mixed",
            )
        yield Finding("ok", "devices", f"{devices.ranks} on the CPU, precision {precision}")
    else:
        yield Finding("warning", "devices", f"{devices.kind}: its memory is not checked")


def _gpus(per_node: int, nodes: int, precision: str) -> Iterator[Finding]:
    if per_node * nodes > 1 and not torch.distributed.is_nccl_available():
        raise UserError(
            f"{per_node * nodes} GPUs requested, but torch {torch.__version__} is built without "
            "NCCL, by which they communicate; install the build for your CUDA version, or set "
            "--trainer.devices 1"
        )
    properties = [torch.cuda.get_device_properties(i) for i in range(per_node)]
    names = sorted({f"{p.name} with {p.total_memory / 1e9:.0f} GB" for p in properties})
    where = f" on each of {nodes} nodes, of which this one was checked" if nodes > 1 else ""
    yield Finding(
        "ok", "devices", f"{per_node} GPUs{where}: {', '.join(names)}, precision {precision}"
    )
    used = [1 - free / total for free, total in map(torch.cuda.mem_get_info, range(per_node))]
    if max(used) > GPU_BUSY_SHARE:
        text = f"{max(used):.0%} of GPU memory is already in use by other processes"
        yield Finding("warning", "devices", text)
    if precision.startswith("bf16") and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"trainer.precision={precision}: {properties[0].name} has no bfloat16; set "
            "--trainer.precision 16-mixed"
        )


def check_packages(plan: Plan | None = None) -> Iterator[Finding]:
    """Versions of installed packages, compared with the requirements of this one."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, _requirements()):
        if requirement.marker is None:
            yield from _requirement(requirement)
    versions = {
        name: importlib.metadata.version(name)
        for name in ("torch", "lightning", "transformers", "wandb")
    }
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    if torch.backends.cuda.is_built():
        text += f", CUDA {torch.version.cuda}, NCCL {_nccl_version()}"
    yield Finding("ok", "packages", text)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        other = importlib.metadata.version("pytorch-lightning")
        if other != versions["lightning"]:
            both = f"lightning {versions['lightning']} and pytorch-lightning {other}"
            text = f"{both}: install one version of both"
            yield Finding("warning", "packages", text)
    yield from _torchaudio()


def _requirement(requirement: Any) -> Iterator[Finding]:
    name = requirement.name
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        yield Finding("failed", "packages", f"{name} is missing: pip install '{requirement}'")
        return
    if not requirement.specifier.contains(version, prereleases=True):
        text = f"{name} {version} is installed, {requirement.specifier} is needed"
        yield Finding("failed", "packages", f"{text}: pip install '{name}{requirement.specifier}'")


def _nccl_version() -> str:
    from torch.cuda import nccl

    return (
        ".".join(map(str, nccl.version())) if torch.distributed.is_nccl_available() else "missing"
    )


def _torchaudio() -> Iterator[Finding]:
    try:
        audio = import_torchaudio()
    except ModuleNotFoundError:
        return  # it is optional
    if audio.__version__.split("+")[0] < "2.11":  # since which one build serves all later torch
        text = f"{audio.__version__} is older than 2.11 and made for one torch only: "
        yield Finding("warning", "torchaudio", f"{text}pip install 'torchaudio>=2.11,<2.12'")


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("magnet-train") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return []


def check_host(plan: Plan) -> Iterator[Finding]:
    """CPU cores, shared memory, open files."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    ranks = plan.devices.per_node
    given = plan.data.num_workers
    workers = (2 if given is None else given) * ranks
    computes = plan.devices.kind == "cpu"  # otherwise a rank mostly waits for its GPU
    busy = workers + ranks if computes else max(workers, ranks)
    text = f"{cores} cores for {ranks} ranks and {workers} data workers"
    if busy > max(cores, 2):
        fits = max(0, cores // ranks - computes)
        text += f": request more cores (--cpus-per-task), or set --data.num_workers {fits}"
    yield warn_if(busy > max(cores, 2), "CPU", text)
    shm = Path("/dev/shm")
    if shm.is_dir() and ranks > 1:
        free = shutil.disk_usage(shm).free
        text = f"{free / 1e9:.1f} GB of shared memory free in {shm}"
        if free < MIN_SHM:
            text += "; NCCL needs it: start the container with --shm-size 8g"
        yield warn_if(free < MIN_SHM, "shared memory", text)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    is_few = 0 <= files < MIN_FILES
    more = f"; raise it with ulimit -n {4 * MIN_FILES}" if is_few else ""
    yield warn_if(is_few, "open files", f"{files} per process{more}")


def check_disk(plan: Plan) -> Iterator[Finding]:
    """Whether the run folder is writable and has space for the checkpoints."""
    options = {"--trainer.default_root_dir": plan.run_folder}
    options["--checkpoint.dirpath"] = plan.checkpoint_folder
    loggers = [(LOGGER_FOLDER, folder) for folder in logger_folders(plan.config)]
    for option, folder in [*options.items(), *loggers]:
        try:
            with tempfile.NamedTemporaryFile(
                dir=_existing(folder), prefix=".magnet_train_doctor_"
            ) as probe:
                probe.write(bytes(4096))
                probe.flush()
        except OSError as error:
            raise UserError(
                f"{folder}: not writable ({error.strerror}); set {option} to another folder"
            ) from error
    disk = _existing(plan.checkpoint_folder)
    size = checkpoint_bytes(plan)
    kept = _kept_checkpoints(plan)
    free = shutil.disk_usage(disk).free
    text = f"{kept:.0f} checkpoints of {gigabytes(size)} in {plan.checkpoint_folder}"
    text += ", one of them being written"
    # A resumed run replaces its checkpoints; those of an earlier run are moved and kept.
    present = (
        sum(file.stat().st_size for file in plan.checkpoint_folder.glob("*.ckpt"))
        if plan.checkpoint
        else 0
    )
    if present:
        text += f"; {gigabytes(present)} of them exist"
    if free < max(size, kept * size - present):
        raise UserError(
            f"{gigabytes(free)} free for {text}: free some space, keep fewer with "
            "--checkpoint.save_top_k, or set --trainer.default_root_dir to another disk"
        )
    inodes = os.statvfs(disk)
    if inodes.f_files > 0 and inodes.f_favail < MIN_INODES:
        raise UserError(
            f"{disk}: only {inodes.f_favail} inodes left; remove files that you do not need"
        )
    yield Finding("ok", "disk", f"{gigabytes(free)} free for {text}")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _kept_checkpoints(plan: Plan) -> float:
    """Number of checkpoints on disk: the best, the last, and one being written."""
    given = plan.config.checkpoint
    best = given.save_top_k
    if best == -1:  # all
        every = given.every_n_train_steps or plan.steps_between_validations
        best = plan.num_steps // every if math.isfinite(plan.num_steps / every) else 1
    return best + 2


def check_wandb(plan: Plan) -> Iterator[Finding]:
    """W&B's mode and API key, which the server verifies."""
    ours = wandb_loggers(plan.config.trainer.logger)
    if not ours or plan.config.trainer.fast_dev_run:
        yield Finding("ok", "W&B", "not a logger of this run")
        return
    later = f"wandb sync {plan.run_folder / 'wandb'} uploads it later"
    try:
        check_wandb_environment()
    except UserError as error:
        yield Finding("failed", "W&B", str(error))
        return
    if all(args.get("offline") for args in ours):
        yield Finding("ok", "W&B", f"offline: {later}")
        return
    with contextlib.redirect_stderr(io.StringIO()):  # it reports its own login
        state, text = check_wandb_login()
    resumes = plan.ckpt_path is not None and (plan.run_folder / "wandb_run_id").is_file()
    yield _login_finding(state, text, resumes, later)


def _login_finding(state: str, text: str, resumes: bool, later: str) -> Finding:
    """What the state of `check_wandb_login` means for the run."""
    if state == "online":
        return Finding("ok", "W&B", f"online at {text}, which accepts the key")
    if state == "off" and text in ("offline", "dryrun"):
        return Finding("ok", "W&B", f"offline: {later}")
    if state == "off":
        return Finding("warning", "W&B", f"{text} by its settings: nothing will be logged")
    if state == "refused" and not resumes:
        return Finding("failed", "W&B", f"{text}; {LOGIN_HINT}")
    return Finding("warning", "W&B", f"{text}: the run will be logged offline; {later}")


def check_memory(plan: Plan) -> Iterator[Finding | str]:
    """Estimated memory, time and cost; a finding if the devices are too small."""
    try:
        found = estimate_run(plan)
    except RuntimeError as error:  # e.g. out of memory
        yield Finding("warning", "estimate", f"cannot be measured here ({one_line(error)})")
        return
    yield from found.lines
    room = found.capacity_bytes
    if room is None or found.needed_bytes <= room * (1 - cost.RESERVE):
        return
    remedy = "shard the model over more devices, or use larger ones"
    if found.max_batch_size:
        remedy = f"set --data.batch_size {found.max_batch_size}"
    text = f"{gigabytes(found.needed_bytes)} needed, {gigabytes(room)} available"
    text += " less a reserve of 10 % (estimated)"
    is_too_much = not found.max_batch_size or found.needed_bytes > room
    yield Finding("failed" if is_too_much else "warning", "memory", f"{text}; {remedy}")


# --- all of them ----------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[Plan], Iterator[Finding | str]]] = {
    "settings": check_options,
    "batch": check_batch,
    "schedule": check_schedule,
    "validation": check_validation,
    "components": check_components,
    "shards": check_shards,
    "shards per worker": check_workers,
    "start": check_start,
    "references": check_references,
    "captions": check_captions,
    "devices": check_devices,
    "packages": check_packages,
    "CPU": check_host,
    "disk": check_disk,
    "W&B": check_wandb,
    "estimate": check_memory,
}
"""In execution order: references and captions use the items read by the check of shards."""


def doctor(plan: Plan | None, already_reported: Collection[str] = ()) -> Iterator[Finding | str]:
    """Findings of all checks that are not yet reported, then lines of an estimate.

    Args:
        plan: None if the options could not be parsed; then only the packages are checked.
        already_reported: Names of checks.
    """
    if plan is None:
        yield from check_packages()
        return
    is_valid = not settings_errors(plan.config, without=check_accelerator)
    for what, check in CHECKS.items():
        if what in already_reported:
            continue
        try:
            yield from check(plan)
        except (UserError, OSError) as error:
            yield Finding("failed", what, str(error))
        except Exception:  # of any type: the check computes with refused settings
            if is_valid:
                raise
            yield Finding("failed", what, "cannot be checked before the settings are valid")
