"""Small audio files, codecs and shards for tests of data."""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from make_components import make_codec
from torch.utils.data import DataLoader

from magnet_train.codec.base import load_codec
from magnet_train.data.pipeline import compress_for_worker

RATE = 8_000  # of the codec, in Hz
FRAME_RATE = 50.0


def make_data_codec(folder: Path, seed: int = 0) -> str:
    """A real EncodecModel that encodes ten seconds in 20 ms: 8 kHz, 50 Hz, 4 codebooks of 64;
    returns its folder.
    """
    make_codec(
        folder,
        seed,
        sampling_rate=RATE,
        upsampling_ratios=[8, 5, 4],
        codebook_size=64,
        codebook_dim=16,
        hidden_size=16,
        target_bandwidths=[1.2],
    )
    return str(folder)


def tone(
    seconds: float, rate: int = RATE, channels: int = 1, hz: float = 440.0, seed: int = 0
) -> np.ndarray:
    """A sine in all channels with independent noise: `t channels`, float32."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal((len(t), channels))
    return (0.3 * np.sin(2 * np.pi * hz * t)[:, None] + 0.01 * noise).astype(np.float32)


def write_clip(
    path: Path,
    seconds: float = 3.0,
    caption: str | None = "a tone",
    rate: int = RATE,
    channels: int = 1,
    seed: int = 0,
    **format: Any,
) -> Path:
    """Write an audio file, and its caption as `.txt` unless that is None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds, rate, channels, 200 + 40 * seed, seed), rate, **format)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def keys(batches: Any) -> list[str]:
    """Keys of all items of these batches."""
    return [key for batch in batches for key in batch["keys"]]


def load(dataset: Any, workers: int) -> DataLoader:
    return DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=compress_for_worker)


def codes_of(item: int, num_frames: int) -> np.ndarray:
    """Codes `4 t` that encode the item, and the frame in two base-64 digits."""
    t = np.arange(num_frames)
    return np.stack(
        [np.full_like(t, item % 64), t % 64, t // 64, np.full_like(t, item // 64)]
    ).astype(np.uint16)


def write_shards(
    folder: Path,
    codec: str,
    counts: Sequence[int],
    num_frames: int = 100,
    seconds: Sequence[float] | None = None,
) -> Path:
    """Write a shard set in the designed format without our writer; item n is `item000n`.

    Args:
        folder: made if absent.
        codec: whose facts are stamped on it.
        counts: items in each shard.
        num_frames: of each item.
        seconds: true length of the audio of each item, as long as its codes if not given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries, number = [], 0
    for i, count in enumerate(counts):
        path = folder / f"shard-{i:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for _ in range(count):
                key = f"item{number:04d}"
                duration = num_frames / FRAME_RATE if seconds is None else seconds[number]
                codes = io.BytesIO()
                np.save(codes, codes_of(number, num_frames))
                about = {"key": key, "caption": f"caption {number}", "duration_s": duration}
                reference = io.BytesIO()
                np.savez(
                    reference,
                    embeddings=np.full((2, 200), number, np.float32),
                    tags=np.ones((2, 50), np.float32),
                )
                for name, content in (
                    ("codes.npy", codes.getvalue()),
                    ("json", json.dumps(about).encode()),
                    ("reference.npz", reference.getvalue()),
                ):
                    member = tarfile.TarInfo(f"{key}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                number += 1
        entry = {"name": path.name, "num_examples": count, "num_frames": count * num_frames}
        entries.append(entry | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    index = {
        "format": 1,
        "codec": load_codec(codec).facts.to_dict(),
        "num_examples": number,
        "shards": entries,
    }
    (folder / "index.json").write_text(json.dumps(index | {"skipped": [], "embedder": None}))
    return folder
