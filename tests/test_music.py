"""Music metrics on melodies, drones, noise and rhythms with known results."""

import math

import numpy as np
import pytest
import torch
from helpers_errors import refusal

from magnet_train.common.errors import UserError
from magnet_train.metrics import music
from magnet_train.metrics.chroma import chroma
from magnet_train.metrics.embedders import load_embedder
from magnet_train.metrics.reference import ReferenceStatistics
from magnet_train.metrics.scoring import FeatureSet, parse_metric, score
from magnet_train.tracking import logged

RATE = 16_000
# Degrees of a major tune that ends on its tonic, and of a minor one, in semitones above it.
MAJOR_TUNE = (0, 4, 7, 4, 5, 2, 0, 0, 7, 9, 7, 5, 4, 2, 4, 0)
MINOR_TUNE = (0, 3, 7, 3, 5, 2, 0, 0, 7, 8, 7, 5, 3, 2, 3, 0)


def tone(midi: float, seconds: float, rate: int = RATE) -> np.ndarray:
    """A plucked note with eight harmonics."""
    t = np.arange(round(seconds * rate)) / rate
    pitch = 440 * 2 ** ((midi - 69) / 12)
    partials = sum(
        np.sin(2 * np.pi * pitch * h * t) / h for h in range(1, 9) if pitch * h < rate / 2
    )
    return (partials * np.exp(-1.5 * t) * np.minimum(1, t / 0.005)).astype(np.float32)


def melody(degrees, tonic: int = 60, note_s: float = 0.3, rate: int = RATE) -> np.ndarray:
    return np.concatenate([tone(tonic + d, note_s, rate) for d in degrees])


def noise(seconds: float = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=round(seconds * RATE)).astype(np.float32)


def clicks(bpm: float, seconds: float = 10) -> np.ndarray:
    """Short bursts on each beat, in very quiet noise."""
    wav = 1e-3 * noise(seconds)
    for i, start in enumerate(np.arange(0, seconds - 0.1, 60 / bpm)):
        first = round(start * RATE)
        wav[first : first + 400] += noise(1, i)[:400] * np.exp(-np.arange(400) / 100)
    return wav


def rhythm(wav: np.ndarray) -> np.ndarray:
    return music.autocorrelation(music.onset_strength(wav, RATE))


# --- captions


@pytest.mark.parametrize(
    ("caption", "key"),
    [
        ("a slow air for flute in E flat major, 92 bpm", (3, "major")),
        ("Lively reel. In the key of F sharp minor. By X.", (6, "minor")),
        ("violin, brisk jig, in B flat major, in 6/8 time", (10, "major")),
        ("piece in C♯ minor", (1, "minor")),
        ("a tune in Bb major", (10, "major")),
        ("in a minor, slow", (9, "minor")),
        ("key: G major", (7, "major")),
        ("in C flat major", (11, "major")),
        ("a sad piece in a minor key", None),
        ("a major hit in Germany", None),
        ("trio for major players", None),
        ("", None),
    ],
)
def test_a_key_is_read_from_a_caption(caption, key):
    assert music.parse_key(caption) == key


@pytest.mark.parametrize(
    ("caption", "bpm"),
    [
        ("an air, 92 bpm", 92),
        ("an air, at 120 beats per minute, in 3/4 time", 120),
        ("techno with 128.5 BPM", 128.5),
        ("bpm: 90", 90),
        ("recorded in 1992, 7 bpm", None),
        ("from book 120", None),
    ],
)
def test_a_tempo_is_read_from_a_caption(caption, bpm):
    assert music.parse_tempo(caption) == bpm


def test_keys_and_tempos_of_the_demos_captions_are_parsed():
    """All twelve tonics in both modes and both phrasings."""
    names = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
    for tonic, name in enumerate(names):
        for mode in ("major", "minor"):
            assert music.parse_key(f"a tune on piano, in {name} {mode}, traditional") == (
                tonic,
                mode,
            )
            assert music.parse_key(f"A tune. In the key of {name} {mode}. 90 bpm.") == (tonic, mode)


