"""Reads exported models of audiocraft: `state_dict.bin` and `compression_state_dict.bin`.

Both are untrusted pickles: only tensors and plain values are read from them. Their configuration is
YAML text, parsed as data. Tensors stay in the file until they are used, so that a model of any size
needs little memory.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from magnet_train.audiocraft.names import (
    AUTOREGRESSIVE_KEYS,
    DECODING_KEYS,
    HYBRIDS,
    MODEL_FILE,
    NETWORK_KEYS,
    ORDERS,
    PUBLISHED,
    PUBLISHED_LICENCE,
    REQUIRED,
    SETTINGS_FILE,
    Pair,
    correspondence,
    text_projection,
    to_theirs,
)
from magnet_train.codec.encodec_names import to_transformers, transformers_config
from magnet_train.common.errors import UserError
from magnet_train.common.pretrained import one_line, quiet
from magnet_train.common.tensor_files import (
    check_numbers,
    check_same_shapes,
    read_pickle,
    tensor_shapes,
)
from magnet_train.common.yaml_files import flatten, parse_yaml
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.model import Magnet, MagnetConfig

MAX_KEYS = 10_000
"""Limit for a configuration; published ones have 300. YAML aliases can expand without end."""
DOWNLOAD_AGAIN = "download it again"
NOT_EXPORTED = "give a file exported by audiocraft (export_lm, export_encodec)"

Config = Mapping[str, Any]
"""audiocraft's configuration with flat keys, such as `transformer_lm.dim`."""


@dataclass(frozen=True)
class Settings:
    """A model's configuration as our types."""

    network: MagnetConfig
    conditioner: str
    """audiocraft's name of the text condition."""
    text_encoder: str
    """Name of a T5."""
    decoding: DecodingConfig
    crop_s: float
    guidance_dropout: float

    @property
    def pairs(self) -> list[Pair]:
        """Pairs of our and audiocraft's names of the weights."""
        network = self.network
        return correspondence(network.num_layers, network.num_codebooks, self.conditioner)


@dataclass(frozen=True)
class ExportedModel:
    """Content of `state_dict.bin`."""

    file: Path
    settings: Settings
    weights: Mapping[str, Tensor]
    """Tensors under audiocraft's names."""
    config: Config
    config_text: str
    version: str
    """Version of audiocraft that wrote the file."""


def read_model(folder: Path) -> ExportedModel:
    """Read and check the model in a folder, except for its codec.

    Raises:
        UserError: if the model is invalid; the message names the file, the key and the remedy.
    """
    file = folder / MODEL_FILE
    package = read_package(file)
    text, weights = _content(package, file, "no exported model (best_state, xp.cfg) in it")
    config = read_config(text, file)
    conditioner = _text_condition(config, file)
    projection = weights.get(f"{text_projection(conditioner)}.weight")
    if not isinstance(projection, Tensor) or projection.dim() != 2:
        raise UserError(
            f"{file}: no {text_projection(conditioner)}.weight with two axes; {DOWNLOAD_AGAIN}"
        )
    settings = read_settings(config, projection.shape[1], file)
    _check_weights(weights, settings, file)
    version = str(package.get("version", ""))
    return ExportedModel(file, settings, weights, config, text, version)


def read_package(path: Path) -> dict[str, Any]:
    """Read an exported file; tensors are memory-mapped, and no code in it is executed.

    Raises:
        UserError: if it is missing, damaged, or contains anything but tensors and plain values.
    """
    package = read_pickle(path, f"{DOWNLOAD_AGAIN}, or {NOT_EXPORTED}")
    if not isinstance(package, dict):
        raise UserError(
            f"{path}: contains a {type(package).__name__}, not an exported model; {NOT_EXPORTED}"
        )
    return package


def _content(
    package: Mapping[str, Any], where: Path, problem: str
) -> tuple[str, Mapping[str, Any]]:
    """Configuration and named weights of an exported file."""
    text, weights = package.get("xp.cfg"), package.get("best_state")
    if not isinstance(text, str) or not isinstance(weights, Mapping):
        raise UserError(f"{where}: {problem}; {NOT_EXPORTED}")
    if unnamed := [key for key in weights if not isinstance(key, str)]:
        raise UserError(
            f"{where}: has a tensor named {unnamed[0]!r}, which is not a string; {DOWNLOAD_AGAIN}"
        )
    return text, weights


def read_config(text: str, where: Path) -> dict[str, Any]:
    """audiocraft's YAML with flat keys; only references to other keys are resolved.

    Raises:
        UserError: if it is not a YAML mapping.
    """
    try:
        nested = parse_yaml(text)
        if not isinstance(nested, dict):
            raise ValueError(f"a {type(nested).__name__}, not a mapping")
        flat = dict(islice(flatten(nested), MAX_KEYS + 1))
        if len(flat) > MAX_KEYS:
            raise ValueError(f"more than {MAX_KEYS} keys")
    except ValueError as error:
        raise UserError(
            f"{where}: its xp.cfg is not a YAML configuration ({one_line(error)}); {DOWNLOAD_AGAIN}"
        ) from error
    return {key: _resolve(value, flat) for key, value in flat.items()}


