"""Sessions of a run are one W&B run, also offline; all logged names are defined; a refused key does
not stop training."""

import csv
import io
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import soundfile
from helpers_data import make_data_codec, write_shards
from helpers_programs import LONGEST_S
from helpers_wandb import history, recorder, records, server

from magnet_train.__main__ import main
from magnet_train.callbacks import tracking
from magnet_train.callbacks.tracking import Tracking
from magnet_train.common.errors import UserError
from magnet_train.tracking import logged
from magnet_train.tracking.environment import commit_of
from magnet_train.tracking.wandb_session import prepare_wandb

ROOT = Path(__file__).parents[1]
# Scores of single clips need 6 seconds; everything else is as small as it gets.
TINY = (
    "--model.network.dim=16 --model.network.num_heads=2 --model.network.num_layers=1 "
    "--model.crop_s=6.4 --model.optimizer.warmup_steps=1 --model.optimizer.lr=0.01 "
    "--data.batch_size=2 --data.num_workers=0 --trainer.accelerator=cpu --trainer.max_steps=6 "
    "--trainer.val_check_interval=2 --trainer.log_every_n_steps=1 "
    "--trainer.enable_progress_bar=false --trainer.enable_model_summary=false "
    "--trainer.num_sanity_val_steps=0 --generation.num_prompts=2 --generation.batch_size=2 "
    "--generation.num_media=2 --generation.decoding.decoding_steps=[2,1,1,1] "
    "--checkpoint.every_n_train_steps=4 --ckpt_path=auto"
).split()


@pytest.fixture(autouse=True)
def _session() -> Iterator[None]:
    """W&B in the state of a new process, before and after."""
    import wandb

    before = dict(os.environ)
    yield
    wandb.finish()
    wandb.teardown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    codec = make_data_codec(folder / "codec")
    write_shards(folder / "train", codec, (4, 4), num_frames=320)
    write_shards(folder / "validation", codec, (2,), num_frames=320)
    return folder


def fit(data: Path, run: Path, *options: str, stop_at: int = -1) -> int:
    run.mkdir(parents=True, exist_ok=True)
    config = run.parent / f"{run.name}.json"
    ledger = {
        "class_path": "helpers_resume.Ledger",
        "init_args": {"file": str(run / "ledger"), "stop_at": stop_at},
    }
    config.write_text(json.dumps({"trainer": {"callbacks": [ledger]}}))
    folders = [f"--data.{split}={data / split}" for split in ("train", "validation")]
    args = ["fit", f"--config={config}", *TINY, *folders, f"--model.codec={data / 'codec'}"]
    return main([*args, f"--trainer.default_root_dir={run}", *options])


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sessions: stopped in step 5 with a checkpoint at 4, and resumed from it to 6."""
    import wandb

    folder = tmp_path_factory.mktemp("runs") / "run"
    before = dict(os.environ)
    for stop_at in (5, -1):
        if stop_at > 0:
            with pytest.raises(RuntimeError, match="as planned"):
                fit(data, folder, stop_at=stop_at)
            # Leaves the one from before the validation of step 4.
            (folder / "checkpoints" / "last.ckpt").unlink()
        else:
            assert fit(data, folder) == 0
        wandb.finish()
        wandb.teardown()
        os.environ.clear()
        os.environ.update(before)
    return folder


def test_the_best_values_are_in_the_summary(monkeypatch):
    class Logger:
        experiment = SimpleNamespace(summary={})

    monkeypatch.setattr(tracking, "WandbLogger", Logger)
    trainer: Any = SimpleNamespace(is_global_zero=True, sanity_checking=False, loggers=[Logger()])
    callback = Tracking()
    for ce, text in ((3.0, 0.1), (2.0, 0.4), (4.0, 0.2), (float("nan"), 0.3)):
        trainer.callback_metrics = {"val/ce": ce, "val/text/musicnn": text, "train/loss": ce}
        callback._update_best(trainer)
        resumed = Tracking()
        resumed.load_state_dict(callback.state_dict())
        callback = resumed
    best = {"best/val/ce": 2.0, "best/val/text/musicnn": 0.4}
    assert Logger.experiment.summary == best


def csv_rows(run: Path) -> list[list[dict[str, str]]]:
    """Rows of each session's file, without empty cells."""
    files = sorted(run.glob("csv/version_*/metrics.csv"))
    return [
        [{k: v for k, v in row.items() if v} for row in csv.DictReader(file.open())]
        for file in files
    ]


# --- names ----------------------------------------------------------------------------------------


