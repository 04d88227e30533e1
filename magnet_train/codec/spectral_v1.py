"""A codec for machines without a GPU: EnCodec's residual quantiser around magnitudes instead of waveforms.

EnCodec learns to synthesise every cycle of every wave, which takes days of GPU. Here the encoder reads log
magnitudes of a short-time Fourier transform, the decoder gives them back, and phases are found afterwards: first
by following spectral peaks (Beauregard et al., "Single pass spectrogram inversion", 2015), then by fast Griffin-Lim
(Perraudin et al., 2013). An hour on one CPU core is enough; EXPERIMENTS.md compares both.

`build` gives an `EncodecModel` whose encoder and decoder are these, so that everything else, the quantiser
included, is transformers' own.

Shapes: b examples, t codec frames, s sub-frames of one frame, f frequency bins, d width.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EncodecConfig, EncodecModel

MODEL_TYPE = "magnet_train_spectral"


@dataclass(frozen=True)
class SpectralCodecConfig:
    """Shape of the codec; stands in its config.json."""

    sample_rate: int = 16_000
    """Of the waveform, in Hz."""
    hop_samples: int = 320
    """Samples per codec frame."""
    sub_frames: int = 2
    """Fourier transforms per codec frame."""
    window_samples: int = 1024
    """Length of a Fourier transform, in samples."""
    dim: int = 320
    """Width of encoder and decoder, in channels."""
    decoder_layers: int = 7
    """Blocks of the decoder."""
    latent_dim: int = 96
    """Width of the codebooks' entries."""
    num_codebooks: int = 4
    """Codes per frame."""
    codebook_size: int = 1024
    """Entries in each codebook."""
    griffin_lim_steps: int = 20
    """Iterations that make the phases consistent."""


