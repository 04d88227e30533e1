"""Augmentation of training captions: its rates, and that it adds no other text."""

import numpy as np
import pytest

from magnet_train.common.errors import UserError
from magnet_train.data.captions import CaptionAugmentation, augmented

INFO = {
    "caption": "A slow waltz.",
    "bpm": 90,
    "moods": ["calm", "warm"],
    "music_key": "G minor",
    "genre": None,
    "x": 1,
}


def many(config: CaptionAugmentation, n: int = 4000) -> list[str]:
    return [augmented(INFO, config, np.random.default_rng([0, i])) for i in range(n)]


def test_captions_stay_as_they_are_by_default():
    assert set(many(CaptionAugmentation(), 50)) == {"A slow waltz."}


def test_fields_are_merged_and_parts_dropped_in_the_shares_asked_for():
    made = many(CaptionAugmentation(merge_p=0.25, drop_caption_p=0.5, drop_field_p=0.5))
    own, merged = (sum(word in c for c in made) / len(made) for word in ("waltz", ": "))
    # In one eighth of that quarter all three fields are dropped.
    assert own == pytest.approx(0.5, abs=0.03) and merged == pytest.approx(0.25 * 7 / 8, abs=0.03)
    assert made.count("") / len(made) == pytest.approx(0.5 * (1 - 0.25 * 7 / 8), abs=0.03)
    parts = {part for c in made for part in c.split(". ")}
    assert parts == {
        "",
        "A slow waltz",
        "A slow waltz.",
        "bpm: 90",
        "moods: calm, warm",
        "key: G minor",
    }


def test_words_are_dropped_in_the_share_asked_for_and_keep_their_order():
    made = many(CaptionAugmentation(word_dropout=0.3))
    assert np.mean([len(c.split()) for c in made]) == pytest.approx(3 * 0.7, abs=0.05)
    assert all(
        c in ("", "A", "slow", "waltz.", "A slow", "A waltz.", "slow waltz.", "A slow waltz.")
        for c in made
    )
    assert "" in made  # nothing left: without text


def test_a_share_out_of_range_is_named():
    with pytest.raises(UserError, match=r"merge_p=1\.5"):
        CaptionAugmentation(merge_p=1.5)
