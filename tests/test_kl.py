"""KL in its named conventions, compared with NumPy's results (tests/fixtures/metrics)."""

import math

import numpy as np
import pytest
import torch
from helpers_errors import refusal
from helpers_metrics import arrays, facts, near
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.metrics.kl import (
    CONVENTIONS,
    clip_divergences,
    kl_divergence,
    tag_distribution,
)

KL = facts("kl.json")
EXPECTED = {
    "audiocraft": KL["audiocraft"]["kld"],
    "audioldm_eval": KL["audioldm_eval_softmax"],
    "audioldm_eval-sigmoid": KL["audioldm_eval_sigmoid"],
    "av-benchmark": KL["av_benchmark_softmax_no_eps"],
    "stable-audio-metrics": KL["stable_audio_metrics_mean_logits_then_KL_gen_ref"],
}


@pytest.fixture(scope="module")
def logits() -> dict[str, Tensor]:
    return arrays("kl_logits.npz")


def kl(convention: str, reference: list[Tensor], generated: list[Tensor]) -> float:
    """The mean over all segments, as in a record."""
    pairs = zip(reference, generated, strict=True)
    return torch.cat([clip_divergences(convention, *pair) for pair in pairs]).mean().item()


def by_clip(logits: dict[str, Tensor], side: str) -> list[Tensor]:
    return [logits[side][logits["clip"] == clip] for clip in logits["clip"].unique()]


@pytest.mark.parametrize("name", sorted(CONVENTIONS.keys() - {"musicnn-tags"}))
def test_a_convention_by_its_name(name: str, logits):
    value = kl(name, by_clip(logits, "ref"), by_clip(logits, "gen"))
    assert near(value, EXPECTED[name], 1e-9)


def test_audiocrafts_convention_segment_by_segment(logits):
    generated, reference = (logits[side].double().softmax(-1) for side in ("gen", "ref"))
    segments = kl_divergence(reference, generated)
    expected = torch.tensor(KL["audiocraft_per_segment"]).double()
    torch.testing.assert_close(segments, expected, rtol=1e-6, atol=1e-9)
    backward = kl_divergence(generated, reference).mean().item()
    assert near(backward, KL["audiocraft"]["kld_qp"])
    assert near(segments.mean().item() + backward, KL["audiocraft"]["kld_both"])
    single = kl_divergence(logits["ref"].softmax(-1), logits["gen"].softmax(-1)).mean().item()
    assert near(single, KL["float32_torch_value"], 1e-5)


def test_other_directions_epsilons_and_orders_of_averaging(logits):
    generated, reference = logits["gen"].double(), logits["ref"].double()
    p, q = reference.softmax(-1), generated.softmax(-1)
    clips = [logits["clip"] == clip for clip in logits["clip"].unique()]

    def mean(x: Tensor) -> Tensor:
        return torch.stack([x[clip].mean(0) for clip in clips])

    values = {
        "no_eps_KL_ref_gen": kl_divergence(p, q, epsilon=0),
        "no_eps_KL_gen_ref": kl_divergence(q, p, epsilon=0),
        "mean_over_clips_of_segment_means": mean(kl_divergence(p, q)),
        "mean_probabilities_then_kl": kl_divergence(mean(p), mean(q)),
        "mean_logits_then_softmax_then_kl": kl_divergence(
            mean(reference).softmax(-1), mean(generated).softmax(-1)
        ),
    }
    expected = KL["aggregation_variants"] | KL
    for name, value in values.items():
        assert near(value.mean().item(), expected[name], 1e-5), name


@pytest.mark.parametrize("case", KL["edge_cases"], ids=lambda c: c["name"])
def test_edge_cases(case: dict):
    reference, generated = (torch.tensor(case[s], dtype=torch.float64) for s in ("ref", "gen"))
    value = kl_divergence(reference, generated).item()
    assert value == pytest.approx(case["audiocraft"], abs=1e-9)


def test_tag_kl_averages_windows_then_clips():
    """Sum-normalised sigmoids, compared with NumPy."""
    rng = np.random.default_rng(0)
    sizes = ((3, 5), (1, 1), (4, 2))
    pairs = [[rng.uniform(0.01, 0.99, (n, 50)) for n in size] for size in sizes]
    expected = []
    for reference, generated in pairs:
        p, q = (x.mean(0) / x.mean(0).sum() for x in (reference, generated))
        expected.append((p * (np.log(p) - np.log(q + 1e-6))).sum())
    sides = [[torch.from_numpy(x) for x in side] for side in zip(*pairs, strict=True)]
    assert near(kl("musicnn-tags", *sides), float(np.mean(expected)), 1e-9)
    assert tag_distribution(sides[0][0].mean(0)).sum().item() == pytest.approx(1)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_only_pooled_conventions_take_other_numbers_of_segments(name: str):
    pair = torch.rand(3, 5), torch.rand(4, 5)
    if name in ("stable-audio-metrics", "musicnn-tags"):
        assert clip_divergences(name, *pair).shape == (1,)
    else:
        assert "3 reference segments and 4" in refusal(clip_divergences, name, *pair)


def test_bad_input_is_named():
    tags = torch.rand(3, 50)
    for reference in (torch.full((3, 50), math.nan), torch.zeros(3, 50), torch.zeros(0, 50)):
        with pytest.raises(UserError, match="tags are NaN, infinite or all zero"):
            clip_divergences("musicnn-tags", reference, tags)
    for number in ("nan", "inf", "-inf"):
        bad = torch.tensor([[0.0, float(number)]])
        for pair in ((bad, torch.zeros(1, 2)), (torch.zeros(1, 2), bad)):
            assert "NaN" in refusal(clip_divergences, "audiocraft", *pair)
