"""How fast the data side is: loading beside webdataset, tokenizing beside its codec, and the start of a command.

All of it runs on made-up data in a temporary folder, of the size of real data: 30 s of codes at 50 Hz with captions,
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
from itertools import count, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import soundfile
import torch
from torch.utils.data import DataLoader

from magnet_train.checks.measure import BenchOptions, Measured, timed
from magnet_train.codec.base import load_codec
from magnet_train.common.torchaudio_import import ensure_torchaudio_imports
from magnet_train.data.audio import read_audio
from magnet_train.data.pipeline import ShardSet, TrainingStream, packed
from magnet_train.data.tokenize import TokenizeOptions, tokenize

BATCH_SIZE = 16
"""Examples in a batch that a loader yields."""
CROP_FRAMES, ITEM_FRAMES = 1400, 1500
"""Frames of a random crop, and of what lies in the shards."""
PER_SHARD = 128
"""Examples in a shard."""
NUM_BATCHES = 256
"""Batches that are drawn at a time."""
MANY, FEW = 10_000, 100
"""Shards of a large set, and of one to compare it with."""
ENCODEC_32KHZ: dict[str, Any] = {
    "sampling_rate": 32_000, "audio_channels": 1, "upsampling_ratios": [8, 5, 4, 4], "codebook_size": 2048,
    "hidden_size": 128, "codebook_dim": 128, "target_bandwidths": [2.2], "norm_type": "weight_norm",
    "use_causal_conv": False, "use_conv_shortcut": False, "pad_mode": "reflect", "normalize": False,
    "chunk_length_s": None,
}  # fmt: skip
"""As `facebook/encodec_32khz` is configured, but for `num_filters`, which is 64 there."""


def loading(options: BenchOptions, limit: float) -> Iterator[Measured]:
    """Batches in this process from one loader process; webdataset does the same on the same shards.

    Then the time to the first batch of `MANY` shards, and the memory that reading them takes beside that of `FEW`.
    """
    with TemporaryDirectory() as temporary:
        shards = _write_shards(Path(temporary) / "shards", 16)
        batches = [iter(_ours(shards)), iter(_webdataset(shards))]
        calls = [lambda own=own: deque(islice(own, NUM_BATCHES), maxlen=0) for own in batches]
        own, twin = timed(calls, options.repeats, "cpu")
        examples = NUM_BATCHES * BATCH_SIZE
        settings = {"examples": examples, "batch_size": BATCH_SIZE, "workers": 1, "num_frames": CROP_FRAMES}
        yield _measured(
            f"loading {examples} examples, one worker", own, twin,
            settings | {"examples_per_s": examples / median(own), "twin_examples_per_s": examples / median(twin)},
        )  # fmt: skip
        del batches, calls

        many, few = (_linked(shards, Path(temporary) / str(n), n) for n in (MANY, FEW))
        first = timed([lambda: next(iter(_ours(many)))], 3, "cpu")[0]
        yield _measured(f"first batch of {MANY} shards", first, None, {"shards": MANY, "workers": 1})

        (seconds, mb), (few_seconds, few_mb) = (_held(folder) for folder in (many, few))
        yield Measured(
            f"memory of {MANY} shards over {FEW}", {"examples": examples}, seconds, seconds, seconds, mb,
            twin_median_s=few_seconds, twin_peak_mb=few_mb, ratio=mb / few_mb,
        )  # fmt: skip


def tokenizing(options: BenchOptions, limit: float) -> Iterator[Measured]:
    """All of `tokenize` beside its codec alone on the same crops, in memory already and in the same batches.

    The ratio is the share of the codec's own speed that is reached; 1 would be audio that costs nothing to read.
    """
    crop_s, batch_size = 10.0, 2
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, codec_name, num_crops in (("EnCodec", _encodec(folder), 6), ("demo codec", "demo", 48)):
            source = _write_audio(folder / name, num_crops, crop_s)
            codec, outs = load_codec(codec_name), count()
            facts = codec.facts
            files = (read_audio(path, facts.sample_rate, facts.channels) for path in sorted(source.glob("*.flac")))
            length = round(crop_s * facts.sample_rate)
            crops = [crop for file in files for crop in torch.from_numpy(file).split(length, 1)]
            groups = [torch.stack(crops[i : i + batch_size]) for i in range(0, len(crops), batch_size)]
            tokenize_options = TokenizeOptions(codec_name, crop_s, batch_size=batch_size)

            def whole(
                source: Path = source, outs: Iterator[int] = outs, how: TokenizeOptions = tokenize_options
            ) -> Any:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    return tokenize(source, folder / f"{source.name} {next(outs)}", how)

            def alone(codec: Any = codec, groups: list[torch.Tensor] = groups) -> Any:
                return [codec.encode(group) for group in groups]

            own, twin = timed([whole, alone], min(options.repeats, 3), "cpu")
            settings = {"crops": num_crops, "crop_s": crop_s, "batch_size": batch_size}
            settings |= {"times_real_time": num_crops * crop_s / median(own)}
            yield _measured(f"tokenizing over codec alone, {name}", own, twin, settings)


def start(options: BenchOptions, limit: float) -> Iterator[Measured]:
    """Seconds until a command's help is there, imports included."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}

    def call(*args: str) -> Callable[[], Any]:
        command = [sys.executable, "-m", "magnet_train", *args, "--help"]
        return lambda: subprocess.run(command, env=environment, check=True, capture_output=True)

    for args in ((), ("fit",)):
        seconds = timed([call(*args)], min(options.repeats, 3), "cpu")[0]
        yield _measured(" ".join(["start,", *args, "--help"]), seconds, None, {})


