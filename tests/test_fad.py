"""FAD against sets and closed forms whose distance is known otherwise (tests/fixtures/metrics)."""

import pickle

import pytest
import torch
from helpers_metrics import arrays, facts, near
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.metrics.fad import FrechetAudioDistance, Moments, frechet_distance

FRECHET, STREAMING = facts("frechet.json"), facts("streaming.json")


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.double()
    return x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1])


@pytest.fixture(scope="module")
def sets() -> dict[str, Tensor]:
    return arrays("frechet_embeddings.npz")


def test_there_are_seventeen_sets_and_seven_closed_forms():
    assert (len(FRECHET["cases"]), len(FRECHET["closed_form"])) == (17, 7)


@pytest.mark.parametrize("case", FRECHET["cases"], ids=lambda c: c["name"])
def test_distance_of_two_sets(case: dict, sets: dict[str, Tensor]):
    x, y = sets[case["name"] + "__x"], sets[case["name"] + "__y"]
    direct = frechet_distance(*moments(x), *moments(y))
    metric = FrechetAudioDistance(x.shape[1])
    for part in x.split(37):
        metric.update(part)
    for part in y.split(23):
        metric.update_reference(part)
    for value in (direct, metric.compute().item()):
        assert value >= 0
        assert near(value, case["expected"], 1e-7)


@pytest.mark.parametrize("name", ["d8_n5_rankdef", "d128_n40_rankdef", "d512_n48_rankdef", "two_samples_each"])
def test_fewer_windows_than_dimensions_lose_nothing(name: str, sets: dict[str, Tensor]):
    """The usual roads lose 1e-8 to 7e-7 here, where eigenvalues that should be zero have roots that are not."""
    expected = next(case["expected"] for case in FRECHET["cases"] if case["name"] == name)
    x, y = (Moments.of(sets[f"{name}__{side}"]) for side in "xy")
    assert near(x.distance(y), expected, 1e-12)


@pytest.mark.parametrize("case", FRECHET["closed_form"], ids=lambda c: c["name"])
def test_distance_with_an_analytic_answer(case: dict):
    given = arrays("frechet_closed_form.npz")
    parts = [given[f"{case['name']}__{part}"] for part in ("mu1", "sigma1", "mu2", "sigma2")]
    assert near(frechet_distance(*parts), case["expected"])


def test_distance_is_symmetric_and_zero_to_itself(sets: dict[str, Tensor]):
    x, y = moments(sets["d128_n40_rankdef__x"]), moments(sets["d128_n40_rankdef__y"])
    assert near(frechet_distance(*x, *y), frechet_distance(*y, *x))
    assert 0 <= frechet_distance(*x, *x) < 1e-6


def test_two_windows_are_enough():
    metric = FrechetAudioDistance(3)
    metric.update(torch.tensor([[0.0, 0, 0], [2, 0, 0]]))
    metric.update_reference(torch.tensor([[0.0, 1, 0], [2, 1, 0]]))
    assert near(metric.compute().item(), 1.0)


