"""A listening test is blind, complete and self-contained."""

import json
import re
from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
from helpers_errors import refusal
from helpers_html import Page, sound
from helpers_listening import CAPTIONS, OPINION, RATE, export, write_ratings, write_systems

from magnet_train.evaluation.listening_test import LOWPASS, MISMATCH, low_passed
from magnet_train.evaluation.ratings import analyse_ratings


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return export(write_systems(folder / "systems"), folder / "out" / "study.html")


@pytest.fixture(scope="module")
def key(study) -> dict:
    return json.loads(study.key.read_text())


@pytest.fixture(scope="module")
def page(study) -> Page:
    return Page(study.page.read_text(encoding="utf-8"))


# --- Export ---------------------------------------------------------------------------------------


def test_every_system_and_both_anchors_are_on_every_screen(study, key, page):
    assert (study.num_trials, study.num_clips, study.size) == (3, 15, study.page.stat().st_size)
    assert study.key.name == "study_key.json"
    assert len(page.all("audio")) == 15
    assert len([s for s in page.all("section") if "data-trial" in s]) == 3
    assert {a["data-id"] for a in page.all("article")} == set(key["clips"])
    for trial in (1, 2, 3):
        assert sorted(c["system"] for c in key["clips"].values() if c["trial"] == trial) == sorted(
            OPINION
        )


def test_the_page_loads_nothing_and_escapes_captions(page):
    assert page.loaded() == [] and not page.all("b")
    assert all(caption in page.text for caption in CAPTIONS)
    assert len(page.all("script")) == 1 and "http" not in "".join(page.scripts)


def test_the_page_is_blind(study, key):
    # Encoded audio may contain any word by chance.
    html = re.sub(r'src="data:[^"]*"', "", study.page.read_text(encoding="utf-8"))
    for word in (
        "ours",
        "theirs",
        "anchor",
        "mismatch",
        "low-pass",
        "_key",
        "reference_0",
        str(study.page.parent),
    ):
        assert word not in html, word


def test_clips_are_in_the_order_of_their_random_ids(page, key):
    ids = [a["data-id"] for a in page.all("article")]
    screens = [ids[first : first + 5] for first in (0, 5, 10)]
    assert all(screen == sorted(screen) for screen in screens) and len(set(ids)) == 15


def test_two_exports_share_no_id(tmp_path, study, key):
    again = export(study.page.parent.parent / "systems", tmp_path / "again.html")
    assert not set(json.loads(again.key.read_text())["clips"]) & set(key["clips"])


def test_sliders_have_no_position_until_they_are_touched(page):
    sliders = [a for a in page.all("input") if a["type"] == "range"]
    assert len(sliders) == 30
    assert {(a["min"], a["max"], a["class"], a["aria-valuetext"]) for a in sliders} == {
        ("1", "100", "untouched", "not rated yet")
    }
    labels = {a["for"] for a in page.all("label")}
    assert {a["id"] for a in sliders} <= labels


def played(page: Page, key: dict) -> dict[tuple[int, str], np.ndarray]:
    """Samples of each player by (trial, system)."""
    heard, current = {}, ""
    for tag, attributes in page.elements:
        current = attributes.get("data-id", current)
        if tag == "audio":
            wav, rate = sound(attributes["src"])
            assert rate == RATE and attributes["src"].startswith("data:audio/flac;")
            clip = key["clips"][current]
            heard[clip["trial"], clip["system"]] = wav[:, 0]
    return heard


def share_above(wav: np.ndarray, hertz: float) -> float:
    power = np.abs(np.fft.rfft(wav)) ** 2
    return power[np.fft.rfftfreq(len(wav), 1 / RATE) > hertz].sum() / power.sum()


def pitch(wav: np.ndarray) -> float:
    return np.abs(np.fft.rfft(wav)).argmax() * RATE / len(wav)


