"""How fast it is, and how much memory it takes: each part beside its slow twin (twin.py) in the same run."""

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from magnet_train.attention import dense_window, window_bias, windowed_attention
from magnet_train.checks.bench_data import loading, start, tokenizing
from magnet_train.checks.measure import (
    HEAD,
    BenchOptions,
    Measured,
    compare,
    count_flop,
    describe,
    matmul_limit,
    peak_mb,
    row,
    settle,
    threads_set,
    timed,
)  # fmt: skip
from magnet_train.common.errors import UserError
from magnet_train.cost import useful_flop
from magnet_train.decoding.decode import DecodingConfig, Networks, decode, item_noise
from magnet_train.decoding.frame_cache import CachedForward
from magnet_train.dense import dense_logits, dense_networks
from magnet_train.loss import masked_cross_entropy
from magnet_train.masking import span_mask
from magnet_train.model import Magnet, MagnetConfig


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
        dense = torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, -torch.inf)
        return {"context": context, "bias": window_bias(parts[0], context)}, {"attn_mask": dense}

    sdpa = torch.nn.functional.scaled_dot_product_attention
    for context in (5, 25, 100):
        for name, call, needs_grad in (("forward", forward, False), ("forward and backward", backward, True)):
            parts = inputs(options.num_frames, needs_grad)
            own, dense = masks(parts, context)
            yield compare(
                f"attention, {name}", call(windowed_attention, parts, **own), call(sdpa, parts, **dense),
                options, limit, num_frames=options.num_frames, context=context,
                batch_size=options.batch_size, heads=heads, width=width,
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def logits_of(asked: Tensor, stage: int, dense: bool) -> Tensor:
        if dense:
            return dense_logits(model, asked, stage, states, tokens)[:, stage][masked]
        return model.logits(model.trunk(asked, stage, model.encode_text(states, tokens))[masked], stage)

    def step(stage: int, dense: bool) -> None:
        asked = codes.clone()
        asked[:, stage] = asked[:, stage].masked_fill(masked, 2048)
        asked[:, stage + 1 :] = 2048
        optimizer.zero_grad()
        masked_cross_entropy(logits_of(asked, stage, dense), codes[:, stage], masked).mean().backward()
        optimizer.step()

    for stage, name in ((0, "stage 0"), (1, "stages 1 and up")):
        yield compare(
            f"training step, {name}", partial(step, stage, False), partial(step, stage, True), options, limit,
            num_frames=options.num_frames, batch_size=options.batch_size, **asdict(model.config),
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

    def now() -> float:
        settle(options.device)
        return time.perf_counter()

    def run(networks: Networks, config: DecodingConfig) -> None:
        ends.clear()
        results.append(decode(networks, codes, fixed, 2048, config, noise, lambda step: ends.append(now())))

    def ours(config: DecodingConfig = config) -> None:
        text = model.encode_text(states, tokens)
        run(Networks(lambda c, s: model(c, s, text), lambda c, s: model(c, s, None)), config)

    def reusing(config: DecodingConfig = config) -> None:
        run(Networks(CachedForward(model, model.encode_text(states, tokens)), CachedForward(model, None)), config)

    def twin(config: DecodingConfig = config) -> None:
        run(Networks(*dense_networks(model, states, tokens)), config)

    # A decoding takes half a minute and more, so none is run for nothing, and memory is that of a few steps.
    calls = (ours, twin, reusing)
    whole: dict[Any, list[float]] = {call: [] for call in calls}
    windowed: dict[Any, list[float]] = {call: [] for call in calls}
    for _ in range(max(1, min(options.repeats, 2))):
        for call in calls:
            start = time.perf_counter()
            call()
            whole[call].append(ends[-1] - start)
            windowed[call].append(ends[-1] - ends[config.decoding_steps[0] - 1])
    same = {c: (results[0] == r).float().mean().item() for c, r in zip(calls, results, strict=False)}
    short = DecodingConfig(decoding_steps=(1,))
    peaks = {call: peak_mb(partial(call, short), options.device) for call in (ours, twin)}
    text, flop = model.encode_text(states, tokens), 0.0
    for stage, steps in enumerate(config.decoding_steps):
        both = lambda stage=stage: (model(codes, stage, text), model(codes, stage, None))  # noqa: E731
        flop += steps * count_flop(both)
    settings = {"num_frames": num_frames, "batch_size": size, "steps": list(config.decoding_steps)}
    settings |= asdict(model.config)
    for name, spent in (("all stages", whole), ("stages 1 to 3", windowed)):
        own, dense, is_whole = spent[ours], spent[twin], spent is whole
        yield Measured(
            f"decoding, {name}", settings | {"same_codes": same[twin]}, median(own), min(own), max(own),
            peaks[ours] if is_whole else None, flop if is_whole else None,
            flop / median(own) / limit if is_whole else None, median(dense),
            peaks[twin] if is_whole else None, median(dense) / median(own),
        )  # fmt: skip
    own, exact = whole[reusing], whole[ours]
    yield Measured(
        "decoding, reuse beside exact", settings | {"same_codes": same[reusing]}, median(own), min(own), max(own),
        twin_median_s=median(exact), ratio=median(exact) / median(own),
    )  # fmt: skip


def reading(options: BenchOptions, limit: float) -> Iterator[Measured]:
    """What logging, metrics and progress cost a training step of the demo, by the trainer's own profiler."""
    steps = 30
    command = [sys.executable, "-m", "magnet_train", "fit", "--trainer.profiler", "simple"]
    command += ["--trainer.max_steps", str(steps), "--model.optimizer.warmup_steps", "10"]
    command += ["--trainer.limit_val_batches", "0", "--trainer.log_every_n_steps", "20"]
    with TemporaryDirectory() as folder:
        environment = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": str(options.threads), "COLUMNS": "400"}
        command += ["--trainer.default_root_dir", folder]
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise UserError(f"fit failed while it was measured: {run.stderr.strip().splitlines()[-1]}")
    rows = [[cell.strip() for cell in line.split("|")] for line in run.stdout.splitlines() + run.stderr.splitlines()]
    seconds = {cells[1]: float(cells[4]) for cells in rows if len(cells) > 4 and cells[3].isdigit()}
    whole = seconds["run_training_epoch"]
    averaging = seconds["[Callback]WeightEMA.on_train_batch_end"]
    work = seconds["run_training_batch"] + seconds["[_TrainingEpochLoop].train_dataloader_next"] + averaging
    spent = whole - work + seconds["[LightningModule]MagnetModule.on_before_optimizer_step"]
    yield Measured(
        "logging and progress, of a training step", {"steps": steps, "config": "demo"}, spent / steps, spent / steps,
        spent / steps, twin_median_s=whole / steps, ratio=spent / whole,
    )  # fmt: skip


def gpu(options: BenchOptions, limit: float, config: MagnetConfig | None = None) -> Iterator[Measured]:
    """What a GPU is for, with the published small model in bfloat16, compiled: one prompt, and a training step.

    `limit` is that of bfloat16 products. The model is that of the published small ones unless `config` is given.
    """
    config = config or MagnetConfig()
    device = torch.device(options.device)
    model = Magnet(config).to(device)
    half = copy.deepcopy(model).to(torch.bfloat16).eval()
    text = half.encode_text(
        torch.randn(1, 20, config.text_dim, device=device, dtype=torch.bfloat16),
        torch.ones(1, 20, dtype=torch.bool, device=device),
    )
    once = torch.compile(half.forward, mode="reduce-overhead", fullgraph=True)
    decoding, t = DecodingConfig(), options.num_frames // 3
    noise = item_noise(0, ["one"], 50, t)
    codes = torch.zeros(1, config.num_codebooks, t, dtype=torch.long, device=device)
    fixed = torch.zeros(1, t, dtype=torch.bool, device=device)

    def conditional(codes: Tensor, stage: int) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return once(codes, stage, text)

    def generate() -> Tensor:
        networks = Networks(conditional, lambda codes, stage: once(codes, stage, None))
        return decode(networks, codes, fixed, config.codebook_size, decoding, noise)

    steps = decoding.steps_per_stage(config.num_codebooks)
    flop = sum(n * useful_flop(config, t, stage, t, text) for stage, n in enumerate(steps) for text in (20, 0))
    own = timed([torch.no_grad()(generate)], options.repeats, options.device)[0]
    yield Measured(
        "codes of one prompt, bf16, compiled", {"num_frames": t, "steps": list(steps), "dim": config.dim}, median(own),
        min(own), max(own), peak_mb(torch.no_grad()(generate), options.device), flop, flop / median(own) / limit,
    )  # fmt: skip
    model.compile_blocks()
    batch, t = options.batch_size, options.num_frames
    states = torch.randn(batch, 20, config.text_dim, device=device)
    tokens = torch.ones(batch, 20, dtype=torch.bool, device=device)
    codes = torch.randint(config.codebook_size, (batch, config.num_codebooks, t), device=device)
    masked = span_mask(torch.full((batch,), 0.64), t, 3, torch.Generator().manual_seed(0)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(stage: int) -> None:
        asked = codes.clone()
        asked[:, stage] = asked[:, stage].masked_fill(masked, config.mask_id)
        asked[:, stage + 1 :] = config.mask_id
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            features = model.trunk(asked, stage, model.encode_text(states, tokens))
            logits = model.logits(features[masked], stage)
        masked_cross_entropy(logits, codes[:, stage], masked).mean().backward()
        optimizer.step()

    for stage, name in ((0, "stage 0"), (1, "stages 1 and up")):
        flop = 3 * batch * useful_flop(config, t, stage, int(masked.sum()) // batch, 20)
        own = timed([partial(step, stage)], options.repeats, options.device)[0]
        yield Measured(
            f"training step, {name}, bf16, compiled", {"num_frames": t, "batch_size": batch, "dim": config.dim},
            median(own), min(own), max(own), peak_mb(partial(step, stage), options.device), flop,
            flop / median(own) / limit,
        )  # fmt: skip


PARTS: dict[str, Callable[[BenchOptions, float], Iterator[Measured]]] = {
    "start": start, "attention": attention, "training": training, "decoding": decoding, "loading": loading,
    "tokenizing": tokenizing, "reading": reading, "gpu": gpu,
}  # fmt: skip
ON_GPU = ("attention", "training", "decoding", "gpu")


def bench(options: BenchOptions) -> list[Measured]:
    """Measure, and print a table as it grows.

    Raises:
        UserError: if a part is not known, or there is no such device.
    """
    is_cpu = options.device == "cpu"
    can = [name for name in PARTS if name != "gpu"] if is_cpu else list(ON_GPU)
    if unknown := [name for name in options.only if name not in can]:
        raise UserError(f"--only {unknown[0]}: on {options.device} choose of {', '.join(can)}")
    if not is_cpu and not torch.cuda.is_available():
        raise UserError(f"--device {options.device}: no GPU here; leave it out")
    with threads_set(options.threads):
        limit = matmul_limit(options.device)
        machine = {"machine": describe(options), "threads": options.threads, "repeats": options.repeats}
        machine |= {"limit_gflops": round(limit / 1e9)}
        print(f"{describe(options)}, matrix product {limit / 1e9:,.0f} GFLOP/s")
        print(HEAD)
        results = []
        for name in options.only or can:
            own_limit = matmul_limit(options.device, torch.bfloat16) if name == "gpu" else limit
            for measured in PARTS[name](options, own_limit):
                print(row(measured), flush=True)
                results.append(replace(measured, settings=measured.settings | machine))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(m) for m in results], indent=1) + "\n")
    return results
