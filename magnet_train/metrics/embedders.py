"""Embedders: the networks of the metrics, with a common interface for clips at any sample rate.

Shapes: n windows or segments, d dimensions, c classes, b captions.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from magnet_train.common.errors import UserError
from magnet_train.metrics import music
from magnet_train.metrics.networks.frontend import check_clip, resample


@dataclass(frozen=True)
class ClipFeatures:
    """Outputs of a network for one clip."""

    embeddings: Tensor
    """`n d`."""
    outputs: Tensor | None = None
    """`n c`, compared by KL: logits, or the tag probabilities of musicnn."""
    vector: Tensor | None = None
    """`d`, the embedding of the clip in the space shared with captions."""


@dataclass(frozen=True)
class Embedder:
    """A network and its protocol; call it with a clip to get features."""

    name: str
    """Name in metrics: musicnn, vggish …"""
    id: str
    """Id of the network, in records."""
    hash: str
    """Hash of its weights."""
    min_duration_s: float
    """Minimum length of a clip, in seconds."""
    resampler: str
    """Name of the resampler."""
    windowing: str
    """Length and hop of its windows."""
    embed: Callable[[Tensor, int, str], ClipFeatures]
    """Clip `channels t`, its rate and its id -> features."""
    embed_text: Callable[[Sequence[str]], Tensor] | None = None
    """Captions -> unit vectors `b d` of the shared space."""
    convention: str | None = None
    """Default convention of KL, a name of `kl.CONVENTIONS`."""

    @property
    def protocol(self) -> dict[str, str]:
        """What its embeddings depend on, as fields of records and reference statistics."""
        return {
            "embedder": self.id,
            "embedder_hash": self.hash,
            "resampler": self.resampler,
            "windowing": self.windowing,
        }

    def __call__(self, wav: Tensor, sample_rate: int, key: str) -> ClipFeatures:
        """Features of one clip.

        Args:
            wav: `channels t`; channels are averaged.
            sample_rate: any sample rate, in Hz.
            key: id of the clip, for errors.

        Raises:
            UserError: if it is too short, or has NaN or infinite samples.
        """
        try:
            return self.embed(wav.cpu().float(), sample_rate, key)
        except UserError as error:
            raise UserError(f"{key}: {error}; remove or replace it") from error


EMBEDDERS = (
    "musicnn",
    "codec",
    "vggish",
    "torchvggish",
    "passt",
    "passt-10s",
    "clap",
    "laion-clap",
)
"""Names for `load_embedder`; musicnn is bundled, the weights of the others are downloaded once."""


def load_embedder(name: str, weights: str | None = None, device: str = "cpu") -> Embedder:
    """Load an embedder.

    Args:
        name: one of EMBEDDERS, or "music" for the measures of `music.py`, which need no network.
        weights: weight file (default: cached or downloaded); for "codec", the codec's name
            (default: "demo").
        device: device of the network.

    Raises:
        UserError: if the name is unknown, its weights cannot be found, or it takes none.
    """
    if name == "music":
        return _music_embedder()
    if name not in EMBEDDERS:
        raise UserError(f"embedder {name!r}: choose one of {', '.join(EMBEDDERS)}")
    if name == "musicnn":
        if weights is not None:
            raise UserError(f"weights {weights} of musicnn: its weights are bundled; omit it")
        return _load_musicnn_embedder()
    if name == "codec":
        return _load_codec_embedder(weights or "demo", device)
    if name in ("vggish", "torchvggish"):
        return _load_vggish_embedder(name, weights, device)
    if name in ("passt", "passt-10s"):
        return _load_passt_embedder(name, weights, device)
    return _load_clap_embedder(name, weights, device)


def _music_embedder() -> Embedder:
    """Measures of key, beat and notes: a row `1 d` as embeddings, notes `m 3` as outputs."""

    def embed(wav: Tensor, sample_rate: int, key: str) -> ClipFeatures:
        return ClipFeatures(*music.measure_clip(wav, sample_rate).packed())

    return Embedder(
        name="music",
        id="measures of key, beat and notes",
        hash=music.VERSION,
        min_duration_s=music.MIN_DURATION_S,
        resampler="none",
        windowing="whole clips",
        embed=embed,
    )


def _resampled_embedder(
    name: str,
    network: Any,
    windowing: str,
    embed: Callable[[Tensor, str], ClipFeatures],
    **fields: Any,
) -> Embedder:
    """An embedder whose network needs mono clips resampled with julius."""

    def embed_clip(wav: Tensor, sample_rate: int, key: str) -> ClipFeatures:
        return embed(resample(wav, sample_rate, network.sample_rate), key)

    return Embedder(
        name=name,
        id=network.id,
        hash=network.hash,
        min_duration_s=network.min_duration_s,
        resampler="julius",
        windowing=windowing,
        embed=embed_clip,
        **fields,
    )


def _load_vggish_embedder(name: str, weights: str | None, device: str) -> Embedder:
    from magnet_train.metrics.networks.vggish import TorchVggish, Vggish, load_vggish

    network = load_vggish(weights, Vggish if name == "vggish" else TorchVggish).to(device)
    windowing = "1 s every 0.5 s" if name == "vggish" else "0.96 s every 0.96 s"
    return _resampled_embedder(
        name, network, windowing, lambda x, key: ClipFeatures(network(x.to(device)).cpu())
    )


def _load_passt_embedder(name: str, weights: str | None, device: str) -> Embedder:
    from magnet_train.metrics.networks.passt import load_passt

    network = load_passt(weights, 20 if name == "passt" else 10).to(device)

    def embed(wav: Tensor, key: str) -> ClipFeatures:
        output = network(wav.to(device))
        return ClipFeatures(output.features.cpu(), output.logits.cpu())

    windowing = f"segments of {network.segment_s} s, the last as it is"
    return _resampled_embedder(name, network, windowing, embed, convention="audiocraft")


def _load_clap_embedder(name: str, weights: str | None, device: str) -> Embedder:
    from magnet_train.metrics.networks.clap import load_clap

    network = load_clap(weights, package=name == "laion-clap", device=device)

    def embed(wav: Tensor, key: str) -> ClipFeatures:
        vector = network.embed_audio(wav, key)
        return ClipFeatures(vector[None], vector=vector)

    windowing = "10 s, one crop by id, or repeated"
    return _resampled_embedder(name, network, windowing, embed, embed_text=network.embed_text)


def _load_codec_embedder(name: str, device: str) -> Embedder:
    """Quantised latents of a codec, averaged over each second."""
    from magnet_train.codec.base import load_codec

    codec = load_codec(name).to(device)
    facts = codec.facts
    codebooks = codec.codebooks.cpu()
    frames_per_second = round(facts.frame_rate)

    @torch.no_grad()
    def embed(wav: Tensor, sample_rate: int, key: str) -> ClipFeatures:
        wav = resample(wav, sample_rate, facts.sample_rate)
        check_clip(wav, facts.sample_rate, 1.0, f"codec {facts.id}")
        codes = codec.encode(wav.expand(facts.channels, -1)[None].to(device))[0].cpu()
        entries = [book[row] for book, row in zip(codebooks, codes, strict=True)]
        latents = torch.stack(entries).sum(0)  # t d
        return ClipFeatures(latents.unfold(0, frames_per_second, frames_per_second).mean(-1))

    return Embedder(
        name="codec",
        id=f"codec {facts.id}",
        hash=facts.hash,
        min_duration_s=1.0,
        resampler="julius",
        windowing="1 s every 1 s",
        embed=embed,
    )


def _load_musicnn_embedder() -> Embedder:
    """The bundled network, with the text-audio head if the demo's text encoder is installed."""
    from magnet_train.metrics.networks.musicnn import load_musicnn
    from magnet_train.metrics.networks.text_audio import (
        clip_features,
        load_text_audio,
        sentence_features,
    )

    network = load_musicnn()
    head = encoder = None
    with suppress(UserError):  # the demo's text encoder is an extra
        head, encoder = load_text_audio()

    @torch.no_grad()
    def embed(wav: Tensor, sample_rate: int, key: str) -> ClipFeatures:
        output = network(network.resample(wav.mean(0), sample_rate))
        vector = None if head is None else head.embed_audio(clip_features(output)[None])[0]
        return ClipFeatures(output.embeddings, output.tags, vector)

    @torch.no_grad()
    def embed_text(captions: Sequence[str]) -> Tensor:
        assert head is not None and encoder is not None
        return F.normalize(head.embed_text(sentence_features(encoder, captions).cpu()), dim=-1)

    return Embedder(
        name="musicnn",
        id=network.id,
        hash=network.hash,
        min_duration_s=network.min_duration_s,
        resampler="soxr VHQ",
        windowing="2.99 s every 1.5 s",
        embed=embed,
        embed_text=None if head is None else embed_text,
        convention="musicnn-tags",
    )