def test_everything_logged_is_defined_and_everything_defined_is_logged(run: Path):
    keys = {key for rows in csv_rows(run) for row in rows for key in row} - {"step"}
    undefined = [key for key in keys if logged.find(key) is None]
    assert not undefined and len(keys) > 30
    media = {"gen/clips", "gen/audio", "gen/plots", "gen/real"}
    rows = history(records(run))
    of_wandb = {key.split(".")[0] if key.startswith("gen/") else key for row in rows for key in row}
    assert {key for key in of_wandb if key[0] != "_"} == keys | media | {logged.STEP}
    never = {"speed/mfu", "train/steps_skipped"}  # without a known device, without a bad step
    others = {
        entry.name for entry in logged.LOGGED if entry.section == "more of validation"
    }  # nobody asked for them
    found = {entry.name for key in keys | media if (entry := logged.find(key)) is not None}
    assert found == {entry.name for entry in logged.LOGGED} - never - others


def test_hours_of_audio_are_logged_with_each_validation(run: Path):
    rows = [row for row in history(records(run)) if "val/ce" in row]
    assert len(rows) == 5 and rows[0][logged.HOURS] == 0.0  # untrained, 2, 4; again 4, 6
    # 2 examples of 6.4 s a step.
    assert [round(row[logged.HOURS] * 3600 / 12.8, 3) for row in rows[1:]] == [2, 4, 4, 6]


def test_the_document_has_the_table(run: Path):
    assert logged.table() in (ROOT / "docs/metrics.md").read_text()


# --- one run of W&B -------------------------------------------------------------------------------


def test_sessions_have_one_id_and_the_second_replaces_rows_after_the_checkpoint(
    run: Path,
):
    found = records(run)
    sessions = [r.run for r in found if r.WhichOneof("record_type") == "run" and r.run.project]
    assert len(list(run.glob("wandb/offline-run-*"))) == 2
    assert {s.run_id for s in sessions} == {(run / "wandb_run_id").read_text().strip()}
    assert {(s.project, s.job_type, s.display_name) for s in sessions} == {
        ("magnet_train", "fit", "run")
    }
    assert {s.resume for s in sessions} == {True}
    tables = [row for row in history(found) if "gen/clips.increment_num" in row]
    steps, parts = (
        [row[logged.STEP] for row in tables],
        [row["gen/clips.previous_increments_paths"] for row in tables],
    )
    assert steps == [0, 2, 4, 4, 6]
    # The checkpoint of step 4 was written before that step's validation, so its rows are logged
    # again, but not duplicated.
    own = [row["gen/clips.artifact_path"] for row in tables]
    assert parts[3] == own[:2] and parts[4] == [*own[:2], own[3]]
    assert [row["gen/clips.increment_num"] for row in tables] == [0, 1, 2, 2, 3]


def test_a_table_and_its_audio_wait_in_the_run_folder(run: Path):
    artifacts = [r.artifact for r in records(run) if r.WhichOneof("record_type") == "artifact"]
    waiting = [
        {entry.path: Path(entry.local_path) for entry in a.manifest.contents} for a in artifacts
    ]
    assert len(waiting) == 5 and all(
        p.is_relative_to(run) and p.is_file() for files in waiting for p in files.values()
    )
    (table,) = [path for name, path in waiting[0].items() if name.endswith(".table.json")]
    content = json.loads(table.read_text())
    assert tuple(content["columns"]) == Tracking.COLUMNS and len(content["data"]) == 2
    step, item, caption, audio, picture, score = content["data"][1]
    assert (step, item, caption) == (0, "item0001", "caption 1") and score > 0
    assert audio["path"] in waiting[0] and picture["path"] in waiting[0]
    assert len(list(run.glob("wandb/offline-run-*/files/media/audio/gen/audio*.wav"))) == 10
    assert len(list(run.glob("wandb/offline-run-*/files/media/audio/gen/real*.wav"))) == 2 * 2


def test_configuration_environment_and_data_are_known_to_every_logger(run: Path):
    config: dict[str, Any] = {}
    for record in records(run):
        if record.WhichOneof("record_type") == "config":
            config |= {
                item.key: json.loads(item.value_json) for item in record.config.update if item.key
            }
    assert config["model"]["network"]["dim"] == 16 and config["trainer"]["max_steps"] == 6
    tags = [list(r.run.tags) for r in records(run) if r.WhichOneof("record_type") == "run"]
    assert tags[-1] == ["codec"]
    sessions = json.loads((run / "environment.json").read_text())
    assert len(sessions) == 2 and config["environment"] == sessions[1]
    assert sessions[0]["data"] == sessions[1]["data"] and set(sessions[0]["data"]) == {
        "train",
        "validation",
    }
    assert sessions[0]["num_ranks"] == 1 and sessions[0]["torch"] and "gpu" in sessions[0]
    assert not any(
        "API_KEY" in text or str(Path.home()) in text for text in map(json.dumps, sessions)
    )


