"""Converts names of EnCodec's weights between audiocraft (and the `encodec` package) and
transformers.

With the same weights, padding mode and shortcuts, the three implementations are bit-identical.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from magnet_train.common.errors import UserError

PADDING_MODES = ("constant", "reflect", "replicate")
PACKAGE_URL = "https://dl.fbaipublicfiles.com/encodec/v0/"
"""URL of the models of the `encodec` package (MIT; weights MIT); names have the first hex digits of
the SHA-256.
"""
PACKAGE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "encodec_24khz": ("encodec_24khz-d7cc33bc.th", {}),  # transformers' own defaults
    "encodec_48khz": (
        "encodec_48khz-7e698e3e.th",
        {
            "sampling_rate": 48_000,
            "audio_channels": 2,
            "use_causal_conv": False,
            "norm_type": "time_group_norm",
            "normalize": True,
            "chunk_length_s": 1.0,
            "overlap": 0.01,
            "target_bandwidths": [3.0, 6.0, 12.0, 24.0],
        },
    ),
}
"""The package's models: file, and differences from transformers' default configuration."""

_TO_TRANSFORMERS = [
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"^quantizer\.vq\.layers\.(\d+)\._codebook\.", r"quantizer.layers.\1.codebook."),
    (r"\.(conv|convtr)\.norm\.", ".norm."),
    (r"\.convtr\.convtr\.", ".conv."),
    (r"\.conv\.conv\.", ".conv."),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
]


def to_transformers(name: str) -> str:
    """Convert a name of audiocraft to transformers' EncodecModel.

    >>> to_transformers("decoder.model.3.convtr.convtr.weight_g")
    'decoder.layers.3.conv.parametrizations.weight.original0'
    """
    for pattern, replacement in _TO_TRANSFORMERS:
        name = re.sub(pattern, replacement, name)
    return name


def to_audiocraft(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Convert a state dict of transformers' EncodecModel with its EncodecConfig to audiocraft."""
    # In the decoder, the first two layers are a convolution and an LSTM. Then each ratio has an
    # activation, a transposed convolution (upsampling), and residual blocks.
    per_ratio = 2 + config.num_residual_layers
    transposed = {
        f"decoder.layers.{3 + i * per_ratio}" for i in range(len(config.upsampling_ratios))
    }

    def rename(name: str) -> str:
        layer = re.match(r"decoder\.layers\.\d+", name)
        kind = "convtr" if layer and layer[0] in transposed else "conv"
        name = re.sub(r"\.conv\.(?=bias|weight|parametrizations)", f".{kind}.{kind}.", name)
        name = re.sub(r"(?<!\.conv)\.norm\.", f".{kind}.norm.", name)
        name = name.replace(".parametrizations.weight.original0", ".weight_g")
        name = name.replace(".parametrizations.weight.original1", ".weight_v")
        name = re.sub(r"^(encoder|decoder)\.layers\.", r"\1.model.", name)
        return re.sub(
            r"^quantizer\.layers\.(\d+)\.codebook\.", r"quantizer.vq.layers.\1._codebook.", name
        )

    return {rename(name): tensor for name, tensor in state.items()}


