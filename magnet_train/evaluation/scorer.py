"""Evaluation pipeline: normalise clips, embed, gather by id, score.

Used by the validation callback, `evaluate` and the demo's scripts, so that their records have the
same protocol.

Shapes: t samples; clips are `channels t`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from magnet_train.codec.base import Codec
from magnet_train.common.audio_files import clipped_share, normalize_loudness, write_audio
from magnet_train.common.errors import UserError
from magnet_train.common.progress import PhaseBar
from magnet_train.evaluation.page import read_sound
from magnet_train.generator import DecodedItem
from magnet_train.metrics.baselines import CountTables, sample_bigram, sample_unigram
from magnet_train.metrics.embedders import Embedder, load_embedder
from magnet_train.metrics.embedding_sets import fad_per_clip
from magnet_train.metrics.record import Record
from magnet_train.metrics.reference import ReferenceStatistics
from magnet_train.metrics.scoring import REFERENCE_METRICS, FeatureSet, parse_metric, score

SCORED_LEVEL = "generated mono at -14 LUFS"
"""Level of embedded generated clips, in records; real clips are never normalised."""
UNCHANGED_LEVEL = "as it is"
SILENT_RMS = 1e-5
"""-100 dB of full scale."""

CODEC_FOLDER = "codec"
"""Folder beside those of the validations, with the codec's reconstructions of their real clips."""
Features = dict[str, FeatureSet]
"""Features of one set of clips, by the name of the embedder."""


@dataclass(frozen=True)
class AudioClip:
    """A clip to be scored."""

    key: str
    """Id of the clip; it pairs generated and real clips."""
    wav: Tensor
    """`channels t` in [-1, 1]."""
    sample_rate: int
    """In Hz."""
    name: str = ""
    """Name in errors: the file, or the id if empty."""


# --- Sources of clips -----------------------------------------------------------------------------


def read_clips(files: Mapping[str, Path]) -> Iterator[AudioClip]:
    """Clips from files, by id.

    Raises:
        UserError: if a file is unreadable, empty or not finite.
    """
    for key, path in files.items():
        wav, sample_rate = read_sound(path)
        yield AudioClip(key, torch.from_numpy(np.ascontiguousarray(wav.T)), sample_rate, str(path))


def decoded_clips(items: Iterable[DecodedItem]) -> Iterator[AudioClip]:
    """Clips from a model (`Generator.decode_items`)."""
    for item in items:
        yield AudioClip(item.key, item.wav.cpu(), item.sample_rate)


def reconstructed_clips(clips: Iterable[AudioClip], codec: Codec) -> Iterator[AudioClip]:
    """Mono clips encoded and decoded by a codec, at their sample rate, as an upper bound."""
    from magnet_train.metrics.networks.frontend import resample

    facts = codec.facts
    for clip in clips:
        mono = resample(clip.wav, clip.sample_rate, facts.sample_rate)
        with torch.no_grad():
            codes = codec.encode(mono.expand(facts.channels, -1)[None].to(codec.device))
            wav = codec.decode(codes)[0].cpu()
        wav = resample(wav, facts.sample_rate, clip.sample_rate)[: clip.wav.shape[1]]
        yield replace(clip, wav=wav[None])


def clips_from_codes(codes: Mapping[str, Tensor], codec: Codec) -> Iterator[AudioClip]:
    """Clips decoded from given codes `k t`, by id."""
    for key, rows in codes.items():
        with torch.no_grad():
            wav = codec.decode(rows[None].to(codec.device))[0].cpu()
        yield AudioClip(key, wav, codec.facts.sample_rate)


def drawn_codes(
    codes: Mapping[str, Tensor],
    seeds: Mapping[str, int],
    frequencies: Tensor,
    tables: CountTables | None,
) -> dict[str, dict[str, Tensor]]:
    """Baselines without a model: codes as long as real ones, drawn by counts.

    Args:
        codes: real codes `k t`, by id.
        seeds: seed of each clip.
        frequencies: `k c`, for "unigram".
        tables: counts for "bigram", which is omitted without them.
    """
    draws: dict[str, Callable[[int, torch.Generator], Tensor]]
    draws = {"unigram": partial(sample_unigram, frequencies)}
    if tables is not None:
        draws["bigram"] = partial(sample_bigram, tables)
    return {
        system: {
            key: draw(rows.shape[1], torch.Generator().manual_seed(seeds[key]))
            for key, rows in codes.items()
        }
        for system, draw in draws.items()
    }


def prepare_generated(
    clips: Iterable[AudioClip],
    loudness: bool = True,
    keep_silent: bool = True,
    seconds: Mapping[str, float] | None = None,
) -> Iterator[AudioClip]:
    """Prepare generated clips: mono, normalised, truncated to the length of the real clip.

    Loudness is measured on the mono mix, which is what is embedded: the loudness of two equal
    channels is higher, so it would give another gain.

    Args:
        clips: generated clips.
        loudness: normalise to -14 LUFS.
        keep_silent: score silent clips instead of raising an error.
        seconds: lengths of the real clips by id.

    Raises:
        UserError: for a silent clip, unless `keep_silent`.
    """
    seconds = seconds or {}
    for clip in clips:
        mono = clip.wav.mean(0, keepdim=True)
        if not keep_silent and is_silent(mono):
            raise UserError(
                f"{clip.name}: silent; generate it again, or score silence with --keep_silent true"
            )
        if loudness:
            levelled = normalize_loudness(mono.T.numpy(), clip.sample_rate)
            mono = torch.from_numpy(np.ascontiguousarray(levelled.T, dtype=np.float32))
        if clip.key in seconds:
            mono = mono[:, : round(seconds[clip.key] * clip.sample_rate)]
        yield replace(clip, wav=mono)