def test_steps_done_again_have_the_same_values_in_both_versions_of_the_csv(run: Path):
    before, after = csv_rows(run)
    drifting = ("speed/",)
    first = {int(row["step"]): row for row in before if "train/loss" in row}
    second = {int(row["step"]): row for row in after if "train/loss" in row}
    assert set(first) == {0, 1, 2, 3, 4}
    assert set(second) == {3, 4, 5}  # also that of the checkpoint, which a kill may have lost
    for step in (3, 4):
        mine, again = first[step], second[step]
        assert mine.keys() == again.keys()
        assert all(mine[k] == v for k, v in again.items() if not k.startswith(drifting))
    # A row has the stage of its step, and its gradients.
    for row in (first | second).values():
        assert (
            len([key for key in row if key.startswith("train/ce/")]) == 1
            and "train/grad_norm" in row
        )


def test_a_new_run_in_a_used_folder_is_another_wandb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ids = []
    for resumes in (False, True, False):
        for name in ("WANDB_RUN_ID", "WANDB_NAME"):
            monkeypatch.delenv(name, raising=False)
        prepare_wandb(tmp_path, "fit", resumes, online=False)
        ids.append(os.environ["WANDB_RUN_ID"])
    assert ids[0] == ids[1] != ids[2]
    monkeypatch.setenv("WANDB_RUN_ID", "mine")  # an agent's, or one's own
    prepare_wandb(tmp_path, "fit", True, online=False)
    assert (
        os.environ["WANDB_RUN_ID"] == "mine" and (tmp_path / "wandb_run_id").read_text() == "mine\n"
    )
    monkeypatch.delenv("WANDB_RUN_ID")
    prepare_wandb(tmp_path, "validate", True, online=False)
    assert "WANDB_RUN_ID" not in os.environ


@pytest.mark.parametrize(
    ("name", "value"),
    [("SILENT", "abc"), ("MODE", "xyz"), ("INIT_TIMEOUT", "abc"), ("RUN_ID", "a/b"), ("TAGS", ",")],
)
def test_a_variable_that_wandb_refuses_is_named_before_anything_starts(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(f"WANDB_{name}", value)
    with pytest.raises(UserError, match=rf"^WANDB_{name}={value}: .+; correct or unset it$"):
        prepare_wandb(tmp_path, "fit", resumes=False, online=False)


def test_wandb_sync_makes_one_run_of_two_sessions(python: str, tmp_path: Path):
    """As far as possible without W&B: rows and their offsets as sent to a server."""
    script = tmp_path / "session.py"
    script.write_text(
        "import sys, wandb\n"
        "with wandb.init(project='p') as run:\n"
        "    for step in map(int, sys.argv[1:]): run.log({'trainer/global_step': step})\n"
    )
    given = {"WANDB_RUN_ID": "abcdef1234", "WANDB_RESUME": "allow", "WANDB_DIR": str(tmp_path)}
    for steps in ("012", "23"):
        subprocess.run(
            [python, str(script), *steps],
            env=os.environ | given | {"WANDB_MODE": "offline"},
            check=True,
            capture_output=True,
            cwd=tmp_path,
        )
    with recorder() as got:
        env = os.environ | {
            "WANDB_BASE_URL": got.url,
            "WANDB_API_KEY": "k" * 40,
            "HOME": str(tmp_path),
        }
        env.pop("WANDB_MODE")
        wandb = [python, "-m", "wandb", "sync", str(tmp_path / "wandb")]
        subprocess.run(
            wandb, env=env, check=True, timeout=LONGEST_S, capture_output=True, cwd=tmp_path
        )
    assert (
        got.offsets[0] == 0 and 3 in got.offsets
    )  # the second session begins where the first one ended
    steps = [(row["_step"], row["trainer/global_step"]) for row in got.rows]
    assert steps == [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3)]


# --- keys and networks ----------------------------------------------------------------------------


