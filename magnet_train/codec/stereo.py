"""Stereo with a mono codec: both channels encoded alone, with interleaved codebooks, as in MusicGen
(Copet et al., 2023, arXiv 2306.05284): left 1, right 1, left 2, right 2, …
"""

from dataclasses import replace

import torch
from torch import Tensor

from magnet_train.codec.base import STEREO, Codec, codes_hash
from magnet_train.common.errors import UserError


class StereoCodec(Codec):
    """A mono codec for each channel; its name ends with @stereo."""

    def __init__(self, mono: Codec):
        """
        Args:
            mono: The codec of each channel.

        Raises:
            UserError: if it has two channels already.
        """
        super().__init__()
        if mono.facts.channels != 1:
            raise UserError(f"codec {mono.facts.id!r}: is stereo already; omit {STEREO}")
        self.mono = mono
        self.facts = replace(
            mono.facts,
            id=mono.facts.id + STEREO,
            hash=codes_hash({}, {"stereo": mono.facts.hash}),
            num_codebooks=2 * mono.facts.num_codebooks,
            channels=2,
        )

    @property
    def codebooks(self) -> Tensor:
        return self.mono.codebooks.repeat_interleave(2, 0)

    def _encode(self, wav: Tensor) -> Tensor:
        channels = [self.mono.encode(wav[:, c : c + 1]) for c in range(2)]
        return torch.stack(channels, 2).flatten(1, 2)

    def _decode(self, codes: Tensor) -> Tensor:
        return torch.cat([self.mono.decode(c) for c in _channels(codes)], 1)

    def _decode_beside(self, codes: Tensor, known: Tensor) -> Tensor:
        pairs = zip(_channels(codes), known.split(1, 1), strict=True)
        return torch.cat([self.mono.decode(c, audio) for c, audio in pairs], 1)


def _channels(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the left and the right channel; the left may have one codebook more, or all."""
    left, right = codes[:, ::2], codes[:, 1::2]
    return left, right if right.shape[1] else left
