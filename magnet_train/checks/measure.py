"""How things are measured for `bench`: seconds in turns with a twin, live tensors, floating-point operations.

Times are medians over calls that take turns (ours, twin, ours …), so that a machine that others use slows both alike.
Memory is the most that tensors take at once beyond what was there before, as the allocator counts it. The hardware's
limit is measured too: a large matrix product.
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
from typing import Any

import torch

from magnet_train.common import private_api
from magnet_train.loss import masked_cross_entropy
from magnet_train.model import Magnet, MagnetConfig


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, and how often."""

    only: list[str] = field(default_factory=list)
    """Parts to measure: start, attention, training, decoding, loading, tokenizing, reading, and gpu on one; all if none
    is given."""
    repeats: int = 5
    """Counted calls of each."""
    threads: int = 2
    """CPU threads."""
    device: str = "cpu"
    """cpu or cuda; a GPU measures attention, training and decoding."""
    num_frames: int = 1500
    """Length, in frames: 1500 are 30 s at 50 Hz."""
    batch_size: int = 2
    """Examples in a batch."""
    json: Path | None = None
    """File for the results, a list of objects."""


@dataclass(frozen=True)
class Measured:
    """One line of the table. Times in seconds, memory in MB (10^6 bytes)."""

    name: str
    settings: dict[str, Any]
    median_s: float
    min_s: float
    max_s: float
    peak_mb: float | None = None
    flop: float | None = None
    share_of_limit: float | None = None
    """FLOP per second over those of the matrix product."""
    twin_median_s: float | None = None
    twin_peak_mb: float | None = None
    ratio: float | None = None
    """The twin's median over ours: how many times faster; for rates and growth, what `name` says."""


def timed(calls: list[Callable[[], Any]], repeats: int, device: str) -> list[list[float]]:
    """Seconds of each call, `repeats` of each, in turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(repeats):
        for call, own in zip(calls, seconds, strict=True):
            settle(device)
            start = time.perf_counter()
            call()
            settle(device)
            own.append(time.perf_counter() - start)
    return seconds


def settle(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize()


def peak_mb(call: Callable[[], Any], device: str) -> float:
    """Most memory that the tensors of a call take at once, in MB, beyond what was there before."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler tells of its own beginning and end
    # The process's own memory would tell more about malloc, which keeps and gives back pages as it likes.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = peak = 0
    for change in private_api.memory_changes(profile):
        now += change
        peak = max(peak, now)
    return peak / 1e6


def count_flop(call: Callable[[], Any]) -> float:
    """Multiplications and additions in matrix products and attention of a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False, custom_mapping=private_api.cpu_attention_flop()) as counter:
        call()
    return float(counter.get_total_flops())


def training_pass(
    config: MagnetConfig, batch_size: int, num_frames: int, num_predicted: int, num_text: int, device: str, half: bool
) -> tuple[Callable[[int], None], int]:
    """A forward and backward pass of a fresh network at a given stage, and the bytes of its parameters.

    The gradients' memory is there beforehand.

    Args:
        config: of the network.
        batch_size: examples.
        num_frames: of an example.
        num_predicted: frames of an example that are masked.
        num_text: tokens of each caption.
        device: cpu or cuda.
        half: whether it computes in bfloat16, as under Lightning's bf16-mixed.
    """
    with torch.random.fork_rng(devices=[]):
        network = Magnet(config).to(device)
        codes = torch.randint(config.codebook_size, (batch_size, config.num_codebooks, num_frames)).to(device)
        states = torch.randn(batch_size, num_text, config.text_dim).to(device)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    allowed = torch.ones(states.shape[:2], dtype=torch.bool, device=device)
    masked = (torch.arange(num_frames, device=device) < num_predicted).expand(batch_size, -1)

    def step(stage: int) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            features = network.trunk(codes, stage, network.encode_text(states, allowed))
            loss = masked_cross_entropy(network.logits(features[masked], stage), codes[:, stage], masked).mean()
        loss.backward()

    return step, sum(p.numel() * p.element_size() for p in network.parameters())


def compare(
    name: str,
    ours: Callable[[], Any],
    twin: Callable[[], Any] | None,
    options: BenchOptions,
    limit: float,
    **settings: Any,
) -> Measured:
    """One line: ours beside the twin."""
    calls = [ours] if twin is None else [ours, twin]
    seconds = timed(calls, options.repeats, options.device)
    own, flop = seconds[0], count_flop(ours)
    return Measured(
        name, settings, median(own), min(own), max(own), peak_mb(ours, options.device), flop,
        flop / median(own) / limit,
        None if twin is None else median(seconds[1]),
        None if twin is None else peak_mb(twin, options.device),
        None if twin is None else median(seconds[1]) / median(own),
    )  # fmt: skip


def matmul_limit(device: str, dtype: torch.dtype = torch.float32) -> float:
    """FLOP per second of a large matrix product: what the machine can do at best."""
    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = timed([lambda: a @ a], 5, device)[0]
    return 2 * size**3 / min(seconds)


@contextmanager
def threads_set(number: int) -> Iterator[None]:
    """So many CPU threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe(options: BenchOptions) -> str:
    """The machine and the settings, for the head of a table."""
    if options.device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = "CPU"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or model
    return f"{model}, {options.threads} threads, torch {torch.__version__}"


HEAD = f"{'':<42}{'median':>10}{'min … max':>20}{'peak MB':>9}{'GFLOP':>8}{'limit':>7}"
HEAD += f"{'twin':>10}{'twin MB':>9}{'ratio':>8}"


def row(m: Measured) -> str:
    """One line of the table."""

    def cell(value: float | None, form: str, width: int) -> str:
        return f"{'' if value is None else format(value, form):>{width}}"

    name = m.name + (f", context {m.settings['context']}" if m.name.startswith("attention, f") else "")
    return (
        f"{name:<42}{m.median_s:>9.4g}s{f'{m.min_s:.3g} … {m.max_s:.3g}':>20}{cell(m.peak_mb, '.0f', 9)}"
        f"{cell(None if m.flop is None else m.flop / 1e9, '.1f', 8)}{cell(m.share_of_limit, '.0%', 7)}"
        f"{cell(m.twin_median_s, '.4g', 9)}{' ' if m.twin_median_s is None else 's'}{cell(m.twin_peak_mb, '.0f', 9)}"
        f"{cell(m.ratio, '.2f', 8)}"
    )
