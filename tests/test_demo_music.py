"""The demo's music: melodies recognised in any key, chords that fit, captions that say nothing but what is played."""

import itertools
import json
import re
import sys
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

DEMO = Path(__file__).parents[1] / "data/demo"
sys.path.insert(0, str(DEMO))  # the scripts that made the data stand beside it, in no package

from arrange import CHORDS, INSTRUMENTS, MELODY, QUARTETS, arrange, diatonic_triads, fit, harmonise, tempo_word  # noqa: E402
from captions import SHARPS, TEMPO_PHRASES, caption, key_name  # noqa: E402
from scores import families, fingerprint, split_of  # noqa: E402

# A jig's worth of bars in G major, in quarter lengths: chord tones on the beats, passing notes between.
STEPS = (7, 11, 14, 12, 11, 9, 7, 9, 11, 9, 7, 6, 4, 7, 11, 12, 14, 12, 11, 9, 6, 9, 6, 7) * 2
TUNE = [[i * 0.5, 0.5, 60 + step] for i, step in enumerate(STEPS)]


def score(parts: int = 1, style: str = "jig", metre: str = "6/8", bar_ql: float = 3.0) -> dict[str, Any]:
    """What scores.py writes for a tune, or for the same tune in four parts."""
    lines = [[[t, d, p - 7 * part] for t, d, p in TUNE] for part in range(parts)]
    return {"id": "x", "style": style, "metre": metre, "bar_ql": bar_ql, "tonic": 7, "mode": "major", "parts": lines}


# --- The same tune in another book --------------------------------------------------------------------------------


def test_a_fingerprint_knows_neither_key_nor_tempo() -> None:
    moved = [[2 * t, 2 * d, p - 5] for t, d, p in TUNE]
    assert fingerprint(moved) == fingerprint(TUNE) != set()


def test_a_fingerprint_reads_the_top_line() -> None:
    under = [[t, d, p - 12] for t, d, p in TUNE]
    assert fingerprint(TUNE + under) == fingerprint(TUNE)


def test_another_melody_shares_nothing() -> None:
    assert not fingerprint(TUNE) & fingerprint([[t, d, 60 + (7 * i * i) % 13] for i, (t, d, _) in enumerate(TUNE)])


def test_families_join_in_chains_and_leave_strangers_alone() -> None:
    runs = [{(i,)} for i in range(40)]
    first, second, third = (set().union(*runs[a:b]) for a, b in ((0, 10), (5, 20), (15, 30)))
    found = families({"c": third, "a": first, "b": second, "d": set().union(*runs[31:40])})
    assert found == {"a": "a", "b": "a", "c": "a", "d": "d"}


def test_what_every_tune_has_makes_no_family() -> None:
    cadence = {(i,) for i in range(5)}
    assert len(set(families({f"tune {i}": cadence for i in range(13)}, common=12).values())) == 13


def test_a_split_hangs_on_the_family_alone_and_has_its_share() -> None:
    splits = [split_of(f"family {i}", heldout_permille=100) for i in range(4000)]
    assert splits == [split_of(f"family {i}", heldout_permille=100) for i in range(4000)]
    for name in ("validation", "test"):
        assert splits.count(name) == pytest.approx(400, abs=80)


# --- Harmony ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["major", "minor"])
@pytest.mark.parametrize("tonic", [0, 7, 10])
def test_triads_are_triads_of_the_key(tonic: int, mode: str) -> None:
    triads = diatonic_triads(tonic, mode)
    assert triads[0] == (tonic, (tonic + (4 if mode == "major" else 3)) % 12, (tonic + 7) % 12)
    for root, third, fifth in triads:
        assert (third - root) % 12 in (3, 4)
        assert (fifth - root) % 12 == 7


def test_a_melody_made_of_chords_gets_those_chords() -> None:
    wanted = [(0, 4, 7), (5, 9, 0), (7, 11, 2), (0, 4, 7)]
    melody = [
        [2 * bar + i * 0.5, 0.5, 60 + pitch]
        for bar, chord in enumerate(wanted)
        for i, pitch in enumerate((*chord, chord[0]))
    ]
    assert harmonise(melody, tonic=0, mode="major", window_ql=2.0, end_ql=8.0) == wanted


def test_harmony_moves_with_the_key() -> None:
    here = harmonise(TUNE, 7, "major", 1.5, 24.0)
    there = harmonise([[t, d, p + 2] for t, d, p in TUNE], 9, "major", 1.5, 24.0)
    assert there == [tuple((pitch + 2) % 12 for pitch in chord) for chord in here]


