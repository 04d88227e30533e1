"""CLAP score: cosine similarity of the embeddings of audio and caption.

The value depends on the checkpoint (0.13 and 0.31 were reported for the same audio), so its name
and hash are part of the record. Raw cosines, as in the MusicGen and MAGNeT tables: not multiplied
by 100 and not clipped at zero.

Shapes: b pairs, d dimensions; row i of the audio belongs to row i of the text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.metrics.intervals import bootstrap_interval


def cosines(audio: Tensor, text: Tensor) -> Tensor:
    """Cosine of every audio with every caption: `b d`, `c d` -> `b c`, float64; 0 if a vector is 0.

    Raises:
        UserError: if an embedding is NaN or infinite.
    """
    for what, x in (("audio", audio), ("text", text)):
        broken = (~torch.isfinite(x)).any(1).nonzero().flatten().tolist()
        if broken:
            raise UserError(
                f"{what} embedding {broken[0]} is NaN or infinite; check the clip and its caption"
            )
    audio, text = audio.detach().cpu().double(), text.detach().cpu().double()
    lengths = audio.norm(dim=1)[:, None] * text.norm(dim=1)
    return audio @ text.T / lengths.clamp(min=1e-8)


def retrieval(similarities: Tensor, k: int) -> float:
    """Text-to-audio recall at k: share of captions whose audio is among the k most similar clips,
    from similarities `b b` of audio by caption.

    In ties the matching audio ranks last, so that constant embeddings score 0.

    >>> retrieval(torch.eye(3), k=1)
    1.0
    """
    before = (similarities >= similarities.diagonal()).sum(0) - 1
    return (before < k).double().mean().item()


@dataclass(frozen=True)
class ClapSummary:
    """Statistics of a set of audio-caption pairs."""

    mean: float
    """The CLAP score, -1 to 1."""
    interval: tuple[float, float] | None
    """95 % interval by bootstrap over pairs; None for one pair."""
    shuffled: float | None
    """Control: mean over all pairs of audio and the caption of another; None for one pair."""
    recall_at_1: float
    recall_at_10: float
    """Recall at 10; always 1 for ten pairs or fewer, unless there are ties."""
    num_pairs: int


def clap_summary(audio: Tensor, text: Tensor) -> ClapSummary:
    """Score, interval, control and retrieval of `b d` audio and `b d` text embeddings.

    Raises:
        UserError: if an embedding is NaN or infinite.
    """
    similarities = cosines(audio, text)
    scores = similarities.diagonal()
    b = len(audio)
    several = b > 1
    return ClapSummary(
        mean=scores.mean().item(),
        interval=bootstrap_interval(scores) if several else None,
        shuffled=((similarities.sum() - scores.sum()) / (b * (b - 1))).item() if several else None,
        recall_at_1=retrieval(similarities, 1),
        recall_at_10=retrieval(similarities, 10),
        num_pairs=b,
    )
