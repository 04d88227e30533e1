"""Folders in audiocraft's export format, with its values and short configurations."""

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from magnet_train.audiocraft.names import correspondence, to_ours
from magnet_train.model import Magnet, MagnetConfig, TextKeyValues

FIXTURES = Path(__file__).parent / "fixtures" / "reference"


def codec_settings(ratios: list[int], rate: int) -> dict[str, Any]:
    """Settings of the tiny codecs: 4 codebooks of 64, zero padding."""
    return {
        "compression_model": "encodec",
        "sample_rate": rate,
        "channels": 1,
        "encodec": {
            "autoencoder": "seanet",
            "quantizer": "rvq",
            "sample_rate": "${sample_rate}",
            "channels": "${channels}",
            "causal": False,
            "renormalize": False,
        },
        "seanet": {
            "dimension": 16,
            "channels": "${channels}",
            "causal": "${encodec.causal}",
            "n_filters": 4,
            "n_residual_layers": 1,
            "ratios": ratios,
            "activation": "ELU",
            "norm": "weight_norm",
            "kernel_size": 7,
            "residual_kernel_size": 3,
            "last_kernel_size": 7,
            "dilation_base": 2,
            "pad_mode": "constant",
            "true_skip": True,
            "compress": 2,
            "lstm": 2,
            "disable_norm_outer_blocks": 0,
            "decoder": {"trim_right_ratio": 1.0, "final_activation": None},
        },
        "rvq": {"n_q": 4, "bins": 64},
    }


CODECS = {"music32k": ([8, 5, 4, 4], 32_000), "sound16k": ([8, 5, 4, 2], 16_000)}


def codec_package(name: str = "music32k", **seanet: Any) -> dict[str, Any]:
    """Content of `compression_state_dict.bin`; `seanet` are changed settings."""
    settings = codec_settings(*CODECS[name])
    settings["seanet"] |= seanet
    weights = load_file(FIXTURES / "encodec_tiny" / f"{name}_state_dict.safetensors")
    return {
        "best_state": weights,
        "xp.cfg": yaml.safe_dump(settings),
        "version": "1.4.0a2",
        "exported": True,
    }


def model_settings() -> dict[str, Any]:
    """Settings of the tiny model: dim 64, 2 layers, 4 codebooks of 64, one second at 50 Hz."""
    return {
        "sample_rate": 32_000,
        "channels": 1,
        "compression_model_n_q": None,
        "dataset": {"segment_duration": 1},
        "masking": {"span_len": 3},
        "lm_model": "transformer_lm_magnet",
        "transformer_lm": {
            "dim": 64,
            "num_heads": 4,
            "num_layers": 2,
            "hidden_scale": 4,
            "n_q": 4,
            "card": 64,
            "causal": False,
            "norm_first": True,
            "activation": "gelu",
            "positional_embedding": "sin",
            "norm": "layer_norm",
            "bias_ff": False,
            "bias_attn": False,
            "bias_proj": False,
            "subcodes_context": 5,
            "segment_duration": 0,
            "span_len": -1,
        },
        "codebooks_pattern": {"modeling": "parallel", "parallel": {"empty_initial": -1}},
        "conditioners": {
            "description": {"model": "t5", "t5": {"name": "t5-base", "word_dropout": 0.3}}
        },
        "fuser": {
            "sum": [],
            "prepend": [],
            "cross": ["description"],
            "cross_attention_pos_emb": False,
        },
        "classifier_free_guidance": {"training_dropout": 0.25, "inference_coef": 3.0},
        "generate": {
            "lm": {
                "use_sampling": True,
                "temp": 3.0,
                "top_k": 0,
                "top_p": 0.9,
                "max_cfg_coef": 10.0,
                "min_cfg_coef": 1.0,
                "decoding_steps": [8, 4, 4, 4],
                "anneal_temp": True,
                "span_scoring": "max",
                "span_arrangement": "nonoverlap",
            }
        },
    }


def write_audiocraft(
    folder: Path,
    dtype: torch.dtype = torch.float16,
    settings: dict[str, Any] | None = None,
    codec: Any = None,
) -> Path:
    """Folder of the tiny reference model, with the tiny music codec unless another is given."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(FIXTURES / "lm_tiny" / "state_dict.safetensors")
    package = {
        "best_state": {k: v.to(dtype) for k, v in weights.items()},
        "xp.cfg": yaml.safe_dump(settings or model_settings()),
        "version": "1.4.0a2",
        "exported": True,
    }
    torch.save(package, folder / "state_dict.bin")
    torch.save(codec or codec_package(), folder / "compression_state_dict.bin")
    return folder


def reference_model(context: int = 5) -> Magnet:
    """The tiny reference model with its weights."""
    theirs = load_file(FIXTURES / "lm_tiny" / "state_dict.safetensors")
    model = Magnet(
        MagnetConfig(
            dim=64, num_heads=4, num_layers=2, codebook_size=64, text_dim=768, context=context
        )
    )
    model.load_state_dict(
        {name: make() for name, make in to_ours(theirs, correspondence(2, 4)).items()}
    )
    return model.eval()


def as_the_reference_sees(model: Magnet, hidden: torch.Tensor, mask: torch.Tensor) -> TextKeyValues:
    """Text with attention to its padding: zero keys included in the softmax."""
    tokens = mask.bool()
    memory = model.encode_text(hidden, tokens)
    return TextKeyValues(memory.keys, memory.values, tokens.any(1)[:, None].expand_as(tokens))
