"""Audio with captions to shards of codes: list, plan, encode, write; resumable, and shared by several processes.

The work is planned first: which crops go into which shard is a function of the input alone and is written down in
`.plan.json`. A shard is written aside, flushed, and moved into place, so it is whole or absent. Processes, on one
machine or several, claim a shard by locking a file; the lock dies with its holder. Who finishes last writes
`index.json`, and only that makes the folder readable. While a batch is encoded, a thread reads the next.
"""

import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import re
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from tqdm import tqdm

from magnet_train.common.errors import UserError
from magnet_train.common.folders import write_text
from magnet_train.data.audio import duration_s, read_audio
from magnet_train.data.manifest import Clip, find_clips

FORMAT = 1
T = TypeVar("T")


@dataclass(frozen=True)
class TokenizeOptions:
    """How audio becomes shards."""

    codec: str = "demo"
    """Codec that encodes: "demo", a folder or a hub id."""
    crop_s: float = 30.0
    """Length of a crop, in seconds."""
    hop_s: float | None = None
    """Distance between the beginnings of two crops, in seconds; the crop's length if not given."""
    min_s: float = 1.0
    """Shortest last crop that is kept, in seconds."""
    silence_db: float = -60.0
    """Crops whose RMS level lies below this are left out, in dB of full scale."""
    mixtures: float = 0.0
    """Mixed crops for every crop, on average: the sum of two crops of different files, with both captions."""
    mixture_snr_db: float = 5.0
    """Largest difference in level between the two parts of a mixture, in dB; drawn uniformly up to it, either way."""
    split: str = "shard"
    """First part of the shards' names."""
    shard_size: int = 256
    """Crops in one shard."""
    batch_size: int = 8
    """Crops encoded together."""
    processes: int = 1
    """Processes on this machine; others may be started on the same folder at any time."""
    embedder: Literal["none", "musicnn"] = "none"
    """Network whose embeddings and tags of the original audio go along, for metrics on validation and test sets."""

    def __post_init__(self) -> None:
        for name, ok, want in (
            ("crop_s", self.crop_s > 0, "a length in seconds above 0"),
            ("hop_s", self.hop_s is None or self.hop_s > 0, "a distance in seconds above 0"),
            (
                "min_s",
                0 < self.min_s <= self.crop_s,
                "a length in seconds above 0 and up to --crop_s",
            ),
            ("mixtures", self.mixtures >= 0, "0 or more"),
            ("mixture_snr_db", self.mixture_snr_db >= 0, "0 dB or more"),
            ("shard_size", self.shard_size >= 1, "at least 1 crop"),
            ("batch_size", self.batch_size >= 1, "at least 1 crop"),
            ("processes", self.processes >= 1, "at least 1"),
            ("split", re.fullmatch(r"[A-Za-z0-9_-]+", self.split), "letters, digits, - and _"),
        ):
            if not ok:
                raise UserError(f"--{name} {getattr(self, name)}: give {want}")


# --- plan ---------------------------------------------------------------------------------------------------------


