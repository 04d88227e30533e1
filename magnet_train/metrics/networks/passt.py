"""PaSST, the classifier of published KL: logits of AudioSet's 527 classes per segment.

Koutini et al., "Efficient training of audio transformers with patchout", Interspeech 2022; front
end and names of the weights as in the package hear21passt, segments as in
audiocraft/metrics/kld.py.

Shapes: s segments, t samples, f mel bands, p patches, d width.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_train.common.downloads import PASST_10S, PASST_20S, find_weights, load_network
from magnet_train.metrics.networks.frontend import check_clip, mel_filters


@dataclass(frozen=True)
class PasstOutput:
    """Outputs of PaSST for each segment of a clip."""

    logits: Tensor
    """`s 527`, before the softmax."""
    features: Tensor
    """`s 768`, from which the logits are computed."""


class Attention(nn.Module):
    """Self-attention over all patches."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Feed-forward layer with four times the width."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Passt(nn.Module):
    """PaSST with its front end, for segments of `segment_s` seconds.

    The last segment is not padded; a remainder of 0.15 s or less is dropped.
    """

    sample_rate = 32_000
    min_duration_s = 4801 / 32_000
    patch = 16
    stride = 10

    def __init__(self, segment_s: int = 20, width: int = 768, layers: int = 12, heads: int = 12):
        """`segment_s` is 20 for music and 10 for sound in published results."""
        super().__init__()
        self.hash = ""
        self.id = f"passt-{segment_s}s"
        self.segment_s = segment_s
        self.hann: Tensor
        self.mel: Tensor
        self.register_buffer("hann", torch.hann_window(800, periodic=False), persistent=False)
        self.register_buffer(
            "mel", mel_filters(self.sample_rate, 1024, 128, "htk", highest=15_000), persistent=False
        )
        # The models were trained with 998 and 2000 spectrogram frames.
        frames = {10: 998, 20: 2000}[segment_s]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, width, self.patch, self.stride)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        self.new_pos_embed = nn.Parameter(torch.zeros(1, 2, width))  # of the two tokens
        self.freq_new_pos_embed = nn.Parameter(torch.zeros(1, width, 128 // self.stride, 1))
        self.time_new_pos_embed = nn.Parameter(torch.zeros(1, width, 1, frames // self.stride))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 527))
        self.head_dist = nn.Linear(width, 527)  # only used in training

    def segments(self, wav: Tensor) -> list[Tensor]:
        """`t` -> segments of `segment_s` seconds and the remainder, if longer than 0.15 s."""
        pieces = wav.split(self.segment_s * self.sample_rate)
        return [
            piece for piece in pieces if len(piece) >= round(self.min_duration_s * self.sample_rate)
        ]

    def log_mel(self, wav: Tensor) -> Tensor:
        """`t` -> `f frames`: log power of the pre-emphasised clip with reflection padding, scaled
        to about [-1, 1]."""
        emphasised = wav[1:] - 0.97 * wav[:-1]
        power = (
            torch.stft(emphasised, 1024, 320, 800, self.hann, return_complex=True).abs().square()
        )
        return (torch.log(self.mel @ power + 1e-5) + 4.5) / 5

    @torch.no_grad()
    def forward(self, wav: Tensor) -> PasstOutput:
        """A mono clip at 32 kHz, `t`, longer than 0.15 s; silence is allowed.

        Raises:
            UserError: if it is too short, or has NaN or infinite samples.
        """
        check_clip(wav, self.sample_rate, self.min_duration_s, self.id)
        outputs = [
            self.classify(self.log_mel(segment)[None])
            for segment in self.segments(wav.to(self.hann))
        ]
        logits, features = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        return PasstOutput(logits, features)

    def classify(self, log_mel: Tensor) -> tuple[Tensor, Tensor]:
        """`s f frames` -> logits `s 527` and features `s d`."""
        x = self.patch_embed["proj"](log_mel[:, None])  # s d 12 time
        x = x + self.time_new_pos_embed[..., : x.shape[-1]] + self.freq_new_pos_embed
        tokens = torch.cat([self.cls_token, self.dist_token], 1) + self.new_pos_embed
        x = torch.cat([tokens.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)  # s 2+p d
        features = self.norm(self.blocks(x))[:, :2].mean(1)
        return self.head(features), features


@lru_cache
def load_passt(path: str | None = None, segment_s: int = 20) -> Passt:
    """Load the published network in evaluation mode.

    Args:
        path: the package's weight file (default: cached or downloaded).
        segment_s: 20 for music, 10 for sound, in seconds; each has its own weights.

    Raises:
        UserError: if the weights cannot be found, or have another hash.
    """
    file = find_weights({10: PASST_10S, 20: PASST_20S}[segment_s], path)
    network = Passt(segment_s)
    load_network(network, file)
    network.hash = file.hash
    return network