class Spectrum(nn.Module):
    """Waveform `b 1 n` <-> log magnitudes `b (s f) t`; n is a multiple of the hop after padding."""

    floor = 3e-4  # 64 dB below a full-scale sine; what is softer is masked by what is not

    def __init__(self, config: SpectralCodecConfig):
        super().__init__()
        self.config = config
        self.hop = config.hop_samples // config.sub_frames
        self.bins = config.window_samples // 2 + 1
        self.window: Tensor
        self.register_buffer("window", torch.hann_window(config.window_samples), persistent=False)

    def transform(self, wav: Tensor) -> Tensor:
        """`b n` -> complex `b f (t s)`, one transform per sub-frame, centred on it."""
        edge = (self.config.window_samples - self.hop) // 2
        mode = "reflect" if wav.shape[1] > edge else "constant"
        wav = F.pad(wav[:, None], (edge, edge), mode=mode)[:, 0]
        return torch.stft(
            wav, self.config.window_samples, self.hop, window=self.window, center=False, return_complex=True
        ) * (2 / self.config.window_samples)  # fmt: skip

    def invert(self, spectrum: Tensor) -> Tensor:
        """The wave whose transform is closest in the least squares: `b f m` -> `b (m hop)` (Griffin and Lim, 1984).

        torch.istft refuses transforms that are not centred on the first sample, so the overlap-add is ours.
        """
        size, edge = self.config.window_samples, (self.config.window_samples - self.hop) // 2
        frames = torch.fft.irfft(spectrum * (size / 2), n=size, dim=1) * self.window[:, None]
        length = (spectrum.shape[2] - 1) * self.hop + size
        square = self.window.square()[:, None].expand(-1, spectrum.shape[2])[None]
        wav, weight = (
            F.fold(x, (1, length), (1, size), stride=(1, self.hop))[:, 0, 0]
            for x in (frames, square)
        )
        return (wav / weight.clamp(min=1e-3))[:, edge : length - edge]

    def log_magnitude(self, wav: Tensor) -> Tensor:
        """`b 1 n` -> `b (s f) t`, in natural logarithms, -8.1 (silence) to about -0.7 (a full-scale sine)."""
        wav = F.pad(wav[:, 0], (0, -wav.shape[2] % self.config.hop_samples))
        magnitude = (self.transform(wav).abs() + self.floor).log()
        return (
            magnitude.unflatten(2, (-1, self.config.sub_frames)).permute(0, 3, 1, 2).flatten(1, 2)
        )

    def waveform(self, log_magnitude: Tensor) -> Tensor:
        """`b (s f) t` -> `b 1 (t hop)`: phases by peak following, then fast Griffin-Lim."""
        folded = (
            log_magnitude.unflatten(1, (self.config.sub_frames, self.bins))
            .permute(0, 2, 3, 1)
            .flatten(2)
        )
        magnitude = (folded.exp() - self.floor).clamp(min=0)  # b f m
        phase = self._peak_phases(magnitude)
        estimate = torch.polar(magnitude, phase)
        previous = torch.zeros_like(estimate)
        for _ in range(self.config.griffin_lim_steps):
            projected = self.transform(self.invert(estimate))
            moved = projected + 0.99 * (projected - previous)
            previous = projected
            estimate = torch.polar(magnitude, moved.angle())
        return self.invert(estimate)[:, None]

    def _peak_phases(self, magnitude: Tensor) -> Tensor:
        """Phases that advance with the frequency of the nearest spectral peak: `b f m` -> `b f m`."""
        b, f, m = magnitude.shape
        level = magnitude.clamp(min=1e-7).log()
        left, mid, right = level[:, :-2], level[:, 1:-1], level[:, 2:]
        is_peak = F.pad((mid > left) & (mid >= right), (0, 0, 1, 1))
        # The parabola through a peak and its neighbours has its top at the true frequency, in bins.
        offset = 0.5 * (left - right) / (left - 2 * mid + right - 1e-9)
        top = torch.arange(f, device=level.device)[None, :, None] + F.pad(
            offset.clamp(-0.5, 0.5), (0, 0, 1, 1)
        )
        bin_index = torch.arange(f, device=level.device)[None, :, None].expand(b, f, m)
        before = torch.where(is_peak, bin_index, -1).cummax(1).values
        after = torch.where(is_peak, bin_index, 4 * f).flip(1).cummin(1).values.flip(1)
        nearest = torch.where(
            bin_index - before.clamp(min=-2 * f) <= after - bin_index, before, after
        )
        nearest = torch.where((before < 0) & (after >= 4 * f), bin_index, nearest).clamp(0, f - 1)
        advance = top.expand(b, f, m).gather(1, nearest) * (
            2 * math.pi * self.hop / self.config.window_samples
        )
        phase = torch.zeros(b, f, device=level.device)
        phases = []
        for i in range(
            m
        ):  # a bin takes the phase that its peak's bin had, so that a partial stays whole as it moves
            phase = phase.gather(1, nearest[:, :, i]) + advance[:, :, i]
            phase = torch.remainder(phase, 2 * math.pi)
            phases.append(phase)
        # Neighbouring bins of one partial alternate in sign under a window that starts at sample 0.
        return torch.stack(phases, dim=2) + math.pi * (bin_index % 2)


class Block(nn.Module):
    """ConvNeXt in one dimension: `b d t` -> `b d t`."""

    def __init__(self, dim: int, kernel: int = 7):
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.wide = nn.Linear(dim, 3 * dim)
        self.narrow = nn.Linear(3 * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).transpose(1, 2))
        return x + (self.scale * self.narrow(F.gelu(self.wide(y)))).transpose(1, 2)


class SpectralEncoder(nn.Module):
    """Waveform `b 1 n` -> latents `b d t`, t = ceil(n / hop).

    Principal components of one frame's magnitudes, with a learnt correction. No frame looks at another, so a held
    note repeats its code: a convolutional encoder used every bit of the codes, but a language model then has little
    to predict (EXPERIMENTS.md).
    """

    def __init__(self, config: SpectralCodecConfig):
        super().__init__()
        self.spectrum = Spectrum(config)
        inputs = config.sub_frames * self.spectrum.bins
        self.components = nn.Linear(inputs, config.latent_dim)
        self.correction = nn.Sequential(
            nn.Linear(inputs, config.dim), nn.GELU(), nn.Linear(config.dim, config.latent_dim)
        )

    def forward(self, wav: Tensor) -> Tensor:
        return self.read(self.spectrum.log_magnitude(wav))

    def read(self, log_magnitude: Tensor) -> Tensor:
        """Log magnitudes `b (s f) t` -> latents `b d t`."""
        x = standardise(log_magnitude).transpose(1, 2)
        return (self.components(x) + self.correction(x)).transpose(1, 2)


