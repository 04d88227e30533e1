"""Converts transformers' MusicGen to our network with causal rows."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.model import MagnetConfig

CROP_S = 30.0
"""Crop length of all published MusicGens, in seconds."""
NORMS = {
    "self_norm": "self_attn_layer_norm",
    "cross_norm": "encoder_attn_layer_norm",
    "ffn_norm": "final_layer_norm",
}
"""Norms of a block: our names to transformers'."""
LINEAR = {
    "self_attention.out": ("self_attn.out_proj",),
    "self_attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "cross_attention.q": ("encoder_attn.q_proj",),
    "cross_attention.kv": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "cross_attention.out": ("encoder_attn.out_proj",),
    "ffn_in": ("fc1",),
    "ffn_out": ("fc2",),
}
"""Linear layers of a block: our names to transformers', which are stacked."""


def musicgen_network(config: Any, where: str) -> MagnetConfig:
    """Our configuration for a `MusicgenConfig`.

    Raises:
        UserError: if a setting is not supported.
    """
    decoder = config.decoder
    if decoder.activation_function != "gelu" or decoder.scale_embedding:
        raise UserError(
            f"{where}: activation_function={decoder.activation_function}, "
            f"scale_embedding={decoder.scale_embedding}; only gelu without scaling is supported"
        )
    if decoder.ffn_dim % decoder.hidden_size:
        raise UserError(
            f"{where}: ffn_dim={decoder.ffn_dim} is not a multiple of hidden_size="
            f"{decoder.hidden_size}, which is not supported"
        )
    return MagnetConfig(
        dim=decoder.hidden_size,
        num_heads=decoder.num_attention_heads,
        num_layers=decoder.num_hidden_layers,
        num_codebooks=decoder.num_codebooks,
        codebook_size=decoder.vocab_size,
        text_dim=config.text_encoder.hidden_size,
        ffn_ratio=decoder.ffn_dim // decoder.hidden_size,
        order="autoregressive",
    )


def musicgen_weights(theirs: Mapping[str, Tensor], network: MagnetConfig) -> dict[str, Tensor]:
    """Weights of `MusicgenForConditionalGeneration` under our names."""
    books, prefix = range(network.num_codebooks), "decoder.model.decoder"
    eye = torch.eye(network.dim), torch.zeros(network.dim)  # where both widths are the same
    ours = {
        "embedding": torch.stack([theirs[f"{prefix}.embed_tokens.{k}.weight"] for k in books]),
        "head": torch.stack([theirs[f"decoder.lm_heads.{k}.weight"] for k in books]),
        "out_norm.weight": theirs[f"{prefix}.layer_norm.weight"],
        "out_norm.bias": theirs[f"{prefix}.layer_norm.bias"],
        "text_projection.weight": theirs.get("enc_to_dec_proj.weight", eye[0]),
        "text_projection.bias": theirs.get("enc_to_dec_proj.bias", eye[1]),
    }
    for i in range(network.num_layers):
        layer = f"{prefix}.layers.{i}"
        for name, norm in NORMS.items():
            for part in ("weight", "bias"):
                ours[f"blocks.{i}.{name}.{part}"] = theirs[f"{layer}.{norm}.{part}"]
        for name, linear in LINEAR.items():
            parts = [theirs[f"{layer}.{part}.weight"] for part in linear]
            ours[f"blocks.{i}.{name}.weight"] = torch.cat(parts)
    return ours


def musicgen_decoding(generation: Any) -> DecodingConfig:
    """Decoding settings from a `GenerationConfig`."""
    values = {
        "autoregressive_cfg_coef": generation.guidance_scale,
        "autoregressive_temperature": generation.temperature,
        "autoregressive_top_k": generation.top_k,
        "greedy": generation.do_sample is False or None,
    }
    return DecodingConfig(**{k: v for k, v in values.items() if v is not None})
