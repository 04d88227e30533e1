"""KL divergence between a classifier's outputs for the real and for the generated clip.

KL depends on classifier, direction, windows and averaging: for the same logits, the conventions in
use give 1.25, 1.26, 0.63 and -0.34. Each convention has a name, which is part of the record.

Shapes: n segments (windows) of a clip, c classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from magnet_train.common.errors import UserError

EPSILON = 1e-6


def kl_divergence(reference: Tensor, generated: Tensor, epsilon: float = EPSILON) -> Tensor:
    """KL(reference ‖ generated) of distributions `… c`, in nats: `…`.

    `epsilon` is added to the generated side only, as in audiocraft's `kld.py`. So the value for
    identical distributions is about -c epsilon, and the maximum is -log(epsilon) = 13.8. Swap the
    arguments for the other direction; epsilon=0 gives the plain divergence.

    >>> p = torch.tensor([0.5, 0.5])
    >>> round(kl_divergence(p, torch.tensor([0.9, 0.1])).item(), 3)
    0.511
    """
    # xlogy: zero where the reference is, and NaN where it is NaN.
    return (torch.xlogy(reference, reference) - torch.xlogy(reference, generated + epsilon)).sum(-1)


def tag_distribution(tags: Tensor) -> Tensor:
    """Probabilities of independent tags `… c` (sigmoids), divided by their sum."""
    return tags / tags.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Convention:
    """How divergences are computed from a classifier's outputs."""

    distribution: Callable[[Tensor], Tensor]
    """Outputs `… c` -> distribution `… c`."""
    epsilon: float = EPSILON
    """Added to the second argument of the divergence."""
    pooled: bool = False
    """Average a clip's outputs over its segments first; otherwise compare segments in pairs, with
    equal weight."""
    reverse: bool = False
    """Compute KL(generated ‖ reference)."""


_softmax = partial(torch.softmax, dim=-1)

CONVENTIONS = {
    # audiocraft/metrics/kld.py: `kld`, PaSST logits; used in the MusicGen and MAGNeT tables.
    "audiocraft": Convention(_softmax),
    # audioldm_eval/metrics/kl.py: PANNs logits; one segment per clip, so equal to audiocraft's.
    "audioldm_eval": Convention(_softmax),
    # The same with sigmoids, which are not a distribution, so it may be negative.
    "audioldm_eval-sigmoid": Convention(torch.sigmoid),
    # av-benchmark: PaSST or PANNs.
    "av-benchmark": Convention(_softmax, epsilon=0.0),
    # stable-audio-metrics: PaSST, overlapping windows; the other direction.
    "stable-audio-metrics": Convention(_softmax, pooled=True, reverse=True),
    # Ours, for musicnn's 50 tags; its inputs are probabilities, not logits.
    "musicnn-tags": Convention(tag_distribution, pooled=True),
}
"""Conventions by name. All need logits, except for "musicnn-tags", which needs probabilities."""


def clip_divergences(convention: str, reference: Tensor, generated: Tensor) -> Tensor:
    """Divergences of one clip in float64: `n`, one per segment, or `1` if segments are pooled.

    Args:
        convention: a name of `CONVENTIONS`.
        reference: outputs for the real clip, `n c`, or `c` for a single segment.
        generated: outputs for the generated clip; its n may differ if segments are pooled.

    Raises:
        UserError: for different numbers of segments, and outputs that are NaN, infinite, all zero
            or missing.
    """
    how = CONVENTIONS[convention]
    p, q = (x.detach().double().reshape(-1, x.shape[-1]) for x in (reference, generated))
    if how.pooled:
        p, q = p.mean(0, keepdim=True), q.mean(0, keepdim=True)
    elif len(p) != len(q):
        raise UserError(
            f"{len(p)} reference segments and {len(q)} generated ones; cut both clips to one length"
        )
    p, q = how.distribution(p), how.distribution(q)
    if how.reverse:
        p, q = q, p
    divergences = kl_divergence(p, q, how.epsilon)
    # Outputs are checked too, because a logit of minus infinity does not show in the divergence.
    if not len(divergences) or not all(
        torch.isfinite(x).all() for x in (reference, generated, divergences)
    ):
        raise UserError("its tags are NaN, infinite or all zero; check the audio")
    return divergences