# --- pitch classes


def test_a_drone_does_not_change_and_alternating_tones_do():
    """Tones alternate every half second, so chroma half a second apart differs.

    Within 0.256 s around each change, chroma mixes both tones by the area of the window's halves.
    """
    assert music.chroma_change(chroma(tone(60, 10), RATE)) == pytest.approx(0, abs=0.02)
    two = [np.sin(2 * np.pi * f * np.arange(RATE // 2) / RATE) for f in (261.63, 369.99)]
    area = np.cumsum(np.hanning(1000)) / np.hanning(1000).sum()
    cosine = (2 * area * (1 - area) / (area**2 + (1 - area) ** 2)).mean()
    without_smear = 1 - cosine * 0.256 / 0.5
    assert (
        without_smear - 0.06
        < music.chroma_change(chroma(np.concatenate(two * 10), RATE))
        < without_smear
    )


def test_chroma_change_is_that_of_written_out_vectors():
    """Classes 0 and 1 alternate every 8 frames, so all pairs half a second apart differ."""
    rows = np.repeat(np.eye(12)[[0, 1, 0, 1]], 8, axis=0)
    assert music.chroma_change(rows) == pytest.approx(1)
    assert music.chroma_change(np.repeat(np.eye(12)[:1], 32, axis=0)) == pytest.approx(0)
    rows[:8] = 0  # silence is ignored and does not count as change
    assert music.chroma_change(rows) == pytest.approx(1)
    halfway = np.full((32, 12), 12**-0.5)
    halfway[8:] = np.eye(12)[0]
    # 8 pairs of cosine 12^-1/2, and 16 pairs of cosine 1
    assert music.chroma_change(halfway) == pytest.approx(8 * (1 - 12**-0.5) / 24)


def test_scale_fit_of_known_energies():
    scale = np.eye(12)[[7, 9, 11, 0, 2, 4, 6]]  # G major
    assert music.scale_fit(scale) == pytest.approx(1 - 7 / 12)
    assert music.scale_fit(np.eye(12)) == pytest.approx(0)
    # One tone of eight outside: 7/8 within.
    assert music.scale_fit(np.concatenate([scale, np.eye(12)[[1]]])) == pytest.approx(
        7 / 8 - 7 / 12
    )
    # A minor has the notes of C major.
    assert music.scale_fit(np.eye(12)[[9, 11, 0, 2, 4, 5, 7]]) == pytest.approx(1 - 7 / 12)


def test_a_tune_fits_its_scale_and_noise_fits_none():
    tune, chromatic = melody(MAJOR_TUNE * 2), melody(range(24))
    fits = [music.scale_fit(chroma(x, RATE)) for x in (tune, chromatic, noise())]
    assert fits[0] > 0.35
    assert fits[1] < 0.1
    assert fits[2] < 0.05


@pytest.mark.parametrize("mode", ["major", "minor"])
@pytest.mark.parametrize("tonic", range(12))
def test_the_tonic_has_rank_one_and_moves_with_the_transposition(mode, tonic):
    tune = melody(MAJOR_TUNE if mode == "major" else MINOR_TUNE, 57 + (tonic - 9) % 12)
    classes = chroma(tune, RATE)
    assert music.key_rank(classes, tonic, mode) == 1
    ranks = [music.key_rank(classes, other, mode) for other in range(12)]
    assert sorted(ranks) == list(range(1, 13))
    # The tritone is among the most distant keys, the dominant or subdominant among the closest.
    assert ranks[(tonic + 6) % 12] >= 9
    assert min(ranks[(tonic + 7) % 12], ranks[(tonic + 5) % 12]) <= 3


def test_key_rank_is_pearsons_correlation():
    classes = np.random.default_rng(1).random(12)
    for mode, profile in music.PROFILES.items():
        fits = [np.corrcoef(classes, np.roll(profile, t))[0, 1] for t in range(12)]
        for tonic in range(12):
            assert music.key_rank(classes, tonic, mode) == 1 + sum(f > fits[tonic] for f in fits)


def test_silence_and_equal_pitch_classes_have_the_rank_of_chance():
    assert music.key_rank(np.zeros((5, 12)), 3, "major") == 6.5
    assert music.key_rank(np.ones((5, 12)), 3, "minor") == 6.5


# --- rhythm


@pytest.mark.parametrize("bpm", [72, 96, 120, 150])
def test_clicks_have_their_tempo_and_its_double_and_half_but_no_other(bpm):
    correlation = rhythm(clicks(bpm))
    own = music.beat_strength(correlation, bpm)
    assert own > 0.5
    assert music.periodicity(correlation) > 0.7
    assert music.beat_strength(correlation, 2 * bpm) > 0.5
    assert music.beat_strength(correlation, bpm / 2) > 0.5
    assert music.beat_strength(correlation, bpm * 1.37) < 0.1


def test_noise_and_silence_have_no_rhythm():
    correlation = rhythm(noise())
    assert music.periodicity(correlation) < 0.2
    assert abs(music.beat_strength(correlation, 100)) < 0.15
    silent = rhythm(np.zeros(10 * RATE, np.float32))
    assert music.periodicity(silent) == music.beat_strength(silent, 100) == 0


def test_autocorrelation_is_the_slow_one():
    strength = np.random.default_rng(0).random(200)
    centred = strength - strength.mean()
    found = music.autocorrelation(strength, 60)
    for lag in range(61):
        a, b = centred[: 200 - lag], centred[lag:]
        assert found[lag] == pytest.approx((a * b).sum() / math.sqrt((a**2).sum() * (b**2).sum()))


def test_beat_strength_reads_known_lags():
    correlation = np.zeros(151)
    correlation[round(0.5 / music.HOP_S)] = 1  # lag 31, 0.496 s
    assert music.beat_strength(correlation, 60 / (31 * music.HOP_S)) == pytest.approx(1)
    assert music.beat_strength(correlation, 30 / (31 * music.HOP_S)) == pytest.approx(1)  # its half
    # Its double.
    assert music.beat_strength(correlation, 120 / (31 * music.HOP_S)) == pytest.approx(1)
    # Between two lags.
    assert music.beat_strength(correlation, 60 / (31.5 * music.HOP_S)) == pytest.approx(0.5)
    assert music.beat_strength(correlation, 60 / (45 * music.HOP_S)) == pytest.approx(0)


# --- notes


@pytest.mark.parametrize("note_s", [0.15, 0.25, 0.5])
def test_notes_of_a_melody_are_found(note_s):
    degrees = (0, 2, 4, 5, 7, 9, 11, 12, 11, 9, 7, 5)
    found = music.notes(melody(degrees, 60, note_s), RATE)
    assert found[:, 2].astype(int).tolist() == [60 + d for d in degrees]
    np.testing.assert_allclose(found[:, 0], note_s * np.arange(len(degrees)), atol=0.035)
    np.testing.assert_allclose(found[1:-1, 1], note_s, atol=0.035)


def test_a_repeated_note_is_several_notes_and_a_held_one_is_one():
    found = music.notes(melody([0] * 8, 60, 0.4), RATE)
    assert found[:, 2].tolist() == [60] * 8
    np.testing.assert_allclose(np.diff(found[:, 0]), 0.4, atol=0.035)
    assert len(music.notes(tone(64, 6), RATE)) == 1


def test_a_rest_is_no_note():
    gap = np.zeros(RATE // 2, np.float32)
    found = music.notes(np.concatenate([tone(60, 0.5), gap, tone(67, 0.5), gap]), RATE)
    assert found[:, 2].tolist() == [60, 67]
    assert found[1, 0] == pytest.approx(1.0, abs=0.05)
    assert found[0, 1] < 0.6


def test_twice_as_fast_halves_lengths_and_is_ln_2_away():
    slow, fast = (music.measure_clip(melody(MAJOR_TUNE * n, 60, 0.6 / n), RATE) for n in (1, 2))
    assert music.duration_distance(fast.lengths(), slow.lengths()) == pytest.approx(
        math.log(2), abs=0.08
    )
    assert music.duration_distance(fast.intervals(), slow.intervals()) == pytest.approx(
        math.log(2), abs=0.08
    )


def test_duration_distance_of_known_sets():
    assert music.duration_distance(np.array([0.2, 0.4]), np.array([0.4, 0.2])) == 0
    assert music.duration_distance(np.array([0.2, 0.3]), np.array([0.4, 0.6])) == pytest.approx(
        math.log(2)
    )
    # Half of the durations change by a factor of 4.
    assert music.duration_distance(np.array([0.1, 0.1]), np.array([0.1, 0.4])) == pytest.approx(
        math.log(4) / 2
    )


# --- clips


def test_level_and_channels_change_nothing():
    tune = melody(MAJOR_TUNE * 2)
    one = music.measure_clip(tune, RATE)
    for other in (
        music.measure_clip(1e-3 * tune, RATE),
        music.measure_clip(torch.from_numpy(tune).repeat(2, 1), RATE),
    ):
        assert other.chroma_change == pytest.approx(one.chroma_change, abs=1e-5)
        assert other.scale_fit == pytest.approx(one.scale_fit, abs=1e-5)
        np.testing.assert_allclose(other.correlation, one.correlation, atol=1e-4)
        np.testing.assert_allclose(other.notes, one.notes)


def test_other_sample_rates_give_nearly_the_same():
    slow, fast = (
        music.measure_clip(melody(MAJOR_TUNE * 2, rate=rate), rate) for rate in (16_000, 44_100)
    )
    assert fast.chroma_change == pytest.approx(slow.chroma_change, abs=0.03)
    assert fast.scale_fit == pytest.approx(slow.scale_fit, abs=0.03)
    assert music.periodicity(fast.correlation) == pytest.approx(
        music.periodicity(slow.correlation), abs=0.1
    )
    assert len(fast.notes) == len(slow.notes)


def test_what_cannot_be_measured_is_refused():
    assert "1.0 s" in refusal(music.measure_clip, np.zeros(100, np.float32), RATE)
    assert "NaN" in refusal(music.measure_clip, np.full(2 * RATE, np.nan, np.float32), RATE)


def test_a_packed_clip_is_the_same():
    clip = music.measure_clip(melody(MAJOR_TUNE), RATE)
    again = music.ClipMusic.unpacked(*clip.packed())
    assert (again.chroma_change, again.scale_fit) == (clip.chroma_change, clip.scale_fit)
    for name in ("classes", "correlation", "notes"):
        np.testing.assert_array_equal(getattr(again, name), getattr(clip, name))


@pytest.fixture(scope="module")
def tunes() -> dict[str, music.ClipMusic]:
    """Tunes in C, D, E flat and F, of 0.3 s a note."""
    return {
        name: music.measure_clip(melody(MAJOR_TUNE * 2, 60 + t), RATE)
        for name, t in zip("cdef", (0, 2, 3, 5), strict=True)
    }


CAPTIONS = {
    "c": "a tune in C major, 100 bpm",
    "d": "a tune in D major",
    "e": "a tune",
    "f": "a tune in F major",
}


def test_scores_are_means_over_the_clips_that_count(tunes):
    figures = music.score_music(tunes, CAPTIONS, tunes)
    assert list(figures) == list(music.MEASURES)
    rank = figures["key_rank"]
    assert (rank.value, rank.interval, rank.num_clips, rank.num_skipped) == (1, (1, 1), 3, 1)
    beat = figures["beat"]
    assert (beat.interval, beat.num_clips, beat.num_skipped) == (None, 1, 3)
    # 0.3 s a note: half a beat of 0.6 s.
    assert beat.value == music.beat_strength(tunes["c"].correlation, 100) > 0.5
    change = figures["chroma_change"]
    assert change.value == pytest.approx(np.mean([clip.chroma_change for clip in tunes.values()]))
    assert change.interval is not None
    assert change.interval[0] <= change.value <= change.interval[1]
    assert figures["note_lengths"].value == figures["note_intervals"].value == 0
    assert change.num_clips == 4


def test_what_captions_or_references_do_not_say_is_absent(tunes):
    assert list(music.score_music(tunes)) == ["chroma_change", "scale_fit", "periodicity"]
    assert "beat" not in music.score_music(tunes, {"d": "in D major"})
    assert music.score_music({}) == {}


def test_silence_counts_as_no_music_and_is_no_nan(tunes):
    silent = music.measure_clip(np.zeros(5 * RATE, np.float32), RATE)
    figures = music.score_music({"s": silent}, {"s": "in C major, 90 bpm"}, tunes)
    values = {name: figure.value for name, figure in figures.items()}
    assert values == {
        "chroma_change": 0,
        "scale_fit": 0,
        "key_rank": 6.5,
        "beat": 0,
        "periodicity": 0,
    }
    with_music = music.score_music(tunes | {"s": silent}, reference=tunes)["note_lengths"]
    assert (with_music.num_clips, with_music.num_skipped) == (4, 1)


def test_the_interval_contains_the_distance_and_resamples_clips(tunes):
    clips = {
        str(i): music.measure_clip(melody(MAJOR_TUNE[:8] * 2, 60, s), RATE)
        for i, s in enumerate((0.2, 0.25, 0.4, 0.5, 0.3, 0.35))
    }
    figure = music.score_music(clips, reference=tunes)["note_lengths"]
    assert figure.interval is not None
    assert figure.interval[0] < figure.value < figure.interval[1]
    lengths = np.concatenate([clip.lengths() for clip in clips.values()])
    real = np.concatenate([clip.lengths() for clip in tunes.values()])
    assert figure.value == pytest.approx(music.duration_distance(lengths, real))
    # Each clip doubled is the same set of clips: the distance stays, and the interval is narrower
    # by about √2.
    twice = music.score_music({k + s: v for k, v in clips.items() for s in "ab"}, reference=tunes)[
        "note_lengths"
    ]
    assert twice.value == pytest.approx(figure.value)
    widths = [f.interval[1] - f.interval[0] for f in (figure, twice) if f.interval]
    assert 0.55 < widths[1] / widths[0] < 0.9


# --- as metrics of `evaluate` and `fit`


def test_measures_are_metrics(tunes, tmp_path):
    """The same values through features, a reference on disk, and records."""
    features = FeatureSet(load_embedder("music"))
    for name, tonic in zip("cdef", (0, 2, 3, 5), strict=True):
        wav = torch.from_numpy(melody(MAJOR_TUNE * 2, 60 + tonic))
        features.add(name, wav[None], RATE)
    file = tmp_path / "music.safetensors"
    features.statistics().save(file)
    reference = ReferenceStatistics.load(file)
    figures = music.score_music(tunes, CAPTIONS, tunes)
    for name, figure in figures.items():
        record = score(f"music/{name}", features, reference, CAPTIONS, system="tunes")
        assert record.value == pytest.approx(figure.value, abs=1e-6)
        assert (record.num_clips, record.num_windows) == (4, figure.num_clips)
        assert record.details == {"clips_skipped": figure.num_skipped}
    with pytest.raises(UserError, match="music/key_rank: no caption names a key"):
        score("music/key_rank", features, None, {"c": "a tune"}, system="tunes")
    with pytest.raises(UserError, match="music/note_lengths: no reference"):
        score("music/note_lengths", features, None, CAPTIONS, system="tunes")


def test_names_of_measures_are_accepted_and_others_refused():
    assert parse_metric("music/beat") == ("beat", "music")
    for name in ("music/tempo", "fad/music", "beat/musicnn", "music"):
        assert "METRIC/EMBEDDER" in refusal(parse_metric, name)
    for name in music.MEASURES:
        assert logged.find(f"val/music/{name}") is not None
        assert logged.find(f"val/music/{name}_ci95") is not None
        assert logged.find(f"val/music/{name}/baseline_bigram") is not None