def _resolve(value: Any, config: Config) -> Any:
    """Resolves a chain of `${key}` references; a cycle is returned unchanged."""
    seen = set()
    while isinstance(value, str) and (link := re.fullmatch(r"\$\{([\w.]+)\}", value)):
        if link[1] in seen:
            break
        seen.add(link[1])
        value = config.get(link[1])
    return value


def _order(config: Config, where: Path) -> Any:
    """`MagnetConfig.order`, by the configuration alone: weights of all three have the same names.

    Raises:
        UserError: if it is neither MAGNeT, hybrid MAGNeT nor MusicGen, or a variant that this
            package cannot compute.
    """
    if config.get("interleave_stereo_codebooks.use"):
        raise UserError(
            f"{where}: a stereo model (interleave_stereo_codebooks.use=true), which is not "
            "supported; take one without `stereo` in its name"
        )
    signs: dict[str, Any] = {
        "lm_model": config.get("lm_model", "transformer_lm_magnet"),
        "transformer_lm.causal": config.get("transformer_lm.causal", False),
        "codebooks_pattern.modeling": config.get("codebooks_pattern.modeling", "parallel"),
    }
    key: Any = tuple(map(str, signs.values()))
    order = ORDERS.get(key)
    if order is None:
        found = ", ".join(f"{key}={value}" for key, value in signs.items())
        raise UserError(
            f"{where}: neither a MAGNeT, a hybrid MAGNeT nor a MusicGen ({found}); take one of "
            f"these: {', '.join((*PUBLISHED, *HYBRIDS))}, musicgen-small, -medium or -large"
        )
    if order != "parallel":
        _check_delays(config, where)
    return order


def _check_delays(config: Config, where: Path) -> None:
    """Checks that codebook k is delayed by k columns and one, as in all published models."""
    pattern = "codebooks_pattern.delay"
    delays = config.get(f"{pattern}.delays")
    num_codebooks = min(int(_number(config, "transformer_lm.n_q", where, 1)), MAX_KEYS)
    expected = list(range(num_codebooks))
    others = [config.get(f"{pattern}.{key}") for key in ("flatten_first", "empty_initial")]
    if delays not in (None, expected) or any(others):
        raise UserError(
            f"{where}: {pattern}.delays={delays}, flatten_first and empty_initial={others}; only "
            f"delays={expected} without these are supported"
        )


def _text_condition(config: Config, where: Path) -> str:
    """audiocraft's name of the text condition, which must be the only one."""
    names = _required(config, "fuser.cross", where)
    keys = ("fuser.sum", "fuser.prepend", "fuser.input_interpolate")
    others = [key for key in keys if config.get(key)]
    if melody := [name for name in ("self_wav", "chroma") if _mentions(config, name)]:
        raise UserError(
            f"{where}: conditioned on a melody ({melody[0]}), which is not supported; take a model "
            "for text alone"
        )
    if not isinstance(names, list) or len(names) != 1 or others:
        raise UserError(
            f"{where}: conditions {names} {others}; only one text, by cross-attention, is supported"
        )
    kind = config.get(f"conditioners.{names[0]}.model")
    if kind != "t5" or f"conditioners.{names[0]}.t5.name" not in config:
        raise UserError(f"{where}: conditioners.{names[0]}.model={kind!r}; only t5 is supported")
    return str(names[0])


def _mentions(config: Config, conditioner: str) -> bool:
    """Whether a condition other than text is configured under that name."""
    return any(key.startswith(f"conditioners.{conditioner}.") for key in config)


def read_settings(config: Config, text_dim: int, where: Path) -> Settings:
    """Convert a configuration; `text_dim` is the width of the text states.

    Raises:
        UserError: if a setting is not supported.
    """
    own = dict(flatten(yaml.safe_load(SETTINGS_FILE.read_text())))
    order = _order(config, where)
    for key in REQUIRED:
        if config.get(key, own[key]) != own[key]:
            raise UserError(f"{where}: {key}={config[key]!r}; only {key}={own[key]!r} is supported")
    conditioner = _text_condition(config, where)
    # MusicGen has neither windows nor spans.
    default: Any = None if order != "autoregressive" else MagnetConfig.context
    sizes: dict[str, Any] = {
        ours: int(
            _number(config, f"transformer_lm.{theirs}", where, -1, default)
            if ours == "context"
            else _number(config, f"transformer_lm.{theirs}", where, 1)
        )
        for ours, theirs in NETWORK_KEYS.items()
    }
    try:
        network = MagnetConfig(**sizes, text_dim=text_dim, order=order)
    except UserError as error:
        raise UserError(f"{where}: its configuration's transformer_lm: {error}") from error
    return Settings(
        network=network,
        conditioner=conditioner,
        text_encoder=str(config[f"conditioners.{conditioner}.t5.name"]),
        decoding=_read_decoding(config, network, where),
        crop_s=_number(config, "dataset.segment_duration", where, 0.01),
        guidance_dropout=_number(
            config, "classifier_free_guidance.training_dropout", where, 0, default=0.3
        ),
    )


