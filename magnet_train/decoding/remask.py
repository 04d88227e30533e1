"""Remasking: the frames that are masked again for the next step (MAGNeT, Sec. 3.2 and App. B).

Shapes: b examples, t frames, s spans. Masks are bool, True = to be predicted.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def _count(share: Tensor, units: Tensor) -> Tensor:
    """Number of `units` (`b`) to mask: the share, rounded down, but at least one."""
    return (float(share) * units).floor().clamp(min=1)  # `share` is on the CPU: no device sync


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise from numbers in [0, 1)."""
    return -(-uniform.clamp(1e-6, 1 - 1e-6).log()).log()


def remask_grid(
    certainty: Tensor,
    masked: Tensor,
    given: Tensor,
    share: Tensor,
    span_len: int,
    scoring: str,
    order_noise: Tensor,
    order_temperature: float = 0.0,
) -> Tensor:
    """Lowest-scoring spans of a fixed grid among those just predicted: `b t` -> bool `b t`.

    The last span may be shorter; scores are means or maxima over frames, so they are comparable.

    Args:
        certainty: `b t`, probability of the chosen code.
        masked: `b t`, frames that the last step predicted.
        given: `b t`, frames that are never masked.
        share: share of the spans to mask, 0 to 1.
        span_len: length of a span, in frames.
        scoring: "max" (probability of the most likely code), "prod" (mean log probability) or
            "random".
        order_noise: `b t` uniform in [0, 1); each span uses the value of its first frame.
        order_temperature: scale of the noise added to the scores; 0 = none.
    """
    t = certainty.shape[1]
    tail = -t % span_len

    def spans(x: Tensor) -> Tensor:  # b t -> b s span_len, nothing behind the end
        return F.pad(x, (0, tail)).unflatten(1, (-1, span_len))

    noise = order_noise[:, ::span_len]
    open_frames = spans(masked)
    if scoring == "random":
        score = noise
    elif scoring == "max":
        best = spans(certainty).masked_fill(~open_frames, 0).amax(-1)
        score = 1 - best if order_temperature == 0 else -best.clamp(min=1e-30).log()
    else:
        surprise = -spans(certainty.clamp(min=1e-30).log()).masked_fill(~open_frames, 0)
        score = surprise.sum(-1) / open_frames.sum(-1).clamp(min=1)
    if order_temperature > 0:
        score = score + order_temperature * gumbel(noise)
    score = score.masked_fill(~open_frames.any(-1), -math.inf)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen = rank < _count(share, spans(~given).any(-1).sum(1))[:, None]
    return chosen.repeat_interleave(span_len, 1)[:, :t] & masked


def remask_sliding(
    certainty: Tensor,
    masked: Tensor,
    given: Tensor,
    share: Tensor,
    span_len: int,
    scoring: str,
    order_noise: Tensor,
    order_temperature: float = 0.0,
) -> Tensor:
    """Lowest-scoring spans that start at any frame, with coverage closest to the share.

    `b t` -> bool `b t`. Spans are taken in order of their summed surprise. A frame is covered when
    the first span over it is taken, so the coverage of n spans is computed for all n at once,
    without a search. Arguments as in `remask_grid`; any scoring except "random" means "prod".
    """
    t = certainty.shape[1]
    length = min(span_len, t)
    surprise = -certainty.clamp(min=1e-30).log() if scoring != "random" else order_noise
    if order_temperature > 0:
        surprise = surprise + order_temperature * gumbel(order_noise)
    # Frames that were not just predicted have the lowest surprise, so their spans come last.
    surprise = surprise.masked_fill(~masked, -1e4)
    score = surprise.unfold(1, length, 1).sum(-1)  # b s
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    never = t + 1
    over = F.pad(rank, (length - 1, length - 1), value=never).unfold(
        1, length, 1
    )  # b t length, spans over a frame
    first = over.amin(-1).masked_fill(~masked, never)
    covered = (
        torch.zeros(len(first), t + 2, device=first.device)
        .scatter_add_(1, first, masked.float())
        .cumsum(1)
    )
    target = _count(share, (~given).sum(1))[:, None]
    # Entry n of `covered` is the coverage of the first n + 1 spans; in ties use fewer spans.
    last = (covered[:, : rank.shape[1]] - target).abs().argmin(1, keepdim=True)
    return (first <= last) & masked
