"""audiocraft's names: files, published models, settings, and tensors of the network."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MODEL_FILE = "state_dict.bin"
CODEC_FILE = "compression_state_dict.bin"
SETTINGS_FILE = Path(__file__).with_name("settings.yaml")
PUBLISHED = (
    "magnet-small-10secs",
    "magnet-medium-10secs",
    "magnet-small-30secs",
    "magnet-medium-30secs",
    "audio-magnet-small",
    "audio-magnet-medium",
)
"""Published models, on the hub under facebook/."""
PUBLISHED_LICENCE = "cc-by-nc-4.0"
TEXT_WIDTHS = {
    "demo": 384,
    "t5-small": 512,
    "t5-base": 768,
    "t5-large": 1024,
    "t5-3b": 1024,
    "t5-11b": 1024,
    "google/flan-t5-small": 512,
    "google/flan-t5-base": 768,
    "google/flan-t5-large": 1024,
    "google/flan-t5-xl": 2048,
    "google/flan-t5-xxl": 4096,
}
"""Text encoders supported by audiocraft, and the width of their states."""
HYBRIDS = ("hybrid-magnet-small", "hybrid-magnet-medium")
"""On the hub under facebook/ too; no code has loaded them there."""
ORDERS = {
    ("transformer_lm_magnet", "False", "parallel"): "parallel",
    ("transformer_lm_magnet", "False", "delay"): "hybrid",
    ("transformer_lm", "True", "delay"): "autoregressive",
}
"""MagnetConfig.order by lm_model, transformer_lm.causal and codebooks_pattern.modeling. The weights
have the same names in all three.
"""
REQUIRED = (
    "transformer_lm.norm_first",
    "transformer_lm.activation",
    "transformer_lm.positional_embedding",
    "transformer_lm.norm",
    "transformer_lm.bias_ff",
    "transformer_lm.bias_attn",
    "transformer_lm.bias_proj",
    "transformer_lm.layer_scale",
    "transformer_lm.qk_layer_norm",
    "transformer_lm.qk_layer_norm_cross",
    "transformer_lm.kv_repeat",
    "transformer_lm.xpos",
    "transformer_lm.past_context",
    "fuser.cross_attention_pos_emb",
)
"""Settings that must equal settings.yaml if a model has them."""
NETWORK_KEYS = {
    "dim": "dim",
    "num_heads": "num_heads",
    "num_layers": "num_layers",
    "num_codebooks": "n_q",
    "codebook_size": "card",
    "context": "subcodes_context",
    "ffn_ratio": "hidden_scale",
}
"""Fields of MagnetConfig under `transformer_lm`."""
DECODING_KEYS = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "max_cfg_coef": "max_cfg_coef",
    "min_cfg_coef": "min_cfg_coef",
    "decoding_steps": "decoding_steps",
    "anneal_temperature": "anneal_temp",
    "span_scoring": "span_scoring",
    "span_arrangement": "span_arrangement",
}
"""Fields of DecodingConfig under `generate.lm`."""
AUTOREGRESSIVE_KEYS = {"autoregressive_temperature": "temp", "autoregressive_top_k": "top_k"}
"""The same of a MusicGen."""
BLOCK_NAMES = {
    "self_norm.weight": "norm1.weight",
    "self_norm.bias": "norm1.bias",
    "self_attention.qkv.weight": "self_attn.in_proj_weight",
    "self_attention.out.weight": "self_attn.out_proj.weight",
    "cross_norm.weight": "norm_cross.weight",
    "cross_norm.bias": "norm_cross.bias",
    "cross_attention.out.weight": "cross_attention.out_proj.weight",
    "ffn_norm.weight": "norm2.weight",
    "ffn_norm.bias": "norm2.bias",
    "ffn_in.weight": "linear1.weight",
    "ffn_out.weight": "linear2.weight",
}
"""Tensors of a block, ours to theirs, except the inputs of the cross-attention."""


@dataclass(frozen=True)
class Pair:
    """Tensors with the same values; several on one side are stacked into one on the other."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]


def text_projection(conditioner: str) -> str:
    """audiocraft's name prefix of the text projection; `conditioner` is its name of the text."""
    return f"condition_provider.conditioners.{conditioner}.output_proj"


def correspondence(
    num_layers: int, num_codebooks: int, conditioner: str = "description"
) -> list[Pair]:
    """Pairs of our and audiocraft's tensor names for all tensors of a network."""
    codebooks = range(num_codebooks)
    pairs = [
        Pair(("embedding",), tuple(f"emb.{k}.weight" for k in codebooks)),
        Pair(("head",), tuple(f"linears.{k}.weight" for k in codebooks)),
    ]
    for part in ("weight", "bias"):
        pairs.append(Pair((f"out_norm.{part}",), (f"out_norm.{part}",)))
        theirs = f"{text_projection(conditioner)}.{part}"
        pairs.append(Pair((f"text_projection.{part}",), (theirs,)))
    for i in range(num_layers):
        block = f"blocks.{i}"
        layer = f"transformer.layers.{i}"
        for ours, theirs in BLOCK_NAMES.items():
            pairs.append(Pair((f"{block}.{ours}",), (f"{layer}.{theirs}",)))
        inputs = (f"{block}.cross_attention.q.weight", f"{block}.cross_attention.kv.weight")
        pairs.append(Pair(inputs, (f"{layer}.cross_attention.in_proj_weight",)))
    return pairs


def to_ours(theirs: Mapping[str, Tensor], pairs: list[Pair]) -> dict[str, Callable[[], Tensor]]:
    """Our tensors by name, as functions that build them on demand."""
    made: dict[str, Callable[[], Tensor]] = {}
    for pair in pairs:
        tensors = [theirs[name] for name in pair.theirs]
        if len(tensors) > 1:
            made[pair.ours[0]] = lambda tensors=tensors: torch.stack(tensors)
            continue
        parts = tensors
        if len(pair.ours) > 1:  # query above keys and values
            parts = tensors[0].tensor_split([tensors[0].shape[1]])
        for name, part in zip(pair.ours, parts, strict=True):
            made[name] = lambda part=part: part
    return made


def to_theirs(ours: Mapping[str, Tensor], pairs: list[Pair]) -> dict[str, Tensor]:
    """audiocraft's tensors by name."""
    made: dict[str, Tensor] = {}
    for pair in pairs:
        theirs, first = pair.theirs[0], ours[pair.ours[0]]
        if len(pair.theirs) > 1:
            made |= dict(zip(pair.theirs, first.unbind(0), strict=True))
        elif len(pair.ours) > 1:
            made[theirs] = torch.cat([ours[name] for name in pair.ours])
        else:
            made[theirs] = first
    return made
