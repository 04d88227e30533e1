"""Text-audio similarity for the demo: a small scorer that is not CLAP and not comparable with it.

Maps frozen musicnn features of audio and frozen sentence embeddings of captions into a joint space,
trained by `data/demo/train_text_audio.py` on the original audio of the training split.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_train.conditioning import TextEncoder, load_text_encoder
from magnet_train.metrics.intervals import bootstrap_interval
from magnet_train.metrics.networks.frontend import load_bundled
from magnet_train.metrics.networks.musicnn import MusicnnOutput


def clip_features(output: MusicnnOutput) -> Tensor:
    """Mean and standard deviation over windows of a clip's embeddings and tag logits, `500`."""
    logits = torch.logit(output.tags.clamp(1e-4, 1 - 1e-4))
    x = torch.cat([output.embeddings, logits], 1)
    return torch.cat([x.mean(0), x.std(0, unbiased=False)])


def sentence_features(encoder: TextEncoder, captions: Sequence[str]) -> Tensor:
    """Mean of a caption's token states, `b d`; zero for an empty caption."""
    states, mask = encoder(list(captions))
    return states.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class TextAudioHead(nn.Module):
    """Two small networks into one space of unit vectors."""

    def __init__(
        self,
        audio_dim: int = 500,
        text_dim: int = 384,
        dim: int = 128,
        hidden: int = 256,
        dropout: float = 0.2,
    ):
        super().__init__()
        self.audio_mean: Tensor
        self.audio_std: Tensor
        self.register_buffer("audio_mean", torch.zeros(audio_dim))
        self.register_buffer("audio_std", torch.ones(audio_dim))

        def tower(width: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim)
            )

        self.audio = tower(audio_dim)
        self.text = tower(text_dim)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def embed_audio(self, features: Tensor) -> Tensor:
        """`b 500` -> unit vectors `b d`."""
        return F.normalize(self.audio((features - self.audio_mean) / self.audio_std), dim=-1)

    def embed_text(self, features: Tensor) -> Tensor:
        """`b 384` -> unit vectors `b d`."""
        return F.normalize(self.text(features), dim=-1)


@lru_cache
def load_text_audio() -> tuple[TextAudioHead, TextEncoder]:
    """Load the bundled head, and the text encoder that it was trained with.

    Raises:
        UserError: if its weights are missing or damaged, or the demo's text encoder is not
            installed.
    """

    def make(folder: Path) -> TextAudioHead:
        return TextAudioHead(**json.loads((folder / "config.json").read_text())["head"])

    return load_bundled("text_audio", make)[0], load_text_encoder("demo")


def true_minus_shuffled(
    similarities: Tensor, resamples: int = 10_000
) -> tuple[float, float, float]:
    """Mean similarity to the clip's caption minus that to other captions, with 95 % interval;
    similarities are `b b`, clip i against caption j, of two clips or more.

    >>> true_minus_shuffled(torch.eye(3))
    (1.0, 1.0, 1.0)
    """
    b = len(similarities)
    others = (similarities.sum(1) - similarities.diagonal()) / (b - 1)
    gaps = (similarities.diagonal() - others).double()
    return gaps.mean().item(), *bootstrap_interval(gaps, resamples)
