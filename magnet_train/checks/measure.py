"""Measurements for `bench`: time, memory of live tensors, floating-point operations.

Times are medians over alternating calls (ours, baseline, ours …), so that other load on the machine
affects both equally. Memory is the allocator's peak minus its value before the call. A large matrix
product gives the limit of the hardware.
"""

import gc
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from magnet_train.checks.cost import NUM_TEXT
from magnet_train.common import private_api
from magnet_train.common.ranges import check_values
from magnet_train.loss import masked_cross_entropy
from magnet_train.model import Magnet, MagnetConfig


@dataclass(frozen=True)
class BenchOptions:
    """Options of `bench`."""

    only: list[str] = field(default_factory=list)
    """Parts to measure: start, attention, training, decoding, loading, tokenizing, reading, gpu
    (default: all)."""
    repeats: int = 5
    """Measured calls per part."""
    threads: int = 2
    """CPU threads."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device; on a GPU only attention, training and decoding are measured."""
    num_frames: int = 1500
    """Length in frames; 1500 are 30 s at 50 Hz."""
    batch_size: int = 2
    """Examples per batch."""
    json: Path | None = None
    """Write the results to this JSON file."""

    def __post_init__(self) -> None:
        check_values(
            self,
            "--",
            repeats="[1, 10000]",
            threads="[1, 1024]",
            num_frames="[1, 100000]",
            batch_size="[1, 4096]",
        )


@dataclass(frozen=True)
class BenchmarkResult:
    """A row of the table. Times in seconds, memory in MB (10^6 bytes)."""

    name: str
    settings: dict[str, Any]
    median_s: float
    min_s: float
    max_s: float
    peak_mb: float | None = None
    flop: float | None = None
    share_of_limit: float | None = None
    """FLOP per second, relative to the matrix product."""
    baseline_median_s: float | None = None
    baseline_peak_mb: float | None = None
    ratio: float | None = None
    """Baseline's median over ours (speed-up); for rates and growth, as stated in `name`."""


def result(
    name: str,
    settings: dict[str, Any],
    seconds: list[float],
    baseline: list[float] | None = None,
    flop: float | None = None,
    limit: float | None = None,
    **more: Any,
) -> BenchmarkResult:
    """A row of the table from the seconds of each call.

    Args:
        name: what was measured.
        settings: settings of the measurement.
        seconds: seconds of our calls.
        baseline: seconds of the baseline's calls, if there is one.
        flop: floating-point operations of a call.
        limit: maximum FLOP per second of the machine.
        **more: further fields, which override calculated ones.
    """
    middle = median(seconds)
    fields: dict[str, Any] = {"flop": flop}
    if flop is not None and limit is not None:
        fields["share_of_limit"] = flop / middle / limit
    if baseline is not None:
        fields["baseline_median_s"] = median(baseline)
        fields["ratio"] = median(baseline) / middle
    return BenchmarkResult(name, settings, middle, min(seconds), max(seconds), **(fields | more))


def compare(
    name: str,
    ours: Callable[[], Any],
    baseline: Callable[[], Any],
    options: BenchOptions,
    limit: float,
    **settings: Any,
) -> BenchmarkResult:
    """A row that compares ours with the baseline: time, memory and operations."""
    seconds = timed([ours, baseline], options.repeats, options.device)
    return result(
        name,
        settings,
        *seconds,
        flop=count_flop(ours),
        limit=limit,
        peak_mb=peak_mb(ours, options.device),
        baseline_peak_mb=peak_mb(baseline, options.device),
    )


def timed(calls: list[Callable[[], Any]], repeats: int, device: str) -> list[list[float]]:
    """Seconds of `repeats` alternating calls of each function, after one warm-up call each."""
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(repeats):
        for call, spent in zip(calls, seconds, strict=True):
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            spent.append(time.perf_counter() - start)
    return seconds


def synchronize(device: str) -> None:
    """Wait until the device has finished its work."""
    if device != "cpu":
        torch.cuda.synchronize()


def peak_mb(call: Callable[[], Any], device: str) -> float:
    """Peak memory of a call's tensors in MB, minus the memory in use before."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # Otherwise the profiler reports its own start and end.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # Process memory would depend on when malloc returns pages.
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    now = peak = 0
    for change in private_api.memory_changes(profile):
        now += change
        peak = max(peak, now)
    return peak / 1e6


def count_flop(call: Callable[[], Any]) -> float:
    """Multiplications and additions in the matrix products and attention of a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False, custom_mapping=private_api.cpu_attention_flop()) as counter:
        call()
    return float(counter.get_total_flops())


def matmul_limit(device: str, dtype: torch.dtype = torch.float32) -> float:
    """FLOP per second of a large matrix product, the limit of the machine."""
    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = timed([lambda: a @ a], 5, device)[0]
    return 2 * size**3 / min(seconds)


def training_pass(
    config: MagnetConfig,
    batch_size: int,
    num_frames: int,
    num_predicted: int,
    device: str,
    half: bool,
) -> tuple[Callable[[int], None], int]:
    """A forward and backward pass of a new network at a given stage, and its parameters' bytes.

    Gradients are allocated beforehand.

    Args:
        config: the network.
        batch_size: examples.
        num_frames: frames per example.
        num_predicted: masked frames per example.
        device: cpu or cuda.
        half: compute in bfloat16, as under Lightning's bf16-mixed.
    """
    with torch.random.fork_rng(devices=[]):
        network = Magnet(config).to(device)
        codes = torch.randint(
            config.codebook_size, (batch_size, config.num_codebooks, num_frames)
        ).to(device)
        states = torch.randn(batch_size, NUM_TEXT, config.text_dim).to(device)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    allowed = torch.ones(states.shape[:2], dtype=torch.bool, device=device)
    masked = (torch.arange(num_frames) < num_predicted).expand(batch_size, -1)

    def step(stage: int) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            logits = network.masked_logits(
                codes, network.config.stage(stage), (states, allowed), masked
            )
            loss = masked_cross_entropy(logits, codes[:, stage], masked).mean()
        loss.backward()

    return step, sum(p.numel() * p.element_size() for p in network.parameters())


@contextmanager
def threads_set(number: int) -> Iterator[None]:
    """Context with this number of CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe(options: BenchOptions) -> str:
    """Machine and settings, for the head of a table."""
    if options.device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{_cpu_name()}, {options.threads} threads, torch {torch.__version__}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "CPU"


HEAD = f"{'':<42}{'median':>10}{'min … max':>20}{'peak MB':>9}{'GFLOP':>8}{'limit':>7}"
HEAD += f"{'baseline':>10}{'its MB':>9}{'ratio':>8}"


def row(found: BenchmarkResult) -> str:
    """A row of the table as text."""

    def cell(value: float | None, form: str, width: int) -> str:
        return f"{'' if value is None else format(value, form):>{width}}"

    name = found.name
    if name.startswith("attention, f"):
        name += f", context {found.settings['context']}"
    cells = [
        f"{name:<42}",
        f"{found.median_s:>9.4g}s",
        f"{f'{found.min_s:.3g} … {found.max_s:.3g}':>20}",
        cell(found.peak_mb, ".0f", 9),
        cell(None if found.flop is None else found.flop / 1e9, ".1f", 8),
        cell(found.share_of_limit, ".0%", 7),
        cell(found.baseline_median_s, ".4g", 9),
        " " if found.baseline_median_s is None else "s",
        cell(found.baseline_peak_mb, ".0f", 9),
        cell(found.ratio, ".2f", 8),
    ]
    return "".join(cells)
