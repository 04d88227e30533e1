"""Finds and checks the rescorer of decoding settings, before its weights are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magnet_train.codec.base import CodecFacts, load_codec_facts
from magnet_train.common.errors import UserError
from magnet_train.common.json_files import read_json
from magnet_train.common.pretrained import one_line
from magnet_train.conditioning import TextEncoder, load_text_encoder
from magnet_train.decoding.rescoring import (
    HybridRescorer,
    MagnetRescorer,
    MusicGenRescorer,
    Rescorer,
    load_musicgen,
)
from magnet_train.release import SavedModel

COMPARED = ("num_codebooks", "codebook_size", "sample_rate", "frame_rate", "hash")
"""Codec facts that must agree for both models, as far as they are known."""


def check_rescorer(name: str, codec: Mapping[str, Any]) -> SavedModel | None:
    """Check that a rescorer uses the codes of `codec`; returns its settings, None for a MusicGen.

    Args:
        name: as in `DecodingConfig.rescorer`.
        codec: facts of the main model's codec, as far as they are known.

    Raises:
        UserError: if it does not exist, or uses other codes.
    """
    config = musicgen_config(name)
    saved = None if config is not None else SavedModel.open(name)
    theirs = _musicgen_codes(config or {}, name) if saved is None else _codes(saved)
    for fact in COMPARED:
        one, other = codec.get(fact), theirs.get(fact)
        if one is not None and other is not None and one != other:
            raise UserError(
                f"rescorer={name}: its codes have {fact}={other}, the model's {one}; choose a "
                "rescorer that was trained on the same codec"
            )
    return saved


def load_rescorer(name: str, codec: CodecFacts, text_encoder: TextEncoder) -> Rescorer:
    """Load a rescorer on the device of `text_encoder`, which is shared if it is the same.

    Raises:
        UserError: if it cannot be loaded, or uses other codes.
    """
    device = text_encoder.device
    saved = check_rescorer(name, codec.to_dict())
    if saved is None:
        model, own = load_musicgen(name)
        return MusicGenRescorer(model.to(device), own)
    own = text_encoder
    if saved.text_encoder != text_encoder.id:
        own = load_text_encoder(saved.text_encoder).to(device)
    kind = MagnetRescorer if saved.network.order == "parallel" else HybridRescorer
    return kind(saved.build().to(device).eval(), own)


def _codes(saved: SavedModel) -> dict[str, Any]:
    """Codec facts of one of our models; a checkpoint has only the codec's name."""
    sizes = {name: getattr(saved.network, name) for name in ("num_codebooks", "codebook_size")}
    codec = dict(saved.codec)
    return (load_codec_facts(codec["id"]).to_dict() if codec.keys() == {"id"} else codec) | sizes


def musicgen_config(name: str) -> dict[str, Any] | None:
    """The config.json of a folder or hub id, if it is a MusicGen of transformers."""
    from transformers.utils.hub import cached_file

    path = Path(name).expanduser()
    try:
        file = path / "config.json"
        if not path.exists() and name.count("/") == 1:
            file = Path(str(cached_file(name, "config.json")))
        config = read_json(file)
    except (OSError, ValueError):  # reported when it is opened as a release
        return None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return config if isinstance(kind, str) and kind.startswith("musicgen") else None


def _musicgen_codes(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Codec facts of a MusicGen, from its configuration."""
    parsed = parse_musicgen(config, f"rescorer={name}")
    return {
        "num_codebooks": parsed.decoder.num_codebooks,
        "codebook_size": parsed.decoder.vocab_size,
        "sample_rate": parsed.audio_encoder.sampling_rate,
        "frame_rate": parsed.audio_encoder.frame_rate,
    }


def parse_musicgen(config: Mapping[str, Any], where: str) -> Any:
    """`MusicgenConfig` of transformers.

    Raises:
        UserError: if it is damaged, or the model is stereo or conditioned on a melody.
    """
    from transformers import MusicgenConfig

    if config["model_type"] != "musicgen":
        raise UserError(
            f"{where}: {config['model_type']} is conditioned on a melody; choose a "
            "MusicGen for text alone"
        )
    try:
        parsed: Any = MusicgenConfig.from_dict(dict(config))
    except Exception as error:
        raise UserError(f"{where}: config.json is damaged ({one_line(error)})") from error
    if parsed.decoder.audio_channels != 1:
        raise UserError(f"{where}: a stereo MusicGen; choose one with a single channel")
    return parsed
