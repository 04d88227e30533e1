"""How training captions vary: further fields merged in, parts dropped, words dropped.

A model that has met only whole, well-kept captions does not know what to do with a user's three
words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from magnet_train.common.errors import UserError

FIELDS = ("music_key", "bpm", "genre", "moods", "instrument", "keywords")
"""Fields of a shard's KEY.json that may be merged into a caption, as audiocraft's music manifests
name them; `key` of a manifest is `music_key` in shards."""


@dataclass(frozen=True)
class CaptionAugmentation:
    """Shares of training captions and words; all 0 = captions as they are.

    As in audiocraft (`data/music_dataset.py`, `modules/conditioners.py`), whose published music
    models have merge_p 0.25, both drops 0.5 and word_dropout 0.3. Its `drop_other_p` is in truth
    the share that is kept; at 0.5 that is the same.
    """

    merge_p: float = 0.0
    """Share of captions into which further fields (key, bpm, genre, moods, instrument, keywords)
    are merged, 0 to 1."""
    drop_caption_p: float = 0.0
    """Share of examples whose own caption is dropped, 0 to 1; without merged fields they have no
    text then."""
    drop_field_p: float = 0.0
    """Share of the fields that are left out of a merged caption, 0 to 1."""
    word_dropout: float = 0.0
    """Share of words that are dropped from each caption, 0 to 1; a caption of nothing else is
    without text."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise UserError(f"augmentation {name}={value}: give a share from 0 to 1")


def augmented(
    info: Mapping[str, Any], config: CaptionAugmentation, rng: np.random.Generator
) -> str:
    """The caption of an example with its fields `info`, varied.

    >>> info = {"caption": "a waltz", "bpm": 90, "moods": ["calm", "warm"]}
    >>> augmented(info, CaptionAugmentation(), np.random.default_rng(0))
    'a waltz'
    >>> augmented(info, CaptionAugmentation(merge_p=1.0), np.random.default_rng(0))
    'a waltz. bpm: 90. moods: calm, warm'
    """
    parts: list[str] = []
    if rng.random() < config.merge_p:
        values = [(name.removeprefix("music_"), info[name]) for name in FIELDS if info.get(name)]
        every = [f"{n}: {', '.join(map(str, v)) if isinstance(v, list) else v}" for n, v in values]
        parts = [part for part in every if rng.random() >= config.drop_field_p]
        rng.shuffle(parts)
    caption = "" if rng.random() < config.drop_caption_p else str(info.get("caption", ""))
    if parts:
        caption = ". ".join([*([caption.rstrip(".")] if caption else []), *parts])
    if config.word_dropout:
        caption = " ".join(word for word in caption.split() if rng.random() >= config.word_dropout)
    return caption
