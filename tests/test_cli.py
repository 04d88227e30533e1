"""The command line: runs on tiny shards, and one-line errors."""

import io
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
from helpers_errors import command_error
from helpers_programs import LONGEST_S
from helpers_wandb import history, records

import magnet_train.cli.commands
from magnet_train.__main__ import main
from magnet_train.common.errors import UserError
from magnet_train.metrics.record import read_records
from magnet_train.release import SavedModel

TINY_FIT = (
    "--model.network.dim=32 --model.network.num_heads=2 --model.network.num_layers=2 "
    "--model.crop_s=3.2 --model.optimizer.warmup_steps=1 --model.optimizer.lr=0.001 "
    "--data.batch_size=2 --data.num_workers=0 --trainer.accelerator=cpu "
    "--trainer.max_steps=4 --trainer.val_check_interval=4 --trainer.logger=false "
    "--trainer.enable_progress_bar=false --trainer.num_sanity_val_steps=0 "
    "--generation.num_prompts=2 --generation.batch_size=2 --generation.num_media=1 "
    "--generation.decoding.decoding_steps=[2,1,1,1] --trainer.enable_model_summary=false"
).split()


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Six short clips of chords with captions."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    t = np.arange(16_000 * 5) / 16_000
    for i in range(6):
        tones = sum(np.sin(2 * np.pi * f * t) for f in rng.uniform(100, 900, 3))
        wav = tones * np.exp(-(t % 0.5) * 3) / 4
        soundfile.write(folder / f"clip{i}.wav", wav, 16_000)
        (folder / f"clip{i}.txt").write_text(f"chord number {i}")
    return folder


