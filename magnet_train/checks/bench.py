"""Time and memory of each part, compared with its reference implementation (dense.py)."""

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from magnet_train.attention import dense_window, window_bias, windowed_attention
from magnet_train.checks.bench_data import loading, start, tokenizing
from magnet_train.checks.cost import useful_flop
from magnet_train.checks.measure import (
    HEAD,
    BenchmarkResult,
    BenchOptions,
    compare,
    count_flop,
    describe,
    matmul_limit,
    peak_mb,
    result,
    row,
    synchronize,
    threads_set,
    timed,
)
from magnet_train.common.devices import to_device
from magnet_train.common.errors import UserError
from magnet_train.common.folders import writable_folder
from magnet_train.decoding.decode import DecodingConfig, Networks, decode, item_noise
from magnet_train.decoding.frame_cache import CachedForward
from magnet_train.dense import dense_logits, dense_networks
from magnet_train.loss import masked_cross_entropy
from magnet_train.masking import span_mask
from magnet_train.model import Magnet, MagnetConfig

MASK_RATE = 0.64
"""About the mean of the cosine schedule."""
NUM_TEXT = 20
"""Tokens of a caption."""
DECODING_STEPS = (20, 10, 10, 10)
GPU_PROMPTS = (1, 16)
GPU_EXAMPLES = 8
"""Batches of the published small model on a GPU."""
LONG = 12_000
SHORT = 1500
"""Two lengths in frames, to measure how the time of attention grows."""

# --- attention ------------------------------------------------------------------------------------


def attention(options: BenchOptions, limit: float) -> Iterator[BenchmarkResult]:
    """Windowed attention against a dense mask, forward and backward, and at two lengths."""
    heads = 4
    width = 64
    shape = (options.batch_size, heads, options.num_frames, width)
    for context in (5, 25, 100):
        for backward in (False, True):
            inputs = _inputs(shape, options.device, backward)
            # Not measured: masks are made once per forward pass.
            bias = window_bias(options.num_frames, context, device=options.device)
            yield compare(
                f"attention, {'forward and backward' if backward else 'forward'}",
                _attend(windowed_attention, inputs, backward, bias=bias),
                _attend(
                    scaled_dot_product_attention,
                    inputs,
                    backward,
                    attn_mask=_dense_mask(inputs[0], context),
                ),
                options,
                limit,
                num_frames=options.num_frames,
                context=context,
                batch_size=options.batch_size,
                heads=heads,
                width=width,
            )
    calls = []
    for num_frames in (LONG, SHORT):
        inputs = _inputs((options.batch_size, heads, num_frames, width), options.device, True)
        bias = window_bias(num_frames, 5, device=options.device)
        calls.append(_attend(windowed_attention, inputs, True, bias=bias))
    long, short = timed(calls, options.repeats, options.device)
    growth = result(
        "attention, 12 000 frames over 1 500",
        {"context": 5},
        long,
        short,
        flop=count_flop(calls[0]),
    )
    peaks = [peak_mb(call, options.device) for call in calls]
    ratio = growth.median_s / (growth.baseline_median_s or 1.0)
    yield replace(growth, peak_mb=peaks[0], baseline_peak_mb=peaks[1], ratio=ratio)


def _inputs(shape: tuple[int, ...], device: str, needs_grad: bool) -> list[Tensor]:
    """Queries, keys and values, `b h t d`."""
    return [torch.randn(shape, device=device, requires_grad=needs_grad) for _ in range(3)]


def _dense_mask(queries: Tensor, context: int) -> Tensor:
    allowed = dense_window(queries.shape[2], context, device=queries.device)
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, -torch.inf)


def _attend(
    function: Callable[..., Tensor], inputs: list[Tensor], backward: bool, **mask: Any
) -> Callable[[], Any]:
    if backward:
        return lambda: torch.autograd.grad(function(*inputs, **mask).square().sum(), inputs)
    return lambda: function(*inputs, **mask)


# --- training -------------------------------------------------------------------------------------


def _model(options: BenchOptions) -> tuple[Magnet, Tensor, Tensor]:
    """A small network, with text states and their mask."""
    torch.manual_seed(0)
    config = MagnetConfig(dim=256, num_heads=4, num_layers=6, codebook_size=2048, text_dim=768)
    states = torch.randn(options.batch_size, NUM_TEXT, 768, device=options.device)
    text_mask = torch.ones(options.batch_size, NUM_TEXT, dtype=torch.bool, device=options.device)
    return Magnet(config).to(options.device), states, text_mask


