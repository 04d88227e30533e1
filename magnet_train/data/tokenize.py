"""Encodes audio with captions into shards of codes, resumably and with several processes.

The work is planned first (`plan.py`) and stored in `.plan.json`. Shards are written atomically.
Processes, on one or several machines, claim a shard by a file lock, which is released if they die.
The last one writes `index.json`, without which the folder cannot be read. A thread reads the next
batch during encoding.
"""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from tqdm import tqdm

from magnet_train.common.errors import UserError
from magnet_train.common.folders import remove_leftovers, writable_folder, write_json
from magnet_train.common.json_files import read_json
from magnet_train.common.progress import PhaseBar, count, readable_time
from magnet_train.common.ranges import check_types, check_values
from magnet_train.data.audio import read_audio
from magnet_train.data.manifest import Clip, find_clips, with_fallback_captions
from magnet_train.data.plan import (
    Crop,
    TokenizeOptions,
    append_round,
    check_captions,
    find_usable,
    plan_settings,
    plan_shards,
)
from magnet_train.data.remote import MAX_SHARD_BYTES
from magnet_train.data.shards import ShardWriter, held_out

FORMAT = 3
PLAN_TYPES = {
    "format": Literal[3],
    "codec": dict[str, Any],
    "settings": dict[str, Any],
    "rounds": list[list[str]],
}
"""Entries of `.plan.json`."""
MAX_PLAN_BYTES = 1 << 30
"""Maximum size of the plan, and of the report of a shard."""
SHORT_CROPS = 8
"""Maximum number of crops in a batch of short crops, in multiples of `batch_size`."""
MIN_REFERENCE_S = 3.0
"""Minimum length of a clip with musicnn embeddings, in seconds."""
T = TypeVar("T")
Advance = Callable[[int], object]
"""Moves the progress bar by a number of crops."""


def tokenize(source: Path, out: Path, options: TokenizeOptions) -> dict[str, Any]:
    """Encode the audio of `source` into shards in `out`; returns the index (that of `train` if
    clips are held out for validation).

    Run it again after any interruption, or to append new clips.

    Raises:
        UserError: if the input cannot be used, `out` has shards of changed input, another codec or
            other options, or the disk is full.
    """
    clips = find_clips(source)
    if options.caption_from != "files":
        clips = with_fallback_captions(clips, options.caption_from == "names")
        origins = Counter(c.fields.get("caption_from", "files") for c in clips if c.caption)
        if origins.keys() - {"files"}:
            counts = ", ".join(f"{count} from {origin}" for origin, count in origins.items())
            tqdm.write(f"captions: {counts}")
    check_captions(source, clips)
    if not options.validation:
        return _tokenize(source, clips, out, options)
    names = list(dict.fromkeys(clip.id for clip in clips))
    held = dict(zip(names, held_out(names, options.validation, "--validation"), strict=True))
    index, *_ = [
        _tokenize(source, [c for c in clips if held[c.id] == is_held], out / name, part)
        for name, is_held, part in (
            ("train", False, options),
            ("validation", True, with_references(options)),
        )
    ]
    init_from = f"--model.init_from {'demo' if options.codec == 'demo' else 'MODEL'} "
    sets = f"--data.train {out / 'train'} --data.validation {out / 'validation'}"
    tqdm.write(f"next        python -m magnet_train fit {init_from}{sets}")
    return index


def with_references(options: TokenizeOptions) -> TokenizeOptions:
    """The options with embeddings for metrics, and crops that are long enough for them."""
    if options.crop_s < MIN_REFERENCE_S:
        return options
    return replace(options, embedder="musicnn", min_s=max(options.min_s, MIN_REFERENCE_S))


def _tokenize(
    source: Path, clips: list[Clip], out: Path, options: TokenizeOptions
) -> dict[str, Any]:
    """Encode clips into one set of shards."""
    writable_folder(out, "--out")
    facts = _load_parts(options)[0].facts.to_dict()
    try:
        usable, skipped = find_usable(clips, options)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    with _lock(out / ".plan.lock", wait=True):
        plan = _open_plan(out, options, facts)
        try:
            plan["rounds"] = append_round(usable, plan["rounds"])
        except UserError as error:
            raise UserError(
                f"{out}: {error}; choose an empty folder, or remove this one"
            ) from error
        shards = plan_shards(usable, plan["rounds"], options)
        write_json(out / ".plan.json", plan)
    jobs = [Job(number, crops, out, options, facts) for number, crops in enumerate(shards)]
    _encode_all(jobs, options)
    reports = [asdict(report) for job in jobs if (report := job.report()) is not None]
    index = _index(plan, reports, skipped)
    with _lock(out / ".plan.lock", wait=True):
        write_json(out / "index.json", index)
        remove_leftovers(out)
    for entry in index["skipped"]:
        tqdm.write(f"skipped: {' '.join(entry['reason'].split())}")
    crops, shards = count(index["num_examples"], "crop"), count(len(index["shards"]), "shard")
    tqdm.write(f"{crops}, {readable_time(3600 * index['hours'])}, in {shards}: {out}")
    if index["num_examples"] == 0:
        reason = index["skipped"][0]["reason"] if index["skipped"] else ""
        raise UserError(f"{source}: every crop was skipped: {reason}")
    return index


