"""DAC (Kumar et al., "High-Fidelity Audio Compression with Improved RVQGAN", arXiv 2306.06546),
computed by transformers' `DacModel`: 9 codebooks of 1024 entries at 86 Hz for 44.1 kHz audio.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from magnet_train.codec.base import NetworkCodec, first_codebooks
from magnet_train.common.pretrained import load_complete


class DacCodec(NetworkCodec):
    """A DAC. A clip is padded with zeros to whole frames."""

    def __init__(self, model: Any, name: str, num_codebooks: int | None = None):
        config, quantizers = model.config, model.quantizer.quantizers
        count = first_codebooks(name, len(quantizers), num_codebooks)
        model.quantizer.quantizers = quantizers[:count]
        model.quantizer.n_codebooks = count
        weights = {k: v for k, v in model.state_dict().items() if not k.startswith("decoder.")}
        super().__init__(
            model,
            name,
            weights,
            {k: v for k, v in weights.items() if k.endswith("codebook.weight")},
            {"model_type": "dac"},
            sample_rate=config.sampling_rate,
            hop_samples=config.hop_length,
            num_codebooks=count,
            codebook_size=config.codebook_size,
            channels=1,
            pad_mode="constant",
        )

    @staticmethod
    def read(source: str, local_files_only: bool, name: str) -> Any:
        return load_complete("DacModel", source, local_files_only, f"codec {name!r}")

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
