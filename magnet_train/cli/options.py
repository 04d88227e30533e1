"""What options mean before a parser has them: what a checkpoint or a release says holds where they say nothing."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from magnet_train.common.assets import conf_path
from magnet_train.common.errors import UserError
from magnet_train.release import SavedModel, read_checkpoint

LINKED = ("num_codebooks", "codebook_size", "text_dim")
"""Of the network: these follow from codec and text encoder."""


def completed(args: list[str]) -> list[str]:
    """The options over the configuration that holds where they say nothing.

    Raises:
        UserError: if the checkpoint or the release that they name is not there, or broken.
    """
    _check_checkpoint(args)
    given = _option("--model.init_from", args)
    start = given if given is not None else _in_configs("init_from", args)
    start = None if start == "null" else start
    bare = not any(a == "--config" or a.startswith(("--config=", "-c")) for a in args) and "--help" not in args
    if bare:
        args = ["--config", str(conf_path("demo.yaml" if start is None else "finetune.yaml")), *args]
        print(f"no --config given: using {args[1]}")
    # What a checkpoint or a release says holds unless a configuration or an option says otherwise.
    base = _settings_of_checkpoint(args) if given_checkpoints(args) else {}
    if base:
        args = [*args, "--model.init_from", "null"]  # its weights are the checkpoint's
    elif start is not None:
        base = _inherited(start)
    if base:
        place = 2 if bare and start is None else 0  # over the embedded default, which nobody asked for
        args = [*args[:place], "--config", json.dumps(base), *args[place:]]
    return args


def from_nothing(args: list[str]) -> list[str]:
    """The options without checkpoint and release."""
    kept = list(args)
    for name in ("--ckpt_path", "--model.init_from"):
        kept = [a for a in kept if not a.startswith(f"{name}=")]
        while name in kept:
            del kept[(at := kept.index(name)) : at + 2]
    return [*kept, "--model.init_from", "null"]  # over what a configuration file says


def _option(name: str, args: list[str]) -> str | None:
    """The last value given to an option."""
    given = [b for a, b in itertools.pairwise(args) if a == name]
    given += [a.split("=", 1)[1] for a in args if a.startswith(f"{name}=")]
    return given[-1] if given else None


def _in_configs(setting: str, args: list[str]) -> str | None:
    """A setting of the model in the last configuration file that has it."""
    import yaml

    files = [b for a, b in itertools.pairwise(args) if a in ("--config", "-c")]
    files += [a.split("=", 1)[1] for a in args if a.startswith("--config=")]
    for file in reversed(files):
        try:
            config = yaml.safe_load(Path(file).read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            continue  # the parser will name it
        if isinstance(config, dict) and isinstance(model := config.get("model"), dict) and model.get(setting):
            return str(model[setting])
    return None


def _inherited(init_from: str) -> dict[str, Any]:
    """What a model that training starts from says of itself, as a configuration."""
    trained = SavedModel.open(init_from)
    return {
        "model": {
            "init_from": init_from,
            "network": {k: v for k, v in trained.network.to_dict().items() if k not in LINKED},
            "codec": trained.codec["id"],
            "text_encoder": trained.text_encoder,
            "crop_s": trained.crop_s,
            "span_len": trained.decoding.span_len,
            "guidance_dropout": trained.guidance_dropout,
        },
        "generation": {"decoding": asdict(trained.decoding)},
    }


def _settings_of_checkpoint(args: list[str]) -> dict[str, Any]:
    """The settings of the model in the checkpoint that is named, as a configuration."""
    file = Path(given_checkpoints(args)[-1])
    if not file.is_file():  # last, best …: the run's own, under its own configuration
        return {}
    given = dict(read_checkpoint(file).get("hyper_parameters", {}))
    if "network" not in given:
        raise UserError(f"{file}: not a checkpoint of magnet_train; choose another")
    seed = given.pop("seed", None)
    given["network"] = {k: v for k, v in given["network"].items() if k not in LINKED}
    return {"model": given, "seed_everything": seed}


def _check_checkpoint(args: list[str]) -> None:
    """Name a missing or broken --ckpt_path before Lightning meets it, which it does while it parses."""
    for name in given_checkpoints(args):
        if name not in ("auto", "last", "best", "hpc", "registry", "null"):
            read_checkpoint(Path(name))


def given_checkpoints(args: list[str]) -> list[str]:
    given = [b for a, b in itertools.pairwise(args) if a == "--ckpt_path"]
    return given + [a.split("=", 1)[1] for a in args if a.startswith("--ckpt_path=")]
