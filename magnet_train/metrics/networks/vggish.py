"""VGGish, the network of published Fréchet audio distances: one embedding per second of a clip.

Hershey et al., "CNN architectures for large-scale audio classification", ICASSP 2017; front end and
windows as in google-research/frechet_audio_distance; weights and their names as torchvggish
publishes them.

Shapes: n windows, t samples, f mel bands.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from magnet_train.common.downloads import VGGISH, find_weights, load_network
from magnet_train.metrics.networks.frontend import check_clip, mel_filters


class Vggish(nn.Module):
    """VGGish with the front end of the papers: 1 s every 0.5 s, each clip normalised to its peak.

    Without PCA, 8-bit quantisation and activation after the last layer.
    """

    id = "vggish"
    sample_rate = 16_000
    dim = 128
    min_duration_s = 1.0
    window_frames = 96
    frame_samples = 400
    hop_samples = 160

    def __init__(self):
        super().__init__()
        self.hash = ""
        self.hann: Tensor
        self.mel: Tensor
        self.register_buffer("hann", torch.hann_window(self.frame_samples), persistent=False)
        self.register_buffer(
            "mel", mel_filters(self.sample_rate, 512, 64, "htk", 125, 7500), persistent=False
        )
        layers: list[nn.Module] = []
        channels = 1
        for widths in ((64,), (128,), (256, 256), (512, 512)):
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(6 * 4 * 512, 4096),
            nn.ReLU(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, self.dim),
        )

    def log_mel(self, wav: Tensor) -> Tensor:
        """`t` -> `frames f`: log magnitudes; incomplete frames are dropped."""
        frames = wav.unfold(0, self.frame_samples, self.hop_samples) * self.hann
        return torch.log(torch.fft.rfft(frames, 512).abs() @ self.mel.T + 0.01)

    def level(self, wav: Tensor) -> Tensor:
        """Normalise to a peak of -1 dBFS and round to int16, like audiocraft for Google's FAD."""
        peak = wav.abs().max().clamp(min=torch.finfo(torch.float32).tiny)  # silence stays silence
        return (wav * (10 ** (-1 / 20) / peak) * 32768).round()

    def examples(self, wav: Tensor) -> Tensor:
        """`t` -> `n 96 f`: of each second the first 96 of its 98 frames.

        The clip is divided by its largest positive sample, as Google's code does it.
        """
        frames = self.log_mel(wav / wav.max().clamp(min=0.1))
        seconds = 1 + (len(wav) - self.sample_rate) // 8000
        return frames.unfold(0, self.window_frames, 8000 // self.hop_samples)[:seconds].transpose(
            1, 2
        )

    @torch.no_grad()
    def forward(self, wav: Tensor) -> Tensor:
        """A mono clip at 16 kHz, `t`, of at least `min_duration_s` -> embeddings `n 128`.

        Silence is allowed.

        Raises:
            UserError: if it is too short, or has NaN or infinite samples.
        """
        check_clip(wav, self.sample_rate, self.min_duration_s, self.id)
        windows = self.examples(self.level(wav.to(self.hann)))
        # In small batches: sixteen windows take 25 MB in the first layer.
        return torch.cat([self.embed(w) for w in windows.split(16)])

    def embed(self, examples: Tensor) -> Tensor:
        """`n 96 f` -> `n 128`."""
        maps = self.features(examples[:, None])  # n 512 6 4
        # Channels last, as TensorFlow flattens.
        return self.embeddings(maps.permute(0, 2, 3, 1).flatten(1))


class TorchVggish(Vggish):
    """The same network with torchvggish's front end: 0.96 s every 0.96 s, the level unchanged.

    As in frechet-audio-distance and others, except for the resampler; not comparable with published
    values.
    """

    id = "torchvggish"
    min_duration_s = (400 + 95 * 160) / 16_000

    def level(self, wav: Tensor) -> Tensor:
        """The clip, unchanged."""
        return wav

    def examples(self, wav: Tensor) -> Tensor:
        """`t` -> `n 96 f`: frames in blocks of 96; the remainder at the end is dropped."""
        return self.log_mel(wav).unfold(0, self.window_frames, self.window_frames).transpose(1, 2)


@lru_cache
def load_vggish(path: str | None = None, front: type[Vggish] = Vggish) -> Vggish:
    """Load the published network in evaluation mode.

    Args:
        path: torchvggish's `vggish-10086976.pth` (default: cached or downloaded).
        front: `Vggish` for the papers' front end, `TorchVggish` for torchvggish's.

    Raises:
        UserError: if the weights cannot be found, or have another hash.
    """
    file = find_weights(VGGISH, path)
    network = front()
    load_network(network, file)
    network.hash = file.hash
    return network