@dataclass(frozen=True)
class Report:
    """What a finished shard contains; stored next to it.

    Raises:
        UserError: if a value has another type or is out of range.
    """

    name: str
    num_examples: int
    num_frames: int
    seconds: float
    sha256: str
    skipped: list[dict[str, str]]
    """`file` and `reason` of each crop that is not in the shard."""
    unreadable: list[str]
    """Paths of files that could not be read."""

    def __post_init__(self) -> None:
        check_types(self)
        check_values(self, num_examples="[0, inf)", num_frames="[0, inf)", seconds="[0, inf)")
        if any(entry.keys() != {"file", "reason"} for entry in self.skipped):
            raise UserError(f"{self.name}: skipped must have file and reason")


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    number: int
    crops: list[Crop]
    out: Path
    options: TokenizeOptions
    facts: dict[str, Any]
    """Facts of the codec."""

    @property
    def path(self) -> Path:
        return self.out / f"{self.options.split}-{self.number:06d}.tar"

    @property
    def report_path(self) -> Path:
        return self.out / f".{self.options.split}-{self.number:06d}.json"

    @property
    def lock_path(self) -> Path:
        return self.out / f".{self.path.name}.lock"

    def report(self) -> Report | None:
        """What was written about the finished shard; None if there is nothing, or not that."""
        try:
            report = Report(**read_json(self.report_path, MAX_PLAN_BYTES))
        except (OSError, ValueError, TypeError, UserError):
            return None
        return report if report.name == self.path.name else None

    def is_done(self) -> bool:
        """Whether the shard exists, matches its report, and has all readable crops."""
        report = self.report()
        if report is None or not self.path.is_file():
            return False
        with open(self.path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != report.sha256:
                return False
        return not any(self._can_be_read(path) for path in report.unreadable)

    def _can_be_read(self, path: str) -> bool:
        """Whether a previously unreadable file is readable now."""
        try:
            read_audio(Path(path), self.facts["sample_rate"], self.facts["channels"])
        except UserError:
            return False
        return True


def _open_plan(out: Path, options: TokenizeOptions, facts: dict[str, Any]) -> dict[str, Any]:
    """The plan of an earlier call with the same options and codec, or a new one."""
    settings = plan_settings(options)
    new = {"format": FORMAT, "codec": facts, "settings": settings, "rounds": []}
    path = out / ".plan.json"
    remedy = "choose an empty folder, or remove this one"
    if not path.exists():
        if (out / "index.json").exists() or any(out.glob(f"{options.split}-*.tar")):
            raise UserError(f"{out}: already has shards; {remedy}")
        return new
    try:
        known = read_json(path, MAX_PLAN_BYTES)
        check_types({name: known[name] for name in new}, PLAN_TYPES)
        check_types({"id": known["codec"]["id"]}, {"id": str})
    except (OSError, ValueError, TypeError, KeyError, UserError) as error:
        raise UserError(f"{path}: damaged, or of another version; {remedy}") from error
    if known["codec"] | {"id": ""} != facts | {"id": ""}:
        raise UserError(f"{out}: begun with another codec; {remedy}")
    if known["settings"] != settings:
        raise UserError(f"{out}: begun with other options; {remedy}")
    return known  # the same codec may have another path


# --- encode ---------------------------------------------------------------------------------------


def _encode_all(jobs: list[Job], options: TokenizeOptions) -> None:
    unfinished = [job for job in jobs if not job.is_done()]
    total = sum(len(job.crops) for job in jobs)
    left = sum(len(job.crops) for job in unfinished)
    with PhaseBar("encoding", total, "crop", options.batch_size, initial=total - left) as bar:
        for done in _run(unfinished, options.processes, bar.update):
            bar.update(done)
        # Another process may be writing the others. Wait for it; if it died, write them here.
        for job in unfinished:
            if not job.is_done():
                bar.update(_write_shard(job, True, bar.update))


def _run(jobs: list[Job], processes: int, advance: Advance) -> Iterator[int]:
    """Number of crops of each finished shard, except those that `advance` was called for; runs in
    this process if there is only one."""
    if processes == 1 or len(jobs) <= 1:
        yield from (_write_shard(job, advance=advance) for job in jobs)
        return
    # Spawned, not forked: a forked torch can hang waiting for its parent's threads.
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, len(jobs)), _use_one_thread) as pool:
        yield from pool.imap_unordered(_write_shard, jobs)


