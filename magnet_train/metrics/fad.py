"""Fréchet audio distance: distance between Gaussians fitted to two sets of embeddings.

Kilgour et al., "Fréchet Audio Distance", Interspeech 2019. The value depends on the network, so its
name is part of the metric's name.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from magnet_train.common.errors import UserError


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of windows `n d`, in float64."""

    count: int
    mean: Tensor
    """`d`."""
    scatter: Tensor
    """`d d`, sum of outer products of deviations from the mean."""

    @classmethod
    def of(cls, windows: Tensor) -> "Moments":
        """Moments of windows `n d`; n may be 0.

        Raises:
            UserError: if a value is NaN or infinite.
        """
        if not torch.isfinite(windows).all():
            raise UserError("an embedding is NaN or infinite; check the audio")
        x = windows.detach().double()
        mean = x.mean(0) if len(x) else x.sum(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def covariance(self, side: str = "") -> Tensor:
        """Unbiased covariance `d d` (divided by n - 1), as in published results.

        Raises:
            UserError: for fewer than two windows; `side` names the set.
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
    """|mean_x - mean_y|² + tr(cov_x + cov_y - 2 (cov_x cov_y)^½), in float64, of means `d`
    and symmetric covariances `d d`.

    The trace of the root is the sum of singular values of cov_x^½ cov_y^½, which is real and
    non-negative at any rank. scipy's `sqrtm`, used elsewhere, becomes complex with fewer windows
    than dimensions, and the usual remedy, an epsilon on the diagonal, changes FAD by 2e-2. Negative
    results of rounding are set to zero.

    >>> eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    >>> frechet_distance(zero, eye, zero + 3, 4 * eye)
    20.0
    """
    values = (x.detach().cpu().double() for x in (mean_x, cov_x, mean_y, cov_y))
    mean_x, cov_x, mean_y, cov_y = values
    root = torch.linalg.svdvals(square_root(cov_x) @ square_root(cov_y)).sum()
    distance = (mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * root
    return max(0.0, distance.item())


def square_root(matrix: Tensor) -> Tensor:
    """The positive square root of a covariance `d d`.

    Eigenvalues below the rounding error of the largest are set to zero, because the root would
    amplify them.
    """
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    floor = values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors * values.where(values > floor, 0).sqrt() @ vectors.T
