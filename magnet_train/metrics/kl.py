"""Kullback-Leibler divergences between what a tagger hears in the real clip and in the generated one.

A "KL" means nothing without its tagger, direction and averaging; each is part of a name here.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

EPSILON = 1e-6


def kl_divergence(reference: Tensor, generated: Tensor, epsilon: float = EPSILON) -> Tensor:
    """KL(reference ‖ generated) of distributions `… c`, in nats: `…`.

    `epsilon` is added to the generated side only, as audiocraft's `kld.py` does; identical distributions therefore
    come out as about -c epsilon, a hair below zero.

    >>> p = torch.tensor([0.5, 0.5])
    >>> round(kl_divergence(p, torch.tensor([0.9, 0.1])).item(), 3)
    0.511
    """
    terms = torch.where(reference > 0, reference * (reference.clamp(min=1e-30).log() - (generated + epsilon).log()), 0)
    return terms.sum(-1)


def tag_distribution(tags: Tensor) -> Tensor:
    """Probabilities of independent tags `… c` (sigmoids) divided by their sum: one way, not PaSST's, to a distribution."""
    return tags / tags.sum(-1, keepdim=True)


class TagKL(Metric):
    """Mean over clips of KL(reference ‖ generated) between sum-normalised tags, averaged over a clip's windows first.

    Sums in float64; an item counts once, ranks must own different items. Never comparable with the PaSST KL of the
    published tables.
    """

    full_state_update = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self._seen: set[str] = set()

    def update(self, reference: Tensor, generated: Tensor, key: str | None = None) -> None:
        """Tags of one clip's windows, `n c` each (or `c`, already averaged)."""
        if key is not None:
            if key in self._seen:
                return
            self._seen.add(key)
        p, q = (tag_distribution(x.double().reshape(-1, x.shape[-1]).mean(0)) for x in (reference, generated))
        self.total = self.total + kl_divergence(p, q).to(self.total.device)
        self.count = self.count + 1

    def compute(self) -> Tensor:
        """The mean in nats; NaN-free: without any clip an error.

        Raises:
            UserError: if no clip was added on any rank.
        """
        if self.count == 0:
            from magnet_train.errors import UserError

            raise UserError("KL has no pair of clips: the reference shards hold no tags; tokenize with --embedder musicnn")
        return self.total / self.count

    def reset(self) -> None:
        super().reset()
        self._seen = set()
