"""An interrupted and resumed run gives the same result as an uninterrupted run."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_data import make_data_codec, write_shards
from helpers_programs import program
from helpers_ranks import fit_on_ranks
from helpers_resume import arguments, differences, ledger, outcome
from make_components import make_t5

import magnet_train.callbacks.checkpoint
from magnet_train.__main__ import main
from magnet_train.callbacks.preemption import Preempted, Preemption
from magnet_train.release import newest_checkpoint
from magnet_train.resume import Layout, newest_intact_checkpoint


@pytest.fixture(scope="module")
def twins(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """Uninterrupted runs by their options, trained once."""
    made: dict[tuple[str, ...], Path] = {}

    class Made(dict):
        def __missing__(self, options: tuple[str, ...]) -> Path:
            run = tmp_path_factory.mktemp("twin") / "run"
            assert main(arguments(data, run, *options)) == 0
            self[options] = run
            return run

    return Made(made)


def equal(twin: Path, run: Path) -> bool:
    """Compare all batches and the final states."""
    assert differences(outcome(twin), outcome(run)) == []
    assert ledger(twin) == ledger(run)
    return True


def stopped(data: Path, run: Path, *options: str, **where: Any) -> None:
    with pytest.raises(RuntimeError, match="as planned"):
        main(arguments(data, run, *options, **where))


# --- wherever it stops ----------------------------------------------------------------------------


MODERN = (
    "--model.network.positions=both",
    "--model.network.convolution=3",
    "--model.stage_weights=[3,1]",
    "--model.more_span_lens=[1,4]",
    "--model.beginning_share=0.5",
)
HYBRID = ("--model.network.order=hybrid", "--model.stage_sampling=example")


@pytest.mark.parametrize(
    ("workers", "accumulated", "stop_at", "more"),
    [(0, 1, 0, ()), (2, 1, 5, MODERN), (2, 3, 23, ()), (0, 1, 5, HYBRID)],
)
def test_a_run_stopped_anywhere_ends_like_an_uninterrupted_one(
    workers: int,
    accumulated: int,
    stop_at: int,
    more: tuple[str, ...],
    data: Path,
    twins: Any,
    tmp_path: Path,
):
    """Stops between checkpoints (written every two steps), before the first one, and in the last
    step."""
    options = (
        f"--data.num_workers={workers}",
        f"--trainer.accumulate_grad_batches={accumulated}",
        *more,
    )
    stopped(data, tmp_path / "run", *options, stop_at=stop_at)
    assert main(arguments(data, tmp_path / "run", *options)) == 0
    assert equal(twins[options], tmp_path / "run")


def test_a_checkpoint_between_two_steps_loses_no_gradient(data: Path, twins: Any, tmp_path: Path):
    options = ("--data.num_workers=0", "--trainer.accumulate_grad_batches=3")
    stopped(
        data,
        tmp_path / "run",
        *options,
        "--checkpoint.every_n_train_steps=100",
        save_at=13,
        stop_at=14,
    )
    assert [p.name for p in tmp_path.rglob("*.ckpt")] == ["between.ckpt"]
    assert main(arguments(data, tmp_path / "run", *options)) == 0
    assert equal(twins[options], tmp_path / "run")


def validations(run: Path) -> list[str]:
    return (run / "ledger.validations").read_text().splitlines()


def test_no_validation_is_skipped(data: Path, twins: Any, tmp_path: Path):
    """Including one in which the run was killed, after the checkpoint of the step before it."""
    options = ("--trainer.val_check_interval=4", "--trainer.accumulate_grad_batches=2")
    stopped(data, tmp_path / "run", *options, stop_in_validation=4)
    # Resumed, it saves step 4 once more, one batch later; the validation before it is done and
    # counts once.
    stopped(data, tmp_path / "run", *options, stop_at=9)
    assert main(arguments(data, tmp_path / "run", *options)) == 0
    assert validations(tmp_path / "run") == validations(twins[options])
    assert len(validations(twins[options])) == 2
    assert equal(twins[options], tmp_path / "run")


def test_a_signal_in_the_last_batch_of_an_epoch_skips_no_validation(
    data: Path, twins: Any, tmp_path: Path
):
    """An epoch of 6 batches and 3 steps, which is also the validation interval."""
    options = ("--trainer.limit_train_batches=6", "--trainer.val_check_interval=3")
    options = (*options, "--trainer.accumulate_grad_batches=2")
    with pytest.raises(Preempted):
        main(arguments(data, tmp_path / "run", *options, signal_at=5, signal=int(signal.SIGTERM)))
    assert main(arguments(data, tmp_path / "run", *options)) == 0
    assert validations(tmp_path / "run") == validations(twins[options])
    assert equal(twins[options], tmp_path / "run")


def test_the_last_validation_is_made_up_for(data: Path, tmp_path: Path):
    stopped(data, tmp_path / "run", "--trainer.val_check_interval=8", stop_in_validation=8)
    assert main(arguments(data, tmp_path / "run", "--trainer.val_check_interval=8")) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["val/ce"]["after"] > 0 and len(validations(tmp_path / "run")) == 1
    assert summary["checkpoint"] == str(tmp_path / "run" / "checkpoints" / "last.ckpt")


@pytest.mark.slow
def test_randomly_killed_ranks_end_like_uninterrupted_ones(python: str):
    script = Path(__file__).parents[1] / "benchmarks" / "kill_and_resume.py"
    done = subprocess.run(
        [python, script, "--kills=2", "--workers=1", "--ranks=2"],
        env=os.environ | {"PYTHONPATH": str(script.parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "accumulated", "at"), [(signal.SIGUSR1, 1, 3), (signal.SIGTERM, 3, 13)]
)
def test_a_signal_saves_and_stops(
    number: signal.Signals,
    accumulated: int,
    at: int,
    data: Path,
    twins: Any,
    tmp_path: Path,
    capsys: Any,
):
    options = ("--data.num_workers=0", f"--trainer.accumulate_grad_batches={accumulated}")
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(Preempted) as ended:
        every = "--checkpoint.every_n_train_steps=100"
        main(arguments(data, tmp_path / "run", *options, every, signal_at=at, signal=int(number)))
    assert ended.value.code == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "stopped at step" in line]
    assert (
        len(lines) == 1
        and number.name in lines[0]
        and "last.ckpt" in lines[0]
        and "--ckpt_path auto" in lines[0]
    )
    assert max(batch for batch, _ in ledger(tmp_path / "run")) == at
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert outcome(tmp_path / "run")["step"] == (at + 1) // accumulated
    assert not (tmp_path / "run" / "summary.json").exists()
    assert main(arguments(data, tmp_path / "run", *options)) == 0
    assert equal(twins[options], tmp_path / "run") and (tmp_path / "run" / "summary.json").exists()
    assert [p.name for p in tmp_path.rglob("last*.ckpt")] == ["last.ckpt"]


@pytest.mark.slow
def test_checkpoints_are_written_between_validations_too(
    data: Path, twins: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run that saves at every batch and is killed in its third resumes with that batch."""
    options = ("--data.num_workers=0", "--trainer.accumulate_grad_batches=1")
    twin = twins[options]
    with monkeypatch.context() as often:
        often.setattr(magnet_train.callbacks.checkpoint, "SAVE_EVERY_S", 0.0)
        stopped(data, tmp_path / "run", *options, stop_at=2)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert main(arguments(data, tmp_path / "run", *options)) == 0
    assert equal(twin, tmp_path / "run")