class SpectralDecoder(nn.Module):
    """Latents `b d t` -> waveform `b 1 (t hop)`: the components back, and a correction that hears the neighbours."""

    def __init__(self, config: SpectralCodecConfig):
        super().__init__()
        self.spectrum = Spectrum(config)
        outputs = config.sub_frames * self.spectrum.bins
        self.components = nn.Linear(config.latent_dim, outputs)
        self.first = nn.Conv1d(config.latent_dim, config.dim, 7, padding=3)
        self.blocks = nn.Sequential(*(Block(config.dim) for _ in range(config.decoder_layers)))
        self.norm = nn.LayerNorm(config.dim)
        self.last = nn.Linear(config.dim, outputs)

    def log_magnitude(self, latents: Tensor) -> Tensor:
        """Latents `b d t` -> log magnitudes `b (s f) t`."""
        x = self.norm(self.blocks(self.first(latents)).transpose(1, 2))
        return 2 * (self.components(latents.transpose(1, 2)) + self.last(x)).transpose(1, 2) - 5

    def forward(self, latents: Tensor) -> Tensor:
        return self.spectrum.waveform(self.log_magnitude(latents))


def standardise(log_magnitude: Tensor) -> Tensor:
    """To about -1.6 … 2; the decoder's last line is the inverse."""
    return (log_magnitude + 5) / 2


def build(config: SpectralCodecConfig) -> EncodecModel:
    """An `EncodecModel` with these in place of its encoder and decoder; its weights are random, its codebooks zero."""
    bits = math.ceil(math.log2(config.codebook_size))
    frame_rate = config.sample_rate / config.hop_samples
    shell = EncodecConfig(
        sampling_rate=config.sample_rate,
        audio_channels=1,
        num_filters=2,
        num_residual_layers=0,
        upsampling_ratios=[config.hop_samples],
        hidden_size=config.latent_dim,
        codebook_dim=config.latent_dim,
        codebook_size=config.codebook_size,
        # transformers derives the number of codebooks from a bandwidth in kbit/s.
        target_bandwidths=[config.num_codebooks * bits * frame_rate / 1000],
        num_lstm_layers=1,
        use_causal_conv=False,
        pad_mode="reflect",
        normalize=False,
        chunk_length_s=None,
        overlap=None,
    )
    assert shell.num_quantizers == config.num_codebooks
    model = EncodecModel(shell)
    model.encoder = SpectralEncoder(config)  # type: ignore[assignment]
    model.decoder = SpectralDecoder(config)  # type: ignore[assignment]
    return model


def save_codec(model: EncodecModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Write config.json and model.safetensors, each aside and then moved into place."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": MODEL_TYPE, **asdict(model.encoder.spectrum.config)}  # type: ignore[union-attr]
    save_file(
        {k: v.contiguous() for k, v in weights.items()},
        folder / "model.safetensors.tmp",
        {"format": "pt"},
    )
    (folder / "config.json.tmp").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("model.safetensors", "config.json"):
        os.replace(folder / f"{name}.tmp", folder / name)


def load_spectral_codec(folder: Path) -> EncodecModel:
    """The inverse of `save_codec`, in float32.

    Raises:
        RuntimeError: if weights are missing or of another shape.
        OSError, SafetensorError: if a file is missing or broken.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    model = build(SpectralCodecConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    weights = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    report = model.load_state_dict(weights, strict=False)
    missing = [
        k for k in report.missing_keys if not k.endswith(("embed_avg", "cluster_size", "inited"))
    ]
    if missing or report.unexpected_keys:
        raise RuntimeError(
            f"{folder}: missing {missing[:1]}, unexpected {report.unexpected_keys[:1]}"
        )
    return model
