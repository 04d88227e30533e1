"""Models of audiocraft to releases of ours, and back, to the bit.

Their folder holds `state_dict.bin` (the network: weights, and its configuration as a YAML text) and
`compression_state_dict.bin` (the codec in the same form, or a pointer to a pretrained one). Both are pickles from
strangers: only tensors and plain values are read from them, and the configuration is data, of which named keys are
looked up. Tensors stay in the file until they are written, so that a model of any size needs little memory.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from magnet_train.codec.base import CodecFacts, load_codec, split_name
from magnet_train.codec.encodec_names import audiocraft_config, to_audiocraft, to_transformers, transformers_config
from magnet_train.common.errors import UserError
from magnet_train.common.pretrained import absolute_path, one_line, quiet
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.model import MagnetConfig
from magnet_train.release import Trained, check_new, check_stamp, codec_facts, new_folder, write_release

MODEL_FILE, CODEC_FILE = "state_dict.bin", "compression_state_dict.bin"
PUBLISHED = (
    "magnet-small-10secs", "magnet-medium-10secs", "magnet-small-30secs", "magnet-medium-30secs",
    "audio-magnet-small", "audio-magnet-medium",
)  # fmt: skip
PUBLISHED_LICENCE = "cc-by-nc-4.0"
MOST_KEYS = 10_000
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
T5_WIDTHS = {
    "t5-small": 512, "t5-base": 768, "t5-large": 1024, "t5-3b": 1024, "t5-11b": 1024,
    "google/flan-t5-small": 512, "google/flan-t5-base": 768, "google/flan-t5-large": 1024,
    "google/flan-t5-xl": 2048, "google/flan-t5-xxl": 4096,
}  # fmt: skip
"""Text encoders that audiocraft knows, and the width of their states."""


@dataclass(frozen=True)
class ConvertOptions:
    """What becomes of a model."""

    out: Path
    """Folder to write; must not exist, or be empty."""
    to: Literal["release", "audiocraft"] = "release"
    """Whether our release folder is written, or a folder that audiocraft loads."""
    codec: str | None = None
    """Folder or hub id of a transformers EnCodec, where the one that the model names cannot be reached."""
    text_encoder: str | None = None
    """Folder or hub id of a T5, instead of the one that the model names."""
    licence: str | None = None
    """Licence of the weights; if not given, the source's own, and cc-by-nc-4.0 for a model of audiocraft."""
    push_to_hub: str | None = None
    """Hub id to which the release is uploaded too, USER/NAME; needs `hf auth login`."""


def convert(source: str, options: ConvertOptions) -> Path:
    """`source` in the form asked for; returns the folder.

    Args:
        source: a folder or hub id with audiocraft's files (the published ones also without their `facebook/`), or
            whatever `Trained.open` takes: a release, a checkpoint, a run folder, "demo".
        options: see there.

    Raises:
        UserError: if the source cannot be read, or holds what the other side cannot compute.
    """
    out = check_new(options.out)
    if options.push_to_hub is not None:
        _check_repo_id(options.push_to_hub)
    folder = _audiocraft_folder(source, with_codec=options.codec is None)
    if options.to == "audiocraft":
        if folder is not None:
            raise UserError(f"{source}: is a model of audiocraft already")
        if options.push_to_hub is not None:
            raise UserError("--push_to_hub uploads releases; leave out --to audiocraft")
        return to_audiocraft_folder(_with(Trained.open(source), options, for_audiocraft=True), out)
    if folder is not None:
        trained = from_audiocraft(folder, source, options)
    else:
        trained = _with(Trained.open(source), options)
        weights = trained.weights()
        trained = write_release(out, trained, {k: lambda v=v: v for k, v in weights.items()})
    if options.push_to_hub is not None:
        print(push_to_hub(out, options.push_to_hub))
    return trained.file.parent


