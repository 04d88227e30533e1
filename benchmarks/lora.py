"""LoRA beside full training: processor time of a step, optimizer state and peak memory.

python benchmarks/lora.py [--base demo] [--rank 16] [--steps 6]

Optimizer steps on random codes in one process and one thread, one after the other; the peak of the
resident memory is reset in between (Linux).
"""

import argparse
import time
from pathlib import Path

import torch

from magnet_train.adapters import LoraConfig
from magnet_train.module import MagnetModule, trainable_parameters
from magnet_train.release import SavedModel


def peak_mb() -> float:
    """Peak resident memory since `reset_peak`, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(base: str, rank: int, steps: int, batch_size: int) -> list[str]:
    """A row: trained parameters, CPU seconds of a step, optimizer state and peak memory."""
    saved = SavedModel.open(base)
    lora = LoraConfig(rank=rank)
    module = MagnetModule(
        saved.network, codec=saved.codec["id"], crop_s=saved.crop_s, init_from=base, lora=lora
    )
    module.setup("fit")
    trained = list(trainable_parameters(module).values())
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    draw = torch.Generator().manual_seed(0)
    frames = round(saved.crop_s * saved.codec["frame_rate"])
    shape = batch_size, saved.network.num_codebooks, frames
    codes = torch.randint(saved.network.codebook_size, shape, generator=draw)
    batch = {"codes": codes, "valid": torch.ones(batch_size, frames, dtype=torch.bool)}
    masked = torch.rand(batch_size, frames, generator=draw) < 0.6
    seconds = []
    reset_peak()
    for step in range(steps):
        start = time.process_time()
        stage = step % saved.network.num_codebooks
        loss = module.stage_loss(batch, ["a slow waltz"] * batch_size, stage, masked).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.process_time() - start)
    state = sum(
        value.numel() * value.element_size()
        for values in optimizer.state.values()
        for value in values.values()
    )
    number = sum(parameter.numel() for parameter in trained)
    per_step = sum(seconds[1:]) / (steps - 1)
    kind = f"LoRA, rank {rank}" if rank else "all weights"
    return [
        kind,
        f"{number / 1e6:.2f} M",
        f"{per_step:.2f}",
        f"{state / 2**20:.1f}",
        f"{peak_mb():.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="demo")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = ["trained", "parameters", "CPU s per step", "optimizer state, MB", "peak memory, MB"]
    print("| " + " | ".join(head) + " |\n|---|---|---|---|---|")
    for rank in (options.rank, 0):
        row = measure(options.base, rank, options.steps, options.batch_size)
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
