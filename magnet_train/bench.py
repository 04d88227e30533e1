"""How fast it is, and how much memory it takes: each part beside its slow twin (twin.py) in the same run.

Ours and the twin take turns, so that what else the machine does meets both. Times are of whole calls, after a first one
that is not counted; medians, since these machines are shared. Peak memory is what a call takes beyond what was there
before it. The hardware's limit is measured too: a large matrix product.
"""

import ctypes
import gc
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from magnet_train.attention import dense_window, window_bias, windowed_attention
from magnet_train.decoding import DecodingConfig, Network, decode, item_noise
from magnet_train.errors import UserError
from magnet_train.loss import masked_cross_entropy
from magnet_train.masking import span_mask
from magnet_train.model import Magnet, MagnetConfig
from magnet_train.twin import dense_logits, dense_networks


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, and how often."""

    only: list[str] = field(default_factory=list)
    """Parts to measure: attention, training, decoding, loading, tokenizing, start; all if none is given."""
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


# --- one measurement ----------------------------------------------------------------------------------------------


def timed(calls: list[Callable[[], Any]], repeats: int, device: str) -> list[list[float]]:
    """Seconds of each call, `repeats` of each, in turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(repeats):
        for call, own in zip(calls, seconds, strict=True):
            _settle(device)
            start = time.perf_counter()
            call()
            _settle(device)
            own.append(time.perf_counter() - start)
    return seconds


def _settle(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def peak_mb(call: Callable[[], Any], device: str) -> float | None:
    """Most memory that a call takes beyond what was there; None where the system does not tell."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or freed memory that the allocator kept would be used again, unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak (proc(5))
    except (OSError, AttributeError):
        return None
    before = _memory("VmRSS")
    call()
    return (_memory("VmHWM") - before) / 1e6


def _memory(name: str) -> float:
    """Bytes of this process, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) * 1024


def count_flop(call: Callable[[], Any]) -> float:
    """Multiplications and additions in matrix products and attention of a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


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


# --- the parts ----------------------------------------------------------------------------------------------------


def attention(options: BenchOptions, limit: float) -> Iterator[Measured]:
    """Windowed attention against a dense mask, forward and backward, and how it grows with length."""
    heads, width = 4, 64

    def inputs(num_frames: int, needs_grad: bool) -> tuple[Tensor, ...]:
        shape = (options.batch_size, heads, num_frames, width)
        return tuple(torch.randn(shape, device=options.device, requires_grad=needs_grad) for _ in range(3))

    def forward(function: Callable[..., Tensor], parts: tuple[Tensor, ...], **mask: Any) -> Callable[[], Any]:
        return lambda: function(*parts, **mask)

    def backward(function: Callable[..., Tensor], parts: tuple[Tensor, ...], **mask: Any) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(*parts, **mask).square().sum(), parts)

    def masks(parts: tuple[Tensor, ...], context: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of ours and of the twin; a forward pass makes them once, so they are not measured."""
        allowed = dense_window(parts[0].shape[2], context, device=parts[0].device)
        return {"context": context, "bias": window_bias(parts[0], context)}, {"attn_mask": allowed}

    sdpa = torch.nn.functional.scaled_dot_product_attention
    for context in (5, 25, 100):
        for name, call, needs_grad in (("forward", forward, False), ("forward and backward", backward, True)):
            parts = inputs(options.num_frames, needs_grad)
            own, dense = masks(parts, context)
            yield compare(
                f"attention, {name}", call(windowed_attention, parts, **own), call(sdpa, parts, **dense),
                options, limit, num_frames=options.num_frames, context=context,
            )  # fmt: skip
    calls = []
    for num_frames in (12_000, 1500):
        parts = inputs(num_frames, True)
        calls.append(backward(windowed_attention, parts, context=5, bias=window_bias(parts[0], 5)))
    seconds = timed(calls, options.repeats, options.device)
    peaks = [peak_mb(call, options.device) for call in calls]
    yield Measured(
        "attention, 12 000 frames over 1 500", {"context": 5}, median(seconds[0]), min(seconds[0]), max(seconds[0]),
        peaks[0], count_flop(calls[0]), None, median(seconds[1]), peaks[1], median(seconds[0]) / median(seconds[1]),
    )  # fmt: skip


def _model(options: BenchOptions) -> tuple[Magnet, Tensor, Tensor]:
    torch.manual_seed(0)
    config = MagnetConfig(dim=256, num_heads=4, num_layers=6, codebook_size=2048, text_dim=768)
    states = torch.randn(options.batch_size, 20, 768, device=options.device)
    tokens = torch.ones(options.batch_size, 20, dtype=torch.bool, device=options.device)
    return Magnet(config).to(options.device), states, tokens


