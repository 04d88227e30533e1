"""Networks behind one interface: a clip at any rate in, what the metrics compare out, with what must be said of it.

Shapes: n windows or segments, d dimensions, c classes, b captions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from magnet_train.common.errors import UserError
from magnet_train.metrics.networks.frontend import check_clip, resample


@dataclass(frozen=True)
class HeardClip:
    """What a network made of one clip."""

    embeddings: Tensor
    """`n d`."""
    outputs: Tensor | None = None
    """`n c`, what KL compares: logits, or musicnn's tag probabilities."""
    vector: Tensor | None = None
    """`d`, the clip in the space that it shares with captions."""


@dataclass(frozen=True)
class Listener:
    """A network with its protocol; call it with a clip to have it heard."""

    name: str
    """In names of metrics: musicnn, vggish …"""
    id: str
    """Of the network, in records."""
    hash: str
    """Of its weights."""
    sample_rate: int
    """That the network hears, in Hz."""
    shortest_s: float
    """Length of the shortest clip that it hears, in seconds."""
    resampler: str
    """Name of the one in use."""
    windowing: str
    """Length and hop of what it hears at once."""
    hear: Callable[[Tensor, int, str], HeardClip]
    """Clip `channels t`, its rate and its id -> what was heard."""
    embed_text: Callable[[Sequence[str]], Tensor] | None = None
    """Captions -> unit vectors `b d` of the shared space."""
    convention: str | None = None
    """Of `kl.CONVENTIONS`, by which its outputs are compared."""

    def __call__(self, wav: Tensor, sample_rate: int, key: str) -> HeardClip:
        """What is heard in a clip.

        Args:
            wav: `channels t`, any rate.
            sample_rate: in Hz.
            key: its id, named in errors.

        Raises:
            UserError: if it is too short, or holds NaN or infinite samples.
        """
        try:
            return self.hear(wav.cpu().float(), sample_rate, key)
        except UserError as error:
            raise UserError(f"{key}: {error}; remove or replace it") from error


LISTENERS = ("musicnn", "codec", "vggish", "torchvggish", "passt", "passt-10s", "clap", "laion-clap")
"""Names that `load_listener` knows; musicnn ships, the others' weights are downloaded once (weights.py)."""


def load_listener(
    name: str, weights: str | None = None, device: str = "cpu", tokenizer: str = "roberta-base"
) -> Listener:
    """The network of that name.

    Args:
        name: one of LISTENERS.
        weights: file of its weights, the cached or downloaded one if not given; of the codec its name, "demo" if not
            given.
        device: where it runs.
        tokenizer: CLAP's, a folder or hub id.

    Raises:
        UserError: if there is none of that name, or its weights are not to be had.
    """
    if name == "musicnn":
        return _musicnn()
    if name == "codec":
        return _codec(weights or "demo", device)
    if name in ("vggish", "torchvggish"):
        from magnet_train.metrics.networks.vggish import TorchVggish, Vggish, load_vggish

        vggish = load_vggish(weights, Vggish if name == "vggish" else TorchVggish).to(device)
        windowing = "1 s every 0.5 s" if name == "vggish" else "0.96 s every 0.96 s"
        return _julius(name, vggish, windowing, lambda x, key: HeardClip(vggish(x.to(device)).cpu()))
    if name in ("passt", "passt-10s"):
        from magnet_train.metrics.networks.passt import load_passt

        passt = load_passt(weights, 20 if name == "passt" else 10).to(device)

        def classify(wav: Tensor, key: str) -> HeardClip:
            heard = passt(wav.to(device))
            return HeardClip(heard.features.cpu(), heard.logits.cpu())

        windowing = f"segments of {passt.segment_s} s, the last as it is"
        return _julius(name, passt, windowing, classify, convention="audiocraft")
    if name in ("clap", "laion-clap"):
        from magnet_train.metrics.networks.clap import load_clap

        clap = load_clap(weights, tokenizer, package=name == "laion-clap", device=device)

        def embed(wav: Tensor, key: str) -> HeardClip:
            vector = clap.embed_audio(wav, key)
            return HeardClip(vector[None], vector=vector)

        return _julius(name, clap, "10 s, one crop by id, or repeated", embed, embed_text=clap.embed_text)
    raise UserError(f"listener {name!r}: choose one of {', '.join(LISTENERS)}")


def _julius(name: str, network: Any, windowing: str, hear: Callable[[Tensor, str], HeardClip], **more: Any) -> Listener:
    def whole(wav: Tensor, sample_rate: int, key: str) -> HeardClip:
        return hear(network.resample(wav, sample_rate), key)

    return Listener(
        name, network.id, network.hash, network.sample_rate, network.shortest_s, "julius", windowing, whole, **more
    )


def _codec(name: str, device: str) -> Listener:
    """A codec's quantised latents, averaged over each second: nearly free where one is loaded anyway."""
    from magnet_train.codec.base import load_codec

    codec = load_codec(name).to(device)
    facts, codebooks = codec.facts, codec.codebooks.cpu()
    per_second = round(facts.frame_rate)

    class Latents:
        id, hash, sample_rate, shortest_s = f"codec {facts.id}", facts.hash, facts.sample_rate, 1.0
        resample = staticmethod(lambda wav, sample_rate: resample(wav, sample_rate, facts.sample_rate))

    @torch.no_grad()
    def hear(wav: Tensor, key: str) -> HeardClip:
        check_clip(wav, facts.sample_rate, Latents.shortest_s, Latents.id)
        codes = codec.encode(wav.expand(facts.channels, -1)[None].to(device))[0].cpu()
        latents = torch.stack([book[row] for book, row in zip(codebooks, codes, strict=True)]).sum(0)  # t e
        return HeardClip(latents.unfold(0, per_second, per_second).mean(-1))

    return _julius("codec", Latents, "1 s every 1 s", hear)


def _musicnn() -> Listener:
    """The shipped network, and where its text-audio head can be had, captions too."""
    from magnet_train.metrics.networks.musicnn import load_musicnn
    from magnet_train.metrics.networks.text_audio import clip_features, load_text_audio, sentence_features

    network = load_musicnn()
    try:
        scorer = load_text_audio()
    except UserError:  # the demo's text encoder is an extra
        scorer = None

    @torch.no_grad()
    def hear(wav: Tensor, sample_rate: int, key: str) -> HeardClip:
        heard = network(network.resample(wav.mean(0), sample_rate))
        vector = None if scorer is None else scorer.head.embed_audio(clip_features(heard)[None])[0]
        return HeardClip(heard.embeddings, heard.tags, vector)

    @torch.no_grad()
    def embed_text(captions: Sequence[str]) -> Tensor:
        assert scorer is not None
        return F.normalize(scorer.head.embed_text(sentence_features(scorer.encoder, captions).cpu()), dim=-1)

    return Listener(
        "musicnn", network.id, network.hash, network.sample_rate, network.shortest_s, "soxr VHQ", "2.99 s every 1.5 s",
        hear, None if scorer is None else embed_text, "musicnn-tags",
    )  # fmt: skip
