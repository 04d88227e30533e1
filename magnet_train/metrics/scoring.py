"""Figures from what was heard: the one place where clips by id become records.

A metric is named KIND/LISTENER, as in `fad/vggish` or `kl/passt`. Everything is ordered by item id and computed in
float64 from gathered items, so a figure is the same however the items were dealt out to ranks and batches.

Shapes: n windows, d dimensions, c classes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.metrics import embedding_sets as sets
from magnet_train.metrics.clap_score import clap_summary
from magnet_train.metrics.distributed import gather_by_id
from magnet_train.metrics.embedders import LISTENERS, HeardClip, Listener
from magnet_train.metrics.intervals import bootstrap_interval, frechet_interval
from magnet_train.metrics.kl import clip_divergences
from magnet_train.metrics.record import Record
from magnet_train.metrics.reference import ReferenceStatistics

KINDS = {
    "fad": "Fréchet audio distance",
    "fad_inf": "FAD of endless clips, by extrapolation",
    "kad": "kernel audio distance",
    "kid": "kernel distance with a cubic kernel",
    "precision": "share of generated windows near a real one",
    "recall": "share of real windows near a generated one",
    "density": "real windows near each generated one, relative to their number",
    "coverage": "share of real windows with a generated one near",
    "vendi": "effective number of different windows",
    "kl": "divergence between what a classifier hears in the real clip and in the generated one",
    "text": "cosine of a clip and its caption",
    "text_shuffled": "the same with other clips' captions: the control",
    "text_r1": "share of captions whose clip is the most similar of all",
    "text_r10": "share of captions whose clip is among the ten most similar",
}
"""What a metric is called and what it tells."""
NEEDS_REFERENCE = ("fad", "fad_inf", "kad", "kid", "precision", "recall", "density", "coverage", "kl")
MOST_WINDOWS = 5000
"""Drawn, seeded, where all pairs are compared; a record says how many there were."""


def parse_metric(name: str) -> tuple[str, str]:
    """`KIND/LISTENER` in its two parts.

    Raises:
        UserError: if either is not known, or the listener has no such metric.

    >>> parse_metric("fad/vggish")
    ('fad', 'vggish')
    """
    kind, _, listener = name.partition("/")
    if kind not in KINDS or listener not in LISTENERS:
        raise UserError(f"metric {name!r}: give KIND/LISTENER of {', '.join(KINDS)} / {', '.join(LISTENERS)}")
    if kind == "kl" and listener not in ("musicnn", "passt", "passt-10s"):
        raise UserError(f"metric {name!r}: KL needs a classifier: kl/musicnn, kl/passt or kl/passt-10s")
    if kind.startswith("text") and listener not in ("musicnn", "clap", "laion-clap"):
        raise UserError(f"metric {name!r}: captions are heard by text/clap, text/laion-clap and text/musicnn only")
    return kind, listener


@dataclass
class HeardSet:
    """What one network heard of many clips, by their ids."""

    listener: Listener
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    rates: set[int] = field(default_factory=set)
    """Sample rates of the clips, in Hz."""

    def add(self, key: str, wav: Tensor, sample_rate: int) -> None:
        """Hear one clip `channels t`; a key that was heard before is passed over.

        Raises:
            UserError: as the listener does.
        """
        if key not in self.embeddings:
            self.put(key, self.listener(wav, sample_rate, key), sample_rate)

    def put(self, key: str, heard: HeardClip, sample_rate: int) -> None:
        """What was heard of a clip elsewhere."""
        self.rates.add(sample_rate)
        self.embeddings[key] = heard.embeddings
        if heard.outputs is not None:
            self.outputs[key] = heard.outputs
        if heard.vector is not None:
            self.vectors[key] = heard.vector

    def gathered(self) -> "HeardSet":
        """The clips of all ranks; a collective."""
        rates = gather_by_id({str(rate): torch.empty(0) for rate in self.rates})
        embeddings, outputs, vectors = (gather_by_id(x) for x in (self.embeddings, self.outputs, self.vectors))
        return HeardSet(self.listener, embeddings, outputs, vectors, {int(rate) for rate in rates})

    def statistics(self, keep: bool = True, names: Iterable[str] | None = None) -> ReferenceStatistics:
        """As a reference.

        Args:
            keep: whether each clip's embeddings too, as kernel and neighbour metrics need them.
            names: what tells this set of clips from any other, such as ids with the hashes of their files; else ids.

        Raises:
            UserError: for fewer than two windows.
        """
        return ReferenceStatistics.of(
            self.embeddings, embedder=self.listener.id, embedder_hash=self.listener.hash,
            resampler=self.listener.resampler, windowing=self.listener.windowing, logits=self.outputs,
            keep_embeddings=keep, names=names,
        )  # fmt: skip


def score(
    metric: str,
    heard: HeardSet,
    reference: ReferenceStatistics | None = None,
    captions: Mapping[str, str] | None = None,
    convention: str | None = None,
    **about: Any,
) -> Record:
    """One figure with all that must be known of it.

    Args:
        metric: KIND/LISTENER, the listener that of `heard`.
        heard: of all clips (`gathered`).
        reference: what the same network heard in real clips; for KL with outputs under the same ids.
        captions: by id, for text metrics.
        convention: of KL, a name of `kl.CONVENTIONS`; that of the listener if not given.
        about: further fields of the record, such as system, level, decoding and seed.

    Raises:
        UserError: if clips, captions or references are missing, or too few for the metric to have a meaning.
    """
    kind, name = parse_metric(metric)
    listener = heard.listener
    assert name == listener.name
    if not heard.embeddings:
        raise UserError(f"{metric}: no clips; generate or give some")
    if kind in NEEDS_REFERENCE and reference is None:
        raise UserError(f"{metric}: no reference; give --reference")
    fields: dict[str, Any] = {
        "metric": metric, "embedder": listener.id, "embedder_hash": listener.hash, "resampler": listener.resampler,
        "windowing": listener.windowing, "num_clips": len(heard.embeddings), "sample_rates": tuple(sorted(heard.rates)),
        "num_windows": sum(len(x) for x in heard.embeddings.values()),
        "reference_hash": reference.ids_hash if reference is not None and kind in NEEDS_REFERENCE else None,
    }  # fmt: skip
    windows = torch.cat(list(heard.embeddings.values())).double()
    several, interval = len(heard.embeddings) > 1, None
    try:
        if kind == "fad":
            assert reference is not None
            value = sets.Moments.of(windows).distance(reference.moments)
            interval = _fad_interval(list(heard.embeddings.values()), reference) if several else None
        elif kind == "fad_inf":
            assert reference is not None
            draws = sets.draws_of_clips([len(x) for x in heard.embeddings.values()])
            line = sets.fad_infinity(windows, reference.moments, draws)
            value, fields["details"] = line.value, {"r2": line.r2, "slope": line.slope}
        elif kind == "kl":
            assert reference is not None
            convention = convention or listener.convention
            values = _divergences(heard, reference, convention)
            value = torch.cat(values).mean().item()
            interval = bootstrap_interval(values) if several else None
            fields |= {"convention": convention, "num_windows": sum(len(v) for v in values)}
        elif kind.startswith("text"):
            value, interval = _text(kind, heard, captions)
            fields["num_windows"] = len(heard.embeddings)
        else:
            windows = sets.subsample(windows, MOST_WINDOWS)
            fields["num_windows"] = len(windows)
            value = sets.vendi_score(windows) if kind == "vendi" else _of_sets(kind, windows, reference)
    except UserError as error:
        raise error if str(error).startswith(metric) else UserError(f"{metric}: {error}") from error
    return Record(value=value, interval=interval, **fields, **about)


def _fad_interval(clips: Sequence[Tensor], reference: ReferenceStatistics) -> tuple[float, float] | None:
    try:
        return frechet_interval(clips, reference.moments)
    except UserError:  # too few windows in half of the clips; the figure itself stands
        return None


def _divergences(heard: HeardSet, reference: ReferenceStatistics, convention: str | None) -> list[Tensor]:
    assert convention is not None
    if not reference.logits:
        raise UserError("the reference holds no classifier outputs; compute it anew")
    values = []
    for key, outputs in heard.outputs.items():
        if key not in reference.logits:
            raise UserError(f"clip {key} has no counterpart in the reference; KL pairs clips by name")
        try:
            values.append(clip_divergences(convention, reference.logits[key], outputs))
        except UserError as error:
            raise UserError(f"clip {key}: {error}") from error
    return values


def _text(kind: str, heard: HeardSet, captions: Mapping[str, str] | None) -> tuple[float, tuple[float, float] | None]:
    if heard.listener.embed_text is None or not heard.vectors:
        raise UserError("no text encoder; install magnet-train[demo]")
    missing = [key for key in heard.vectors if not (captions or {}).get(key)]
    if captions is None or missing:
        raise UserError(f"clip {missing[0] if missing else ''} has no caption; give --captions")
    text = heard.listener.embed_text([captions[key] for key in heard.vectors])
    summary = clap_summary(torch.stack(list(heard.vectors.values())), text)
    if kind == "text":
        return summary.mean, summary.interval
    if kind == "text_shuffled":
        if summary.shuffled is None:
            raise UserError("one clip alone has no other's caption; score two or more")
        return summary.shuffled, None
    return (summary.recall_at_1 if kind == "text_r1" else summary.recall_at_10), None


def _of_sets(kind: str, windows: Tensor, reference: ReferenceStatistics | None) -> float:
    assert reference is not None
    if not reference.embeddings:
        raise UserError("the reference file holds no embeddings of its clips; give the folder, or write it anew")
    real = sets.subsample(torch.cat(list(reference.embeddings.values())).double(), MOST_WINDOWS)
    if kind in ("kad", "kid"):
        return sets.kad(windows, real) if kind == "kad" else sets.kid(windows, real)
    return getattr(sets.neighbourhoods(windows, real), kind)


@contextmanager
def together(alone: bool = False) -> Iterator[None]:
    """What fails in here on one rank ends all of them with its message, so that none waits for it. A collective.

    Nothing in here may be a collective itself. Where there is one rank, an error stays what it is.

    Args:
        alone: whether this rank runs without others, whatever torch.distributed says.

    Raises:
        UserError: on all ranks, with the failure of the lowest rank that has one.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    errors: list[Any] = [None]
    if not alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        message = None if failure is None else str(failure) if isinstance(failure, UserError) else repr(failure)
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, message)
    elif failure is not None:
        raise failure
    for rank, message in enumerate(errors):
        if message is not None:
            raise UserError(f"rank {rank}: {message}") from failure
