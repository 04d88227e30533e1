"""Writes a model as the two files that audiocraft's `MAGNeT.get_pretrained` loads."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from magnet_train.audiocraft.names import (
    CODEC_FILE,
    DECODING_KEYS,
    MODEL_FILE,
    NETWORK_KEYS,
    SETTINGS_FILE,
    TEXT_WIDTHS,
    correspondence,
    to_theirs,
)
from magnet_train.audiocraft.read import Settings, read_config, read_settings
from magnet_train.codec.base import STEREO, split_name
from magnet_train.codec.encodec_names import audiocraft_config, to_audiocraft
from magnet_train.common.errors import UserError
from magnet_train.common.folders import new_folder
from magnet_train.common.pretrained import quiet
from magnet_train.decoding.decode import SAME_IN_AUDIOCRAFT
from magnet_train.model import MagnetConfig
from magnet_train.release import SavedModel, codec_facts

VERSION = "1.4.0a2"
"""Version of audiocraft written into models that were not converted from it."""


def write_model(saved: SavedModel, out: Path) -> Path:
    """Write `state_dict.bin` and `compression_state_dict.bin`; returns the folder.

    Raises:
        UserError: if audiocraft does not support the network, codec or text encoder.
    """
    settings = _settings(saved)
    codec = codec_package(saved.codec["id"])
    original = saved.provenance.get("audiocraft") or {}
    text = original.get("xp.cfg")
    conditioner = _unchanged_conditioner(text, settings, saved.file)
    if conditioner is None:
        conditioner = settings.conditioner
        text = yaml.safe_dump(_new_config(saved, settings), sort_keys=False)
    network = saved.network
    pairs = correspondence(network.num_layers, network.num_codebooks, conditioner)
    state = to_theirs(saved.weights(), pairs)
    version = original.get("version") or VERSION
    common = {"version": version, "exported": True}
    with new_folder(out) as folder:
        torch.save({"best_state": state, "xp.cfg": text} | common, folder / MODEL_FILE)
        torch.save(codec | common, folder / CODEC_FILE)
    return out


def _differs(saved: SavedModel, option: str) -> bool:
    """Whether an option of the network has a value that audiocraft does not support."""
    value = getattr(saved.network, option)
    if option == "context":
        return not isinstance(value, int)
    return value != getattr(MagnetConfig(), option)


def _settings(saved: SavedModel) -> Settings:
    """A model's settings, after checking that audiocraft supports them."""
    sizes = {name: getattr(saved.network, name) for name in NETWORK_KEYS}
    published = MagnetConfig(**sizes, text_dim=saved.network.text_dim)
    if saved.network != published or not isinstance(published.context, int):
        options = ("context", "positions", "convolution", "order")
        lacking = [n for n in options if _differs(saved, n)]
        raise UserError(
            f"{saved.file}: its network has options that audiocraft lacks: {', '.join(lacking)}; "
            "train with the published architecture"
        )
    name = saved.text_encoder
    if name not in TEXT_WIDTHS:
        name = Path(name).name
    if TEXT_WIDTHS.get(name) != saved.network.text_dim:
        raise UserError(
            f"text encoder {saved.text_encoder!r} of width {saved.network.text_dim}: audiocraft "
            f"supports only {', '.join(TEXT_WIDTHS)}; give the matching one with --text_encoder"
        )
    return Settings(
        network=saved.network,
        conditioner="description",
        text_encoder=name,
        decoding=saved.decoding,
        crop_s=saved.crop_s,
        guidance_dropout=saved.guidance_dropout,
    )


def _unchanged_conditioner(text: Any, settings: Settings, where: Path) -> str | None:
    """The text condition's name in the original configuration, if that still fits the model."""
    if not isinstance(text, str):
        return None
    try:
        original = read_settings(read_config(text, where), settings.network.text_dim, where)
    except UserError:
        return None
    same = replace(settings, conditioner=original.conditioner)
    return original.conditioner if original == same else None


def codec_package(name: str) -> dict[str, Any]:
    """Content of `compression_state_dict.bin`: the codec's weights, or its hub id.

    Raises:
        UserError: if it is not an EnCodec of transformers.
    """
    if name.endswith(STEREO):
        raise UserError(f"codec {name!r}: audiocraft has no stereo MAGNeT; convert a mono model")
    base, _ = split_name(name)
    folder = Path(base).expanduser()
    if not folder.is_dir():
        if base.count("/") != 1:
            raise UserError(
                f"codec {name!r}: not supported by audiocraft, which uses EnCodecs from the hub or "
                "from folders"
            )
        return {"pretrained": base}
    from magnet_train.common.torchaudio_import import ensure_torchaudio_imports

    ensure_torchaudio_imports()
    from transformers import EncodecConfig, EncodecModel

    kind = EncodecConfig.get_config_dict(base)[0].get("model_type")
    if kind != "encodec":
        raise UserError(f"codec {name!r}: is a {kind!r}; audiocraft supports EnCodec only")
    with quiet():
        model: Any = EncodecModel.from_pretrained(base, dtype="auto")
    original = folder / "audiocraft.yaml"
    if original.is_file():
        text = original.read_text()
    else:
        text = yaml.safe_dump(audiocraft_config(model.config), sort_keys=False)
    return {"best_state": to_audiocraft(model.state_dict(), model.config), "xp.cfg": text}


def _new_config(saved: SavedModel, settings: Settings) -> dict[str, Any]:
    """Configuration of a model trained with this package: settings.yaml and the model's values."""
    facts = codec_facts(saved.codec)
    if facts is None:
        raise UserError(f"codec {saved.codec['id']!r}: its facts are unknown; give it with --codec")
    decoding = settings.decoding
    crop_s = settings.crop_s
    config = yaml.safe_load(SETTINGS_FILE.read_text())
    config["sample_rate"] = facts.sample_rate
    config["channels"] = facts.channels
    config["compression_model_checkpoint"] = f"//pretrained/{facts.id}"
    config["compression_model_n_q"] = split_name(facts.id)[1]
    config["dataset"] = {"segment_duration": int(crop_s) if crop_s.is_integer() else crop_s}
    config["masking"] = {"span_len": decoding.span_len}
    config["transformer_lm"] |= {
        theirs: getattr(settings.network, ours) for ours, theirs in NETWORK_KEYS.items()
    }
    config["transformer_lm"]["compression_model_framerate"] = math.ceil(facts.frame_rate)
    config["conditioners"]["description"]["t5"]["name"] = settings.text_encoder
    config["classifier_free_guidance"]["training_dropout"] = settings.guidance_dropout
    for name in SAME_IN_AUDIOCRAFT:
        value = getattr(decoding, name)
        if isinstance(value, tuple):
            raise UserError(
                f"{saved.file}: {name}={list(value)}: audiocraft has one number for all stages; "
                "set one"
            )
    generate = {theirs: getattr(decoding, ours) for ours, theirs in DECODING_KEYS.items()}
    generate["decoding_steps"] = list(
        decoding.per_stage("decoding_steps", settings.network.num_codebooks)
    )
    generate["use_sampling"] = not decoding.greedy
    config["generate"] = {"lm": generate}
    return config
