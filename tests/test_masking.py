"""Spans and mask rates: the look-up table, its statistics, and properties of all masks."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magnet_train.masking import cosine_mask_rate, expected_mask_rate, span_counts, span_mask

FIXTURES = Path(__file__).parent / "fixtures" / "reference" / "train"


def test_span_counts_are_those_of_the_reference():
    tables = json.loads((FIXTURES / "lut.json").read_text())
    for name, expected in tables.items():
        num_frames, span_len = (int(part.lstrip("Tspan")) for part in name.split("."))
        assert list(span_counts(num_frames, span_len)) == expected, name


def test_mean_mask_rate_follows_the_formula():
    rates = torch.linspace(0.05, 0.95, 10).repeat(400)
    for span_len in (1, 3, 5):
        masked = span_mask(rates, 500, span_len, torch.Generator().manual_seed(0))
        measured = masked.float().mean(1).view(400, 10).mean(0)
        counts = [max(1, span_counts(500, span_len)[round(100 * r)]) for r in rates[:10].tolist()]
        expected = torch.tensor([expected_mask_rate(u, span_len, 500) for u in counts])
        # The formula counts frames near the edge as interior ones: at most span_len - 1 of 500 are
        # covered less.
        assert (measured - expected).abs().max() < 0.004


def test_mask_rate_statistics_are_those_of_the_reference():
    rates = json.loads((FIXTURES / "mask_rates.json").read_text())["rates"]
    generator = torch.Generator().manual_seed(1)
    for name, by_rate in rates.items():
        num_frames, span_len = (int(part.lstrip("Tspan")) for part in name.split("."))
        for rate in ("0.0", "0.25", "0.5", "0.75", "0.97"):
            masked = (
                span_mask(torch.full((400,), float(rate)), num_frames, span_len, generator)
                .float()
                .mean(1)
            )
            spread = 4 * (masked.std().item() + by_rate[rate]["std_over_draws"]) / 400**0.5 + 1e-6
            assert abs(masked.mean().item() - by_rate[rate]["mean"]) < spread, (name, rate)


@given(st.integers(1, 60), st.integers(1, 12), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=60)
def test_every_mask_consists_of_complete_spans_and_is_not_empty(num_frames, span_len, rate, seed):
    if span_len > num_frames:
        with pytest.raises(ValueError, match="span_len"):
            span_mask(torch.tensor([rate]), num_frames, span_len)
        return
    mask = span_mask(
        torch.tensor([rate]), num_frames, span_len, torch.Generator().manual_seed(seed)
    )[0].tolist()
    assert any(mask)
    runs = "".join("x" if m else " " for m in mask)
    *inner, last = runs.rstrip().split(" ") if runs.strip() else [""]
    assert all(len(run) == 0 or len(run) >= span_len for run in inner)
    assert len(last) >= min(span_len, 1) and (runs.endswith("x") or len(last) >= span_len)


def test_cosine_goes_from_all_to_nothing():
    assert cosine_mask_rate(torch.tensor([0.0, 1.0])).tolist() == pytest.approx(
        [1.0, 0.0], abs=1e-6
    )
    assert cosine_mask_rate(torch.rand(100_000)).mean().item() == pytest.approx(
        2 / torch.pi, abs=0.005
    )
