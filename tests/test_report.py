"""The report is read back with an HTML parser: complete, loading nothing, and whatever a caption holds is text."""

import base64
import csv
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
import soundfile
from helpers_html import Page, sound

from magnet_train.common.errors import UserError
from magnet_train.evaluation.page import audio_uri
from magnet_train.evaluation.charts import COLOURS, MAX_POINTS, draw_svg, thin_out
from magnet_train.evaluation.report import Report, ReportClip, write_report
from magnet_train.evaluation.run_report import report_from_run

HOSTILE = """</script><b onclick="x">bold</b><img src="http://example.org/x.png"> & 'q' "q" \u2028"""
RATE = 16_000


def tone(hertz: float = 440, seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def hostile_report() -> Report:
    order = np.array([[-1, 0, 1, 2], [1, 0, 1, 0]])
    clips = [
        {
            name: ReportClip((tone(), RATE), HOSTILE, np.arange(8).reshape(2, 4), order, score, {HOSTILE: HOSTILE})
            for name, score in ((HOSTILE, float(i)), ("b", -float(i)))
        }
        for i in range(4)
    ]
    return Report(
        HOSTILE, {HOSTILE: HOSTILE}, clips, {HOSTILE: [(0, 1.0, 0.5, 1.5), (1, 2.0, 1.5, 2.5)]},
        [{"metric": HOSTILE, "value": 1.25, "interval": (1.0, 1.5), "num_clips": 12, "seed": None, HOSTILE: HOSTILE}],
        [HOSTILE], HOSTILE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    path = tmp_path_factory.mktemp("report") / "sub" / "report.html"
    size = write_report(path, hostile_report())
    assert size == path.stat().st_size
    return read(path)


def test_every_clip_is_one_player_and_nothing_is_loaded(page: Page):
    assert len(page.all("audio")) == 8
    assert page.loaded() == []
    assert {a["src"][:16] for a in page.all("audio")} <= {"data:audio/mpeg;", "data:audio/flac;"}
    assert "http" not in "".join(page.scripts)


def test_hostile_text_stays_text_wherever_it_stands(page: Page):
    assert not page.all("b")
    assert all(image["src"].startswith(("data:image/jpeg;", "data:image/svg")) for image in page.all("img"))
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    shown = " ".join(HOSTILE.split())
    # title, heading, note, metric, two ends of the protocol, chart, score, 4 captions, 8 links to them at the least
    assert page.text.count(shown) >= 20
    assert len(page.all("script")) == 1


def test_the_policy_allows_the_one_script_and_no_connection(page: Page):
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256("".join(page.scripts).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';") and "http" not in policy


def test_controls_have_names_and_links_lead_somewhere(page: Page):
    ids = {a["id"] for _, a in page.elements if "id" in a}
    assert len(ids) == len([a for _, a in page.elements if "id" in a])
    assert {a["href"].removeprefix("#") for a in page.all("a")} <= ids
    assert {b["data-plays"] for b in page.all("button") if "data-plays" in b} <= ids
    for tag in ("audio", "canvas"):
        assert all(a.get("aria-label") for a in page.all(tag)), tag
    assert all(image["alt"] for image in page.all("img"))


def test_codes_and_order_come_back_from_the_page(page: Page):
    grids = [a for a in page.all("div") if "data-rows" in a]
    assert len(grids) == 8 and (grids[0]["data-rows"], grids[0]["data-columns"]) == ("2", "4")
    order = np.frombuffer(base64.b64decode(grids[0]["data-order"]), "<i2")
    assert order.tolist() == [-1, 0, 1, 2, 1, 0, 1, 0]
    codes = np.frombuffer(base64.b64decode(grids[0]["data-codes"]), "<u2")
    assert codes.tolist() == list(range(8))


def test_best_and_worst_of_each_system_by_score(page: Page):
    plays = [b["data-plays"] for b in page.all("button") if "data-plays" in b]
    assert plays == ["clip-3-0", "clip-2-0", "clip-0-0", "clip-1-0", "clip-0-1", "clip-1-1", "clip-3-1", "clip-2-1"]


def test_a_low_score_can_be_the_good_one(tmp_path):
    clips = [{"a": ReportClip((tone(), RATE), "c", score=float(i))} for i in range(2)]
    write_report(tmp_path / "r.html", Report("r", clips=clips, lower_is_better=True))
    plays = [b["data-plays"] for b in read(tmp_path / "r.html").all("button")]
    assert plays == ["clip-0-0", "clip-1-0"]


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (32_000, 2), (44_100, 1), (37_000, 1)])
def test_what_plays_is_what_was_given_at_minus_14_lufs(tmp_path, rate: int, channels: int):
    wav = np.stack([0.05 * tone(440 * (c + 1), 2, rate) / 0.3 for c in range(channels)], 1)
    soundfile.write(tmp_path / "clip.wav", wav, rate)
    write_report(tmp_path / "r.html", Report("r", clips=[{"a": ReportClip(tmp_path / "clip.wav", "c")}]))
    (audio,) = read(tmp_path / "r.html").all("audio")
    heard, heard_rate = sound(audio["src"])
    assert heard_rate == rate and heard.shape == wav.shape
    assert abs(pyloudnorm.Meter(rate).integrated_loudness(heard) + 14) < 0.2
    for c in range(channels):
        peak = np.abs(np.fft.rfft(heard[:, c])).argmax() * rate / len(heard)
        assert abs(peak - 440 * (c + 1)) < 2


def test_mp3_is_a_fraction_of_flac_and_flac_loses_nothing():
    wav = (np.random.default_rng(0).normal(size=(RATE, 1)) * 0.1).clip(-1, 1)
    assert len(audio_uri(wav, RATE)) < 0.6 * len(audio_uri(wav, RATE, lossless=True))
    heard, _ = sound(audio_uri(wav, RATE, lossless=True))
    assert np.abs(heard - wav).max() <= 1.01 / 2**15


def test_without_mp3_in_libsndfile_flac_takes_its_place(monkeypatch):
    monkeypatch.setattr(soundfile, "available_formats", lambda: {"FLAC": ""})
    assert audio_uri(tone()[:, None], RATE).startswith("data:audio/flac;")


def test_a_silent_clip_has_a_picture_and_a_player(tmp_path):
    write_report(tmp_path / "r.html", Report("r", clips=[{"a": ReportClip((np.zeros(RATE), RATE), "")}]))
    page = read(tmp_path / "r.html")
    assert len(page.all("audio")) == len(page.all("img")) == 1 and "(no text)" in page.text


def test_missing_clips_keep_the_columns_in_line(tmp_path):
    clip = ReportClip((tone(), RATE), "c")
    write_report(tmp_path / "r.html", Report("r", clips=[{"a": clip, "b": clip}, {"b": clip}]))
    page = read(tmp_path / "r.html")
    assert len(page.all("audio")) == 3 and page.text.count("no clip") == 1


def test_an_empty_report_is_a_page_with_its_title(tmp_path):
    write_report(tmp_path / "r.html", Report("nothing yet"))
    page = read(tmp_path / "r.html")
    assert "nothing yet" in page.text and not page.all("section")


# --- Curves and figures ----------------------------------------------------------------------------------------------


NO_INTERVAL = [(0, 1.0, None, None), (10, 0.5, None, None)]


def test_stages_and_baselines_share_the_chart_of_their_metric(tmp_path):
    names = ["val/ce", "val/ce/stage0", "val/ce/stage1", "val/fad/x", "val/fad/x/baseline_codec"]
    names.append("val/ce/stage0/rate0.5")
    write_report(tmp_path / "r.html", Report("r", curves=dict.fromkeys(names, NO_INTERVAL)))
    page = read(tmp_path / "r.html")
    assert len(page.all("img")) == 3
    legend = [a for a in page.all("i") if "style" in a]
    assert len(legend) == 6 and [a["class"] for a in legend].count("baseline") == 1
    assert "val/fad/x/baseline_codec ends at 0.5" in page.all("img")[1]["alt"]


def drawn_points(svg: bytes, curve: int = 0) -> np.ndarray:
    """Places `n 2` of a curve's points in its chart."""
    path = re.search(rf'id="curve-{curve}">\s*<path d="([^"]*)"', svg.decode())
    assert path is not None
    return np.array([[float(v) for v in p] for p in re.findall(r"[ML] (\S+) (\S+)", path[1])])


def test_points_lie_where_their_values_are():
    points = [(0, 0.0, -1.0, 1.0), (50, 5.0, 4.0, 6.0), (100, 10.0, 9.0, 11.0)]
    svg = draw_svg({"m": points, "n": NO_INTERVAL})
    steps = np.diff(drawn_points(svg), axis=0)
    assert np.allclose(steps[0], steps[1], atol=0.01) and steps[0, 0] > 0 > steps[0, 1]
    assert len(drawn_points(svg, 1)) == 2
    assert svg.count(COLOURS[0].encode()) > svg.count(COLOURS[1].encode()) > 0  # the band
    assert draw_svg({"m": points}) == draw_svg({"m": points})


def test_a_curve_of_one_point_is_marked():
    svg = draw_svg({"m": [(3, 2.0, 1.0, 3.0)]})
    assert b"<use" in svg.split(b'id="curve-0"')[1]


def test_a_long_curve_is_drawn_in_means():
    points = thin_out([(step, float(step % 2), 0.0, None) for step in range(4 * MAX_POINTS)])
    assert len(points) == MAX_POINTS
    assert {point[1:] for point in points} == {(0.5, 0.0, None)}


def test_figures_unfold_their_protocol(page: Page):
    assert page.text.count("1.25") >= 1 and "1 to 1.5" in page.text
    assert [c["class"] for c in page.all("td")] == ["metric", "value", "interval", "num_clips", "protocol"]
    assert "None" not in page.text, "what is not known is no part of a protocol"


# --- Bad input -------------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, report: Report, name: str = "r.html") -> str:
    with pytest.raises(UserError) as error:
        write_report(tmp_path / name, report)
    assert "\n" not in str(error.value) and not (tmp_path / "r.html").exists()
    return str(error.value)


def test_bad_input_is_named_in_one_line(tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF no audio")
    cell = lambda **kw: Report("r", clips=[{"a": ReportClip(**{"audio": (tone(), RATE), "caption": "c"} | kw)}])  # noqa: E731
    assert "broken.wav: unreadable" in refused(tmp_path, cell(audio=tmp_path / "broken.wav"))
    assert "gone.wav: unreadable" in refused(tmp_path, cell(audio=tmp_path / "gone.wav"))
    assert "clip 'c' of a: holds NaN" in refused(tmp_path, cell(audio=(np.full(RATE, np.nan), RATE)))
    assert "samples of shape (3, 3)" in refused(tmp_path, cell(audio=(np.zeros((3, 3)), RATE)))
    assert "codes of shape (4,)" in refused(tmp_path, cell(codes=np.arange(4)))
    assert "codes must be integers from 0" in refused(tmp_path, cell(codes=np.full((1, 2), -1)))
    assert "order of shape (1, 3)" in refused(
        tmp_path, cell(codes=np.ones((1, 2), int), order=np.ones((1, 3), dtype=int))
    )
    assert "the value is nan" in refused(tmp_path, cell(score=float("nan")))
    assert "curve m, step 1: the value is inf" in refused(
        tmp_path, Report("r", curves={"m": [(1, float("inf"), None, None)]})
    )
    assert "value=None is no number" in refused(tmp_path, Report("r", records=[{"metric": "m", "value": None}]))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(tmp_path, Report("r"), "file/r.html")
    (tmp_path / "folder").mkdir()
    assert "folder: cannot be written" in refused(tmp_path, Report("r"), "folder")


# --- A run's folder --------------------------------------------------------------------------------------------------


def write_run(folder: Path) -> None:
    """As `fit` leaves it: two validations of two prompts, a resumed log, a configuration."""
    for step in (0, 800):
        for i, prompt in enumerate(("first prompt", HOSTILE)):
            path = folder / "validation" / f"step_{step:07d}" / f"{i:02d}_name_{i}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, tone(220 * (i + 1)), RATE)
            about = {"prompt": prompt, "item": f"item{i}", "seed": 0, "step": step, "decoding": {"top_p": 0.9}}
            path.with_suffix(".json").write_text(json.dumps(about))
    np.savez(path.with_suffix(".npz"), codes=np.zeros((2, 3), np.int64), order=np.zeros((2, 3), np.int16))
    rows = [
        {"step": 0, "train/loss": 3.0},
        {"step": 0, "val/ce": 8.0, "val/fad/musicnn": 100.0, "val/fad/musicnn/baseline_codec": 16.0, "val/num_clips": 2},
        {"step": 10, "train/loss": "nan"},
        {"step": 20, "train/loss": 2.0},
    ]
    later = [{"step": 20, "train/loss": 2.5}, {"step": 799, "val/ce": 5.0, "val/ce_ci95": 0.5, "val/fad/musicnn": 40.0}]
    for version, part in (("version_2", rows), ("version_10", later)):
        path = folder / "csv" / version / "metrics.csv"
        path.parent.mkdir(parents=True)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, sorted({k for row in part for k in row}))
            writer.writeheader()
            writer.writerows(part)
    (folder / "config.yaml").write_text("model:\n  codec: demo\n  init: null\ngeneration:\n  seed: 0\n")


def test_a_run_becomes_prompts_by_checkpoints(tmp_path):
    write_run(tmp_path / "demo")
    report = report_from_run(tmp_path / "demo")
    assert [list(row) for row in report.clips] == [["step 0", "step 800"]] * 2
    assert [row["step 800"].caption for row in report.clips] == ["first prompt", HOSTILE]
    assert report.clips[0]["step 0"].about == {"item": "item0", "seed": 0, "step": 0, "decoding.top_p": 0.9}
    assert report.clips[1]["step 800"].codes is not None and report.clips[0]["step 0"].codes is None
    assert report.settings == {"model.codec": "demo", "generation.seed": 0}
    assert report.curves["train/loss"] == [(0, 3.0, None, None), (20, 2.5, None, None)]
    assert report.curves["val/ce"] == [(0, 8.0, None, None), (799, 5.0, 4.5, 5.5)]
    assert "val/ce_ci95" not in report.curves
    assert any("train/loss: 1 value" in note for note in report.notes)
    assert any(note.startswith("3 of 4 clips are shown without codes") for note in report.notes)
    (fad,) = [r for r in report.records if r["metric"] == "val/fad/musicnn"]
    assert (fad["value"], fad["num_clips"], fad["baseline codec"], fad["generation.seed"]) == (40.0, 2, 16.0, 0)
    (ce,) = [r for r in report.records if r["metric"] == "val/ce"]
    assert ce["interval"] == (4.5, 5.5) and "num_clips" not in ce
    write_report(tmp_path / "r.html", report)
    page = read(tmp_path / "r.html")
    assert len(page.all("audio")) == 4 and page.loaded() == []


def test_what_a_run_lacks_is_noted_and_no_error(tmp_path):
    notes = report_from_run(tmp_path).notes
    for what in ("No clips", "No curves", "No settings"):
        assert any(note.startswith(what) for note in notes)
    write_run(tmp_path)
    folder = tmp_path / "validation" / "step_0000800"
    (folder / "00_name_0.wav").write_bytes(b"broken")
    (folder / "01_name_1.json").write_text("{")
    (folder / "01_name_1.npz").write_bytes(b"no arrays")
    (tmp_path / "config.yaml").write_text("a: [")
    report = report_from_run(tmp_path)
    assert [list(row) for row in report.clips] == [["step 0"], ["step 0", "step 800"]]
    assert report.clips[1]["step 800"].caption == "01_name_1"
    text = "\n".join(report.notes)
    for what in ("step_0000800/00_name_0.wav is skipped: unreadable", "step_0000800/01_name_1.wav: no readable JSON"):
        assert what in text
    assert "its codes are unreadable" in text and "No settings" in text
    write_report(tmp_path / "r.html", report)


def test_a_run_that_does_not_exist_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="gone: no such folder"):
        report_from_run(tmp_path / "gone")
