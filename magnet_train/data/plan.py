"""The plan of `tokenize`: which crops of which clips go into which shard.

The plan is a function of clips and options, so that every process computes the same. Later calls
append new clips in new shards and do not change existing ones. Removed or changed clips are an
error.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from magnet_train.common.errors import UserError
from magnet_train.common.progress import PhaseBar
from magnet_train.common.ranges import check_values
from magnet_train.common.redact import redact
from magnet_train.data.audio import duration_s
from magnet_train.data.manifest import Clip

MIN_HOP_S = 0.01
MAX_CROP_S = 3600.0
MAX_MIXTURES = 100.0
MAX_TEXT_BYTES = 1 << 18
"""Maximum size of a clip's caption and fields; the shard reader's limit is four times as large."""


@dataclass(frozen=True)
class TokenizeOptions:
    """Options of `tokenize`."""

    codec: str = "demo"
    """Codec: "demo", a folder or a hub id."""
    crop_s: float = 30.0
    """Length of a crop, in seconds."""
    hop_s: float | None = None
    """Distance between the starts of two crops, in seconds (default: --crop_s)."""
    min_s: float = 1.0
    """Minimum length of the last crop of a file, in seconds."""
    silence_db: float = -60.0
    """Skip crops whose RMS level is below this, in dB of full scale."""
    mixtures: float = 0.0
    """Mixing augmentation: extra crops per crop, each the sum of two crops from different files."""
    mixture_snr_db: float = 5.0
    """Maximum level difference between the two parts of a mixture, in dB; drawn uniformly."""
    split: str = "shard"
    """Prefix of the shards' file names, such as train."""
    validation: float = 0.0
    """Share of the files to hold out for validation, 0 to 0.5, chosen by a hash of their names: OUT
    then has the sets `train` and `validation`, the latter with musicnn embeddings."""
    caption_from: Literal["files", "tags", "names"] = "names"
    """Sources of captions: caption files and the manifest (files), then also tags of the audio file
    (tags), then also its name (names)."""
    shard_size: int = 256
    """Crops per shard."""
    batch_size: int = 8
    """Crops per batch of the codec."""
    processes: int = 1
    """Number of processes; the same command may also run on other machines at the same time."""
    embedder: Literal["none", "musicnn"] = "none"
    """Also store this network's embeddings of the original audio, as references for FAD and KL."""

    def __post_init__(self) -> None:
        lengths = f"[{MIN_HOP_S}, {MAX_CROP_S}] seconds"
        check_values(
            self,
            "--",
            crop_s=lengths,
            hop_s=lengths,
            min_s=f"(0, {self.crop_s}] seconds",
            silence_db="[-inf, 0] dB",
            mixtures=f"[0, {MAX_MIXTURES}]",
            mixture_snr_db="[0, 100] dB",
            shard_size="[1, 100000] crops",
            batch_size="[1, 100000]",
            processes="[1, 1024]",
            validation="[0, 0.5]",
        )
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,80}", self.split):
            raise UserError(f"--split={self.split} must be up to 80 letters, digits, - and _")


@dataclass(frozen=True)
class Crop:
    """A part of a clip, or a mixture of two parts."""

    clip: Clip
    key: str
    """Id of the example: letters, digits, - and _."""
    offset_s: float
    """Start in the file, in seconds."""
    duration_s: float
    mixed_with: "Crop | None" = None
    snr_db: float = 0.0
    """Level of the crop relative to the one mixed into it, in dB."""


@dataclass(frozen=True)
class UsableClip:
    """A clip with readable audio and a caption."""

    clip: Clip
    start_s: float
    length_s: float
    hash: str
    """Hash of the clip's name, audio, caption, fields and segment, but not of its folder."""


def find_usable(
    clips: list[Clip], options: TokenizeOptions
) -> tuple[dict[str, UsableClip], list[dict[str, str]]]:
    """Usable clips by hash, and `file` and `reason` of skipped ones.

    Raises:
        UserError: if no clip can be used.
    """
    usable: dict[str, UsableClip] = {}
    skipped: list[dict[str, str]] = []
    audio: dict[Path, str] = {}
    with PhaseBar("reading", len(clips), "file") as bar:
        for clip in clips:
            try:
                start_s, length_s = _usable_part(clip, options)
                clip_hash = _clip_hash(clip, audio)
                if clip_hash in usable:
                    raise UserError(f"{clip.name}: listed twice with the same caption")
                usable[clip_hash] = UsableClip(clip, start_s, length_s, clip_hash)
            except UserError as error:
                skipped.append({"file": redact(clip.name), "reason": str(error)})
            bar.update()
    if not usable:
        reasons = "; ".join(entry["reason"] for entry in skipped[:3])
        raise UserError(f"none of {len(clips)} files can be used: {reasons}")
    return usable, skipped


