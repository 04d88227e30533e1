"""What a metric must not swallow: each was seen to give a number, or NaN, before it was an error."""

import math

import numpy as np
import pytest
import torch

from magnet_train.common.errors import UserError
from magnet_train.metrics.chroma import chroma, chroma_agreement
from magnet_train.metrics.fad import FrechetAudioDistance
from magnet_train.metrics.kl import TagKL
from magnet_train.metrics.networks.musicnn import load_musicnn, reference_of
from magnet_train.metrics.networks.text_audio import TextAudioScore, true_minus_shuffled

TAGS, NAN = torch.rand(3, 50), torch.full((3, 50), math.nan)


@pytest.mark.parametrize(
    "reference, generated", [(NAN, TAGS), (TAGS, NAN), (torch.zeros(3, 50), TAGS), (torch.zeros(0, 50), TAGS)]
)
def test_tags_that_are_no_distribution_name_their_clip(reference: torch.Tensor, generated: torch.Tensor):
    with pytest.raises(UserError, match="clip bach_01"):
        TagKL().update(reference, generated, key="bach_01")


def test_other_numbers_of_tags_are_an_error():
    with pytest.raises(ValueError, match="50 reference tags and 1"):
        TagKL().update(TAGS, torch.rand(3, 1))


def test_a_text_audio_score_is_never_nan():
    with pytest.raises(UserError, match="clip b"):
        TextAudioScore().update(torch.tensor([0.5, math.nan]), ["a", "b"])
    for shape in ((1, 1), (2, 3), (0, 0)):
        with pytest.raises(ValueError, match="two clips or more"):
            true_minus_shuffled(torch.rand(shape))


def test_interval_of_the_score():
    metric = TextAudioScore()
    metric.update(torch.tensor([0.1, 0.2, 0.6]), ["a", "b", "c"])
    expected = 1.96 * np.std([0.1, 0.2, 0.6], ddof=1) / 3**0.5
    assert metric.half_interval() == pytest.approx(expected, rel=1e-6)


def test_calling_a_metric_counts_an_item_once_too():
    metric = TextAudioScore()
    for score, key in ((0.0, "a"), (0.0, "a"), (1.0, "b")):
        metric(torch.tensor([score]), [key])
    assert metric.compute().item() == 0.5
    fad = FrechetAudioDistance(2)
    fad(torch.randn(4, 2), key="a")  # no reference yet, and no error yet


def test_loud_samples_do_not_leave_the_range():
    assert torch.isfinite(load_musicnn()(32768 * torch.sin(torch.arange(64000) * 0.1)).embeddings).all()


def test_reference_of_a_clip():
    wav = torch.randn(44_100 * 6)
    kept = reference_of(wav, 44_100)
    assert kept is not None
    assert {k: (v.shape, v.dtype) for k, v in kept.items()} == {
        "embeddings": ((3, 200), np.float32), "tags": ((3, 50), np.float32),
    }  # fmt: skip
    assert reference_of(wav[:44_100], 44_100) is None


def test_agreement_counts_only_moments_that_sound():
    tone, silence = (x * np.sin(2 * np.pi * 440 * np.arange(32_000) / 16_000) for x in (1, 0))
    a, zero = chroma(tone, 16_000), chroma(silence, 16_000)
    assert chroma_agreement(a, a) == pytest.approx((1, 1))
    assert chroma_agreement(a, zero) == (0, 0)
    assert chroma_agreement(np.concatenate([a, zero]), np.concatenate([a, zero])) == pytest.approx((1, 1))
    with pytest.raises(ValueError, match="silent"):
        chroma_agreement(zero, a)
