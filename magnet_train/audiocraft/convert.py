"""The verb `convert`: audiocraft's models to releases and back, checkpoints to releases.

Weights stay bit-identical.
"""

import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from magnet_train.audiocraft.musicgen import (
    CROP_S,
    musicgen_decoding,
    musicgen_network,
    musicgen_weights,
)
from magnet_train.audiocraft.names import (
    CODEC_FILE,
    HYBRIDS,
    MODEL_FILE,
    PUBLISHED,
    PUBLISHED_LICENCE,
    TEXT_WIDTHS,
    to_ours,
)
from magnet_train.audiocraft.read import ExportedModel, read_codec, read_model, read_package
from magnet_train.audiocraft.write import write_model
from magnet_train.codec.base import CodecFacts, load_codec, load_codec_facts, split_name
from magnet_train.common.errors import UserError
from magnet_train.common.folders import check_new
from magnet_train.common.json_files import read_json
from magnet_train.common.pretrained import absolute_path, one_line
from magnet_train.decoding.load_rescorer import musicgen_config, parse_musicgen
from magnet_train.decoding.rescoring import load_musicgen
from magnet_train.model import MagnetConfig
from magnet_train.release import SavedModel, check_codec, check_weights, write_release


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `convert`."""

    out: Path
    """Output folder; must be empty or not exist."""
    to: Literal["release", "audiocraft"] = "release"
    """Format to write: a release of magnet_train, or a folder that audiocraft loads."""
    codec: str | None = None
    """Folder or hub id of a transformers EnCodec, if the model's own is not available."""
    text_encoder: str | None = None
    """Folder or hub id of a T5, instead of the one in the model's configuration."""
    lora: list[str] = field(default_factory=list)
    """LoRA adapters to merge, FOLDER or FOLDER:STRENGTH each."""
    licence: str | None = None
    """Licence of the weights (default: the source's, or cc-by-nc-4.0 for audiocraft models)."""
    push_to_hub: str | None = None
    """Also upload the release to this hub id, USER/NAME; needs `hf auth login`."""


def convert(source: str, options: ConvertOptions) -> Path:
    """Convert a model; returns the output folder.

    Args:
        source: folder or hub id with audiocraft's files (published ones also without `facebook/`),
            or anything that `SavedModel.open` accepts: release, checkpoint, run folder, "demo".
        options: options of `convert`.

    Raises:
        UserError: if the source cannot be read, or the target does not support the model.
    """
    out = check_new(options.out)
    if options.push_to_hub is not None:
        _check_repo_id(options.push_to_hub)
        if options.to == "audiocraft":
            raise UserError("--push_to_hub uploads releases; remove --to audiocraft")
    folder = _audiocraft_folder(source, with_codec=options.codec is None)
    if options.to == "audiocraft":
        if folder is not None:
            raise UserError(f"{source}: is already an audiocraft model")
        return write_model(_open(source, options), out)
    if options.lora and (folder is not None or musicgen_config(source) is not None):
        raise UserError(f"--lora: {source} is no release yet; convert it first")
    if folder is not None:
        saved = _from_audiocraft(folder, source, options)
    elif (config := musicgen_config(source)) is not None:
        saved = _from_musicgen(source, parse_musicgen(config, source), options)
    else:
        saved = _open(source, options)
        weights = saved.weights()
        saved = write_release(out, saved, {k: lambda v=v: v for k, v in weights.items()})
    if options.push_to_hub is not None:
        print(push_to_hub(out, options.push_to_hub))
    return saved.file.parent


