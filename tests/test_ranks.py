"""Several ranks with every launcher: each item once, and all ranks stop if one fails."""

import csv
import os
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from helpers_programs import LONGEST_S
from helpers_ranks import fit_on_ranks, free_port
from helpers_resume import arguments, ledger, outcome


def validated(run: Path) -> Counter[str]:
    return Counter(line.split()[2] for line in (run / "ledger.validated").read_text().splitlines())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_three_ranks_one_of_them_without_validation_items(
    strategy: str, data: Path, tmp_path: Path
):
    """With uneven shards, all ranks have the same number of full batches."""
    options = (
        f"--trainer.strategy={strategy}",
        "--trainer.val_check_interval=4",
        "--trainer.max_steps=4",
    )
    statuses, text = fit_on_ranks(3, arguments(data, tmp_path / "run", *options), tmp_path / "log")
    assert statuses == [0, 0, 0], text[-3000:]
    assert validated(tmp_path / "run") == {"item0000": 1, "item0001": 1}
    lines = ledger(tmp_path / "run")
    assert sorted(lines) == [(batch, rank) for batch in range(4) for rank in range(3)]
    assert all(len(line["keys"]) == 2 for line in lines.values())
    # Each rank has its own shards.
    assert len({key for line in lines.values() for key in line["keys"]}) > 16
    assert [p.name for p in tmp_path.glob("run/checkpoints/*.ckpt") if p.stem == "last"] == [
        "last.ckpt"
    ]


def test_memory_is_that_of_the_rank_that_has_most(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    logger = (
        "--trainer.logger=CSVLogger",
        f"--trainer.logger.save_dir={run}",
        "--trainer.log_every_n_steps=1",
    )
    statuses, text = fit_on_ranks(2, arguments(data, run, *logger, hog_at=4), tmp_path / "log")
    assert statuses == [0, 0], text[-3000:]
    (file,) = run.rglob("metrics.csv")
    rows = [row for row in csv.DictReader(file.open()) if row.get("speed/peak_memory_gb")]
    memory = [float(row["speed/peak_memory_gb"]) for row in rows]
    assert len(memory) == 8 and memory[3] < memory[4] - 0.5 and memory[7] < memory[4] + 0.2


@pytest.mark.parametrize(
    ("strategy", "fault", "step"),
    [
        ("fsdp2", {"stop_at": 3, "stop_rank": 1}, 3),
        ("ddp", {"stop_in_validation": 3, "stop_rank": 1}, 2),  # step 3 is saved after it
        ("ddp", {"signal_at": 3, "signal": int(signal.SIGKILL)}, 3),
    ],
    ids=["raises", "raises in a validation", "killed"],
)
def test_a_rank_that_fails_ends_all(
    strategy: str, fault: dict[str, int], step: int, data: Path, tmp_path: Path
):
    """Even without a launcher that kills the other; the last checkpoint remains."""
    options = (f"--trainer.strategy={strategy}", "--trainer.val_check_interval=3")
    statuses, text = fit_on_ranks(
        2, arguments(data, tmp_path / "run", *options, **fault), tmp_path / "log"
    )
    assert 0 not in statuses
    assert text.count("RuntimeError: as planned") == ("stop_rank" in fault)
    assert outcome(tmp_path / "run")["step"] == step


@pytest.mark.slow
def test_torchrun_launches_it(python: str, data: Path, tmp_path: Path):
    run, tests = tmp_path / "run", Path(__file__).parent
    launched = ("--trainer.devices=2", "--trainer.max_steps=4", "--trainer.val_check_interval=4")
    torchrun = f"-m torch.distributed.run --nproc_per_node=2 --master_port={free_port()}".split()
    fit = arguments(data, run, "--trainer.strategy=fsdp2", *launched)
    done = subprocess.run(
        [python, *torchrun, "-m", "magnet_train", *fit],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])},
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert validated(run) == {"item0000": 1, "item0001": 1}
    assert sorted(ledger(run)) == [(batch, rank) for batch in range(4) for rank in range(2)]
    assert outcome(run)["step"] == 4 and (run / "summary.json").is_file()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["run"]
