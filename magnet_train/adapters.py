"""LoRA adapters (Hu et al., 2021): small trained matrices beside frozen linear layers.

A layer computes W x + alpha / rank * B A x. `adapt` adds A and B to a network and freezes the rest,
`write_adapter` and `read_adapter` store them as PEFT's two files, and `merged` adds B A to W.

Shapes: r rank, i inputs, o outputs.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_train.common.devices import to_device
from magnet_train.common.errors import UserError
from magnet_train.common.folders import write_json
from magnet_train.common.json_files import read_json
from magnet_train.common.ranges import check_values
from magnet_train.common.tensor_files import check_numbers, read_safetensors, write_safetensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""PEFT's prefix of a tensor's name."""
REMEDY = "train or copy the adapter again"
MAX_RANK = 4096
Layers = dict[str, tuple[Tensor, Tensor]]
"""A `r i` and B `o r` by the name of their layer."""


@dataclass(frozen=True)
class LoraConfig:
    """LoRA adapters, trained instead of the weights of --model.init_from."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: float | None = None
    """Adapters are scaled by alpha / rank (default: 2 * rank)."""
    dropout: float = 0.0
    """Share of each adapter's inputs dropped in a training step, at least 0 and below 1."""
    include: tuple[str, ...] = ("blocks.",)
    """Names, or parts of names, of the linear layers to adapt, such as cross_attention."""
    exclude: tuple[str, ...] = ()
    """Skip layers whose names contain any of these, such as ffn."""

    def __post_init__(self) -> None:
        check_values(self, "--lora.", rank=f"[0, {MAX_RANK}]", alpha="(0, inf)", dropout="[0, 1)")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def selects(self, layer: str) -> bool:
        """Whether a linear layer is adapted."""
        is_included = any(part in layer for part in self.include)
        return is_included and not any(part in layer for part in self.exclude)


