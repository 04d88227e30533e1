"""Computes records of all metrics from features.

A metric is named METRIC/EMBEDDER, as in `fad/vggish` or `kl/passt`, or music/MEASURE, as in
`music/key_rank`. Clips are sorted by id and metrics are computed in float64 from gathered features,
so a value does not depend on how the clips were split over ranks and batches.

Shapes: n windows, d dimensions, c classes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.metrics import embedding_sets as sets
from magnet_train.metrics import music
from magnet_train.metrics.clap_score import clap_summary
from magnet_train.metrics.distributed import all_gather_by_id, all_gather_list
from magnet_train.metrics.embedders import EMBEDDERS, ClipFeatures, Embedder
from magnet_train.metrics.intervals import bootstrap_interval, frechet_interval
from magnet_train.metrics.kl import clip_divergences
from magnet_train.metrics.record import Record
from magnet_train.metrics.reference import ReferenceStatistics

METRICS = {
    "fad": "Fréchet audio distance",
    "fad_inf": "FAD extrapolated to infinitely many samples",
    "kad": "kernel audio distance",
    "kid": "kernel distance with a cubic kernel",
    "precision": "share of generated windows near a real one",
    "recall": "share of real windows near a generated one",
    "density": "real windows near each generated one, relative to their number",
    "coverage": "share of real windows with a generated one nearby",
    "vendi": "effective number of different windows",
    "kl": "KL divergence between a classifier's outputs for the real and the generated clip",
    "text": "cosine similarity of a clip and its caption",
    "text_shuffled": "text similarity with the captions of other clips, as a control",
    "text_r1": "share of captions whose clip is the most similar of all",
    "text_r10": "share of captions whose clip is among the ten most similar",
}
"""Names of metrics and their meaning; those of music are `music.MEASURES`."""
REFERENCE_METRICS = (
    "fad",
    "fad_inf",
    "kad",
    "kid",
    "precision",
    "recall",
    "density",
    "coverage",
    "kl",
    *music.REFERENCE_MEASURES,
)
"""Metrics that need a reference."""
CLASSIFIERS = ("musicnn", "passt", "passt-10s")
TEXT_EMBEDDERS = ("musicnn", "clap", "laion-clap")


def parse_metric(name: str) -> tuple[str, str]:
    """Metric and embedder of `METRIC/EMBEDDER`; the embedder of `music/MEASURE` is "music".

    Raises:
        UserError: if either is unknown, or the embedder does not support the metric.

    >>> parse_metric("fad/vggish")
    ('fad', 'vggish')
    >>> parse_metric("music/key_rank")
    ('key_rank', 'music')
    """
    metric, _, embedder = name.partition("/")
    if metric == "music" and embedder in music.MEASURES:
        return embedder, metric
    if metric not in METRICS or embedder not in EMBEDDERS:
        raise UserError(
            f"metric {name!r}: give METRIC/EMBEDDER of {', '.join(METRICS)} / "
            f"{', '.join(EMBEDDERS)}, or music/MEASURE of {', '.join(music.MEASURES)}"
        )
    if metric == "kl" and embedder not in CLASSIFIERS:
        raise UserError(f"metric {name!r}: KL needs a classifier: kl/{', kl/'.join(CLASSIFIERS)}")
    if metric.startswith("text") and embedder not in TEXT_EMBEDDERS:
        raise UserError(f"metric {name!r}: only {', '.join(TEXT_EMBEDDERS)} embed captions")
    return metric, embedder


@dataclass
class FeatureSet:
    """Features of many clips by one embedder, by clip id."""

    embedder: Embedder
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    rates: set[int] = field(default_factory=set)
    """Sample rates of the clips, in Hz."""
    clipped: dict[str, Tensor] = field(default_factory=dict)
    """Share of clipped samples in each embedded clip; empty if not measured."""

    def add(self, key: str, wav: Tensor, sample_rate: int) -> None:
        """Embed one clip `channels t`; existing keys are skipped.

        Raises:
            UserError: if the clip cannot be embedded.
        """
        if key not in self.embeddings:
            self.put(key, self.embedder(wav, sample_rate, key), sample_rate)

    def put(self, key: str, features: ClipFeatures, sample_rate: int) -> None:
        """Store the features of one clip."""
        self.rates.add(sample_rate)
        self.embeddings[key] = features.embeddings
        if features.outputs is not None:
            self.outputs[key] = features.outputs
        if features.vector is not None:
            self.vectors[key] = features.vector

    def all_gather(self) -> "FeatureSet":
        """The features of all ranks. Collective."""
        return FeatureSet(
            self.embedder,
            all_gather_by_id(self.embeddings),
            all_gather_by_id(self.outputs),
            all_gather_by_id(self.vectors),
            set(all_gather_list(list(self.rates))),
            all_gather_by_id(self.clipped),
        )

    def subset(self, keys: Iterable[str]) -> "FeatureSet":
        """The features of these clips."""
        chosen = dict.fromkeys(keys)
        parts = (
            {k: part[k] for k in chosen if k in part}
            for part in (self.embeddings, self.outputs, self.vectors)
        )
        return FeatureSet(self.embedder, *parts, rates=self.rates)

    def statistics(self, names: Iterable[str] | None = None) -> ReferenceStatistics:
        """Statistics of these clips as a reference.

        `names` identify the audio, such as ids with file hashes (default: ids).

        Raises:
            UserError: for fewer than two windows.
        """
        return ReferenceStatistics.of(
            self.embeddings, logits=self.outputs, names=names, **self.embedder.protocol
        )


def load_reference(file: Path, embedder: Embedder) -> ReferenceStatistics:
    """Saved statistics of an embedder.

    Raises:
        UserError: if the file is missing, damaged or of another embedder.
    """
    return ReferenceStatistics.load(
        file, embedder=embedder.id, embedder_hash=embedder.hash, windowing=embedder.windowing
    )


class _Scored(NamedTuple):
    """A value with further fields of its record."""

    value: float
    num_windows: int
    interval: tuple[float, float] | None = None
    convention: str | None = None
    details: dict[str, float] | None = None


def score(
    metric: str,
    features: FeatureSet,
    reference: ReferenceStatistics | None = None,
    captions: Mapping[str, str] | None = None,
    convention: str | None = None,
    **fields: Any,
) -> Record:
    """One metric of a set of clips, as a record.

    Args:
        metric: METRIC/EMBEDDER, with the embedder of `features`.
        features: features of all clips (`all_gather`).
        reference: statistics of real clips from the same embedder; for KL, with outputs for the
            same ids.
        captions: captions by id, for text metrics.
        convention: convention of KL, a name of `kl.CONVENTIONS` (default: the embedder's).
        fields: further fields of the record, such as system, level, decoding and seed.

    Raises:
        UserError: if clips, captions or references are missing, or too few for the metric.
    """
    name, embedder_name = parse_metric(metric)
    assert embedder_name == features.embedder.name
    if not features.embeddings:
        raise UserError(f"{metric}: no clips; give at least one")
    if name in REFERENCE_METRICS and reference is None:
        raise UserError(f"{metric}: no reference; give --reference")
    try:
        if embedder_name == "music":
            scored = _score_music(name, features, reference, captions)
        elif name.startswith("text"):
            scored = _score_text(name, features, captions)
        elif name == "vendi":
            windows = sets.subsample(_windows(features))
            scored = _Scored(sets.vendi_score(windows), len(windows))
        else:
            assert reference is not None
            scored = _score_against(name, features, reference, convention)
    except UserError as error:
        raise UserError(f"{metric}: {error}") from error
    return Record(
        metric=metric,
        **scored._asdict(),
        **features.embedder.protocol,
        num_clips=len(features.embeddings),
        clipped_share=_mean_clipped(features),
        sample_rates=tuple(sorted(features.rates)),
        reference_hash=reference.ids_hash if reference and name in REFERENCE_METRICS else None,
        **fields,
    )


def _mean_clipped(features: FeatureSet) -> float | None:
    return torch.stack(list(features.clipped.values())).mean().item() if features.clipped else None


def _windows(features: FeatureSet) -> Tensor:
    return torch.cat(list(features.embeddings.values())).double()


def _score_against(
    name: str, features: FeatureSet, reference: ReferenceStatistics, convention: str | None
) -> _Scored:
    """Metrics that need a reference."""
    if name == "kl":
        return _score_kl(features, reference, convention or features.embedder.convention)
    windows = _windows(features)
    clips = list(features.embeddings.values())
    if name == "fad":
        value = sets.Moments.of(windows).distance(reference.moments)
        return _Scored(value, len(windows), _fad_interval(clips, reference))
    if name == "fad_inf":
        line = sets.fad_infinity(
            windows, reference.moments, sets.draws_of_clips([len(clip) for clip in clips])
        )
        return _Scored(line.value, len(windows), details={"r2": line.r2, "slope": line.slope})
    windows = sets.subsample(windows)
    real = sets.subsample(torch.cat(list(reference.embeddings.values())).double())
    kernels = {"kad": sets.kad, "kid": sets.kid}
    if name in kernels:
        value = kernels[name](windows, real)
    else:
        value = getattr(sets.neighbourhoods(windows, real), name)
    return _Scored(value, len(windows))


def _score_music(
    name: str,
    features: FeatureSet,
    reference: ReferenceStatistics | None,
    captions: Mapping[str, str] | None,
) -> _Scored:
    def unpacked(
        rows: Mapping[str, Tensor], notes: Mapping[str, Tensor]
    ) -> dict[str, music.ClipMusic]:
        return {key: music.ClipMusic.unpacked(row, notes[key]) for key, row in rows.items()}

    clips = unpacked(features.embeddings, features.outputs)
    real = {} if reference is None else unpacked(reference.embeddings, reference.logits)
    figure = music.score_music(clips, captions, real).get(name)
    if figure is None:
        missing = {"key_rank": "no caption names a key", "beat": "no caption names a tempo"}
        raise UserError(missing.get(name, "no clip, or no real clip, has a note"))
    details = {"clips_skipped": float(figure.num_skipped)}
    return _Scored(figure.value, figure.num_clips, figure.interval, details=details)


def _fad_interval(
    clips: Sequence[Tensor], reference: ReferenceStatistics
) -> tuple[float, float] | None:
    try:
        return frechet_interval(clips, reference.moments)
    except UserError:  # one clip, or too few windows in half of the clips; the value is valid
        return None


def _score_kl(
    features: FeatureSet, reference: ReferenceStatistics, convention: str | None
) -> _Scored:
    assert convention is not None
    if not reference.logits:
        raise UserError("the reference has no classifier outputs; compute it again")
    values = []
    for key, outputs in features.outputs.items():
        if key not in reference.logits:
            raise UserError(
                f"clip {key} has no counterpart in the reference; KL pairs clips by name"
            )
        try:
            values.append(clip_divergences(convention, reference.logits[key], outputs))
        except UserError as error:
            raise UserError(f"clip {key}: {error}") from error
    segments = torch.cat(values)
    interval = bootstrap_interval(values) if len(values) > 1 else None
    return _Scored(segments.mean().item(), len(segments), interval, convention)


def _score_text(name: str, features: FeatureSet, captions: Mapping[str, str] | None) -> _Scored:
    if features.embedder.embed_text is None or not features.vectors:
        raise UserError("no text encoder; pip install -e '.[demo]'")
    captions = captions or {}
    missing = [key for key in features.vectors if not captions.get(key)]
    if missing:
        raise UserError(f"clip {missing[0]} has no caption; give --captions")
    text = features.embedder.embed_text([captions[key] for key in features.vectors])
    summary = clap_summary(torch.stack(list(features.vectors.values())), text)
    values = {
        "text": summary.mean,
        "text_shuffled": summary.shuffled,
        "text_r1": summary.recall_at_1,
        "text_r10": summary.recall_at_10,
    }
    value = values[name]
    if value is None:
        raise UserError("a single clip has no other caption; score two or more")
    return _Scored(value, summary.num_pairs, summary.interval if name == "text" else None)
