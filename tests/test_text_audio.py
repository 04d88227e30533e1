"""The text-audio scorer: parts on synthetic embeddings, the bundled scorer on the test split."""

import io
import json
import tarfile
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch
from helpers_errors import refusal
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_train.metrics.networks import frontend
from magnet_train.metrics.networks.musicnn import MusicnnOutput
from magnet_train.metrics.networks.text_audio import (
    TextAudioHead,
    clip_features,
    load_text_audio,
    sentence_features,
    true_minus_shuffled,
)

DEMO = Path(__file__).parents[1] / "data" / "demo"


class Spelling(nn.Module):
    """A text encoder of four dimensions: one state per letter, zero-padded on the right."""

    id, dim = "spelling", 4

    def forward(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        longest = max(1, *map(len, captions))
        states, mask = (
            torch.zeros(len(captions), longest, 4),
            torch.zeros(len(captions), longest, dtype=torch.bool),
        )
        for row, caption in enumerate(captions):
            for place, letter in enumerate(caption):
                states[row, place] = torch.tensor(
                    [float(ord(letter) >> shift & 1) for shift in range(4)]
                )
                mask[row, place] = True
        return states, mask


def heard(windows: int, seed: int = 0) -> MusicnnOutput:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(windows, width, generator=generator) for width in (200, 50, 1506)]
    return MusicnnOutput(draw[0], draw[1].sigmoid(), draw[2])


def test_features_of_a_clip_are_means_and_deviations():
    clip = heard(4)
    features = clip_features(clip)
    assert features.shape == (500,)
    torch.testing.assert_close(features[:200], clip.embeddings.mean(0))
    torch.testing.assert_close(features[450:], torch.logit(clip.tags).std(0, unbiased=False))
    assert (clip_features(heard(1))[250:] == 0).all()
    certain = MusicnnOutput(
        torch.zeros(2, 200), torch.tensor([[0.0] * 25 + [1.0] * 25] * 2), torch.zeros(2, 1506)
    )
    assert torch.isfinite(clip_features(certain)).all()


def test_padding_and_neighbours_do_not_change_a_sentence():
    alone = sentence_features(Spelling(), ["slow"])  # type: ignore[arg-type]
    together = sentence_features(Spelling(), ["slow", "a much longer caption", ""])  # type: ignore
    torch.testing.assert_close(together[:1], alone)
    assert (together[2] == 0).all()


def test_embeddings_are_unit_vectors():
    head = TextAudioHead(text_dim=4).eval()
    for vectors in (head.embed_audio(torch.randn(6, 500)), head.embed_text(torch.randn(6, 4))):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(6))


def test_gap_of_true_and_shuffled_captions():
    """A known gap of 0.5 with noise of 0.1 over 200 clips, and no gap."""
    generator = torch.Generator().manual_seed(1)
    noise = 0.1 * torch.randn(200, 200, generator=generator)
    mean, low, high = true_minus_shuffled(noise + 0.5 * torch.eye(200))
    assert low < mean < high
    assert mean == pytest.approx(0.5, abs=0.03)
    # The normal approximation of the mean's interval.
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / 200**0.5, rel=0.2)
    assert true_minus_shuffled(noise + 0.5 * torch.eye(200)) == (mean, low, high)
    _, low, high = true_minus_shuffled(noise)
    assert low < 0 < high


def test_gap_counts_each_clip_against_the_others_alone():
    """Calculated by hand: 1.0 - (0.2 + 0.4) / 2, 0.8 - 0.3, 0.5 - 0.1."""
    mean, *_ = true_minus_shuffled(
        torch.tensor([[1.0, 0.2, 0.4], [0.2, 0.8, 0.4], [0.1, 0.1, 0.5]])
    )
    assert mean == pytest.approx((0.7 + 0.5 + 0.4) / 3, abs=1e-6)


def test_an_interval_covers_its_value_nineteen_times_of_twenty():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        _, low, high = true_minus_shuffled(torch.randn(60, 60, generator=generator), resamples=400)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frontend, "demo_path", lambda name: tmp_path)
    assert "missing or broken" in refusal(load_text_audio.__wrapped__)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    assert "missing or broken" in refusal(load_text_audio.__wrapped__)


def test_retrieval_as_the_training_script_reports_it():
    retrieval = run_path(str(DEMO / "train_text_audio.py"))["retrieval"]

    class Same(nn.Module):
        embed_audio = embed_text = staticmethod(lambda x: F.normalize(x, dim=-1))

    places = torch.eye(20)
    found = retrieval(Same(), places, places)
    assert (found["recall_at_1"], found["recall_at_10"], found["clips"]) == (1, 1, 20)
    assert found["matched_minus_others"] == pytest.approx(1)
    assert retrieval(Same(), places, places.roll(1, 0))["recall_at_1"] == 0
    # Two clips with one caption: either is right.
    assert retrieval(Same(), places[[0, 0, 1]], places[[0, 0, 1]])["recall_at_1"] == 1


def originals_of_the_test_split(limit: int) -> list[tuple[str, MusicnnOutput]]:
    found = []
    for shard in sorted((DEMO / "shards" / "test").glob("*.tar")):
        with tarfile.open(shard) as tar:
            files = {m.name: m for m in tar.getmembers()}
            for name, member in files.items():
                if name.endswith(".reference.npz"):
                    about = json.load(
                        tar.extractfile(files[name.replace(".reference.npz", ".json")])
                    )  # type: ignore[arg-type]
                    with np.load(
                        io.BytesIO(tar.extractfile(member).read()), allow_pickle=False
                    ) as kept:  # type: ignore[union-attr]
                        parts = [torch.from_numpy(kept[side]) for side in ("embeddings", "tags")]
                    found.append((about["caption"], MusicnnOutput(*parts, features=torch.zeros(0))))
    return found[:limit]


def test_the_shipped_scorer_tells_captions_of_unseen_originals_apart():
    if not (DEMO / "text_audio" / "model.safetensors").exists():
        pytest.skip("data/demo/text_audio is not there")
    pairs = originals_of_the_test_split(200)
    if not pairs:
        pytest.skip("data/demo/shards/test is not there")
    captions, clips = zip(*pairs, strict=True)
    head, encoder = load_text_audio()
    audio = head.embed_audio(torch.stack([clip_features(clip) for clip in clips]))
    similarities = audio @ head.embed_text(sentence_features(encoder, captions)).T
    mean, low, _ = true_minus_shuffled(similarities.detach())
    assert low > 0.1, f"{mean:.3f} above {low:.3f} on {len(clips)} clips"
