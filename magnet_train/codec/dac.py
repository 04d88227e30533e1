"""DAC (Kumar et al., "High-Fidelity Audio Compression with Improved RVQGAN", arXiv 2306.06546),
computed by transformers' `DacModel`: 9 codebooks of 1024 entries at 86 Hz for 44.1 kHz audio.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from magnet_train.codec.base import (
    Codec,
    CodecFacts,
    check_weights,
    codes_hash,
    first_codebooks,
    load_complete,
)


class DacCodec(Codec):
    """A DAC. A clip is padded with zeros to whole frames."""

    def __init__(self, model: Any, name: str, num_codebooks: int | None = None):
        """
        Args:
            model: A trained transformers DacModel; changed in place.
            name: Its id in the facts.
            num_codebooks: Use only the first codebooks (default: all).

        Raises:
            UserError: if a codebook is all zero, a weight is not finite, or there are too few
                codebooks.
        """
        super().__init__()
        config, quantizers = model.config, model.quantizer.quantizers
        count = first_codebooks(name, len(quantizers), num_codebooks)
        model.quantizer.quantizers = quantizers[:count]
        model.quantizer.n_codebooks = count
        self.model = model.float().eval().requires_grad_(False)
        weights = model.state_dict()
        check_weights(
            name, weights, {k: v for k, v in weights.items() if k.endswith("codebook.weight")}
        )
        of_codes = {k: v for k, v in weights.items() if not k.startswith("decoder.")}
        self.facts = CodecFacts(
            id=name,
            hash=codes_hash(of_codes, {"model_type": "dac"}),
            sample_rate=config.sampling_rate,
            frame_rate=config.sampling_rate / config.hop_length,
            num_codebooks=count,
            codebook_size=config.codebook_size,
            channels=1,
            pad_mode="constant",
        )

    @classmethod
    def load(
        cls, source: str, local_files_only: bool, name: str, num_codebooks: int | None = None
    ) -> "DacCodec":
        """Load a folder or hub id.

        Raises:
            UserError: if weights are missing, or as in the constructor.
        """
        from transformers import DacModel

        return cls(load_complete(DacModel, source, local_files_only, name), name, num_codebooks)

    @property
    def codebooks(self) -> Tensor:
        """Entries as they are added up: projected to the width of the latents."""
        return torch.stack(
            [q.out_proj(q.codebook.weight.T).T for q in self.model.quantizer.quantizers]
        )

    def _encode(self, wav: Tensor) -> Tensor:
        wav = F.pad(wav, (0, -wav.shape[2] % self.facts.hop_samples))
        return self.model.encode(wav).audio_codes

    def _decode(self, codes: Tensor) -> Tensor:
        wav = self.model.decode(audio_codes=codes).audio_values[:, None]
        # Blocks with an odd stride give some samples less.
        return F.pad(wav, (0, codes.shape[2] * self.facts.hop_samples - wav.shape[2]))