def plan_shards(
    clips: list[Clip], options: TokenizeOptions
) -> tuple[list[list[dict[str, Any]]], list[dict[str, str]]]:
    """Crops by shard, `{"clip", "key", "offset_s"}` each, and the files that are left out with the reason."""
    hop = options.hop_s or options.crop_s
    crops: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    stems: dict[str, str] = {}
    times: dict[str, int] = {}
    for number, clip in enumerate(tqdm(clips, desc="reading headers", unit="file", leave=False)):
        try:
            if clip.error:
                raise UserError(clip.error)
            first, length = clip.segment(duration_s(clip.path))
            if not clip.caption:
                raise UserError(f"{clip.name}: no caption")
            if length < options.min_s:
                raise UserError(
                    f"{clip.name}: {length:.2f} s, shorter than --min_s {options.min_s}"
                )
        except UserError as error:
            skipped.append({"file": clip.name, "reason": str(error)})
            continue
        stem = (
            re.sub(r"[^A-Za-z0-9_-]+", "-", str(Path(clip.name).with_suffix(""))).strip("-")
            or "clip"
        )
        if (
            stems.setdefault(stem, clip.name) != clip.name
        ):  # a/b.wav and a-b.wav, or b.wav and b.flac
            stem = f"{stem}-{hashlib.sha256(clip.name.encode()).hexdigest()[:8]}"
        times[stem] = times.get(stem, 0) + 1
        if times[stem] > 1:  # a manifest may give one file several captions
            stem = f"{stem}-again{times[stem]}"
        start = 0
        # Until the clip is over: a crop within the one before would bring nothing new.
        while start == 0 or (
            length - start * hop >= options.min_s and (start - 1) * hop + options.crop_s < length
        ):
            offset = first + start * hop
            duration = min(options.crop_s, length - start * hop)
            crops.append(
                {
                    "clip": number,
                    "key": f"{stem}_{round(offset * 1000):08d}",
                    "offset_s": offset,
                    "duration_s": duration,
                }
            )
            start += 1
    if options.mixtures:
        crops = with_mixtures(crops, clips, options)
    shards = [crops[i : i + options.shard_size] for i in range(0, len(crops), options.shard_size)]
    return shards, skipped


def with_mixtures(
    crops: list[dict[str, Any]], clips: list[Clip], options: TokenizeOptions
) -> list[dict[str, Any]]:
    """The crops, each followed by its mixtures: crops that name a second one, and by how much it is louder.

    The mixing augmentation of the published sound models (audiocraft `data/sound_dataset.py`) draws new mixtures for
    each batch. Codes cannot be added, so here their number is finite: with 1 a crop, half of what is trained on is
    mixed, as published.
    """
    if len({c["clip"] for c in crops}) < 2:
        raise UserError("--mixtures: needs crops of at least two files")
    rng = np.random.default_rng(len(crops))
    with_all: list[dict[str, Any]] = []
    for i, one in enumerate(crops):
        with_all.append(one)
        for n in range(int(options.mixtures * (i + 1)) - int(options.mixtures * i)):
            other = one
            while other["clip"] == one["clip"]:
                other = crops[rng.integers(len(crops))]
            part = {name: other[name] for name in ("clip", "offset_s", "duration_s", "key")}
            part["snr_db"] = round(
                float(rng.uniform(-options.mixture_snr_db, options.mixture_snr_db)), 2
            )
            with_all.append(one | {"key": f"{one['key']}_mix{n}", "mixed_with": part})
    return with_all


def mix(wav: np.ndarray, other: np.ndarray, snr_db: float) -> np.ndarray:
    """`wav` with `other` so far below it, `c t` each; cut or padded to its length, and never above full scale."""
    added = np.zeros_like(wav)
    length = min(wav.shape[1], other.shape[1])
    added[:, :length] = other[:, :length]
    level, below = (float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) for x in (wav, added))
    if below > 0:
        added *= level / below * 10 ** (-snr_db / 20)
    mixed = wav + added
    return mixed / max(1.0, float(np.abs(mixed).max()))


# --- encode and write ---------------------------------------------------------------------------------------------


