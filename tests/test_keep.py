"""Which codes are given; windows decode every frame to regenerate once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magnet_train.common.errors import UserError
from magnet_train.decoding.keep import Edit, Hints, onset_frames, windows

RATE, FRAME_RATE, CROP_S = 16_000, 25.0, 10.0
frames = st.lists(st.booleans(), min_size=1, max_size=120).map(torch.tensor)


def plan(seconds: float = 12.0, rate: int = RATE, **settings):
    return Edit(**settings).plan(round(seconds * rate), rate, FRAME_RATE, 5, CROP_S)


@given(frames, st.integers(2, 40), st.data())
def test_windows_decode_every_open_frame_once_and_know_what_lies_before(to_decode, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    cuts = data.draw(st.lists(st.integers(1, 119), max_size=3))
    left = to_decode.clone()
    for window in windows(to_decode, size, overlap, cuts):
        assert window.end - window.start == min(size, len(to_decode))
        assert window.first == int(left.nonzero()[0])
        assert window.start <= max(0, window.first - overlap) or window.end == len(to_decode)
        assert window.first < window.stop <= window.end
        assert not any(window.first < cut < window.stop for cut in cuts)
        left[: window.stop] = False
    assert not left.any()


def test_a_short_gap_lies_in_the_middle_and_a_gap_at_the_border_is_left_to_the_next_window():
    to_decode = torch.zeros(300, dtype=torch.bool)
    to_decode[100:110] = to_decode[140:170] = True
    first, second = windows(to_decode, 100, 40)
    assert (first.start, first.stop) == (55, 140)
    assert (second.first, second.stop) == (140, 200)


@given(
    frames,
    st.floats(0.05, 1),
    st.none() | st.floats(0.01, 2),
    st.integers(0, 5),
    st.integers(0, 2),
    st.integers(0, 2),
)
def test_hints_stay_within_the_regions_and_what_is_outside_always_stays(
    to_decode, intensity, period, codebooks, coarse, fine
):
    hints = Hints(intensity, period, None, codebooks, coarse, fine)
    given_codes = hints.given(to_decode, 5, FRAME_RATE, place="7")
    assert given_codes.shape == (5, len(to_decode)) and given_codes[:, ~to_decode].all()
    assert given_codes[:coarse].all() and given_codes[5 - fine :].all()
    assert torch.equal(given_codes, hints.given(to_decode, 5, FRAME_RATE, place="7"))
    if period is None and to_decode.any() and coarse + fine < 5:
        middle = given_codes[coarse : 5 - fine, to_decode]
        assert (~middle).any(0).sum() >= max(1, round(intensity * int(to_decode.sum())))
    if 0 < codebooks <= 5 - fine:
        assert not given_codes[max(codebooks, coarse) : 5 - fine, to_decode].any()


def test_hints_by_period_and_by_onset():
    to_decode = torch.ones(100, dtype=torch.bool)
    periodic = Hints(hint_period_s=0.4).given(to_decode, 5, FRAME_RATE)
    assert (periodic.all(0).nonzero().diff(dim=0) == 10).all() and periodic[0].sum() == 10
    wav = torch.zeros(64_000)
    wav[16_000:16_400] = torch.randn(400)
    onsets = onset_frames(wav, 640, 100)
    assert onsets.nonzero()[:, 0].tolist() in ([24], [25])
    near = Hints(hint_onsets_s=0.08).given(to_decode, 5, FRAME_RATE, onsets)
    assert near[0].sum() == 5 and near[0, 25]


def test_an_edit_in_frames():
    assert plan(regenerate=((4, 8),)).to_decode.nonzero()[:, 0].tolist() == list(range(100, 200))
    assert torch.equal(
        plan(keep=((0, 4),)).to_decode, plan(regenerate=((4, float("inf")),)).to_decode
    )
    longer = plan(to_s=20.0)
    assert longer.num_samples == 320_000 and len(longer.to_decode) == 500
    assert longer.to_decode.nonzero()[0] == 299  # the last frame is regenerated for the join
    loop = plan(loop_s=7.5, loop_start_s=2.0)
    assert (loop.start, loop.num_samples, len(loop.to_decode)) == (32_000, 120_000, 188)
    assert (
        loop.to_decode[:25].all()
        and loop.to_decode[-25:].all()
        and not loop.to_decode[25:-25].any()
    )
    assert plan(hints=Hints(intensity=0.5)).to_decode.all()
    short = plan(seconds=3.0, loop_s=8.0, regenerate=((1.0, 1.4),)).to_decode
    assert short[25:35].all() and short[75:].all() and not short[36:74].any()


@pytest.mark.parametrize(
    ("settings", "recorded"),
    [
        ({"to_s": 20.0}, 299),
        ({"to_s": 20.0, "from_s": 4.0}, 99),
        ({"seconds": 3.0, "loop_s": 8.0, "regenerate": ((1.0, 1.4),)}, 74),
        ({"regenerate": ((4, 8),)}, 300),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "hints",
    [Hints(0.5), Hints(hint_period_s=0.2), Hints(keep_coarse=1), Hints(keep_fine=2)],
    ids=str,
)
def test_hints_keep_nothing_where_there_is_no_recording(settings, recorded, hints):
    settings = {"seconds": 12.0} | settings
    edit = Edit(hints=hints, **{k: v for k, v in settings.items() if k != "seconds"})
    planned = plan(**settings, hints=hints)
    assert abs(planned.num_recorded - recorded) <= 1
    kept = edit.given(planned, 5, FRAME_RATE)
    assert not kept[:, planned.num_recorded :].any()
    within = hints.given(planned.to_decode, 5, FRAME_RATE)
    assert torch.equal(kept[:, : planned.num_recorded], within[:, : planned.num_recorded])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "nothing left to decode"),
        ({"keep": ((0, 12),)}, "nothing left"),
        ({"regenerate": ((4, 8),), "keep": ((0, 4),)}, "not both"),
        ({"regenerate": ((4, 13),)}, "outside the recording, which has 12.000 s"),
        ({"regenerate": ((-1, 2),)}, "outside"),
        ({"regenerate": ((8, 4),)}, "empty"),
        ({"regenerate": ((4, 4.01),)}, "shorter than a frame"),
        ({"regenerate": ((4, float("nan")),)}, "4:nan: outside the recording"),
        ({"keep": ((float("nan"), 4),)}, "nan:4: outside the recording"),
        ({"regenerate": ((2, 4),), "hints": Hints(hint_period_s=0.001)}, "nothing left"),
        ({"keep": ((4, 8), (7, 9))}, "overlaps"),
        ({"to_s": 12.0}, "--to_s 12"),
        ({"from_s": 13.0, "to_s": 20.0}, "--from_s 13"),
        ({"from_s": 3.0}, "--to_s"),
        ({"loop_s": 10.5}, "10.5 s: must be between"),
        ({"loop_s": 60 / 130}, "7384.62 samples at 16000 Hz"),
        ({"loop_s": 4.0, "loop_start_s": 12.0}, "--loop_start_s"),
        ({"loop_s": 4.0, "to_s": 20.0}, "without --to_s"),
        ({"regenerate": ((4, 8),), "hints": Hints(keep_coarse=3, keep_fine=2)}, "nothing left"),
        ({"regenerate": ((4, 8),), "hints": Hints(0.5, hint_codebooks=99)}, "--hint_codebooks 99"),
    ],
    ids=str,
)
def test_an_edit_that_does_not_fit_is_refused_in_one_line(settings, says):
    with pytest.raises(UserError, match=says) as refused:
        plan(**settings)
    assert "\n" not in str(refused.value)
