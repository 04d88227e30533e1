"""How fast `tokenize` is on many short clips, as a share of the speed of the codec alone.

Prints CPU seconds and the share of each repetition, and medians. Example:
`python benchmarks/short_clips.py --clips 300 --seconds 0.6 --repetitions 5`.
"""

import argparse
import cProfile
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch

from magnet_train.codec.base import load_codec
from magnet_train.data.plan import TokenizeOptions
from magnet_train.data.tokenize import tokenize

RATE = 16_000


def write_clips(folder: Path, number: int, seconds: float) -> list[np.ndarray]:
    """Write noise clips of slightly unequal length with captions; returns their samples."""
    rng = np.random.default_rng(0)
    clips = []
    for i in range(number):
        length = round(seconds * RATE * rng.uniform(0.9, 1.1))
        wav = (0.1 * rng.standard_normal(length)).astype(np.float32)
        soundfile.write(folder / f"clip{i:05d}.wav", wav, RATE)
        (folder / f"clip{i:05d}.txt").write_text(f"clip number {i}\n")
        clips.append(wav)
    return clips


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=0.6, help="mean length of a clip")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    options = TokenizeOptions(min_s=0.1)
    codec = load_codec(options.codec)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "clips"
        source.mkdir()
        clips = [
            torch.from_numpy(wav)[None] for wav in write_clips(source, asked.clips, asked.seconds)
        ]
        size = 8 * options.batch_size
        batches = [clips[first : first + size] for first in range(0, len(clips), size)]
        runs = 0

        def tokenize_all() -> None:
            nonlocal runs
            runs += 1
            tokenize(source, Path(name) / f"out{runs}", options)

        tokenize_all()  # loads the codec
        codec.encode_clips(batches[0])
        rows = []
        for _ in range(asked.repetitions):
            alone = cpu_seconds(lambda: [codec.encode_clips(batch) for batch in batches])
            whole = cpu_seconds(tokenize_all)
            rows.append((alone, whole, alone / whole))
            print("codec {:.3f} s, tokenize {:.3f} s, share {:.2f}".format(*rows[-1]), flush=True)
        medians = [statistics.median(column) for column in zip(*rows, strict=True)]
        print("median: codec {:.3f} s, tokenize {:.3f} s, share {:.2f}".format(*medians))
        if asked.profile:
            profile = cProfile.Profile(time.process_time)
            profile.runcall(tokenize_all)
            pstats.Stats(profile).sort_stats("cumulative").print_stats(70)


if __name__ == "__main__":
    main()
