"""Shared by the networks: resampling, checks of a clip, mel filter banks, bundled weights.

Shapes: c channels, t samples, f mel bands.
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

import torch
from julius.resample import ResampleFrac
from torch import Tensor, nn

from magnet_train.common.assets import demo_path
from magnet_train.common.errors import UserError
from magnet_train.common.torchaudio_import import ensure_torchaudio_imports

Network = TypeVar("Network", bound=nn.Module)


def resample(wav: Tensor, sample_rate: int, new_rate: int) -> Tensor:
    """Resample `t` or `c t` to mono `t` with julius, the resampler of published metrics.

    Channels are averaged after resampling, as in audiocraft.
    """
    wav = wav.float()
    if sample_rate != new_rate:
        wav = _resampler(sample_rate, new_rate)(wav)
    return wav if wav.dim() == 1 else wav.mean(0)


@lru_cache(maxsize=8)
def _resampler(sample_rate: int, new_rate: int) -> ResampleFrac:
    return ResampleFrac(sample_rate, new_rate)


def check_clip(wav: Tensor, sample_rate: int, min_duration_s: float, network: str) -> None:
    """Check that a mono clip `t` is finite and long enough for `network`. Silence is allowed.

    Raises:
        UserError: if it is not mono, too short, or has NaN or infinite samples.
    """
    if wav.dim() != 1:
        raise UserError(f"a clip of shape {tuple(wav.shape)}; {network} needs mono clips")
    if len(wav) < round(min_duration_s * sample_rate):
        raise UserError(
            f"{len(wav) / sample_rate:.3f} s is too short for {network}, which needs at least "
            f"{min_duration_s:.3f} s"
        )
    if not torch.isfinite(wav).all():
        raise UserError(f"a clip has NaN or infinite samples; {network} cannot embed it")


def load_bundled(name: str, make: Callable[[Path], Network]) -> tuple[Network, str]:
    """A network of the demo in float32, made from its folder, and the hash of its weights.

    Raises:
        UserError: if a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = demo_path(name) / "model.safetensors"
    try:
        content = path.read_bytes()
        network = make(path.parent)
        network.load_state_dict({k: v.float() for k, v in load(content).items()})
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: missing or broken ({error}); reinstall magnet-train") from error
    network.eval().requires_grad_(False)
    return network, hashlib.sha256(content).hexdigest()[:16]


def mel_filters(
    sample_rate: int,
    fft_size: int,
    num_bands: int,
    scale: Literal["slaney", "htk"],
    lowest: float = 0.0,
    highest: float | None = None,
) -> Tensor:
    """Triangular mel filters: `f bins`, with `fft_size // 2 + 1` bins.

    Args:
        sample_rate: in Hz.
        fft_size: samples of the Fourier transform.
        num_bands: number of filters.
        scale: "slaney" for librosa's default (filters of equal area), "htk" for the filters of
            VGGish and Kaldi (height one, straight on the mel scale 1127 ln(1 + Hz / 700)).
        lowest: lower edge of the first filter, in Hz.
        highest: upper edge of the last filter, in Hz; half the sample rate if None.
    """
    ensure_torchaudio_imports()  # transformers imports torchaudio where it is installed
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=fft_size // 2 + 1,
        num_mel_filters=num_bands,
        min_frequency=lowest,
        max_frequency=sample_rate / 2 if highest is None else highest,
        sampling_rate=sample_rate,
        norm="slaney" if scale == "slaney" else None,
        mel_scale="slaney" if scale == "slaney" else "kaldi",
        triangularize_in_mel_space=scale == "htk",
    )
    return torch.from_numpy(filters.T.copy()).float()
