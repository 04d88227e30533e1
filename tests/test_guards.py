"""NaN guard, watchdog and throughput."""

import csv
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_resume import arguments, ledger
from torch.utils.data import IterableDataset

import magnet_train.callbacks.watchdog as watchdog_module
from magnet_train.__main__ import main
from magnet_train.callbacks.watchdog import Watchdog
from magnet_train.checks.cost import peak_flop
from magnet_train.data.timed_loader import TimedLoader


def checkpoint(run: Path, step: int) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"step={step:07d}.ckpt", weights_only=True)


ALL = ("--checkpoint.every_n_train_steps=1", "--checkpoint.save_top_k=-1")


@pytest.mark.parametrize("kind", ["bad_losses", "bad_gradients"])
def test_a_bad_step_changes_nothing_and_is_named(kind: str, data: Path, tmp_path: Path):
    with pytest.warns(UserWarning, match="skipped") as caught:
        assert main(arguments(data, tmp_path / "run", *ALL, **{kind: (3,)})) == 0
    named = [str(w.message) for w in caught if "skipped" in str(w.message)]
    keys = ledger(tmp_path / "run")[3, 0]["keys"]
    assert len(named) == 1
    assert all(key in named[0] for key in keys)
    assert "step 3" in named[0]
    assert "rank 0" in named[0]
    before, after, later = (checkpoint(tmp_path / "run", step) for step in (3, 4, 5))
    for name, value in before["current_model_state"].items():
        assert torch.equal(value, after["current_model_state"][name])
    for name, value in before["optimizer_states"][0]["state"].items():
        assert all(
            torch.equal(v, after["optimizer_states"][0]["state"][name][k]) for k, v in value.items()
        )
    assert any(
        not torch.equal(v, later["current_model_state"][k])
        for k, v in before["current_model_state"].items()
    )
    assert all(v.isfinite().all() for v in later["state_dict"].values())


def test_with_accumulation_the_batch_that_was_bad_is_named(data: Path, tmp_path: Path):
    options = ("--trainer.accumulate_grad_batches=3", "--trainer.max_steps=3")
    with pytest.warns(UserWarning, match="skipped") as caught:
        assert main(arguments(data, tmp_path / "run", *options, bad_losses=(4,))) == 0
    (named,) = [str(w.message) for w in caught if "skipped" in str(w.message)]
    lines = ledger(tmp_path / "run")
    assert ", ".join(lines[4, 0]["keys"]) in named and ", ".join(lines[3, 0]["keys"]) not in named


