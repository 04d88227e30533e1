"""Joins recorded and decoded audio: blocks with context, loops, cross-fades.

A codec's decoder uses neighbouring frames and may reconstruct phases. So every block is decoded
with context on both sides, beside the audio that it is joined with, and cross-faded at its borders.
All cross-fades are inside the regenerated regions; all other samples of the recording stay exact.

Shapes: c channels, n samples, k codebooks, t frames.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from magnet_train.codec.base import Codec

CONTEXT_S = 1.0
"""Context on each side of a block, in seconds."""
BLOCK_S = 10.0
"""Maximum length of a block, in seconds."""

Render = Callable[[int, int, Tensor, Tensor], Tensor]
"""First and last frame, the audio `c n` before and after them (may be empty) -> decoded audio `c n`
from the first frame on; may be longer than requested.
"""


def crossfade(old: Tensor, new: Tensor) -> Tensor:
    """Cross-fade from `old` to `new`, `c n` each, at constant power for any correlation.

    Equal signals are unchanged (linear fade); uncorrelated ones keep their power.
    """
    fade = torch.linspace(0, 1, old.shape[1] + 2)[1:-1]
    energy = (old.square().sum() * new.square().sum()).sqrt()
    correlation = ((old * new).sum() / energy.clamp(min=1e-12)).clamp(0, 1)
    power = (1 - fade).square() + fade.square() + 2 * correlation * fade * (1 - fade)
    return ((1 - fade) * old + fade * new) / power.sqrt()


def encode_blocks(codec: Codec, wav: Tensor, is_loop: bool = False) -> Tensor:
    """Codes `1 k t` of audio `c n` at the codec's rate, in blocks with context.

    In a loop, which must be a whole number of frames, each end is the context of the other.
    """
    hop, rate = codec.facts.hop_samples, codec.facts.frame_rate
    context, block = round(CONTEXT_S * rate), round(BLOCK_S * rate)
    num_frames = -(-wav.shape[1] // hop)
    if is_loop:
        index = torch.arange(-context * hop, wav.shape[1] + context * hop) % wav.shape[1]
        return codec.encode(wav[None, :, index])[..., context : context + num_frames]
    if num_frames <= block + 2 * context:
        return codec.encode(wav[None])
    parts = []
    for first in range(0, num_frames, block):
        start = max(0, first - context)
        part = wav[None, :, start * hop : (first + block + context) * hop]
        parts.append(codec.encode(part)[..., first - start : first - start + block])
    return torch.cat(parts, 2)


def resample(wav: Tensor, rate: float, wanted: float) -> Tensor:
    """Resample `c n` with soxr."""
    import soxr

    if rate == wanted or wav.shape[1] == 0:
        return wav
    samples = soxr.resample(wav.T.numpy().astype(np.float64), rate, wanted)
    return torch.from_numpy(samples.T.copy()).float()


def resample_loop(wav: Tensor, num_samples: int) -> Tensor:
    """Resample a loop `c n` to another length by its Fourier series, which is exact."""
    from scipy.signal import resample

    if wav.shape[1] == num_samples:
        return wav
    return torch.from_numpy(resample(wav.double().numpy(), num_samples, axis=1)).float()


def decode_loop(
    codec: Codec, codes: Tensor, fade_s: float, recorded: Tensor | None = None
) -> Tensor:
    """Codes `k t` of a loop -> `c (t hop)`, whose end continues with its beginning.

    Each end is the codec's context of the other. The codec may reconstruct other phases, so the
    audio after the last decoded frame is cross-faded with the first one. Beside a recording,
    decoding starts at a recorded frame, so that a region over the loop's end is decoded as one.

    Args:
        codec: The codec.
        codes: The codes.
        fade_s: Length of this cross-fade, in seconds.
        recorded: The recording `c (t hop)` that regenerated frames are joined with, NaN in these.
    """
    t, hop = codes.shape[1], codec.facts.hop_samples
    context = round(CONTEXT_S * codec.facts.frame_rate)
    first, known = 0, None
    if recorded is not None:
        first = int((~recorded[0, ::hop].isnan()).int().argmax())
    index = torch.arange(first - context, first + t + context) % t
    if recorded is not None:
        recorded = _with_channels(recorded, codec.facts.channels)
        known = recorded.unflatten(1, (t, hop))[:, index].flatten(1)[None]
    wav = codec.decode(codes[None][..., index.to(codes.device)], known)[0].cpu()
    loop = wav[:, context * hop : (context + t) * hop].clone()
    fade = min(round(fade_s * codec.facts.sample_rate), loop.shape[1])
    behind = wav[:, (context + t) * hop :][:, :fade]
    loop[:, :fade] = crossfade(behind, loop[:, :fade])
    return loop.roll(first * hop, 1)


def linear_render(codec: Codec, codes: Tensor, sample_rate: int) -> Render:
    """A function that decodes blocks of `codes` (`k t`) with context, at `sample_rate`."""
    hop, facts = codec.facts.hop_samples, codec.facts
    context = round(CONTEXT_S * facts.frame_rate)

    def at_codec_rate(wav: Tensor) -> Tensor:
        return resample(_with_channels(wav, facts.channels), sample_rate, facts.sample_rate)

    def render(first: int, last: int, before: Tensor, after: Tensor) -> Tensor:
        start, end = max(0, first - context), min(last + context, codes.shape[1])
        samples = math.ceil(CONTEXT_S * sample_rate)
        lead, behind = (first - start) * hop, (last - start) * hop
        known = torch.full((facts.channels, (end - start) * hop), math.nan)
        old = at_codec_rate(before[:, -samples:])[:, -lead:]
        known[:, lead - old.shape[1] : lead] = old
        new = at_codec_rate(after[:, :samples])[:, : (end - last) * hop]
        known[:, behind : behind + new.shape[1]] = new
        wav = codec.decode(codes[None, :, start:end], known[None])[0].cpu()
        wav = resample(wav, facts.sample_rate, sample_rate)
        return wav[:, round(lead * sample_rate / facts.sample_rate) :]

    return render


@dataclass(frozen=True)
class Join:
    """A recording with some regenerated frames."""

    original: Tensor
    """`c n`, the recording; all frames after its end are regenerated."""
    to_decode: Tensor
    """bool `t`, frames to regenerate."""
    num_samples: int
    """Length of the result."""
    samples_per_frame: float
    fade: int
    """Length of the cross-fades, in samples."""
    block: int
    """Maximum length of a decoded block, in frames."""
    is_loop: bool = False
    """Whether the end continues with the beginning, which is kept."""

    def blocks(self, render: Render) -> Iterator[Tensor]:
        """The result in blocks `c n`, with constant memory."""
        regions, done = runs(self.to_decode), 0
        for (first, last), (following, _) in pairwise([*regions, (len(self.to_decode), 0)]):
            kept = self.original[:, done : self._sample(first)]
            yield kept
            done = self._sample(last)
            after = self.original[:, done : self._sample(following)]
            yield from self._decoded(render, first, last, kept, after)
        yield self.original[:, done : self.num_samples]

    def _sample(self, frame: int) -> int:
        end = (
            self.num_samples
            if frame == len(self.to_decode)
            else round(frame * self.samples_per_frame)
        )
        return min(end, self.num_samples)

    def _decoded(
        self, render: Render, first: int, last: int, before: Tensor, after: Tensor
    ) -> Iterator[Tensor]:
        """Blocks of one region, cross-faded with the recording `before` and `after` it."""
        old = self.original[:, self._sample(first) :] if first > 0 else None
        for start in range(first, last, self.block):
            end = min(start + self.block, last)
            wav = render(start, end, before, after if end == last else after[:, :0])
            wav = _with_channels(wav, len(self.original))
            size = self._sample(end) - self._sample(start)
            wav, behind = _padded(wav[:, :size], size), wav[:, size:]
            if old is not None:
                fade = min(self.fade, size, old.shape[1])
                wav[:, :fade] = crossfade(old[:, :fade], wav[:, :fade])
            if end == last and (last < len(self.to_decode) or self.is_loop):
                new = self.original[:, : self._sample(last)][:, -min(self.fade, size) :]
                tail = wav[:, size - new.shape[1] :]
                wav[:, size - new.shape[1] :] = crossfade(tail, new)
            yield wav
            before, old = wav, behind


def _with_channels(wav: Tensor, channels: int) -> Tensor:
    """`c n` with this number of channels; added channels are the mean of the others."""
    return wav if len(wav) == channels else wav.mean(0, keepdim=True).expand(channels, -1)


def _padded(wav: Tensor, size: int) -> Tensor:
    """A copy padded with zeros to `size`, in case of rounding."""
    return torch.nn.functional.pad(wav, (0, size - wav.shape[1])).clone()


def runs(mask: Tensor) -> list[tuple[int, int]]:
    """Start and end of each run of True: bool `t`.

    >>> runs(torch.tensor([True, False, True, True]))
    [(0, 1), (2, 4)]
    """
    edges = torch.diff(mask.int(), prepend=torch.zeros(1), append=torch.zeros(1))
    starts = (edges > 0).nonzero()[:, 0].tolist()
    return list(zip(starts, (edges < 0).nonzero()[:, 0].tolist(), strict=True))


def decode_blocks(codec: Codec, codes: Tensor, fade_s: float) -> Tensor:
    """Codes `k t` -> `c (t hop)`: as the codec decodes them, but in blocks of at most BLOCK_S."""
    facts, num_frames = codec.facts, codes.shape[1]
    join = Join(
        torch.zeros(facts.channels, 0),
        torch.ones(num_frames, dtype=torch.bool),
        num_frames * facts.hop_samples,
        facts.hop_samples,
        round(fade_s * facts.sample_rate),
        round(BLOCK_S * facts.frame_rate),
    )
    return torch.cat(list(join.blocks(linear_render(codec, codes, facts.sample_rate))), 1)


def join_loop(join: Join, loop: Tensor) -> Tensor:
    """`join` for a decoded loop `c n`, whose regions may cross its end."""
    if bool(join.to_decode.all()):
        return _with_channels(loop, len(join.original)).clone()
    # Rotated to start with a kept frame, so that no region crosses the end.
    turn = int((~join.to_decode).nonzero()[0])
    by = round(turn * join.samples_per_frame)
    turned = replace(
        join,
        original=join.original.roll(-by, 1),
        to_decode=join.to_decode.roll(-turn),
        block=len(join.to_decode),
        is_loop=True,
    )
    samples = loop.roll(-by, 1)

    def render(first: int, last: int, before: Tensor, after: Tensor) -> Tensor:
        return samples[:, turned._sample(first) :]

    return torch.cat(list(turned.blocks(render)), 1).roll(by, 1)