def _mask_codes(codes: Tensor, stage: int, masked: Tensor, mask_id: int) -> Tensor:
    """The network's input in training at a stage."""
    shown = codes.clone()
    shown[:, stage] = shown[:, stage].masked_fill(to_device(masked, codes.device), mask_id)
    shown[:, stage + 1 :] = mask_id
    return shown


def _draw_mask(batch_size: int, num_frames: int) -> Tensor:
    """On the host, as in training."""
    rates = torch.full((batch_size,), MASK_RATE)
    return span_mask(rates, num_frames, 3, torch.Generator().manual_seed(0))


def training(options: BenchOptions, limit: float) -> Iterator[BenchmarkResult]:
    """A training step: forward, loss, backward and AdamW, at the mean mask rate."""
    model, states, text_mask = _model(options)
    codes = torch.randint(2048, (options.batch_size, 4, options.num_frames), device=options.device)
    masked = _draw_mask(options.batch_size, options.num_frames)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(stage: int, dense: bool) -> None:
        shown = _mask_codes(codes, stage, masked, 2048)
        optimizer.zero_grad()
        if dense:
            logits = dense_logits(model, shown, stage, states, text_mask)[:, stage][masked]
        else:
            logits = model.masked_logits(
                shown, model.config.stage(stage), (states, text_mask), masked
            )
        masked_cross_entropy(logits, codes[:, stage], masked).mean().backward()
        optimizer.step()

    for stage, name in ((0, "stage 0"), (1, "stages 1 and up")):
        yield compare(
            f"training step, {name}",
            partial(step, stage, False),
            partial(step, stage, True),
            options,
            limit,
            num_frames=options.num_frames,
            batch_size=options.batch_size,
            **asdict(model.config),
        )


# --- decoding -------------------------------------------------------------------------------------


@torch.no_grad()
def decoding(options: BenchOptions, limit: float) -> Iterator[BenchmarkResult]:
    """Decoding with guidance: all stages, those with a window, and with reuse between steps."""
    model, states, text_mask = _model(options)
    model.eval()
    shape = (options.batch_size, 4, options.num_frames)
    codes = torch.zeros(shape, dtype=torch.long, device=options.device)

    def exact() -> Networks:
        text = model.encode_text(states, text_mask)
        stage = model.config.stage
        return Networks(
            lambda c, s: model(c, stage(s), text), lambda c, s: model(c, stage(s), None)
        )

    def dense() -> Networks:
        return Networks(*dense_networks(model, states, text_mask))

    def cached() -> Networks:
        return Networks(
            CachedForward(model, model.encode_text(states, text_mask)), CachedForward(model, None)
        )

    # Decoding takes over half a minute, so memory is measured with few steps only.
    found = {make: _Decoded() for make in (exact, dense, cached)}
    for _ in range(max(1, min(options.repeats, 2))):
        for make, decoded in found.items():
            _decode(make, codes, DECODING_STEPS, options.device, decoded)
    peaks = {
        make: peak_mb(
            partial(_decode, make, codes, (1,), options.device, _Decoded()), options.device
        )
        for make in (exact, dense)
    }
    flop = _decoding_flop(model, codes, model.encode_text(states, text_mask))
    settings = {
        "num_frames": options.num_frames,
        "batch_size": options.batch_size,
        "steps": list(DECODING_STEPS),
    }
    settings |= asdict(model.config)
    same = {
        make: (found[exact].codes == found[make].codes).float().mean().item()
        for make in (dense, cached)
    }
    yield result(
        "decoding, all stages",
        settings | {"same_codes": same[dense]},
        found[exact].seconds,
        found[dense].seconds,
        flop=flop,
        limit=limit,
        peak_mb=peaks[exact],
        baseline_peak_mb=peaks[dense],
    )
    yield result(
        "decoding, stages 1 to 3",
        settings | {"same_codes": same[dense]},
        found[exact].windowed_seconds,
        found[dense].windowed_seconds,
    )
    yield result(
        "decoding, stages 1 to 3, reuse beside full passes",
        settings | {"same_codes": same[cached]},
        found[cached].windowed_seconds,
        found[exact].windowed_seconds,
    )