def tokenize(source: Path, out: Path, options: TokenizeOptions) -> dict[str, Any]:
    """Turn the audio of `source` into shards in `out`; returns the index. Run again after any interruption.

    Raises:
        UserError: if the input cannot be used, `out` holds shards of another input, codec or options, or the disk
            is full.
    """
    clips = find_clips(source)
    _check_captions(source, clips)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be made a folder ({error.strerror}); choose another --out"
        ) from error
    facts = _load_parts(options)[0].facts.to_dict()
    shards, skipped = plan_shards(clips, options)
    if not shards:
        reasons = "; ".join(s["reason"] for s in skipped[:3])
        raise UserError(f"{source}: none of {len(clips)} files can be used: {reasons}")
    settings = {
        k: v for k, v in asdict(options).items() if k not in ("processes", "batch_size", "codec")
    }
    # Wherever the files lie, it is their names, sizes and captions that must be the same when this goes on.
    inputs = [[c.name, _size(c.path), c.caption, c.fields] for c in clips]
    listing = hashlib.sha256(json.dumps([inputs, shards], sort_keys=True).encode()).hexdigest()
    plan = {"format": FORMAT, "codec": facts, "settings": settings, "input": listing}
    with _lock(out / ".plan.lock", wait=True):
        known = _read_json(out / ".plan.json")
        if known is None:
            if (out / "index.json").exists() or any(out.glob(f"{options.split}-*.tar")):
                raise UserError(
                    f"{out}: holds shards already; choose an empty folder, or remove this one"
                )
            _write_json(out / ".plan.json", plan)
        elif known.get("codec", {}).get("hash") == facts["hash"] and known | {
            "codec": 0
        } == plan | {"codec": 0}:
            plan = known  # the same codec may be known by another path
        elif differs := next((k for k in plan if known.get(k) != plan[k]), None):
            what = {
                "codec": "codec",
                "settings": "options",
                "input": "input files or captions",
            }.get(differs, differs)
            raise UserError(
                f"{out}: begun with other {what}; choose an empty folder, or remove this one"
            )
    todo = [i for i in range(len(shards)) if not _is_done(out, options, i)]
    jobs = [(i, shards[i], clips, out, options, facts) for i in todo]
    with tqdm(total=sum(map(len, shards)), unit="crop", desc="encoding") as bar:
        bar.update(sum(len(s) for i, s in enumerate(shards) if i not in set(todo)))
        for done in _run(jobs, options.processes):
            bar.update(done)
        for job in jobs:  # those in the hands of another process, which may not live to finish them
            if not _is_done(out, options, job[0]):
                bar.update(_write_shard(job, wait=True))
    reports = [_read_json(_report_path(out, options, i)) for i in range(len(shards))]
    index = _index(plan, [r for r in reports if r is not None], skipped)
    with _lock(out / ".plan.lock", wait=True):
        _write_json(out / "index.json", index)
    for entry in index["skipped"]:
        tqdm.write(f"left out: {entry['reason']}")
    tqdm.write(
        f"{index['num_examples']} crops, {index['hours']:.2f} h, in {len(index['shards'])} shards: {out}"
    )
    if index["num_examples"] == 0:
        raise UserError(f"{source}: every crop was left out; see {out / 'index.json'}")
    return index


def _check_captions(source: Path, clips: list[Clip]) -> None:
    if any(clip.caption for clip in clips):
        return
    if error := next((clip.error for clip in clips if clip.error), ""):
        raise UserError(error)
    raise UserError(
        f"{source}: no captions: put a .txt with one line beside each of the {len(clips)} audio files, e.g. "
        f'{Path(clips[0].name).with_suffix(".txt")}, or a .json with a "caption"'
    )


def _run(jobs: list[tuple], processes: int) -> Iterator[int]:
    """Crops done per finished shard; in this process if one is enough."""
    if processes == 1 or len(jobs) <= 1:
        yield from map(_write_shard, jobs)
        return
    # Spawned, not forked: a forked torch can wait for ever for its parent's threads.
    with multiprocessing.get_context("spawn").Pool(min(processes, len(jobs)), _one_thread) as pool:
        yield from pool.imap_unordered(_write_shard, jobs)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


_parts: dict[str, Any] = {}


def _load_parts(options: TokenizeOptions) -> tuple[Any, Any]:
    """Codec and embedder, once per process."""
    if options.codec not in _parts:
        from magnet_train.codec.base import load_codec

        _parts[options.codec] = load_codec(options.codec)
    if options.embedder != "none" and options.embedder not in _parts:
        from magnet_train.metrics.networks.musicnn import load_musicnn

        _parts[options.embedder] = load_musicnn()
    return _parts[options.codec], _parts.get(options.embedder)


