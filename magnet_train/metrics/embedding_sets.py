"""Metrics of sets of embeddings beyond FAD, which need every item and not only sums.

Gather the items first (`distributed.all_gather_by_id`). Distances between all pairs take memory
that grows with the square of the windows: `subsample` them first.

Shapes: n generated windows, m reference windows, d dimensions. Everything is in float64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.metrics.fad import Moments

MAX_WINDOWS = 5000
"""Windows drawn for metrics of all pairs, with a fixed seed; their number is in the record."""


def subsample(embeddings: Tensor, num_windows: int = MAX_WINDOWS) -> Tensor:
    """At most `num_windows` of the rows, drawn without replacement and kept in order."""
    if len(embeddings) <= num_windows:
        return embeddings
    picks = np.random.default_rng(0).permutation(len(embeddings))[:num_windows]
    return embeddings[torch.from_numpy(np.sort(picks))]


# --- FAD extrapolated to infinitely many samples, and FAD of single clips -------------------------


@dataclass(frozen=True)
class FadInfinity:
    """Linear fit of FAD against 1 / windows."""

    value: float
    """Intercept: FAD of infinitely many windows; may be negative, unlike FAD."""
    slope: float
    """Slope: bias of FAD times the number of windows."""
    r2: float
    """Coefficient of determination; if it is well below 1, the value is unreliable."""


def draws_of_clips(
    windows_per_clip: Sequence[int], points: int = 25, seed: int = 0
) -> list[Tensor]:
    """Rows to draw for `fad_infinity`: complete clips without replacement, from a quarter to all.

    fadtk draws single windows with replacement, which does not remove the bias of a finite number
    of clips: for 200 clips of the reference's population, whose FAD should be 0, FAD is 0.161,
    FAD-infinity is 0.156 with fadtk's draws, 0.117 with single windows without replacement, and
    0.008 with these draws.

    Args:
        windows_per_clip: number of windows of each clip, in the order of concatenation.
        points: number of draws, with evenly spaced sizes.
        seed: seed of the draws.

    Raises:
        UserError: for fewer than eight clips.
    """
    num_clips = len(windows_per_clip)
    if num_clips < 8:
        raise UserError(
            f"FAD-infinity needs at least eight clips, there are {num_clips}: score more"
        )
    rng = np.random.default_rng(seed)
    rows = torch.arange(sum(windows_per_clip)).split(list(windows_per_clip))
    sizes = np.linspace(num_clips // 4, num_clips, points).astype(int)
    return [torch.cat([rows[clip] for clip in rng.permutation(num_clips)[:n]]) for n in sizes]


def fad_infinity(generated: Tensor, reference: Moments, draws: Sequence[Tensor]) -> FadInfinity:
    """FAD of infinitely many windows, by a linear fit against 1 / n (Chong and Forsyth, CVPR 2020).

    `generated` are windows `n d`, `draws` the rows of each point, from `draws_of_clips`. Equals
    fadtk's FAD-inf on the same draws.

    Raises:
        UserError: if FAD cannot be computed.
    """
    sizes = [len(rows) for rows in draws]
    points = np.array([Moments.of(generated[rows]).distance(reference) for rows in draws])
    slope, intercept = np.polyfit(1 / np.array(sizes), points, 1)
    residual = points - intercept - slope / np.array(sizes)
    variance = np.square(points - points.mean()).sum()
    r2 = 1 - np.square(residual).sum() / variance if variance > 0 else 1.0
    return FadInfinity(float(intercept), float(slope), float(r2))


def fad_per_clip(clips: Mapping[str, Tensor], reference: Moments) -> dict[str, float]:
    """FAD of every single clip against the reference, worst first, to find clips to listen to.

    With few windows the values are mostly bias, which is equal for clips of equal length, so only
    their order is meaningful. Equals fadtk's `--indiv`.

    Args:
        clips: windows of each clip by its id, `n d` with n at least 2.
        reference: moments of the real windows.
    """
    values = {key: Moments.of(windows).distance(reference) for key, windows in clips.items()}
    return dict(sorted(values.items(), key=lambda item: (-item[1], item[0])))


# --- kernel distances -----------------------------------------------------------------------------


def kad(generated: Tensor, reference: Tensor, bandwidth: float | None = None) -> float:
    """Kernel audio distance (Chung et al., 2025): 100 x unbiased MMD² under a Gaussian kernel.

    Unbiased at any number of windows, so it may be negative and gives better training curves than
    FAD. Not symmetric, because the reference sets the bandwidth. Equals kadtk.

    Args:
        generated: `n d`.
        reference: `m d`.
        bandwidth: of the kernel exp(-|x - y|² / (2 bandwidth²)); default: the median distance
            between windows of the reference (torch.median).

    Raises:
        UserError: for fewer than two windows, invalid windows, or a reference without
            variance.
    """
    x, y = _checked("KAD", 2, generated, reference)
    if bandwidth is None:
        bandwidth = torch.pdist(y).median().item()
    if not bandwidth > 0:
        raise UserError(
            f"KAD: a bandwidth of {bandwidth:g}; over half of the reference's windows are the same"
        )

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(torch.cdist(a, b, compute_mode=_EXACT).square() / (-2 * bandwidth**2))

    return 100 * _unbiased_mmd2(kernel(x, x), kernel(y, y), kernel(x, y))


def kid(generated: Tensor, reference: Tensor) -> float:
    """Kernel distance (Binkowski et al., ICLR 2018): unbiased MMD² under the kernel (x·y / d + 1)³.

    Unbiased, so it may be negative. Equals torchmetrics' on one subset; arguments and errors as in
    `kad`.
    """
    x, y = _checked("KID", 2, generated, reference)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    return _unbiased_mmd2(kernel(x, x), kernel(y, y), kernel(x, y))


def _unbiased_mmd2(xx: Tensor, yy: Tensor, xy: Tensor) -> float:
    """Unbiased MMD² from kernel matrices `n n`, `m m` and `n m`, without the diagonals."""
    n, m = xy.shape
    within_x = (xx.sum() - xx.trace()) / (n * (n - 1))
    within_y = (yy.sum() - yy.trace()) / (m * (m - 1))
    return (within_x + within_y - 2 * xy.mean()).item()


# --- fidelity and diversity -----------------------------------------------------------------------


@dataclass(frozen=True)
class Neighbourhoods:
    """Precision, recall, density and coverage of two sets."""

    precision: float
    """Share of generated windows within the neighbourhood of a real one (Kynkäänniemi et al.,
    NeurIPS 2019)."""
    recall: float
    """Share of real windows within the neighbourhood of a generated one."""
    density: float
    """Mean number of real neighbourhoods around a generated window, divided by k; may exceed 1
    (Naeem et al., ICML 2020)."""
    coverage: float
    """Share of real windows with a generated one in their neighbourhood."""


def neighbourhoods(generated: Tensor, reference: Tensor, k: int = 5) -> Neighbourhoods:
    """Precision, recall, density and coverage. Equals the `prdc` package.

    The neighbourhood of a window is the open ball up to its k-th neighbour in its own set.

    Args:
        generated: `n d`.
        reference: `m d`.
        k: neighbours.

    Raises:
        UserError: for k windows or fewer in a set, or invalid ones.
    """
    x, y = _checked("precision and recall", k + 1, generated, reference)

    def radii(a: Tensor) -> Tensor:
        # The first is itself.
        return torch.cdist(a, a, compute_mode=_EXACT).kthvalue(k + 1, dim=1).values

    between = torch.cdist(y, x, compute_mode=_EXACT)  # m n
    of_real, of_generated = radii(y), radii(x)
    in_real = between < of_real[:, None]
    return Neighbourhoods(
        precision=in_real.any(0).double().mean().item(),
        recall=(between < of_generated).any(1).double().mean().item(),
        density=in_real.sum(0).double().mean().item() / k,
        coverage=(between.amin(1) < of_real).double().mean().item(),
    )


def vendi_score(embeddings: Tensor) -> float:
    """Effective number of different windows `n d`, 1 to n (Friedman and Dieng, TMLR 2023).

    Exponential of the entropy of the eigenvalues of the cosine similarities divided by n. Equals
    `vendi-score` with q = 1.

    Raises:
        UserError: without windows, and for invalid or zero ones.

    >>> round(vendi_score(torch.eye(3)), 6)
    3.0
    """
    (x,) = _checked("the Vendi score", 1, embeddings)
    lengths = x.norm(dim=1, keepdim=True)
    if lengths.min() == 0:
        raise UserError(
            "the Vendi score: an embedding is zero and has no direction; check the audio"
        )
    x = x / lengths
    # Both have the same non-zero eigenvalues; use the smaller one.
    similarities = x @ x.T if len(x) < x.shape[1] else x.T @ x
    shares = torch.linalg.eigvalsh(similarities).clamp(min=0) / len(x)
    return torch.special.entr(shares).sum().exp().item()


# Exact distances: torch's matrix product gives non-zero distances between equal windows.
_EXACT = "donot_use_mm_for_euclid_dist"


def _checked(what: str, fewest: int, *sets: Tensor) -> list[Tensor]:
    for x in sets:
        if len(x) < fewest:
            raise UserError(
                f"{what} needs {fewest} windows or more, there are {len(x)}: score more or longer "
                "clips"
            )
        if not torch.isfinite(x).all():
            raise UserError(f"{what}: an embedding is NaN or infinite; check the audio")
    return [x.detach().cpu().double() for x in sets]
