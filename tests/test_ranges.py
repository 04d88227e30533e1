"""Settings are checked against intervals and choices, in all classes; an invalid one is named."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pytest
from helpers_errors import refusal

from magnet_train.callbacks.checkpoint import RunCheckpoint
from magnet_train.callbacks.nan_guard import NanGuard
from magnet_train.callbacks.watchdog import Watchdog
from magnet_train.common.errors import UserError
from magnet_train.common.ranges import check_types, check_values
from magnet_train.data.datamodule import MagnetDataModule
from magnet_train.data.tokenize import TokenizeOptions
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.model import MagnetConfig
from magnet_train.module import MagnetModule
from magnet_train.optimizer import OptimizerConfig


@dataclass
class Options:
    share: float | None = 0.5
    seed: int = 0
    weights: tuple[float, ...] = (1.0,)
    kind: Literal["wav", "flac"] = "wav"


def check(**values) -> None:
    intervals = {"share": "[0, 1)", "seed": f"[0, {2**63 - 1}]", "weights": "(0, inf) grams"}
    check_values(Options(**values), "--", **intervals)


@pytest.mark.parametrize(
    "values", [{"share": 0}, {"share": None}, {"seed": 2**63 - 1}, {"weights": [1e-9, 1e9]}]
)
def test_ends_belong_to_an_interval_or_not(values):
    check(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 1}, "--share=1 must be at least 0 and below 1"),
        ({"share": math.nan}, "--share=nan must be"),
        ({"seed": 2**63}, "must be from 0 to 9,223,372,036,854,775,807"),
        ({"weights": (1.0, 0.0)}, r"--weights=\[1.0, 0.0\] must be above 0 grams"),
        ({"weights": (0,)}, r"--weights=0 must be above 0 grams"),
        ({"weights": ()}, "--weights="),
        ({"weights": (math.inf,)}, "--weights="),
        ({"weights": (10**400,)}, "--weights=1000"),
        ({"kind": "mp3"}, "--kind=mp3 must be wav or flac"),
    ],
)
def test_what_is_outside_is_named(values, message):
    with pytest.raises(UserError, match=message):
        check(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": "x"}, "share='x' must be float"),
        ({"share": True}, "share='True' must be float"),
        ({"seed": 1.5}, "seed='1.5' must be int"),
        ({"seed": None}, "seed='None' must be int"),
        ({"weights": 1.0}, "weights='1.0' must be tuple"),
        ({"weights": ["x"]}, "weights="),
        ({"kind": 5}, "kind='5' must be"),
    ],
)
def test_other_types_are_named(values, message):
    check_types(Options(share=1, weights=[1, 2.5]))
    check_types(Options(share=None))
    with pytest.raises(UserError, match=message):
        check_types(Options(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"decoding_steps": 20},
        {"decoding_steps": [2.5]},
        {"top_k": 1.5},
        {"negative_prompt": 5},
        {"anneal_temperature": "no"},
        {"rescore_stages": 1},
    ],
)
def test_decoding_settings_of_a_file_have_their_types(values):
    with pytest.raises(UserError, match=next(iter(values))):
        DecodingConfig.from_dict(values)


SMALL = partial(MagnetModule, network=MagnetConfig(dim=8, num_heads=1, num_layers=1))
WRONG: list[tuple[Callable[..., Any], dict[str, list[Any]]]] = [
    (TokenizeOptions, {"crop_s": [0, math.inf, math.nan], "hop_s": [-1, 1e-9], "min_s": [0, 99]}),
    (TokenizeOptions, {"shard_size": [0], "batch_size": [0], "processes": [0]}),
    (TokenizeOptions, {"mixtures": [math.inf], "split": ["a/b"]}),
    (MagnetDataModule, {"batch_size": [0, 10**12], "num_workers": [-1], "predict_split": ["dev"]}),
    (MagnetDataModule, {"crop_start": ["beat"]}),
    (NanGuard, {"max_consecutive": [0]}),
    (Watchdog, {"factor": [1.0], "min_seconds": [0]}),
    (RunCheckpoint, {"mode": ["lowest"], "save_top_k": [-7], "every_n_train_steps": [0]}),
    (DecodingConfig, {"top_p": [1.5], "temperature": [0.0], "decoding_steps": [()]}),
    (DecodingConfig, {"max_cfg_coef": [-1.0, (1.0, -2.0)], "min_cfg_coef": [(math.inf,)]}),
    (DecodingConfig, {"span_len": [0], "span_scoring": ["sum"], "top_k": [-1]}),
    (partial(MagnetConfig, num_heads=4), {"dim": [30], "context": [-2], "num_layers": [0]}),
    (SMALL, {"guidance_dropout": [1.5], "beginning_share": [1.5], "stage_sampling": ["step"]}),
    (SMALL, {"span_len": [0], "stage_weights": [[0.0], [1e308, 1e308]]}),
    (partial(SMALL, more_span_lens=(0,)), {"span_len": [3]}),
    (OptimizerConfig, {"lr": [-1], "schedule": ["linear"]}),
]


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [(make, name, v) for make, given in WRONG for name, values in given.items() for v in values],
)
def test_a_setting_out_of_range_is_named(make: Callable[..., Any], name: str, value: Any):
    text = refusal(make, **{name: value})
    assert name in text and str(value).strip("()[],") in text


def test_an_empty_list_of_numbers_is_refused_for_being_empty():
    with pytest.raises(UserError, match=r"top_p=\[\] has no number: give at least one"):
        DecodingConfig(top_p=())
