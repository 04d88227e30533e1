"""Defaults taken from a checkpoint or release: network, codec, text encoder, lengths, decoding."""

import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import Namespace

from magnet_train.cli.parser import OneLineErrors
from magnet_train.common.assets import conf_path
from magnet_train.common.errors import UserError
from magnet_train.common.ranges import check_types
from magnet_train.decoding.decode import PER_STAGE, DecodingConfig
from magnet_train.release import SavedModel, widens_to_stereo
from magnet_train.resume import WEIGHTS_PARTS, read_training_checkpoint

LINKED = ("num_codebooks", "codebook_size", "text_dim")
"""Settings of the network that follow from codec and text encoder."""
UNGUIDED = {"max_cfg_coef": 1.0, "min_cfg_coef": 1.0}
"""Decoding settings of a model that learns guided logits."""
AUTO = "auto"
"""Value of --ckpt_path for the newest checkpoint of the run folder; any other is a file."""


def fit_defaults(given: Namespace) -> dict[str, Any]:
    """Defaults of `fit`, `validate`, `test`, `predict` and `doctor`.

    The model's settings come from its checkpoint or release. Without --config, all others come from
    conf/demo.yaml, or from conf/finetune.yaml if training starts from a model. With data of one's
    own, run folder and loggers are not the demo's.

    Args:
        given: options given by file or flag.

    Raises:
        UserError: if the checkpoint or release is missing or damaged.
    """
    checkpoint, init_from = given.get("ckpt_path"), given.get("model.init_from")
    inherited: dict[str, Any] = {}
    if checkpoint is not None and checkpoint != AUTO:
        inherited = settings_of_checkpoint(Path(checkpoint).expanduser())
    elif init_from is not None:
        inherited = settings_of_release(
            init_from, bool(given.get("model.distil_guidance")), given.get("model.codec")
        )
    if given.get("config"):
        return inherited
    file = conf_path("demo.yaml" if init_from is None else "finetune.yaml")
    print(f"no --config given: using {file}", file=sys.stderr)
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    if init_from is None and given.get("data.train") is not None:  # the recipe, not the demo's run
        settings["trainer"] |= {"default_root_dir": "runs/own"}
        settings["trainer"].pop("logger")
    return _merged(settings, inherited)


def settings_of_release(
    init_from: str, distils: bool = False, codec: str | None = None
) -> dict[str, Any]:
    """Settings of a model that training starts from, as defaults of `fit`.

    A model that learns guided logits is decoded without guidance. For stereo, both channels get the
    context and decoding settings of the mono model's codebooks.
    """
    trained = SavedModel.open(init_from)
    network, decoding = trained.network.to_dict(), asdict(trained.decoding)
    if codec is not None and widens_to_stereo(trained, codec):
        books = trained.network.num_codebooks
        contexts = [trained.network.stage(k).context for k in range(books)]
        network["context"] = [context for context in contexts for _ in "LR"]
        for name in PER_STAGE:
            if isinstance(decoding[name], tuple):
                mono = trained.decoding.per_stage(name, books)
                decoding[name] = [number for number in mono for _ in "LR"]
    if distils:
        decoding |= UNGUIDED
    return {
        "model": {
            "network": {k: v for k, v in network.items() if k not in LINKED},
            "codec": trained.codec["id"],
            "text_encoder": trained.text_encoder,
            "crop_s": trained.crop_s,
            "span_len": trained.decoding.span_len,
            "guidance_dropout": trained.guidance_dropout,
        },
        "generation": {"decoding": decoding},
    }


def settings_of_checkpoint(file: Path) -> dict[str, Any]:
    """Settings of the model in a checkpoint, as defaults of `fit`.

    The parser does not check defaults, so their types are checked here.
    """
    from magnet_train.module import MagnetModule

    settings = dict(read_training_checkpoint(file, WEIGHTS_PARTS)["hyper_parameters"])
    if isinstance(settings.get("lora"), dict):
        settings["lora"] = {k: v for k, v in settings["lora"].items() if k != "base_hash"}
    try:
        check_types(settings, get_type_hints(MagnetModule.__init__))
    except UserError as error:
        raise UserError(
            f"--ckpt_path {file}: {error}; written by another version, or damaged: start from its "
            "weights with --model.init_from"
        ) from error
    seed, lora = settings.pop("seed", None), settings.pop("lora", {})
    if not (settings.get("distil_guidance") or lora.get("rank")):
        settings.pop("init_from", None)  # the weights are the checkpoint's
    settings["network"] = {k: v for k, v in settings["network"].items() if k not in LINKED}
    settings |= {"lora": lora} if lora else {}
    found: dict[str, Any] = {"model": settings}
    if settings.get("distil_guidance"):
        found["generation"] = {"decoding": dict(UNGUIDED)}
    return found | ({} if seed is None else {"seed_everything": seed})


def parse_with_decoding(
    parser: OneLineErrors, kind: Any, args: list[str], **texts: str
) -> tuple[Any, dict[str, Any]]:
    """Options of a verb that loads a model, and decoding settings: the model's, unless given.

    Args:
        parser: parser of the verb.
        kind: dataclass of its options, with `checkpoint`.
        args: what the user gives.
        texts: see `OneLineErrors.add_options`.
    """

    def defaults(given: Namespace) -> dict[str, Any]:
        if (checkpoint := given.get("checkpoint", kind.checkpoint)) is None:
            return {}
        return {"decoding": asdict(SavedModel.open(checkpoint).decoding)}

    parser.add_options(kind, **texts)
    parser.add_class_arguments(DecodingConfig, "decoding", as_group=True)
    parser.late_defaults = defaults
    config = parser.parse_args(args)
    decoding = {field.name: config.decoding[field.name] for field in fields(DecodingConfig)}
    return parser.options(config), asdict(DecodingConfig(**decoding))


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if both else value
    return merged
