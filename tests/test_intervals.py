"""Coverage of intervals, simulated with clips from a known population."""

import numpy as np
import pytest
import torch
from helpers_errors import refusal
from helpers_metrics import arrays, facts
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.metrics.fad import Moments
from magnet_train.metrics.intervals import bootstrap_interval, frechet_interval, frechet_of_samples


def clips_of(num_clips: int, dim: int, shift: float, generator: torch.Generator) -> list[Tensor]:
    """Clips of five windows, with half of the variance between clips."""
    own = torch.randn(num_clips, 5, dim, generator=generator)
    common = torch.randn(num_clips, 1, dim, generator=generator)
    return list((0.7 * own + 0.7 * common + shift).unbind())


def fad(clips: list[Tensor], reference: Moments) -> float:
    return Moments.of(torch.cat(clips)).distance(reference)


@pytest.mark.parametrize("dim, num_clips, shift", [(8, 40, 0.3), (8, 41, 0.3), (32, 40, 0.3)])
def test_the_interval_of_fad_contains_that_of_other_clips(dim: int, num_clips: int, shift: float):
    """95 % of 150 intervals within three standard deviations, and none too wide."""
    generator = torch.Generator().manual_seed(0)
    reference = Moments.of(torch.randn(20_000, dim, generator=generator))
    others = [fad(clips_of(num_clips, dim, shift, generator), reference) for _ in range(300)]
    expected, deviation = float(np.mean(others)), float(np.std(others))
    intervals = [
        frechet_interval(clips_of(num_clips, dim, shift, generator), reference, draws=100, seed=i)
        for i in range(150)
    ]
    held = np.mean([low <= expected <= high for low, high in intervals])
    width = np.mean([high - low for low, high in intervals])
    assert held >= 0.95 - 3 * (0.95 * 0.05 / 150) ** 0.5
    assert width < 1.4 * 2 * 1.96 * deviation


def test_near_its_floor_the_interval_of_fad_is_too_wide_but_never_too_narrow():
    generator = torch.Generator().manual_seed(0)
    reference = Moments.of(torch.randn(20_000, 8, generator=generator))
    expected = np.mean([fad(clips_of(40, 8, 0, generator), reference) for _ in range(300)])
    for i in range(60):
        low, high = frechet_interval(clips_of(40, 8, 0, generator), reference, draws=100, seed=i)
        assert 0 <= low <= expected <= high


def test_drawing_with_replacement_raises_fad():
    """The reason against percentiles of the bootstrap: they exclude the true value."""
    generator = torch.Generator().manual_seed(0)
    reference = Moments.of(torch.randn(20_000, 32, generator=generator))
    clips = clips_of(40, 32, 0.3, generator)
    picks = torch.randint(40, (200, 40), generator=generator)
    times_drawn = torch.zeros(200, 40, dtype=torch.float64).scatter_add_(
        1, picks, torch.ones(200, 40).double()
    )
    draws = frechet_of_samples(clips, reference, times_drawn)
    assert torch.quantile(draws, 0.025) > fad(clips, reference)


def test_a_sample_is_the_fad_of_its_clips():
    """With offsets, clips of unequal length, an empty clip, repetitions, and fewer windows than
    dimensions.
    """
    generator = torch.Generator().manual_seed(0)
    clips = [torch.randn(n, 6, generator=generator) + 1000 for n in (3, 1, 0, 4)]
    reference = Moments.of(torch.randn(50, 6, generator=generator) + 1000)
    times_drawn = torch.tensor(
        [[1.0, 1, 1, 1], [0, 2, 0, 1], [3, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64
    )
    values = frechet_of_samples(clips, reference, times_drawn)
    for row, value in zip(times_drawn.int().tolist(), values.tolist(), strict=True):
        drawn = [clip for clip, times in zip(clips, row, strict=True) for _ in range(times)]
        assert value == pytest.approx(fad(drawn, reference), rel=1e-6)


def test_intervals_are_seeded_and_order_does_not_move_fad():
    generator = torch.Generator().manual_seed(0)
    reference = Moments.of(torch.randn(500, 4, generator=generator))
    clips = clips_of(20, 4, 1, generator)
    assert frechet_interval(clips, reference, seed=1) == frechet_interval(clips, reference, seed=1)
    assert frechet_interval(clips, reference, seed=1) != frechet_interval(clips, reference, seed=2)
    low, high = frechet_interval(clips, reference)
    assert low < fad(clips, reference) < high
    values = torch.rand(30, generator=generator)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_bootstrap_of_a_mean_is_the_fixtures():
    """Both ends are within a quarter of a standard error."""
    clap = facts("clap.json")
    ends = bootstrap_interval(torch.tensor(clap["per_clip"]), draws=4000)
    for end, expected in zip(ends, clap["bootstrap_percentile_95ci_4000"], strict=True):
        assert abs(end - expected) < 0.25 * clap["standard_error"]


def test_values_of_a_clip_are_drawn_together():
    """Ten equal values per clip count as one; as independent values they would narrow the interval
    by a factor of three.
    """
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    single = bootstrap_interval(values)
    assert bootstrap_interval([v.repeat(10) for v in values]) == pytest.approx(single)
    assert np.ptp(bootstrap_interval(values.repeat(10))) < 0.5 * np.ptp(single)


def test_too_few_clips_for_an_interval():
    reference = Moments.of(arrays("streaming.npz")["ref"])
    assert "two clips, there are 1" in refusal(bootstrap_interval, torch.zeros(1))
    assert "two clips, there are 1" in refusal(frechet_interval, [torch.randn(9, 20)], reference)
    with pytest.raises(UserError, match="two windows in half of the clips"):
        frechet_interval([torch.randn(1, 20)] * 3, reference)