def _audiocraft_folder(source: str, with_codec: bool) -> Path | None:
    """Folder of audiocraft's files, downloaded if needed; None if `source` is something else."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path if (path / MODEL_FILE).is_file() else None
    if path.exists() or source == "demo":
        return None
    name = _hub_id(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"{source}: not a file, folder or hub id; published models are {', '.join(PUBLISHED)}"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        found = hf_hub_download(name, MODEL_FILE)
        if with_codec:
            hf_hub_download(name, CODEC_FILE)
    except Exception as error:  # many types, from no internet access to no such repository
        is_absent = isinstance(error, EntryNotFoundError)
        if is_absent and not isinstance(error, LocalEntryNotFoundError):
            return None  # the repository exists and may contain a release
        if _is_release(name):
            return None
        raise UserError(
            f"{name}: not found locally or on the Hugging Face Hub ({one_line(error)}); download "
            f"{MODEL_FILE} and {CODEC_FILE} on a machine with internet access, and give "
            "their folder"
        ) from error
    return Path(found).parent


def _hub_id(source: str) -> str:
    return f"facebook/{source}" if source in (*PUBLISHED, *HYBRIDS) else source


def _is_release(name: str) -> bool:
    try:
        SavedModel.open(name)  # works offline if it is in the local cache
    except UserError:
        return False
    return True


# --- from audiocraft ------------------------------------------------------------------------------


def _from_audiocraft(folder: Path, source: str, options: ConvertOptions) -> SavedModel:
    """Writes a release of an exported model."""
    model = read_model(folder)
    settings = model.settings
    text_encoder = options.text_encoder or settings.text_encoder
    _check_text_width(text_encoder, settings.network.text_dim, model.file)
    provenance = _provenance(model, source, options.licence)
    with TemporaryDirectory() as scratch:
        codec = _codec(folder, model, options.codec, Path(scratch), provenance["licence"])
        saved = SavedModel(
            file=model.file,
            network=settings.network,
            codec=codec,
            text_encoder=absolute_path(text_encoder),
            crop_s=settings.crop_s,
            decoding=settings.decoding,
            guidance_dropout=settings.guidance_dropout,
            provenance=provenance,
        )
        return write_release(options.out, saved, to_ours(model.weights, settings.pairs))


def _from_musicgen(source: str, config: Any, options: ConvertOptions) -> SavedModel:
    """Writes a release of a MusicGen that transformers stores, with its codec and text encoder."""
    network = musicgen_network(config, source)
    model, text = load_musicgen(source)
    licence = options.licence or PUBLISHED_LICENCE
    with TemporaryDirectory() as scratch:
        codec, encoder = Path(scratch) / "codec", Path(scratch) / "text_encoder"
        model.audio_encoder.save_pretrained(codec)
        text.save(encoder)
        saved = SavedModel(
            file=Path(source) / "model.safetensors",
            network=network,
            codec=_first_codebooks(options.codec or str(codec), network, source).to_dict(),
            text_encoder=absolute_path(options.text_encoder or str(encoder)),
            crop_s=CROP_S,
            decoding=musicgen_decoding(model.generation_config),
            provenance={"licence": licence, "source": f"MusicGen {Path(source).name}"},
        )
        if options.text_encoder is not None:
            _check_text_width(options.text_encoder, network.text_dim, saved.file)
        weights = musicgen_weights(model.state_dict(), network)
        check_weights(weights, network, saved.file)
        return write_release(options.out, saved, {k: lambda v=v: v for k, v in weights.items()})


def _provenance(model: ExportedModel, source: str, licence: str | None) -> dict[str, Any]:
    provenance: dict[str, Any] = {
        "licence": licence or PUBLISHED_LICENCE,
        "source": f"audiocraft folder {model.file.resolve().parent.name}",
        "audiocraft": {"version": model.version, "xp.cfg": model.config_text},
    }
    if not Path(source).expanduser().exists():
        hub_id = _hub_id(source)
        if hub_id.startswith("facebook/") and provenance["licence"] != PUBLISHED_LICENCE:
            raise UserError(
                f"--licence {licence}: derived weights must keep {hub_id}'s {PUBLISHED_LICENCE}"
            )
        provenance |= {"source": hub_id, "base_model": hub_id}
    return provenance


def _codec(
    folder: Path, model: ExportedModel, given: str | None, scratch: Path, licence: str
) -> dict[str, Any]:
    """Facts of the codec; a codec included in the model is written to `scratch`."""
    network = model.settings.network
    if given is not None:
        return _first_codebooks(given, network, f"--codec {given}").to_dict()
    file = folder / CODEC_FILE
    package = read_package(file)
    if "pretrained" in package:
        return _pretrained_codec(package["pretrained"], model, file)
    read_codec(package, scratch / "codec", file, licence)
    try:
        return _first_codebooks(str(scratch / "codec"), network, str(file)).to_dict()
    except UserError as error:  # which names the scratch folder
        name = repr(str((scratch / "codec").resolve()))
        raise UserError(str(error).replace(name, str(file))) from error


def _first_codebooks(name: str, network: MagnetConfig, where: str) -> CodecFacts:
    """Facts of a codec, reduced to the codebooks that the model uses."""
    facts = load_codec_facts(name)
    if facts.num_codebooks > network.num_codebooks:
        facts = load_codec_facts(f"{split_name(name)[0]}@{network.num_codebooks}")
    if (facts.num_codebooks, facts.codebook_size) != (network.num_codebooks, network.codebook_size):
        raise UserError(
            f"{where}: a codec with {facts.num_codebooks} codebooks of {facts.codebook_size} "
            f"entries, but the model has {network.num_codebooks} of {network.codebook_size}; "
            "give its codec with --codec"
        )
    return facts


def _pretrained_codec(name: Any, model: ExportedModel, where: Path) -> dict[str, Any]:
    """Facts of a codec on the hub; offline, from the model's configuration."""
    hub_id = r"(?://pretrained/)?([\w-][\w.-]*/[\w-][\w.-]*|encodec_\w+)"
    found = re.fullmatch(hub_id, name) if isinstance(name, str) else None
    if found is None or Path(found[1]).exists():  # the file must not name folders of this machine
        raise UserError(
            f"{where}: refers to the codec {name!r}, which is not a hub id; give it with --codec"
        )
    name = found[1]
    try:
        load_codec(name)
    except UserError as error:
        warnings.warn(
            f"{where} refers to a codec that cannot be loaded now; it will be checked when the "
            f"release is loaded: {error}",
            stacklevel=2,
        )
        rate = model.config.get("sample_rate")
        return {"id": name, "sample_rate": rate, "channels": model.config.get("channels")}
    return _first_codebooks(name, model.settings.network, f"{where} -> {name}").to_dict()


