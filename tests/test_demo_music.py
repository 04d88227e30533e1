"""The demo's music: bars, beats on whole frames, chords that fit, captions that are true."""

import itertools
import json
import re
import sys
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

DEMO = Path(__file__).parents[1] / "data/demo"
sys.path.insert(0, str(DEMO))  # the scripts are in no package

from arrange import (  # noqa: E402
    FRAME_S,
    INSTRUMENTS,
    LEADS,
    LOWEST_LEAD,
    MUSIC_S,
    Arrangement,
    arrange,
    diatonic_triads,
    drum_bar,
    fit,
    harmonise,
    tempo_word,
)
from captions import SHARPS, TEMPO_PHRASES, caption, key_name  # noqa: E402
from scores import (  # noqa: E402
    bar_grid,
    estimate_key,
    families,
    fingerprint,
    key_is_clear,
    split_of,
    style_of,
)

# Eight bars of a jig in G major, in quarter notes: chord tones on the beats, passing notes between.
STEPS = (7, 11, 14, 12, 11, 9, 7, 9, 11, 9, 7, 6, 4, 7, 11, 12, 14, 12, 11, 9, 6, 9, 6, 7) * 2
TUNE = [[i * 0.5, 0.5, 60 + step] for i, step in enumerate(STEPS)]


def make_score(parts: int = 1, style: str = "jig", pickup_ql: float = 0.0) -> dict[str, Any]:
    """What scores.py writes for TUNE in some parts, after an upbeat of repeated notes."""
    upbeat = [[i * 0.5, 0.5, 62] for i in range(round(pickup_ql / 0.5))]
    lines = [
        [[t, d, p - 7 * k] for t, d, p in upbeat + [[t + pickup_ql, d, p] for t, d, p in TUNE]]
        for k in range(parts)
    ]
    about = {"id": "x", "style": style, "metre": "6/8", "bar_ql": 3.0, "pickup_ql": pickup_ql}
    return {**about, "tonic": 7, "mode": "major", "parts": lines}


SOURCE = {"title": "x", "composer": "traditional", "collection": "x", "source": "x.abc"}


def find(form: str, drums: bool = False, **score: Any) -> Arrangement:
    """The first arrangement of a form, with or without drums."""
    pieces = (arrange(make_score(**score), seed) for seed in range(200))
    return next(piece for piece in pieces if piece.form == form and (piece.drums or not drums))


# --- Scores: upbeats, keys, families --------------------------------------------------------------


def test_a_short_first_bar_is_an_upbeat_and_a_short_last_one_is_not() -> None:
    bars = [(0, 0.5), (0.5, 3), (3.5, 3), (6.5, 2.5)]
    assert bar_grid(bars, 3) == (0.5, np.inf)
    assert bar_grid([(t - 0.5, d) for t, d in bars[1:]], 3) == (0.0, np.inf)


@pytest.mark.parametrize("mode", ["major", "minor"])
@pytest.mark.parametrize("tonic", range(12))
def test_the_key_of_a_cadence_is_found(tonic: int, mode: str) -> None:
    first, fourth, fifth = diatonic_triads(tonic, mode)[:3]
    notes = [
        [0, d, 60 + p]
        for triad, d in ((first, 2), (fourth, 1), (fifth, 1), (first, 2))
        for p in triad
    ]
    assert estimate_key(notes)[0] == (tonic, mode)


def test_a_key_is_clear_if_the_notes_or_the_end_say_so() -> None:
    score = {"tonic": 7, "parts": [[[0, 1, 67]]]}
    assert key_is_clear({**score, "key_rank": 1})
    assert key_is_clear({**score, "key_rank": 2})
    assert not key_is_clear({**score, "key_rank": 2, "tonic": 0})
    assert not key_is_clear({**score, "key_rank": 3})


def test_a_style_is_a_word_and_not_part_of_one() -> None:
    assert style_of("The Fairy Queen", "", "tune") == "tune"
    assert style_of("", "DevilsDreamReel.abc", "tune") == "reel"
    assert style_of("Jigsaw", "", "air") == "air"


