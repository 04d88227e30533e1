"""What the networks of the published metrics share before they hear a clip: its checks, its rate, their filters.

Shapes: c channels, t samples, f mel bands.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from julius.resample import ResampleFrac
from torch import Tensor

from magnet_train.common.errors import UserError


def resample(wav: Tensor, sample_rate: int, wanted: int) -> Tensor:
    """Mono `t` at the rate `wanted`, from `t` or `c t`, by julius: the resampler of the published figures.

    Channels are averaged after resampling, as there.
    """
    wav = wav.float()
    if sample_rate != wanted:
        wav = _resampler(sample_rate, wanted)(wav)
    return wav if wav.dim() == 1 else wav.mean(0)


@lru_cache(maxsize=8)
def _resampler(sample_rate: int, wanted: int) -> ResampleFrac:
    return ResampleFrac(sample_rate, wanted)


def check_clip(wav: Tensor, sample_rate: int, shortest_s: float, network: str) -> None:
    """Nothing, if `network` can hear the mono clip `t`. Silence can be heard: a model may produce it.

    Raises:
        UserError: if it is too short, or holds NaN or infinite samples.
    """
    if wav.dim() != 1 or len(wav) < round(shortest_s * sample_rate):
        seconds = wav.shape[-1] / sample_rate if wav.dim() else 0
        raise UserError(
            f"a clip of shape {tuple(wav.shape)}, {seconds:.3f} s, is not for {network}, "
            f"which hears mono clips of {shortest_s:.3f} s and more"
        )
    if not torch.isfinite(wav).all():
        raise UserError(f"a clip holds NaN or infinite samples; {network} cannot hear it")


def htk_mel_filters(sample_rate: int, fft_size: int, bands: int, lowest: float, highest: float) -> Tensor:
    """Triangles of height one, equally spaced and straight-sided on HTK's mel scale: `f bins`.

    mel = 1127 ln(1 + Hz / 700). VGGish and Kaldi both use them (Young et al., "The HTK Book", 5.4).

    Args:
        sample_rate: in Hz.
        fft_size: Samples of the transform; bins are `fft_size // 2 + 1`.
        bands: How many.
        lowest: Where the first begins, in Hz.
        highest: Where the last ends, in Hz.
    """
    bins = 1127 * np.log1p(np.arange(fft_size // 2 + 1) * sample_rate / fft_size / 700)
    first, last = (1127 * math.log1p(hz / 700) for hz in (lowest, highest))
    edges = np.linspace(first, last, bands + 2)
    left, middle, right = (edges[i : bands + i, None] for i in range(3))
    rising_or_falling = np.minimum((bins - left) / (middle - left), (right - bins) / (right - middle))
    return torch.from_numpy(np.maximum(rising_or_falling, 0)).float()
