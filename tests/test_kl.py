"""KL by the name of its convention, against numbers made with numpy (tests/fixtures/metrics)."""

import numpy as np
import pytest
import torch
from helpers_metrics import arrays, facts, near
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.metrics.kl import (
    CONVENTIONS,
    KLDivergence,
    TagKL,
    clip_divergences,
    kl,
    kl_divergence,
    tag_distribution,
)

KL = facts("kl.json")


@pytest.fixture(scope="module")
def logits() -> dict[str, Tensor]:
    return arrays("kl_logits.npz")


def test_audiocrafts_convention(logits: dict[str, Tensor]):
    generated, reference = (logits[side].double().softmax(-1) for side in ("gen", "ref"))
    segments = kl_divergence(reference, generated)
    torch.testing.assert_close(segments, torch.tensor(KL["audiocraft_per_segment"]).double(), rtol=1e-6, atol=1e-9)
    backward = kl_divergence(generated, reference).mean().item()
    assert near(segments.mean().item(), KL["audiocraft"]["kld"])
    assert near(backward, KL["audiocraft"]["kld_qp"])
    assert near(segments.mean().item() + backward, KL["audiocraft"]["kld_both"])
    single = kl_divergence(logits["ref"].softmax(-1), logits["gen"].softmax(-1)).mean().item()
    assert near(single, KL["float32_torch_value"], 1e-5)


def test_other_conventions_in_use(logits: dict[str, Tensor]):
    """The same divergence by another direction, epsilon, or order of averaging."""
    generated, reference = logits["gen"].double(), logits["ref"].double()
    p, q = reference.softmax(-1), generated.softmax(-1)
    variants = KL["aggregation_variants"]
    clips = [logits["clip"] == clip for clip in logits["clip"].unique()]

    def by_clip(x: Tensor) -> Tensor:
        return torch.stack([x[clip].mean(0) for clip in clips])

    for value, expected in (
        (kl_divergence(p, q, epsilon=0), KL["no_eps_KL_ref_gen"]),
        (kl_divergence(q, p, epsilon=0), KL["no_eps_KL_gen_ref"]),
        (by_clip(kl_divergence(p, q)), variants["mean_over_clips_of_segment_means"]),
        (kl_divergence(by_clip(p), by_clip(q)), variants["mean_probabilities_then_kl"]),
        (kl_divergence(by_clip(reference).softmax(-1), by_clip(generated).softmax(-1)),
         variants["mean_logits_then_softmax_then_kl"]),
        (kl_divergence(reference.sigmoid(), generated.sigmoid()), KL["audioldm_eval_sigmoid"]),
    ):  # fmt: skip
        assert near(value.mean().item(), expected, 1e-5)


@pytest.mark.parametrize("case", KL["edge_cases"], ids=lambda c: c["name"])
def test_edge_cases_of_kl(case: dict):
    reference, generated = (torch.tensor(case[side], dtype=torch.float64) for side in ("ref", "gen"))
    assert kl_divergence(reference, generated).item() == pytest.approx(case["audiocraft"], abs=1e-9)


def test_tag_kl_averages_windows_then_clips():
    """Sum-normalised sigmoids: their own convention, equal to a few lines of numpy."""
    rng = np.random.default_rng(0)
    pairs = [(rng.uniform(0.01, 0.99, (n, 50)), rng.uniform(0.01, 0.99, (m, 50))) for n, m in ((3, 5), (1, 1), (4, 2))]
    expected = []
    for reference, generated in pairs:
        p, q = (x.mean(0) / x.mean(0).sum() for x in (reference, generated))
        expected.append((p * (np.log(p) - np.log(q + 1e-6))).sum())
    metric = TagKL()
    for i, (reference, generated) in enumerate(pairs):
        for _ in range(2):
            metric.update(torch.from_numpy(reference), torch.from_numpy(generated), key=str(i))
    assert near(metric.compute().item(), float(np.mean(expected)), 1e-9)
    mean = torch.from_numpy(pairs[0][0]).mean(0)
    torch.testing.assert_close(tag_distribution(mean).sum(), torch.tensor(1.0, dtype=torch.float64))


def test_tag_kl_of_no_clip_is_an_error():
    with pytest.raises(UserError, match="has no clips"):
        TagKL().compute()


def by_clip(logits: dict[str, Tensor], side: str) -> list[Tensor]:
    return [logits[side][logits["clip"] == clip] for clip in logits["clip"].unique()]


EXPECTED = {
    "audiocraft": KL["audiocraft"]["kld"],
    "audioldm_eval": KL["audioldm_eval_softmax"],
    "audioldm_eval-sigmoid": KL["audioldm_eval_sigmoid"],
    "av-benchmark": KL["av_benchmark_softmax_no_eps"],
    "stable-audio-metrics": KL["stable_audio_metrics_mean_logits_then_KL_gen_ref"],
}


def test_all_conventions_have_a_number():
    assert CONVENTIONS.keys() == EXPECTED.keys() | {"musicnn-tags"}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_convention_by_its_name(name: str, logits: dict[str, Tensor]):
    reference, generated = by_clip(logits, "ref"), by_clip(logits, "gen")
    assert near(kl(name, reference, generated), EXPECTED[name], 1e-9)
    metric = KLDivergence(name)
    for i, (p, q) in enumerate(zip(reference, generated, strict=True)):
        for _ in range(2):
            metric.update(p, q, key=str(i))
    assert near(metric.compute().item(), EXPECTED[name], 1e-9)


def test_segments_count_alike_whichever_their_clip(logits: dict[str, Tensor]):
    """Not a mean of clips' means, which is 1.266."""
    metric = KLDivergence("audiocraft")
    for p, q in zip(by_clip(logits, "ref"), by_clip(logits, "gen"), strict=True):
        metric.update(p, q)
    assert (metric.count, len(by_clip(logits, "ref"))) == (24, 16)


@pytest.mark.parametrize("name", ["stable-audio-metrics", "musicnn-tags"])
def test_only_pooled_conventions_take_other_numbers_of_segments(name: str):
    assert clip_divergences(name, torch.rand(3, 5), torch.rand(4, 5)).shape == (1,)
    with pytest.raises(UserError, match="clip a: 3 reference segments and 4"):
        KLDivergence("audiocraft").update(torch.rand(3, 5), torch.rand(4, 5), key="a")


def test_bad_input_of_kl_is_named():
    with pytest.raises(UserError, match=r"convention=passt: choose one of audiocraft, "):
        kl("passt", [torch.rand(2, 3)], [torch.rand(2, 3)])
    with pytest.raises(UserError, match="convention=passt"):
        KLDivergence("passt")
    with pytest.raises(UserError, match="no pair of clips"):
        kl("audiocraft", [], [])
    with pytest.raises(ValueError):
        kl("audiocraft", [torch.rand(2, 3)], [])
    for bad in (*(torch.tensor([[0.0, float(x)]]) for x in ("nan", "inf", "-inf")), torch.zeros(0, 2)):
        for pair in ((bad, torch.zeros_like(bad)), (torch.zeros_like(bad), bad)):
            with pytest.raises(UserError, match="NaN"):
                clip_divergences("audiocraft", *pair)