def _read_decoding(config: Config, network: MagnetConfig, where: Path) -> DecodingConfig:
    is_causal = network.order == "autoregressive"
    keys = AUTOREGRESSIVE_KEYS if is_causal else DECODING_KEYS
    values = {ours: config.get(f"generate.lm.{key}") for ours, key in keys.items()}
    if network.order != "parallel":
        values["autoregressive_cfg_coef"] = config.get("classifier_free_guidance.inference_coef")
    values = {name: value for name, value in values.items() if value is not None}
    if not is_causal:
        values["span_len"] = _required(config, "masking.span_len", where)
    values["greedy"] = config.get("generate.lm.use_sampling") is False
    try:
        decoding = DecodingConfig.from_dict(values)
        steps = decoding.decoding_steps
        if not is_causal and len(steps) != network.num_codebooks:
            raise ValueError(f"decoding_steps={list(steps)} for {network.num_codebooks} codebooks")
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{where}: its configuration's generate.lm: {error}") from error
    return decoding


def _required(config: Config, key: str, where: Path) -> Any:
    if config.get(key) is None:
        raise UserError(f"{where}: its configuration has no {key}; {DOWNLOAD_AGAIN}")
    return config[key]


def _number(
    config: Config, key: str, where: Path, smallest: float, default: float | None = None
) -> float:
    """A finite number of at least `smallest`."""
    value: Any = config.get(key)
    if value is None:
        value = default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not smallest <= value < math.inf:
        raise UserError(
            f"{where}: its configuration has {key}={value!r}, not a number of at least "
            f"{smallest:g}; {DOWNLOAD_AGAIN}"
        )
    return float(value)


def _check_weights(weights: Mapping[str, Any], settings: Settings, where: Path) -> None:
    """Checks counts before allocating anything of that size, then names, shapes and values."""
    network = settings.network
    for name in ("num_layers", "num_codebooks"):
        if getattr(network, name) > len(weights):
            raise UserError(
                f"{where}: {len(weights)} tensors for {name}={getattr(network, name)}; "
                "the file does not match its configuration"
            )
    with torch.device("meta"):
        expected = to_theirs(Magnet(network).state_dict(), settings.pairs)
    check_numbers(weights, where)
    check_same_shapes(tensor_shapes(expected), tensor_shapes(weights), where)
    for pair in settings.pairs:
        if len({weights[name].dtype for name in pair.theirs}) > 1:
            raise UserError(
                f"{where}: tensors like {pair.theirs[0]} have different precisions; export it again"
            )


# --- the codec ------------------------------------------------------------------------------------


def read_codec(
    package: Mapping[str, Any], out: Path, where: Path, licence: str = PUBLISHED_LICENCE
) -> None:
    """Writes a compression model as a folder of transformers' EncodecModel, padding mode included;
    `licence` goes into its README.md.

    Raises:
        UserError: if the weights do not match the configuration.
    """
    from magnet_train.common.torchaudio_import import ensure_torchaudio_imports

    ensure_torchaudio_imports()
    from transformers import EncodecConfig, EncodecModel

    problem = "neither an exported codec (best_state, xp.cfg) nor a pointer to one"
    text, weights = _content(package, where, problem)
    settings = transformers_config(read_config(text, where), str(where))
    try:
        with torch.device("meta"):
            model = EncodecModel(EncodecConfig(**settings))
    except Exception as error:  # the type depends on the invalid setting
        raise UserError(
            f"{where}: its configuration is not a codec's ({one_line(error)}); {DOWNLOAD_AGAIN}"
        ) from error
    state = {to_transformers(name): tensor for name, tensor in weights.items()}
    check_numbers(state, where)
    check_same_shapes(tensor_shapes(model.state_dict()), tensor_shapes(state), where)
    model.load_state_dict(state, assign=True)
    with quiet():
        model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # releases are shared
    (out / "audiocraft.yaml").write_text(text)  # used by `convert --to audiocraft`
    card = f"---\nlicense: {licence}\n---\n\nThe codec of {where.name}, for transformers.\n"
    (out / "README.md").write_text(card)