def append_round(usable: dict[str, UsableClip], rounds: list[list[str]]) -> list[list[str]]:
    """Append a round with the hashes of all new clips to the rounds of earlier calls.

    Raises:
        UserError: if a clip of an earlier round is gone, changed or unreadable.
    """
    planned = {clip_hash for part in rounds for clip_hash in part}
    if missing := planned - usable.keys():
        raise UserError(
            f"{len(missing)} of the {len(planned)} clips of an earlier call are gone, unreadable, "
            "or have other audio, captions or fields"
        )
    new = [clip_hash for clip_hash in usable if clip_hash not in planned]
    return [*rounds, new] if new else rounds


def plan_shards(
    usable: dict[str, UsableClip], rounds: list[list[str]], options: TokenizeOptions
) -> list[list[Crop]]:
    """The crops of each shard; a shard has crops of one round."""
    shards: list[list[Crop]] = []
    for part in rounds:
        crops = [crop for clip_hash in part for crop in _crops(usable[clip_hash], options)]
        if options.mixtures:
            crops = with_mixtures(crops, options)
        size = options.shard_size
        shards += [crops[first : first + size] for first in range(0, len(crops), size)]
    return shards


def _usable_part(clip: Clip, options: TokenizeOptions) -> tuple[float, float]:
    """Start and length of the clip in its file, in seconds."""
    if clip.error:
        raise UserError(clip.error)
    start_s, length_s = clip.segment(duration_s(clip.path))
    if not clip.caption:
        raise UserError(f"{clip.name}: no caption")
    if (size := len(json.dumps([clip.caption, clip.fields]))) > MAX_TEXT_BYTES:
        raise UserError(f"{clip.name}: its caption and fields have {size:,} bytes; shorten them")
    if length_s < options.min_s:
        raise UserError(f"{clip.name}: {length_s:.2f} s, shorter than --min_s {options.min_s}")
    return start_s, length_s


def _clip_hash(clip: Clip, audio: dict[Path, str]) -> str:
    """Hash of a clip; `audio` keeps the hashes of files, which may have many clips."""
    try:
        if clip.path not in audio:
            with clip.path.open("rb") as file:
                audio[clip.path] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{clip.path}: unreadable ({error.strerror})") from error
    about = [
        clip.name,
        audio[clip.path],
        clip.caption,
        clip.fields,
        clip.offset_s,
        clip.duration_s,
    ]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def _crops(part: UsableClip, options: TokenizeOptions) -> Iterator[Crop]:
    """Crops up to the end of the clip, without crops that lie within the previous one."""
    hop_s = options.hop_s or options.crop_s
    length_s = part.length_s
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", part.clip.id).strip("-")[:80] or "clip"
    number = 0
    while number == 0 or (
        length_s - number * hop_s >= options.min_s
        and (number - 1) * hop_s + options.crop_s < length_s
    ):
        offset_s = part.start_s + number * hop_s
        key = f"{stem}-{part.hash[:10]}_{round(offset_s * 1000):08d}"
        yield Crop(part.clip, key, offset_s, min(options.crop_s, length_s - number * hop_s))
        number += 1


def with_mixtures(crops: list[Crop], options: TokenizeOptions) -> list[Crop]:
    """The crops, each followed by its mixtures with crops of other files.

    The published sound models (audiocraft `data/sound_dataset.py`) mix waveforms in each batch.
    Codes cannot be added, so here the number of mixtures is fixed: with one per crop, half of the
    training data is mixed, as published.
    """
    if len({crop.clip.path for crop in crops}) < 2:
        raise UserError("--mixtures: needs crops of at least two files")
    rng = np.random.default_rng(len(crops))
    with_all: list[Crop] = []
    for number, crop in enumerate(crops):
        with_all.append(crop)
        before, after = int(options.mixtures * number), int(options.mixtures * (number + 1))
        for mixture in range(after - before):
            other = crop
            while other.clip.path == crop.clip.path:
                other = crops[rng.integers(len(crops))]
            snr_db = float(rng.uniform(-options.mixture_snr_db, options.mixture_snr_db))
            key = f"{crop.key}_mix{mixture}"
            with_all.append(
                Crop(crop.clip, key, crop.offset_s, crop.duration_s, other, round(snr_db, 2))
            )
    return with_all


def plan_settings(options: TokenizeOptions) -> dict[str, Any]:
    """The options that determine the shards' content."""
    unimportant = ("processes", "batch_size", "codec", "validation", "caption_from")
    return {name: value for name, value in asdict(options).items() if name not in unimportant}


def check_captions(source: Path, clips: list[Clip]) -> None:
    """Raise a UserError if no clip has a caption."""
    if any(clip.caption for clip in clips):
        return
    if error := next((clip.error for clip in clips if clip.error), ""):
        raise UserError(error)
    raise UserError(
        f"{source}: no captions: put a .txt with one line next to each of the {len(clips)} audio "
        f'files, e.g. {Path(clips[0].name).with_suffix(".txt")}, or a .json with a "caption"'
    )
