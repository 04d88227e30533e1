"""95 % intervals of metrics over clips, by resampling.

Complete clips are drawn, because the windows of a clip are correlated, and drawing windows would
give intervals several times too narrow. The reference set is fixed.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.metrics.fad import Moments, square_root

_MAX_NUMBERS = 2**25  # 256 MB of float64 for the covariances that are in memory at once


def bootstrap_interval(
    values: Sequence[Tensor] | Tensor, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean of all values: low, high.

    Args:
        values: one value per clip, `b`; or a tensor per clip (or rater) with values that are drawn
            together, such as the segments of KL. A tensor may be empty.
        draws: number of samples of b clips with replacement; samples without values are ignored.
        seed: seed of the draws.

    Raises:
        UserError: for fewer than two clips, or no value.

    >>> bootstrap_interval(torch.tensor([2.0, 2.0, 2.0]))
    (2.0, 2.0)
    """
    b = len(values)
    _check(b)
    sums = np.array([v.double().sum().item() for v in values])
    counts = np.array([v.numel() for v in values], dtype=float)
    picks = np.random.default_rng(seed).integers(b, size=(draws, b))
    drawn_counts = counts[picks].sum(1)
    has_values = drawn_counts > 0
    if not has_values.any():
        raise UserError("an interval needs values, there are none: score more")
    means = sums[picks].sum(1)[has_values] / drawn_counts[has_values]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def frechet_interval(
    clips: Sequence[Tensor], reference: Moments, draws: int = 200, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the FAD of `clips` against `reference` at this number of clips: low, high.

    The half-sample jackknife (Shao and Wu, 1989): FADs of random halves of the clips, drawn without
    replacement, vary like FADs of full sets, and the interval is ±1.96 of their standard deviations
    around the measured FAD. The bootstrap is not used, because repeated clips raise FAD by about
    its bias at b clips. In a simulation with 40 Gaussian clips (d = 32), bootstrap percentiles
    never contained the true value, and the bootstrap's standard deviation was 1.6 times that of
    FAD, against 1.1 times for halves, whose 95 % intervals cover 95 %. Near FAD's minimum halves
    are too wide by a factor of 1.7, so differences are found too rarely, not too often.

    The interval covers other sets of b clips of the same kind, to compare systems at equal b. It
    does not cover the FAD of infinitely many clips, which is lower; see `fad_infinity`.

    Each draw is exact, because its covariance is a sum over its clips, and needs one eigenvalue
    problem `d d`: 1 s at d = 128 and 3 s at d = 200 for 1,000 clips of 19 windows on one core; 17 s
    at d = 512 for 200 clips.

    Raises:
        UserError: for fewer than two clips, or fewer than two windows in half of them.
    """
    _check(len(clips))
    half = len(clips) // 2
    rng = np.random.default_rng(seed)
    picks = np.stack([rng.permutation(len(clips))[:half] for _ in range(draws)])
    times_drawn = torch.zeros(draws, len(clips), dtype=torch.float64)
    times_drawn.scatter_(1, torch.from_numpy(picks), 1.0)
    spread = frechet_of_samples(clips, reference, times_drawn).std().item()
    spread *= math.sqrt(half / (len(clips) - half))  # 1, but for an odd number of clips
    measured = Moments.of(torch.cat(list(clips))).distance(reference)
    return max(0.0, measured - 1.96 * spread), measured + 1.96 * spread


def frechet_of_samples(clips: Sequence[Tensor], reference: Moments, times_drawn: Tensor) -> Tensor:
    """FAD of many samples of the same clips, to 1e-6: `s`, float64.

    Args:
        clips: windows of each clip, `n d`.
        reference: moments of the real clips.
        times_drawn: multiplicity of each clip in each sample, `s b`.

    Raises:
        UserError: if a sample has fewer than two windows.
    """
    dim = len(reference.mean)
    covariance = reference.covariance("reference")
    # Centred at the reference's mean, so that plain sums are accurate.
    centred = [clip.detach().cpu().double() - reference.mean for clip in clips]
    counts = times_drawn @ torch.tensor([float(len(x)) for x in centred], dtype=torch.float64)
    if counts.min() < 2:
        raise UserError(
            "an interval of FAD needs at least two windows in half of the clips: score more clips"
        )
    means = times_drawn @ torch.stack([x.sum(0) for x in centred]) / counts[:, None]
    root = square_root(covariance)
    size = max(1, _MAX_NUMBERS // dim**2)
    fads = []
    for rows in torch.arange(len(times_drawn)).split(size):
        outer = torch.zeros(len(rows), dim**2, dtype=torch.float64)
        for some in torch.arange(len(centred)).split(size):
            squares = torch.stack([(centred[i].T @ centred[i]).flatten() for i in some.tolist()])
            outer += times_drawn[rows][:, some] @ squares
        n = counts[rows, None, None]
        mean = means[rows]
        sampled = (outer.view(-1, dim, dim) - n * mean[:, :, None] * mean[:, None, :]) / (n - 1)
        # tr (A B)^½ = tr (A^½ B A^½)^½: with a stored root of A, a sample needs only eigenvalues.
        roots = torch.linalg.eigvalsh(root @ sampled @ root).clamp(min=0).sqrt().sum(-1)
        traces = sampled.diagonal(dim1=1, dim2=2).sum(-1) + covariance.trace()
        fads.append((mean.square().sum(-1) + traces - 2 * roots).clamp(min=0))
    return torch.cat(fads)


def _check(num_clips: int) -> None:
    if num_clips < 2:
        raise UserError(f"an interval needs at least two clips, there are {num_clips}: score more")
