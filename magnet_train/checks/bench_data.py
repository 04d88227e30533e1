"""Speed of loading (against plain webdataset), of tokenizing (against the codec) and of start-up.

Uses synthetic data of realistic size in a temporary folder: 30 s of codes at 50 Hz with captions,
and stereo FLAC at 44.1 kHz.
"""

import contextlib
import gc
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import soundfile
import torch
from torch.utils.data import DataLoader

from magnet_train.checks.measure import BenchmarkResult, BenchOptions, result, timed
from magnet_train.codec.base import load_codec
from magnet_train.common.torchaudio_import import ensure_torchaudio_imports
from magnet_train.data.audio import read_audio
from magnet_train.data.pipeline import TrainingStream, compress_for_worker
from magnet_train.data.shards import ShardSet
from magnet_train.data.tokenize import TokenizeOptions, tokenize

BATCH_SIZE = 16
"""Examples per training batch."""
CROP_FRAMES = 1400
"""Frames of a random crop."""
ITEM_FRAMES = 1500
"""Frames of an item in the shards."""
PER_SHARD = 128
"""Examples per shard."""
CROP_S = 10.0
"""Seconds per tokenized crop."""
TOKENIZE_BATCH_SIZE = 2
"""Crops per batch in `tokenize`."""
NUM_BATCHES = 256
"""Batches per measurement."""
MANY = 10_000
FEW = 100
"""Number of shards in a large and a small set."""
ENCODEC_32KHZ: dict[str, Any] = {
    "sampling_rate": 32_000,
    "audio_channels": 1,
    "upsampling_ratios": [8, 5, 4, 4],
    "codebook_size": 2048,
    "hidden_size": 128,
    "codebook_dim": 128,
    "target_bandwidths": [2.2],
    "norm_type": "weight_norm",
    "use_causal_conv": False,
    "use_conv_shortcut": False,
    "pad_mode": "reflect",
    "normalize": False,
    "chunk_length_s": None,
}
"""Configuration of `facebook/encodec_32khz`, except for `num_filters`, which is 64 there."""


def loading(options: BenchOptions, limit: float) -> Iterator[BenchmarkResult]:
    """Batches from one data worker, compared with plain webdataset on the same shards.

    Also the time to the first batch with `MANY` shards, and the memory with `MANY` and `FEW`.
    """
    with TemporaryDirectory() as temporary:
        shards = _write_shards(Path(temporary) / "shards", 16)
        batches = [iter(_ours(shards)), iter(_webdataset(shards))]
        calls = [
            lambda loader=loader: deque(islice(loader, NUM_BATCHES), maxlen=0) for loader in batches
        ]
        ours, theirs = timed(calls, options.repeats, "cpu")
        examples = NUM_BATCHES * BATCH_SIZE
        settings: dict[str, Any] = {
            "examples": examples,
            "batch_size": BATCH_SIZE,
            "workers": 1,
            "num_frames": CROP_FRAMES,
        }
        settings["examples_per_s"] = examples / median(ours)
        settings["baseline_examples_per_s"] = examples / median(theirs)
        yield result(f"loading {examples} examples, one worker", settings, ours, theirs)
        del batches, calls

        many = _linked(shards, Path(temporary) / str(MANY), MANY)
        few = _linked(shards, Path(temporary) / str(FEW), FEW)
        (first,) = timed([lambda: next(iter(_ours(many)))], 3, "cpu")
        yield result(f"first batch of {MANY} shards", {"shards": MANY, "workers": 1}, first)

        seconds, peak = _memory_of_reading(many)
        few_seconds, few_peak = _memory_of_reading(few)
        name = f"memory of {MANY} shards over {FEW}"
        memory = {"peak_mb": peak, "baseline_peak_mb": few_peak, "ratio": peak / few_peak}
        yield result(name, {"examples": examples}, [seconds], [few_seconds], **memory)


