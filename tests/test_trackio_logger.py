"""TrackioLogger: metrics, settings and clips of sessions of one run."""

import sys
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import soundfile

from magnet_train.__main__ import main
from magnet_train.callbacks.tracking import run_locations
from magnet_train.callbacks.trackio_logger import TrackioLogger
from magnet_train.common.errors import UserError


def test_sessions_of_a_run_are_continued(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    folder = tmp_path / "run"
    folder.mkdir()
    soundfile.write(folder / "clip.wav", np.zeros(800), 8000)
    matplotlib.image.imsave(folder / "clip.png", np.zeros((4, 4)))
    settings = {"model": {"crop_s": 10.0}}
    logger = TrackioLogger("project", str(folder))
    assert logger.experiment  # Lightning starts the run before it logs settings
    logger.log_hyperparams(settings)
    logger.log_metrics({"train/loss": 3.0}, 1)
    logger.finalize("success")
    config = SQLiteStorage.get_run_config("project", "run")
    assert config is not None and config.items() >= settings.items()
    logger.log_metrics({"train/loss": 2.0}, 2)
    logger.log_clips([("a waltz", folder / "clip.wav", folder / "clip.png")], 2)
    logger.finalize("success")
    again = TrackioLogger("project", str(folder), resumes=True)
    again.log_hyperparams(settings)
    again.log_metrics({"train/loss": 1.0}, 3)
    again.finalize("success")
    trainer: Any = SimpleNamespace(loggers=[again])
    assert run_locations(trainer) == {"trackio": "trackio show --project project"}
    assert SQLiteStorage.get_runs("project") == ["run"]
    rows = SQLiteStorage.get_logs("project", "run")
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == {1: 3.0, 2: 2.0, 3: 1.0}
    (clip,) = (row["gen/audio/clip"] for row in rows if "gen/audio/clip" in row)
    assert clip["caption"] == "a waltz" and list((tmp_path / "trackio").rglob("*.wav"))


def test_without_trackio_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[trackio\]'"):
        TrackioLogger("project", str(tmp_path))


def test_fit_says_that_the_package_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--tracker", "trackio"]) == 2
    assert "pip install -e '.[trackio]'" in capsys.readouterr().err.splitlines()[-1]