def refuse(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return 401, {"errors": [{"message": "permission denied"}]}


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without a key; returns a key in a valid format."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "10")
    return tmp_path / "run"


def test_a_refused_key_ends_a_run_before_anything_is_trained(
    online: Path, data: Path, monkeypatch, capsys
):
    with server(refuse) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        assert fit(data, online) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert "key is refused" in line and "permission denied" in line
    assert "WANDB_API_KEY" in line and "WANDB_MODE=offline" in line
    left = [str(path.relative_to(online)) for path in online.rglob("*")]
    assert sorted(left) == [".fit.lock", "checkpoints"]  # and no checkpoint


def test_an_unreachable_server_stops_a_new_run_but_not_a_resumed_one(online: Path, monkeypatch):
    import wandb

    online.mkdir()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"the server cannot be reached .*WANDB_MODE=offline"):
        prepare_wandb(
            online, "fit", resumes=True, online=True
        )  # a first submission says --ckpt_path auto too
    assert not (online / "wandb_run_id").exists()
    (online / "wandb_run_id").write_text("abcdef1234\n")
    monkeypatch.delenv("WANDB_RUN_ID")
    with pytest.warns(UserWarning, match="logged offline, and `wandb sync .*run/wandb` uploads it"):
        prepare_wandb(online, "fit", resumes=True, online=True)
    assert wandb.setup().settings.mode == "offline" and os.environ["WANDB_RUN_ID"] == "abcdef1234"


def test_without_a_key_a_run_is_logged_offline(online: Path, monkeypatch):
    import wandb

    online.mkdir()
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.warns(UserWarning, match="no API key .* logged offline"):
        prepare_wandb(online, "fit", resumes=False, online=True)
    assert wandb.setup().settings.mode == "offline"


# --- the rest -------------------------------------------------------------------------------------


def test_checkpoints_become_versions_with_aliases(run: Path, tmp_path: Path):
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    os.environ["WANDB_DATA_DIR"] = str(tmp_path)
    logger = WandbLogger(project="p", save_dir=str(tmp_path))
    best, last = run / "checkpoints" / "step=0000006.ckpt", run / "checkpoints" / "last.ckpt"
    saved = SimpleNamespace(best_model_path=str(best), last_model_path=str(last))
    trainer: Any = SimpleNamespace(is_global_zero=True, checkpoint_callback=saved, loggers=[logger])
    Tracking().on_fit_end(trainer, None)  # type: ignore[arg-type]  # off unless asked for
    Tracking(upload_checkpoints=True).on_fit_end(trainer, None)  # type: ignore[arg-type]
    wandb.finish()
    wandb.teardown()
    logged_ = [r.artifact for r in records(tmp_path) if r.WhichOneof("record_type") == "artifact"]
    # W&B adds "latest" to each and moves it to the last version.
    assert [sorted(a.aliases) for a in logged_] == [
        ["best", "latest", "step-6"],
        ["latest", "step-6"],
    ]
    assert {(a.type, len(a.manifest.contents)) for a in logged_} == {("model", 1)}
    assert len({a.name for a in logged_}) == 1


def test_tensorboard_gets_figures_audio_and_pictures(data: Path, tmp_path: Path, capsys):
    """Logs of a `fit`, read with TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    options = (
        "--trainer.logger=TensorBoardLogger",
        "--trainer.logger.save_dir=.",
        "--trainer.max_steps=2",
    )
    assert fit(data, run, *options) == 0
    assert f"\ntensorboard tensorboard --logdir {run}\n" in capsys.readouterr().out
    (folder,) = (run / "lightning_logs").iterdir()
    shown = EventAccumulator(str(folder)).Reload()
    assert {"train/loss", "train/audio_hours", "val/ce", "val/num_clips"} <= {
        *shown.Tags()["scalars"]
    }
    summary = json.loads((run / "summary.json").read_text())
    assert shown.Scalars("val/ce")[-1].value == pytest.approx(
        summary["metrics"]["val/ce"]["after"], rel=1e-6
    )
    files = sorted(run.glob("validation/step_0000002/*.wav"))
    assert shown.Tags()["audio"] == [f"gen/audio/{file.stem}" for file in files] and len(files) == 2
    for file in files:
        audio, picture = (
            shown.Audio(f"gen/audio/{file.stem}")[-1],
            shown.Images(f"gen/plots/{file.stem}")[-1],
        )
        wav, rate = soundfile.read(io.BytesIO(audio.encoded_audio_string))
        assert (audio.step, rate) == (2, 8000) and np.abs(
            wav - soundfile.read(file)[0]
        ).max() < 2**-14
        drawn = matplotlib.image.imread(file.with_suffix(".png"))
        assert picture.step == 2 and (picture.height, picture.width) == drawn.shape[:2]


def test_the_commit_is_the_one_of_the_code_not_of_another_repository(tmp_path: Path):
    def git(*args: str) -> None:
        own = ["-c", "user.name=n", "-c", "user.email=e@e", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *own, *args], check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert commit_of(package) is None
    git("init")
    git("commit", "--allow-empty", "-m", "m")
    assert commit_of(package) is None  # in the repository, but none of its files
    git("add", ".")
    git("commit", "-m", "m")
    assert len(commit_of(package) or "") == 40
    (package / "__init__.py").write_text("changed")
    assert (commit_of(package) or "").endswith("-dirty")