def test_sums_survive_means_far_from_zero():
    """In float32 sums this comes out negative; the values are what the same windows give without their offset."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 16, generator=generator, dtype=torch.float64)
    y = 1.2 * torch.randn(300, 16, generator=generator, dtype=torch.float64) + 0.1
    expected = frechet_distance(*moments(x), *moments(y))
    metric = FrechetAudioDistance(16)
    for part in (x + 1e4).split(50):
        metric.update(part)
    metric.update_reference(y + 1e4)
    assert near(metric.compute().item(), expected)


@pytest.mark.parametrize("order", [1, -1])
def test_chunks_and_their_order_do_not_matter(order: int):
    """One of the chunks is empty."""
    given = arrays("streaming.npz")
    metric = FrechetAudioDistance(given["gen"].shape[1])
    for first, last in STREAMING["chunks"][::order]:
        metric.update(given["gen"][first:last])
    metric.update_reference(given["ref"])
    assert near(metric.compute().item(), STREAMING["expected_fd"])


def test_an_item_counts_once():
    """The padded duplicate of a distributed sampler, 199.92 where it is counted twice."""
    given = arrays("streaming.npz")
    metric = FrechetAudioDistance(given["gen"].shape[1])
    for clip in [*range(13), 0, 7]:
        metric.update(given["gen"][given["gen_clip"] == clip], key=str(clip))
    for _ in range(2):  # the same name on the other side is another item
        metric.update_reference(given["ref"], key="0")
    assert near(metric.compute().item(), STREAMING["expected_fd"])


def test_reset_forgets_sums_and_names():
    metric = FrechetAudioDistance(2)
    metric.update(torch.randn(5, 2), key="a")
    metric.update_reference(torch.randn(5, 2), key="a")
    metric.compute()
    metric.reset()
    x = torch.tensor([[0.0, 0], [1, 1]])
    metric.update(x, key="a")
    metric.update_reference(x, key="a")
    assert metric.compute().item() < 1e-9


def test_a_later_reference_changes_the_distance():
    metric = FrechetAudioDistance(1)
    metric.update(torch.tensor([[0.0], [1.0]]))
    metric.update_reference(torch.tensor([[0.0], [1.0]]))
    assert metric.compute().item() < 1e-9
    metric.update_reference(torch.tensor([[9.0]]))
    assert metric.compute().item() > 1


@pytest.mark.parametrize("side", ["generated", "reference"])
@pytest.mark.parametrize("windows", [0, 1])
def test_fewer_than_two_windows_are_an_error(side: str, windows: int):
    metric = FrechetAudioDistance(4)
    few, many = torch.randn(windows, 4), torch.randn(9, 4)
    metric.update(few if side == "generated" else many)
    metric.update_reference(few if side == "reference" else many)
    with pytest.raises(UserError, match=f"{side} windows"):
        metric.compute()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_embedding_names_its_clip(bad: float):
    metric = FrechetAudioDistance(4)
    x = torch.randn(3, 4)
    x[1, 2] = bad
    with pytest.raises(UserError, match="clip bach_01"):
        metric.update(x, key="bach_01")
    with pytest.raises(ValueError, match="NaN or infinite"):
        frechet_distance(torch.full((2,), bad), torch.eye(2), torch.zeros(2), torch.eye(2))


def test_another_width_is_an_error():
    metric = FrechetAudioDistance(4)
    with pytest.raises(ValueError, match="n x 4"):
        metric.update(torch.randn(3, 5))
    with pytest.raises(ValueError, match="n x 4"):
        metric.update_reference(torch.randn(4))
    with pytest.raises(ValueError, match="width"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3))


@pytest.mark.parametrize("case", FRECHET["cases"], ids=lambda c: c["name"])
def test_an_offset_common_to_both_sets_changes_nothing(case: dict, sets: dict[str, Tensor]):
    """Plain sums of x xᵀ lose up to 5e-3 here, where windows are fewer than dimensions or constant."""
    metric = FrechetAudioDistance(case["dim"])
    for part in (sets[case["name"] + "__x"].double() + 1e4).split(19):
        metric.update(part)
    metric.update_reference(sets[case["name"] + "__y"].double() + 1e4)
    assert near(metric.compute().item(), case["expected"], 1e-7)


@pytest.mark.parametrize("first", [0, 1, 5])
def test_moments_of_parts_add_up_to_those_of_the_whole(first: int):
    x = torch.randn(9, 3) + 5
    whole, parts = Moments.of(x), Moments.of(x[:first]) + Moments.of(x[first:])
    assert parts.count == 9
    torch.testing.assert_close(parts.mean, x.double().mean(0))
    torch.testing.assert_close(parts.covariance(), torch.cov(x.double().T))
    torch.testing.assert_close(parts.scatter, whole.scatter)


def test_moments_name_what_they_cannot_take():
    with pytest.raises(ValueError, match="not n x d"):
        Moments.of(torch.randn(4))
    with pytest.raises(UserError, match="NaN or infinite"):
        Moments.of(torch.tensor([[1.0, float("nan")]]))
    for few in (torch.zeros(0, 2), torch.zeros(1, 2)):
        with pytest.raises(UserError, match=f"two reference windows, there are {len(few)}"):
            Moments.of(torch.randn(5, 2)).distance(Moments.of(few))


def test_a_reference_given_whole():
    given = arrays("streaming.npz")
    metric = FrechetAudioDistance(20, Moments.of(given["ref"]))
    metric.update(given["gen"])
    assert near(metric.compute().item(), STREAMING["expected_fd"])
    assert (metric.moments().count, metric.moments("reference").count) == (97, 131)
    with pytest.raises(ValueError, match="given whole"):
        metric.update_reference(given["ref"])
    with pytest.raises(ValueError, match="20 wide, not 4"):
        FrechetAudioDistance(4, Moments.of(given["ref"]))


def test_a_metric_can_be_copied_between_processes():
    metric = FrechetAudioDistance(2)
    metric.update(torch.randn(5, 2), key="a")
    copy = pickle.loads(pickle.dumps(metric))
    copy.update_reference(torch.randn(5, 2))
    assert copy.compute() > 0
