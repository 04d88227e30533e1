"""musicnn: embeddings and tags of each window of a waveform.

Pons and Serra, "musicnn: pre-trained convolutional neural networks for music audio tagging", 2019
(ISC licence); the MagnaTagATune version with 50 tags, which is bundled.

Shapes: n windows, t samples or spectrogram frames, f mel bands.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import soxr
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_train.metrics.networks.frontend import check_clip, load_bundled, mel_filters

TAGS = (
    "guitar; classical; slow; techno; strings; drums; electronic; rock; fast; piano; ambient; "
    "beat; violin; vocal; synth; female; indian; opera; male; singing; vocals; no vocals; "
    "harpsichord; loud; quiet; flute; woman; male vocal; no vocal; pop; soft; sitar; solo; man; "
    "classic; choir; voice; new age; dance; male voice; female vocal; beats; harp; cello; no "
    "voice; weird; country; metal; female voice; choral"
).split("; ")
"""Names of the 50 outputs, in order."""


@dataclass(frozen=True)
class MusicnnOutput:
    """Outputs of musicnn for each window of a clip."""

    embeddings: Tensor
    """`n 200`, the penultimate layer."""
    tags: Tensor
    """`n 50`, probabilities of independent tags (sigmoids, in the order of TAGS)."""
    features: Tensor
    """`n 1506`, pooled features of all layers."""


class ScaleShift(nn.Module):
    """Batch normalisation in inference: scale and shift per channel on axis 1."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return x * self.scale.view(shape) + self.shift.view(shape)


class Layer(nn.Module):
    """A convolution or linear layer, then ReLU, then the normalisation."""

    def __init__(self, layer: nn.Module, channels: int):
        super().__init__()
        self.layer = layer
        self.norm = ScaleShift(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.layer(x)))


class Musicnn(nn.Module):
    """musicnn's network with its front end.

    96 mel bands of 16 kHz audio, log10(1 + 10000 power), windows of 187 spectrogram frames (2.99 s)
    every 1.5 s; the remainder at the end is dropped.
    """

    id = "musicnn-mtt"
    sample_rate = 16_000
    window_frames = 187
    hop_samples = 256
    min_duration_s = 187 * 256 / 16_000

    def __init__(self):
        super().__init__()
        self.hash = ""
        self.hop_frames = round(1.5 * self.sample_rate / self.hop_samples)
        self.hann: Tensor
        self.mel: Tensor
        self.register_buffer("hann", torch.hann_window(512), persistent=False)
        self.register_buffer(
            "mel", mel_filters(self.sample_rate, 512, 96, "slaney"), persistent=False
        )
        self.input_norm = ScaleShift(1)
        self.pool_norm = ScaleShift(1506)
        # Tall filters capture timbre, long ones rhythm; both are pooled over all frequencies.
        self.timbral = nn.ModuleList(
            Layer(nn.Conv2d(1, 204, (7, w), padding=(3, 0)), 204) for w in (38, 67)
        )
        self.temporal = nn.ModuleList(
            Layer(nn.Conv2d(1, 51, (length, 1)), 51) for length in (128, 64, 32)
        )
        self.middle = nn.ModuleList(Layer(nn.Conv2d(1, 64, (7, w)), 64) for w in (561, 64, 64))
        self.penultimate = Layer(nn.Linear(1506, 200), 200)
        self.tags = nn.Linear(200, 50)

    @staticmethod
    def resample(wav: Tensor, sample_rate: int) -> Tensor:
        """`t` at any rate -> `t` at 16 kHz, by soxr (very high quality)."""
        if sample_rate == Musicnn.sample_rate:
            return wav
        return torch.from_numpy(
            soxr.resample(wav.numpy(), sample_rate, Musicnn.sample_rate, "VHQ").astype(np.float32)
        )

    def spectrogram(self, wav: Tensor) -> Tensor:
        """`t` -> `frames f`, as librosa's melspectrogram with zero padding."""
        power = (
            torch.stft(wav, 512, 256, window=self.hann, pad_mode="constant", return_complex=True)
            .abs()
            .square()
        )
        # Rounded, because the network was trained on half-precision spectrograms.
        return torch.log10(10_000 * (self.mel @ power).clamp(max=65_504).half().float().T + 1)

    @torch.no_grad()
    def forward(self, wav: Tensor) -> MusicnnOutput:
        """Outputs for a mono clip at 16 kHz, `t`, of at least 2.99 s; silence is allowed.

        Raises:
            UserError: if it is too short, or has NaN or infinite samples.
        """
        check_clip(wav, self.sample_rate, self.min_duration_s, "musicnn")
        windows = (
            self.spectrogram(wav.float())
            .unfold(0, self.window_frames, self.hop_frames)
            .transpose(1, 2)
        )
        # In small batches: eight windows take 200 MB in the first layer.
        outputs = [self._windows(part) for part in windows.split(8)]
        embeddings, tags, features = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        return MusicnnOutput(embeddings, tags, features)

    def _windows(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.input_norm(x[:, None])  # n 1 t f
        maps = [layer(x).amax(3) for layer in self.timbral]
        for layer in self.temporal:
            length: int = layer.layer.weight.shape[2]  # type: ignore[union-attr,assignment]
            maps.append(layer(F.pad(x, (0, 0, (length - 1) // 2, length // 2))).amax(3))
        front = torch.cat(maps, 1)  # n 561 t
        levels = [front]
        y = front
        for i, layer in enumerate(self.middle):
            z = layer(F.pad(y.transpose(1, 2)[:, None], (0, 0, 3, 3)))[..., 0]  # n 64 t
            y = z if i == 0 else z + y
            levels.append(y)
        everything = torch.cat(levels, 1)  # n 753 t
        pooled = torch.stack([everything.amax(2), everything.mean(2)], dim=2).flatten(1)
        features = self.pool_norm(pooled)
        embeddings = self.penultimate(features)
        return embeddings, torch.sigmoid(self.tags(embeddings)), pooled


def reference_arrays(
    wav: Tensor, sample_rate: int, network: Musicnn | None = None
) -> dict[str, np.ndarray] | None:
    """Float32 `embeddings` (`n 200`) and `tags` (`n 50`) of a real mono clip `t` for a shard; None
    if it is shorter than 2.99 s.
    """
    network = network or load_musicnn()
    wav = network.resample(wav, sample_rate)
    if len(wav) < network.window_frames * network.hop_samples:
        return None
    output = network(wav)
    return {"embeddings": output.embeddings.numpy(), "tags": output.tags.numpy()}


@lru_cache
def load_musicnn() -> Musicnn:
    """Load the bundled network in evaluation mode.

    Raises:
        UserError: if its weights are missing or damaged.
    """
    network, hash = load_bundled("musicnn", lambda folder: Musicnn())
    network.hash = hash
    return network