def push_to_hub(folder: Path, repo_id: str) -> str:
    """Upload a release; returns its address. Needs a token, `hf auth login` or HF_TOKEN.

    Raises:
        UserError: if the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message="Release of magnet_train")
    except Exception as error:
        raise UserError(
            f"--push_to_hub {repo_id}: {one_line(error)}; the release is in {folder}: check the name and "
            "`hf auth whoami`, then upload it with `hf upload`"
        ) from error
    return f"https://huggingface.co/{repo_id}"


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {repo_id}: {one_line(error)}; give USER/NAME") from error


def _with(trained: Trained, options: ConvertOptions, for_audiocraft: bool = False) -> Trained:
    """The settings of a model of ours with what the options replace, which must fit it."""
    if options.codec is not None:
        facts = _first_codebooks(options.codec, trained.network, f"--codec {options.codec}")
        check_stamp(trained.codec, facts, trained.file)
        trained = replace(trained, codec=facts.to_dict())
    elif trained.codec.keys() == {"id"}:  # all that a checkpoint has
        facts = _first_codebooks(trained.codec["id"], trained.network, f"codec {trained.codec['id']}")
        trained = replace(trained, codec=facts.to_dict())
    if options.text_encoder is not None:
        _check_text_width(options.text_encoder, trained.network.text_dim, trained.file)
        trained = replace(trained, text_encoder=absolute_path(options.text_encoder))
    if not for_audiocraft and Path(trained.text_encoder).is_absolute():
        warnings.warn(
            f"the text encoder lies in {trained.text_encoder}, which is named in the release but no part of it; "
            "name it by its hub id with --text_encoder before you pass the release on",
            stacklevel=2,
        )
    licence = trained.about.get("licence")
    if options.licence is not None and licence not in (None, options.licence):
        raise UserError(
            f"--licence {options.licence}: the weights come from {trained.about.get('source', trained.file)} under "
            f"{licence}, which holds for what is derived from them"
        )
    return replace(trained, about=trained.about | {"licence": options.licence or licence})


# --- names --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """One tensor on a side is one on the other, or several, stacked or one below another."""

    ours: Sequence[str]
    theirs: Sequence[str]


def correspondence(num_layers: int, num_codebooks: int, conditioner: str = "description") -> list[Pair]:
    """All tensors of a network, ours against theirs; `conditioner` is their configuration's name for the text."""
    projection = f"condition_provider.conditioners.{conditioner}.output_proj"
    pairs = [
        Pair(("embedding",), tuple(f"emb.{k}.weight" for k in range(num_codebooks))),
        Pair(("head",), tuple(f"linears.{k}.weight" for k in range(num_codebooks))),
    ]
    one_to_one = {f"text_projection.{x}": f"{projection}.{x}" for x in ("weight", "bias")}
    one_to_one |= {f"out_norm.{x}": f"out_norm.{x}" for x in ("weight", "bias")}
    for i in range(num_layers):
        ours, theirs = f"blocks.{i}", f"transformer.layers.{i}"
        one_to_one[f"{ours}.self_attention.qkv.weight"] = f"{theirs}.self_attn.in_proj_weight"
        one_to_one[f"{ours}.self_attention.out.weight"] = f"{theirs}.self_attn.out_proj.weight"
        one_to_one[f"{ours}.cross_attention.out.weight"] = f"{theirs}.cross_attention.out_proj.weight"
        one_to_one[f"{ours}.ffn_in.weight"] = f"{theirs}.linear1.weight"
        one_to_one[f"{ours}.ffn_out.weight"] = f"{theirs}.linear2.weight"
        for norm, name in (("self_norm", "norm1"), ("cross_norm", "norm_cross"), ("ffn_norm", "norm2")):
            one_to_one |= {f"{ours}.{norm}.{x}": f"{theirs}.{name}.{x}" for x in ("weight", "bias")}
        query_and_rest = (f"{ours}.cross_attention.q.weight", f"{ours}.cross_attention.kv.weight")
        pairs.append(Pair(query_and_rest, (f"{theirs}.cross_attention.in_proj_weight",)))
    return pairs + [Pair((a,), (b,)) for a, b in one_to_one.items()]


def to_ours(theirs: Mapping[str, Tensor], pairs: list[Pair]) -> dict[str, Callable[[], Tensor]]:
    """Our tensors by name, each made when it is called for."""
    made: dict[str, Callable[[], Tensor]] = {}
    for pair in pairs:
        tensors, name = [theirs[name] for name in pair.theirs], pair.ours[0]
        if len(tensors) > 1:
            made[name] = lambda tensors=tensors: torch.stack(tensors)
        elif len(pair.ours) > 1:
            query, rest = tensors[0].tensor_split([tensors[0].shape[1]])
            made |= {name: lambda query=query: query, pair.ours[1]: lambda rest=rest: rest}
        else:
            made[name] = lambda tensor=tensors[0]: tensor
    return made


