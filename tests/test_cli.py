"""The command line: runs on tiny shards, and one-line errors."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import torch
from helpers_programs import LONGEST_S
from helpers_wandb import history, records

import magnet_train.cli.commands
from magnet_train.__main__ import main
from magnet_train.common.errors import UserError
from magnet_train.metrics.record import read_records

TINY_FIT = [
    "--model.network.dim=32",
    "--model.network.num_heads=2",
    "--model.network.num_layers=2",
    "--model.crop_s=3.2",
    "--model.optimizer.warmup_steps=1",
    "--model.optimizer.lr=0.001",
    "--data.batch_size=2",
    "--data.num_workers=0",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=4",
    "--trainer.val_check_interval=4",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.num_sanity_val_steps=0",
    "--generation.num_prompts=2",
    "--generation.batch_size=2",
    "--generation.num_media=1",
    "--generation.decoding.decoding_steps=[2,1,1,1]",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Six short clips of chords with captions."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    t = np.arange(16_000 * 5) / 16_000
    for i in range(6):
        wav = (
            sum(np.sin(2 * np.pi * f * t) for f in rng.uniform(100, 900, 3))
            * np.exp(-(t % 0.5) * 3)
            / 4
        )
        soundfile.write(folder / f"clip{i}.wav", wav, 16_000)
        (folder / f"clip{i}.txt").write_text(f"chord number {i}")
    return folder


@pytest.fixture(scope="module")
def shards(clips, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    assert main(["tokenize", str(clips), "--out", str(folder / "train"), "--shard_size", "3"]) == 0
    assert (
        main(["tokenize", str(clips), "--out", str(folder / "validation"), "--embedder", "musicnn"])
        == 0
    )
    return folder


def fit(shards: Path, run: Path, *options: str) -> int:
    data = [f"--data.train={shards / 'train'}", f"--data.validation={shards / 'validation'}"]
    empty = run.parent / "empty.yaml"
    empty.write_text("{}\n")
    return main(
        [
            "fit",
            f"--config={empty}",
            *TINY_FIT,
            *data,
            f"--trainer.default_root_dir={run}",
            *options,
        ]
    )


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert fit(shards, folder) == 0
    return folder


def test_fit_leaves_checkpoint_audio_plots_and_summary(run):
    summary = json.loads((run / "summary.json").read_text())
    assert Path(summary["checkpoint"]).is_file()
    assert all(Path(p).is_file() for p in summary["audio"] + summary["plots"]) and summary["audio"]
    for metric in (
        "val/ce/stage0",
        "val/fad/musicnn",
        "val/kl/musicnn",
        "val/fad/musicnn/baseline_codec",
    ):
        pair = summary["metrics"][metric]
        assert np.isfinite([pair["before"], pair["after"]]).all(), metric
    assert set(summary["seconds"]) >= {"training"}
    assert (run / "report.html").read_text().count("<audio") >= 2


def test_every_figure_of_a_validation_is_a_record(run):
    records = {
        r.metric: r for r in read_records(run / "validation" / "step_0000004" / "records.json")
    }
    summary = json.loads((run / "summary.json").read_text())
    for metric in ("fad/musicnn", "kl/musicnn", "text/musicnn"):
        record = records[metric]
        assert record.value == pytest.approx(summary["metrics"][f"val/{metric}"]["after"], rel=1e-6)
        assert (
            record.num_clips == 2
            and record.seed == 0
            and record.decoding["decoding_steps"] == [2, 1, 1, 1]
        )
        assert record.baseline_codec is not None and record.embedder_hash


def test_metrics_without_weights_are_skipped_in_fit_and_an_error_elsewhere(
    run, shards, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MAGNET_TRAIN_CACHE", str(tmp_path / "cache"))
    metrics = ["--generation.metrics=[fad/vggish,vendi/musicnn]", "--generation.baselines=false"]
    with pytest.warns(
        UserWarning, match=r"no metrics of vggish: VGGish weights: not in the cache"
    ) as seen:
        assert (
            fit(
                shards,
                tmp_path / "run",
                *metrics,
                "--trainer.max_steps=2",
                "--trainer.val_check_interval=2",
            )
            == 0
        )
    assert sum("no metrics of vggish" in str(w.message) for w in seen) == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "val/vendi/musicnn" in summary["metrics"] and "val/fad/vggish" not in summary["metrics"]
    capsys.readouterr()
    options = [
        *(o for o in TINY_FIT if "warmup" not in o),
        f"--data.validation={shards / 'validation'}",
        *metrics,
    ]
    options += [
        f"--data.train={shards / 'train'}",
        f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}",
    ]
    options += [
        f"--config={run.parent / 'empty.yaml'}",
        f"--trainer.default_root_dir={tmp_path / 'v'}",
    ]
    line = mistake(capsys, "validate", *options)
    assert "VGGish weights: not in the cache" in line


def test_half_precision_trains_every_stage(shards, tmp_path):
    """The backward pass of windowed attention runs outside of autocast."""
    options = [
        "--trainer.precision=bf16-mixed",
        "--trainer.max_steps=6",
        "--trainer.limit_val_batches=0",
    ]
    assert fit(shards, tmp_path / "run", *options, "--generation.num_prompts=0") == 0
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_the_best_checkpoint_cannot_be_chosen_by_a_missing_metric(
    shards, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MAGNET_TRAIN_CACHE", str(tmp_path / "cache"))
    options = ["--generation.metrics=[fad/vggish]", "--checkpoint.monitor=val/fad/vggish"]
    assert fit(shards, tmp_path / "run", *options) == 2
    assert (
        "error: checkpoint.monitor is a metric of vggish, and VGGish weights: not in the cache"
        in capsys.readouterr().err
    )


def test_a_budget_of_seconds_ends_decoding_and_says_so(shards, tmp_path):
    options = [
        "--model.span_len=5",
        "--generation.max_seconds=0.001",
        "--generation.batch_size=1",
        "--generation.at_start=false",
    ]
    with pytest.warns(
        UserWarning, match=r"validation after 0\.001 s: 1 of 2 prompts of rank 0 decoded"
    ):
        assert (
            fit(
                shards,
                tmp_path / "run",
                *options,
                "--trainer.max_steps=2",
                "--trainer.val_check_interval=2",
            )
            == 0
        )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["val/num_clips"]["after"] == 1
    (note,) = (tmp_path / "run" / "validation" / "step_0000002").glob("0*.json")
    assert json.loads(note.read_text())["decoding"]["span_len"] == 5  # the model's


def test_a_run_resumes(run, shards, capsys):
    assert (
        fit(shards, run, "--ckpt_path=last", "--trainer.max_steps=6", "--generation.num_prompts=0")
        == 0
    )
    import torch

    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
    averaged, raw = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert averaged.keys() == raw.keys()


def test_validate_and_predict_take_the_checkpoint(run, shards, tmp_path):
    data = [f"--data.{s}={shards / 'validation'}" for s in ("train", "validation", "test")]
    common = [
        *(o for o in TINY_FIT if "warmup" not in o),
        *data,
        f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}",
    ]
    (tmp_path / "empty.yaml").write_text("{}")
    options = [
        f"--config={tmp_path / 'empty.yaml'}",
        *common,
        f"--trainer.default_root_dir={tmp_path}",
    ]
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    for verb, folder in (("validate", "validation"), ("test", "test")):
        assert (
            main(
                [
                    verb,
                    *options,
                    "--generation.metrics=[vendi/musicnn]",
                    "--generation.baselines=false",
                ]
            )
            == 0
        )
        (record,) = read_records(tmp_path / folder / f"step_{step:07d}" / "records.json")
        assert record.system == f"step {step}" and record.num_clips == 2
    assert main(["predict", *options, "--trainer.limit_predict_batches=1"]) == 0
    assert len(list((tmp_path / "predictions").glob("*.wav"))) == 2


def test_generate_plays_a_run_and_says_how_to_make_it_again(run, tmp_path):
    options = [
        "--checkpoint",
        str(run),
        "--decoding.decoding_steps=[2,1,1,1]",
        "--seed",
        "4",
        "--out",
        str(tmp_path),
    ]
    assert (
        main(["generate", "--prompt", "chord: number [1]", "organ", "--format", "flac", *options])
        == 0
    )
    audio = sorted(tmp_path.glob("*.flac"))
    assert len(audio) == 2 and all(p.with_suffix(".png").is_file() for p in audio)
    about = json.loads(audio[0].with_suffix(".json").read_text())
    made = about["options"]
    assert made["seed"] == 4 and made["decoding"]["decoding_steps"] == [2, 1, 1, 1]
    first = soundfile.read(audio[0])[0]
    again = tmp_path / "again"
    note = str(audio[0].with_suffix(".json"))
    assert main(["generate", "--config", note, "--out", str(again)]) == 0
    assert np.array_equal(first, soundfile.read(next(again.glob("*.flac")))[0])


def mistake(capsys, *args: str) -> str:
    """The one-line error message."""
    status = main(list(args))
    lines = [
        line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error:")
    ]
    assert status == 2 and len(lines) == 1, (status, lines)
    return lines[0]


def test_mistakes_of_tokenize(capsys, tmp_path, clips):
    out = str(tmp_path / "out")
    assert "no such folder" in mistake(capsys, "tokenize", str(tmp_path / "none"), "--out", out)
    (tmp_path / "bare").mkdir()
    assert "no audio files" in mistake(capsys, "tokenize", str(tmp_path / "bare"), "--out", out)
    soundfile.write(tmp_path / "bare" / "a.wav", np.zeros(16_000), 16_000)
    assert "no captions" in mistake(capsys, "tokenize", str(tmp_path / "bare"), "--out", out)
    assert "crop_s" in mistake(capsys, "tokenize", str(clips), "--out", out, "--crop_s", "-1")
    assert "nonsense" in mistake(capsys, "tokenize", str(clips), "--out", out, "--nonsense", "1")
    assert "not/there" in mistake(
        capsys, "tokenize", str(clips), "--out", out, "--codec", "not/there"
    )


def test_mistakes_of_fit(capsys, tmp_path, shards, clips):
    base = [
        "fit",
        "--config",
        str(tmp_path / "c.yaml"),
        f"--trainer.default_root_dir={tmp_path / 'run'}",
        *TINY_FIT,
    ]
    (tmp_path / "c.yaml").write_text("{}")
    data = [f"--data.train={shards / 'train'}", f"--data.validation={shards / 'validation'}"]
    assert "guidance_dropout=2" in mistake(capsys, *base, *data, "--model.guidance_dropout=2")
    assert "num_heads" in mistake(capsys, *base, *data, "--model.network.num_heads=3")
    assert "nonsense" in mistake(capsys, *base, *data, "--model.nonsense=2")
    assert "no such file" in mistake(capsys, *base, *data, f"--ckpt_path={tmp_path / 'x.ckpt'}")
    (tmp_path / "x.ckpt").write_bytes(b"broken")
    assert "x.ckpt" in mistake(capsys, *base, *data, f"--ckpt_path={tmp_path / 'x.ckpt'}")
    assert "num_workers" in mistake(capsys, *base, *data, "--data.num_workers=9")
    assert "index.json" in mistake(capsys, *base, f"--data.train={tmp_path}", data[1])
    assert not (tmp_path / "run" / "validation").exists()  # refused before anything was computed
    index = json.loads((shards / "train" / "index.json").read_text())
    index["codec"]["hash"] = "0" * 16
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.json").write_text(json.dumps(index))
    assert "made with codec" in mistake(
        capsys, *base, f"--data.train={tmp_path / 'other'}", data[1]
    )
    (tmp_path / "file").write_text("")
    assert "cannot be written" in mistake(
        capsys, *base, *data, f"--trainer.default_root_dir={tmp_path / 'file' / 'run'}"
    )
    (tmp_path / "c.yaml").write_text("model: {crop_z: 3}")
    assert "crop_z" in mistake(capsys, *base, *data)


@pytest.mark.slow
def test_fit_with_two_processes_validates_every_item_once(shards, tmp_path):
    """A launch with two gloo ranks has the same counts of items and clips as one process."""
    (tmp_path / "c.yaml").write_text("{}")
    data = [f"--data.train={shards / 'train'}", f"--data.validation={shards / 'validation'}"]
    two = [
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
    ]
    two += [
        "--checkpoint.monitor=val/fad/musicnn",
        "--checkpoint.save_top_k=1",
    ]  # which every rank must know
    loggers = [{"class_path": "lightning.pytorch.loggers.WandbLogger"}]
    two += ["--generation.num_media=2", f"--trainer.logger={json.dumps(loggers)}"]
    command = [
        sys.executable,
        "-m",
        "magnet_train",
        "fit",
        "--config",
        str(tmp_path / "c.yaml"),
        *TINY_FIT,
        *data,
        *two,
    ]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [*command, f"--trainer.default_root_dir={tmp_path / 'run'}"],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["val/num_clips"]["after"] == 2
    assert (tmp_path / "run" / "checkpoints" / "step=0000002.ckpt").is_file()
    # Each rank wrote one of the clips, and rank 0 logged both to W&B.
    assert [Path(path).name[:2] for path in summary["audio"]] == ["00", "01"]
    tables = [row for row in history(records(tmp_path / "run")) if "gen/clips.nrows" in row]
    assert [row["gen/clips.nrows"] for row in tables] == [2, 4]
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())) == 1


@pytest.mark.parametrize(
    "verb",
    ["fit", "tokenize", "generate", "edit", "convert", "evaluate", "doctor", "bench", "dashboard"],
)
def test_every_option_of_ours_has_a_sentence_of_help(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    options = re.split(r" (?=--[a-z])", text[text.index("options:") :])
    own = [
        o
        for o in options
        if not o.startswith(
            ("--trainer", "--checkpoint", "--print", "--config", "--optimizer", "--lr")
        )
    ]
    bare = [
        o.split()[0]
        for o in own
        if re.match(r"--[\w.]+(\.\w+)? [\[{A-Z][^ ]*( \.\.\.\])? \((required, )?type:", o)
    ]
    assert len(own) > 3 and not bare


def test_a_rank_that_fails_under_nccl_waits_for_nobody(monkeypatch, capsys):
    """Under NCCL, destroying the process group would wait for the other ranks."""
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_backend": "nccl"}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(os, "_exit", sys.exit)
    for error, status, says in (
        (UserError("a: b; c"), 2, "error: a: b; c"),
        (ValueError("why"), 1, "ValueError: why"),
    ):
        monkeypatch.setattr(magnet_train.cli.commands, "run", Mock(side_effect=error))
        with pytest.raises(SystemExit, match=str(status)):
            main(["fit"])
        assert says in capsys.readouterr().err
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    with pytest.raises(ValueError, match="why"):
        main(["fit"])


def test_srun_in_an_interactive_job_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert main(["fit"]) == 2 and "SLURM_JOB_NAME=magnet srun" in capsys.readouterr().err
