"""All clips are prepared in the same way: mono, normalised, truncated to the real clip."""

import pyloudnorm
import pytest
import torch

from magnet_train.common.errors import UserError
from magnet_train.evaluation import scorer
from magnet_train.metrics.baselines import CountTables
from magnet_train.metrics.embedders import ClipFeatures, Embedder

RATE = 16_000


def clip(
    key: str = "a", level: float = 0.05, channels: int = 1, name: str = ""
) -> scorer.AudioClip:
    wav = level * torch.sin(2 * torch.pi * 440 * torch.arange(2 * RATE) / RATE)
    return scorer.AudioClip(key, wav.expand(channels, -1), RATE, name)


def embedder(name: str = "musicnn") -> Embedder:
    """Two windows of the mean level, which shows what was embedded."""

    def embed(wav: torch.Tensor, sample_rate: int, key: str) -> ClipFeatures:
        if wav.shape[1] < RATE:
            raise UserError("too short")
        return ClipFeatures(wav.mean(0).view(2, -1).square().mean(1, keepdim=True))

    return Embedder(name, "id", "hash", 1.0, "none", "1 s", embed)


@pytest.mark.parametrize("loudness", [True, False])
@pytest.mark.parametrize("channels", [1, 2])
def test_generated_clips_are_levelled_as_mono_whatever_their_channels(loudness, channels):
    (mono,) = scorer.prepare_generated([clip()], loudness)
    (found,) = scorer.prepare_generated([clip(channels=channels)], loudness)
    assert found.wav.shape == (1, 2 * RATE)
    torch.testing.assert_close(found.wav, mono.wav)
    measured = pyloudnorm.Meter(RATE).integrated_loudness(found.wav.T.double().numpy())
    assert (abs(measured + 14) < 0.1) == loudness


def test_generated_clips_are_cut_to_their_real_counterpart():
    clips = [clip("a"), clip("b")]
    lengths = [c.wav.shape[1] for c in scorer.prepare_generated(clips, seconds={"a": 1.5})]
    assert lengths == [24_000, 32_000]


def test_silence_is_an_error_unless_it_is_kept():
    silent = clip(level=0.0, name="folder/a.wav")
    with pytest.raises(UserError, match=r"folder/a\.wav: silent; .*--keep_silent true"):
        list(scorer.prepare_generated([silent], keep_silent=False))
    assert len(list(scorer.prepare_generated([silent]))) == 1
    with pytest.raises(UserError, match=r"folder/a\.wav: silent; remove it from the reference"):
        list(scorer.prepare_reference([silent]))


def test_embedding_measures_clipping_and_names_the_file_of_a_bad_clip():
    loud = scorer.AudioClip("loud", torch.ones(1, 2 * RATE), RATE)
    features = scorer.embed_clips([clip(), loud], [embedder()], "test", 2, quiet=True)["musicnn"]
    assert {key: share.item() for key, share in features.clipped.items()} == {"a": 0, "loud": 1}
    record = scorer.score_clips(["vendi/musicnn"], {"musicnn": features}, {}, {}, system="x")[0]
    assert record.clipped_share == 0.5 and record.num_clips == 2
    short = scorer.AudioClip("b", torch.ones(1, 100), RATE, "folder/b.wav")
    with pytest.raises(UserError, match=r"^folder/b\.wav: too short; remove or replace it"):
        scorer.embed_clips([short], [embedder()], "test", 1, quiet=True)


def test_a_metric_that_cannot_be_computed_is_skipped_or_raised():
    clips = [clip(), clip("b", 0.1)]
    features = scorer.embed_clips(clips, [embedder()], "test", 2, quiet=True)
    metrics = ["fad/musicnn", "vendi/musicnn", "fad/vggish"]
    with pytest.raises(UserError, match="fad/musicnn: no reference"):
        scorer.score_clips(metrics, features, {}, {}, system="x")
    skipped = []
    records = scorer.score_clips(
        metrics,
        features,
        {},
        {},
        baselines={"vendi/musicnn": {"baseline_codec": 1.5}},
        on_error=lambda metric, message: skipped.append(metric),
        system="x",
    )
    assert [record.metric for record in records] == ["vendi/musicnn"]
    assert records[0].baseline_codec == 1.5 and skipped == ["fad/musicnn"]


def test_the_clip_farthest_from_the_reference_has_the_highest_score():
    clips = [clip("a", 0.1), clip("b", 0.9), clip("c", 0.12)]
    features = scorer.embed_clips(clips, [embedder()], "test", 3, quiet=True)
    real = scorer.embed_clips(
        [clip("x", 0.1), clip("y", 0.11)], [embedder()], "test", 2, quiet=True
    )
    references = {"musicnn": real["musicnn"].statistics()}
    name, scores = scorer.scores_by_clip(["kl/musicnn", "fad/musicnn"], features, references)
    assert name == "musicnn" and max(scores, key=lambda key: scores[key]) == "b"
    assert scorer.scores_by_clip(["kl/musicnn"], features, references) == ("", {})


def test_every_rank_has_the_same_baselines_even_without_clips():
    """Features of each system are gathered, so a rank that lacks one would break the gathering."""
    tables = CountTables.count([torch.tensor([[0, 1, 1, 2]])], codebook_size=3)
    codes = {"a": torch.zeros(1, 5, dtype=torch.long)}
    drawn = scorer.drawn_codes(codes, {"a": 7}, tables.frequencies, tables)
    assert {system: found["a"].shape for system, found in drawn.items()} == {
        "unigram": (1, 5),
        "bigram": (1, 5),
    }
    assert scorer.drawn_codes({}, {}, tables.frequencies, tables) == {"unigram": {}, "bigram": {}}
    assert scorer.drawn_codes({}, {}, tables.frequencies, None) == {"unigram": {}}