def to_theirs(ours: Mapping[str, Tensor], pairs: list[Pair]) -> dict[str, Tensor]:
    """Their tensors by name."""
    made: dict[str, Tensor] = {}
    for pair in pairs:
        if len(pair.theirs) > 1:
            made |= dict(zip(pair.theirs, ours[pair.ours[0]].unbind(0), strict=True))
        else:
            parts = [ours[name] for name in pair.ours]
            made[pair.theirs[0]] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return made


# --- from audiocraft ----------------------------------------------------------------------------------------------


def from_audiocraft(folder: Path, source: str, options: ConvertOptions) -> Trained:
    """Write a release of the model in `folder`.

    Args:
        folder: with `state_dict.bin`, and `compression_state_dict.bin` unless the options name a codec.
        source: where it came from, for the card.
        options: see there.

    Raises:
        UserError: that names the file, the key and the remedy.
    """
    file = folder / MODEL_FILE
    package = read_package(file)
    text, weights = package.get("xp.cfg"), package.get("best_state")
    if not isinstance(text, str) or not isinstance(weights, Mapping):
        raise UserError(f"{file}: holds no exported model (best_state, xp.cfg); export it with audiocraft's export_lm")
    config = read_config(text, file)
    _refuse_hybrids(weights, config, file)
    network, conditioner = _network_of(config, weights, file)
    pairs = correspondence(network.num_layers, network.num_codebooks, conditioner)
    _check(weights, pairs, network, file)
    text_encoder = options.text_encoder or str(config[f"conditioners.{conditioner}.t5.name"])
    _check_text_width(text_encoder, network.text_dim, file)
    hub_id = None if Path(source).expanduser().exists() else _hub_id(source)
    if hub_id is not None and hub_id.startswith("facebook/") and options.licence not in (None, PUBLISHED_LICENCE):
        raise UserError(
            f"--licence {options.licence}: {hub_id} is under {PUBLISHED_LICENCE}, and so is what comes of it"
        )
    about = {
        "licence": options.licence or PUBLISHED_LICENCE,
        "source": hub_id or f"audiocraft folder {folder.resolve().name}",
        "audiocraft": {"version": str(package.get("version", "")), "xp.cfg": text},
    }
    about |= {} if hub_id is None else {"base_model": hub_id}
    decoding = _decoding_of(config, network.num_codebooks, file)
    crop_s = _number(config, "dataset.segment_duration", file, least=0.01)
    dropout = _number(config, "classifier_free_guidance.training_dropout", file, least=0, default=0.3)
    with TemporaryDirectory() as scratch:
        codec = _codec_of(folder, config, options.codec, network, Path(scratch), str(about["licence"]))
        trained = Trained(file, network, codec, absolute_path(text_encoder), crop_s, decoding, dropout, about)
        return write_release(options.out, trained, to_ours(weights, pairs))


def _hub_id(source: str) -> str:
    return f"facebook/{source}" if source in PUBLISHED else source


def read_package(path: Path) -> dict[str, Any]:
    """An exported file of audiocraft; tensors stay in it until they are used, and nothing in it is executed.

    Raises:
        UserError: if it is missing, truncated, or holds anything but tensors and plain values.
    """
    try:
        try:
            package = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            package = torch.load(path, map_location="cpu", weights_only=True)  # the form of torch before 1.6
    except FileNotFoundError as error:
        raise UserError(f"{path}: not there; download it again") from error
    except Exception as error:
        if "Weights only load failed" in str(error) and (found := re.search(r"GLOBAL ([\w.]+)", str(error))):
            raise UserError(
                f"{path}: a pickle that asks for {found[1]}, which could run code; refused: take a file that "
                "audiocraft exported (export_lm, export_encodec), which holds tensors and text"
            ) from error
        raise UserError(f"{path}: broken or cut short ({one_line(error, 120)}); download it again") from error
    if not isinstance(package, dict):
        raise UserError(f"{path}: holds a {type(package).__name__}, no exported model; download it again")
    return package