def _write_shard(job: tuple, wait: bool = False) -> int:
    """Encode one shard's crops and move it into place; the number of crops, or 0 if another process has it."""
    number, crops, clips, out, options, facts = job
    path = out / f"{options.split}-{number:06d}.tar"
    with _lock(out / f".{path.name}.lock", wait) as mine:
        if not mine or _is_done(out, options, number):
            return 0
        aside = path.with_name(f".{path.name}.tmp")
        skipped: list[dict[str, str]] = []
        count = frames = 0
        seconds = 0.0
        try:
            with open(aside, "wb") as file:
                with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                    for key, codes, info, reference in _encode(
                        crops, clips, options, facts, skipped
                    ):
                        _add(tar, f"{key}.codes.npy", _npy(codes))
                        _add(tar, f"{key}.json", json.dumps(info, ensure_ascii=False).encode())
                        if reference is not None:
                            _add(tar, f"{key}.reference.npz", _npz(reference))
                        count, frames, seconds = (
                            count + 1,
                            frames + codes.shape[1],
                            seconds + info["duration_s"],
                        )
                file.flush()
                os.fsync(file.fileno())
            with open(aside, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.replace(aside, path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"{path}: the disk is full; finished shards are whole: free some space and run this again"
                ) from error
            raise
        report = {
            "name": path.name,
            "num_examples": count,
            "num_frames": frames,
            "seconds": seconds,
            "sha256": digest,
        }
        _write_json(_report_path(out, options, number), report | {"skipped": skipped})
    return len(crops)


def _encode(
    crops: list[dict[str, Any]],
    clips: list[Clip],
    options: TokenizeOptions,
    facts: dict[str, Any],
    skipped: list,
) -> Iterator[tuple[str, np.ndarray, dict[str, Any], dict[str, np.ndarray] | None]]:
    """Key, codes `k t`, fields and reference of each crop that can be used, in the order of the plan."""
    import torch

    codec, embedder = _load_parts(options)
    rate, full = facts["sample_rate"], round(options.crop_s * facts["sample_rate"])

    def waves() -> Iterator[tuple[dict[str, Any], np.ndarray, str]]:
        """Crop, waveform `c t` and its hash; in a thread of its own."""
        current, wav = -1, np.zeros((1, 0), np.float32)
        for crop in crops:
            clip = clips[crop["clip"]]
            if crop["clip"] != current:
                current = crop["clip"]
                try:
                    wav = read_audio(clip.path, rate, facts["channels"])
                except UserError as error:
                    wav = np.zeros((facts["channels"], 0), np.float32)
                    skipped.append({"file": clip.name, "reason": str(error)})
            first = round(crop["offset_s"] * rate)
            piece = wav[:, first : first + min(full, round(crop["duration_s"] * rate))]
            if piece.shape[1] == 0:
                continue
            level = 10 * np.log10(float(np.mean(np.square(piece, dtype=np.float64))) + 1e-20)
            if level < options.silence_db:
                reason = f"{clip.name} at {crop['offset_s']:g} s: silent ({level:.0f} dB, below --silence_db)"
                skipped.append({"file": clip.name, "reason": reason})
                continue
            if (part := crop.get("mixed_with")) is not None:
                try:
                    other = read_audio(clips[part["clip"]].path, rate, facts["channels"])
                except UserError:
                    continue  # it is listed where it stands for itself
                begin = round(part["offset_s"] * rate)
                piece = mix(
                    piece,
                    other[:, begin : begin + min(full, round(part["duration_s"] * rate))],
                    part["snr_db"],
                )
            yield crop, piece, hashlib.sha256(piece.tobytes()).hexdigest()

    def encoded(group: list[tuple[dict[str, Any], np.ndarray, str]]) -> Iterator[tuple]:
        if not group:
            return
        codes = (
            codec.encode(torch.from_numpy(np.stack([w for _, w, _ in group])))
            .cpu()
            .numpy()
            .astype(np.uint16)
        )
        for (crop, wav, digest), row in zip(group, codes, strict=True):
            clip = clips[crop["clip"]]
            info = {"key": crop["key"]} | clip.fields | {"caption": clip.caption}
            licences = {clip.fields.get("licence", "")}
            if (part := crop.get("mixed_with")) is not None:  # what was true of one is not of both
                other = clips[part["clip"]]
                info = {
                    "key": crop["key"],
                    "caption": f"{clip.caption.rstrip('.')}, {other.caption}",
                }
                licences.add(other.fields.get("licence", ""))
                info["mixed_with"] = {
                    "source": other.name,
                    "offset_s": part["offset_s"],
                    "snr_db": part["snr_db"],
                }
            info |= {
                "source": clip.name,
                "offset_s": crop["offset_s"],
                "duration_s": wav.shape[1] / rate,
            }
            info |= {
                "codec": facts["id"],
                "codec_hash": facts["hash"],
                "licence": ", ".join(sorted(licences)),
            }
            info["audio_sha256"] = digest
            reference = None
            if embedder is not None:
                from magnet_train.metrics.networks.musicnn import reference_arrays

                reference = reference_arrays(torch.from_numpy(wav.mean(0)), rate, embedder)
                info |= {"embedder": embedder.id, "embedder_hash": embedder.hash}
            yield crop["key"], row, info, reference

    # Only crops of full length are encoded together: a short one would take part of its neighbours' padding.
    group: list[tuple[dict[str, Any], np.ndarray, str]] = []
    for wave in ahead(waves(), options.batch_size):
        if wave[1].shape[1] == full:
            group.append(wave)
            if len(group) == options.batch_size:
                yield from encoded(group)
                group = []
        else:
            yield from encoded(group)
            group = []
            yield from encoded([wave])
    yield from encoded(group)


def ahead(items: Iterator[T], number: int) -> Iterator[T]:
    """The items, the next `number` of them made in a thread while one is in use.

    What making an item raises is raised in its place. Once this generator is closed, or fails, no item is begun.
    """
    end: Any = object()
    thread = ThreadPoolExecutor(1, "ahead")
    try:
        made = deque(thread.submit(next, items, end) for _ in range(number))
        while (item := made.popleft().result()) is not end:
            made.append(thread.submit(next, items, end))
            yield item
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def _index(
    plan: dict[str, Any], reports: list[dict[str, Any]], skipped: list[dict[str, str]]
) -> dict[str, Any]:
    every = skipped + [s for r in reports for s in r["skipped"]]
    return {
        "format": FORMAT,
        "codec": plan["codec"],
        "crop_s": plan["settings"]["crop_s"],
        "hop_s": plan["settings"]["hop_s"] or plan["settings"]["crop_s"],
        "embedder": plan["settings"]["embedder"],
        "num_examples": sum(r["num_examples"] for r in reports),
        "num_frames": sum(r["num_frames"] for r in reports),
        "hours": sum(r["seconds"] for r in reports) / 3600,
        "shards": [
            {k: r[k] for k in ("name", "num_examples", "num_frames", "sha256")}
            for r in reports
            if r["num_examples"]
        ],
        # A file that several shards wanted a part of is listed once.
        "skipped": [dict(s) for s in dict.fromkeys(tuple(s.items()) for s in every)],
    }


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _report_path(out: Path, options: TokenizeOptions, number: int) -> Path:
    return out / f".{options.split}-{number:06d}.json"


def _is_done(out: Path, options: TokenizeOptions, number: int) -> bool:
    """Whether a shard is there as its report says."""
    report = _read_json(_report_path(out, options, number))
    path = out / f"{options.split}-{number:06d}.tar"
    if report is None or not path.is_file():
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == report["sha256"]


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """With no time or owner in it, so that the same input gives the same bytes."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _write_json(path: Path, value: Any) -> None:
    """Under a lock: what a kill leaves beside it has the same name in every process, so that the next one takes it."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1))


@contextmanager
def _lock(path: Path, wait: bool) -> Iterator[bool]:
    """Whether the lock could be had; the system releases it when its holder dies, however that happens."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