class LoraLinear(nn.Linear):
    """A frozen linear layer with trained A and B; B starts at 0."""

    def __init__(self, linear: nn.Linear, config: LoraConfig, generator: torch.Generator):
        inputs, outputs = linear.in_features, linear.out_features
        super().__init__(inputs, outputs, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        first = torch.empty(config.rank, inputs)
        bound = inputs**-0.5  # PEFT's: Kaiming's uniform initialisation with a = sqrt(5)
        self.lora_A = nn.Parameter(first.uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(outputs, config.rank))
        self.scale = config.scale
        self.kept: Tensor | None = None
        """`i`, factor of each input in training: 0, or 1 / (1 - dropout)."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.lora_A
        if self.kept is not None and self.training:
            first = first * self.kept.to(first)
        return super().forward(x) + F.linear(F.linear(x, first), self.lora_B) * self.scale


def adapt(network: nn.Module, config: LoraConfig, generator: torch.Generator) -> list[str]:
    """Freeze a network and add adapters to its linear layers, in place; returns their names.

    Raises:
        UserError: if no layer is selected.
    """
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linear if config.selects(name)]
    if not names:
        raise UserError(
            f"--lora.include {list(config.include)}, --lora.exclude {list(config.exclude)}: no "
            f"layer is selected; its names are like {linear[-1]}"
        )
    network.requires_grad_(False)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer: Any = network.get_submodule(name)
        setattr(network.get_submodule(parent), leaf, LoraLinear(layer, config, generator))
    return names


def draw_dropout(network: nn.Module, share: float, generator: torch.Generator) -> None:
    """Draw the inputs that adapters drop until the next call.

    One draw for all frames and passes of a step, because activations are recomputed in the backward
    pass without the random state.
    """
    for module in network.modules():
        if share and isinstance(module, LoraLinear):
            kept = torch.rand(module.in_features, generator=generator) >= share
            module.kept = to_device(kept / (1 - share), module.lora_A.device)


# --- merge ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """Trained adapters of one model."""

    layers: Layers
    scale: float
    """alpha / rank, times the strength."""
    base_hash: str | None
    """`weights_hash` of the weights that they were trained on; None if unknown."""
    source: str
    """File or folder, for messages."""


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """32 hex digits of a model's weights, whatever file and precision they are stored in."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        values = weights[name].detach().float().contiguous().cpu()
        digest.update(name.encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def merged(weights: dict[str, Tensor], adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Weights with adapters added, in their precision. An adapter may have been trained on the
    given weights, or on them with earlier adapters merged.

    Raises:
        UserError: if an adapter was trained on other weights.
    """
    bases = {weights_hash(weights)} if adapters else set()
    for adapter in adapters:
        if adapter.base_hash not in (None, *bases):
            raise UserError(
                f"{adapter.source}: trained on another model ({adapter.base_hash}, this one is "
                f"{min(bases)}); use the model that it was trained on"
            )
        weights = dict(weights)
        for layer, (first, second) in adapter.layers.items():
            name, shape = f"{layer}.weight", (len(second), first.shape[1])
            if name not in weights or weights[name].shape != shape:
                raise UserError(f"{adapter.source}: the model has no {layer} of {shape}; {REMEDY}")
            added = adapter.scale * (second.float() @ first.float())
            weights[name] = (weights[name].float() + added).to(weights[name].dtype)
            if not torch.isfinite(weights[name]).all():
                raise UserError(f"{adapter.source}: {layer} overflows its precision; {REMEDY}")
        if adapter is not adapters[-1]:
            bases.add(weights_hash(weights))
    return weights


def adapter_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Only the adapters' tensors of a state dict."""
    return {name: value for name, value in state.items() if ".lora_" in name}


def layers_of(tensors: Mapping[str, Tensor], source: str) -> Layers:
    """Pairs of A and B of tensors named LAYER.lora_A and LAYER.lora_B, optionally in PEFT's form.

    Raises:
        UserError: if a tensor is of another kind, not finite, or if A or B is missing.
    """
    check_numbers(tensors, Path(source))
    plain = {k.removeprefix(PREFIX).removesuffix(".weight"): v for k, v in tensors.items()}
    layers = {name.rpartition(".")[0] for name in plain}
    names = {f"{layer}.lora_{half}" for layer in layers for half in "AB"}
    if not layers or plain.keys() != names:
        other = min(plain.keys() ^ names, default="no tensor")
        raise UserError(f"{source}: not pairs of lora_A and lora_B ({other}); {REMEDY}")
    pairs = {layer: (plain[f"{layer}.lora_A"], plain[f"{layer}.lora_B"]) for layer in layers}
    for layer, (first, second) in pairs.items():
        if first.dim() != 2 or second.dim() != 2 or len(first) != second.shape[1]:
            raise UserError(f"{source}: {layer}: lora_A and lora_B have different ranks; {REMEDY}")
    return pairs


# --- PEFT's files ---------------------------------------------------------------------------------


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], config: LoraConfig, base: str, base_hash: str
) -> None:
    """Write PEFT's two files: `tensors` are named LAYER.lora_A and LAYER.lora_B."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = layers_of(tensors, str(folder))
    named = {
        f"{PREFIX}{layer}.lora_{half}.weight": lambda value=value: value.detach().cpu()
        for layer, pair in layers.items()
        for half, value in zip("AB", pair, strict=True)
    }
    # The hash is metadata of the weights: PEFT warns of unknown keys in its configuration.
    write_safetensors(folder / WEIGHTS_FILE, named, {"base_hash": base_hash})
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.scale * config.rank,
        "lora_dropout": config.dropout,
        "target_modules": sorted(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(folder / CONFIG_FILE, settings)


def read_adapter(given: str) -> Adapter:
    """The adapter of a folder with PEFT's two files, or of a run folder, `FOLDER` or
    `FOLDER:STRENGTH`.

    Raises:
        UserError: if it is missing, damaged, or of a kind that cannot be merged here.
    """
    name, _, end = given.rpartition(":")
    try:
        strength = float(end) if name else 1.0
    except ValueError:
        name, strength = "", 1.0
    folder = Path(name or given).expanduser()
    if not math.isfinite(strength):
        raise UserError(f"--lora {given}: give a finite strength")
    if not (folder / CONFIG_FILE).is_file() and (folder / "adapter" / CONFIG_FILE).is_file():
        folder = folder / "adapter"
    config = _read_config(folder)
    adapter = _read_weights(folder, config)
    return replace(adapter, scale=adapter.scale * strength)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--lora {folder}: no adapter ({file.name}: {reason}); give its folder, or that of a "
            "run with --lora.rank"
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{file}: not a LoRA; only that kind can be used")
    numbers = [config.get(name) for name in ("r", "lora_alpha")]
    if not all(isinstance(n, int | float) and 0 < n < 1e9 for n in numbers):
        raise UserError(f"{file}: r and lora_alpha must be above 0, and are {numbers}; {REMEDY}")
    names = ("rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out", "lora_bias", "bias")
    for name in names:
        if config.get(name) not in (None, False, {}, "none"):
            raise UserError(f"{file}: {name}={config[name]!r} is not supported; train without it")
    return config


def _read_weights(folder: Path, config: dict[str, Any]) -> Adapter:
    from safetensors import safe_open

    file = folder / WEIGHTS_FILE
    layers = layers_of(read_safetensors(file, REMEDY), str(file))
    with safe_open(file, framework="pt") as opened:
        base_hash = (opened.metadata() or {}).get("base_hash")
    rank = config["r"]
    if any(len(first) != rank for first, _ in layers.values()):
        raise UserError(f"{file}: its rank is not {rank}, as {CONFIG_FILE} says; {REMEDY}")
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Adapter(layers, scale, base_hash, str(folder))


def lora_settings(config: LoraConfig, base_hash: str | None) -> dict[str, Any]:
    """Plain values for a checkpoint, read by `adapter_of_checkpoint`."""
    return asdict(config) | {
        "include": list(config.include),
        "exclude": list(config.exclude),
        "base_hash": base_hash,
    }


def adapter_of_checkpoint(
    settings: Mapping[str, Any], state: Mapping[str, Tensor], source: Path
) -> Adapter:
    """The adapters of a checkpoint: `settings` from `lora_settings`, `state` by layer names.

    Raises:
        UserError: if they are not those of a LoRA run.
    """
    config = LoraConfig(**{k: v for k, v in settings.items() if k != "base_hash"})
    layers = layers_of(adapter_tensors(state), str(source))
    return Adapter(layers, config.scale, settings["base_hash"], str(source))
