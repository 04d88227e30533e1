"""A table of music measures of several systems, including codec and count-table baselines.

codes, captions = read_codes("data/demo/shards/test", num_clips=100, num_frames=250)
tables = CountTables.count(read_codes("data/demo/shards/train")[0].values(), codebook_size=256)
clips = {"model": read_clips(files)} | baseline_clips(codes, load_codec("demo"), tables)
print(music_table(measure_systems(clips, captions, reference="codec")))
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from magnet_train.codec.base import Codec
from magnet_train.common.tables import markdown_table
from magnet_train.data.shards import ShardSet
from magnet_train.evaluation.scorer import AudioClip, clips_from_codes, drawn_codes
from magnet_train.metrics.baselines import CountTables
from magnet_train.metrics.music import MEASURES, ClipMusic, MusicFigure, measure_clip, score_music


def read_codes(
    folder: str, num_clips: int | None = None, num_frames: int | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Codes `k t` and captions of shards, by key.

    Args:
        folder: folder of shards.
        num_clips: number of clips, spread evenly over those that are long enough (default: all).
        num_frames: frames from the start of each; shorter items are skipped (default: all frames).

    Raises:
        UserError: if a shard cannot be read.
    """
    shards = ShardSet.open(folder)
    items = [item for number in range(len(shards.counts)) for item in shards.read(number)]
    items = [item for item in items if item["codes"].shape[1] >= (num_frames or 0)]
    if num_clips is not None and num_clips < len(items):
        items = [items[i * len(items) // num_clips] for i in range(num_clips)]
    codes = {
        item["info"]["key"]: torch.from_numpy(item["codes"][:, :num_frames].astype(np.int64))
        for item in items
    }
    return codes, {item["info"]["key"]: item["info"].get("caption", "") for item in items}


def baseline_clips(
    codes: Mapping[str, Tensor], codec: Codec, tables: CountTables
) -> dict[str, Iterator[AudioClip]]:
    """Clips of real codes ("codec"), and of codes drawn by counts ("unigram", "bigram")."""
    seeds = {key: seed for seed, key in enumerate(codes)}
    systems = {"codec": codes} | drawn_codes(codes, seeds, tables.frequencies, tables)
    return {name: clips_from_codes(some, codec) for name, some in systems.items()}


def measure_systems(
    systems: Mapping[str, Iterable[AudioClip]], captions: Mapping[str, str], reference: str
) -> dict[str, dict[str, MusicFigure]]:
    """Measures of each system, with intervals over clips.

    Args:
        systems: clips by name.
        captions: captions by clip key.
        reference: system whose notes are the reference; its own value compares every second clip
            with the rest.

    Raises:
        UserError: if a clip cannot be measured.
    """
    measured: dict[str, dict[str, ClipMusic]] = {
        name: {clip.key: measure_clip(clip.wav, clip.sample_rate) for clip in clips}
        for name, clips in systems.items()
    }
    real = measured[reference]
    figures = {name: score_music(clips, captions, real) for name, clips in measured.items()}
    halves = [dict(list(real.items())[first::2]) for first in (0, 1)]
    apart = score_music(halves[0], None, halves[1])
    figures[reference] |= {
        name: figure for name, figure in apart.items() if name.startswith("note_")
    }
    return figures


def music_table(figures: Mapping[str, Mapping[str, MusicFigure]]) -> str:
    """Markdown table with a row per system and a column per measure, with intervals."""
    rows = []
    for system, some in figures.items():
        cells = [_cell(some[name]) if name in some else "" for name in MEASURES]
        rows.append([system, *cells])
    return markdown_table(["system", *MEASURES], rows)


def _cell(figure: MusicFigure) -> str:
    low, high = figure.interval or (figure.value, figure.value)
    return f"{figure.value:.3f} [{low:.3f}, {high:.3f}] n={figure.num_clips}"
