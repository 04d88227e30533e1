"""`edit`: errors before a model is loaded, and reproducible files."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from magnet_train.__main__ import main
from magnet_train.cli.edit import EditOptions, edit, read_timeline
from magnet_train.common.errors import UserError

QUICK = "--decoding.decoding_steps=[1]"


@pytest.fixture
def recording(tmp_path) -> Path:
    """3.01 s of 16-bit stereo, with a caption file."""
    time = np.arange(66_370) / 22_050
    notes = 0.3 * np.sin(2 * np.pi * 262 * time * 2 ** (np.floor(2 * time) / 12))
    soundfile.write(tmp_path / "a.wav", np.stack([notes, 0.5 * notes], 1), 22_050, "PCM_16")
    (tmp_path / "a.txt").write_text("a slow air for flute")
    return tmp_path / "a.wav"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "nothing left to decode"),
        ({"regenerate": ["2-3"]}, "--regenerate 2-3: give START:END"),
        ({"regenerate": ["2:4"]}, "outside the recording, which has 3.010 s"),
        ({"regenerate": ["1:2", "1.5:2.5"]}, "overlaps"),
        ({"keep": ["1:1"]}, "empty"),
        ({"to_s": 2.0}, "--to_s 2.0"),
        ({"loop": True}, "--bars and --bpm"),
        ({"loop": True, "bars": 1}, "--bars and --bpm"),
        ({"bars": 1, "bpm": 130.0}, "samples at 22050 Hz"),
        ({"bars": 8, "bpm": 120.0}, "the model was trained on"),
        ({"intensity": 0.0}, "--intensity"),
        ({"keep_coarse": 5}, "nothing left to decode"),
        ({"regenerate": ["0:1", "2:3"], "prompt": ["a", "b", "c"]}, "3 prompts for 2 regions"),
        ({"to_s": 9.0, "prompts": Path("none.csv")}, "none.csv"),
        ({"to_s": 9.0, "best_of": 2, "judge": "fad/musicnn"}, "--reference"),
        ({"audio": Path("none.wav"), "to_s": 9.0}, "none.wav"),
        ({"audio": None}, "edit FILE"),
    ],
    ids=str,
)
def test_what_is_refused_is_refused_in_one_line_before_a_model_is_loaded(
    settings, says, recording, tmp_path, monkeypatch
):
    monkeypatch.setattr("magnet_train.cli.edit.load_generator", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says) as refused:
        edit(EditOptions(**({"audio": recording} | settings)), {})
    assert "\n" not in str(refused.value) and not (tmp_path / "generated").exists()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("at_s,caption\n0,a\n5,b\n5,c\n", "line 4: at_s=5 does not follow 5"),
        ("at_s,caption\n0,a\n30,b\n", "line 3: at_s=30 is outside"),
        ("at_s,caption\nsoon,a\n", "line 2: at_s must be a number"),
        ("at_s,caption\n", "no prompt"),
        ("at_s,caption\n0,a\n1,null\n", "line 3: no caption"),
        ('{"at_s": 1%s, "text": "a"}' % ("0" * 400), "line 1: at_s must be a number"),
        ('{"at_s": 1, "text": ["a"]}', "line 1: text is a list"),
    ],
)
def test_a_timeline_that_is_refused(rows, says, tmp_path):
    file = tmp_path / ("at.jsonl" if rows.startswith("{") else "at.csv")
    file.write_text(rows)
    with pytest.raises(UserError, match=says):
        read_timeline(file, 30.0)


def test_a_region_is_regenerated_and_its_json_reproduces_it(recording, tmp_path):
    out = tmp_path / "out"
    args = ["--regenerate", "1:2", "--out", str(out), "--seed", "3", QUICK]
    assert main(["edit", str(recording), *args]) == 0
    (made,) = out.glob("*.wav")
    note = json.loads(made.with_suffix(".json").read_text())
    assert note["prompt"] == "a slow air for flute" and note["regions_s"] == [[1.0, 2.0]]
    assert made.with_suffix(".png").is_file()
    before, after = (soundfile.read(path, dtype="int32")[0] for path in (recording, made))
    assert np.array_equal(after[:22_050], before[:22_050])
    assert np.array_equal(after[44_100:], before[44_100:])
    assert not np.array_equal(after[22_050:44_100], before[22_050:44_100])
    again = tmp_path / "again"
    config = ["--config", str(made.with_suffix(".json")), "--plots", "false"]
    assert main(["edit", *config, "--out", str(again)]) == 0
    assert (again / made.name).read_bytes() == made.read_bytes()


def test_a_loop_by_bars_and_a_continuation_with_a_timeline(recording, tmp_path):
    (tmp_path / "at.csv").write_text("at_s,caption\n0,a slow air for flute\n4,a fast reel\n")
    args = ["--out", str(tmp_path / "out"), "--plots", "false", "--format", "flac", QUICK]
    bars = ["--loop", "--bars", "1", "--bpm", "120"]
    assert main(["edit", str(recording), *bars, *args]) == 0
    timeline = ["--to_s", "5", "--prompts", str(tmp_path / "at.csv")]
    assert main(["edit", str(recording), *timeline, *args]) == 0
    lengths = sorted(len(soundfile.read(path)[0]) for path in (tmp_path / "out").glob("*.flac"))
    assert lengths == [2 * 22_050, 5 * 22_050]
