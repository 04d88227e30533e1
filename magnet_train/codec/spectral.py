"""A codec that can be trained without a GPU: attacks, then pitches; magnitudes, not waveforms.

A frame is described by its pitches (a linear classifier on its spectrum, independent of loudness)
and by the levels of its frequency bands (timbre, loudness, attacks). The first codebook quantises
levels, the next ones pitches, and the others the remaining levels. A model then predicts the
attacks first, which must agree over many bars, then the notes, then timbre. Frames are encoded
independently, so a held note repeats its code.

EnCodec's decoder synthesises waveforms, which takes days of GPU time to learn. This one predicts
log magnitudes of a short-time Fourier transform, and phases are reconstructed afterwards: first by
following spectral peaks (Beauregard et al., "Single pass spectrogram inversion", 2015), then by
fast Griffin-Lim (Perraudin et al., 2013).

Shapes: b examples, t codec frames, m sub-frames (m = t * sub_frames), f frequency bins, d channels,
k codebooks.

Tables (windows, filters, scales) are made on the CPU even for a network on the meta device, where
torch would import its compiler to compute them.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from magnet_train.codec.base import NetworkCodec, first_codebooks
from magnet_train.common.folders import replacing, write_json
from magnet_train.common.tensor_files import (
    check_same_shapes,
    read_safetensors,
    safetensors_shapes,
)

MODEL_TYPE = "magnet_train_spectral"
DECODER_SETTINGS = ("dim", "layers", "griffin_lim_steps")
"""Settings that do not change the codes."""
MAX_SIZES = {
    "sample_rate": 768_000,
    "hop_samples": 1 << 16,
    "window_samples": 1 << 16,
    "pitch_window_samples": 1 << 16,
    "codebook_size": 1 << 16,
    "layers": 64,
    "sub_frames": 64,
    "num_bands": 256,
}
MAX_SIZE = 4096
"""Maximum of all other settings."""


@dataclass(frozen=True)
class SpectralCodecConfig:
    """Shape of the codec, stored in its config.json."""

    sample_rate: int = 16_000
    """Sample rate, in Hz."""
    hop_samples: int = 640
    """Samples per codec frame."""
    sub_frames: int = 4
    """Fourier transforms per codec frame, for levels and for the decoder."""
    window_samples: int = 1024
    """Length of these transforms, in samples."""
    pitch_window_samples: int = 2048
    """Length of the transform for pitches, one per frame, in samples."""
    lowest_pitch: int = 36
    """Lowest pitch, as a MIDI number; lower ones are classified as this one."""
    num_pitches: int = 68
    """Number of pitches, a semitone apart."""
    lead_weight: float = 10.0
    """Scale of the lead's pitches; large, so that pitches determine the first codes."""
    notes_weight: float = 6.0
    """Scale of the pitches of all notes, relative to the levels."""
    num_bands: int = 64
    """Mel bands per sub-frame."""
    level_dim: int = 48
    """Principal components of a frame's band levels."""
    num_codebooks: int = 5
    """Codes per frame."""
    pitch_codebooks: int = 2
    """Codebooks fitted to pitches, from the second on; the others are fitted to levels."""
    codebook_size: int = 256
    """Entries in each codebook."""
    dim: int = 384
    """Width of the decoder, in channels."""
    layers: int = 4
    """Blocks of the decoder."""
    griffin_lim_steps: int = 20
    """Iterations of fast Griffin-Lim."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            largest = MAX_SIZES.get(each.name, MAX_SIZE)
            if type(value) not in (int, type(each.default)) or not 1 <= value <= largest:
                raise ValueError(f"{each.name}={value!r:.40} must be from 1 to {largest}")

    @property
    def quantising_order(self) -> list[int]:
        """Order in which codebooks quantise the residual: pitches first, so that they are exact."""
        pitches = list(range(1, min(1 + self.pitch_codebooks, self.num_codebooks)))
        return [*pitches, 0, *range(1 + len(pitches), self.num_codebooks)]

    @property
    def latent_dim(self) -> int:
        """Width of the codebooks' entries: pitches of the lead, pitches of all notes, levels."""
        return 2 * self.num_pitches + self.level_dim

    @property
    def pitch_scale(self) -> Tensor:
        """Scales of the pitches: the lead's, then all notes'."""
        weights = torch.tensor([self.lead_weight, self.notes_weight], device="cpu")
        return weights.repeat_interleave(self.num_pitches)