def transformers_config(audiocraft: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of transformers' EncodecConfig for a compression model of audiocraft.

    Args:
        audiocraft: its configuration with flat keys, such as `seanet.ratios`.
        where: file, for messages.

    Raises:
        UserError: if transformers does not support a setting.
    """
    wanted = {
        "compression_model": "encodec",
        "encodec.autoencoder": "seanet",
        "encodec.quantizer": "rvq",
        "encodec.renormalize": False,
        "seanet.activation": "ELU",
        "seanet.disable_norm_outer_blocks": 0,
        "seanet.decoder.final_activation": None,
    }
    for key, value in wanted.items():
        if audiocraft.get(key, value) != value:
            raise UserError(
                f"{where}: {key}={audiocraft[key]!r}; only codecs with {value!r} are supported"
            )
    if audiocraft.get("seanet.pad_mode") not in PADDING_MODES:
        raise UserError(
            f"{where}: seanet.pad_mode={audiocraft.get('seanet.pad_mode')!r} is not a padding "
            "mode; download it again"
        )
    if audiocraft.get("seanet.norm") not in ("weight_norm", "time_group_norm"):
        raise UserError(
            f"{where}: seanet.norm={audiocraft.get('seanet.norm')!r}; "
            "only weight_norm and time_group_norm"
        )
    try:
        rate = int(audiocraft["sample_rate"])
        ratios = [int(r) for r in audiocraft["seanet.ratios"]]
        hop = math.prod(ratios)
        bits_per_s = (
            int(audiocraft["rvq.n_q"])
            * -(-rate // hop)
            * math.ceil(math.log2(int(audiocraft["rvq.bins"])))
        )
        dimension = int(audiocraft["seanet.dimension"])
        return {
            "sampling_rate": rate,
            "audio_channels": int(audiocraft["channels"]),
            # In kbit/s. transformers rounds down when it computes the number of codebooks.
            "target_bandwidths": [bits_per_s / 1000 + 1e-6],
            "codebook_size": int(audiocraft["rvq.bins"]),
            "codebook_dim": dimension,
            "hidden_size": dimension,
            "num_filters": int(audiocraft["seanet.n_filters"]),
            "num_residual_layers": int(audiocraft["seanet.n_residual_layers"]),
            "upsampling_ratios": ratios,
            "norm_type": audiocraft["seanet.norm"],
            "kernel_size": int(audiocraft["seanet.kernel_size"]),
            "residual_kernel_size": int(audiocraft["seanet.residual_kernel_size"]),
            "last_kernel_size": int(audiocraft["seanet.last_kernel_size"]),
            "dilation_growth_rate": int(audiocraft["seanet.dilation_base"]),
            "use_causal_conv": bool(audiocraft["encodec.causal"]),
            "pad_mode": audiocraft["seanet.pad_mode"],
            "use_conv_shortcut": not audiocraft["seanet.true_skip"],
            "compress": int(audiocraft["seanet.compress"]),
            "num_lstm_layers": int(audiocraft["seanet.lstm"]),
            "trim_right_ratio": float(audiocraft.get("seanet.decoder.trim_right_ratio", 1.0)),
            "normalize": False,
            "chunk_length_s": None,
            "overlap": None,
        }
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise UserError(
            f"{where}: the codec's configuration has no usable {error}; download the file again"
        ) from error


def audiocraft_config(config: Any) -> dict[str, Any]:
    """The inverse of `transformers_config` for an EncodecConfig, nested as in audiocraft."""
    return {
        "compression_model": "encodec",
        "sample_rate": config.sampling_rate,
        "channels": config.audio_channels,
        "encodec": {
            "autoencoder": "seanet",
            "quantizer": "rvq",
            "sample_rate": "${sample_rate}",
            "channels": "${channels}",
            "causal": config.use_causal_conv,
            "renormalize": config.normalize,
        },
        "seanet": {
            "dimension": config.hidden_size,
            "channels": "${channels}",
            "causal": "${encodec.causal}",
            "n_filters": config.num_filters,
            "n_residual_layers": config.num_residual_layers,
            "ratios": list(config.upsampling_ratios),
            "activation": "ELU",
            "activation_params": {"alpha": 1.0},
            "norm": config.norm_type,
            "norm_params": {},
            "kernel_size": config.kernel_size,
            "residual_kernel_size": config.residual_kernel_size,
            "last_kernel_size": config.last_kernel_size,
            "dilation_base": config.dilation_growth_rate,
            "pad_mode": config.pad_mode,
            "true_skip": not config.use_conv_shortcut,
            "compress": config.compress,
            "lstm": config.num_lstm_layers,
            "disable_norm_outer_blocks": 0,
            "encoder": {},
            "decoder": {
                "trim_right_ratio": config.trim_right_ratio,
                "final_activation": None,
                "final_activation_params": None,
            },
        },
        "rvq": {
            "n_q": config.num_quantizers,
            "q_dropout": False,
            "bins": config.codebook_size,
            "decay": 0.99,
            "kmeans_init": True,
            "kmeans_iters": 50,
            "threshold_ema_dead_code": 2,
            "orthogonal_reg_weight": 0.0,
            "orthogonal_reg_active_codes_only": False,
        },
    }
