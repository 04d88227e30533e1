"""Where training crops begin."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnet_train.data.pipeline import bar_starts, crop_examples

FRAME_RATE, NUM_FRAMES, LENGTH = 25.0, 50, 200


def first_frames(info: dict, crop_start: str, number: int = 300) -> set[int]:
    """The frames at which crops of an item of 200 frames begin."""
    codes = np.arange(LENGTH)[None].repeat(2, axis=0)
    example = {"codes": codes, "num_frames": NUM_FRAMES, "info": info | {"duration_s": 8.0}}
    rng = np.random.default_rng(0)
    examples = (dict(example, rng=rng) for _ in range(number))
    cropped = list(crop_examples(examples, FRAME_RATE, crop_start))  # type: ignore[arg-type]
    assert all(crop["codes"].shape == (2, NUM_FRAMES) for crop in cropped)
    return {int(crop["codes"][0, 0]) for crop in cropped}


@given(
    bar=st.integers(10, 60),
    upbeat=st.integers(0, 40),
    offset=st.integers(0, 500),
    last=st.integers(0, 300),
)
def test_bars_start_an_integer_number_of_bars_after_the_first(bar, upbeat, offset, last):
    info = {"bar_s": bar / 25, "first_bar_s": upbeat / 25, "offset_s": offset / 25}
    expected = [
        f
        for f in range(last + 1)
        if (f + offset - upbeat) % bar == 0 and f + offset >= upbeat % bar
    ]
    if offset == 0:
        expected = sorted({0, *expected})
    assert bar_starts(info, FRAME_RATE, last) == expected


def test_crops_start_on_bar_lines_or_with_the_audio():
    info = {"bar_s": 1.6, "first_bar_s": 0.4, "offset_s": 0.0}
    assert first_frames(info, "bar") == {0, 10, 50, 90, 130}
    assert len(first_frames(info, "anywhere")) > 100


@pytest.mark.parametrize(
    "info",
    [
        {},
        {"bar_s": float("nan")},
        {"bar_s": "2"},
        {"bar_s": 0.0},
        {"bar_s": 1e5, "offset_s": 1.0},
        {"bar_s": 1.0, "first_bar_s": 1e300},
    ],
)
def test_items_without_usable_bars_are_cropped_anywhere(info):
    assert len(first_frames(info, "bar")) > 100