@pytest.fixture(scope="module")
def shards(clips, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for options in ("train --shard_size 3", "validation --embedder musicnn"):
        assert main(["tokenize", str(clips), *f"--out {folder}/{options}".split()]) == 0
    return folder


def arguments(shards: Path, run: Path, *options: str) -> list[str]:
    """Options of a tiny fit over an empty configuration."""
    empty = run.parent / "empty.yaml"
    empty.write_text("{}\n")
    data = [f"--data.{split}={shards / split}" for split in ("train", "validation")]
    folder = f"--trainer.default_root_dir={run}"
    return [f"--config={empty}", *TINY_FIT, *data, folder, *options]


def fit(shards: Path, run: Path, *options: str) -> int:
    return main(["fit", *arguments(shards, run, *options)])


TWO_STEPS = ("--trainer.max_steps=2", "--trainer.val_check_interval=2")


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert fit(shards, folder) == 0
    return folder


def test_fit_leaves_checkpoint_audio_plots_and_summary(run):
    summary = json.loads((run / "summary.json").read_text())
    assert Path(summary["checkpoint"]).is_file()
    assert all(Path(p).is_file() for p in summary["audio"] + summary["plots"]) and summary["audio"]
    for metric in ("ce/stage0", "fad/musicnn", "kl/musicnn", "fad/musicnn/baseline_codec"):
        pair = summary["metrics"][f"val/{metric}"]
        assert np.isfinite([pair["before"], pair["after"]]).all(), metric
    assert set(summary["seconds"]) >= {"training"}
    assert (run / "report.html").read_text().count("<audio") >= 2


def test_a_lora_run_leaves_an_adapter_and_resumes(run, shards, tmp_path):
    options = (f"--model.init_from={run}", "--lora.rank=2", "--trainer.limit_val_batches=0")
    assert fit(shards, tmp_path / "lora", *options, *TWO_STEPS) == 0
    adapter = str(tmp_path / "lora" / "adapter")
    own, added = SavedModel.open(tmp_path / "lora"), SavedModel.open(run).with_adapters([adapter])
    assert own.file == SavedModel.open(run).file
    again = added.weights()
    assert all(torch.allclose(v, again[name], atol=1e-6) for name, v in own.weights().items())
    # Two more steps; base and rank are the checkpoint's.
    last = tmp_path / "lora" / "checkpoints" / "last.ckpt"
    assert fit(shards, tmp_path / "lora", options[2], f"--ckpt_path={last}") == 0


def test_every_figure_of_a_validation_is_a_record(run):
    found = read_records(run / "validation" / "step_0000004" / "records.json")
    records = {record.metric: record for record in found}
    summary = json.loads((run / "summary.json").read_text())
    for metric in ("fad/musicnn", "kl/musicnn", "text/musicnn"):
        record = records[metric]
        assert record.value == pytest.approx(summary["metrics"][f"val/{metric}"]["after"], rel=1e-6)
        assert record.num_clips == 2
        assert record.seed == 0
        assert record.decoding["decoding_steps"] == [2, 1, 1, 1]
        assert record.baseline_codec is not None and record.embedder_hash


def test_metrics_without_weights_are_skipped_in_fit_and_an_error_elsewhere(
    run, shards, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MAGNET_TRAIN_CACHE", str(tmp_path / "cache"))
    metrics = ("--generation.metrics=[fad/vggish,vendi/musicnn]", "--generation.baselines=false")
    says = "no metrics of vggish: VGGish weights: not in the cache"
    with pytest.warns(UserWarning, match=says) as seen:
        assert fit(shards, tmp_path / "run", *metrics, *TWO_STEPS) == 0
    assert sum(says in str(warning.message) for warning in seen) == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "val/vendi/musicnn" in summary["metrics"] and "val/fad/vggish" not in summary["metrics"]
    capsys.readouterr()
    last = f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    options = arguments(shards, tmp_path / "v", *metrics, last)
    line = command_error(capsys, "validate", *(o for o in options if "warmup" not in o))
    assert "VGGish weights: not in the cache" in line


def test_half_precision_trains_every_stage(shards, tmp_path):
    """The backward pass of windowed attention runs outside of autocast."""
    options = (
        "--trainer.precision=bf16-mixed --trainer.max_steps=6 --trainer.limit_val_batches=0 "
        "--generation.num_prompts=0"
    ).split()
    assert fit(shards, tmp_path / "run", *options) == 0
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_the_best_checkpoint_cannot_be_chosen_by_a_missing_metric(
    shards, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MAGNET_TRAIN_CACHE", str(tmp_path / "cache"))
    options = ["--generation.metrics=[fad/vggish]", "--checkpoint.monitor=val/fad/vggish"]
    says = "error: checkpoint.monitor is a metric of vggish, and VGGish weights: not in the cache"
    for more, expected in (
        ([], says),
        ([f"--generation.reference={tmp_path}"], f"error: generation.reference: {tmp_path}/vggish"),
    ):
        assert fit(shards, tmp_path / "run", *options, *more) == 2
        assert expected in capsys.readouterr().err
        assert not (tmp_path / "run" / "validation").exists()  # before anything was decoded


def test_a_budget_of_seconds_ends_decoding_and_says_so(shards, tmp_path):
    options = (
        "--model.span_len=5 --generation.max_seconds=0.001 --generation.batch_size=1 "
        "--generation.at_start=false"
    ).split()
    says = r"validation after 0\.001 s: 1 of 2 prompts of rank 0 decoded"
    with pytest.warns(UserWarning, match=says):
        assert fit(shards, tmp_path / "run", *options, *TWO_STEPS) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["val/num_clips"]["after"] == 1
    (note,) = (tmp_path / "run" / "validation" / "step_0000002").glob("0*.json")
    assert json.loads(note.read_text())["decoding"]["span_len"] == 5  # the model's


def test_a_run_resumes(run, shards):
    options = ("--ckpt_path=auto", "--trainer.max_steps=6", "--generation.num_prompts=0")
    assert fit(shards, run, *options) == 0
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
    averaged, raw = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert averaged.keys() == raw.keys()


def test_validate_and_predict_take_the_checkpoint(run, shards, tmp_path):
    last = run / "checkpoints" / "last.ckpt"
    test = f"--data.test={shards / 'validation'}"
    options = arguments(shards, tmp_path / "v", test, f"--ckpt_path={last}")
    options = [option for option in options if "warmup" not in option]
    quick = ("--generation.metrics=[vendi/musicnn]", "--generation.baselines=false")
    step = torch.load(last, weights_only=True)["global_step"]
    for verb, folder in (("validate", "validation"), ("test", "test")):
        assert main([verb, *options, *quick]) == 0
        (record,) = read_records(tmp_path / "v" / folder / f"step_{step:07d}" / "records.json")
        assert record.system == f"step {step}" and record.num_clips == 2
    assert main(["predict", *options, "--trainer.limit_predict_batches=1"]) == 0
    assert len(list((tmp_path / "v" / "predictions").glob("*.wav"))) == 2


def test_generate_from_a_run_is_reproduced_by_its_json(run, tmp_path):
    options = (
        f"--checkpoint {run} --decoding.decoding_steps=[2,1,1,1] --seed 4 --format flac "
        f"--out {tmp_path}"
    )
    assert main(["generate", "--prompt", "chord: number [1]", "organ", *options.split()]) == 0
    audio = sorted(tmp_path.glob("*.flac"))
    assert len(audio) == 2 and all(p.with_suffix(".png").is_file() for p in audio)
    about = json.loads(audio[0].with_suffix(".json").read_text())
    made = about["options"]
    assert made["seed"] == 4 and made["decoding"]["decoding_steps"] == [2, 1, 1, 1]
    note = str(audio[0].with_suffix(".json"))
    assert main(["generate", "--config", note, "--out", str(tmp_path / "again")]) == 0
    (again,) = (tmp_path / "again").glob("*.flac")
    assert np.array_equal(soundfile.read(audio[0])[0], soundfile.read(again)[0])


def test_mistakes_of_tokenize(capsys, tmp_path, clips):
    for name in ("bare", "plain"):
        (tmp_path / name).mkdir()
    soundfile.write(tmp_path / "plain" / "1.wav", np.zeros(16_000), 16_000)
    for source, options, says in (
        (tmp_path / "none", [], "no such folder"),
        (tmp_path / "bare", [], "no audio files"),
        (tmp_path / "plain", [], "no captions"),
        (clips, ["--crop_s", "-1"], "crop_s"),
        (clips, ["--nonsense", "1"], "nonsense"),
        (clips, ["--codec", "not/there"], "not/there"),
    ):
        args = [str(source), "--out", str(tmp_path / "out"), *options]
        assert says in command_error(capsys, "tokenize", *args)


def test_mistakes_of_fit(capsys, tmp_path, shards):
    (tmp_path / "file").write_text("")
    (tmp_path / "x.ckpt").write_bytes(b"broken")
    index = json.loads((shards / "train" / "index.json").read_text())
    index["codec"]["hash"] = "0" * 16
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.json").write_text(json.dumps(index))
    for option, says in (
        ("--lora.rank=4", "--lora.rank 4: needs --model.init_from"),
        (f"--ckpt_path={tmp_path / 'gone.ckpt'}", "no such file"),
        (f"--ckpt_path={tmp_path / 'x.ckpt'}", "x.ckpt"),
        (f"--data.train={tmp_path}", "index.json"),
        (f"--data.train={tmp_path / 'other'}", "made with codec"),
        (f"--trainer.default_root_dir={tmp_path / 'file' / 'run'}", "cannot be written"),
        ("--generation.decoding.decoding_steps=[1,1,1,1,1,1,1]", "decoding_steps"),
        ("--generation.decoding.autoregressive_s=1", "decodes in parallel only"),
        (f"--checkpoint.dirpath={tmp_path / 'file' / 'x'}", "--checkpoint.dirpath"),
    ):
        assert says in command_error(capsys, "fit", *arguments(shards, tmp_path / "run", option)), (
            option
        )
    assert not (tmp_path / "run" / "validation").exists()  # refused before anything was computed


@pytest.mark.slow
def test_fit_with_two_processes_validates_every_item_once(python, shards, tmp_path):
    """A launch with two gloo ranks has the same counts of items and clips as one process."""
    loggers = [{"class_path": "lightning.pytorch.loggers.WandbLogger"}]
    # Every rank must know the monitored metric.
    two = (
        "--trainer.devices=2 --trainer.strategy=ddp --checkpoint.monitor=val/fad/musicnn "
        "--checkpoint.save_top_k=1 --generation.num_media=2 --generation.at_start=false"
    ).split()
    options = [*TWO_STEPS, *two, f"--trainer.logger={json.dumps(loggers)}"]
    args = ["fit", *arguments(shards, tmp_path / "run", *options)]
    done = subprocess.run(
        [python, "-m", "magnet_train", *args],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
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
    assert [row["gen/clips.nrows"] for row in tables] == [2]
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())) == 1


@pytest.mark.parametrize(
    "verb",
    "fit tokenize generate edit convert evaluate doctor bench dashboard app".split(),
)
def test_every_option_of_ours_has_a_sentence_of_help(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    options = re.split(r" (?=--[a-z])", text[text.index("options:") :])
    others = ("--trainer", "--checkpoint", "--print", "--config", "--optimizer", "--lr")
    own = [option for option in options if not option.startswith(others)]
    without = re.compile(r"--[\w.]+(\.\w+)? [\[{A-Z][^ ]*( \.\.\.\])? \((required, )?type:")
    bare = [option.split()[0] for option in own if without.match(option)]
    assert len(own) > 3 and not bare


def test_a_rank_that_fails_under_nccl_does_not_wait_for_others(monkeypatch, capsys):
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


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_PROCID"])
def test_numbers_of_a_launcher_are_checked(name, monkeypatch, capsys):
    monkeypatch.setenv(name, "x")
    assert command_error(capsys, "fit").startswith(f"error: {name}=x: must be a whole number")


def test_a_terminal_without_a_character_gets_its_escape(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setattr(magnet_train.cli.commands, "run", lambda *_: print("é \udcff"))
    assert main(["bench"]) == 0
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"\\xe9 \\udcff\n"


def test_a_reader_that_has_read_enough_is_no_error(monkeypatch, capfd):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))
    monkeypatch.setattr(magnet_train.cli.commands, "run", lambda *_: print("x" * 100_000))
    assert main(["bench"]) == 141
    sys.stdout.close()
    assert capfd.readouterr().err == ""


def test_srun_in_an_interactive_job_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert main(["fit"]) == 2 and "SLURM_JOB_NAME=magnet srun" in capsys.readouterr().err