class _Decoded:
    """Seconds of each decoding, in total and for the windowed stages, and the last codes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.windowed_seconds: list[float] = []
        self.codes = torch.empty(0)


def _decode(
    make: Callable[[], Networks],
    codes: Tensor,
    steps: tuple[int, ...],
    device: str,
    decoded: _Decoded,
) -> None:
    batch_size, num_codebooks, num_frames = codes.shape
    config = DecodingConfig(decoding_steps=steps)
    items = [str(i) for i in range(batch_size)]
    noise = item_noise(0, items, config.num_steps(num_codebooks), num_frames)
    given = torch.zeros(batch_size, num_frames, dtype=torch.bool, device=device)
    ends: list[float] = []

    def on_step(step: Any) -> None:
        synchronize(device)
        ends.append(time.perf_counter())

    start = time.perf_counter()
    decoded.codes = decode(make(), codes, given, 2048, config, noise, on_step)
    decoded.seconds.append(ends[-1] - start)
    decoded.windowed_seconds.append(ends[-1] - ends[steps[0] - 1])


def _decoding_flop(model: Magnet, codes: Tensor, text: Any) -> float:
    total = 0.0
    for stage, steps in enumerate(DECODING_STEPS):

        def both(stage: int = stage) -> Any:
            this = model.config.stage(stage)
            return model(codes, this, text), model(codes, this, None)

        total += steps * count_flop(both)
    return total


# --- logging --------------------------------------------------------------------------------------


def reading(options: BenchOptions, limit: float) -> Iterator[BenchmarkResult]:
    """Cost of logging, metrics and progress per step of the demo, by Lightning's profiler."""
    steps = 30
    command = [sys.executable, "-m", "magnet_train", "fit", "--trainer.profiler=simple"]
    command += [f"--trainer.max_steps={steps}", "--model.optimizer.warmup_steps=10"]
    command += ["--trainer.limit_val_batches=0", "--trainer.log_every_n_steps=20"]
    with TemporaryDirectory() as folder:
        environment = os.environ | {
            "WANDB_MODE": "offline",
            "OMP_NUM_THREADS": str(options.threads),
            "COLUMNS": "400",
        }
        command.append(f"--trainer.default_root_dir={folder}")
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"the measured fit failed: {done.stderr.strip().splitlines()[-1]}")
    lines = done.stdout.splitlines() + done.stderr.splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    seconds = {cells[1]: float(cells[4]) for cells in rows if len(cells) > 4 and cells[3].isdigit()}
    total = seconds["run_training_epoch"]
    work = seconds["run_training_batch"] + seconds["[_TrainingEpochLoop].train_dataloader_next"]
    work += seconds["[Callback]WeightEMA.on_train_batch_end"]
    spent = total - work + seconds["[LightningModule]MagnetModule.on_before_optimizer_step"]
    settings = {"steps": steps, "config": "demo"}
    step = result(
        "logging and progress, of a training step", settings, [spent / steps], [total / steps]
    )
    yield replace(step, ratio=spent / total)


# --- a GPU ----------------------------------------------------------------------------------------


def gpu(
    options: BenchOptions, limit: float, config: MagnetConfig | None = None
) -> Iterator[BenchmarkResult]:
    """Decoding and a training step of the published small model on a GPU, in bfloat16 and compiled.

    Args:
        options: options of `bench`.
        limit: FLOP per second of bfloat16 matrix products.
        config: network (default: the published small one).
    """
    model = Magnet(config or MagnetConfig()).to(options.device)
    for batch_size in GPU_PROMPTS:
        yield _compiled_decoding(options, limit, model, batch_size)
    model.compile_blocks()
    yield from _compiled_training(options, limit, model)


def _compiled_decoding(
    options: BenchOptions, limit: float, model: Magnet, batch_size: int
) -> BenchmarkResult:
    """All steps, with text and null condition in one pass as in `generate`."""
    config = model.config
    num_frames = options.num_frames // 3
    device = options.device
    half = copy.deepcopy(model).to(torch.bfloat16).eval()
    shape = (2 * batch_size, NUM_TEXT, config.text_dim)
    states = torch.randn(shape, device=device, dtype=torch.bfloat16)
    has_text = torch.arange(2 * batch_size, device=device) < batch_size
    text = half.encode_text(states, has_text[:, None].expand(-1, NUM_TEXT))
    forward = torch.compile(half.forward, mode="reduce-overhead", fullgraph=True)
    settings = DecodingConfig()
    items = [str(i) for i in range(batch_size)]
    noise = item_noise(0, items, settings.num_steps(config.num_codebooks), num_frames)
    codes = torch.zeros(batch_size, config.num_codebooks, num_frames, dtype=torch.long).to(device)
    given = torch.zeros(batch_size, num_frames, dtype=torch.bool, device=device)

    def joint(codes: Tensor, stage: int) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return forward(codes.repeat(2, 1, 1), config.stage(stage), text).chunk(2)

    @torch.no_grad()
    def generate() -> Tensor:
        networks = Networks(lambda codes, stage: joint(codes, stage)[0], joint=joint)
        return decode(networks, codes, given, config.codebook_size, settings, noise)

    steps = settings.per_stage("decoding_steps", config.num_codebooks)
    flop = sum(
        number * batch_size * useful_flop(config, num_frames, stage, num_frames, num_text)
        for stage, number in enumerate(steps)
        for num_text in (NUM_TEXT, 0)
    )
    (seconds,) = timed([generate], options.repeats, device)
    return result(
        f"codes of {'one prompt' if batch_size == 1 else f'{batch_size} prompts'}, bf16, compiled",
        {
            "num_frames": num_frames,
            "batch_size": batch_size,
            "steps": list(steps),
            "dim": config.dim,
        },
        seconds,
        flop=flop,
        limit=limit,
        peak_mb=peak_mb(generate, device),
    )


