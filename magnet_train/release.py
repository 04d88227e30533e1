"""Trained models on disk: reads releases, checkpoints and run folders; writes releases.

A release is a folder with `config.json`, `model.safetensors`, `README.md` and, if codec or text
encoder came from a folder, `codec/` and `text_encoder/`. Settings are checked before weights are
read. Weights are verified before use: SHA-256 of a release and its parts, CRCs of a checkpoint,
names, shapes, data types, and finite values.
"""

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magnet_train.adapters import Adapter, adapter_of_checkpoint, merged, read_adapter
from magnet_train.codec.base import STEREO, CodecFacts, load_codec_facts, split_name
from magnet_train.common.assets import demo_path
from magnet_train.common.errors import UserError
from magnet_train.common.folders import new_folder, write_json
from magnet_train.common.json_files import read_json
from magnet_train.common.pretrained import one_line
from magnet_train.common.ranges import check_types
from magnet_train.common.tensor_files import (
    Shapes,
    check_numbers,
    check_same_shapes,
    file_sha256,
    read_pickle,
    read_safetensors,
    safetensors_shapes,
    tensor_shapes,
    write_safetensors,
)
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.model import Magnet, MagnetConfig, stereo_weights

RELEASE_FORMAT = 1
MAX_CONFIG_BYTES = 1_000_000
MAX_CROP_S = 3600.0
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
CODEC_ID = re.compile(rf"demo|encodec_\w+|\./codec|{HUB_ID}")
TEXT_ENCODER_ID = re.compile(rf"demo|\./text_encoder|\w[\w.-]*|{HUB_ID}")
COMPONENT_FILE = re.compile(r"(codec|text_encoder)/\w[\w.-]*\.safetensors")
CODEC_FILES = ("config.json", "audiocraft.yaml", "README.md", "*.safetensors")
TEXT_ENCODER_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "README.md")
RAW = "@raw"
"""Suffix of a checkpoint's name that selects its raw weights instead of the average."""
DAMAGED_RELEASE = "copy or download the release again"
DAMAGED_CHECKPOINT = "use another checkpoint"


@dataclass(frozen=True)
class SavedModel:
    """Settings and weight file of a trained model."""

    file: Path
    """`model.safetensors` or a Lightning checkpoint."""
    network: MagnetConfig
    codec: dict[str, Any]
    """`id` for `load_codec`, and all of `CodecFacts` if they are known."""
    text_encoder: str
    """Name for `load_text_encoder`."""
    crop_s: float
    """Length of the training crops, in seconds."""
    decoding: DecodingConfig
    """Default decoding settings; `span_len` is the one of training."""
    guidance_dropout: float = 0.3
    """Share of examples trained without their caption, 0 to 1."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """`licence`, `source`, `step`, `metrics` and the like, as far as known."""
    sha256: str | None = None
    """SHA-256 of the weight file; None for a checkpoint."""
    component_sha256: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the weight files of a release's codec and text encoder, by relative path."""
    raw: bool = False
    """Use a checkpoint's raw weights instead of their average."""
    adapters: tuple[Adapter, ...] = ()
    """LoRA adapters that `weights` merges, in this order."""

    @classmethod
    def open(cls, path: str | Path) -> "SavedModel":
        """Open a release folder, hub id, Lightning checkpoint, run folder, or "demo".

        A run folder means its newest checkpoint. The suffix @raw of a checkpoint or run folder
        selects the raw weights instead of the average.

        Raises:
            UserError: if there is no usable model; the message names the file.
        """
        if str(path).endswith(RAW):
            saved = cls.open(str(path).removesuffix(RAW))
            if saved.sha256 is not None:
                raise UserError(f"{path}: a release has no raw weights; remove {RAW}")
            return replace(saved, raw=True)
        source = demo_path("magnet") if str(path) == "demo" else Path(path).expanduser()
        if source.is_dir() and (source / "config.json").is_file():
            return _open_release(source)
        if source.is_file():
            return _open_checkpoint(source)
        if source.is_dir():
            if (source / "state_dict.bin").is_file():
                raise UserError(
                    f"{source}: an audiocraft model; convert it first: "
                    f"magnet_train convert {source} --out FOLDER"
                )
            return _open_checkpoint(newest_checkpoint(source))
        return _open_release(_download_release(str(path)))

    def with_adapters(self, given: Sequence[str]) -> "SavedModel":
        """The model with LoRA adapters, FOLDER or FOLDER:STRENGTH each.

        Raises:
            UserError: if one is missing or damaged.
        """
        adapters = tuple(read_adapter(text) for text in given)
        about = {"lora": list(given)} if given else {}
        return replace(self, adapters=self.adapters + adapters, provenance=self.provenance | about)

    def weights(self) -> dict[str, Tensor]:
        """Verified weights by the network's names, in their stored precision, with all adapters.

        Raises:
            UserError: if the file is damaged, or does not match the model configuration.
        """
        if self.sha256 is None:
            weights = _network_weights(read_checkpoint(self.file), self.file, self.raw)
        else:
            hashes = {self.file.name: self.sha256} | self.component_sha256
            for name, expected in hashes.items():
                _check_sha256(self.file.parent / name, expected)
            weights = read_safetensors(self.file, DAMAGED_RELEASE)
        check_weights(weights, self.network, self.file)
        return merged(weights, self.adapters)

    def build(self) -> Magnet:
        """The network with its weights in float32, without extra memory."""
        with torch.device("meta"):
            network = Magnet(self.network)
        network.load_state_dict({k: v.float() for k, v in self.weights().items()}, assign=True)
        return network

    def to_dict(self) -> dict[str, Any]:
        """Content of a release's `config.json`."""
        return {
            "format": RELEASE_FORMAT,
            "network": self.network.to_dict(),
            "codec": self.codec,
            "text_encoder": {"id": self.text_encoder, "dim": self.network.text_dim},
            "decoding": asdict(replace(self.decoding, rescorer=None)),
            "crop_s": self.crop_s,
            "guidance_dropout": self.guidance_dropout,
            "provenance": self.provenance,
            "sha256": self.sha256,
            "component_sha256": self.component_sha256,
        }