def tokenizing(options: BenchOptions, limit: float) -> Iterator[BenchmarkResult]:
    """`tokenize` compared with its codec alone on the same batches in memory.

    The ratio is the share of the codec's speed; 1 means that reading audio costs nothing.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, codec_id, num_crops in (
            ("EnCodec", _encodec(folder), 6),
            ("demo codec", "demo", 48),
        ):
            source = _write_audio(folder / name, num_crops, CROP_S)
            codec = load_codec(codec_id)
            settings = {"crops": num_crops, "crop_s": CROP_S, "batch_size": TOKENIZE_BATCH_SIZE}
            calls = [
                partial(_tokenize, source, codec_id, count()),
                partial(_encode, codec, _batches(source, codec)),
            ]
            ours, alone = timed(calls, min(options.repeats, 3), "cpu")
            settings["times_real_time"] = num_crops * CROP_S / median(ours)
            yield result(f"tokenizing over codec alone, {name}", settings, ours, alone)


def _tokenize(source: Path, codec_id: str, number: Iterator[int]) -> None:
    out = source.with_name(f"{source.name} {next(number)}")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        tokenize(source, out, TokenizeOptions(codec_id, CROP_S, batch_size=TOKENIZE_BATCH_SIZE))


def _encode(codec: Any, batches: list[torch.Tensor]) -> None:
    for batch in batches:
        codec.encode(batch)


def _batches(source: Path, codec: Any) -> list[torch.Tensor]:
    """All crops of a folder, batched, `b channels t`."""
    facts = codec.facts
    length = round(CROP_S * facts.sample_rate)
    files = [
        read_audio(path, facts.sample_rate, facts.channels)
        for path in sorted(source.glob("*.flac"))
    ]
    crops = [crop for file in files for crop in torch.from_numpy(file).split(length, 1)]
    starts = range(0, len(crops), TOKENIZE_BATCH_SIZE)
    return [torch.stack(crops[i : i + TOKENIZE_BATCH_SIZE]) for i in starts]


def start(options: BenchOptions, limit: float) -> Iterator[BenchmarkResult]:
    """Seconds until a command prints its help, including imports."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}

    def call(*args: str) -> Callable[[], Any]:
        command = [sys.executable, "-m", "magnet_train", *args, "--help"]
        return lambda: subprocess.run(command, env=environment, check=True, capture_output=True)

    for args in ((), ("fit",)):
        (seconds,) = timed([call(*args)], min(options.repeats, 3), "cpu")
        yield result(" ".join(["start,", *args, "--help"]), {}, seconds)


# --- loading --------------------------------------------------------------------------------------


def _stream(folder: Path) -> TrainingStream:
    return TrainingStream(ShardSet.open(folder), CROP_FRAMES, BATCH_SIZE, seed=0)


def _ours(folder: Path) -> DataLoader:
    return DataLoader(
        _stream(folder), batch_size=None, num_workers=1, collate_fn=compress_for_worker
    )