def test_clips_are_equally_loud_and_long_and_the_key_tells_the_truth(page, key):
    heard = played(page, key)
    assert len({len(wav) for wav in heard.values()}) == 1
    for wav in heard.values():
        # Fade and clipping change the level slightly.
        assert abs(pyloudnorm.Meter(RATE).integrated_loudness(wav) + 14) < 0.5
        assert np.abs(wav[-3:]).max() < 0.01
    captions = {c["trial"]: CAPTIONS.index(c["caption"]) for c in key["clips"].values()}
    for (trial, system), wav in heard.items():
        is_own = abs(pitch(wav) - 300 * (captions[trial] + 1)) < 5
        assert is_own == (system != MISMATCH)
        assert (share_above(wav, 4000) < 1e-4) == (system == LOWPASS)
    assert {round(c["seconds"], 3) for c in key["clips"].values()} == {1.0}


def test_the_low_pass_keeps_to_the_recommendation():
    for rate in (16_000, 44_100):
        t = np.arange(rate) / rate
        for hertz, low, high in (
            (100, -0.1, 0.1),
            (3500, -0.1, 0.1),
            (4000, -200, -25),
            (4500, -200, -50),
        ):
            wav = np.sin(2 * np.pi * hertz * t)[:, None]
            passed = low_passed(wav, rate)
            middle = slice(rate // 4, -rate // 4)
            gain = 10 * np.log10(
                np.square(passed[middle]).mean() / np.square(wav[middle]).mean() + 1e-20
            )
            assert low <= gain <= high, (rate, hertz, gain)
            if hertz == 100:
                assert np.abs(passed[middle] - wav[middle]).max() < 0.02, "it must not be delayed"


def test_a_study_without_reference_has_no_anchors(tmp_path):
    folder = write_systems(tmp_path / "s", systems=("ours", "theirs"))
    study = export(folder, tmp_path / "t.html", reference=None)
    assert study.num_clips == 6
    about = json.loads(study.key.read_text())
    assert about["reference"] is None and about["systems"] == ["ours", "theirs"]
    assert "made worse on purpose" not in Page(study.page.read_text()).text
    files = write_ratings(tmp_path, about, {"Ann": {"ours": (60, 70), "theirs": (40, 30)}})
    rows = {(r.system, r.question): r.mean for r in analyse_ratings(files, study.key).rows}
    assert rows == {
        ("ours", "quality"): 60,
        ("ours", "relevance"): 70,
        ("theirs", "quality"): 40,
        ("theirs", "relevance"): 30,
    }


def export_refused(folder: Path) -> str:
    said = refusal(export, folder, folder.parent / "refused.html")
    assert not (folder.parent / "refused.html").exists()
    return said


def test_bad_systems_are_named_in_one_line(tmp_path):
    root = write_systems(tmp_path / "s")
    (root / "ours" / "ours_1.wav").rename(tmp_path / "aside.wav")
    assert "system ours: no clip for 1 of 3 captions, such as 'a fast reel" in export_refused(root)
    (root / "ours" / "ours_1.wav").write_bytes(b"broken")
    assert "ours_1.wav: unreadable" in export_refused(root)
    (tmp_path / "aside.wav").replace(root / "ours" / "ours_1.wav")
    (root / "ours" / "ours_1.json").write_text(json.dumps({"prompt": CAPTIONS[0]}))
    assert "ours_1.wav: has the caption of ours_0.wav" in export_refused(root)
    (root / "ours" / "ours_1.json").unlink()
    assert "ours_1.wav: no caption" in export_refused(root)
    (tmp_path / "file").write_text("")
    systems = write_systems(tmp_path / "s2")
    assert "cannot be written" in refusal(export, systems, tmp_path / "file" / "study.html")
    one = write_systems(tmp_path / "s3", CAPTIONS[:1])
    assert "one caption" in export_refused(one)
    lonely = write_systems(tmp_path / "s4", systems=("reference",))
    assert "needs a system besides the reference" in export_refused(lonely)
