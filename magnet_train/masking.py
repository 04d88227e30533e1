"""Masking: the schedule of mask rates, random spans, and their expected mask rate.

Shapes: b examples, t frames. A mask is bool, True = to be predicted.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from magnet_train.common.devices import to_device


def cosine_mask_rate(progress: Tensor) -> Tensor:
    """Share of frames to mask at `progress` in [0, 1]: cos(pi/2 * progress), from 1 down to 0
    (MAGNeT, Sec. 3.1).

    Training draws `progress` uniformly; decoding walks it from 0 to 1.
    """
    return torch.cos(progress * (math.pi / 2))


def expected_mask_rate(num_spans: int, span_len: int, num_frames: int) -> float:
    """Mean share of frames covered by `num_spans` distinct span starts (MAGNeT, App. C).

    1 - C(T - L, u) / C(T, u): spans may overlap. The formula ignores that the first `span_len - 1`
    frames are covered slightly less often. Computed as a running product, because the binomials
    overflow a float at T = 1500.

    Args:
        num_spans: u, starts drawn without replacement, at most `num_frames`.
        span_len: L, in frames.
        num_frames: T, in frames.

    Raises:
        ValueError: if a span is longer than the sequence, or there are more starts than frames.

    >>> round(expected_mask_rate(3, span_len=1, num_frames=10), 3)
    0.3
    """
    if not 1 <= span_len <= num_frames or not 0 <= num_spans <= num_frames:
        raise ValueError(
            f"{num_spans} spans of {span_len} frames do not fit in num_frames={num_frames}"
        )
    free = 1.0
    for j in range(num_spans):
        free *= max(0.0, (num_frames - span_len - j) / (num_frames - j))
    return 1.0 - free


@lru_cache(maxsize=4096)  # hybrids need all lengths
def span_counts(num_frames: int, span_len: int) -> tuple[int, ...]:
    """Smallest number of spans that reaches each mask rate 0, 0.01 … 1 (MAGNeT, App. C)."""
    rates = torch.ones(num_frames, dtype=torch.float64)
    free = 1.0
    for u in range(num_frames):
        rates[u] = 1.0 - free
        free *= max(0.0, (num_frames - span_len - u) / (num_frames - u))
    wanted = torch.arange(101, dtype=torch.float64) / 100
    return tuple(torch.searchsorted(rates, wanted).tolist())


def span_mask(
    rates: Tensor, num_frames: int, span_len: int, generator: torch.Generator | None = None
) -> Tensor:
    """Random spans that mask, on average, the share `rates` (0 to 1) of frames: `b` -> bool `b t`.

    Starts are drawn without replacement over all frames; spans, of `span_len` frames, are truncated
    at the end. At least one is masked in every example. Raises ValueError if none fits.
    """
    if not 1 <= span_len <= num_frames:
        raise ValueError(f"span_len={span_len} does not fit in num_frames={num_frames}")
    if span_len == 1:  # no overlap, so the rate gives the number of spans
        counts = (rates.cpu() * num_frames).round().long()
    else:
        counts = torch.tensor(span_counts(num_frames, span_len))[(rates.cpu() * 100).round().long()]
    # The `count` smallest of T random numbers are a sample without replacement.
    order = torch.rand(len(rates), num_frames, generator=generator).argsort(1).argsort(1)
    starts = order < counts.clamp(min=1)[:, None]
    covering = F.pad(starts.long().cumsum(1), (span_len, 0))
    return (covering[:, span_len:] > covering[:, :-span_len]).to(rates.device)


def span_mask_behind(
    starts: Tensor,
    rates: Tensor,
    num_frames: int,
    span_len: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`span_mask` of the frames after each example's unmasked beginning: bool `b t`.

    Args:
        starts: `b`, first frame that may be masked, 0 to `num_frames` (nothing is masked).
        rates: `b`, target share of the frames from there on.
        num_frames: T, in frames.
        span_len: L, in frames; truncated to the frames from there on.
        generator: random generator (default: the global one).
    """
    masked = torch.zeros(len(rates), num_frames, dtype=torch.bool)
    for row, start in enumerate(starts.tolist()):
        left = num_frames - start
        if left > 0:
            rate = rates[row : row + 1].cpu()
            masked[row, start:] = span_mask(rate, left, min(span_len, left), generator)[0]
    return masked.to(rates.device)


def masked_positions(masked: Tensor, device: torch.device) -> Tensor:
    """Positions of the masked frames in `masked.flatten()`, int64, on `device`."""
    return to_device(masked.flatten().nonzero()[:, 0], device)