# --- from ours ------------------------------------------------------------------------------------


def _open(source: str, options: ConvertOptions) -> SavedModel:
    """The model with the adapters, codec, text encoder and licence of the options, checked."""
    saved = SavedModel.open(source).with_adapters(options.lora)
    codec = saved.codec["id"]
    if options.codec is not None:
        facts = _first_codebooks(options.codec, saved.network, f"--codec {options.codec}")
        check_codec(saved.codec, facts, saved.file)
        saved = replace(saved, codec=facts.to_dict())
    elif saved.codec.keys() == {"id"}:  # a checkpoint has nothing else
        facts = _first_codebooks(codec, saved.network, f"codec {codec}")
        saved = replace(saved, codec=facts.to_dict())
    if options.text_encoder is not None:
        _check_text_width(options.text_encoder, saved.network.text_dim, saved.file)
        saved = replace(saved, text_encoder=absolute_path(options.text_encoder))
    licence = saved.provenance.get("licence")
    if options.licence is not None and licence not in (None, options.licence):
        origin = saved.provenance.get("source", saved.file)
        raise UserError(
            f"--licence {options.licence}: derived weights must keep the licence of {origin}, "
            f"{licence}"
        )
    provenance = saved.provenance | {"licence": options.licence or licence}
    return replace(saved, provenance=provenance)


def _check_text_width(name: str, width: int, where: Path) -> None:
    """Checks the width of a T5 from its name or config.json, without loading it."""
    known = TEXT_WIDTHS.get(name)
    file = Path(name).expanduser() / "config.json"
    if file.is_file():
        try:
            known = read_json(file).get("d_model")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"text encoder {name!r}: {file} is unreadable ({error})") from error
    if known is not None and known != width:
        raise UserError(
            f"{where}: its text projection takes states of width {width}, but {name!r} has "
            f"{known}; give the model's text encoder with --text_encoder"
        )


# --- the hub --------------------------------------------------------------------------------------


def push_to_hub(folder: Path, repo_id: str) -> str:
    """Upload a release; returns its URL. Needs a token from `hf auth login` or HF_TOKEN.

    Raises:
        UserError: if the upload fails.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repo_id, commit_message="Release of magnet_train"
        )
    except Exception as error:
        raise UserError(
            f"--push_to_hub {repo_id}: {one_line(error)}; the release is in {folder}: check the "
            "name and `hf auth whoami`, then upload it with `hf upload`"
        ) from error
    return f"https://huggingface.co/{repo_id}"


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {repo_id}: {one_line(error)}; give USER/NAME") from error
