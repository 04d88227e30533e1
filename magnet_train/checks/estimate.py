"""Estimates memory, time and cost of a run."""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from magnet_train.checks import cost
from magnet_train.checks.measure import matmul_limit, peak_mb, timed, training_pass
from magnet_train.common.progress import count

if TYPE_CHECKING:
    from magnet_train.checks.plan import Plan

MEASURED_LAYERS = 2
"""Blocks of the network used to measure speed and memory."""
MAX_PASS_S = 3.0
"""Maximum number of seconds of a pass through them; slower ones are not measured."""
ASSUMED_GPU = "A100"
ASSUMED_SHARE = 0.35
"""Assumed share of a GPU's peak if no GPU can be measured."""
ASSUMED_CPU_FLOP = 2e10
"""Assumed FLOP per second of a CPU core."""


@dataclass(frozen=True)
class Speed:
    """FLOP per second on one device, and the source of the number."""

    first: float
    """FLOP per second in stage 0."""
    others: float
    """FLOP per second in the later stages."""
    memory_factor: float
    """Measured over calculated activation memory; 1 if not measured."""
    source: str


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a run."""

    lines: tuple[str, ...]
    needed_bytes: float
    """Needed memory of each device."""
    capacity_bytes: float | None
    """Memory of each device; None if this machine has no such device."""
    max_batch_size: int
    """Examples that fit on a device, with headroom; 0 = none."""


def measure_speed(plan: "Plan") -> Speed:
    """Measure a few blocks of the configured width if that takes seconds; otherwise assume."""
    network = plan.network
    precision = plan.config.trainer.precision
    half = cost.bytes_of(precision)[1] < cost.FULL
    device = "cuda" if plan.devices.kind == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        peak = 1e12 * cost.PEAK_TFLOP[ASSUMED_GPU]
        rate = ASSUMED_SHARE * peak
        gpu = f"{peak / 1e12:.0f} TFLOP/s ({ASSUMED_GPU})"
        source = f"calculated for a GPU of {gpu} used at {ASSUMED_SHARE:.0%}"
        return Speed(rate, rate, 1.0, source)
    few = replace(network, num_layers=min(network.num_layers, MEASURED_LAYERS))
    batch_size = 1 if device == "cpu" else min(plan.batch[0], 4)
    flop = [batch_size * cost.training_flop(few, plan.num_frames, stage) for stage in (0, 1)]
    if device == "cpu" and flop[0] / ASSUMED_CPU_FLOP > MAX_PASS_S:
        rate = matmul_limit("cpu") / 2
        return Speed(
            rate, rate, 1.0, "calculated at half the speed of a matrix product on this CPU"
        )
    num_predicted = round(cost.MEAN_MASK_RATE * plan.num_frames)
    step, weights = training_pass(few, batch_size, plan.num_frames, num_predicted, device, half)
    other = min(1, network.num_codebooks - 1)
    seconds = timed([lambda: step(0), lambda: step(other)], 2, device)
    peak_bytes = peak_mb(lambda: step(0), device) * 1e6
    if half:  # excluding autocast's copies of the weights
        peak_bytes -= weights / 2
    factor = peak_bytes / cost.activation_bytes(few, batch_size, plan.num_frames, precision)
    source = f"measured here on {few.num_layers} of {network.num_layers} blocks"
    return Speed(flop[0] / min(seconds[0]), flop[other] / min(seconds[1]), max(0.5, factor), source)


def estimate_run(plan: "Plan") -> Estimate:
    """Memory of a device, time of a step, and time and cost of the run."""
    speed = measure_speed(plan)
    needed = _memory(plan, speed)
    capacities = _capacities(plan)
    batch_size = plan.batch[0]
    parts = ", ".join(
        f"{name} {gigabytes(value)}" for name, value in needed.in_training.items() if value
    )
    if needed.validation:
        parts += f"; in a validation, with unsharded weights, {gigabytes(needed.validation)}"
    how = (
        "calculated"
        if speed.memory_factor == 1
        else f"calculated x {speed.memory_factor:.2f} as measured"
    )
    fits = [
        f"{cost.largest_batch(needed, batch_size, size)} in {gigabytes(size)}"
        for size in capacities
    ]
    lines = [
        f"model: {cost.num_parameters(plan.network) / 1e6:,.1f} M parameters, "
        f"{gigabytes(checkpoint_bytes(plan))} per checkpoint",
        f"memory per device: {gigabytes(needed.total)} at {batch_size} examples (activations "
        f"{how}): {parts}",
        f"largest batch per device, with 10 % headroom: {', '.join(fits)}",
        *_time_lines(plan, speed),
    ]
    capacity = capacities[0] if len(capacities) == 1 else None
    max_batch_size = cost.largest_batch(needed, batch_size, capacities[0])
    return Estimate(tuple(lines), needed.total, capacity, max_batch_size)


def _memory(plan: "Plan", speed: Speed) -> cost.Memory:
    encoder = plan.text_encoder
    precision = plan.config.trainer.precision
    activations = cost.activation_bytes(plan.network, plan.batch[0], plan.num_frames, precision)
    return cost.memory(
        plan.network,
        precision,
        plan.optimizer.name,
        speed.memory_factor * activations,
        plan.devices.ranks,
        plan.is_sharded,
        frozen=0.0 if encoder is None else sum(p.numel() * 4.0 for p in encoder.parameters()),
    )


def _time_lines(plan: "Plan", speed: Speed) -> Iterator[str]:
    stages = plan.network.num_codebooks
    batch_size, accumulated = plan.batch
    flop = [cost.training_flop(plan.network, plan.num_frames, stage) for stage in range(stages)]
    step_s = (
        batch_size * accumulated * (flop[0] / speed.first + sum(flop[1:]) / speed.others) / stages
    )
    without = "without communication and waiting for data"
    yield f"time per step: {duration(step_s)} ({speed.source}; {without})"
    if math.isinf(plan.num_steps):
        return
    ranks = plan.devices.ranks
    clips = math.ceil(plan.config.generation.num_prompts / ranks)
    clip_flop = cost.decoding_flop(
        plan.network, plan.num_frames, plan.decoding.per_stage("decoding_steps", stages)
    )
    decoding_s = plan.num_validations * clips * clip_flop / speed.first
    run_s = plan.num_steps * step_s + decoding_s
    text = f"run: {duration(run_s)} for {plan.num_steps:,.0f} steps"
    validations = count(plan.num_validations, "validation")
    text += f", of which {duration(decoding_s)} decoding in {validations}"
    if plan.devices.kind == "gpu":
        gpu_hours = run_s / 3600 * ranks
        text += f"; {gpu_hours:,.0f} GPU-hours"
        if plan.config.gpu_hour_price is not None:
            price = plan.config.gpu_hour_price
            text += f", {gpu_hours * price:,.0f} at {price:g} each"
    yield text


def checkpoint_bytes(plan: "Plan") -> float:
    return cost.checkpoint_bytes(plan.network, plan.optimizer.name, plan.config.trainer.precision)


def _capacities(plan: "Plan") -> list[float]:
    """Memory of the devices in bytes, or common sizes of GPUs."""
    if plan.devices.kind == "gpu":
        sizes = [
            torch.cuda.get_device_properties(i).total_memory
            for i in range(torch.cuda.device_count())
        ]
        return [float(min(sizes))] if sizes else [24e9, 40e9, 80e9]
    return [available_memory() / plan.devices.per_node]


def available_memory(root: Path = Path("/")) -> float:
    """Available memory in bytes: the machine's, or less if the process's cgroups limit it.

    Args:
        root: root of the file system that has /proc and /sys.
    """
    found = [float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))]
    with contextlib.suppress(OSError, KeyError):  # not Linux
        lines = dict(
            line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines()
        )
        found.append(1024.0 * int(lines["MemAvailable"].split()[0]))
    with contextlib.suppress(OSError):
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        # "0::" is cgroups version 2; limits of version 1 are ignored.
        path = next((g[3:].strip("/") for g in groups if g.startswith("0::")), "")
        own = root / "sys/fs/cgroup" / path
        # Jobs and containers set limits in parent groups.
        for folder in (own, *own.parents):
            file = folder / "memory.max"
            if file.is_file() and (limit := file.read_text().strip()) != "max":
                found.append(float(limit))
    return min(found)


def gigabytes(size: float) -> str:
    """Format bytes.

    >>> gigabytes(6.72e9), gigabytes(3.1e7)
    ('6.7 GB', '31 MB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """Format seconds.

    >>> [duration(s) for s in (0.0123, 75.0, 7100.0, 9000.0, 4e6)]
    ['0.012 s', '75 s', '118 min', '2.5 h', '46 days']
    """
    for unit, size, limit in (("s", 1.0, 120.0), ("min", 60.0, 7200.0), ("h", 3600.0, 3 * 86400.0)):
        if seconds < limit:
            number = seconds / size
            return f"{number:.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"
    return f"{seconds / 86400:.0f} days"
