"""Best of n: a judge scores the candidates for a clip, and the best is kept.

Clips are normalised as in evaluation, so that a judge equals the metric of the same name. Evaluate
the chosen clips with other metrics than the judge's.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from magnet_train.common.audio_files import clipped_share
from magnet_train.common.errors import UserError
from magnet_train.evaluation.clips import Reference
from magnet_train.evaluation.scorer import (
    SILENT_RMS,
    AudioClip,
    embed_clips,
    prepare_generated,
    prepare_reference,
    read_clips,
)
from magnet_train.metrics.clap_score import cosines
from magnet_train.metrics.embedders import Embedder, load_embedder
from magnet_train.metrics.embedding_sets import fad_per_clip
from magnet_train.metrics.music import measure_clip, parse_key, parse_tempo, score_music
from magnet_train.metrics.reference import ReferenceStatistics
from magnet_train.metrics.scoring import parse_metric

MAX_CLIPPED = 0.001
"""Maximum share of clipped samples of a candidate; more is audible."""
MUSIC_JUDGES = {"key_rank": -1, "beat": 1, "scale_fit": 1, "periodicity": 1}
"""Measures of metrics/music.py for judges; 1 = higher is better, -1 = lower is better."""
DEFAULT_JUDGE = "text/musicnn"

Judge = Callable[[AudioClip, str], float]
"""A normalised mono clip and its caption -> score, higher is better."""


def check_judge(metric: str, reference: str | None, prompts: Sequence[str]) -> None:
    """Check a judge before anything is loaded.

    Args:
        metric: fad/EMBEDDER, text/EMBEDDER, or music/MEASURE of MUSIC_JUDGES.
        reference: folder of real audio or saved statistics, for fad.
        prompts: prompts of the clips.

    Raises:
        UserError: if it is unknown, or the reference or a key or tempo in a prompt is missing.
    """
    name, _, figure = metric.partition("/")
    if name == "music":
        _check_music_judge(metric, figure, prompts)
        return
    if name not in ("fad", "text"):
        raise UserError(f"--judge {metric}: choose fad/EMBEDDER, text/EMBEDDER or music/FIGURE")
    parse_metric(metric)
    if name == "fad" and reference is None:
        raise UserError(
            f"--judge {metric}: give --reference, a folder of real audio or saved statistics"
        )
    if name == "text" and not all(p.strip() for p in prompts):
        raise UserError(f"--judge {metric}: needs a prompt; choose another judge for no text")


def _check_music_judge(metric: str, figure: str, prompts: Sequence[str]) -> None:
    if figure not in MUSIC_JUDGES:
        known = ", ".join(f"music/{figure}" for figure in MUSIC_JUDGES)
        raise UserError(f"--judge {metric}: choose one of {known}")
    parse = {"key_rank": parse_key, "beat": parse_tempo}.get(figure)
    if parse is not None and (bad := [p for p in prompts if parse(p) is None]):
        what = "key" if figure == "key_rank" else "tempo"
        raise UserError(f"--judge {metric}: the prompt {bad[0]!r} names no {what}")


def load_judge(metric: str, reference: str | None, device: str) -> Judge:
    """Load a judge, after `check_judge`.

    Raises:
        UserError: if its network or its reference cannot be loaded.
    """
    name, _, figure = metric.partition("/")
    if name == "music":
        return partial(_music, figure=figure)
    embedder = load_embedder(figure, device=device)
    if name == "text":
        if embedder.embed_text is None:
            raise UserError(f"--judge {metric}: no text encoder; install magnet-train[demo]")
        return partial(_text, embedder=embedder)
    return partial(_fad, embedder=embedder, statistics=_statistics(reference, embedder))


def best_of(candidates: Sequence[AudioClip], caption: str, judge: Judge) -> tuple[int, float]:
    """Index and score of the best candidate; the first one in ties.

    Clipped and silent candidates are only used if there are no others.
    """
    levelled = list(prepare_generated(candidates))
    scores = [judge(clip, caption) for clip in levelled]
    allowed = [i for i, clip in enumerate(candidates) if not _is_broken(clip.wav)]
    best = max(allowed or range(len(candidates)), key=lambda i: scores[i])
    return best, scores[best]


def _is_broken(wav: Tensor) -> bool:
    silent = wav.square().mean().sqrt().item() < SILENT_RMS
    return silent or clipped_share(wav.numpy()) > MAX_CLIPPED


def _statistics(reference: str | None, embedder: Embedder) -> ReferenceStatistics:
    found = Reference.open(reference, [embedder])
    if found.clips:
        clips = prepare_reference(read_clips({k: clip.path for k, clip in found.clips.items()}))
        features = embed_clips(clips, [embedder], "reference", len(found.clips))
        found.compute_statistics(features)
    return found.statistics[embedder.name]


def _fad(
    clip: AudioClip, caption: str, embedder: Embedder, statistics: ReferenceStatistics
) -> float:
    windows = embedder(clip.wav, clip.sample_rate, clip.key).embeddings
    return -fad_per_clip({clip.key: windows}, statistics.moments)[clip.key]


def _text(clip: AudioClip, caption: str, embedder: Embedder) -> float:
    vector = embedder(clip.wav, clip.sample_rate, clip.key).vector
    assert vector is not None and embedder.embed_text is not None
    return cosines(vector[None], embedder.embed_text([caption])).item()


def _music(clip: AudioClip, caption: str, figure: str) -> float:
    heard = measure_clip(clip.wav, clip.sample_rate)
    figures = score_music({clip.key: heard}, {clip.key: caption})
    return MUSIC_JUDGES[figure] * figures[figure].value
