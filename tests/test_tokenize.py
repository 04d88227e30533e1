"""Audio to shards: all file types, errors and interruptions."""

import contextlib
import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers_data import RATE, make_data_codec, tone, write_clip
from helpers_errors import refusal
from helpers_programs import LONGEST_S, wait_for
from tqdm import tqdm

from magnet_train.codec.base import Codec, load_codec
from magnet_train.common.errors import UserError
from magnet_train.data.audio import read_audio
from magnet_train.data.manifest import Clip
from magnet_train.data.plan import _clip_hash
from magnet_train.data.shards import ShardSet, read_shard
from magnet_train.data.tokenize import TokenizeOptions, prefetch, tokenize


@pytest.fixture
def run(codec: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Tokenize `tmp_path/in` into `tmp_path/out`, with two-second crops in shards of three."""

    def run(
        source: Path = tmp_path / "in", out: Path = tmp_path / "out", **options: Any
    ) -> dict[str, Any]:
        return tokenize(
            source,
            out,
            TokenizeOptions(**{"codec": codec, "crop_s": 2.0, "shard_size": 3} | options),
        )

    return run


def items(out: Path) -> list[Any]:
    """All items of a finished folder, in its order."""
    return [item for path in ShardSet.open(out).paths for item in read_shard(path)]


def leftovers(out: Path) -> list[Path]:
    """Unfinished files of a killed process."""
    return [*out.glob("*.tmp"), *out.glob("*.part")]


def shards(out: Path) -> dict[str, str]:
    """Finished files by name and content; there are no unfinished files among them."""
    assert not leftovers(out)
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in [*out.glob("*.tar"), out / "index.json"]
    }


# --- files ----------------------------------------------------------------------------------------

FORMATS = {
    "wav": {"subtype": "PCM_16"},
    "wav-24": {"subtype": "PCM_24"},
    "wav-float": {"subtype": "FLOAT"},
    "wav-8": {"subtype": "PCM_U8"},
    "flac": {},
    "ogg": {},
    "mp3": {},
    "aiff": {},
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (44_100, 2), (22_050, 1), (48_000, 2)])
def test_every_format_rate_and_channel_count(kind: str, rate: int, channels: int, tmp_path: Path):
    path = tmp_path / f"a.{kind.split('-')[0]}"
    soundfile.write(path, tone(1.5, rate, channels, hz=440), rate, **FORMATS[kind])
    wav = read_audio(path, 16_000, 1)
    assert wav.dtype == np.float32 and wav.shape[0] == 1 and np.isfinite(wav).all()
    assert wav.shape[1] == pytest.approx(1.5 * 16_000, abs=0.1 * 16_000)  # mp3 pads
    spectrum = np.abs(np.fft.rfft(wav[0, :16_000]))
    # A wrong rate would change the pitch.
    assert spectrum.argmax() == pytest.approx(440, abs=1)
    assert wav[0].std() == pytest.approx(0.3 / 2**0.5, rel=0.1)


def test_channels_are_averaged_or_copied(tmp_path: Path):
    """The mean is numpy's to the bit; else codes would differ within a set begun earlier."""
    left, right = tone(1, hz=300)[:, 0], tone(1, hz=900)[:, 0]
    both = np.stack([left, right], 1)
    soundfile.write(tmp_path / "s.wav", both, RATE, "FLOAT")
    assert np.array_equal(read_audio(tmp_path / "s.wav", RATE, 1)[0], both.mean(1))
    assert np.allclose(read_audio(tmp_path / "s.wav", RATE, 2), np.stack([left, right]), atol=1e-6)
    soundfile.write(tmp_path / "m.wav", left, RATE, "FLOAT")
    assert np.array_equal(*read_audio(tmp_path / "m.wav", RATE, 2))
    soundfile.write(tmp_path / "six.wav", np.stack([left] * 5 + [right], 1), RATE, "FLOAT")
    assert np.allclose(
        read_audio(tmp_path / "six.wav", RATE, 1)[0], (5 * left + right) / 6, atol=1e-6
    )


def broken_files(folder: Path) -> dict[str, str]:
    """Unusable files, and a word that must be in the reason."""
    whole = {
        s: write_clip(folder / f"whole.{s}").read_bytes() for s in ("wav", "flac", "mp3", "ogg")
    }
    content = {
        "zero.wav": (b"", ""),
        "text.wav": (b"this is no audio at all\n" * 50, "unreadable"),
        "noise.mp3": (bytes(range(256)) * 40, ""),
        "head.flac": (whole["flac"][:60], ""),
        "cut.flac": (whole["flac"][: len(whole["flac"]) // 2], ""),
        "cut.mp3": (whole["mp3"][: len(whole["mp3"]) // 2], "truncated"),
        "cut.ogg": (whole["ogg"][: len(whole["ogg"]) // 2], ""),
    }
    for name, (data, _) in content.items():
        (folder / name).write_bytes(data)
    nothing, bad = np.zeros((0, 1), np.float32), tone(3)
    soundfile.write(folder / "nothing.wav", nothing, RATE)
    bad[100] = np.nan
    soundfile.write(folder / "nan.wav", bad, RATE, "FLOAT")
    bad[100] = np.inf
    soundfile.write(folder / "inf.wav", bad, RATE, "FLOAT")
    reasons = {name: word for name, (_, word) in content.items()}
    reasons |= {"nothing.wav": "empty", "nan.wav": "NaN", "inf.wav": "infinite"}
    for name in reasons:
        (folder / name).with_suffix(".txt").write_text("a caption")
    for suffix in whole:
        (folder / f"whole.{suffix}").unlink()
    return reasons


def test_broken_files_are_left_out_and_listed(
    run: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture
):
    reasons = broken_files(tmp_path / "in")
    write_clip(tmp_path / "in/good.wav", 4, "good")
    index = run()
    assert [item["info"]["source"] for item in items(tmp_path / "out")] == ["good.wav", "good.wav"]
    listed = {entry["file"]: entry["reason"] for entry in index["skipped"]}
    assert listed.keys() == reasons.keys()
    terminal = "".join(capsys.readouterr())
    for name, word in reasons.items():
        assert name in listed[name] and word in listed[name] and "\n" not in listed[name]
        assert name in terminal


def test_truncated_wav_is_noticed(tmp_path: Path):
    """libsndfile reads it as a short file."""
    for suffix in ("wav", "aiff"):
        path = write_clip(tmp_path / f"a.{suffix}")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert "truncated" in refusal(read_audio, path, RATE, 1)


def test_only_broken_files(run: Callable[..., dict], tmp_path: Path):
    write_clip(tmp_path / "in/a.wav").write_bytes(b"no audio")
    assert "none of 1 files" in refusal(run)
    assert not (tmp_path / "out/index.json").exists()


def test_silent_and_short(run: Callable[..., dict], tmp_path: Path):
    loud, quiet = tone(2), np.zeros((2 * RATE, 1), np.float32)
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in/a.wav", np.concatenate([loud, quiet, loud]), RATE)
    soundfile.write(tmp_path / "in/silent.wav", quiet, RATE)
    soundfile.write(tmp_path / "in/short.wav", loud[: RATE // 2], RATE)
    for name in ("a", "silent", "short"):
        (tmp_path / f"in/{name}.txt").write_text(name)
    index = run()
    kept = [(item["info"]["source"], item["info"]["offset_s"]) for item in items(tmp_path / "out")]
    assert kept == [("a.wav", 0.0), ("a.wav", 4.0)]
    listed = [(entry["file"], entry["reason"]) for entry in index["skipped"]]
    assert sorted(name for name, _ in listed) == ["a.wav", "short.wav", "silent.wav"]
    assert all(("0.50 s" if name == "short.wav" else "silent") in reason for name, reason in listed)


# --- captions -------------------------------------------------------------------------------------


def test_captions_beside_the_files(run: Callable[..., dict], tmp_path: Path):
    """As test_manifest.py states; here they reach the shards, and fields with them."""
    write_clip(tmp_path / "in/deep/er/a.wav", 2, "from\n  text ")
    about = {"caption": "from caption", "key": "G minor", "tempo_bpm": 70, "instruments": ["oboe"]}
    write_clip(tmp_path / "in/b.flac", 2, None)
    (tmp_path / "in/b.json").write_text(json.dumps(about | {"licence": "CC0"}))
    write_clip(tmp_path / "in/e.wav", 2, None)
    index = run(caption_from="files")
    found = {item["info"]["source"]: item["info"] for item in items(tmp_path / "out")}
    captions = {name: info["caption"] for name, info in found.items()}
    assert captions == {"deep/er/a.wav": "from text", "b.flac": "from caption"}
    b = found["b.flac"]
    assert (b["music_key"], b["tempo_bpm"], b["instruments"]) == ("G minor", 70, ["oboe"])
    assert b["key"] != "G minor" and b["licence"] == "CC0"
    (skipped,) = index["skipped"]
    assert skipped["file"] == "e.wav" and "no caption" in skipped["reason"]


def test_no_captions_at_all(run: Callable[..., dict], tmp_path: Path):
    write_clip(tmp_path / "in/a.wav", caption=None)
    write_clip(tmp_path / "in/b.wav", caption="  \n")
    text = refusal(run, caption_from="tags")
    assert "no captions" in text and "a.txt" in text and str(tmp_path / "in") in text
    assert not (tmp_path / "out").exists()


def test_captions_from_tags_and_names(run: Callable[..., dict], tmp_path: Path):
    """WAV, Vorbis and ID3 tags; names without track numbers; numbers are no captions."""
    folder = tmp_path / "in"
    for name in ("a.wav", "b.flac", "c.mp3", "d.ogg", "07 - slow_Waltz.wav", "12.wav"):
        path = write_clip(folder / name, 2, None)
        if len(Path(name).stem) == 1:
            wav = tone(2)
            with soundfile.SoundFile(path, "w", RATE, 1) as file:
                file.title, file.genre, file.comment = path.stem, "Jazz", "jazz"
                file.write(wav)
    index = run()
    found = {i["info"]["source"]: i["info"] for i in items(tmp_path / "out")}
    captions = {name: (info["caption"], info["caption_from"]) for name, info in found.items()}
    expected = {
        f"{stem}{suffix}": (f"{stem}, Jazz", "tags")
        for stem, suffix in zip("abcd", (".wav", ".flac", ".mp3", ".ogg"), strict=True)
    }
    assert captions == expected | {"07 - slow_Waltz.wav": ("slow Waltz", "name")}
    assert [entry["file"] for entry in index["skipped"]] == ["12.wav"]


def test_validation_is_split_by_file_and_added_files_move_none(
    run: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture
):
    def sources(split: str) -> set[str]:
        return {i["info"]["source"] for i in items(tmp_path / "out" / split)}

    for i in range(6):
        write_clip(tmp_path / f"in/{i}.wav", 4, seed=i)
    least = re.search(r"give at least (0\.\d+)", refusal(run, validation=1e-4))
    assert least
    share = max(0.3, float(least[1]))
    run(validation=share, crop_s=3.0, min_s=1.0)
    printed = capsys.readouterr().out
    assert "fit --model.init_from MODEL --data.train" in printed  # not the demo's codec
    assert re.findall(r"(?m)^(reading|encoding) ", printed) == ["reading", "encoding"] * 2
    before = sources("train"), sources("validation")
    assert before[0] and before[1] and not before[0] & before[1]
    assert before[0] | before[1] == {f"{i}.wav" for i in range(6)}
    found = items_with_references(tmp_path / "out/validation")
    assert all(i["reference"] is not None and i["codes"].shape[1] == 150 for i in found)
    for i in range(6, 9):
        write_clip(tmp_path / f"in/{i}.wav", 4, seed=i)
    run(validation=share, crop_s=3.0, min_s=1.0)
    assert before[0] <= sources("train") and before[1] <= sources("validation")
    assert "0.5" in refusal(run, validation=0.6)


def test_names_of_all_kinds_give_different_keys(run: Callable[..., dict], tmp_path: Path):
    names = "a/b.wav a-b.wav a/b.flac 日本語.wav 中文.wav x.y.z.wav Zoë/ü.ogg A/B.wav".split()
    names += ["with space.wav", f"{'very-long-' * 12}a.wav", f"{'very-long-' * 12}b.wav"]
    for i, name in enumerate(names):
        write_clip(tmp_path / "in" / name, 2, name, seed=i)
    run()
    found = [item["info"] for item in items(tmp_path / "out")]
    assert sorted(info["source"] for info in found) == sorted(names)
    # b.wav and b.flac share b.txt, which was written last for the flac.
    shared = ("a/b.wav", "a/b.flac")
    assert all(info["caption"] == info["source"] for info in found if info["source"] not in shared)
    keys = {info["key"] for info in found}
    assert len(keys) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", key) for key in keys)


def manifest(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "list.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_manifest(run: Callable[..., dict], tmp_path: Path):
    absolute = str(write_clip(tmp_path / "elsewhere/b.wav", 2, None))
    write_clip(tmp_path / "in/sub/ä.wav", 2, None)
    one = {"path": "sub/ä.wav", "caption": "one, quoted", "mood": "calm"}
    run(manifest(tmp_path / "in", [one, {"path": absolute, "caption": "two", "mood": ""}]))
    first, second = (item["info"] for item in items(tmp_path / "out"))
    assert (
        first.items() >= {"caption": one["caption"], "mood": "calm", "source": one["path"]}.items()
    )
    assert second["caption"] == "two" and "mood" not in second


def test_manifest_with_a_missing_file(run: Callable[..., dict], tmp_path: Path):
    write_clip(tmp_path / "in/a.wav", 2)
    rows = [{"path": "gone.wav", "caption": "x"}, {"path": "a.wav", "caption": "y"}]
    rows += [{"path": "https://key:S3CRET@host/b.wav?signature=S3CRET", "caption": "z"}]
    index = run(manifest(tmp_path / "in", rows))
    assert index["num_examples"] == 1
    names = [entry["file"] for entry in index["skipped"]]
    assert names == ["gone.wav", "https://***@host/b.wav?***"] and "S3CRET" not in str(index)


# --- what lies in the shards ----------------------------------------------------------------------


def test_crops_cover_the_clip(run: Callable[..., dict], codec: str, tmp_path: Path):
    """Codes depend only on the crop and not on the batch; the last crop has its true length."""
    write_clip(tmp_path / "in/a.wav", 7.3, seed=1, subtype="FLOAT")
    write_clip(tmp_path / "in/b.wav", 5.0, seed=2, subtype="FLOAT")
    index = run(split="train")
    found = items(tmp_path / "out")
    crops = [
        (item["info"]["source"], item["info"]["offset_s"], item["info"]["duration_s"])
        for item in found
    ]
    a = [
        ("a.wav", 0.0, 2.0),
        ("a.wav", 2.0, 2.0),
        ("a.wav", 4.0, 2.0),
        ("a.wav", 6.0, pytest.approx(1.3)),
    ]
    assert crops == [*a, ("b.wav", 0.0, 2.0), ("b.wav", 2.0, 2.0), ("b.wav", 4.0, 1.0)]
    network = load_codec(codec)
    for item in found:
        info, codes = item["info"], item["codes"]
        whole = read_audio(tmp_path / "in" / info["source"], RATE, 1)
        wav = whole[:, round(info["offset_s"] * RATE) :][:, : 2 * RATE]
        assert info["audio_sha256"] == hashlib.sha256(wav.tobytes()).hexdigest()
        assert codes.dtype == np.uint16 and codes.shape == (4, -(-wav.shape[1] // 160))
        assert np.array_equal(codes, network.encode(torch.from_numpy(wav[None]))[0].numpy())
        assert (info["codec"], info["codec_hash"]) == (network.facts.id, network.facts.hash)
    assert [entry["name"] for entry in index["shards"]] == [f"train-{i:06d}.tar" for i in range(3)]
    assert [entry["num_examples"] for entry in index["shards"]] == [3, 3, 1]
    assert index["num_examples"] == 7
    assert index["num_frames"] == sum(item["codes"].shape[1] for item in found)
    assert index["hours"] == pytest.approx(12.3 / 3600)
    assert index["codec"] == network.facts.to_dict()
    assert (index["crop_s"], index["hop_s"], index["skipped"]) == (2.0, 2.0, [])
    for entry in index["shards"]:
        content = (tmp_path / "out" / entry["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]


@pytest.mark.parametrize(
    ("seconds", "crop_s", "hop_s", "starts"),
    [(9, 2.0, 3.5, [0.0, 3.5, 7.0]), (5, 4.0, 0.5, [0.0, 0.5, 1.0])],
)
def test_hop_between_crops(
    seconds: float, crop_s: float, hop_s: float, starts: list[float], run: Any, tmp_path: Path
):
    """The last crop ends with the clip."""
    write_clip(tmp_path / "in/a.wav", seconds)
    run(crop_s=crop_s, hop_s=hop_s)
    assert [item["info"]["offset_s"] for item in items(tmp_path / "out")] == starts


def test_webdataset_reads_our_shards(run: Callable[..., dict], tmp_path: Path):
    """Keys without dots, and consecutive members: webdataset reads the same examples."""
    import webdataset

    write_clip(tmp_path / "in/a.b.wav", 5, "a tone")
    run()
    paths = [str(path) for path in ShardSet.open(tmp_path / "out").paths]
    theirs = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    ours = items(tmp_path / "out")
    assert [sample["__key__"] for sample in theirs] == [item["info"]["key"] for item in ours]
    for sample, item in zip(theirs, ours, strict=True):
        assert np.array_equal(sample["codes.npy"], item["codes"]) and sample["json"] == item["info"]


def test_references_of_the_original_audio(run: Callable[..., dict], tmp_path: Path):
    from magnet_train.metrics.networks.musicnn import load_musicnn

    path = write_clip(tmp_path / "in/a.wav", 10, rate=16_000, seed=3, subtype="FLOAT")
    run(crop_s=4.0, embedder="musicnn")
    network = load_musicnn()
    *found, too_short = items_with_references(tmp_path / "out")
    assert too_short["reference"] is None
    for item, first in zip(found, (0, 4), strict=True):
        wav = torch.from_numpy(read_audio(path, RATE, 1)[0, first * RATE :][: 4 * RATE])
        heard = network(network.resample(wav, RATE))
        assert torch.equal(torch.as_tensor(item["reference"]["embeddings"]), heard.embeddings)
        assert torch.equal(torch.as_tensor(item["reference"]["tags"]), heard.tags)
        assert item["info"]["embedder"] == network.id
        assert item["info"]["embedder_hash"] == network.hash


def items_with_references(out: Path) -> list[Any]:
    return [
        item for path in ShardSet.open(out).paths for item in read_shard(path, with_references=True)
    ]


# --- reading ahead --------------------------------------------------------------------------------


def counted(begun: list[int], threads: set[str], fails_at: int = 1000) -> Iterator[int]:
    for number in range(20):
        begun.append(number)
        threads.add(threading.current_thread().name)
        if number == fails_at:
            raise UserError("as planned")
        yield number


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_prefetched_items_are_in_order_and_bounded():
    begun, threads = [], set()
    items = prefetch(counted(begun, threads), 3)
    assert next(items) == 0
    wait_for(lambda: len(begun) >= 4, "items")  # one in use and three ahead
    time.sleep(0.1)
    assert len(begun) == 4
    assert list(items) == list(range(1, 20)) and begun == list(range(20))
    assert threading.current_thread().name not in threads and len(threads) == 1
    assert list(prefetch(iter(()), 3)) == []


def test_an_error_of_prefetching_is_raised_at_its_item():
    begun: list[int] = []
    items = prefetch(counted(begun, set(), fails_at=5), 3)
    assert [next(items) for _ in range(5)] == list(range(5))
    assert refusal(next, items) == "as planned" and begun == list(range(6))


def test_a_consumer_that_stops_or_fails_leaves_no_thread():
    for stop in (lambda items: items.close(), lambda items: items.throw(OSError(28, "full"))):
        begun: list[int] = []
        items = prefetch(counted(begun, set()), 3)
        next(items)
        with contextlib.suppress(OSError):
            stop(items)
        wait_for(lambda: not readers(), "the end of the thread")
        assert len(begun) <= 4


def test_a_process_ends_though_items_are_being_made(python: str):
    code = "from itertools import count\nfrom magnet_train.data.tokenize import prefetch\n"
    code += "items = prefetch(count(), 3); next(items); raise SystemExit(7)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([python, "-c", code], env=environment, timeout=LONGEST_S)
    assert done.returncode == 7


def test_a_failure_of_the_codec_ends_the_reading(
    run: Callable[..., dict], tmp_path: Path, monkeypatch: Any
):
    """Finished shards remain, and the same call continues from them."""
    many_clips(tmp_path / "in", 4)
    run(out=tmp_path / "expected")
    calls: list[int] = []
    encode = Codec.encode

    def failing(self: Codec, wav: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        calls.append(len(wav))
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return encode(self, wav, lengths)

    monkeypatch.setattr(Codec, "encode", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        run()
    monkeypatch.undo()
    assert not (tmp_path / "out/index.json").exists()
    assert not list((tmp_path / "out").glob("*.tmp"))
    run()
    assert shards(tmp_path / "out") == shards(tmp_path / "expected")


# --- interruptions --------------------------------------------------------------------------------


def many_clips(folder: Path, number: int) -> Path:
    for i in range(number):
        write_clip(folder / f"clip{i:02d}.flac", 5 + i % 3, f"tone {i}", seed=i)
    return folder


def start(*args: Any, target: Callable[..., None] | None = None) -> Any:
    """`tokenize` in a new process with imported modules."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=target or tokenize_quietly, args=args)
    process.start()
    return process


def tokenize_quietly(source: Path, out: Path, options: TokenizeOptions) -> None:
    # tqdm's own lock is shared by forked processes; a killed one would hold it for ever.
    tqdm.set_lock(threading.RLock())
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    tokenize(source, out, options)


@pytest.fixture(scope="module")
def undisturbed(
    codec: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TokenizeOptions, dict[str, str]]:
    """Ten clips, the options, and the output of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    options = TokenizeOptions(codec=codec, crop_s=2.0, shard_size=3)
    source = many_clips(folder / "in", 10)
    tokenize(source, folder / "out", options)
    return source, options, shards(folder / "out")


def tokenize_killed_at_a_move(move: int, source: Path, out: Path, options: TokenizeOptions) -> None:
    """Killed at the n-th rename of a finished temporary file."""
    moves = itertools.count()
    replace = os.replace
    os.replace = lambda *paths: (
        os.kill(os.getpid(), signal.SIGKILL) if next(moves) == move else replace(*paths)
    )
    tokenize_quietly(source, out, options)


@pytest.mark.parametrize("move", ["plan", "shard", "report", "index"])
def test_killed_as_a_file_is_moved_into_place(move: str, undisturbed: Any, tmp_path: Path):
    source, options, expected = undisturbed
    # Two per shard, and one each at start and end.
    place = {"plan": 0, "shard": 1, "report": 2, "index": 2 * len(expected) - 1}[move]
    process = start(place, source, tmp_path, options, target=tokenize_killed_at_a_move)
    process.join()
    assert process.exitcode == -signal.SIGKILL and leftovers(tmp_path)
    process = start(source, tmp_path, options)
    process.join()
    assert process.exitcode == 0 and shards(tmp_path) == expected


def test_two_processes_share_a_folder(undisturbed: Any, tmp_path: Path):
    source, options, expected = undisturbed
    processes = [start(source, tmp_path, options) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert shards(tmp_path) == expected


def test_a_file_system_without_locks_is_named(undisturbed: Any, tmp_path: Path, monkeypatch: Any):
    def flock(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    source, options, expected = undisturbed
    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match="this file system has no locks"):
        tokenize(source, tmp_path, options)
    assert shards(tmp_path) == expected


def test_a_damaged_or_missing_shard_is_made_again(run: Callable[..., dict], tmp_path: Path):
    write_clip(tmp_path / "in/a.wav", 12)
    run()
    out = tmp_path / "out"
    expected = shards(out)
    for damage in (lambda p: p.write_bytes(p.read_bytes()[:2000]), lambda p: p.unlink()):
        damage(out / "shard-000001.tar")
        untouched = (out / "shard-000000.tar").stat().st_mtime_ns
        run()
        assert shards(out) == expected
        assert (out / "shard-000000.tar").stat().st_mtime_ns == untouched


@pytest.mark.parametrize("change", ["option", "codec", "caption", "gone"])
def test_another_input_into_the_same_folder(change: str, run: Callable[..., dict], tmp_path: Path):
    write_clip(tmp_path / "in/a.wav", 5)
    write_clip(tmp_path / "in/b.wav", 5)
    run()
    expected = shards(tmp_path / "out")
    options: dict[str, Any] = {}
    if change == "option":
        options = {"crop_s": 1.0}
    elif change == "codec":
        options = {"codec": make_data_codec(tmp_path / "codec", seed=1)}
    elif change == "caption":
        (tmp_path / "in/a.txt").write_text("another caption")
    else:
        (tmp_path / "in/b.wav").unlink()
    text = refusal(run, **options)
    assert str(tmp_path / "out") in text and "empty folder" in text
    assert shards(tmp_path / "out") == expected


def test_batch_size_changes_nothing(run: Callable[..., dict], tmp_path: Path):
    many_clips(tmp_path / "in", 4)
    for number in range(12):  # short ones, which share batches
        write_clip(tmp_path / f"in/short{number:02d}.wav", 0.3 + number % 3 / 10, seed=number)
    run(batch_size=1)
    run(out=tmp_path / "two", batch_size=3)
    assert shards(tmp_path / "out") == shards(tmp_path / "two")


def test_full_disk(run: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Finished shards remain; after freeing space the same call completes the set."""
    write_clip(tmp_path / "in/a.wav", 16)
    run(out=tmp_path / "expected")
    real, calls = os.fsync, []

    def fsync(file: int) -> None:
        calls.append(file)
        if len(calls) >= 2:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    assert "disk is full" in refusal(run)
    monkeypatch.undo()
    assert not (tmp_path / "out/index.json").exists()
    assert not list((tmp_path / "out").rglob("*.tar.tmp"))
    run()
    assert shards(tmp_path / "out") == shards(tmp_path / "expected")


def tokenize_stopped_in_a_shard(source: Path, out: Path, options: TokenizeOptions) -> None:
    """Stops with a shard written but not renamed, and its lock held."""
    real, stops = os.fsync, [True]

    def fsync(file: int) -> None:
        if os.readlink(f"/proc/self/fd/{file}").endswith(".tar.tmp") and stops and stops.pop():
            os.kill(os.getpid(), signal.SIGSTOP)
        real(file)

    os.fsync = fsync
    tokenize_quietly(source, out, options)


@pytest.mark.slow
def test_killed_on_the_command_line(codec: str, python: str, tmp_path: Path):
    """`python -m magnet_train tokenize` on two processes, killed together after one shard."""
    many_clips(tmp_path / "in", 24)
    command = [python, *f"-m magnet_train tokenize {tmp_path}/in --out {tmp_path}/out".split()]
    command += ["--codec", codec, "--crop_s", "2", "--shard_size", "4", "--processes", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(
        lambda: list((tmp_path / "out").glob("*.tar")) != [] or process.poll() is not None,
        "a shard",
    )
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "out/index.json").exists()
    options = TokenizeOptions(codec=codec, crop_s=2.0, shard_size=4)
    tokenize(tmp_path / "in", tmp_path / "out", options)
    tokenize(tmp_path / "in", tmp_path / "alone", options)
    assert shards(tmp_path / "out") == shards(tmp_path / "alone")


# --- found wrong once -----------------------------------------------------------------------------


def test_two_captions_for_one_file(run: Callable[..., dict], tmp_path: Path):
    write_clip(tmp_path / "in/a.wav", 2, None)
    rows = [{"path": "a.wav", "caption": "one"}, {"path": "a.wav", "caption": "two"}]
    assert run(manifest(tmp_path / "in", rows))["num_examples"] == 2
    assert [item["info"]["caption"] for item in items(tmp_path / "out")] == ["one", "two"]


def test_the_same_codec_and_folder_under_other_paths(
    run: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_clip(tmp_path / "in/a.wav", 5)
    run()
    expected = shards(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    run(Path("in"), codec=make_data_codec(tmp_path / "copy"))
    assert shards(tmp_path / "out") == expected


def test_changed_audio_is_noticed(run: Callable[..., dict], tmp_path: Path):
    write_clip(tmp_path / "in/a.wav", 5)
    run()
    for changed in ({"subtype": "FLOAT"}, {"seed": 1}):  # the second has the size of the first
        write_clip(tmp_path / "in/a.wav", 5, **changed)
        assert "empty folder" in refusal(run)


def test_one_changed_byte_of_a_file_changes_its_hash(tmp_path: Path):
    clip = Clip(tmp_path / "a.wav", "a.wav")
    size = 3 * 10**6
    content = np.random.default_rng(0).bytes(size)
    found = set()
    for place in (0, size // 3, size // 2 + 12345, size - 1):
        for version in (content, content[:place] + b"?" + content[place + 1 :]):
            clip.path.write_bytes(version)
            found.add(_clip_hash(clip, {}))
    assert len(found) == 5


def test_new_files_are_appended_and_those_that_came_back(run: Callable[..., dict], tmp_path: Path):
    """Existing shards are unchanged, and nothing is encoded twice."""
    write_clip(tmp_path / "in/b.wav", 5)
    bad = write_clip(tmp_path / "in/gone.wav", 5, seed=1)
    content = bad.read_bytes()
    bad.write_bytes(content[:50])
    first = run()
    assert first["num_examples"] == 3 and [e["file"] for e in first["skipped"]] == ["gone.wav"]
    before = shards(tmp_path / "out")
    bad.write_bytes(content)
    write_clip(tmp_path / "in/a.wav", 5, seed=2)
    index = run()
    after = shards(tmp_path / "out")
    assert index["num_examples"] == 9
    assert index["skipped"] == []
    assert index["num_examples"] == len(items(tmp_path / "out"))
    assert {k: v for k, v in before.items() if k != "index.json"}.items() <= after.items()
    assert run() == index and shards(tmp_path / "out") == after


def test_a_file_that_fails_while_it_is_encoded_is_tried_again(
    run, tmp_path: Path, monkeypatch: Any
):
    write_clip(tmp_path / "in/a.wav", 4)
    write_clip(tmp_path / "in/b.wav", 4, seed=1)
    real = read_audio

    def failing(path: Path, *args: Any) -> np.ndarray:
        if path.name == "b.wav":
            raise UserError(f"{path}: unreadable (Input/output error)")
        return real(path, *args)

    monkeypatch.setattr("magnet_train.data.tokenize.read_audio", failing)
    index = run()
    assert index["num_examples"] == 2 and "Input/output" in index["skipped"][0]["reason"]
    monkeypatch.undo()
    assert run()["num_examples"] == 4 and run()["skipped"] == []


def test_segments_are_clips_of_their_own(run: Callable[..., dict], tmp_path: Path):
    write_clip(tmp_path / "in/a.wav", 9, None)
    rows = [
        {"path": "a.wav", "offset": o, "duration": 3.0, "text": str(o)} for o in (0.0, 3.0, 6.0)
    ]
    run(manifest(tmp_path / "in", rows), crop_s=4.0)
    found = [item["info"] for item in items(tmp_path / "out")]
    parts = [(info["caption"], info["offset_s"], info["duration_s"]) for info in found]
    assert parts == [("0.0", 0.0, 3.0), ("3.0", 3.0, 3.0), ("6.0", 6.0, 3.0)]


def test_shards_from_elsewhere_are_not_overwritten(run: Callable[..., dict], tmp_path: Path):
    write_clip(tmp_path / "in/a.wav", 5)
    run(out=tmp_path / "first")
    (tmp_path / "out").mkdir()
    for path in [*(tmp_path / "first").glob("*.tar"), tmp_path / "first/index.json"]:
        (tmp_path / "out" / path.name).write_bytes(path.read_bytes())
    write_clip(tmp_path / "other/b.wav", 5)
    expected = shards(tmp_path / "out")
    assert "empty folder" in refusal(run, tmp_path / "other")
    assert shards(tmp_path / "out") == expected


def test_out_is_a_file(run: Callable[..., dict], tmp_path: Path):
    write_clip(tmp_path / "in/a.wav", 5)
    (tmp_path / "out").write_text("")
    assert str(tmp_path / "out") in refusal(run)


def test_a_waiting_process_finishes_the_shards_of_a_killed_one(undisturbed: Any, tmp_path: Path):
    source, options, expected = undisturbed
    first = start(source, tmp_path, options, target=tokenize_stopped_in_a_shard)
    wait_for(
        lambda: Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T",
        "its stop",
    )
    second = start(source, tmp_path, options)
    second.join(5)
    assert second.exitcode is None and not (tmp_path / "index.json").exists()
    first.kill()
    first.join()
    second.join()
    assert second.exitcode == 0 and shards(tmp_path) == expected


def test_a_file_is_listed_once(run: Callable[..., dict], tmp_path: Path):
    path = write_clip(tmp_path / "in/a.mp3", 20)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    write_clip(tmp_path / "in/b.wav", 2)
    assert [entry["file"] for entry in run()["skipped"]] == ["a.mp3"]


def test_mixtures_are_sums_of_two_files_with_both_captions(run, codec, tmp_path):
    for i, caption in enumerate(("a dog barks.", "rain", "a door")):
        path = write_clip(tmp_path / "in" / f"{i}.wav", 4.0, None, seed=i)
        path.with_suffix(".json").write_text(
            json.dumps({"caption": caption, "bpm": 90, "licence": f"L{i}"})
        )
    index = run(mixtures=1.0)
    found = items(tmp_path / "out")
    plain, mixed = ([i for i in found if ("mixed_with" in i["info"]) is m] for m in (False, True))
    assert index["num_examples"] == 12 and len(plain) == len(mixed) == 6
    of = {i["info"]["source"]: i["info"]["caption"] for i in plain}
    loaded = load_codec(codec)
    for item in mixed:
        info, part = item["info"], item["info"]["mixed_with"]
        assert part["source"] != info["source"] and abs(part["snr_db"]) <= 5 and "bpm" not in info
        assert info["caption"] == f"{of[info['source']].rstrip('.')}, {of[part['source']]}"
        assert info["licence"] == ", ".join(
            sorted({f"L{info['source'][0]}", f"L{part['source'][0]}"})
        )
        one, two = (
            read_audio(tmp_path / "in" / x["source"], RATE, 1)[:, round(x["offset_s"] * RATE) :][
                :, : 2 * RATE
            ]
            for x in (info, part)
        )
        level = np.sqrt(np.mean(one**2) / np.mean(two**2)) * 10 ** (-part["snr_db"] / 20)
        wav = one + level * two
        wav = wav / max(1.0, np.abs(wav).max())
        codes = loaded.encode(torch.from_numpy(wav.astype(np.float32))[None])[0].numpy()
        assert (codes == item["codes"]).mean() > 0.99  # a rounding may tip a code
    first = shards(tmp_path / "out")
    run(out=tmp_path / "again", mixtures=1.0)
    assert {
        k: v for k, v in shards(tmp_path / "again").items() if k != "index.json"
    }.items() <= first.items()


def test_a_single_file_has_nothing_to_be_mixed_with(run, tmp_path):
    write_clip(tmp_path / "in" / "a.wav", 4.0)
    assert "at least two files" in refusal(run, mixtures=1.0)