def _use_one_thread() -> None:
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


def _write_shard(job: Job, wait: bool = False, advance: Advance | None = None) -> int:
    """Encode a shard; returns its number of crops, or 0 if another process has the shard.

    If given, `advance` is called for each crop that is written, and these are not returned.
    """
    with _lock(job.lock_path, wait) as is_mine:
        if not is_mine or job.is_done():
            return 0
        temporary = job.path.with_name(f".{job.path.name}.tmp")
        waves = Waves(job)
        try:
            with open(temporary, "wb") as file:
                shard = ShardWriter(file)
                for codes, info, reference in _encode(waves, job):
                    shard.write(codes, info, reference)
                    if advance is not None:
                        advance(1)
                shard.close()
                file.flush()
                if file.tell() > MAX_SHARD_BYTES:
                    raise UserError(
                        f"{job.path}: {file.tell():,} bytes, and at most {MAX_SHARD_BYTES:,} are "
                        "read; set a lower --shard_size, in an empty folder"
                    )
                os.fsync(file.fileno())
            with open(temporary, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.replace(temporary, job.path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"{job.path}: the disk is full; finished shards are complete: free some space "
                    "and run this again"
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        report = Report(
            job.path.name,
            shard.num_examples,
            shard.num_frames,
            shard.seconds,
            digest,
            waves.skipped,
            sorted(waves.unreadable),
        )
        write_json(job.report_path, asdict(report))
    return len(job.crops) - (0 if advance is None else shard.num_examples)


@dataclass(frozen=True)
class Wave:
    """Audio of a crop, `c t` at the codec's sample rate."""

    crop: Crop
    samples: np.ndarray

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.samples.tobytes()).hexdigest()


class Waves:
    """Reads the audio of a shard's crops, and records skipped ones."""

    def __init__(self, job: Job):
        self.job = job
        self.rate = job.facts["sample_rate"]
        self.skipped: list[dict[str, str]] = []
        self.unreadable: set[str] = set()
        self._files: dict[Path, np.ndarray | None] = {}

    def __iter__(self) -> Iterator[Wave]:
        for crop in self.job.crops:
            samples = self._read(crop)
            if samples is None:
                continue
            where = f"{crop.clip.name} at {crop.offset_s:g} s"
            if samples.shape[1] == 0:
                reason = f"{where}: beyond the end of the file; run this again"
                self.skipped.append({"file": crop.clip.name, "reason": reason})
                continue
            level_db = 10 * np.log10(float(np.mean(np.square(samples, dtype=np.float64))) + 1e-20)
            if level_db < self.job.options.silence_db:
                reason = f"{where}: silent ({level_db:.0f} dB, below --silence_db)"
                self.skipped.append({"file": crop.clip.name, "reason": reason})
                continue
            if crop.mixed_with is not None:
                other = self._read(crop.mixed_with)
                if other is None:
                    continue
                samples = mix(samples, other, crop.snr_db)
            yield Wave(crop, samples)

    def _read(self, crop: Crop) -> np.ndarray | None:
        """The crop's samples; None if its file cannot be read."""
        path = crop.clip.path
        if path not in self._files:
            if len(self._files) == 2:  # a mixture needs two
                self._files.pop(next(iter(self._files)))
            self._files[path] = self._read_file(crop)
        samples = self._files[path]
        if samples is None:
            return None
        # A complete file is read to its end, because its length in seconds is rounded.
        is_segment = crop.clip.duration_s is not None
        length_s = crop.duration_s if is_segment else self.job.options.crop_s
        first = round(crop.offset_s * self.rate)
        return samples[:, first : first + round(length_s * self.rate)]

    def _read_file(self, crop: Crop) -> np.ndarray | None:
        path = crop.clip.path
        try:
            return read_audio(path, self.rate, self.job.facts["channels"])
        except UserError as error:
            if str(path) not in self.unreadable:
                self.skipped.append({"file": crop.clip.name, "reason": str(error)})
            self.unreadable.add(str(path))
            return None


def mix(wav: np.ndarray, other: np.ndarray, snr_db: float) -> np.ndarray:
    """Mix `other` into `wav` at `snr_db` below it, `c t` each, truncated or padded to its length.

    The sum is scaled down if it would exceed full scale.
    """
    added = np.zeros_like(wav)
    length = min(wav.shape[1], other.shape[1])
    added[:, :length] = other[:, :length]
    rms, other_rms = (float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) for x in (wav, added))
    if other_rms > 0:
        added *= rms / other_rms * 10 ** (-snr_db / 20)
    mixed = wav + added
    return mixed / max(1.0, float(np.abs(mixed).max()))


