"""Differences of two systems, paired by clip, on simulated features."""

from typing import Any

import pytest
import torch

from magnet_train.evaluation.differences import differences_text, paired_differences
from magnet_train.metrics.embedders import ClipFeatures, Embedder
from magnet_train.metrics.scoring import FeatureSet


def _no_features(wav: torch.Tensor, sample_rate: int, key: str) -> ClipFeatures:
    raise AssertionError("features are given")


EMBEDDER = Embedder("musicnn", "m", "h", 1.0, "r", "w", _no_features, convention="audiocraft")
METRICS = ["fad/musicnn", "kl/musicnn", "vendi/musicnn"]


def features(seed: int, shift: float, num_clips: int = 24) -> FeatureSet:
    """Clips of four windows; all systems' clips of one name have most of their values in common."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    found = FeatureSet(EMBEDDER)
    for i in range(num_clips):
        noise = 0.2 * torch.randn(4, 8, generator=own)
        found.embeddings[str(i)] = torch.randn(4, 8, generator=shared) + noise + shift
        found.outputs[str(i)] = (found.embeddings[str(i)] * (1 + 2 * shift)).softmax(-1)
    return found


def differences(*systems: FeatureSet) -> dict[tuple[str, str], Any]:
    named = {name: {"musicnn": part} for name, part in zip("abc", systems, strict=False)}
    reference = {"musicnn": features(9, 0.0).statistics()}
    return paired_differences(METRICS, named, reference, {name: {} for name in "abc"})


def test_a_shift_is_found_and_its_absence_is_not():
    found = differences(features(1, 0.0), features(2, 0.5), features(3, 0.0))
    assert set(found) == {(m, s) for m in METRICS[:2] for s in "bc"}  # vendi is no mean over clips
    fad, same = found["fad/musicnn", "b"], found["fad/musicnn", "c"]
    assert fad.value == pytest.approx(8 * 0.25, rel=0.3) and fad.p < 0.01
    assert same.p > 0.05 and abs(same.value) < same.half_width < fad.value
    assert found["kl/musicnn", "b"].value > 0 and found["kl/musicnn", "b"].p < 0.01
    assert found["kl/musicnn", "c"].p > 0.05
    text = differences_text("a", found)
    assert "worse, b is higher than a" in text and text.count("no difference shown") >= 1
    assert differences_text("a", {}) == ""


def test_differences_need_clips_of_the_same_names():
    few = features(2, 0.5, num_clips=3)
    assert differences(features(1, 0.0), few) == {}
