"""Fréchet audio distance: how far apart two clouds of embeddings lie, each taken as a Gaussian.

Kilgour et al., "Fréchet Audio Distance", Interspeech 2019. Which network embeds decides the number,
so the name of the network is part of the metric's name wherever it is logged.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from magnet_train.common.errors import UserError


@dataclass(frozen=True)
class Moments:
    """What FAD needs of windows `n d`: their count, mean and scatter about the mean, in float64.

    Adding two gives those of the union (Chan, Golub and LeVeque, 1979). Plain sums of x xᵀ would be
    simpler, but the mean is subtracted from them only at the end: at a mean of 10,000 deviations,
    and with fewer windows than dimensions, that moves FAD by 4e-3.
    """

    count: int
    mean: Tensor
    """`d`."""
    scatter: Tensor
    """`d d`, sum of outer products of deviations from the mean."""

    @classmethod
    def of(cls, windows: Tensor) -> "Moments":
        """Those of `n d`; n may be 0.

        Raises:
            ValueError: if the windows are no matrix.
            UserError: if one has NaN or an infinite number.
        """
        if windows.dim() != 2:
            raise ValueError(f"embeddings are {tuple(windows.shape)}, not n x d")
        if not torch.isfinite(windows).all():
            raise UserError("an embedding is NaN or infinite; look at the audio")
        x = windows.detach().double()
        mean = x.mean(0) if len(x) else x.sum(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        between = torch.outer(gap, gap) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    def covariance(self, side: str = "") -> Tensor:
        """Unbiased, `d d`: divided by n - 1, as in the published figures.

        Raises:
            UserError: with fewer than two windows, where it has no meaning; `side` names whose they
                are.
        """
        if self.count < 2:
            windows = f"{side} windows".strip()
            raise UserError(
                f"FAD needs at least two {windows}, there are {self.count}: score more or longer "
                "clips"
            )
        return self.scatter / (self.count - 1)

    def distance(self, reference: "Moments") -> float:
        """FAD of these windows against those of the reference; see `frechet_distance`."""
        mine, theirs = self.covariance("generated"), reference.covariance("reference")
        return frechet_distance(self.mean, mine, reference.mean, theirs)


def frechet_distance(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> float:
    """|mean_x - mean_y|² + tr(cov_x + cov_y - 2 (cov_x cov_y)^½), in float64.

    The trace of the root is the sum of singular values of cov_x^½ cov_y^½, which is real and
    non-negative whatever the rank; scipy's `sqrtm`, in use elsewhere, turns complex when there are
    fewer windows than dimensions, and an epsilon on the diagonal, the usual remedy, moves FAD by
    2e-2. What rounding could leave below zero is cut off at zero.

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
    root = torch.linalg.svdvals(square_root(cov_x) @ square_root(cov_y)).sum()
    distance = (mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * root
    return max(0.0, distance.item())


def square_root(matrix: Tensor) -> Tensor:
    """The positive root of a covariance `d d`.

    Eigenvalues below the rounding of the largest are zero: their roots would be a hundred million
    times as large.
    """
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    floor = values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors * values.where(values > floor, 0).sqrt() @ vectors.T
