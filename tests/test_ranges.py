"""Settings are checked against intervals and choices; the first invalid one is named."""

import math
from dataclasses import dataclass
from typing import Literal

import pytest

from magnet_train.common.errors import UserError
from magnet_train.common.ranges import check_types, check_values
from magnet_train.decoding.decode import DecodingConfig


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
        ({"weights": (1.0, 0.0)}, r"--weights=\(1.0, 0.0\) must be above 0 grams"),
        ({"weights": ()}, "--weights="),
        ({"weights": (math.inf,)}, "--weights="),
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