# --- read -----------------------------------------------------------------------------------------


def _open_release(folder: Path) -> SavedModel:
    file = folder / "config.json"
    weights = folder / "model.safetensors"
    try:
        config = read_json(file, MAX_CONFIG_BYTES)
        if str(config.get("model_type")).startswith("musicgen"):
            raise UserError(
                f"a MusicGen; convert it first: magnet_train convert {folder} --out OUT"
            )
        if config["format"] != RELEASE_FORMAT:
            raise UserError(
                f"format {config['format']}, this version reads {RELEASE_FORMAT}; update it"
            )
        network = _read_network(config["network"])
        codec = dict(config["codec"])
        codec["id"] = _component(folder, codec["id"], CODEC_ID, "codec")
        for name in ("num_codebooks", "codebook_size"):
            if codec.get(name, getattr(network, name)) != getattr(network, name):
                raise ValueError(
                    f"codec has {name}={codec[name]}, network {getattr(network, name)}"
                )
        codec_facts(codec)  # checks its values
        text_encoder = dict(config["text_encoder"])
        if text_encoder["dim"] != network.text_dim:
            raise ValueError(
                f"text encoder has dim={text_encoder['dim']}, network text_dim={network.text_dim}"
            )
        provenance = config.get("provenance", {})
        if not isinstance(provenance.get("metrics") or {}, dict):
            raise TypeError("provenance.metrics is not an object")
        saved = SavedModel(
            file=weights,
            network=network,
            codec=codec,
            text_encoder=_component(folder, text_encoder["id"], TEXT_ENCODER_ID, "text encoder"),
            crop_s=_number(config, "crop_s", MAX_CROP_S),
            decoding=_own_decoding(config["decoding"]),
            guidance_dropout=_number(config, "guidance_dropout", 1.0),
            provenance=provenance,
            sha256=str(config["sha256"]),
            component_sha256=_component_sha256(config.get("component_sha256", {})),
        )
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{file}: not a release of magnet_train ({type(error).__name__}: {one_line(error)})"
        ) from error
    check_shapes(safetensors_shapes(weights, DAMAGED_RELEASE), network, weights)
    return saved


def _read_network(values: Any) -> MagnetConfig:
    config = MagnetConfig(**values)
    check_types(config)
    return config


def _own_decoding(values: dict[str, Any]) -> DecodingConfig:
    """Decoding settings without the rescorer, which is another model and not in the release."""
    return replace(DecodingConfig.from_dict(values), rescorer=None)