def test_a_fingerprint_is_of_the_top_line_in_any_key_and_tempo() -> None:
    assert fingerprint([[2 * t, 2 * d, p - 5] for t, d, p in TUNE]) == fingerprint(TUNE) != set()
    assert fingerprint(TUNE + [[t, d, p - 12] for t, d, p in TUNE]) == fingerprint(TUNE)
    assert not fingerprint(TUNE) & fingerprint(
        [[t, d, 60 + (7 * i * i) % 13] for i, (t, d, _) in enumerate(TUNE)]
    )


def test_families_join_in_chains_and_leave_others_alone() -> None:
    runs = [{(i,)} for i in range(40)]
    first, second, third = (set().union(*runs[a:b]) for a, b in ((0, 10), (5, 20), (15, 30)))
    found = families({"c": third, "a": first, "b": second, "d": set().union(*runs[31:40])})
    assert found == {"a": "a", "b": "a", "c": "a", "d": "d"}
    cadence = {(i,) for i in range(5)}
    assert len(set(families({f"tune {i}": cadence for i in range(13)}, common=12).values())) == 13


def test_a_split_depends_on_the_family_alone_and_has_its_share() -> None:
    splits = [split_of(f"family {i}", heldout_permille=100) for i in range(4000)]
    assert splits == [split_of(f"family {i}", heldout_permille=100) for i in range(4000)]
    for name in ("validation", "test"):
        assert splits.count(name) == pytest.approx(400, abs=80)


# --- Harmony --------------------------------------------------------------------------------------


def test_a_melody_made_of_chords_gets_those_chords() -> None:
    wanted = [(0, 4, 7), (5, 9, 0), (7, 11, 2), (0, 4, 7)]
    melody = [
        [2 * bar + i * 0.5, 0.5, 60 + pitch]
        for bar, chord in enumerate(wanted)
        for i, pitch in enumerate((*chord, chord[0]))
    ]
    assert harmonise(melody, tonic=0, mode="major", window_ql=2.0, windows=4) == wanted
    upbeat = [[-0.5, 0.5, 66]]
    assert harmonise(upbeat + melody, tonic=0, mode="major", window_ql=2.0, windows=4) == wanted