def _compiled_training(
    options: BenchOptions, limit: float, model: Magnet
) -> Iterator[BenchmarkResult]:
    config = model.config
    batch_size = GPU_EXAMPLES
    num_frames = options.num_frames
    device = torch.device(options.device)
    states = torch.randn(batch_size, NUM_TEXT, config.text_dim, device=device)
    text_mask = torch.ones(batch_size, NUM_TEXT, dtype=torch.bool, device=device)
    codes = torch.randint(
        config.codebook_size, (batch_size, config.num_codebooks, num_frames), device=device
    )
    masked = _draw_mask(batch_size, num_frames)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(stage: int) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            shown = _mask_codes(codes, stage, masked, config.mask_id)
            logits = model.masked_logits(
                shown, model.config.stage(stage), (states, text_mask), masked
            )
        masked_cross_entropy(logits, codes[:, stage], masked).mean().backward()
        optimizer.step()

    for stage, name in ((0, "stage 0"), (1, "stages 1 and up")):
        num_predicted = int(masked.sum()) // batch_size
        (seconds,) = timed([partial(step, stage)], options.repeats, options.device)
        yield result(
            f"training step, {name}, bf16, compiled",
            {"num_frames": num_frames, "batch_size": batch_size, "dim": config.dim},
            seconds,
            flop=3 * batch_size * useful_flop(config, num_frames, stage, num_predicted, NUM_TEXT),
            limit=limit,
            peak_mb=peak_mb(partial(step, stage), options.device),
        )


# --- all of them ----------------------------------------------------------------------------------

PARTS: dict[str, Callable[[BenchOptions, float], Iterator[BenchmarkResult]]] = {
    "start": start,
    "attention": attention,
    "training": training,
    "decoding": decoding,
    "loading": loading,
    "tokenizing": tokenizing,
    "reading": reading,
    "gpu": gpu,
}
CPU_PARTS = tuple(name for name in PARTS if name != "gpu")
GPU_PARTS = ("attention", "training", "decoding", "gpu")


def bench(options: BenchOptions) -> list[BenchmarkResult]:
    """Run the measurements, and print each row of the table when it is done.

    Raises:
        UserError: if a part is unknown, the device is missing, or --json cannot be written.
    """
    parts = CPU_PARTS if options.device == "cpu" else GPU_PARTS
    unknown = [name for name in options.only if name not in parts]
    if unknown:
        raise UserError(f"--only {unknown[0]}: on {options.device} choose from {', '.join(parts)}")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {options.device}: no GPU here; use --device cpu")
    if options.json is not None:
        writable_folder(options.json.parent, "--json")
        if options.json.is_dir():
            raise UserError(f"--json {options.json}: is a folder; give a file")
    with threads_set(options.threads):
        results = list(_measure(options, options.only or parts))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(found) for found in results], indent=1) + "\n")
    return results


def _measure(options: BenchOptions, parts: Any) -> Iterator[BenchmarkResult]:
    limit = matmul_limit(options.device)
    machine = {"machine": describe(options), "threads": options.threads, "repeats": options.repeats}
    machine |= {"limit_gflops": round(limit / 1e9)}
    print(f"{describe(options)}, matrix product {limit / 1e9:,.0f} GFLOP/s")
    print(HEAD)
    for name in parts:
        part_limit = matmul_limit(options.device, torch.bfloat16) if name == "gpu" else limit
        for found in PARTS[name](options, part_limit):
            print(row(found), flush=True)
            yield replace(found, settings=found.settings | machine)
