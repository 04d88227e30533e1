"""Metrics of sets, compared with fadtk, kadtk, torchmetrics, prdc and vendi-score."""

import math

import pytest
import torch
from helpers_errors import refusal
from helpers_metrics import arrays, facts
from torch import Tensor

from magnet_train.metrics.embedding_sets import (
    draws_of_clips,
    fad_infinity,
    fad_per_clip,
    kad,
    kid,
    neighbourhoods,
    subsample,
    vendi_score,
)
from magnet_train.metrics.fad import Moments

ADDONS = facts("addons.json")
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def sets() -> dict[str, Tensor]:
    return arrays("addons.npz")


def test_fad_infinity_is_fadtks(sets: dict[str, Tensor]):
    expected = ADDONS["fad_infinity"]
    draws = [sets[f"fadinf_idx_{i}"] for i in range(8)]
    found = fad_infinity(sets["fadinf_gen"], Moments.of(sets["ref"]), draws)
    values = {"expected": found.value, "slope": found.slope, "r2": found.r2}
    assert values == pytest.approx({k: expected[k] for k in values}, rel=TOLERANCE)


def test_draws_for_fad_infinity_are_whole_clips():
    lengths = [3, 1, 2, 4, 5, 1, 2, 3]
    clip_of_row = torch.repeat_interleave(torch.arange(8), torch.tensor(lengths))
    draws = draws_of_clips(lengths, points=7)
    assert [clip_of_row[rows].unique().numel() for rows in draws] == [2, 3, 4, 5, 6, 7, 8]
    for rows in draws:
        clips = clip_of_row[rows].unique().tolist()
        assert sorted(rows.tolist()) == [
            i for i, clip in enumerate(clip_of_row.tolist()) if clip in clips
        ]
    assert all(torch.equal(a, b) for a, b in zip(draws, draws_of_clips(lengths, 7), strict=True))
    assert any(
        not torch.equal(a, b)
        for a, b in zip(draws, draws_of_clips(lengths, 7, seed=1), strict=True)
    )


def test_fad_infinity_takes_the_bias_of_few_clips_away():
    """Clips from the reference's population: the true value is 0, but FAD is far above it; mean of
    eight draws.
    """
    generator = torch.Generator().manual_seed(0)
    reference = Moments.of(torch.randn(50_000, 8, generator=generator))
    plain, extrapolated = [], []
    for seed in range(8):
        own, common = (torch.randn(100, n, 8, generator=generator) for n in (5, 1))
        windows = ((own + common) / 2**0.5).flatten(0, 1)
        plain.append(Moments.of(windows).distance(reference))
        extrapolated.append(
            fad_infinity(windows, reference, draws_of_clips([5] * 100, seed=seed)).value
        )
    assert abs(sum(extrapolated)) < 0.2 * sum(plain)


def test_fad_of_each_clip(sets: dict[str, Tensor]):
    clips = {str(i): sets["gen"][sets["gen_clip"] == i] for i in range(6)}
    found = fad_per_clip(clips, Moments.of(sets["ref"]))
    assert [found[str(i)] for i in range(6)] == pytest.approx(
        ADDONS["per_clip_fad"]["expected"], rel=TOLERANCE
    )
    assert list(found) == ["4", "5", "2", "1", "3", "0"]


def test_kad_is_kadtks(sets: dict[str, Tensor]):
    x, y, expected = sets["gen"], sets["ref"], ADDONS["kad"]
    assert kad(x, y) == pytest.approx(expected["expected_torch_median"], rel=TOLERANCE)
    assert kad(x, y, expected["bandwidth_numpy_median"]) == pytest.approx(
        expected["expected_numpy_median"], rel=TOLERANCE
    )
    assert kad(x, y, bandwidth=1.0) == pytest.approx(expected["expected_bw_1"], rel=TOLERANCE)
    assert kad(x, y) != pytest.approx(kad(y, x), rel=1e-3)


@pytest.mark.parametrize("distance", [kad, kid])
def test_kernel_distances_are_unbiased(distance):
    """Windows of one population: the mean is zero for any number, so some values are negative."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(
        [
            distance(
                torch.randn(12, 4, generator=generator), torch.randn(15, 4, generator=generator)
            )
            for _ in range(400)
        ]
    )
    assert values.min() < 0
    assert abs(values.mean()) < 4 * values.std() / 20


def test_kid_is_torchmetrics(sets: dict[str, Tensor]):
    assert kid(sets["gen"], sets["ref"][:60]) == pytest.approx(
        ADDONS["kid"]["expected"], rel=TOLERANCE
    )


def test_neighbourhoods_are_prdcs(sets: dict[str, Tensor]):
    found = vars(neighbourhoods(sets["gen"], sets["ref"], ADDONS["prdc"]["k"]))
    assert found == pytest.approx({k: ADDONS["prdc"][k] for k in found}, rel=TOLERANCE)


def test_the_border_of_a_neighbourhood_is_outside():
    """Integers on a line, k = 1: every neighbourhood has radius 1, exclusive."""
    real = torch.arange(4.0)[:, None]
    assert vars(neighbourhoods(torch.tensor([[-1.0], [4.0]]), real, k=1)) == {
        "precision": 0,
        "recall": 1,
        "density": 0,
        "coverage": 0,
    }


def test_vendi_score_is_vendi_scores(sets: dict[str, Tensor]):
    for side in ("gen", "ref"):
        assert vendi_score(sets[side]) == pytest.approx(ADDONS["vendi"][side], rel=TOLERANCE)
    assert vendi_score(sets["gen"][:1].repeat(7, 1)) == pytest.approx(
        ADDONS["vendi"]["identical_rows"]
    )
    few = sets["gen"][:5]  # fewer windows than dimensions: the other of two matrices
    unit = few.double() / few.double().norm(dim=1, keepdim=True)
    shares = torch.linalg.svdvals(unit).square() / 5
    assert vendi_score(few) == pytest.approx(
        (-(shares * shares.log()).sum()).exp().item(), rel=TOLERANCE
    )


def test_a_subsample_keeps_windows_and_their_order():
    x = torch.arange(50.0)[:, None]
    few = subsample(x, 20)
    assert few.shape == (20, 1)
    assert (few.diff(dim=0) > 0).all()
    assert torch.equal(few, subsample(x, 20))
    assert torch.equal(subsample(x, 50), x)


@pytest.mark.parametrize("measure", [kad, kid, neighbourhoods])
def test_bad_sets_are_named(measure):
    good, bad = torch.randn(9, 4), torch.randn(9, 4)
    bad[3, 1] = math.nan
    assert "NaN or infinite" in refusal(measure, good, bad)
    assert "there are 1: score more" in refusal(measure, torch.randn(1, 4), good)


def test_what_else_has_no_value():
    assert "zero and has no direction" in refusal(vendi_score, torch.zeros(3, 2))
    assert "needs 1 windows or more" in refusal(vendi_score, torch.zeros(0, 2))
    assert "bandwidth of 0" in refusal(kad, torch.randn(5, 2), torch.ones(5, 2))
    assert "eight clips, there are 7" in refusal(draws_of_clips, [19] * 7)
