"""EnCodec, computed by transformers' `EncodecModel`.

The weights are transformers' own, the `encodec` package's 24 and 48 kHz models, or converted from
audiocraft (see audiocraft/).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from magnet_train.codec.base import NetworkCodec, first_codebooks
from magnet_train.codec.encodec_names import (
    PACKAGE_MODELS,
    PACKAGE_URL,
    PADDING_MODES,
    to_transformers,
)
from magnet_train.common.errors import UserError
from magnet_train.common.pretrained import load_complete, one_line
from magnet_train.common.torchaudio_import import ensure_torchaudio_imports

# Running averages used only to train the codec.
TRAINING_BUFFERS = ("embed_avg", "cluster_size", "inited")
# Settings that change the codes but neither names nor shapes of weights.
DECISIVE_SETTINGS = ("pad_mode", "upsampling_ratios", "use_causal_conv", "dilation_growth_rate")
NORMALISED_LEVEL = 0.1
"""RMS level (-20 dB of full scale) of decoded audio if the codec normalises its input."""


class EncodecCodec(NetworkCodec):
    """An EnCodec.

    The 48 kHz EnCodec normalises its input and works in chunks of a second. Here a clip is
    normalised as a whole, which keeps its dynamics, and cut into chunks without overlap, which
    keeps the frame rate constant. The level is not in the codes: decoded audio has the level
    `NORMALISED_LEVEL`.
    """

    def __init__(self, model: Any, name: str, num_codebooks: int | None = None):
        config, layers = model.config, model.quantizer.layers
        _check_config(config, name)
        count = first_codebooks(name, len(layers), num_codebooks)
        model.quantizer.layers = layers[:count]
        weights = _decisive_weights(model)
        settings = {s: getattr(config, s) for s in DECISIVE_SETTINGS}
        if config.normalize or config.chunk_length_s:
            settings |= {"normalize": config.normalize, "chunk_length_s": config.chunk_length_s}
        super().__init__(
            model,
            name,
            weights,
            {k: v for k, v in weights.items() if k.endswith("codebook.embed")},
            settings,
            sample_rate=config.sampling_rate,
            hop_samples=config.hop_length,
            num_codebooks=count,
            codebook_size=config.codebook_size,
            channels=config.audio_channels,
            pad_mode=config.pad_mode,
        )
        self.normalizes = bool(config.normalize)
        self.chunk_frames: int | None = None
        if config.chunk_length_s:
            self.chunk_frames = round(
                config.chunk_length_s * config.sampling_rate / config.hop_length
            )
        for module in model.modules():
            if nn.utils.parametrize.is_parametrized(module, "weight"):
                # The same weights, but not recomputed in each call.
                nn.utils.parametrize.remove_parametrizations(module, "weight")
        model.requires_grad_(False)

    @staticmethod
    def read(source: str, local_files_only: bool, name: str) -> Any:
        what = f"codec {name!r}"
        return load_complete("EncodecModel", source, local_files_only, what, TRAINING_BUFFERS)

    @property
    def codebooks(self) -> Tensor:
        return torch.stack([layer.codebook.embed for layer in self.model.quantizer.layers])

    def _encode(self, wav: Tensor) -> Tensor:
        if self.normalizes:
            wav = wav / (wav.mean(1, keepdim=True).square().mean(2, keepdim=True).sqrt() + 1e-8)
        # transformers' encode() rounds floats to choose a bandwidth, and adds an axis for chunks.
        chunks = (
            [wav]
            if self.chunk_frames is None
            else wav.split(self.chunk_frames * self.facts.hop_samples, 2)
        )
        codes = torch.cat(
            [self.model.quantizer.encode(self.model.encoder(chunk)) for chunk in chunks], 2
        )
        return codes.transpose(0, 1).contiguous()

    def _decode(self, codes: Tensor) -> Tensor:
        chunks = [codes] if self.chunk_frames is None else codes.split(self.chunk_frames, 2)
        wav = torch.cat(
            [self.model.decoder(self.model.quantizer.decode(c.transpose(0, 1))) for c in chunks], 2
        )
        return wav * NORMALISED_LEVEL if self.normalizes else wav


def load_package_model(name: str) -> Any:
    """A model of the `encodec` package as a transformers EncodecModel, downloaded once."""
    ensure_torchaudio_imports()
    from transformers import EncodecConfig, EncodecModel

    file, settings = PACKAGE_MODELS[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file  # the package's own location
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                PACKAGE_URL + file, str(path), file.split("-")[1].removesuffix(".th")
            )
        except Exception as error:
            raise UserError(
                f"codec {name!r}: {PACKAGE_URL + file} cannot be downloaded ({one_line(error)}): "
                f"put the file at {path}, or give a local folder"
            ) from error
    try:
        theirs = torch.load(path, map_location="cpu", weights_only=True)
        model = EncodecModel(EncodecConfig(**settings))
        model.load_state_dict({to_transformers(k): v for k, v in theirs.items()})
    except Exception as error:
        raise UserError(
            f"codec {name!r}: {path} is broken ({one_line(error)}); remove it to download it again"
        ) from error
    return model


def _decisive_weights(model: nn.Module) -> dict[str, Tensor]:
    """Encoder and codebooks by name; the decoder does not change the codes."""
    return {
        key: tensor
        for key, tensor in sorted(model.state_dict().items())
        if key.startswith(("encoder.", "quantizer.")) and not key.endswith(TRAINING_BUFFERS)
    }


def _check_config(config: Any, name: str) -> None:
    """Check settings that transformers does not check.

    Raises:
        UserError: if a padding mode or a length of chunks is impossible.
    """
    if config.pad_mode not in PADDING_MODES:
        raise UserError(
            f"codec {name!r}: pad_mode={config.pad_mode!r} must be {' or '.join(PADDING_MODES)}"
        )
    chunk_s, frame_s = config.chunk_length_s, config.hop_length / config.sampling_rate
    is_possible = isinstance(chunk_s, int | float) and frame_s <= chunk_s <= 3600
    if chunk_s is not None and not is_possible:
        raise UserError(
            f"codec {name!r}: chunk_length_s={chunk_s} must be from one frame to an hour, or null"
        )
