"""Trains a tiny model twice, once undisturbed and once killed with SIGKILL at random moments; the
ends must be equal.

    python benchmarks/kill_and_resume.py --kills 20 [--workers 2] [--ranks 2] [--accumulated 3]
    [--seed 0]

Each attempt is the same command in a process group of its own, forked from this process, which has
only imported what it needs; the whole group is killed, data workers and other ranks too, as
when a node fails.
"""

import argparse
import csv
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers_programs import attempt, ended
from helpers_resume import arguments, differences, ledger, make_data, outcome


def batches_done(run: Path) -> list[int]:
    """Counts of the batches, over the whole run, that the ledger has; in the order in which they
    were done."""
    ledger = run / "ledger.jsonl"
    lines = ledger.read_text().split("\n")[:-1] if ledger.exists() else []
    return [
        int(re.match(r'{"batch": (\d+)', line)[1]) for line in lines if line.endswith("}")
    ]  # else cut off


def logged_values(run: Path) -> dict[tuple[str, str], set[str]]:
    """All values by step and name, of all sessions; those of speed differ by nature."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in run.glob("csv/version_*/metrics.csv"):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if (
                        name
                        and value
                        and not name.startswith("speed/")
                        and None not in row.values()
                    ):
                        found.setdefault((row["step"], name), set()).add(value)
    return found


def come_to(child: int, run: Path, batches: int, within_s: float) -> int | None:
    """Waits for so many batches in the ledger, or so long; exit status of a run that ends
    before."""
    end = time.monotonic() + within_s
    while (
        (status := ended(child, 0.002)) is None
        and len(batches_done(run)) < batches
        and time.monotonic() < end
    ):
        pass
    return status


def killed_often(
    folder: Path, kills: int, workers: int, ranks: int, accumulated: int, seed: int
) -> list[str]:
    """Differences between the two ends: none, if all is well."""
    from magnet_train.callbacks import checkpoint

    data, steps = make_data(folder / "data"), 5 * kills + 5
    options = [
        f"--trainer.max_steps={steps}",
        f"--data.num_workers={workers}",
        "--trainer.val_check_interval=8",
        f"--trainer.accumulate_grad_batches={accumulated}",
        "--trainer.log_every_n_steps=1",
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=.",
        "--trainer.logger.flush_logs_every_n_steps=1",
        "--trainer.logger.name=csv",
    ]
    if ranks > 1:
        options += [f"--trainer.devices={ranks}", "--trainer.strategy=ddp_fork"]
    twin, run = folder / "twin", folder / "run"
    start, first = time.monotonic(), None
    child = attempt(arguments(data, twin, *options, lasts_s=0.01), twin.with_suffix(".log"))
    while (status := ended(child, 0.01)) is None:
        if first is None and (twin / "ledger.jsonl").exists():
            first = time.monotonic() - start
    assert status == 0 and first is not None, twin.with_suffix(".log").read_text()[-3000:]
    training = time.monotonic() - start - first
    a_batch = training / (steps * accumulated)
    print(
        f"undisturbed: {steps} steps, {first:.1f} s until the first batch, then {training:.1f} s",
        flush=True,
    )

    draw = random.Random(seed)
    for number in range(1, kills + 1):
        checkpoint.SAVE_EVERY_S = (
            0.05 if number % 2 else 1800.0
        )  # checkpoints between the steps too, in half of them
        before = len(batches_done(run))
        child = attempt(arguments(data, run, *options, lasts_s=0.01), run.with_suffix(".log"))
        begin = time.monotonic()
        if draw.random() < 0.2:  # while it starts, reads its checkpoint, begins its processes …
            batches, most_s = 0, draw.uniform(0, first)
        else:  # in, or some time after, one of its first batches
            batches, most_s = draw.randint(1, 4 * accumulated), draw.uniform(0, 2 * a_batch)
        status = come_to(child, run, before + batches * ranks, math.inf) if batches else None
        if status is None:  # the machine may be faster now than it was for the twin
            status = come_to(child, run, before + (batches + accumulated) * ranks, most_s)
        delay = time.monotonic() - begin
        assert status is None, (
            f"ended by itself ({status}): {run.with_suffix('.log').read_text()[-3000:]}"
        )
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done = batches_done(run)[before:]
        print(
            f"kill {number:>2} after {delay:.2f} s: "
            f"{f'batches {done[0]} to {done[-1]}' if done else 'no batch'}, "
            f"{len(list(run.rglob('*.ckpt')))} checkpoints, {len(list(run.rglob('*.part')))} half "
            "written",
            flush=True,
        )
    child = attempt(arguments(data, run, *options, lasts_s=0.01), run.with_suffix(".log"))
    status = ended(child, 600)
    assert status == 0, run.with_suffix(".log").read_text()[-3000:]
    found = differences(outcome(twin), outcome(run))
    one, two = ledger(twin), ledger(run)
    found += [
        f"batch {place}" for place in one.keys() | two.keys() if one.get(place) != two.get(place)
    ]
    validations = [set(Path(r / "ledger.validations").read_text().split("\n")) for r in (twin, run)]
    found += [f"validation {line}" for line in validations[0] ^ validations[1]]
    expected, rows = logged_values(twin), logged_values(run)
    found += [
        f"logged {place}"
        for place in expected.keys() | rows.keys()
        if expected.get(place) != rows.get(place)
    ]
    print(
        f"{kills} kills, {workers} data workers, {ranks} ranks, {accumulated} accumulated: "
        f"{len(one)} batches and "
        f"{len(validations[0]) - 1} validations and {len(expected)} logged values compared, "
        f"{len(found)} differences"
    )
    return found


def main() -> int:
    """0 if both ended alike."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--accumulated", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    # Imported before the first fork, so that an attempt begins with its work.
    import magnet_train.cli.fit  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        found = killed_often(
            Path(folder), given.kills, given.workers, given.ranks, given.accumulated, given.seed
        )
    print("\n".join(found[:20]) or "equal bit for bit")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