def _webdataset(folder: Path) -> DataLoader:
    """A typical webdataset pipeline: shuffle, decode, crop at random, batch."""
    import webdataset

    rng = np.random.default_rng(0)

    def crop(sample: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        codes = sample["codes.npy"]
        start = rng.integers(codes.shape[1] - CROP_FRAMES + 1)
        piece = torch.from_numpy(codes[:, start : start + CROP_FRAMES].astype(np.int64))
        return piece, torch.ones(CROP_FRAMES, dtype=torch.bool), sample["json"]

    def collate(samples: list[Any]) -> dict[str, Any]:
        codes, valid, infos = zip(*samples, strict=True)
        captions = [info["caption"] for info in infos]
        return {
            "codes": torch.stack(codes),
            "valid": torch.stack(valid),
            "captions": captions,
            "infos": infos,
        }

    paths = sorted(map(str, folder.glob("*.tar")))
    stream: Any = webdataset.WebDataset(paths, shardshuffle=len(paths))  # type: ignore
    stream = (
        stream.shuffle(1000)
        .decode()
        .map(crop)
        .batched(BATCH_SIZE, collation_fn=collate, partial=False)
    )
    return DataLoader(stream.repeat(), batch_size=None, num_workers=1)


def _memory_of_reading(folder: Path) -> tuple[float, float]:
    """Seconds for `NUM_BATCHES` batches after opening a set, and peak MB of Python and NumPy."""
    gc.collect()
    tracemalloc.start()
    begin = time.perf_counter()
    deque(islice(_stream(folder), NUM_BATCHES), maxlen=0)
    seconds = time.perf_counter() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, peak / 1e6


def _write_shards(folder: Path, number: int) -> Path:
    """A set of shards with random codes, in the format of `tokenize`."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    entries = []
    for shard in range(number):
        path = folder / f"shard-{shard:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for item in range(PER_SHARD):
                key = f"track-{shard:04d}-{item:04d}_00000000"
                codes = io.BytesIO()
                np.save(codes, rng.integers(2048, size=(4, ITEM_FRAMES), dtype=np.uint16))
                about = {
                    "key": key,
                    "caption": "a slow waltz for flute and guitar in D major, warm and calm",
                    "source": f"album/{key}.flac",
                    "offset_s": 0.0,
                    "duration_s": ITEM_FRAMES / 50,
                    "codec": "none",
                    "codec_hash": "0" * 16,
                    "licence": "CC0-1.0",
                    "audio_sha256": "0" * 64,
                }
                for kind, content in (
                    ("codes.npy", codes.getvalue()),
                    ("json", json.dumps(about).encode()),
                ):
                    member = tarfile.TarInfo(f"{key}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        entries.append(_entry(path))
    return _write_index(folder, entries)


def _linked(shards: Path, folder: Path, number: int) -> Path:
    """A set of `number` shards that are links to one file."""
    folder.mkdir()
    original = next(iter(sorted(shards.glob("*.tar"))))
    entry = _entry(original)
    for shard in range(number):
        os.link(original, folder / f"shard-{shard:06d}.tar")
    return _write_index(
        folder, [entry | {"name": f"shard-{shard:06d}.tar"} for shard in range(number)]
    )


def _entry(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {
        "name": path.name,
        "num_examples": PER_SHARD,
        "num_frames": PER_SHARD * ITEM_FRAMES,
        "sha256": digest,
    }


def _write_index(folder: Path, entries: list[dict[str, Any]]) -> Path:
    codec = {
        "id": "none",
        "hash": "0" * 16,
        "num_codebooks": 4,
        "codebook_size": 2048,
        "frame_rate": 50.0,
    }
    (folder / "index.json").write_text(json.dumps({"format": 1, "codec": codec, "shards": entries}))
    return folder


# --- tokenizing -----------------------------------------------------------------------------------


def _encodec(folder: Path) -> str:
    """The published 32 kHz codec at half its width, with random weights; returns its folder."""
    ensure_torchaudio_imports()
    from transformers import EncodecConfig, EncodecModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = EncodecModel(EncodecConfig(**ENCODEC_32KHZ, num_filters=32))
        for layer in model.quantizer.layers:
            layer.codebook.embed.normal_()  # zero in a fresh model
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder / "codec")
    return str(folder / "codec")


def _write_audio(folder: Path, num_crops: int, crop_s: float) -> Path:
    """Clips of three crops each, with captions: two notes and some noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    seconds = np.arange(round(3 * crop_s * 44_100)) / 44_100
    for number in range(num_crops // 3):
        notes = 0.3 * np.sin(2 * np.pi * np.outer(seconds, (220 + number, 330 + number)))
        path = folder / f"clip{number:02d}.flac"
        soundfile.write(path, notes + 0.02 * rng.standard_normal(notes.shape), 44_100)
        path.with_suffix(".txt").write_text("two notes")
    return folder
