"""The wheel contains everything that `fit` without arguments needs, run from an empty folder."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers_programs import LONGEST_S

ROOT = Path(__file__).parents[1]
SHORT = (
    "--trainer.max_steps=2 --trainer.val_check_interval=2 --generation.num_prompts=2 "
    "--generation.batch_size=2 --generation.num_media=1 "
    "--generation.decoding.decoding_steps=[2,1,1,1] --model.network.dim=32 "
    "--model.network.num_layers=1 --model.crop_s=4 --model.optimizer.warmup_steps=1 "
    "--generation.baselines=false --trainer.limit_val_batches=1 --generation.at_start=false"
).split()


@pytest.mark.slow
def test_fit_without_arguments_runs_from_a_wheel_in_an_empty_folder(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, site, empty = tmp_path / "wheels", tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    build = [
        *pip,
        *f"wheel --no-deps --no-build-isolation --no-index -w {wheels}".split(),
        str(ROOT),
    ]
    subprocess.run(build, check=True, timeout=LONGEST_S)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    done = subprocess.run(
        [sys.executable, "-m", "magnet_train", "fit", *SHORT],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(site) in done.stderr, "it must have used the wheel's own demo.yaml"
    summary = json.loads((empty / "runs" / "demo" / "summary.json").read_text())
    assert (empty / summary["checkpoint"]).is_file() and summary["audio"]
