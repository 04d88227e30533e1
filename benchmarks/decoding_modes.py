"""Latency and throughput of one hybrid decoded in parallel, in part and wholly frame after frame.

    python benchmarks/decoding_modes.py --checkpoint RUN --out modes     # modes.md and modes.png
    python benchmarks/decoding_modes.py --out modes                      # random weights

The paper's figure 2 for one network instead of two. A row pass is what one pass over all frames of
one clip computes: a unit that no machine changes. Guidance takes two, a frame that is decoded after
the others a small part of one. On a CPU, seconds are of the processor with one thread, which other
work on the machine hardly changes.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import torch

from magnet_train.codec.base import load_codec
from magnet_train.common.tables import markdown_table
from magnet_train.conditioning import load_text_encoder
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.generator import Generator, load
from magnet_train.model import Magnet, MagnetConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--checkpoint", help="a hybrid; random weights of the demo's size if absent"
    )
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--duration_s", type=float, default=10.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="The first run warms up, besides.")
    parser.add_argument("--out", type=Path, required=True, help="name of the files, without ending")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = random_hybrid() if options.checkpoint is None else load(options.checkpoint)
    generator.network.to(options.device)
    results = {}
    for share in (0.0, 0.25, 1.0):
        begin_s = share * options.duration_s
        settings = dataclasses.replace(generator.decoding, autoregressive_s=begin_s)
        for size in options.batch_sizes:
            results[begin_s, size] = measure(
                generator, settings, size, options.duration_s, options.repeats
            )
            print(
                f"{begin_s:g} s of {options.duration_s:g} s, batch {size}: {results[begin_s, size]}"
            )
    rows = [
        [f"{begin:g}", str(size), f"{passes:.1f}", f"{seconds:.2f}", f"{size / seconds:.2f}"]
        for (begin, size), (passes, seconds) in results.items()
    ]
    names = ["beginning (s)", "batch", "row passes per clip", "latency (s)", "clips per second"]
    device = "CPU seconds of one thread"
    if options.device != "cpu":
        device = torch.cuda.get_device_name(options.device)
    about = f"{options.duration_s:g} s per clip, {device}, median of {options.repeats}"
    options.out.with_suffix(".md").write_text(f"{about}\n\n{markdown_table(names, rows)}\n")
    plot(results, options.out.with_suffix(".png"), about)


def random_hybrid() -> Generator:
    """A hybrid of the demo's size that nobody trained: as fast as a trained one."""
    codec, text = load_codec("demo"), load_text_encoder("demo")
    config = MagnetConfig(
        dim=192,
        num_heads=4,
        num_layers=5,
        num_codebooks=codec.facts.num_codebooks,
        codebook_size=codec.facts.codebook_size,
        text_dim=text.dim,
        context=(-1, 25, 12),
        positions="rotary",
        convolution=7,
        order="hybrid",
    )
    decoding = DecodingConfig(decoding_steps=(20, 8, 6))
    return Generator(Magnet(config).eval(), codec, text, decoding, crop_s=10.0)


def measure(
    generator: Generator, settings: DecodingConfig, batch_size: int, duration_s: float, repeats: int
) -> tuple[float, float]:
    """Row passes per clip, and the median of the seconds that a batch takes, codec included."""
    rows = 0
    clock = time.process_time if generator.device.type == "cpu" else time.perf_counter

    def count(module: object, inputs: object, features: torch.Tensor) -> None:
        nonlocal rows
        rows += features.shape[0] * features.shape[1]

    prompts = [f"a slow waltz for piano, number {i}" for i in range(batch_size)]
    seconds = []
    handle = generator.network.out_norm.register_forward_hook(count)
    for _ in range(repeats + 1):  # the first warms up
        rows, start = 0, clock()
        result = generator.generate(prompts, decoding=settings, duration_s=duration_s)
        result.wav.sum().item()  # waits for the device
        seconds.append(clock() - start)
    handle.remove()
    return rows / (batch_size * result.codes.shape[2]), statistics.median(seconds[1:])


def plot(results: dict[tuple[float, int], tuple[float, float]], path: Path, title: str) -> None:
    """Latency and throughput against the batch size, a line for each length of the beginning."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    for begin in dict.fromkeys(begin for begin, _ in results):
        sizes = [size for other, size in results if other == begin]
        seconds = [results[begin, size][1] for size in sizes]
        label = f"{begin:g} s frame after frame"
        latency.plot(sizes, seconds, marker="o", label=label)
        clips = [size / s for size, s in zip(sizes, seconds, strict=True)]
        throughput.plot(sizes, clips, marker="o", label=label)
    for axes, name in ((latency, "seconds per batch"), (throughput, "clips per second")):
        axes.set(xlabel="batch size", ylabel=name, ylim=(0, None))
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