def training(options: BenchOptions, limit: float) -> Iterator[Measured]:
    """A training step: forward, loss, backward and AdamW, at the mean mask rate."""
    model, states, tokens = _model(options)
    shape = (options.batch_size, 4, options.num_frames)
    codes = torch.randint(2048, shape, device=options.device)
    rates = torch.full((options.batch_size,), 0.64)
    masked = span_mask(rates, options.num_frames, 3, torch.Generator().manual_seed(0)).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(stage: int, dense: bool) -> None:
        asked = codes.clone()
        asked[:, stage] = asked[:, stage].masked_fill(masked, 2048)
        asked[:, stage + 1 :] = 2048
        if dense:
            logits = dense_logits(model, asked, stage, states, tokens)[:, stage][masked]
        else:
            logits = model.logits(model.trunk(asked, stage, model.remember(states, tokens))[masked], stage)
        optimizer.zero_grad()
        masked_cross_entropy(logits, codes[:, stage], masked).mean().backward()
        optimizer.step()

    for stage, name in ((0, "stage 0"), (1, "stages 1 and up")):
        yield compare(
            f"training step, {name}", partial(step, stage, False), partial(step, stage, True), options, limit,
            num_frames=options.num_frames, batch_size=options.batch_size,
        )  # fmt: skip


@torch.no_grad()
def decoding(options: BenchOptions, limit: float) -> Iterator[Measured]:
    """Decoding with guidance, whole and in the stages with a window."""
    model, states, tokens = _model(options)
    model.eval()
    size, num_frames = options.batch_size, options.num_frames
    config = DecodingConfig(decoding_steps=(20, 10, 10, 10))
    noise = item_noise(0, [str(i) for i in range(size)], 50, num_frames).to(options.device)
    codes = torch.zeros(size, 4, num_frames, dtype=torch.long, device=options.device)
    fixed = torch.zeros(size, num_frames, dtype=torch.bool, device=options.device)
    ends: list[float] = []
    results: list[Tensor] = []

    def run(conditional: Network, null: Network) -> None:
        ends.clear()
        results.append(
            decode(conditional, null, codes, fixed, 2048, config, noise, lambda step: ends.append(time.perf_counter()))
        )
        _settle(options.device)

    def ours() -> None:
        text = model.remember(states, tokens)
        run(lambda c, s: model(c, s, text), lambda c, s: model(c, s, None))

    def twin() -> None:
        run(*dense_networks(model, states, tokens))

    # A decoding takes half a minute and more: what is counted here is also what is measured otherwise.
    whole: dict[Any, list[float]] = {ours: [], twin: []}
    windowed: dict[Any, list[float]] = {ours: [], twin: []}
    peaks: dict[Any, float | None] = {}
    for _ in range(max(1, min(options.repeats, 2))):
        for call in (ours, twin):
            start = time.perf_counter()
            peaks[call] = peak_mb(call, options.device)
            whole[call].append(ends[-1] - start)
            windowed[call].append(ends[-1] - ends[config.decoding_steps[0] - 1])
    same = (results[0] == results[1]).float().mean().item()
    text, flop = model.remember(states, tokens), 0.0
    for stage, steps in enumerate(config.decoding_steps):
        both = lambda stage=stage: (model(codes, stage, text), model(codes, stage, None))  # noqa: E731
        flop += steps * count_flop(both)
    settings = {"num_frames": num_frames, "steps": list(config.decoding_steps), "same_codes": same}
    for name, spent in (("all stages", whole), ("stages 1 to 3", windowed)):
        own, dense, is_whole = spent[ours], spent[twin], spent is whole
        yield Measured(
            f"decoding, {name}", settings, median(own), min(own), max(own), peaks[ours] if is_whole else None,
            flop if is_whole else None, flop / median(own) / limit if is_whole else None, median(dense),
            peaks[twin] if is_whole else None, median(dense) / median(own),
        )  # fmt: skip


PARTS: dict[str, Callable[[BenchOptions, float], Iterator[Measured]]] = {
    "attention": attention, "training": training, "decoding": decoding,
}  # fmt: skip


def bench(options: BenchOptions) -> list[Measured]:
    """Measure, and print a table as it grows.

    Raises:
        UserError: if a part is not known, or there is no such device.
    """
    if unknown := [name for name in options.only if name not in PARTS]:
        raise UserError(f"--only {unknown[0]}: choose of {', '.join(PARTS)}")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {options.device}: no GPU here; leave it out")
    with _threads(options.threads):
        limit = matmul_limit(options.device)
        print(f"{describe(options)}, matrix product {limit / 1e9:,.0f} GFLOP/s")
        print(HEAD)
        results = []
        for name in options.only or PARTS:
            for measured in PARTS[name](options, limit):
                print(row(measured), flush=True)
                results.append(measured)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(m) for m in results], indent=1) + "\n")
    return results


@contextmanager
def _threads(number: int) -> Iterator[None]:
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

    name = m.name + (f", context {m.settings['context']}" if "context" in m.settings and "over" not in m.name else "")
    return (
        f"{name:<42}{m.median_s:>9.4g}s{f'{m.min_s:.3g} … {m.max_s:.3g}':>20}{cell(m.peak_mb, '.0f', 9)}"
        f"{cell(None if m.flop is None else m.flop / 1e9, '.1f', 8)}{cell(m.share_of_limit, '.0%', 7)}"
        f"{cell(m.twin_median_s, '.4g', 9)}{' ' if m.twin_median_s is None else 's'}{cell(m.twin_peak_mb, '.0f', 9)}"
        f"{cell(m.ratio, '.2f', 8)}"
    )