def test_harmony_moves_with_the_key_and_fits_better_than_any_one_chord() -> None:
    def share(chords: list[tuple[int, ...]]) -> float:
        return float(np.mean([p % 12 in chords[int(t // 1.5)] for t, _, p in TUNE]))

    here = harmonise(TUNE, 7, "major", 1.5, 16)
    there = harmonise([[t, d, p + 2] for t, d, p in TUNE], 9, "major", 1.5, 16)
    assert there == [tuple((pitch + 2) % 12 for pitch in chord) for chord in here]
    assert share(here) > max(share([triad] * 16) for triad in diatonic_triads(7, "major"))


# --- Arrangements ---------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 4])
def test_notes_stay_in_range_in_time_and_on_frames(parts: int) -> None:
    style = "chorale" if parts == 4 else "jig"
    for seed in range(40):
        piece = arrange(make_score(parts, style, pickup_ql=0.5), seed)
        assert piece == arrange(make_score(parts, style, pickup_ql=0.5), seed)
        assert 60 <= piece.tempo_bpm <= 168
        for voice in piece.voices:
            _, low, high, _ = INSTRUMENTS[voice.instrument]
            assert all(
                low <= pitch <= high and 0 < velocity < 128 for _, _, pitch, velocity in voice.notes
            )
            assert all(
                0 <= onset < MUSIC_S and duration > 0 for onset, duration, _, _ in voice.notes
            )
            frames = np.array([onset for onset, *_ in voice.notes]) / FRAME_S
            # Eighths of a compound beat are thirds of it, and its frames a multiple of three.
            assert np.abs(frames - frames.round()).max() < 1e-6
        if parts == 1:
            assert piece.voices[0].instrument in LEADS
            assert min(pitch for _, _, pitch, _ in piece.voices[0].notes) >= LOWEST_LEAD


def test_chords_bass_and_drums_start_on_the_first_bar_line_after_the_upbeat() -> None:
    for pickup_ql in (0.0, 0.5, 1.0):
        piece = find("melody with accompaniment", drums=True, pickup_ql=pickup_ql)
        lead, *others = piece.voices
        assert lead.notes[0][0] == 0
        assert piece.first_bar_s == pytest.approx(pickup_ql / 1.5 * piece.beat_s)
        # In the first bar: the drums and one of the others begin with it, and nobody before it.
        assert piece.drums[0][0] == pytest.approx(piece.first_bar_s)
        assert min(voice.notes[0][0] for voice in others) == pytest.approx(piece.first_bar_s)
        kicks = [t for t, _, drum, _ in piece.drums if drum == 36]
        assert np.allclose(np.diff(kicks), piece.bar_s)


def test_a_repeated_tune_keeps_its_bars() -> None:
    piece = find("solo", pickup_ql=0.5)
    loop_s = 8 * piece.bar_s
    notes = piece.voices[0].notes
    pitches = {round(t, 3): p for t, _, p, _ in notes if t >= piece.first_bar_s}
    assert len(pitches) == len(notes) - 1  # the last bar is full: the upbeat is played once
    later = {t: p for t, p in pitches.items() if t + loop_s < MUSIC_S - 0.1}
    assert later
    assert all(pitches[round(t + loop_s, 3)] == p for t, p in later.items())


def test_keys_are_drawn_evenly_whatever_the_score() -> None:
    tonics = Counter(arrange(make_score(), seed).tonic for seed in range(600))
    assert len(tonics) == 12
    assert max(tonics.values()) < 85
    piece = find("solo")
    shift = {
        (p - q) % 12 for (_, _, p, _), (_, _, q) in zip(piece.voices[0].notes, TUNE, strict=False)
    }
    assert shift == {(piece.tonic - 7) % 12}


def test_drums_mark_every_beat() -> None:
    for bar_ql, beat_ql in ((4.0, 1.0), (3.0, 1.0), (3.0, 1.5), (4.5, 1.5), (2.0, 1.0)):
        for busy in (False, True):
            hits = drum_bar(bar_ql, beat_ql, busy)
            beats = np.arange(0, bar_ql - 1e-6, beat_ql)
            assert {t for t, drum, _ in hits if drum != 42} == set(beats)
            assert {t for t, drum, _ in hits if drum == 42} >= set(beats)
            assert (0.0, 36, 112) in hits


def test_every_range_is_an_octave_wide() -> None:
    for _, low, high, _ in INSTRUMENTS.values():
        assert all(
            low <= fit(p, low, high) <= high and (fit(p, low, high) - p) % 12 == 0
            for p in range(21, 109)
        )


# --- Sound ----------------------------------------------------------------------------------------


def spectrum(wav: np.ndarray) -> np.ndarray:
    """Magnitudes of windows of 128 ms at 16 kHz."""
    windows = np.lib.stride_tricks.sliding_window_view(wav, 2048)[::512]
    return np.abs(np.fft.rfft(windows * np.hanning(2048), axis=1))


def test_notes_added_up_sound_like_the_whole_arrangement(tmp_path: Path) -> None:
    pytest.importorskip("midirenderer")
    from synth import SYNTH_RATE, mix, synthesise

    piece = find("melody with accompaniment", drums=True, pickup_ql=0.5)
    whole = soxr.resample(synthesise(piece).mean(1), SYNTH_RATE, 16_000)[: 28 * 16_000]
    added = mix(piece, 16_000, 28.0, tmp_path)
    difference = np.linalg.norm(spectrum(whole) - spectrum(added)) / np.linalg.norm(spectrum(whole))
    assert difference < 0.25
    assert np.array_equal(mix(piece, 16_000, 28.0, tmp_path), added)


def test_a_rendered_take_is_level_free_of_offset_and_says_what_it_plays(tmp_path: Path) -> None:
    pytest.importorskip("midirenderer")
    from render import render

    (tmp_path / "x.json").write_text(json.dumps({**make_score(pickup_ql=0.5), **SOURCE}))
    job = (tmp_path / "x.json", tmp_path, "test", "x", 0)
    assert render(job) == MUSIC_S
    wav, rate = soundfile.read(tmp_path / "test/x_take0.flac")
    assert (len(wav) / rate, rate) == (MUSIC_S, 16_000)
    rms = float(np.sqrt(np.mean(wav**2)))
    assert rms == pytest.approx(0.1, rel=0.01)
    assert abs(wav.mean()) < 0.01 * rms
    about = json.loads((tmp_path / "test/x_take0.json").read_text())
    assert not untruths(about["caption"], about)
    assert about["beat_s"] == pytest.approx(60 / about["tempo_bpm"], abs=1e-3)
    notes = json.loads((tmp_path / "test/x_take0.notes.json").read_text())
    assert {tuple(map(type, note)) for note in notes} == {(float, float, int, int, bool)}
    scale = {(about["tonic"] + step) % 12 for step in (0, 2, 4, 5, 7, 9, 11)}
    assert {pitch % 12 for _, _, pitch, _, lead in notes if lead} <= scale
    written = (tmp_path / "test/x_take0.flac").stat().st_mtime_ns
    render(job)
    assert (tmp_path / "test/x_take0.flac").stat().st_mtime_ns == written


# --- Captions -------------------------------------------------------------------------------------

ANY_KEY = re.compile(rf"\b({'|'.join(sorted(SHARPS, key=len, reverse=True))}) (major|minor)\b")


def tempo_lies(text: str, facts: dict[str, Any]) -> list[str]:
    """Tempo words of a caption that are not the tempo's."""
    words = {phrase: word for word, phrases in TEMPO_PHRASES.items() for phrase in phrases}
    for phrase in sorted(words, key=len, reverse=True):
        if re.search(rf"\b{phrase}\b", text.lower()):
            return [phrase] if words[phrase] != facts["tempo"] else []
    return []


def untruths(text: str, facts: dict[str, Any]) -> list[str]:
    """What a caption says that the facts do not: key, tempo, metre, instruments, drums."""
    lower = text.lower()
    found = [f"key {key[0]}" for key in ANY_KEY.finditer(text) if key[0] != facts["key"]]
    tempi = re.findall(r"(\d+) (?:bpm|beats per minute)", text)
    found += [f"{bpm} bpm" for bpm in tempi if int(bpm) != round(facts["tempo_bpm"])]
    found += [
        f"metre {metre}" for metre in re.findall(r"\b(\d+/\d+)\b", text) if metre != facts["metre"]
    ]
    players = " ".join(str(facts.get(name, "")) for name in ("instruments", "ensemble", "lead"))
    for name in INSTRUMENTS:
        if re.search(rf"\b{re.escape(name.lower())}\b", lower) and name not in players:
            found.append(name)
    if bool(re.search("drum|percussion", lower)) != facts["drums"]:
        found.append("drums")
    return found + tempo_lies(text, facts)


FACTS = {
    "style": "reel",
    "lead": "flute",
    "accompaniment": ["piano", "double bass"],
    "drums": True,
    "instruments": ["double bass", "flute", "piano", "drums"],
    "form": "melody with accompaniment",
    "key": "B flat minor",
    "tempo": "lively",
    "tempo_bpm": 107.143 + 17.857,
    "metre": "2/2",
    "composer": "traditional",
}
SOLO = {**FACTS, "form": "solo", "instruments": ["flute"], "accompaniment": [], "drums": False}
QUARTET = {
    **SOLO,
    "lead": "string quartet",
    "form": "parts",
    "instruments": ["cello", "viola", "violin"],
}


@pytest.mark.parametrize("facts", [FACTS, SOLO, QUARTET], ids=["accompanied", "solo", "parts"])
def test_captions_are_true_name_most_facts_and_vary(facts: dict[str, Any]) -> None:
    texts = [caption(facts, np.random.default_rng(seed)) for seed in range(600)]
    assert not [(text, untruths(text, facts)) for text in texts if untruths(text, facts)]
    lower = [text.lower() for text in texts]

    def share(pattern: str) -> float:
        return sum(bool(re.search(pattern, text)) for text in lower) / len(lower)

    assert share(facts["lead"]) == 1
    assert share("b flat minor") >= 0.85
    assert share(r"\d+ (bpm|beats)") >= 0.6
    assert share(r"\d+ (bpm|beats)|lively|brisk|cheerful") >= 0.85
    assert share("reel") >= 0.7
    if facts["drums"]:
        assert share("piano and double bass|piano, double bass") >= 0.7
    assert len(set(texts)) > 300
    openings = Counter(" ".join(text.split()[:2]) for text in lower)
    assert max(openings.values()) < 0.4 * len(texts)


def test_the_check_itself_finds_untruths() -> None:
    assert not untruths("reel with drums", FACTS)
    for wrong in ("in B flat major", "90 bpm", "in 3/4 time", "for trumpet", "slow"):
        assert untruths(f"reel with drums {wrong}", FACTS), wrong
    assert untruths("reel", FACTS) == ["drums"]


def test_tempo_words_rise_with_the_tempo_and_keys_have_one_name() -> None:
    words = [tempo_word(bpm) for bpm in range(40, 200)]
    assert [word for word, _ in itertools.groupby(words)] == list(TEMPO_PHRASES)
    assert len({key_name(tonic, mode) for tonic in range(12) for mode in ("major", "minor")}) == 24


# --- What ships -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[dict[str, Any]]]:
    """The facts of every example in the embedded shards, by split."""
    found = defaultdict[str, list[dict[str, Any]]](list)
    for split in ("train", "validation", "test"):
        for path in sorted((DEMO / "shards" / split).glob("*.tar")):
            with tarfile.open(path) as tar:
                members = (
                    tar.extractfile(member) for member in tar if member.name.endswith(".json")
                )
                found[split] += [json.load(member) for member in members if member]
    return found


def test_no_tune_is_in_two_splits(shipped: dict[str, list[dict[str, Any]]]) -> None:
    families_of = {split: {item["family"] for item in items} for split, items in shipped.items()}
    for one, other in itertools.combinations(families_of.values(), 2):
        assert one
        assert other
        assert not one & other


def test_the_shipped_music_is_long_and_varied(shipped: dict[str, list[dict[str, Any]]]) -> None:
    items = list(itertools.chain(*shipped.values()))
    assert sum(item["duration_s"] for item in items) > 4 * 3600
    assert len({name for item in items for name in item["instruments"]}) >= 15
    assert len({item["tempo"] for item in items}) >= 5
    assert len({item["caption"] for item in shipped["test"]}) >= 100


def test_shipped_captions_are_true(shipped: dict[str, list[dict[str, Any]]]) -> None:
    wrong = []
    for item in itertools.chain(*shipped.values()):
        facts = {**item, "key": item["music_key"]}
        wrong += [(item["caption"], lie) for lie in untruths(item["caption"], facts)]
    assert not wrong, wrong[:5]


def test_clips_are_real_audio_with_captions_in_many_formats() -> None:
    clips = [path for path in sorted((DEMO / "clips").iterdir()) if path.suffix != ".txt"]
    infos = [soundfile.info(path) for path in clips]
    assert 12 <= len(clips) <= 20
    assert sum(path.stat().st_size for path in clips) < 10e6
    assert {path.suffix for path in clips} == {".wav", ".flac", ".ogg", ".mp3"}
    assert {info.samplerate for info in infos} >= {16_000, 22_050, 44_100, 48_000}
    assert {info.channels for info in infos} == {1, 2}
    for path, info in zip(clips, infos, strict=True):
        assert 7.9 <= info.duration <= 20.2
        assert path.with_suffix(".txt").read_text().strip()
        assert 0.05 < float(np.sqrt(np.mean(soundfile.read(path)[0] ** 2))) < 0.2
