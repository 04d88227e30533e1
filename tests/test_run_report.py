"""The report of a run is built from its folder; missing or broken files give a note."""

import csv
import json
from pathlib import Path

import numpy as np
import soundfile
from helpers_errors import refusal
from helpers_html import HOSTILE, RATE, read, tone

from magnet_train.evaluation.report import write_report
from magnet_train.evaluation.run_report import report_from_run


def write_run(folder: Path) -> None:
    """Files as written by `fit`: two validations of two prompts, a resumed log, a configuration."""
    for step in (0, 800):
        records = [{"metric": "fad/musicnn", "value": 100.0 if step == 0 else 40.0}]
        for i, prompt in enumerate(("first prompt", HOSTILE)):
            path = folder / "validation" / f"step_{step:07d}" / f"{i:02d}_name_{i}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, tone(220 * (i + 1)), RATE)
            about = {
                "prompt": prompt,
                "item": f"item{i}",
                "seed": 0,
                "step": step,
                "decoding": {"top_p": 0.9},
            }
            path.with_suffix(".json").write_text(json.dumps(about))
        (path.parent / "records.json").write_text(json.dumps(records))
    real = folder / "validation" / "codec" / "00_name_0.wav"
    real.parent.mkdir()
    soundfile.write(real, tone(220), RATE)
    real.with_suffix(".json").write_text(json.dumps({"prompt": "first prompt", "item": "item0"}))
    np.savez(
        path.with_suffix(".npz"), codes=np.zeros((2, 3), np.int64), order=np.zeros((2, 3), np.int16)
    )
    rows = [
        {"step": 0, "train/loss": 3.0},
        {"step": 0, "val/ce": 8.0, "val/fad/musicnn": 100.0},
        {"step": 10, "train/loss": "nan"},
        {"step": 20, "train/loss": 2.0},
    ]
    later = [
        {"step": 20, "train/loss": 2.5},
        {"step": 799, "val/ce": 5.0, "val/ce_ci95": 0.5, "val/ce/stage0/rate0.5": 4.0},
        {"step": 799, "val/fad/musicnn": 40.0, "val/fad/musicnn/baseline_unigram": 90.0},
    ]
    for version, part in (("version_2", rows), ("version_10", later)):
        path = folder / "csv" / version / "metrics.csv"
        path.parent.mkdir(parents=True)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, sorted({k for row in part for k in row}))
            writer.writeheader()
            writer.writerows(part)
    (folder / "config.yaml").write_text(
        "model:\n  codec: demo\n  init: null\ngeneration:\n  seed: 0\n"
    )


def test_a_run_becomes_prompts_by_checkpoints(tmp_path):
    write_run(tmp_path / "demo")
    report = report_from_run(tmp_path / "demo")
    steps = ["step 0", "step 800"]
    assert [list(row) for row in report.clips] == [["real, through the codec", *steps], steps]
    assert [row["step 800"].caption for row in report.clips] == ["first prompt", HOSTILE]
    assert report.clips[0]["step 0"].about == {
        "item": "item0",
        "seed": 0,
        "step": 0,
        "decoding.top_p": 0.9,
    }
    assert report.clips[1]["step 800"].codes is not None and report.clips[0]["step 0"].codes is None
    assert report.settings == {"model.codec": "demo", "generation.seed": 0}
    assert report.curves["train/loss"] == [(0, 3.0, None, None), (20, 2.5, None, None)]
    assert report.curves["val/ce"] == [(0, 8.0, None, None), (799, 5.0, 4.5, 5.5)]
    assert "val/ce_ci95" not in report.curves
    assert any("train/loss: 1 value" in note for note in report.notes)
    assert any(note.startswith("3 of 4 clips are shown without codes") for note in report.notes)
    values = {"value": 40.0, "before": 100.0, "baseline_unigram": 90.0}
    assert report.records == [{"metric": "fad/musicnn"} | values]
    write_report(tmp_path / "r.html", report)
    page = read(tmp_path / "r.html")
    assert [cell["class"] for cell in page.all("td")] == [
        *("metric", "before", "value", "baseline_unigram")
    ]
    assert "val/ce/stage0 (codebook 1)" in (tmp_path / "r.html").read_text()
    assert len(page.all("audio")) == 5 and page.loaded() == []


def test_what_a_run_lacks_is_noted_and_no_error(tmp_path):
    notes = report_from_run(tmp_path).notes
    for what in ("No clips", "No curves", "No settings"):
        assert any(note.startswith(what) for note in notes)
    write_run(tmp_path)
    folder = tmp_path / "validation" / "step_0000800"
    (folder / "00_name_0.wav").write_bytes(b"broken")
    (folder / "01_name_1.json").write_text("{")
    (folder / "01_name_1.npz").write_bytes(b"no arrays")
    (folder / "records.json").write_text("{")
    (tmp_path / "config.yaml").write_text("a: [")
    report = report_from_run(tmp_path)
    assert [list(row) for row in report.clips] == [
        ["real, through the codec", "step 0"],
        ["step 0", "step 800"],
    ]
    assert report.clips[1]["step 800"].caption == "01_name_1"
    text = "\n".join(report.notes)
    for what in (
        "step_0000800/00_name_0.wav is skipped: unreadable",
        "step_0000800/01_name_1.wav: no readable JSON",
    ):
        assert what in text
    assert "its codes are unreadable" in text and "No settings" in text
    assert "The records of step_0000800 are damaged" in text
    write_report(tmp_path / "r.html", report)


def test_a_run_that_does_not_exist_is_the_users_mistake(tmp_path):
    assert "gone: no such folder" in refusal(report_from_run, tmp_path / "gone")
