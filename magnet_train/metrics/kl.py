"""Kullback-Leibler divergences between what a tagger hears in the real clip and in the generated one.

A "KL" means nothing without its tagger, direction and averaging; each is part of a name here.
"""

import torch
from torch import Tensor

from magnet_train.errors import UserError
from magnet_train.metrics.items import ItemMetric

EPSILON = 1e-6


def kl_divergence(reference: Tensor, generated: Tensor, epsilon: float = EPSILON) -> Tensor:
    """KL(reference ‖ generated) of distributions `… c`, in nats: `…`.

    `epsilon` is added to the generated side only, as audiocraft's `kld.py` does; identical distributions therefore
    come out as about -c epsilon, a hair below zero, and nothing exceeds -log(epsilon) = 13.8.
    Swap the arguments for the other direction; epsilon=0 gives the plain divergence.

    >>> p = torch.tensor([0.5, 0.5])
    >>> round(kl_divergence(p, torch.tensor([0.9, 0.1])).item(), 3)
    0.511
    """
    # xlogy: zero where the reference is, and NaN where it is NaN.
    return (torch.xlogy(reference, reference) - torch.xlogy(reference, generated + epsilon)).sum(-1)


def tag_distribution(tags: Tensor) -> Tensor:
    """Probabilities of independent tags `… c` (sigmoids) divided by their sum; PaSST's way is a softmax."""
    return tags / tags.sum(-1, keepdim=True)


class TagKL(ItemMetric):
    """Mean over clips of KL(reference ‖ generated) between sum-normalised tags, averaged over a clip's windows first.

    Sums in float64; an item counts once, ranks must own different items. Never comparable with the PaSST KL of the
    published tables.
    """

    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, reference: Tensor, generated: Tensor, key: str | None = None) -> None:
        """Tags of one clip's windows, `n c` each (or `c`, already averaged).

        Raises:
            ValueError: if the two have different tags.
            UserError: if one holds NaN, or no tag at all.
        """
        if reference.shape[-1] != generated.shape[-1]:
            raise ValueError(f"{reference.shape[-1]} reference tags and {generated.shape[-1]} generated ones")
        p, q = (tag_distribution(x.double().reshape(-1, x.shape[-1]).mean(0)) for x in (reference, generated))
        divergence = kl_divergence(p, q)
        if not torch.isfinite(divergence):
            raise UserError(f"clip {key or '(unnamed)'}: its tags are NaN or all zero; look at the audio")
        if not self._is_new(key):
            return
        self.total = self.total + divergence.to(self.total.device)
        self.count = self.count + 1

    def compute(self) -> Tensor:
        """The mean, in nats.

        Raises:
            UserError: if no clip was added on any rank.
        """
        if self.count == 0:
            raise UserError(
                "KL has no pair of clips: the reference shards hold no tags; tokenize with --embedder musicnn"
            )
        return self.total / self.count
