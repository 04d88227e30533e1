"""A listening test from export to table: blind, complete, nothing loaded; simulated raters come out as they rated."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
import soundfile
from helpers_html import Page, sound

from magnet_train.common.errors import UserError
from magnet_train.evaluation.clips import list_clips, load_captions
from magnet_train.evaluation.listening_test import (
    LOWPASS,
    MISMATCH,
    export_listening_test,
    low_passed,
)
from magnet_train.evaluation.ratings import COLUMNS, RaterFilter, analyse_ratings

RATE = 16_000
CAPTIONS = ("a slow air for flute", "a fast reel for fiddle </script><b>bold</b>", "a waltz for two harps")
# What simulated raters think of each system's quality and relevance.
OPINION = {"ours": (60, 70), "theirs": (40, 70), "reference": (95, 95), LOWPASS: (20, 90), MISMATCH: (95, 10)}


def write_systems(root: Path, captions=CAPTIONS, systems=("reference", "ours", "theirs")) -> Path:
    """A clip for each system and caption: its pitch tells the caption, its harmonics and level the system."""
    for s, system in enumerate(systems):
        (root / system).mkdir(parents=True)
        for c, caption in enumerate(captions):
            t = np.arange(round((1.0 + 0.1 * s) * RATE)) / RATE
            wav = 0.05 * (s + 1) * (np.sin(2 * np.pi * 300 * (c + 1) * t) + 0.5 * np.sin(2 * np.pi * 5000 * t))
            path = root / system / f"{system}_{c}.wav"
            soundfile.write(path, wav, RATE)
            if s % 2:
                path.with_suffix(".json").write_text(json.dumps({"prompt": caption, "seed": 0}))
            else:
                path.with_suffix(".txt").write_text(caption + "\n")
    return root


def export(folder: Path, out: Path, **options):
    """From a folder whose subfolders are the systems."""
    systems = {path.name: list_clips(path) for path in sorted(folder.iterdir())}
    captions = {name: load_captions(None, clips) for name, clips in systems.items()}
    return export_listening_test(systems, captions, out, **options)


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


# --- Export ----------------------------------------------------------------------------------------------------------


def test_every_system_and_both_anchors_stand_on_every_screen(study, key, page):
    assert (study.num_trials, study.num_clips, study.size) == (3, 15, study.page.stat().st_size)
    assert study.key.name == "study_key.json"
    assert len(page.all("audio")) == 15 and len([s for s in page.all("section") if "data-trial" in s]) == 3
    assert {a["data-id"] for a in page.all("article")} == set(key["clips"])
    for trial in (1, 2, 3):
        assert sorted(c["system"] for c in key["clips"].values() if c["trial"] == trial) == sorted(OPINION)


def test_the_page_loads_nothing_and_escapes_captions(page):
    assert page.loaded() == [] and not page.all("b")
    assert all(caption in page.text for caption in CAPTIONS)
    assert len(page.all("script")) == 1 and "http" not in "".join(page.scripts)


def test_the_page_is_blind(study, key):
    html = re.sub(r'src="data:[^"]*"', "", study.page.read_text(encoding="utf-8"))  # in audio any word may stand
    for word in ("ours", "theirs", "anchor", "mismatch", "low-pass", "_key", "reference_0", str(study.page.parent)):
        assert word not in html, word


def test_clips_stand_in_the_order_of_their_random_ids(page, key):
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
    """(trial, system) -> the samples of its player."""
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
        assert abs(pyloudnorm.Meter(RATE).integrated_loudness(wav) + 14) < 0.5  # the fade and clipping take a little
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
        for hertz, low, high in ((100, -0.1, 0.1), (3500, -0.1, 0.1), (4000, -200, -25), (4500, -200, -50)):
            wav = np.sin(2 * np.pi * hertz * t)[:, None]
            passed = low_passed(wav, rate)
            middle = slice(rate // 4, -rate // 4)
            gain = 10 * np.log10(np.square(passed[middle]).mean() / np.square(wav[middle]).mean() + 1e-20)
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


def test_mp3_makes_a_smaller_page(tmp_path, study):
    small = export(study.page.parent.parent / "systems", tmp_path / "small.html", lossless=False)
    assert small.size < study.size


def export_refused(folder: Path, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        export(folder, folder.parent / "refused.html", **kwargs)
    assert "\n" not in str(error.value) and not (folder.parent / "refused.html").exists()
    return str(error.value)


def test_bad_systems_are_named_in_one_line(tmp_path):
    root = write_systems(tmp_path / "s")
    assert "reference='real': no such system among ours, reference, theirs" in export_refused(root, reference="real")
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
    with pytest.raises(UserError, match="cannot be written"):
        export(write_systems(tmp_path / "s2"), tmp_path / "file" / "study.html")
    one = write_systems(tmp_path / "s3", CAPTIONS[:1])
    assert "one caption" in export_refused(one)
    lonely = write_systems(tmp_path / "s4", systems=("reference",))
    assert "needs a system beside the reference" in export_refused(lonely)


# --- Analysis --------------------------------------------------------------------------------------------------------


def ratings(key: dict, rater: str, opinion: dict, spread: float = 0, seed: int = 0) -> list[dict]:
    """All rows of one rater, as the page writes them."""
    rng, rows = np.random.default_rng(seed), []
    for order, (blinded_id, clip) in enumerate(key["clips"].items(), 1):
        for question, mean in zip(("quality", "relevance"), opinion[clip["system"]], strict=True):
            rating = int(np.clip(round(mean + spread * rng.normal()), 1, 100))
            row = (rater, clip["trial"], blinded_id, question, rating, f"{clip['seconds']:.2f}", order)
            rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows


def write_csv(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_ratings(folder: Path, key: dict, raters: dict[str, dict]) -> list[Path]:
    return [write_csv(folder / f"{name}.csv", ratings(key, name, opinion)) for name, opinion in raters.items()]


def shifted(by: float) -> dict:
    """Who rates all but the reference that much higher."""
    return {s: (q + by, r + by) if s != "reference" else (q, r) for s, (q, r) in OPINION.items()}


def test_means_and_intervals_of_raters_who_differ(tmp_path, study, key):
    offsets = (-6, -2, 0, 2, 6)
    files = write_ratings(tmp_path, key, {f"rater {d}": shifted(d / 2) for d in offsets})
    table = analyse_ratings(files, study.key, num_draws=4000)
    assert table.num_raters == 5 and not table.dropped and len(table.rows) == 10
    rows = {(r.system, r.question): r for r in table.rows}
    assert rows["ours", "quality"].mean == 60 and rows["theirs", "quality"].mean == 40
    assert (rows["ours", "quality"].num_ratings, rows["ours", "quality"].num_raters) == (15, 5)
    # The mean of 5 raters drawn from these: standard error of 2.0 / sqrt(5), in this small set within a tenth.
    low, high = rows["ours", "quality"].interval
    assert abs((high - low) / 2 - 1.96 * np.std([d / 2 for d in offsets]) / np.sqrt(5)) < 0.2
    assert rows["reference", "quality"].interval == (95, 95)


def test_more_clips_of_the_same_rater_do_not_narrow_the_interval(tmp_path, study, key):
    """The point of resampling raters: ratings of one rater are no independent witnesses."""
    files = write_ratings(tmp_path, key, {f"r{d}": shifted(d) for d in (-4, 4)})
    (row,) = [r for r in analyse_ratings(files, study.key).rows if (r.system, r.question) == ("ours", "quality")]
    assert row.interval == (56, 64)


def test_the_same_seed_gives_the_same_table(tmp_path, study, key):
    files = [write_csv(tmp_path / f"{i}.csv", ratings(key, str(i), OPINION, 3, i)) for i in range(6)]
    first, again, other = (analyse_ratings(files, study.key, filters=RaterFilter(min_reference=1), seed=seed) for seed in (0, 0, 1))
    assert first == again and first.rows != other.rows
    assert [r.mean for r in first.rows] == [r.mean for r in other.rows]


def test_markdown_names_systems_intervals_and_who_was_left_out(tmp_path, study, key):
    files = write_ratings(tmp_path, key, {"Ann": OPINION, "Bob": shifted(2), "Cid": OPINION | {"reference": (50, 95)}})
    markdown = analyse_ratings(files, study.key).to_markdown()
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["system", "quality", "relevance", "ratings"]
    assert ["ours", "61.0 [60.0, 62.0]", "71.0 [70.0, 72.0]", "6 + 6"] in rows
    assert "dropped: Cid (rated 3 of 3 hidden references below 85)" in markdown
    assert "2 raters" in markdown and key["study"] in markdown
    assert rows[2][0] == MISMATCH and rows[2][1].startswith("96.0")


def test_raters_are_left_out_with_a_reason(tmp_path, study, key):
    good = ratings(key, "good", OPINION)
    lazy = [row | {"rater": "lazy", "seconds_listened": "0.20"} for row in good]
    short = [row | {"rater": "short"} for row in good[:8]]
    deaf = ratings(key, "deaf", OPINION | {"reference": (84, 95)})
    once = [row | {"rater": "once"} for row in good]
    once[0] = once[0] | {"seconds_listened": "0.5"}
    groups = (good, lazy, short, deaf, once)
    files = [write_csv(tmp_path / f"{rows[0]['rater']}.csv", rows) for rows in groups]
    table = analyse_ratings(files, study.key)
    assert dict(table.dropped) == {
        "lazy": "did not play 30 of 30 rated clips to their end",
        "short": "gave 8 of 30 ratings",
        "deaf": "rated 3 of 3 hidden references below 85",
    }
    assert table.num_raters == 2 and table.num_unplayed == 1
    assert sum(row.num_ratings for row in table.rows) == 59
    assert analyse_ratings(files, study.key, filters=RaterFilter(min_reference=84)).num_raters == 3
    assert analyse_ratings(files, study.key, filters=RaterFilter(min_answered=0.2)).num_raters == 3
    assert "not played to its end: 1." in table.to_markdown()


def test_one_rater_has_no_interval(tmp_path, study, key):
    table = analyse_ratings(write_ratings(tmp_path, key, {"Ann": OPINION}), study.key)
    assert {row.interval for row in table.rows} == {None}
    assert "60.0 (one rater)" in table.to_markdown()


def analysis_refused(files: list[Path], key: Path) -> str:
    with pytest.raises(UserError) as error:
        analyse_ratings(files, key)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_csv_files_are_named_in_one_line(tmp_path, study, key):
    good = ratings(key, "Ann", OPINION)

    def refused_with(**change: str) -> str:
        return analysis_refused([write_csv(tmp_path / "bad.csv", [*good[:3], good[3] | change])], study.key)

    assert "bad.csv line 5: ffff (relevance) is not in this study" in refused_with(blinded_id="ffff")
    assert "is not in this study" in refused_with(question="beauty")
    for rating in ("0", "101", "50.5", "", "high", "-3", "²"):
        assert f"bad.csv line 5: rating={rating!r} must be a whole number from 1 to 100" in refused_with(rating=rating)
    assert "seconds_listened='nan'" in refused_with(seconds_listened="nan")
    ann = write_csv(tmp_path / "ann.csv", good)
    again = write_csv(tmp_path / "ann_2.csv", good)
    assert "ann_2.csv: the rater 'Ann' is in" in analysis_refused([ann, again], study.key)
    assert "ann.csv: given twice" in analysis_refused([ann, ann], study.key)
    twice = write_csv(tmp_path / "twice.csv", [*good, good[0]])
    assert "rated" in analysis_refused([twice], study.key) and "2 times" in analysis_refused([twice], study.key)
    (tmp_path / "other.csv").write_text("name,score\nAnn,5\n")
    assert "the column 'rater' is missing" in analysis_refused([tmp_path / "other.csv"], study.key)
    assert "has no ratings" in analysis_refused([write_csv(tmp_path / "empty.csv", [])], study.key)
    assert "gone.csv: no such file" in analysis_refused([tmp_path / "gone.csv"], study.key)
    assert "no ratings; give the CSV files" in analysis_refused([], study.key)


def test_a_missing_system_or_rater_is_named(tmp_path, study, key):
    good = ratings(key, "Ann", OPINION)
    without = [row for row in good if key["clips"][row["blinded_id"]]["system"] != "theirs"]
    files = [write_csv(tmp_path / "a.csv", without)]
    assert "system 'theirs' has no rating in any file (quality)" in analysis_refused(files, study.key)
    deaf = write_csv(tmp_path / "deaf.csv", ratings(key, "Deaf", OPINION | {"reference": (10, 10)}))
    assert "no rater is left: Deaf rated 3 of 3" in analysis_refused([deaf], study.key)


def test_a_wrong_key_is_named(tmp_path, study, key):
    ann = write_csv(tmp_path / "ann.csv", ratings(key, "Ann", OPINION))
    (tmp_path / "k.json").write_text("{}")
    assert "k.json: not the key of a listening test" in analysis_refused([ann], tmp_path / "k.json")
    assert "ann.csv: no JSON" in analysis_refused([ann], ann)
    assert "gone.json: no such file" in analysis_refused([ann], tmp_path / "gone.json")