def prepare_reference(clips: Iterable[AudioClip]) -> Iterator[AudioClip]:
    """Check real clips, which are embedded unchanged.

    Raises:
        UserError: for a silent clip.
    """
    for clip in clips:
        if is_silent(clip.wav.mean(0)):
            raise UserError(f"{clip.name}: silent; remove it from the reference")
        yield clip


def is_silent(wav: Tensor) -> bool:
    """Whether the RMS of a clip is below SILENT_RMS."""
    return wav.square().mean().sqrt().item() < SILENT_RMS


# --- Embed, gather, score -------------------------------------------------------------------------


def load_embedders(
    metrics: Iterable[str], weights: Mapping[str, str], device: str
) -> list[Embedder]:
    """The embedders that these metrics need.

    Raises:
        UserError: if one cannot be loaded.
    """
    names = dict.fromkeys(parse_metric(metric)[1] for metric in metrics)
    return [load_embedder(name, weights.get(name), device) for name in names]


def embed_clips(
    clips: Iterable[AudioClip],
    embedders: Iterable[Embedder],
    phase: str,
    total: int,
    quiet: bool = False,
    batch_size: int = 1,
) -> Features:
    """Features of this rank's prepared clips from every embedder.

    Args:
        clips: the clips.
        embedders: the networks.
        phase: what is done, for the progress bar.
        total: number of clips, for the progress bar.
        quiet: whether no progress is shown.
        batch_size: clips that come at the same time.

    Raises:
        UserError: if a clip cannot be embedded; the message names it.
    """
    features = {embedder.name: FeatureSet(embedder) for embedder in embedders}
    with PhaseBar(phase, total, "clip", batch_size, quiet) as bar:
        for clip in clips:
            for part in features.values():
                try:
                    part.add(clip.key, clip.wav, clip.sample_rate)
                except UserError as error:
                    reason = str(error).removeprefix(f"{clip.key}: ")
                    raise UserError(f"{clip.name or clip.key}: {reason}") from error
                part.clipped[clip.key] = torch.tensor(
                    clipped_share(clip.wav.numpy()), dtype=torch.float64
                )
            bar.update()
    return features


def gather_features(features: Features) -> Features:
    """Features of all ranks, which must have the same embedders. Collective."""
    return {name: features[name].all_gather() for name in sorted(features)}


def score_clips(
    metrics: Sequence[str],
    features: Features,
    references: Mapping[str, ReferenceStatistics],
    captions: Mapping[str, str],
    convention: str | None = None,
    baselines: Mapping[str, Mapping[str, float]] | None = None,
    on_error: Callable[[str, str], None] | None = None,
    **fields: Any,
) -> list[Record]:
    """Records of all metrics.

    Args:
        metrics: metrics as METRIC/EMBEDDER; those without features are skipped.
        features: features of all clips.
        references: reference statistics by embedder.
        captions: captions by clip id, for text metrics.
        convention: convention of KL (default: the classifier's).
        baselines: additional fields per metric, such as `baseline_codec`.
        on_error: called with metric and message if a metric cannot be computed; it is then skipped.
        fields: further fields of every record, such as system, level, decoding and seed.

    Raises:
        UserError: if a metric cannot be computed and there is no `on_error`.
    """
    records = []
    for metric in metrics:
        embedder = parse_metric(metric)[1]
        if embedder not in features:
            continue
        more = dict((baselines or {}).get(metric, {}))
        try:
            part = features[embedder]
            records.append(
                score(
                    metric, part, references.get(embedder), captions, convention, **fields, **more
                )
            )
        except UserError as error:
            if on_error is None:
                raise
            on_error(metric, str(error))
    return records


def score_halves(metric: str, features: FeatureSet) -> float:
    """Baseline of real audio: a metric of one random half of the clips against the other.

    Raises:
        UserError: if there are too few clips.
    """
    keys = list(features.embeddings)
    order = [keys[i] for i in np.random.default_rng(0).permutation(len(keys))]
    half = len(order) // 2
    one = features.subset(sorted(order[:half]))
    two = features.subset(sorted(order[half:]))
    return score(metric, one, two.statistics(), system="real clips").value


def compares_sets(metric: str) -> bool:
    """Whether a metric compares two sets of clips instead of pairs of clips."""
    name = parse_metric(metric)[0]
    return name in REFERENCE_METRICS and name != "kl"


def scores_by_clip(
    metrics: Iterable[str], features: Features, references: Mapping[str, ReferenceStatistics]
) -> tuple[str, dict[str, float]]:
    """The first embedder with FAD, and the FAD of each single clip by id, sorted; empty if there is
    none."""
    for metric in metrics:
        name, embedder = parse_metric(metric)
        if name != "fad" or embedder not in features or embedder not in references:
            continue
        clips = features[embedder].embeddings
        if all(len(windows) > 1 for windows in clips.values()):
            return embedder, fad_per_clip(clips, references[embedder].moments)
        break
    return "", {}


# --- Files ----------------------------------------------------------------------------------------


def write_decoded(
    path: Path, item: DecodedItem, about: Mapping[str, Any], with_codes: bool
) -> None:
    """Write a clip, its JSON and, if requested, codes and unmasking steps (`.npz`) for reports.

    Raises:
        UserError: if a file cannot be written.
    """
    note = {"prompt": item.caption, "item": item.key} | dict(about)
    write_audio(path, item.wav.T.cpu().numpy(), item.sample_rate, note)
    if with_codes:
        arrays = {
            "codes": item.codes.cpu().numpy().astype(np.uint16),
            "order": item.unmask_step.cpu().numpy(),
        }
        np.savez_compressed(path.with_suffix(".npz"), allow_pickle=False, **arrays)