def test_harmony_fits_better_than_any_one_chord() -> None:
    def share(chords: list[tuple[int, ...]]) -> float:
        return float(np.mean([p % 12 in chords[int(t // 1.5)] for t, _, p in TUNE]))

    chosen = harmonise(TUNE, 7, "major", 1.5, 24.0)
    assert share(chosen) > max(share([triad] * 16) for triad in diatonic_triads(7, "major"))
    assert chosen[-1] == (7, 11, 2)


# --- Arrangements -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("seed", range(12))
def test_an_arrangement_stays_in_range_and_in_time(parts: int, seed: int) -> None:
    piece = arrange(score(parts, style="chorale" if parts == 4 else "jig"), seed)
    assert piece == arrange(score(parts, style="chorale" if parts == 4 else "jig"), seed)
    for instrument, notes in piece.voices:
        _, low, high = INSTRUMENTS[instrument]
        for onset, duration, pitch, velocity in notes:
            assert low <= pitch <= high
            assert 0 <= onset < piece.length_s
            assert duration > 0
            assert 0 < velocity < 128
    assert piece.distinct_s == pytest.approx(24 * 60 / piece.tempo_bpm / 1.5 if parts == 1 else piece.distinct_s)
    assert piece.length_s >= 26.0 - 1


def test_every_instrument_a_player_may_draw_is_known_and_an_octave_wide() -> None:
    for name in {*MELODY, *CHORDS, *itertools.chain(*QUARTETS.values())}:
        _, low, high = INSTRUMENTS[name]
        assert high - low >= 12
        assert all(low <= fit(pitch, name) <= high and (fit(pitch, name) - pitch) % 12 == 0 for pitch in range(21, 109))


# --- Captions -----------------------------------------------------------------------------------------------------

ANY_KEY = re.compile(rf"\b({'|'.join(sorted(SHARPS, key=len, reverse=True))}) (major|minor)\b")


def untruths(text: str, facts: dict[str, Any]) -> list[str]:
    """What a caption says that the facts do not: key, tempo, metre, instruments, drums, composer."""
    lower, found = text.lower(), []
    for key in ANY_KEY.finditer(text):
        if key[0] != facts["key"]:
            found.append(f"key {key[0]}")
    for bpm in re.findall(r"(\d+) (?:bpm|beats per minute)", text):
        if int(bpm) != facts["tempo_bpm"]:
            found.append(f"{bpm} bpm")
    for metre in re.findall(r"\b(\d+/\d+)\b", text):
        if metre != facts["metre"]:
            found.append(f"metre {metre}")
    named = facts["instruments"] + facts["ensemble"].split()
    for name in INSTRUMENTS:
        part_of_longer = any(name in other for other in (*facts["instruments"], facts["ensemble"]))
        if re.search(rf"\b{re.escape(name.lower())}\b", lower) and name not in named and not part_of_longer:
            found.append(name)
    if bool(re.search("drum|percussion", lower)) != facts["drums"]:
        found.append("drums")
    words = {phrase: word for word, phrases in TEMPO_PHRASES.items() for phrase in phrases}
    for phrase in sorted(words, key=len, reverse=True):
        if re.search(rf"\b{phrase}\b", lower):
            found += [phrase] if words[phrase] != facts["tempo"] else []
            break
    return found


FACTS = {
    "style": "reel", "ensemble": "flute, harp and double bass", "instruments": ["double bass", "flute", "harp"],
    "form": "melody with accompaniment", "drums": True, "key": "B flat minor", "tempo": "fast", "tempo_bpm": 141,
    "metre": "2/2", "composer": "Turlough O'Carolan",
}  # fmt: skip


def test_captions_say_nothing_but_the_facts_and_vary() -> None:
    texts = [caption(FACTS, np.random.default_rng(seed)) for seed in range(400)]
    assert not [(text, untruths(text, FACTS)) for text in texts if untruths(text, FACTS)]
    assert all("flute, harp and double bass" in text.lower() and "reel" in text.lower() for text in texts)
    assert len(set(texts)) > 300
    # No opening is the opening.
    openings = [" ".join(text.lower().split()[:2]) for text in texts]
    assert max(openings.count(opening) for opening in openings) < 200


def test_the_check_itself_sees_untruths() -> None:
    assert untruths("A slow reel for trumpet in D major, 90 bpm, in 3/4 time", FACTS)
    for wrong in ("in B flat major", "90 bpm", "in 3/4 time", "for trumpet"):
        assert untruths(f"reel with drums {wrong}", FACTS), wrong


def test_tempo_words_rise_with_the_tempo() -> None:
    words = [tempo_word(bpm) for bpm in range(40, 200)]
    assert [word for word, _ in itertools.groupby(words)] == list(TEMPO_PHRASES)


def test_keys_are_named_once() -> None:
    assert len({key_name(tonic, mode) for tonic in range(12) for mode in ("major", "minor")}) == 24


# --- What ships ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[dict[str, Any]]]:
    """The facts of every example in the embedded shards, by split."""
    found = defaultdict[str, list[dict[str, Any]]](list)
    for split in ("train", "validation", "test"):
        for path in sorted((DEMO / "shards" / split).glob("*.tar")):
            with tarfile.open(path) as tar:
                members = (tar.extractfile(member) for member in tar if member.name.endswith(".json"))
                found[split] += [json.load(member) for member in members if member]
    return found


def test_no_tune_stands_in_two_splits(shipped: dict[str, list[dict[str, Any]]]) -> None:
    families_of = {split: {item["family"] for item in items} for split, items in shipped.items()}
    for one, other in itertools.combinations(families_of.values(), 2):
        assert one and other and not one & other


def test_the_shipped_music_is_long_and_varied(shipped: dict[str, list[dict[str, Any]]]) -> None:
    items = list(itertools.chain(*shipped.values()))
    assert sum(item["duration_s"] for item in items) > 8 * 3600
    assert len({name for item in items for name in item["instruments"]}) >= 20
    assert len({item["tempo"] for item in items}) >= 5
    assert len({item["caption"] for item in shipped["test"]}) >= 100


def test_shipped_captions_are_true(shipped: dict[str, list[dict[str, Any]]]) -> None:
    wrong = []
    for item in itertools.chain(*shipped.values()):
        facts = {**item, "key": item["music_key"]}
        wrong += [(item["caption"], lie) for lie in untruths(item["caption"], facts)]
    assert not wrong, wrong[:5]


def test_clips_are_real_audio_with_captions_in_many_forms() -> None:
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
