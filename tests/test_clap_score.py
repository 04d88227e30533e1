"""Cosines of paired embeddings, compared with NumPy's results (tests/fixtures/metrics)."""

import math

import pytest
import torch
from helpers_errors import refusal
from helpers_metrics import arrays, facts, near
from torch import Tensor

from magnet_train.metrics.clap_score import clap_summary, cosines, retrieval
from magnet_train.metrics.intervals import bootstrap_interval

CLAP = facts("clap.json")


@pytest.fixture(scope="module")
def pairs() -> dict[str, Tensor]:
    return arrays("clap_embeddings.npz")


def test_score_of_each_clip_and_its_mean(pairs: dict[str, Tensor]):
    similarities = cosines(pairs["audio"], pairs["text"])
    expected = torch.tensor(CLAP["per_clip"], dtype=torch.float64)
    torch.testing.assert_close(similarities.diagonal(), expected, rtol=0, atol=1e-9)
    summary = clap_summary(pairs["audio"], pairs["text"])
    assert near(summary.mean, CLAP["expected_mean"], 1e-9)
    assert summary.num_pairs == 37
    assert summary.interval == bootstrap_interval(similarities.diagonal())


def test_other_captions_fit_no_better_than_chance(pairs: dict[str, Tensor]):
    """The fixture's control pairs each audio with the next caption; other controls exist."""
    similarities = cosines(pairs["audio"], pairs["text"])
    assert near(
        similarities.roll(-1, 1).diagonal().mean().item(), CLAP["shuffled_text_control"], 1e-9
    )
    controls = [similarities.roll(-i, 1).diagonal().mean().item() for i in range(1, 37)]
    shuffled = clap_summary(pairs["audio"], pairs["text"]).shuffled
    assert shuffled == pytest.approx(sum(controls) / 36)


def test_retrieval_finds_a_captions_audio(pairs: dict[str, Tensor]):
    summary = clap_summary(pairs["audio"], pairs["text"])
    assert summary.recall_at_1 == CLAP["retrieval"]["text_to_audio_top1"] == summary.recall_at_10
    # Audio by caption: of the first caption its own audio comes first, of the second last, of the
    # third second.
    similarities = torch.tensor([[0.9, 0.5, 0.2], [0.1, 0.0, 0.6], [0.1, 0.5, 0.4]])
    assert [round(3 * retrieval(similarities, k)) for k in (1, 2, 3)] == [1, 2, 3]


def test_embeddings_without_content_retrieve_nothing():
    assert retrieval(torch.ones(20, 20), 10) == 0


def test_a_zero_embedding_has_cosine_zero():
    """Not NaN, and other cosines are unchanged."""
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert cosines(x, x).tolist() == [[0.0, 0.0], [0.0, 1.0]]


def test_one_pair_has_a_score_and_no_interval():
    summary = clap_summary(torch.ones(1, 3), torch.ones(1, 3))
    assert (round(summary.mean, 9), summary.interval, summary.shuffled) == (1, None, None)


def test_bad_pairs_are_named():
    good, bad = torch.ones(2, 3), torch.tensor([[1.0, 2, 3], [1, math.inf, 3]])
    assert "text embedding 1 is NaN or infinite" in refusal(cosines, good, bad)
    assert "audio embedding 1 is NaN" in refusal(clap_summary, bad, good)