Encoded = tuple[np.ndarray, dict[str, Any], dict[str, np.ndarray] | None]
"""Codes `k t`, fields of KEY.json, and references for metrics."""


def _encode(waves: Waves, job: Job) -> Iterator[Encoded]:
    """Encode the crops in the order of the plan.

    A group has as much audio as `batch_size` full crops, but no more than SHORT_CROPS times as many
    crops.
    """
    most_samples = job.options.batch_size * round(job.options.crop_s * job.facts["sample_rate"])
    group: list[Wave] = []
    num_samples = 0
    for wave in prefetch(iter(waves), job.options.batch_size):
        length = wave.samples.shape[1]
        is_full = len(group) == SHORT_CROPS * job.options.batch_size
        if group and (is_full or num_samples + length > most_samples):
            yield from _encode_group(group, job)
            group, num_samples = [], 0
        group.append(wave)
        num_samples += length
    if group:
        yield from _encode_group(group, job)


def _encode_group(group: list[Wave], job: Job) -> Iterator[Encoded]:
    """Encode crops in as few batches as the codec allows."""
    import torch

    codec, embedder = _load_parts(job.options)
    found = codec.encode_clips([torch.from_numpy(wave.samples) for wave in group])
    for wave, codes in zip(group, found, strict=True):
        row = codes.cpu().numpy().astype(np.uint16)
        info = _info(wave, job.facts)
        reference = None
        if embedder is not None:
            from magnet_train.metrics.networks.musicnn import reference_arrays

            mono = torch.from_numpy(wave.samples.mean(0))
            reference = reference_arrays(mono, job.facts["sample_rate"], embedder)
            info |= {"embedder": embedder.id, "embedder_hash": embedder.hash}
        yield row, info, reference


def _info(wave: Wave, facts: dict[str, Any]) -> dict[str, Any]:
    """The fields of KEY.json; for a mixture only those that apply to both parts."""
    crop, clip = wave.crop, wave.crop.clip
    info: dict[str, Any] = {"caption": clip.caption} if crop.mixed_with else {**clip.fields}
    info["caption"] = clip.caption
    licences = {str(clip.fields.get("licence", ""))}
    if crop.mixed_with is not None:
        other = crop.mixed_with.clip
        info["caption"] = f"{clip.caption.rstrip('.')}, {other.caption}"
        licences.add(str(other.fields.get("licence", "")))
        info["mixed_with"] = {
            "source": other.name,
            "offset_s": crop.mixed_with.offset_s,
            "snr_db": crop.snr_db,
        }
    return info | {
        "key": crop.key,
        "source": clip.name,
        "offset_s": crop.offset_s,
        "duration_s": wave.samples.shape[1] / facts["sample_rate"],
        "codec": facts["id"],
        "codec_hash": facts["hash"],
        "licence": ", ".join(sorted(licences)),
        "audio_sha256": wave.sha256,
    }


def prefetch(items: Iterator[T], number: int) -> Iterator[T]:
    """Prefetch up to `number` items in a thread.

    Exceptions are raised at the item's position. After this generator is closed or fails, no
    further item is started.
    """
    end: Any = object()
    thread = ThreadPoolExecutor(1, "prefetch")
    try:
        made = deque(thread.submit(next, items, end) for _ in range(number))
        while (item := made.popleft().result()) is not end:
            made.append(thread.submit(next, items, end))
            yield item
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


# --- files ----------------------------------------------------------------------------------------


def _index(
    plan: dict[str, Any], reports: list[dict[str, Any]], skipped: list[dict[str, str]]
) -> dict[str, Any]:
    settings = plan["settings"]
    every = skipped + [entry for report in reports for entry in report["skipped"]]
    columns = ("name", "num_examples", "num_frames", "sha256")
    shards = [{name: report[name] for name in columns} for report in reports]
    return {
        "format": 1,
        "codec": plan["codec"],
        "crop_s": settings["crop_s"],
        "hop_s": settings["hop_s"] or settings["crop_s"],
        "embedder": settings["embedder"],
        "num_examples": sum(report["num_examples"] for report in reports),
        "num_frames": sum(report["num_frames"] for report in reports),
        "hours": sum(report["seconds"] for report in reports) / 3600,
        "shards": [shard for shard in shards if shard["num_examples"]],
        # A file used by several shards is listed once.
        "skipped": [dict(entry) for entry in dict.fromkeys(tuple(e.items()) for e in every)],
    }


@contextmanager
def _lock(path: Path, wait: bool) -> Iterator[bool]:
    """Context with whether the lock is held; the system releases it if its holder dies."""
    with open(path, "a") as file:  # not "w", which would empty the file that a link points to
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            text = "this file system has no locks, so start tokenize only once at a time"
            warnings.warn(f"{path.parent}: {text}", stacklevel=4)
            yield True
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
