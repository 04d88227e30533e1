"""Differences between systems, paired by clip: both systems' clips have the same names.

Clips of the same caption are about equally difficult, so the interval of a difference is often
narrower than those of the two values. Metrics that are means over clips get a paired t-test; FAD
gets the half-sample jackknife of `intervals.frechet_interval`, with the same halves for both
systems. Holm's correction is over all differences of a call.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from magnet_train.common.errors import UserError
from magnet_train.common.tables import markdown_table
from magnet_train.evaluation.scorer import Features
from magnet_train.metrics.intervals import frechet_of_samples
from magnet_train.metrics.reference import ReferenceStatistics
from magnet_train.metrics.scoring import FeatureSet, parse_metric, score
from magnet_train.sweeps.ablation import Difference, holm
from magnet_train.tracking.logged import find

MEANS_OVER_CLIPS = ("kl", "text", "key_rank", "scale_fit", "beat", "periodicity", "chroma_change")
"""Metrics that are means of one value per clip."""
MIN_CLIPS = 4
DRAWS = 100
"""Halves of the clips that are drawn for an interval of FAD."""
Pair = tuple[FeatureSet, FeatureSet]
"""Features of a system and of the first one."""


def paired_differences(
    metrics: Sequence[str],
    systems: Mapping[str, Features],
    references: Mapping[str, ReferenceStatistics],
    captions: Mapping[str, Mapping[str, str]],
    convention: str | None = None,
) -> dict[tuple[str, str], Difference]:
    """Differences of all other systems from the first, by metric and system.

    Args:
        metrics: metrics as METRIC/EMBEDDER; those that are neither FAD nor means over clips are
            skipped.
        systems: features of all clips, by system and embedder.
        references: reference statistics by embedder.
        captions: captions by system and clip id.
        convention: convention of KL (default: the classifier's).
    """
    (first, base), *others = systems.items()
    found: dict[tuple[str, str], Difference] = {}
    for metric in metrics:
        name, embedder = parse_metric(metric)
        if embedder not in base or name not in ("fad", *MEANS_OVER_CLIPS):
            continue
        reference = references.get(embedder)
        for system, features in others:
            both = features[embedder], base[embedder]
            if name == "fad":
                assert reference is not None
                difference = _fad_difference(both, reference)
            else:
                texts = captions[system], captions[first]
                difference = _mean_difference(metric, both, texts, reference, convention)
            if difference is not None:
                found[metric, system] = difference
    return holm(found)  # type: ignore[arg-type]


def _shared(systems: Pair) -> list[str]:
    """Clips that both systems have."""
    return [key for key in systems[1].embeddings if key in systems[0].embeddings]


def _mean_difference(
    metric: str,
    systems: Pair,
    captions: tuple[Mapping[str, str], Mapping[str, str]],
    reference: ReferenceStatistics | None,
    convention: str | None,
) -> Difference | None:
    """Difference of means over the clips for which both have the metric; None for too few."""
    pairs: list[tuple[float, float]] = []
    for key in _shared(systems):
        one, other = (
            _value(metric, part, key, reference, texts, convention)
            for part, texts in zip(systems, captions, strict=True)
        )
        if one is not None and other is not None:
            pairs.append((one, other))
    return Difference.of(pairs) if len(pairs) >= MIN_CLIPS else None


def _value(
    metric: str,
    features: FeatureSet,
    key: str,
    reference: ReferenceStatistics | None,
    captions: Mapping[str, str],
    convention: str | None,
) -> float | None:
    """The metric of a single clip; None if it has none, such as a key of a caption without one."""
    try:
        clip = features.subset([key])
        return score(metric, clip, reference, captions, convention, system="").value
    except UserError:
        return None


def _fad_difference(systems: Pair, reference: ReferenceStatistics) -> Difference | None:
    """FAD of the first system less that of the second, see `intervals.frechet_interval`; None for
    too few clips."""
    from scipy.stats import norm

    keys = _shared(systems)
    if len(keys) < MIN_CLIPS:
        return None
    half = len(keys) // 2
    rng = np.random.default_rng(0)
    drawn = torch.zeros(DRAWS + 1, len(keys), dtype=torch.float64)
    for row in drawn[:-1]:
        row[rng.permutation(len(keys))[:half]] = 1.0
    drawn[-1] = 1.0  # all clips
    clips = [[part.embeddings[key] for key in keys] for part in systems]
    try:
        fads = [frechet_of_samples(part, reference.moments, drawn) for part in clips]
    except UserError:  # fewer than two windows in half of the clips
        return None
    difference = fads[0] - fads[1]
    value, spread = difference[-1].item(), difference[:-1].std().item()
    spread *= (half / (len(keys) - half)) ** 0.5
    p = 2 * float(norm.sf(abs(value) / spread)) if spread else float(not value)
    return Difference(value, 1.96 * spread, float("nan"), p, len(keys))


def differences_text(first: str, found: Mapping[tuple[str, str], Difference]) -> str:
    """A table of differences with a conclusion for each; empty if there are none."""
    if not found:
        return ""
    rows = [
        [
            system,
            metric,
            str(d),
            f"{d.p:.2g}",
            str(d.num_seeds),
            conclusion(first, system, metric, d),
        ]
        for (metric, system), d in found.items()
    ]
    heads = ["system", "metric", f"difference from {first}", "p", "clips", "conclusion"]
    return (
        f"\nDifferences from {first}, paired by clip: 95 % interval, p with Holm's correction\n\n"
        f"{markdown_table(heads, rows, 2)}"
    )


def conclusion(first: str, system: str, metric: str, difference: Difference) -> str:
    """What a difference shows, in words."""
    word = difference.direction
    if not word:
        return "no difference shown"
    better = getattr(find(f"val/{metric}"), "better", "")
    judged = {"": "", word: "better, "}.get(better, "worse, ")
    return f"{judged}{system} is {word} than {first}"