def _number(config: Mapping[str, Any], name: str, largest: float) -> float:
    value = config[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= largest:
        raise ValueError(f"{name}={value!r} is not a number from 0 to {largest:g}")
    return float(value)


def _text(config: Mapping[str, Any], name: str) -> str:
    if not isinstance(config[name], str):
        raise ValueError(f"{name}={config[name]!r} is not a string")
    return config[name]


def _component(folder: Path, name: Any, allowed: re.Pattern[str], what: str) -> str:
    """Name of a component for its loader; absolute paths are not allowed in a release."""
    if not isinstance(name, str) or not allowed.fullmatch(re.sub(r"(@\d+)?(@stereo)?$", "", name)):
        raise ValueError(f"{what} {name!r} is neither in the release's folder nor a hub id")
    return str(folder.resolve() / name.removeprefix("./")) if name.startswith("./") else name


def _component_sha256(values: Any) -> dict[str, str]:
    if not isinstance(values, dict) or not all(map(COMPONENT_FILE.fullmatch, values)):
        raise ValueError(f"component_sha256={str(values)[:80]} does not name files of the release")
    return {name: str(sha256) for name, sha256 in values.items()}


def _check_sha256(file: Path, expected: str) -> None:
    try:
        found = file_sha256(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); {DAMAGED_RELEASE}") from error
    if found != expected:
        raise UserError(
            f"{file}: SHA-256 is {found[:16]}…, config.json says {expected[:16]}…; "
            f"{DAMAGED_RELEASE}"
        )


def _open_checkpoint(path: Path) -> SavedModel:
    checkpoint = read_checkpoint(path)
    try:
        settings = checkpoint["hyper_parameters"]
        provenance = {"checkpoint": path.name, "step": checkpoint.get("global_step")}
        provenance |= checkpoint.get("init_provenance", {})
        callbacks = checkpoint.get("callbacks", {}).values()
        decoding = next(
            (c["decoding"] for c in callbacks if isinstance(c, dict) and "decoding" in c), {}
        )
        saved = SavedModel(
            file=path,
            network=_read_network(settings["network"]),
            codec={"id": _text(settings, "codec")},
            text_encoder=_text(settings, "text_encoder"),
            crop_s=_number(settings, "crop_s", MAX_CROP_S),
            decoding=_own_decoding(decoding | {"span_len": settings["span_len"]}),
            guidance_dropout=_number(settings, "guidance_dropout", 1.0),
            provenance={k: v for k, v in provenance.items() if v is not None},
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path}: not a checkpoint of magnet_train ({type(error).__name__}: {error})"
        ) from error
    state = _network_weights(checkpoint, path)
    if not (lora := _lora(settings)):
        check_shapes(tensor_shapes(state), saved.network, path)
        return saved
    try:
        adapter = adapter_of_checkpoint(lora, state, path)
        return _on_base(saved, str(settings["init_from"]), adapter)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: not adapters of magnet_train ({one_line(error)}); {DAMAGED_CHECKPOINT}"
        ) from error


