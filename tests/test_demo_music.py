"""A smoke test for each script of the demo's music, and properties of the bundled data."""

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
from numpy.lib.stride_tricks import sliding_window_view

DEMO = Path(__file__).parents[1] / "data/demo"
sys.path.insert(0, str(DEMO))  # the scripts are in no package

from arrange import FRAME_S, INSTRUMENTS, MUSIC_S, arrange, diatonic_triads  # noqa: E402
from captions import SHARPS, TEMPO_PHRASES, caption  # noqa: E402
from scores import bar_grid, estimate_key, families, fingerprint, split_of  # noqa: E402

# Eight bars of a jig in G major, in quarter notes: chord tones on the beats, passing notes between.
STEPS = (7, 11, 14, 12, 11, 9, 7, 9, 11, 9, 7, 6, 4, 7, 11, 12, 14, 12, 11, 9, 6, 9, 6, 7) * 2
TUNE = [[i * 0.5, 0.5, 60 + step] for i, step in enumerate(STEPS)]


def make_score(parts: int = 1, style: str = "jig", pickup_ql: float = 0.0) -> dict[str, Any]:
    """The score that scores.py writes for TUNE in some parts, after an upbeat of repeated notes."""
    upbeat = [[i * 0.5, 0.5, 62] for i in range(round(pickup_ql / 0.5))]
    lines = [
        [[t, d, p - 7 * k] for t, d, p in upbeat + [[t + pickup_ql, d, p] for t, d, p in TUNE]]
        for k in range(parts)
    ]
    about = {"id": "x", "style": style, "metre": "6/8", "bar_ql": 3.0, "pickup_ql": pickup_ql}
    return {**about, "tonic": 7, "mode": "major", "parts": lines}


SOURCE = {"title": "x", "composer": "traditional", "collection": "x", "source": "x.abc"}

ANY_KEY = re.compile(rf"\b({'|'.join(sorted(SHARPS, key=len, reverse=True))}) (major|minor)\b")


def tempo_lies(text: str, facts: dict[str, Any]) -> list[str]:
    """Tempo words of a caption that do not match the tempo."""
    words = {phrase: word for word, phrases in TEMPO_PHRASES.items() for phrase in phrases}
    for phrase in sorted(words, key=len, reverse=True):
        if re.search(rf"\b{phrase}\b", text.lower()):
            return [phrase] if words[phrase] != facts["tempo"] else []
    return []


def untruths(text: str, facts: dict[str, Any]) -> list[str]:
    """Statements of a caption that contradict the facts: key, tempo, metre, instruments, drums."""
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


# --- one smoke test for each script ---------------------------------------------------------------


def test_scores_find_key_upbeat_and_family() -> None:
    first, fourth, fifth = diatonic_triads(9, "minor")[:3]
    cadence = ((first, 2), (fourth, 1), (fifth, 1), (first, 2))
    notes = [[0, d, 60 + p] for triad, d in cadence for p in triad]
    assert estimate_key(notes)[0] == (9, "minor")
    assert bar_grid([(0, 0.5), (0.5, 3), (3.5, 3), (6.5, 2.5)], 3) == (0.5, np.inf)
    slower_and_lower = [[2 * t, 2 * d, p - 5] for t, d, p in TUNE]
    prints = {"a": fingerprint(TUNE), "b": fingerprint(slower_and_lower), "c": {(1,)}}
    assert prints["a"] == prints["b"] != set()
    assert families(prints) == {"a": "a", "b": "a", "c": "c"}
    splits = Counter(split_of(f"family {i}", heldout_permille=100) for i in range(4000))
    assert splits["validation"] == pytest.approx(400, abs=80)
    assert splits["test"] == pytest.approx(400, abs=80)


@pytest.mark.parametrize("parts", [1, 4])
def test_arranged_notes_stay_in_range_in_time_and_on_frames(parts: int) -> None:
    for seed in range(8):
        piece = arrange(make_score(parts, pickup_ql=0.5), seed)
        assert piece == arrange(make_score(parts, pickup_ql=0.5), seed)
        for voice in piece.voices:
            _, low, high, _ = INSTRUMENTS[voice.instrument]
            onsets, durations, pitches, velocities = np.array(voice.notes).T
            assert low <= pitches.min() <= pitches.max() <= high
            assert 0 < velocities.min() <= velocities.max() < 128
            assert 0 <= onsets.min() <= onsets.max() < MUSIC_S
            assert durations.min() > 0
            assert np.abs(onsets / FRAME_S - (onsets / FRAME_S).round()).max() < 1e-6


def test_a_rendered_clip_is_normalised_and_captioned(tmp_path: Path) -> None:
    pytest.importorskip("midirenderer")
    from render import render

    (tmp_path / "x.json").write_text(json.dumps({**make_score(pickup_ql=0.5), **SOURCE}))
    assert render((tmp_path / "x.json", tmp_path, "test", "x", 0)) == MUSIC_S
    wav, rate = soundfile.read(tmp_path / "test/x_take0.flac")
    assert (len(wav) / rate, rate) == (MUSIC_S, 16_000)
    rms = float(np.sqrt(np.mean(wav**2)))
    assert rms == pytest.approx(0.1, rel=0.01)
    assert abs(wav.mean()) < 0.01 * rms
    about = json.loads((tmp_path / "test/x_take0.json").read_text())
    assert not untruths(about["caption"], about)
    notes = json.loads((tmp_path / "test/x_take0.notes.json").read_text())
    assert {tuple(map(type, note)) for note in notes} == {(float, float, int, int, bool)}


def test_the_sum_of_notes_equals_the_arrangement(tmp_path: Path) -> None:
    pytest.importorskip("midirenderer")
    from synth import SYNTH_RATE, mix, synthesise

    piece = arrange(make_score(pickup_ql=0.5), 0)
    whole = soxr.resample(synthesise(piece).mean(1), SYNTH_RATE, 16_000)[: 28 * 16_000]
    added = mix(piece, 16_000, 28.0, tmp_path)
    spectra = [
        np.abs(np.fft.rfft(sliding_window_view(wav, 2048)[::512] * np.hanning(2048), axis=1))
        for wav in (whole, added)
    ]
    assert np.linalg.norm(spectra[0] - spectra[1]) < 0.25 * np.linalg.norm(spectra[0])


@pytest.mark.parametrize("form", ["melody with accompaniment", "solo", "parts"])
def test_captions_are_true_name_most_facts_and_vary(form: str) -> None:
    alone = {"instruments": ["flute"], "accompaniment": [], "drums": False}
    facts = FACTS | {"form": form} | ({} if form.startswith("melody") else alone)
    texts = [caption(facts, np.random.default_rng(seed)) for seed in range(300)]
    assert not [(text, untruths(text, facts)) for text in texts if untruths(text, facts)]
    assert all("flute" in text.lower() for text in texts)
    assert sum("b flat minor" in text.lower() for text in texts) > 0.8 * len(texts)
    assert len(set(texts)) > 150


def test_the_check_of_captions_finds_untruths() -> None:
    assert not untruths("reel with drums", FACTS)
    for wrong in ("in B flat major", "90 bpm", "in 3/4 time", "for trumpet", "slow"):
        assert untruths(f"reel with drums {wrong}", FACTS), wrong
    assert untruths("reel", FACTS) == ["drums"]


# --- What ships -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[dict[str, Any]]]:
    """Facts of every example in the bundled shards, by split."""
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
