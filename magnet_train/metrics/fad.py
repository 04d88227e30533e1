"""Fréchet audio distance: how far apart two clouds of embeddings lie, each taken as a Gaussian.

Kilgour et al., "Fréchet Audio Distance", Interspeech 2019. Which network embeds decides the number, so the name of
the network is part of the metric's name wherever it is logged.
"""

import torch
from torch import Tensor

from magnet_train.errors import UserError
from magnet_train.metrics.items import ItemMetric


def frechet_distance(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> float:
    """|mean_x - mean_y|² + tr(cov_x + cov_y - 2 (cov_x cov_y)^½), in float64.

    The trace of the root is the sum of singular values of cov_x^½ cov_y^½, which is real and non-negative whatever
    the rank; scipy's `sqrtm`, in use elsewhere, turns complex when there are fewer windows than dimensions. What
    rounding could leave below zero is cut off at zero.

    Args:
        mean_x: `d`.
        cov_x: `d d`, symmetric.
        mean_y: `d`.
        cov_y: `d d`, symmetric.

    Raises:
        ValueError: if the widths differ or a number is not finite.

    >>> eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    >>> frechet_distance(zero, eye, zero + 3, 4 * eye)
    20.0
    """
    shapes = [tuple(x.shape) for x in (mean_x, cov_x, mean_y, cov_y)]
    width = len(mean_x)
    if shapes != [(width,), (width, width)] * 2:
        raise ValueError(f"means and covariances of different widths: {shapes}")
    values = [x.detach().cpu().double() for x in (mean_x, cov_x, mean_y, cov_y)]
    if not all(torch.isfinite(x).all() for x in values):
        raise ValueError("an embedding is NaN or infinite")
    mean_x, cov_x, mean_y, cov_y = values
    root = torch.linalg.svdvals(_square_root(cov_x) @ _square_root(cov_y)).sum()
    distance = (mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * root
    return max(0.0, distance.item())


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


class FrechetAudioDistance(ItemMetric):
    """FAD from sums in float64: the same on any number of ranks, one without data included.

    An item counts once on either side; ranks must own different items.
    Covariances are unbiased (divided by n - 1), as in the published figures.
    """

    higher_is_better = False
    _states = ("count", "total", "outer")

    def __init__(self, dim: int):
        """`dim` is the width of the embeddings."""
        super().__init__()
        self.dim = dim
        for side in ("generated", "reference"):
            for state, shape in zip(self._states, ((), (dim,), (dim, dim)), strict=True):
                self.add_state(f"{side}_{state}", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, embeddings: Tensor, key: str | None = None) -> None:
        """Windows of one generated clip, `n d`; `key` names it, so that it counts once."""
        self._add("generated", embeddings, key)

    def update_reference(self, embeddings: Tensor, key: str | None = None) -> None:
        """Windows of one real clip, `n d`."""
        self._computed = None  # what torchmetrics keeps of an earlier compute()
        self._add("reference", embeddings, key)

    def _add(self, side: str, embeddings: Tensor, key: str | None) -> None:
        if embeddings.dim() != 2 or embeddings.shape[1] != self.dim:
            raise ValueError(f"{side} embeddings are {tuple(embeddings.shape)}, not n x {self.dim}")
        if not torch.isfinite(embeddings).all():
            raise UserError(f"{side} clip {key or '(unnamed)'}: its embedding is NaN or infinite; look at the audio")
        if not self._is_new(key and f"{side} {key}"):
            return
        x = embeddings.to(self.generated_total.device).double()  # type: ignore[union-attr]
        for state, value in zip(self._states, (len(x), x.sum(0), x.T @ x), strict=True):
            setattr(self, f"{side}_{state}", getattr(self, f"{side}_{state}") + value)

    def compute(self) -> Tensor:
        """The distance, as a float64 scalar.

        Raises:
            UserError: with fewer than two windows on either side, where a covariance has no meaning.
        """
        moments = []
        for side in ("generated", "reference"):
            count, total, outer = (getattr(self, f"{side}_{state}") for state in self._states)
            if count < 2:
                raise UserError(
                    f"FAD needs at least two {side} windows, there are {int(count)}: score more or longer clips"
                )
            mean = total / count
            moments += [mean, (outer - count * torch.outer(mean, mean)) / (count - 1)]
        return torch.tensor(frechet_distance(*moments), dtype=torch.float64)