def _lora(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint's adapters; empty if it has the whole network."""
    lora = settings.get("lora")
    return lora if isinstance(lora, dict) and lora.get("rank") else {}


def _on_base(saved: SavedModel, init_from: str, adapter: Adapter) -> SavedModel:
    """A checkpoint of adapters with the weights of the model that they were trained on."""
    try:
        base = SavedModel.open(init_from)
    except UserError as error:
        reason = str(error)[:300]  # adapters of adapters of …
        raise UserError(f"{saved.file}: the model of its adapters is missing: {reason}") from error
    provenance = saved.provenance | {"lora": str(saved.file)}
    return replace(
        saved,
        file=base.file,
        sha256=base.sha256,
        raw=base.raw,
        component_sha256=base.component_sha256,
        adapters=(*base.adapters, adapter),
        provenance=provenance,
    )


def newest_checkpoint(run: Path) -> Path:
    """The run's `last.ckpt`, or its newest .ckpt, or the newest one in a subfolder.

    Raises:
        UserError: if there is none.
    """
    found = [*run.glob("*.ckpt"), *(run / "checkpoints").glob("*.ckpt")] or [*run.rglob("*.ckpt")]
    if not found:
        raise UserError(
            f"{run}: no config.json and no .ckpt in it; "
            "give a release folder, a checkpoint or a run folder"
        )
    return max(found, key=lambda path: (path.stem.startswith("last"), path.stat().st_mtime))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read and verify a Lightning checkpoint without executing code in it.

    Tensors are memory-mapped.

    Raises:
        UserError: if it is missing or damaged, or contains more than plain data.
    """
    checkpoint = read_pickle(path, DAMAGED_CHECKPOINT)
    if not isinstance(checkpoint, dict):
        raise UserError(
            f"{path}: is a {type(checkpoint).__name__}, not a checkpoint; {DAMAGED_CHECKPOINT}"
        )
    return checkpoint


def _network_weights(
    checkpoint: Mapping[str, Any], path: Path, raw: bool = False
) -> dict[str, Tensor]:
    """The network's weights in a checkpoint: the average, if there is one, unless `raw`."""
    state = checkpoint.get("state_dict")
    if raw and (state := checkpoint.get("current_model_state")) is None:
        raise UserError(f"{path}: no averaged weights, so its only weights are raw; remove {RAW}")
    if not isinstance(state, Mapping):
        raise UserError(
            f"{path}: not a checkpoint of magnet_train (no state_dict); {DAMAGED_CHECKPOINT}"
        )
    prefix = "network."
    return {k.removeprefix(prefix): v for k, v in state.items() if str(k).startswith(prefix)}


def check_checkpoint_weights(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Check the averaged and the raw weights of a run's checkpoint against its own settings.

    Args:
        checkpoint: its content.
        path: its file, for messages.

    Raises:
        UserError: for the first wrong tensor.
    """
    settings = checkpoint["hyper_parameters"]
    try:
        network = _read_network(settings["network"])
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(
            f"{path}: not a checkpoint of magnet_train ({one_line(error)}); {DAMAGED_CHECKPOINT}"
        ) from error
    for raw in (False, True) if "current_model_state" in checkpoint else (False,):
        weights = _network_weights(checkpoint, path, raw)
        if _lora(settings):
            check_numbers(weights, path)
        else:
            check_weights(weights, network, path)


def check_shapes(shapes: Shapes, config: MagnetConfig, source: Path) -> None:
    """Check names and shapes against the configuration, before allocating memory for it.

    Raises:
        UserError: for the first difference.
    """
    if config.num_layers > len(shapes):
        raise UserError(
            f"{source}: {len(shapes)} tensors for num_layers={config.num_layers}; "
            "the file does not match the model configuration"
        )
    try:
        with torch.device("meta"):
            expected = tensor_shapes(Magnet(config).state_dict())
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes beyond 64 bits
        raise UserError(f"{source}: {config}: invalid network ({one_line(error)})") from error
    check_same_shapes(expected, shapes, source)


def check_weights(weights: Mapping[str, Tensor], config: MagnetConfig, source: Path) -> None:
    """Check names, shapes, data types and values of a network's weights.

    Raises:
        UserError: for the first wrong tensor.
    """
    check_shapes(tensor_shapes(weights), config, source)
    check_numbers(weights, source)


def check_codec(expected: Mapping[str, Any], facts: CodecFacts, where: Path) -> None:
    """Check that a codec is the one a model was trained with, as far as that is known.

    Raises:
        UserError: if it is another codec.
    """
    if facts.hash != expected.get("hash", facts.hash):
        raise UserError(
            f"{where}: codec mismatch: the model was trained on codec {expected['hash']}, "
            f"but {facts.id!r} is {facts.hash}; use the codec of training"
        )


def widens_to_stereo(start: SavedModel, codec: str) -> bool:
    """Whether a mono model would be trained with a codec used for both channels."""
    return codec.endswith(STEREO) and not start.codec["id"].endswith(STEREO)


def initial_weights(
    start: SavedModel, network: MagnetConfig, codec: CodecFacts | None
) -> dict[str, Tensor]:
    """Weights of a model that training starts from; of a mono model, also for stereo.

    Args:
        start: the model.
        network: architecture of the network to train.
        codec: codec of the network to train; None = unknown, not checked.

    Raises:
        UserError: if the weights have other shapes, or the codec is another one.
    """
    widens = codec is not None and widens_to_stereo(start, codec.id)
    weights = stereo_weights(start.weights()) if widens else start.weights()
    check_weights(weights, network, start.file)
    if codec is not None:
        mono = load_codec_facts(codec.id.removesuffix(STEREO)) if widens else codec
        check_codec(start.codec, mono, start.file)
    return weights


def codec_facts(codec: dict[str, Any]) -> CodecFacts | None:
    """All facts of the codec, if they are known.

    Raises:
        UserError: if a value is not possible.
    """
    try:
        return CodecFacts.from_dict(codec)
    except ValueError:
        return None


def _download_release(name: str) -> Path:
    from huggingface_hub import snapshot_download

    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"checkpoint {name!r}: no such file or folder")
    patterns = ["config.json", "model.safetensors", "README.md", "codec/*", "text_encoder/*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # many types, from no internet access to no such repository
        raise UserError(
            f"checkpoint {name!r}: not found locally or on the Hugging Face Hub ({one_line(error)})"
        ) from error


# --- write ----------------------------------------------------------------------------------------


def write_release(
    out: Path,
    saved: SavedModel,
    tensors: Mapping[str, Callable[[], Tensor]],
    card: str | None = None,
) -> SavedModel:
    """Write a release folder atomically, and open it.

    A codec or text encoder from a folder is copied into the release.

    Args:
        out: must be empty or not exist.
        saved: the settings; `file` and checksums are ignored.
        tensors: functions that return the tensors, by the network's names.
        card: content of README.md (default: `model_card`).

    Raises:
        UserError: if `out` is not empty, or the codec is not the one of training.
    """
    with new_folder(out) as folder:
        codec, _ = split_name(saved.codec["id"])
        if _is_folder(codec):
            check_codec(saved.codec, load_codec_facts(saved.codec["id"]), saved.file)
            _copy(Path(codec), folder / "codec", CODEC_FILES)
            name = "./codec" + saved.codec["id"].removeprefix(codec)
            saved = replace(saved, codec=saved.codec | {"id": name})
        if _is_folder(saved.text_encoder):
            _copy(Path(saved.text_encoder), folder / "text_encoder", TEXT_ENCODER_FILES)
            saved = replace(saved, text_encoder="./text_encoder")
        components = sorted(folder.glob("*/*.safetensors"))
        hashes = {file.relative_to(folder).as_posix(): file_sha256(file) for file in components}
        file = folder / "model.safetensors"
        sha256 = write_safetensors(file, tensors)
        saved = replace(saved, file=file, sha256=sha256, component_sha256=hashes, adapters=())
        write_json(folder / "config.json", saved.to_dict())
        (folder / "README.md").write_text(model_card(saved, out.name) if card is None else card)
    return _open_release(out)


def _is_folder(name: str) -> bool:
    """Whether a component's name is a folder (an absolute path)."""
    return Path(name).is_absolute() and Path(name).is_dir()


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy only a component's files from its folder."""
    target.mkdir()
    for file in sorted({file for pattern in patterns for file in source.glob(pattern)}):
        shutil.copy(file, target / file.name)


def model_card(saved: SavedModel, name: str) -> str:
    """README.md of a release: model, origin, licence and usage."""
    provenance = saved.provenance
    licence = provenance.get("licence")
    shapes = safetensors_shapes(saved.file, DAMAGED_RELEASE)
    size = sum(math.prod(shape) for shape in shapes.values()) / 1e6
    rows = {
        "licence": licence or "not stated",
        "licence of the codec": _read_licence(saved.file.parent / "codec"),
        **{
            k: provenance.get(k)
            for k in ("base_model", "source", "checkpoint", "step", "trained_on")
        },
        "codec": f"{saved.codec['id']}, padding {saved.codec.get('pad_mode', 'unknown')}",
        "text encoder": saved.text_encoder,
        **(provenance.get("metrics") or {}),
    }
    head = {
        "license": licence or "unknown",
        "library_name": "magnet_train",
        "pipeline_tag": "text-to-audio",
        "base_model": provenance.get("base_model"),
        "tags": "[magnet, text-to-audio]",
    }
    front_matter = "\n".join(f"{k}: {v}" for k, v in head.items() if v)
    table = "\n".join(f"| {k} | {v} |" for k, v in rows.items() if v is not None)
    text = CARD.format(
        front_matter=front_matter,
        name=name,
        size=size,
        crop_s=saved.crop_s,
        table=table,
        **saved.network.to_dict(),
    )
    if "nc" in str(licence).lower().split("-"):
        text += f"\nModels derived from these weights stay under {licence}: no commercial use.\n"
    return text


CARD = """---
{front_matter}
---

# {name}

A MAGNeT ([arXiv 2401.04577](https://arxiv.org/abs/2401.04577)) of {size:.3g} M parameters:
{num_layers} layers of width {dim}, for {crop_s:g} s of audio in {num_codebooks} codebooks of
{codebook_size} entries.

```python
import magnet_train

model = magnet_train.load("{name}")
audio = model.generate(["a slow waltz for piano"], seed=0).wav  # b channels samples
```

| | |
|---|---|
{table}
"""


def _read_licence(folder: Path) -> str | None:
    """The licence in the front matter of a README.md."""
    if not (folder / "README.md").is_file():
        return None
    text = (folder / "README.md").read_text(errors="replace")
    found = re.search(r"^license: *(\S+)", text, re.MULTILINE)
    return found[1] if found else None
