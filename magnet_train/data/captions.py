"""Caption augmentation: merges metadata fields into captions, drops fields and words.

With complete captions only, short prompts would be out of distribution.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from magnet_train.common.ranges import check_values

FIELDS = ("music_key", "bpm", "genre", "moods", "instrument", "keywords")
"""Fields of a shard's KEY.json that may be merged into a caption, with the names of audiocraft's
music manifests; `key` is `music_key` in shards."""


@dataclass(frozen=True)
class CaptionAugmentation:
    """Probabilities of caption augmentation; all 0 = unchanged captions.

    As in audiocraft (`data/music_dataset.py`, `modules/conditioners.py`), whose published music
    models have merge_p 0.25, both drops 0.5 and word_dropout 0.3. Its `drop_other_p` is in fact
    the share that is kept, which is the same at 0.5.
    """

    merge_p: float = 0.0
    """Probability of merging further fields (key, bpm, genre, moods, instrument, keywords) into a
    caption, 0 to 1."""
    drop_caption_p: float = 0.0
    """Probability of dropping the caption itself, 0 to 1; without merged fields the example then
    has no text."""
    drop_field_p: float = 0.0
    """Probability of dropping each field of a merged caption, 0 to 1."""
    word_dropout: float = 0.0
    """Probability of dropping each word of a caption, 0 to 1; without words the example has no
    text."""

    def __post_init__(self) -> None:
        check_values(self, "augmentation: ", **dict.fromkeys(vars(self), "[0, 1]"))


def augmented(
    info: Mapping[str, Any], config: CaptionAugmentation, rng: np.random.Generator
) -> str:
    """The augmented caption of an example with fields `info`.

    >>> info = {"caption": "a waltz", "bpm": 90, "moods": ["calm", "warm"]}
    >>> augmented(info, CaptionAugmentation(), np.random.default_rng(0))
    'a waltz'
    >>> augmented(info, CaptionAugmentation(merge_p=1.0), np.random.default_rng(0))
    'a waltz. bpm: 90. moods: calm, warm'
    """
    fields = _drawn_fields(info, config, rng) if rng.random() < config.merge_p else []
    caption = "" if rng.random() < config.drop_caption_p else str(info.get("caption", ""))
    if fields:
        caption = ". ".join([caption.rstrip("."), *fields] if caption else fields)
    if config.word_dropout:
        caption = " ".join(word for word in caption.split() if rng.random() >= config.word_dropout)
    return caption


def _drawn_fields(
    info: Mapping[str, Any], config: CaptionAugmentation, rng: np.random.Generator
) -> list[str]:
    """Fields to merge, such as "bpm: 90", without dropped ones and in random order."""
    texts = []
    for name in FIELDS:
        if value := info.get(name):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            texts.append(f"{name.removeprefix('music_')}: {text}")
    kept = [text for text in texts if rng.random() >= config.drop_field_p]
    rng.shuffle(kept)
    return kept