def mel_filters(sample_rate: int, window_samples: int, num_bands: int) -> Tensor:
    """Triangular filters from 0 Hz to half the sample rate, evenly spaced in mel: `bands f`."""
    kind: Any = {"dtype": torch.float64, "device": "cpu"}
    highest_mel = 2595 * math.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, highest_mel, num_bands + 2, **kind) / 2595) - 1)
    freqs = torch.linspace(0, sample_rate / 2, window_samples // 2 + 1, **kind)
    rising = (freqs - edges[:-2, None]) / edges.diff()[:-1, None]
    falling = (edges[2:, None] - freqs) / edges.diff()[1:, None]
    return torch.minimum(rising, falling).clamp(min=0).float()


class Spectrum(nn.Module):
    """Waveform `b n` <-> its short-time Fourier transform, one per hop and centred on it."""

    def __init__(self, window_samples: int, hop_samples: int):
        super().__init__()
        self.size, self.hop = window_samples, hop_samples
        self.edge = (window_samples - hop_samples) // 2
        self.window: Tensor
        window = torch.hann_window(window_samples, device="cpu")
        self.register_buffer("window", window, persistent=False)

    def transform(self, wav: Tensor, lengths: list[int] | None = None) -> Tensor:
        """`b n` -> complex `b f m`, n a multiple of the hop; a full-scale sine is at 0.5.

        With `lengths`, multiples of the hop, each row is reflected at its own end.
        """
        if lengths is None:
            wav = self._padded(wav)
        else:
            rows = zip(wav, lengths, strict=True)
            padded = [self._padded(row[None, :length])[0] for row, length in rows]
            wav = pad_sequence(padded, batch_first=True)
        spectrum = torch.stft(
            wav, self.size, self.hop, window=self.window, center=False, return_complex=True
        )
        return spectrum * (2 / self.size)

    def _padded(self, wav: Tensor) -> Tensor:
        mode = "reflect" if wav.shape[1] > self.edge else "constant"
        return F.pad(wav[:, None], (self.edge, self.edge), mode=mode)[:, 0]

    def invert(self, spectrum: Tensor) -> Tensor:
        """`b f m` -> `b (m hop)`, the waveform with the closest transform (Griffin and Lim, 1984).

        torch.istft supports only transforms centred on the first sample, so this has its own
        overlap-add.
        """
        frames = (
            torch.fft.irfft(spectrum * (self.size / 2), n=self.size, dim=1) * self.window[:, None]
        )
        square = self.window.square()[None, :, None].expand(1, -1, spectrum.shape[2])
        wav = self._overlap_add(frames) / self._overlap_add(square).clamp(min=1e-3)
        return wav[:, self.edge : wav.shape[1] - self.edge]

    def _overlap_add(self, frames: Tensor) -> Tensor:
        """`b size m` -> `b n`"""
        length = (frames.shape[2] - 1) * self.hop + self.size
        return F.fold(frames, (1, length), (1, self.size), stride=(1, self.hop))[:, 0, 0]


class SpectralEncoder(nn.Module):
    """Waveform `b 1 n` -> latents `b d t`, t = ceil(n / hop).

    A latent consists of the lead's pitches, all notes' pitches, and components of band levels.
    """

    quiet = 0.02
    """Square root of the magnitude that counts as silence."""
    floor = 1e-3
    """Band level that counts as silence, 54 dB below a full-scale sine."""

    def __init__(self, config: SpectralCodecConfig):
        super().__init__()
        self.config = config
        self.pitch_spectrum = Spectrum(config.pitch_window_samples, config.hop_samples)
        self.level_spectrum = Spectrum(
            config.window_samples, config.hop_samples // config.sub_frames
        )
        bin_hz = config.sample_rate / config.pitch_window_samples
        self.pitch_bins = slice(round(62.5 / bin_hz), round(3110 / bin_hz))
        self.pitch = nn.Linear(self.pitch_bins.stop - self.pitch_bins.start, 2 * config.num_pitches)
        self.level = nn.Linear(config.sub_frames * config.num_bands, config.level_dim)
        self.mel: Tensor
        mel = mel_filters(config.sample_rate, config.window_samples, config.num_bands)
        self.register_buffer("mel", mel, persistent=False)

    def forward(self, wav: Tensor, lengths: list[int] | None = None) -> Tensor:
        """`lengths` are the clips' numbers of samples, if zeros follow them."""
        hop = self.config.hop_samples
        wav = F.pad(wav[:, 0], (0, -wav.shape[2] % hop))
        if lengths is not None:
            lengths = [math.ceil(length / hop) * hop for length in lengths]
        harmonics = self.harmonics(wav, lengths)
        pitches = self.pitch(harmonics).sigmoid() * self.config.pitch_scale.to(wav.device)
        levels = self.level(self.band_levels(wav, lengths))
        return torch.cat([pitches, levels], dim=2).transpose(1, 2)

    def harmonics(self, wav: Tensor, lengths: list[int] | None = None) -> Tensor:
        """Square roots of magnitudes over their RMS, from 62 Hz to 3.1 kHz: `b n` -> `b t f`."""
        magnitude = self.pitch_spectrum.transform(wav, lengths).abs()
        root = magnitude[:, self.pitch_bins].sqrt().transpose(1, 2)
        return root / root.square().mean(2, keepdim=True).sqrt().clamp(min=self.quiet)

    def band_levels(self, wav: Tensor, lengths: list[int] | None = None) -> Tensor:
        """Logarithms of the bands' levels in each sub-frame: `b n` -> `b t (s bands)`."""
        power = self.level_spectrum.transform(wav, lengths).abs().square()
        levels = ((self.mel @ power).sqrt() + self.floor).log()
        return levels.transpose(1, 2).unflatten(1, (-1, self.config.sub_frames)).flatten(2)


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
        return x + (self.scale * self.narrow(F.relu(self.wide(y)))).transpose(1, 2)


class SpectralDecoder(nn.Module):
    """Latents `b d t` -> log magnitudes `b f m` -> waveform `b (t hop)`.

    A linear map of each frame plus a convolutional correction. For any codes, the output has no
    energy below 20 Hz and stays within -1 .. 1.
    """

    floor = 3e-4
    """Added to magnitudes before the logarithm: 64 dB below a full-scale sine."""
    loudest = 0.3
    """Maximum RMS level of a sub-frame; music at -20 dB rarely reaches it."""

    def __init__(self, config: SpectralCodecConfig):
        super().__init__()
        self.config = config
        self.spectrum = Spectrum(config.window_samples, config.hop_samples // config.sub_frames)
        self.lowest_bin = math.ceil(30 * config.window_samples / config.sample_rate)  # 31 Hz
        outputs = config.sub_frames * (config.window_samples // 2 + 1)
        self.linear = nn.Linear(config.latent_dim, outputs)
        self.first = nn.Conv1d(config.latent_dim, config.dim, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(config.dim) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.dim)
        self.last = nn.Linear(config.dim, outputs)
        self.input_scale: Tensor
        scale = torch.cat([1 / config.pitch_scale, torch.ones(config.level_dim, device="cpu")])
        self.register_buffer("input_scale", scale[:, None], persistent=False)

    def forward(self, latents: Tensor, known: Tensor | None = None) -> Tensor:
        return self.waveform(self.log_magnitude(latents), known)

    def log_magnitude(self, latents: Tensor) -> Tensor:
        """`b d t` -> `b f m`, natural logarithms; -8.1 = silence, -0.7 = a full-scale sine."""
        x = latents * self.input_scale
        correction = self.last(self.norm(self.blocks(self.first(x)).transpose(1, 2)))
        frames = self.linear(x.transpose(1, 2)) + correction  # b t (s f)
        return frames.unflatten(2, (self.config.sub_frames, -1)).flatten(1, 2).transpose(1, 2)

    def waveform(self, log_magnitude: Tensor, known: Tensor | None = None) -> Tensor:
        """`b f m` -> `b n`: phases by peak tracking and fast Griffin-Lim; high-pass; limiter.

        Beside `known` audio (`b n`, NaN where there is none), peaks are tracked from its phases on,
        and its samples are put back before each transform.
        """
        magnitude = self.magnitude(log_magnitude)
        estimate = torch.polar(magnitude, self._peak_phases(magnitude, known))
        previous = torch.zeros_like(estimate)
        for _ in range(self.config.griffin_lim_steps):
            wav = self.spectrum.invert(estimate)
            if known is not None:
                wav = torch.where(known.isnan(), wav, known)
            projected = self.spectrum.transform(wav)
            moved = projected + 0.99 * (projected - previous)
            previous = projected
            estimate = torch.polar(magnitude, moved.angle())
        return high_pass(soft_limit(self.spectrum.invert(estimate)), self.config.sample_rate)

    def magnitude(self, log_magnitude: Tensor) -> Tensor:
        """Magnitudes of logarithms, `b f m` -> `b f m`: limited, and 0 below the lowest bin."""
        magnitude = self.limit((log_magnitude.clamp(max=0).exp() - self.floor).clamp(min=0))
        magnitude[:, : self.lowest_bin] = 0
        return magnitude

    def limit(self, magnitude: Tensor) -> Tensor:
        """Attenuate sub-frames louder than `loudest`."""
        # With a Hann window and our scale, the squares of one side sum to 3/4 of the mean square.
        rms = (magnitude.square().sum(1, keepdim=True) / 0.75).sqrt()
        return magnitude * (self.loudest / rms.clamp(min=self.loudest))

    def _peak_phases(self, magnitude: Tensor, known: Tensor | None) -> Tensor:
        """Phases that advance with the frequency of the nearest peak: `b f m` -> `b f m`.

        Transforms that see only `known` audio have its phases.
        """
        b, f, m = magnitude.shape
        level = magnitude.clamp(min=1e-7).log()
        left, mid, right = level[:, :-2], level[:, 1:-1], level[:, 2:]
        is_peak = F.pad((mid > left) & (mid >= right), (0, 0, 1, 1))
        # The maximum of the parabola through a peak and its neighbours is at the true frequency.
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
            2 * math.pi * self.spectrum.hop / self.spectrum.size
        )
        # Neighbouring bins of one partial alternate in sign under a window that starts at sample 0.
        alternating = math.pi * (bin_index % 2)
        heard = None
        if known is not None:  # a transform that sees one NaN is NaN
            heard = self.spectrum.transform(known).angle() - alternating
        phase = torch.zeros(b, f, device=level.device)
        phases = []
        # A bin continues the phase of its peak's bin, so that a moving partial stays coherent.
        for i in range(m):
            phase = phase.gather(1, nearest[:, :, i]) + advance[:, :, i]
            phase = torch.remainder(phase, 2 * math.pi)
            if heard is not None:
                phase = torch.where(heard[:, :, i].isnan(), phase, heard[:, :, i])
            phases.append(phase)
        return torch.stack(phases, dim=2) + alternating


def high_pass(
    wav: Tensor, sample_rate: int, stop_hz: float = 20.0, pass_hz: float = 35.0
) -> Tensor:
    """High-pass of `b n`: zero below `stop_hz` (including DC), a linear slope up to `pass_hz`."""
    freqs = torch.fft.rfftfreq(wav.shape[1], 1 / sample_rate, device=wav.device)
    gain = ((freqs - stop_hz) / (pass_hz - stop_hz)).clamp(0, 1)
    return torch.fft.irfft(torch.fft.rfft(wav) * gain, n=wav.shape[1])


def soft_limit(wav: Tensor, knee: float = 0.8, ceiling: float = 0.95) -> Tensor:
    """Soft clipping: unchanged within -knee .. knee, compressed towards the ceiling beyond."""
    room = ceiling - knee
    over = (wav.abs() - knee).clamp(min=0)
    return torch.where(over > 0, wav.sign() * (knee + room * (over / room).tanh()), wav)


class SpectralModel(nn.Module):
    """Encoder, codebooks and decoder, as they are trained and stored."""

    def __init__(self, config: SpectralCodecConfig):
        super().__init__()
        self.config = config
        self.encoder = SpectralEncoder(config)
        self.decoder = SpectralDecoder(config)
        self.entries: Tensor
        entries = torch.zeros(config.num_codebooks, config.codebook_size, config.latent_dim)
        self.register_buffer("entries", entries)

    def quantise(self, latents: Tensor) -> Tensor:
        """Latents `b d t` -> codes `b k t`: the entry nearest to the residual of each codebook."""
        residual = latents.transpose(1, 2)
        codes = torch.empty(
            len(residual),
            self.config.num_codebooks,
            residual.shape[1],
            dtype=torch.long,
            device=residual.device,
        )
        for k in self.config.quantising_order:
            codes[:, k] = nearest(residual, self.entries[k])
            residual = residual - self.entries[k][codes[:, k]]
        return codes

    def latents(self, codes: Tensor) -> Tensor:
        """Codes `b k t` of the first k codebooks -> latents `b d t`, the sum of their entries."""
        chosen = [entries[row] for entries, row in zip(self.entries, codes.unbind(1), strict=False)]
        return torch.stack(chosen).sum(0).transpose(1, 2)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors, in half precision."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        with replacing(folder / "model.safetensors") as temporary:
            save_file(weights, temporary, {"format": "pt"})
        write_json(folder / "config.json", {"model_type": MODEL_TYPE, **asdict(self.config)})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The inverse of `save`, in float32.

        Raises:
            UserError: if a file of weights is missing, broken, or of another shape.
            OSError, ValueError, TypeError: if the configuration is.
        """
        values = json.loads((folder / "config.json").read_text())
        config = SpectralCodecConfig(**{k: v for k, v in values.items() if k != "model_type"})
        file, remedy = folder / "model.safetensors", "copy or download it again"
        with torch.device("meta"):  # before anything of its size is allocated
            expected = {k: tuple(v.shape) for k, v in cls(config).state_dict().items()}
        check_same_shapes(expected, safetensors_shapes(file, remedy), file)
        model = cls(config)
        model.load_state_dict({k: v.float() for k, v in read_safetensors(file, remedy).items()})
        return model


class SpectralCodec(NetworkCodec):
    """The spectral codec as a `Codec`."""

    def __init__(self, model: SpectralModel, name: str, num_codebooks: int | None = None):
        count = first_codebooks(name, len(model.entries), num_codebooks)
        config = model.config
        settings = {k: v for k, v in asdict(config).items() if k not in DECODER_SETTINGS}
        super().__init__(
            model,
            name,
            {k: v for k, v in model.state_dict().items() if not k.startswith("decoder.")},
            {f"codebook {k}": entries for k, entries in enumerate(model.entries)},
            settings | {"num_codebooks": count},
            sample_rate=config.sample_rate,
            hop_samples=config.hop_samples,
            num_codebooks=count,
            codebook_size=config.codebook_size,
            channels=1,
            pad_mode="reflect",
        )

    @staticmethod
    def read(source: str, local_files_only: bool, name: str) -> SpectralModel:
        return SpectralModel.load(Path(source))

    @property
    def codebooks(self) -> Tensor:
        return self.model.entries[: self.facts.num_codebooks]

    def batch_key(self, num_samples: int) -> int:
        """Lengths within a factor of two: frames are independent, and each end is reflected."""
        return math.ceil(num_samples / self.facts.hop_samples).bit_length()

    def _encode(self, wav: Tensor) -> Tensor:
        return self._encode_padded(wav, None)

    def _encode_padded(self, wav: Tensor, lengths: list[int] | None) -> Tensor:
        latents = self.model.encoder(wav, lengths)
        return self.model.quantise(latents)[:, : self.facts.num_codebooks]

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decoder(self.model.latents(codes))[:, None]

    def _decode_beside(self, codes: Tensor, known: Tensor) -> Tensor:
        return self.model.decoder(self.model.latents(codes), known[:, 0])[:, None]


def nearest(x: Tensor, entries: Tensor) -> Tensor:
    """Index of the closest entry: `... d`, `c d` -> `...`."""
    return (x @ entries.T - 0.5 * entries.square().sum(1)).argmax(-1)