def read_config(text: str, where: Path) -> dict[str, Any]:
    """Their YAML as flat keys, `transformer_lm.dim`; references to other keys are followed, no others.

    Raises:
        UserError: if it is no YAML mapping.
    """
    try:
        nested = yaml.safe_load(text)
        if not isinstance(nested, dict):
            raise ValueError(f"a {type(nested).__name__}, no mapping")
        # Aliases can make a small text endless: the published ones have 300 keys.
        flat = dict(islice(_flat(nested), MOST_KEYS + 1))
        if len(flat) > MOST_KEYS:
            raise ValueError(f"more than {MOST_KEYS} keys")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: its xp.cfg is no YAML configuration ({one_line(error)}); download it again"
        ) from error
    for key, value in flat.items():
        seen = set()
        while isinstance(value, str) and (link := re.fullmatch(r"\$\{([\w.]+)\}", value)) and link[1] not in seen:
            seen.add(link[1])
            value = flat.get(link[1])
        flat[key] = value
    return flat


def _flat(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            if prefix.count(".") > 20:
                raise ValueError("nested without end")
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _need(config: Mapping[str, Any], key: str, where: Path) -> Any:
    if config.get(key) is None:
        raise UserError(f"{where}: its configuration has no {key}; download it again")
    return config[key]


def _number(config: Mapping[str, Any], key: str, where: Path, least: float, default: float | None = None) -> float:
    """A finite number of at least `least`."""
    value = config.get(key) if config.get(key) is not None or default is None else default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise UserError(
            f"{where}: its configuration has {key}={value!r}, not a number from {least:g} up; download it again"
        )
    return float(value)


def _refuse_hybrids(weights: Mapping[str, Any], config: Mapping[str, Any], where: Path) -> None:
    """Hybrid-MAGNeT predicts a beginning one code after the other, in a delayed pattern; this package does not."""
    if strange := next((k for k in weights if not isinstance(k, str)), None):
        raise UserError(f"{where}: holds a tensor under {strange!r}, which is no name; download it again")
    signs = [k for k in weights if "hybrid" in k or k.startswith(("attn_mask_per_stage", "ar_", "prompt_"))]
    signs += [f"lm_model={config['lm_model']}"] if "hybrid" in str(config.get("lm_model", "")) else []
    pattern = config.get("codebooks_pattern.modeling", "parallel")
    signs += [f"codebooks_pattern.modeling={pattern}"] if pattern != "parallel" else []
    if signs:
        kind = "a hybrid MAGNeT" if pattern in ("parallel", "delay") else "another model"
        raise UserError(f"{where}: {kind} ({signs[0]}), which is not supported yet; take a magnet-… without `hybrid`")


def _network_of(config: Mapping[str, Any], weights: Mapping[str, Tensor], where: Path) -> tuple[MagnetConfig, str]:
    """Shape of the network, and the name of its text condition."""
    wanted = {
        "lm_model": "transformer_lm_magnet", "transformer_lm.causal": False, "transformer_lm.norm_first": True,
        "transformer_lm.activation": "gelu", "transformer_lm.positional_embedding": "sin", "transformer_lm.norm":
        "layer_norm", "transformer_lm.bias_ff": False, "transformer_lm.bias_attn": False,
        "transformer_lm.bias_proj": False, "transformer_lm.layer_scale": None, "transformer_lm.qk_layer_norm": False,
        "transformer_lm.qk_layer_norm_cross": False, "transformer_lm.kv_repeat": 1, "transformer_lm.xpos": False,
        "transformer_lm.past_context": None, "fuser.cross_attention_pos_emb": False,
    }  # fmt: skip
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise UserError(f"{where}: {key}={config[key]!r}; this package trains MAGNeT with {key}={value!r}")
    texts = _need(config, "fuser.cross", where)
    others = [k for k in ("fuser.sum", "fuser.prepend", "fuser.input_interpolate") if config.get(k)]
    if not isinstance(texts, list) or len(texts) != 1 or others:
        raise UserError(f"{where}: conditions {texts} {others}; only one text, by cross-attention, is supported")
    kind = config.get(f"conditioners.{texts[0]}.model")
    if kind != "t5" or f"conditioners.{texts[0]}.t5.name" not in config:
        raise UserError(f"{where}: conditioners.{texts[0]}.model={kind!r}; only t5 is supported")
    projection = weights.get(f"condition_provider.conditioners.{texts[0]}.output_proj.weight")
    if not isinstance(projection, Tensor) or projection.dim() != 2:
        raise UserError(
            f"{where}: no condition_provider.conditioners.{texts[0]}.output_proj.weight of two axes; download it again"
        )
    shape = {
        "dim": "dim", "num_heads": "num_heads", "num_layers": "num_layers", "num_codebooks": "n_q",
        "codebook_size": "card", "context": "subcodes_context", "ffn_ratio": "hidden_scale",
    }  # fmt: skip
    values = {o: _number(config, f"transformer_lm.{t}", where, -1 if o == "context" else 1) for o, t in shape.items()}
    try:
        return MagnetConfig(**{k: int(v) for k, v in values.items()}, text_dim=projection.shape[1]), texts[0]
    except UserError as error:
        raise UserError(f"{where}: its configuration's transformer_lm: {error}") from error


def _check(weights: Mapping[str, Any], pairs: list[Pair], network: MagnetConfig, where: Path) -> None:
    """Names and shapes, against the configuration that came along."""
    d, c, f = network.dim, network.codebook_size, network.ffn_ratio
    shapes = {"emb": (c + 1, d), "linears": (c, d), "in_proj_weight": (3 * d, d), "out_proj": (d, d)}
    shapes |= {"linear1": (f * d, d), "linear2": (d, f * d)}
    expected = {name: shapes for pair in pairs for name in pair.theirs}
    for name in sorted(expected.keys() - weights.keys()):
        raise UserError(
            f"{where}: lacks {name} and {len(expected.keys() - weights.keys()) - 1} more tensors that its "
            "configuration asks for; download it again"
        )
    for name in sorted(weights.keys() - expected.keys()):
        raise UserError(
            f"{where}: has the unknown {name} and {len(weights.keys() - expected.keys()) - 1} more; "
            "it is another model than its configuration says"
        )
    for name in expected:
        tensor, last = weights[name], name.split(".")[-2 if name.endswith((".weight", ".bias")) else -1]
        kind = name.split(".")[0] if name.startswith(("emb.", "linears.")) else last
        if "output_proj" in name:
            shape = (d, network.text_dim) if name.endswith("weight") else (d,)
        else:
            shape = shapes.get(kind, (d,))  # norms
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in FLOATS:
            raise UserError(f"{where}: {name} is no plain tensor of floating-point numbers; download it again")
        if tuple(tensor.shape) != shape:
            hint = f" (codebook size {c})" if kind in ("emb", "linears") else ""
            raise UserError(
                f"{where}: {name} is {tuple(tensor.shape)}, its configuration{hint} asks for {shape}; "
                "it belongs to another model"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {name} holds NaN or infinite values; take another checkpoint")
    for pair in pairs:
        if len({weights[name].dtype for name in pair.theirs}) > 1:
            raise UserError(f"{where}: {pair.theirs[0]} and its like have different precisions; export it again")


def _check_text_width(name: str, width: int, where: Path) -> None:
    """Against what is known of the name, or stands in the folder's config.json, without loading anything."""
    import json

    known = T5_WIDTHS.get(name)
    if (file := Path(name).expanduser() / "config.json").is_file():
        try:
            known = json.loads(file.read_text()).get("d_model")
        except (OSError, json.JSONDecodeError, AttributeError) as error:
            raise UserError(f"text encoder {name!r}: {file} is unreadable ({error})") from error
    if known is not None and known != width:
        raise UserError(
            f"{where}: its text projection takes states of width {width}, but {name!r} has {known}; "
            "give the right one with --text_encoder"
        )


def _decoding_of(config: Mapping[str, Any], num_codebooks: int, where: Path) -> DecodingConfig:
    names = {
        "temperature": "temp", "top_p": "top_p", "top_k": "top_k", "max_cfg_coef": "max_cfg_coef",
        "min_cfg_coef": "min_cfg_coef", "decoding_steps": "decoding_steps", "anneal_temperature": "anneal_temp",
        "span_scoring": "span_scoring", "span_arrangement": "span_arrangement",
    }  # fmt: skip
    given = {ours: config.get(f"generate.lm.{theirs}") for ours, theirs in names.items()}
    values = {k: v for k, v in given.items() if v is not None} | {"span_len": _need(config, "masking.span_len", where)}
    values["greedy"] = config.get("generate.lm.use_sampling") is False
    try:
        decoding = DecodingConfig.from_dict(values)
        decoding.steps_per_stage(num_codebooks)
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{where}: its configuration's generate.lm: {error}") from error
    return decoding


def _codec_of(
    folder: Path, config: Mapping[str, Any], given: str | None, network: MagnetConfig, scratch: Path, licence: str
) -> dict[str, Any]:
    """Facts about the codec; one whose weights came along is written to `scratch`."""
    if given is not None:
        return _first_codebooks(given, network, f"--codec {given}").to_dict()
    file = folder / CODEC_FILE
    package = read_package(file)
    if "pretrained" in package:
        return _pointed_at(package["pretrained"], config, network, file)
    write_codec(package, scratch / "codec", file, licence)
    try:
        return _first_codebooks(str(scratch / "codec"), network, str(file)).to_dict()
    except UserError as error:  # it knows the codec by where it was written for now
        raise UserError(str(error).replace(repr(str((scratch / "codec").resolve())), str(file))) from error


def _first_codebooks(name: str, network: MagnetConfig, where: str) -> CodecFacts:
    """Facts about a codec, of which a model may use the first codebooks only (their `compression_model_n_q`)."""
    facts = load_codec(name).facts
    if facts.num_codebooks > network.num_codebooks:
        facts = load_codec(f"{split_name(name)[0]}@{network.num_codebooks}").facts
    if (facts.num_codebooks, facts.codebook_size) != (network.num_codebooks, network.codebook_size):
        raise UserError(
            f"{where}: a codec with {facts.num_codebooks} codebooks of {facts.codebook_size} entries, but the model "
            f"has {network.num_codebooks} of {network.codebook_size}; give the right one with --codec"
        )
    return facts


def _pointed_at(name: Any, config: Mapping[str, Any], network: MagnetConfig, where: Path) -> dict[str, Any]:
    """Facts about a pretrained codec: its own where it can be had, else what the model's configuration says of it."""
    found = (
        re.fullmatch(r"(?://pretrained/)?([\w-][\w.-]*/[\w-][\w.-]*|encodec_\w+)", name)
        if isinstance(name, str)
        else None
    )
    if found is None or Path(found[1]).exists():  # a stranger's file must not name folders of this machine
        raise UserError(f"{where}: points at the codec {name!r}, which is no hub id; give the codec with --codec")
    name = found[1]
    try:
        load_codec(name)
    except UserError as error:
        warnings.warn(
            f"{where} points at a codec that cannot be had now, so it is looked at when the release is loaded: {error}",
            stacklevel=2,
        )
        return {"id": name, "sample_rate": config.get("sample_rate"), "channels": config.get("channels")}
    return _first_codebooks(name, network, f"{where} -> {name}").to_dict()


def write_codec(package: Mapping[str, Any], out: Path, where: Path, licence: str = PUBLISHED_LICENCE) -> None:
    """A compression model of audiocraft as a folder of transformers' EncodecModel, padding mode included.

    Args:
        package: what `read_package` gave.
        out: folder.
        where: file, for messages.
        licence: of the weights, which goes where they go.

    Raises:
        UserError: if weights and configuration do not belong together.
    """
    from magnet_train.common.torchaudio_import import mend_torchaudio

    mend_torchaudio()
    from transformers import EncodecConfig, EncodecModel

    text, theirs = package.get("xp.cfg"), package.get("best_state")
    if not isinstance(text, str) or not isinstance(theirs, Mapping):
        raise UserError(
            f"{where}: neither an exported codec (best_state, xp.cfg) nor a pointer to one; download it again"
        )
    settings = transformers_config(read_config(text, where), str(where))
    if strange := next((k for k, v in theirs.items() if not isinstance(k, str) or not isinstance(v, Tensor)), None):
        raise UserError(f"{where}: {strange!r} is no named tensor; download it again")
    try:
        with torch.device("meta"):
            model = EncodecModel(EncodecConfig(**settings))
    except Exception as error:  # whatever impossible settings lead to
        raise UserError(
            f"{where}: its configuration describes no codec ({one_line(error)}); download it again"
        ) from error
    names = {to_transformers(k): k for k in theirs}
    state, own = {name: theirs[k] for name, k in names.items()}, model.state_dict()
    if lacking := own.keys() - state.keys():
        raise UserError(f"{where}: lacks {min(lacking)} and {len(lacking) - 1} more; download it again")
    if surplus := state.keys() - own.keys():
        first = names[min(surplus)]
        raise UserError(f"{where}: has the unknown {first} and {len(surplus) - 1} more; download it again")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape or not tensor.is_floating_point():
            raise UserError(
                f"{where}: {names[name]} is {tensor.dtype} {tuple(tensor.shape)}, its configuration asks for floats of "
                f"{tuple(own[name].shape)}; download it again"
            )
    model.load_state_dict(state, assign=True)
    with quiet():
        model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # a release is there to be shared
    (out / "audiocraft.yaml").write_text(text)  # for the way back
    (out / "README.md").write_text(f"---\nlicense: {licence}\n---\n\nThe codec of {where.name}, for transformers.\n")


def _audiocraft_folder(source: str, with_codec: bool) -> Path | None:
    """Where audiocraft's files are, downloaded if need be; None if `source` is something else."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path if (path / MODEL_FILE).is_file() else None
    if path.exists() or source == "demo":
        return None
    name = _hub_id(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{source}: no such file or folder, and no hub id; published are {', '.join(PUBLISHED)}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        found = hf_hub_download(name, MODEL_FILE)
    except Exception as error:  # a dozen kinds, from no network to no such repository
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None  # the repository is there, and may be a release of ours
        try:
            Trained.open(source)  # in the cache, it may be one without any network
            return None
        except UserError:
            raise UserError(_not_to_be_had(name, error)) from error
    if with_codec:
        try:
            hf_hub_download(name, CODEC_FILE)
        except Exception as error:
            raise UserError(_not_to_be_had(name, error)) from error
    return Path(found).parent


def _not_to_be_had(name: str, error: Exception) -> str:
    return (
        f"{name}: no such folder, and not to be had from the hub ({one_line(error)}); download {MODEL_FILE} and "
        f"{CODEC_FILE} where there is network, and give their folder"
    )


# --- to audiocraft ------------------------------------------------------------------------------------------------


def to_audiocraft_folder(trained: Trained, out: Path) -> Path:
    """Write `state_dict.bin` and `compression_state_dict.bin` that audiocraft's `MAGNeT.get_pretrained` loads.

    Raises:
        UserError: if audiocraft has no such codec or text encoder.
    """
    name = trained.text_encoder if trained.text_encoder in T5_WIDTHS else Path(trained.text_encoder).name
    if T5_WIDTHS.get(name) != trained.network.text_dim:
        raise UserError(
            f"text encoder {trained.text_encoder!r} of width {trained.network.text_dim}: audiocraft knows only "
            f"{', '.join(T5_WIDTHS)}; name the one that it is with --text_encoder"
        )
    codec = codec_package(trained.codec["id"])
    kept = trained.about.get("audiocraft") or {}
    text, conditioner = kept.get("xp.cfg"), "description"
    if isinstance(text, str) and _still_says(text, trained, name):
        conditioner = read_config(text, trained.file)["fuser.cross"][0]
    else:
        text = yaml.safe_dump(_config_for(trained, name), sort_keys=False)
    pairs = correspondence(trained.network.num_layers, trained.network.num_codebooks, conditioner)
    state = to_theirs(trained.weights(), pairs)
    version = kept.get("version") or "1.4.0a2"
    with new_folder(out) as folder:
        torch.save({"best_state": state, "xp.cfg": text, "version": version, "exported": True}, folder / MODEL_FILE)
        torch.save(codec | {"version": version, "exported": True}, folder / CODEC_FILE)
    return out


def _still_says(text: str, trained: Trained, text_encoder: str) -> bool:
    """Whether a configuration that came along is still the model's."""
    try:
        config = read_config(text, trained.file)
        (name,) = config["fuser.cross"]
        projection = f"condition_provider.conditioners.{name}.output_proj.weight"
        network, _ = _network_of(config, {projection: torch.empty(1, trained.network.text_dim)}, trained.file)
        says = (
            network, _decoding_of(config, network.num_codebooks, trained.file),
            _number(config, "dataset.segment_duration", trained.file, 0), config[f"conditioners.{name}.t5.name"],
            _number(config, "classifier_free_guidance.training_dropout", trained.file, 0, 0.3),
        )  # fmt: skip
    except (UserError, KeyError, TypeError, ValueError):
        return False
    is_now = (trained.network, trained.decoding, trained.crop_s, text_encoder, trained.guidance_dropout)
    return says == is_now


def codec_package(name: str) -> dict[str, Any]:
    """What `compression_state_dict.bin` says of a codec: its weights, or for a hub id where to find them.

    Raises:
        UserError: if it is no EnCodec of transformers.
    """
    base, _ = split_name(name)
    folder = Path(base).expanduser()
    if not folder.is_dir():
        if base.count("/") != 1:
            raise UserError(f"codec {name!r}: audiocraft has no such codec; it takes EnCodecs from the hub, or folders")
        return {"pretrained": base}
    from magnet_train.common.torchaudio_import import mend_torchaudio

    mend_torchaudio()
    from transformers import EncodecConfig, EncodecModel

    kind = EncodecConfig.get_config_dict(base)[0].get("model_type")
    if kind != "encodec":
        raise UserError(f"codec {name!r}: is a {kind!r}; audiocraft takes EnCodecs only")
    with quiet():
        model: Any = EncodecModel.from_pretrained(base, dtype="auto")
    kept = folder / "audiocraft.yaml"
    text = kept.read_text() if kept.is_file() else yaml.safe_dump(audiocraft_config(model.config), sort_keys=False)
    return {"best_state": to_audiocraft(model.state_dict(), model.config), "xp.cfg": text}


def _config_for(trained: Trained, text_encoder: str) -> dict[str, Any]:
    """The keys that audiocraft's loader reads, for a model that was trained here."""
    network, decoding = trained.network, trained.decoding
    facts = codec_facts(trained.codec)
    if facts is None:
        raise UserError(f"codec {trained.codec['id']!r}: its facts are unknown; give it with --codec")
    steps = list(decoding.steps_per_stage(network.num_codebooks))
    crop_s = int(trained.crop_s) if trained.crop_s.is_integer() else trained.crop_s
    return {
        "solver": "magnet",
        "sample_rate": facts.sample_rate,
        "channels": facts.channels,
        "compression_model_checkpoint": f"//pretrained/{facts.id}",
        "compression_model_n_q": split_name(facts.id)[1],
        "interleave_stereo_codebooks": {"use": False, "per_timestep": False},
        "tokens": {"padding_with_special_token": False},
        "dataset": {"segment_duration": crop_s},
        "masking": {"span_len": decoding.span_len},
        "lm_model": "transformer_lm_magnet",
        "transformer_lm": {
            "dim": network.dim, "num_heads": network.num_heads, "num_layers": network.num_layers,
            "hidden_scale": network.ffn_ratio, "n_q": network.num_codebooks, "card": network.codebook_size,
            "dropout": 0.0, "emb_lr": None, "activation": "gelu", "norm_first": True, "bias_ff": False,
            "bias_attn": False, "bias_proj": False, "past_context": None, "causal": False, "custom": False,
            "memory_efficient": True, "attention_as_float32": False, "layer_scale": None,
            "positional_embedding": "sin", "xpos": False, "checkpointing": "none", "weight_init": "gaussian",
            "depthwise_init": "current", "zero_bias_init": True, "norm": "layer_norm", "cross_attention": False,
            "qk_layer_norm": False, "qk_layer_norm_cross": False, "attention_dropout": None, "kv_repeat": 1,
            "two_step_cfg": False, "subcodes_context": network.context,
            "compression_model_framerate": math.ceil(facts.frame_rate), "segment_duration": 0, "span_len": -1,
        },
        "codebooks_pattern": {"modeling": "parallel", "parallel": {"empty_initial": -1}},
        "conditioners": {
            "description": {
                "model": "t5",
                "t5": {"name": text_encoder, "finetune": False, "word_dropout": 0.0, "normalize_text": False},
            }
        },
        "fuser": {
            "cross_attention_pos_emb": False, "cross_attention_pos_emb_scale": 1, "sum": [], "prepend": [],
            "cross": ["description"], "input_interpolate": [],
        },
        "classifier_free_guidance": {"training_dropout": trained.guidance_dropout, "inference_coef": 3.0},
        "attribute_dropout": {},
        "generate": {
            "lm": {
                "use_sampling": not decoding.greedy, "temp": decoding.temperature, "top_k": decoding.top_k,
                "top_p": decoding.top_p, "max_cfg_coef": decoding.max_cfg_coef, "min_cfg_coef": decoding.min_cfg_coef,
                "decoding_steps": steps, "anneal_temp": decoding.anneal_temperature,
                "span_scoring": decoding.span_scoring, "span_arrangement": decoding.span_arrangement,
            }
        },
    }  # fmt: skip
