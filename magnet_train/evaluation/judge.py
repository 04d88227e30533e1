"""Best of n: a judge scores the candidates for a clip, and the best is kept.

Clips are normalised as in evaluation, so that a judge equals the metric of the same name. Evaluate
the chosen clips with other metrics than the judge's.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from magnet_train.common.audio_files import clipped_share
from magnet_train.common.errors import UserError
from magnet_train.evaluation.clips import Reference
from magnet_train.evaluation.scorer import (
    AudioClip,
    embed_clips,
    is_silent,
    prepare_generated,
    prepare_reference,
    read_clips,
)
from magnet_train.metrics.embedders import Embedder, load_embedder
from magnet_train.metrics.music import parse_key, parse_tempo
from magnet_train.metrics.reference import ReferenceStatistics
from magnet_train.metrics.scoring import FeatureSet, parse_metric, score

MAX_CLIPPED = 0.001
"""Maximum share of clipped samples of a candidate; more is audible."""
MUSIC_JUDGES = {"key_rank": -1, "beat": 1, "scale_fit": 1, "periodicity": 1}
"""Measures of metrics/music.py for judges; 1 = higher is better, -1 = lower is better."""
JUDGES = {"fad": -1, "text": 1} | MUSIC_JUDGES
NEEDED_WORDS = {"key_rank": (parse_key, "key"), "beat": (parse_tempo, "tempo")}
"""What a prompt must contain for a judge: a function that finds it, and its name."""
DEFAULT_JUDGE = "text/musicnn"

Judge = Callable[[AudioClip, str], float]
"""A normalised mono clip and its caption -> score, higher is better."""


def check_judge(metric: str, reference: str | None, prompts: Sequence[str]) -> None:
    """Check a judge before anything is loaded.

    Args:
        metric: fad/EMBEDDER, text/EMBEDDER, or music/MEASURE of JUDGES.
        reference: folder of real audio or saved statistics, for fad.
        prompts: prompts of the clips.

    Raises:
        UserError: if it is unknown, or the reference or a key or tempo in a prompt is missing.
    """
    music = [f"music/{name}" for name in MUSIC_JUDGES]
    if metric not in music and not metric.startswith(("fad/", "text/")):
        known = ", ".join(["fad/EMBEDDER", "text/EMBEDDER", *music])
        raise UserError(f"--judge {metric}: choose {known}")
    name, _ = parse_metric(metric)
    if name == "fad" and reference is None:
        raise UserError(
            f"--judge {metric}: give --reference, a folder of real audio or saved statistics"
        )
    if name == "text" and not all(prompt.strip() for prompt in prompts):
        raise UserError(f"--judge {metric}: needs a prompt; give one, or choose another judge")
    if name in NEEDED_WORDS:
        parse, what = NEEDED_WORDS[name]
        for prompt in prompts:
            if parse(prompt) is None:
                raise UserError(f"--judge {metric}: the prompt {prompt!r} names no {what}")


def load_judge(metric: str, reference: str | None, device: str) -> Judge:
    """Load a judge, after `check_judge`.

    Raises:
        UserError: if its network or its reference cannot be loaded.
    """
    name, embedder_name = parse_metric(metric)
    embedder = load_embedder(embedder_name, device=device)
    if name == "text" and embedder.embed_text is None:
        raise UserError(f"--judge {metric}: no text encoder; install magnet-train[demo]")
    statistics = _statistics(reference, embedder) if name == "fad" else None

    def judge(clip: AudioClip, caption: str) -> float:
        features = FeatureSet(embedder)
        features.add(clip.key, clip.wav, clip.sample_rate)
        record = score(metric, features, statistics, {clip.key: caption}, system="candidate")
        return JUDGES[name] * record.value

    return judge


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
    return is_silent(wav) or clipped_share(wav.numpy()) > MAX_CLIPPED


def _statistics(reference: str | None, embedder: Embedder) -> ReferenceStatistics:
    found = Reference.open(reference, [embedder])
    if found.clips:
        clips = prepare_reference(read_clips({k: clip.path for k, clip in found.clips.items()}))
        features = embed_clips(clips, [embedder], "reference", len(found.clips))
        found.compute_statistics(features)
    return found.statistics[embedder.name]
