"""FAD compared with sets and closed forms of known distance (tests/fixtures/metrics)."""

import pytest
import torch
from helpers_errors import refusal
from helpers_metrics import arrays, facts, near
from torch import Tensor

from magnet_train.metrics.fad import Moments, frechet_distance

FRECHET = facts("frechet.json")
CASES = pytest.mark.parametrize("case", FRECHET["cases"], ids=lambda c: c["name"])


@pytest.fixture(scope="module")
def sets() -> dict[str, Tensor]:
    return arrays("frechet_embeddings.npz")


def test_there_are_seventeen_sets_and_seven_closed_forms():
    assert (len(FRECHET["cases"]), len(FRECHET["closed_form"])) == (17, 7)


@CASES
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_distance_of_two_sets_whatever_their_common_offset(case: dict, offset: float, sets):
    """Sums of x xᵀ would have errors up to 5e-3 with the offset and few or constant windows."""
    x, y = (Moments.of(sets[f"{case['name']}__{side}"].double() + offset) for side in "xy")
    assert x.distance(y) >= 0
    assert near(x.distance(y), case["expected"], 1e-7)


@pytest.mark.parametrize(
    "name", ["d8_n5_rankdef", "d128_n40_rankdef", "d512_n48_rankdef", "two_samples_each"]
)
def test_fewer_windows_than_dimensions_lose_nothing(name: str, sets):
    """Other implementations have errors of 1e-8 to 7e-7: square roots of near-zero eigenvalues."""
    expected = next(case["expected"] for case in FRECHET["cases"] if case["name"] == name)
    x, y = (Moments.of(sets[f"{name}__{side}"]) for side in "xy")
    assert near(x.distance(y), expected, 1e-12)


@pytest.mark.parametrize("case", FRECHET["closed_form"], ids=lambda c: c["name"])
def test_distance_with_an_analytic_answer(case: dict):
    given = arrays("frechet_closed_form.npz")
    parts = [given[f"{case['name']}__{part}"] for part in ("mu1", "sigma1", "mu2", "sigma2")]
    assert near(frechet_distance(*parts), case["expected"])


def test_distance_is_symmetric_and_zero_to_itself(sets):
    x, y = (Moments.of(sets[f"d128_n40_rankdef__{side}"]) for side in "xy")
    assert near(x.distance(y), y.distance(x))
    assert 0 <= x.distance(x) < 1e-6


def test_two_windows_are_enough_and_fewer_are_an_error():
    x, y = torch.tensor([[0.0, 0, 0], [2, 0, 0]]), torch.tensor([[0.0, 1, 0], [2, 1, 0]])
    assert near(Moments.of(x).distance(Moments.of(y)), 1.0)
    many = Moments.of(torch.randn(9, 3))
    for num in (0, 1):
        few = Moments.of(torch.randn(num, 3))
        assert f"two generated windows, there are {num}" in refusal(few.distance, many)
        assert f"two reference windows, there are {num}" in refusal(many.distance, few)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_embeddings_are_an_error(bad: float):
    assert "NaN or infinite" in refusal(Moments.of, torch.tensor([[1.0, bad]]))