def _measured(name: str, own: list[float], twin: list[float] | None, settings: dict[str, Any]) -> Measured:
    middle = None if twin is None else median(twin)
    return Measured(
        name, settings, median(own), min(own), max(own), twin_median_s=middle,
        ratio=None if middle is None else middle / median(own),
    )  # fmt: skip


# --- loading ------------------------------------------------------------------------------------------------------


def _stream(folder: Path) -> TrainingStream:
    return TrainingStream(ShardSet.open(folder), CROP_FRAMES, BATCH_SIZE, seed=0)


def _ours(folder: Path) -> DataLoader:
    return DataLoader(_stream(folder), batch_size=None, num_workers=1, collate_fn=packed)


def _webdataset(folder: Path) -> DataLoader:
    """What one writes with webdataset: shards and examples shuffled, decoded, cropped at random, batched."""
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
        return {"codes": torch.stack(codes), "valid": torch.stack(valid), "captions": captions, "infos": infos}

    paths = sorted(map(str, folder.glob("*.tar")))
    stream: Any = webdataset.WebDataset(paths, shardshuffle=len(paths))  # type: ignore[attr-defined]
    stream = stream.shuffle(1000).decode().map(crop).batched(BATCH_SIZE, collation_fn=collate, partial=False)
    return DataLoader(stream.repeat(), batch_size=None, num_workers=1)


def _held(folder: Path) -> tuple[float, float]:
    """Seconds for `NUM_BATCHES` batches from the opening of a set on, and the most MB that Python and NumPy held."""
    gc.collect()
    tracemalloc.start()
    begin = time.perf_counter()
    deque(islice(_stream(folder), NUM_BATCHES), maxlen=0)
    seconds, (_, most) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return seconds, most / 1e6


def _write_shards(folder: Path, number: int) -> Path:
    """A set of shards as `tokenize` writes it, of random codes."""
    folder.mkdir()
    rng, entries = np.random.default_rng(0), []
    for shard in range(number):
        path = folder / f"shard-{shard:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for item in range(PER_SHARD):
                key, codes = f"track-{shard:04d}-{item:04d}_00000000", io.BytesIO()
                np.save(codes, rng.integers(2048, size=(4, ITEM_FRAMES), dtype=np.uint16))
                about = {
                    "key": key, "caption": "a slow waltz for flute and guitar in D major, warm and calm",
                    "source": f"album/{key}.flac", "offset_s": 0.0, "duration_s": ITEM_FRAMES / 50, "codec": "none",
                    "codec_hash": "0" * 16, "licence": "CC0-1.0", "audio_sha256": "0" * 64,
                }  # fmt: skip
                for kind, content in (("codes.npy", codes.getvalue()), ("json", json.dumps(about).encode())):
                    member = tarfile.TarInfo(f"{key}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        entries.append(_entry(path))
    return _write_index(folder, entries)


def _linked(shards: Path, folder: Path, number: int) -> Path:
    """A set of so many shards that are all one file under other names."""
    folder.mkdir()
    original = next(iter(sorted(shards.glob("*.tar"))))
    entry = _entry(original)
    for shard in range(number):
        os.link(original, folder / f"shard-{shard:06d}.tar")
    return _write_index(folder, [entry | {"name": f"shard-{shard:06d}.tar"} for shard in range(number)])


def _entry(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"name": path.name, "num_examples": PER_SHARD, "num_frames": PER_SHARD * ITEM_FRAMES, "sha256": digest}


def _write_index(folder: Path, entries: list[dict[str, Any]]) -> Path:
    codec = {"id": "none", "hash": "0" * 16, "num_codebooks": 4, "codebook_size": 2048, "frame_rate": 50.0}
    (folder / "index.json").write_text(json.dumps({"format": 1, "codec": codec, "shards": entries}))
    return folder


# --- tokenizing ---------------------------------------------------------------------------------------------------


def _encodec(folder: Path) -> str:
    """The published 32 kHz model at half its width, with random weights; returns its folder."""
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
    """Clips of three crops each, with captions: two notes and a little noise."""
    folder.mkdir()
    rng, seconds = np.random.default_rng(0), np.arange(round(3 * crop_s * 44_100)) / 44_100
    for number in range(num_crops // 3):
        notes = 0.3 * np.sin(2 * np.pi * np.outer(seconds, (220 + number, 330 + number)))
        path = folder / f"clip{number:02d}.flac"
        soundfile.write(path, notes + 0.02 * rng.standard_normal(notes.shape), 44_100)
        path.with_suffix(".txt").write_text("two notes")
    return folder