def test_too_many_in_a_row_end_the_run_and_keep_the_last_good_checkpoint(
    data: Path, tmp_path: Path, capsys: Any
):
    options = ("--nan_guard.max_consecutive=3", "--trainer.log_every_n_steps=1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Two bad steps in a row are allowed; a resumed run continues the count.
        assert (
            main(arguments(data, tmp_path / "run", *options, bad_losses=(0, 1, 3, 5, 6, 7, 8))) == 2
        )
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert "3 steps in a row" in line and "lr" in line
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    assert all(v.isfinite().all() for v in saved["current_model_state"].values())
    assert saved["callbacks"]["NanGuard"] == {"skipped": 4, "consecutive": 1}


HALF = (
    '--trainer.plugins+={"class_path": "lightning.pytorch.plugins.MixedPrecision", '
    '"init_args": {"precision": "16-mixed", "device": "cpu"}}'
)


def test_a_scaler_looks_for_its_scale_and_is_not_let_look_for_ever(
    data: Path, tmp_path: Path, capsys: Any
):
    """With torch's scaler, on a CPU: it halves 65536 at each step that overflows."""
    options = (HALF, "--nan_guard.max_consecutive=3", "--trainer.max_steps=40", *ALL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert (
            main(
                arguments(
                    data,
                    tmp_path / "a",
                    *options,
                    "--trainer.max_steps=8",
                    bad_gradients=(1, 2, 3, 4),
                )
            )
            == 0
        )
    assert not [w for w in caught if "skipped" in str(w.message)]
    before, after = (checkpoint(tmp_path / "a", step) for step in (1, 5))
    assert after["callbacks"]["NanGuard"] == {"skipped": 4, "consecutive": 4}
    assert after["MixedPrecision"]["scale"] == 65536 / 2**4
    for name, value in before["current_model_state"].items():
        assert torch.equal(value, after["current_model_state"][name])
    with pytest.warns(UserWarning, match="step 17 skipped, rank 0: gradients"):
        assert (
            main(arguments(data, tmp_path / "b", *options, bad_gradients=tuple(range(1, 40)))) == 2
        )
    assert "steps in a row without a finite loss and gradients" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="step 3 skipped, rank 0: loss nan"):
        assert main(arguments(data, tmp_path / "c", *options, bad_losses=(3, 4, 5))) == 2


# --- the watchdog ---------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Advances the watchdog's clock without waiting."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(watchdog_module, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def passes(seconds: float) -> None:
        clock.now += seconds

    return passes


def heard(watchdog: Watchdog, at_least: int) -> list[str]:
    """Its messages within a fifth of a second, or until there are as many as expected."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        deadline = time.monotonic() + 60
        while True:
            time.sleep(8 * watchdog.min_seconds / 4)
            found = [str(w.message) for w in caught if "usually" in str(w.message)]
            if len(found) >= at_least or time.monotonic() > deadline:
                return found


def test_the_watchdog_names_rank_and_phase_once(passes: Callable[[float], None]):
    loader = SimpleNamespace(waiting_since=None)
    trainer: Any = SimpleNamespace(global_rank=3, global_step=17, train_dataloader=loader)
    watchdog = Watchdog(min_seconds=0.1)
    watchdog.on_train_start(trainer, None)  # type: ignore[arg-type]
    hooks = (watchdog.on_train_batch_start, watchdog.on_train_batch_end)
    for _ in range(5):
        for hook in hooks:
            hook(trainer, *[None] * (3 if hook is hooks[0] else 4))  # type: ignore[arg-type]
            passes(0.02)
    passes(0.17)
    assert heard(watchdog, 0) == []  # not ten times as long
    passes(0.02)
    (line,) = heard(watchdog, 1)
    assert "rank 3" in line
    assert "step 17" in line
    assert "between steps" in line
    assert "usually 0.02 s" in line
    passes(100)
    assert heard(watchdog, 0) == []  # already reported
    hooks[0](trainer, None, None, 0)  # type: ignore[arg-type]
    passes(0.21)
    (line,) = heard(watchdog, 1)
    assert "training step" in line
    hooks[1](trainer, None, None, None, 0)  # type: ignore[arg-type]
    loader.waiting_since = 0.0
    passes(0.21)
    (line,) = heard(watchdog, 1)
    assert "waiting for data" in line
    # The first validation has no earlier one to compare with.
    watchdog.on_validation_start(trainer, None)  # type: ignore
    passes(100)
    assert heard(watchdog, 0) == []
    watchdog.on_exception(trainer, None, RuntimeError())  # type: ignore[arg-type]
    assert watchdog._thread is None


# --- throughput -----------------------------------------------------------------------------------


class Slow(IterableDataset):
    def __iter__(self):
        for number in range(5):
            time.sleep(0.05)
            yield number


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_counts_what_it_is_waited_for(workers: int):
    loader = TimedLoader(Slow(), batch_size=None, num_workers=workers)
    begin = time.monotonic()
    for number, item in enumerate(loader):
        assert item == number and loader.waiting_since is None
        time.sleep(0.02)
    # A process of its own makes the next one meanwhile: how much it is waited for, the machine
    # decides.
    assert (0 if workers else 0.05 * 5) < loader.waited_s <= time.monotonic() - begin - 0.02 * 5


def test_the_first_signal_to_all_processes_of_a_job_costs_no_batch():
    before = multiprocessing.active_children()  # ending threads of another test
    loader = TimedLoader(Slow(), batch_size=None, num_workers=1)
    items = iter(loader)
    assert next(items) == 0
    (process,) = (child for child in multiprocessing.active_children() if child not in before)
    os.kill(process.pid, signal.SIGUSR1)  # type: ignore[arg-type]
    for _ in range(2):  # threads of a scheduler and a launcher
        os.kill(process.pid, signal.SIGTERM)  # type: ignore[arg-type]
    assert list(items) == [1, 2, 3, 4]


def test_throughput_counts_all_that_is_heard(data: Path, tmp_path: Path):
    """Two examples of one second per step; the ledger sleeps, which bounds the speed."""
    run, logger = tmp_path / "run", "lightning.pytorch.loggers.CSVLogger"
    options = (
        f"--trainer.logger={logger}",
        "--trainer.log_every_n_steps=2",
        f"--trainer.logger.save_dir={run}",
    )
    assert main(arguments(data, run, *options, lasts_s=0.05)) == 0
    (file,) = run.rglob("metrics.csv")
    rows = [row for row in csv.DictReader(file.open()) if row.get("speed/examples_per_s")]
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7]
    for number, row in enumerate(rows, 1):
        assert float(row["train/audio_hours"]) == pytest.approx(number * 4 / 3600)
        assert 0 < float(row["speed/examples_per_s"]) < 2 / 0.05
        assert float(row["speed/frames_per_s"]) == pytest.approx(
            50 * float(row["speed/examples_per_s"]), rel=1e-4
        )
        heard = float(row["speed/audio_hours_per_s"])
        assert heard == pytest.approx(float(row["speed/examples_per_s"]) / 3600, rel=1e-4)
        assert 0 <= float(row["speed/data_share"]) < 1
        assert 0.05 < float(row["speed/peak_memory_gb"]) < 50
        assert not row.get("speed/mfu")  # the peak of a CPU is unknown


def test_the_peak_of_a_device_is_known_or_omitted(monkeypatch: pytest.MonkeyPatch):
    device = torch.device("cuda")
    assert peak_flop(torch.device("cpu"), "bf16-mixed") is None
    for name, peak in {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA A100-SXM4-40GB": 312e12,
        "GeForce RTX 1": None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flop(device, "bf16-mixed") == peak and peak_flop(device, "32-true") is None