@pytest.mark.parametrize("earlier", [False, True])
def test_a_run_has_one_last_checkpoint_and_leaves_those_of_an_earlier_run(
    earlier: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In all cases, and `generate` uses it to find the newest weights."""
    if earlier:
        stopped(data, tmp_path / "run", "--ckpt_path=null", stop_at=7)
    monkeypatch.setattr(magnet_train.callbacks.checkpoint, "SAVE_EVERY_S", 0.0)
    options = ("--ckpt_path=null", "--checkpoint.every_n_train_steps=4", "--trainer.max_steps=5")
    assert main(arguments(data, tmp_path / "run", *options)) == 0
    steps = {
        p.name: torch.load(p, weights_only=True)["global_step"]
        for p in (tmp_path / "run" / "checkpoints").glob("last*")
    }
    assert steps == {"last.ckpt": 5}
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "last.ckpt"
    kept = tmp_path / "run" / "checkpoints-1"
    assert kept.is_dir() == earlier and (not earlier or (kept / "step=0000006.ckpt").is_file())
    assert (
        newest_intact_checkpoint([tmp_path / "run", tmp_path / "run" / "checkpoints"]).name
        == "last.ckpt"
    )  # type: ignore[union-attr]


def test_a_run_folder_in_the_home_folder_is_one_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main([*arguments(data, tmp_path / "run"), "--trainer.default_root_dir=~/run"]) == 0
    assert (tmp_path / "run" / "summary.json").is_file() and not (tmp_path / "~").exists()


def test_a_signal_to_one_of_two_ranks_stops_both_and_one_rank_resumes(
    data: Path, tmp_path: Path, caplog: Any
):
    """Before the signal, a bad loss on one rank makes both skip the step."""
    options = ("--trainer.strategy=ddp", "--checkpoint.every_n_train_steps=100")
    told = {"signal_at": 4, "signal": int(signal.SIGUSR1), "bad_losses": (2,)}
    given = arguments(data, tmp_path / "run", *options, **told)
    statuses, text = fit_on_ranks(2, given, tmp_path / "log")
    assert statuses == [0, 0], text[-3000:]
    assert "stopped at step 5 by a signal to another rank" in text
    assert "step 2 skipped, rank 0: loss nan" in text
    assert "step 2 skipped, rank 1: gradients" in text
    lines = ledger(tmp_path / "run")
    assert sorted(lines) == [(batch, rank) for batch in range(5) for rank in range(2)]
    with caplog.at_level("INFO"):
        assert main(arguments(data, tmp_path / "run")) == 0
    (line,) = [r.getMessage() for r in caplog.records if "bit-identical" in r.getMessage()]
    assert "changed from 2 ranks" in line and "example 20 of 20" in line
    assert sorted(set(ledger(tmp_path / "run")) - set(lines)) == [(10, 0), (11, 0), (12, 0)]


def status_of_fork(call: Callable[[], None]) -> int:
    """Exit status of a fork that makes a call; it never returns to pytest."""
    child = os.fork()
    if not child:
        try:
            call()
            os._exit(0)
        finally:
            os._exit(70)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("later_s", "is_saving", "status"),
    [(0.0, False, 0), (11.0, False, -signal.SIGTERM), (11.0, True, 0)],
)
def test_only_a_later_second_signal_ends_the_process_at_once(
    later_s: float, is_saving: bool, status: int
):
    """Within seconds it is the same signal, from the scheduler and a launcher."""

    def signalled_twice() -> None:
        callback = Preemption()
        signal.signal(signal.SIGTERM, callback._on_signal)
        os.kill(os.getpid(), signal.SIGTERM)
        callback._received_at -= later_s
        callback._is_saving = is_saving
        os.kill(os.getpid(), signal.SIGTERM)

    assert status_of_fork(signalled_twice) == status


def test_the_time_that_is_up_in_a_validation_queues_the_job_again(tmp_path: Path):
    called = tmp_path / "called"
    program(tmp_path / "scontrol", f'echo "$@" > {called}')

    def out_of_time() -> None:
        os.environ |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        callback = Preemption()
        callback._requeue_signal, callback._is_first_rank = signal.SIGUSR1, True
        callback._on_signal(signal.SIGUSR1, None)
        callback._received_at -= 11
        callback._on_signal(signal.SIGTERM, None)

    assert status_of_fork(out_of_time) == -signal.SIGTERM
    assert called.read_text() == "requeue 7\n"


def test_under_slurm_a_job_is_requeued_and_resumed(
    data: Path, twins: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """With a fake scontrol. No checkpoint of Lightning is left, which later starts would prefer."""
    options = ("--data.num_workers=0", "--trainer.accumulate_grad_batches=1")
    twin = twins[options]
    called = tmp_path / "called"
    program(tmp_path / "scontrol", f'echo "$@" >> {called}')
    numbers = signal.SIGTERM, signal.SIGUSR1
    before = [signal.getsignal(n) for n in numbers]

    def requeued() -> bool:
        """Whether the handlers are restored before SLURM ends the requeued job."""
        ignored = [signal.getsignal(n) for n in numbers] == [signal.SIG_IGN] * 2
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        return ignored

    def signalled(at: int, number: signal.Signals) -> Any:
        """Exit status of a start that is told to end."""
        with pytest.raises(Preempted) as ended:
            main(arguments(data, tmp_path / "run", *options, signal_at=at, signal=int(number)))
        return ended.value.code

    with monkeypatch.context() as slurm:
        job = {"JOB_ID": "7", "JOB_NAME": "fit", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}
        for name, value in job.items():
            slurm.setenv(f"SLURM_{name}", value)
        slurm.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        signalled(2, signal.SIGUSR1)
        assert "job 7 is requeued" in capsys.readouterr().out and requeued()
        slurm.setenv("SLURM_RESTART_COUNT", "1")  # from now on a start goes on without being told
        slurm.setenv("SLURM_ARRAY_JOB_ID", "5")
        slurm.setenv("SLURM_ARRAY_TASK_ID", "2")
        signalled(3, signal.SIGUSR1)
        assert requeued()
        signalled(5, signal.SIGTERM)  # SLURM itself queues again what it preempts
        assert [signal.getsignal(n) for n in numbers] == before
        assert called.read_text() == "requeue 7\nrequeue 5_2\n"
        program(tmp_path / "scontrol", "echo Job is gone >&2; exit 1")
        assert signalled(6, signal.SIGUSR1) == 1  # by which the job file knows
        says = "SLURM does not requeue job 5_2 (Job is gone): submit it again, unless"
        assert says in capsys.readouterr().out
        assert requeued()
        assert not [*(tmp_path / "run").glob("hpc*")]
        assert main(arguments(data, tmp_path / "run", *options)) == 0
    assert equal(twin, tmp_path / "run")


# --- which checkpoint -----------------------------------------------------------------------------


def test_a_truncated_checkpoint_costs_only_what_came_after_the_one_before(
    data: Path, twins: Any, tmp_path: Path
):
    options = ("--data.num_workers=0", "--trainer.accumulate_grad_batches=1")
    stopped(data, tmp_path / "run", *options, "--checkpoint.save_top_k=-1", stop_at=5)
    for name in ("last.ckpt", "step=0000004.ckpt"):
        path = tmp_path / "run" / "checkpoints" / name
        path.write_bytes(path.read_bytes()[:-2000])
    with pytest.warns(UserWarning, match="skipping checkpoint") as caught:
        assert main(arguments(data, tmp_path / "run", *options)) == 0
    named = [str(w.message) for w in caught if "skipping checkpoint" in str(w.message)]
    assert sum("last.ckpt" in n for n in named) == sum("0000004" in n for n in named) == 1
    assert equal(twins[options], tmp_path / "run")


# --- whose checkpoint -----------------------------------------------------------------------------


def test_what_another_run_left_is_refused(data: Path, tmp_path: Path, capsys: Any, caplog: Any):
    stopped(data, tmp_path / "run", stop_at=3)
    other = make_data_codec(tmp_path / "other" / "codec", seed=1)
    write_shards(tmp_path / "other" / "train", other, (5, 3, 4))
    write_shards(tmp_path / "other" / "validation", other, (2,))
    write_shards(tmp_path / "fewer", str(data / "codec"), (5, 3))
    write_shards(tmp_path / "validation", str(data / "codec"), (3,))
    make_t5(tmp_path / "t5", dim=384)
    changed = [
        ([f"--model.text_encoder={tmp_path / 't5'}"], "another text encoder"),
        (["--model.network.context=9"], "network.context=9 (checkpoint: 5)"),
        (["--model.optimizer.name=dadapt_adam"], "optimizer.name=dadapt_adam (checkpoint: adamw)"),
        ([f"--data.train={tmp_path / 'fewer'}"], "other shards"),
        (
            [
                f"--model.codec={other}",
                f"--data.train={tmp_path / 'other' / 'train'}",
                f"--data.validation={tmp_path / 'other' / 'validation'}",
            ],
            "codec",
        ),
    ]
    for options, says in changed:
        capsys.readouterr()
        assert main(arguments(data, tmp_path / "run", *options)) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
        assert says in line and "--ckpt_path" in line
    with caplog.at_level("INFO"):
        assert (
            main(arguments(data, tmp_path / "run", f"--data.validation={tmp_path / 'validation'}"))
            == 0
        )
    assert any("another validation set" in r.getMessage() for r in caplog.records)
    assert outcome(tmp_path / "run")["step"] == 8  # nothing was lost


def test_a_run_that_skipped_a_shard_ends_like_an_uninterrupted_one_or_warns(
    data: Path, tmp_path: Path, caplog: Any
):
    shutil.copytree(data / "train", tmp_path / "train")
    shard = tmp_path / "train" / "shard-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:2000])
    options = f"--data.train={tmp_path / 'train'}", "--trainer.max_steps=12"
    assert main(arguments(data, tmp_path / "twin", *options)) == 0
    stopped(data, tmp_path / "run", *options, stop_at=9)
    with caplog.at_level("INFO"):
        assert main(arguments(data, tmp_path / "run", *options)) == 0
    assert equal(tmp_path / "twin", tmp_path / "run")
    said = "bit-identical to a run without the interruption only if the same shards are still"
    assert any(said in r.getMessage() for r in caplog.records)


def test_a_resumed_run_uses_the_given_settings(data: Path, tmp_path: Path, caplog: Any):
    """For example a lower learning rate, as advised after steps without a finite loss."""
    stopped(data, tmp_path / "run", "--model.optimizer.schedule=constant", stop_at=5)
    before = outcome(tmp_path / "run")
    given = (
        "--model.optimizer.lr=0.001",
        "--model.optimizer.weight_decay=0.2",
        "--model.span_len=2",
    )
    with caplog.at_level("INFO"):
        assert (
            main(arguments(data, tmp_path / "run", "--model.optimizer.schedule=constant", *given))
            == 0
        )
    (line,) = [r.getMessage() for r in caplog.records if "settings that differ" in r.getMessage()]
    for text in (
        "optimizer.lr=0.001 (checkpoint: 0.01)",
        "weight_decay=0.2 (checkpoint: 0.1)",
        "span_len=2 (checkpoint: 3)",
    ):
        assert text in line
    after = outcome(tmp_path / "run")
    (group,) = after["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (0.001, 0.001, 0.2)
    assert (before["step"], after["step"]) == (4, 8)
    moved = [
        (after["current_model_state"][k] - v).abs().max()
        for k, v in before["current_model_state"].items()
    ]
    assert (
        0.001 < float(max(moved)) < 0.008
    )  # four steps, each at most about as long as the learning rate


# --- on other ranks -------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", range(1, 6))
@pytest.mark.parametrize("accumulated", [1, 2, 3])
def test_as_many_examples_on_other_ranks(ranks: int, accumulated: int):
    """Never more than were done, less than one step fewer, and complete steps."""
    before, now = Layout(3, 4, 2, 0), Layout(ranks, 4, accumulated, 0)
    for done in range(0, 60, 2):
        batches = now.batches(done, before)
        missing = done * 3 * 4 - batches * ranks * 4
        assert 0 <= missing < ranks * 4 * accumulated and batches % accumulated == 0


def test_another_layout_resumes_at_the_same_example_and_says_so(
    data: Path, tmp_path: Path, caplog: Any
):
    stopped(data, tmp_path / "run", stop_at=5)  # saved after 4 batches of 2
    with caplog.at_level("INFO"):
        assert main(arguments(data, tmp_path / "run", "--data.batch_size=1")) == 0
    (line,) = [r.getMessage() for r in caplog.records if "bit-identical" in r.getMessage()]
    assert (
        "example 8 of 8" in line
        and "1 ranks x 1 examples" in line
        and "1 ranks x 2 examples" in line
    )
    lines = (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(x)["batch"] for x in lines] == [0, 1, 2, 3, 4, 8, 9, 10, 11]


def test_another_layout_skips_no_validation(data: Path, tmp_path: Path):
    """Killed in the validation after step 4; resumed with half the batch, accumulated twice."""
    options = ("--data.global_batch_size=2", "--trainer.val_check_interval=4")
    stopped(data, tmp_path / "run", *options, stop_in_validation=4)
    assert main(arguments(data, tmp_path / "run", *options, "--data.batch_size=1")) == 0
    lines = (tmp_path / "run" / "ledger.validations").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["4", "8"]
