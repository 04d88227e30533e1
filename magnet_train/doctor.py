"""`doctor`: what a configuration needs from elsewhere, and whether it is here; `--prefetch` fetches it.

For compute nodes without network: run it with `--prefetch` where there is one, with the same cache folders.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from magnet_train.errors import UserError
from magnet_train.metrics.listeners import load_listener
from magnet_train.metrics.scoring import parse_metric
from magnet_train.weights import CLAP_MUSIC, PASST_10S, PASST_20S, VGGISH, Weights, cache_dir, find_weights

WEIGHTS: dict[str, Weights] = {
    "vggish": VGGISH, "torchvggish": VGGISH, "passt": PASST_20S, "passt-10s": PASST_10S, "clap": CLAP_MUSIC,
}  # fmt: skip
"""Of each listener that does not ship."""


@dataclass(frozen=True)
class DoctorOptions:
    """What is looked at."""

    configs: list[Path] = field(default_factory=list)
    """YAML files of `fit`, the later over the earlier; the embedded default if none is given."""
    metrics: list[str] = field(default_factory=list)
    """KIND/LISTENER each, beside those of the configuration."""
    prefetch: bool = False
    """Whether what is missing is fetched."""


@dataclass(frozen=True)
class Finding:
    """One thing that is needed."""

    what: str
    is_here: bool
    detail: str
    """Where it is, or what to do."""


def needs_of(configs: Sequence[Path]) -> dict[str, Any]:
    """Codec, text encoder and metrics that configurations name.

    Raises:
        UserError: if a file is unreadable.
    """
    import yaml

    found: dict[str, Any] = {"codec": "demo", "text_encoder": "demo", "metrics": ["fad/musicnn"]}
    for path in configs:
        try:
            content = yaml.safe_load(path.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{path}: unreadable configuration ({str(error).splitlines()[0]})") from error
        given: dict[str, Any] = {}
        for name in ("model", "generation"):
            section = content.get(name) or {} if isinstance(content, dict) else None
            if not isinstance(section, dict):
                raise UserError(f"{path}: no configuration of `fit`; it has sections such as model: and generation:")
            given |= {k: v for k, v in section.items() if v is not None}
        found |= {k: v for k, v in given.items() if k in found}
        if not isinstance(found["metrics"], list):
            raise UserError(f"{path}: generation.metrics={found['metrics']}: give a list")
    return found


def doctor(options: DoctorOptions) -> list[Finding]:
    """A finding for every component: tried by loading it from what is here, or with `prefetch` from its source."""
    from magnet_train.codec import load_codec
    from magnet_train.conditioning import load_text_encoder

    if not options.prefetch:
        os.environ["HF_HUB_OFFLINE"] = "1"  # looking must not fetch
    needs = needs_of(options.configs)
    metrics = [*needs["metrics"], *options.metrics]
    listeners = dict.fromkeys(parse_metric(metric)[1] for metric in metrics)
    checks: list[tuple[str, Callable[[], Any]]] = [
        (f"codec {needs['codec']}", lambda: load_codec(needs["codec"]).facts.hash),
        (f"text encoder {needs['text_encoder']}", lambda: load_text_encoder(needs["text_encoder"]).id),
        *((f"metrics of {name}", lambda name=name: _listener(name, options.prefetch)) for name in listeners),
    ]
    findings = []
    for what, check in checks:
        try:
            findings.append(Finding(what, True, str(check())))
        except UserError as error:
            findings.append(Finding(what, False, str(error)))
    return findings


def _listener(name: str, prefetch: bool) -> str:
    """Where its weights are, hash and licence included."""
    weights = WEIGHTS.get(name)
    if weights is None:
        return f"ships ({load_listener(name).hash})"
    target = cache_dir() / weights.file
    if not prefetch and not target.is_file():
        size = f"{weights.size / 1e6:,.0f} MB, licence {weights.licence}"
        raise UserError(f"not at {target}; doctor --prefetch fetches {weights.url} ({size})")
    file = find_weights(weights)
    if name == "clap":  # its tokenizer comes from the hub
        load_listener(name)
    return f"{file.path} ({file.hash}, licence {weights.licence})"
