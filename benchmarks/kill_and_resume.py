"""Trains a tiny model twice, or tokenizes twice: once undisturbed, and once killed with SIGKILL at
random times and resumed. Both results must be equal.

    python benchmarks/kill_and_resume.py --kills 20 [--workers 2] [--ranks 2] [--accumulated 3]
    [--per_example] [--decoding] [--seed 0]
    python benchmarks/kill_and_resume.py --kills 40 --tokenize

Each attempt runs the same command in its own process group, forked from this process after the
imports. The whole group is killed, including data workers and other ranks, as when a node fails.
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
import threading
import time
import warnings
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers_data import make_data_codec, write_clip
from helpers_programs import attempt, ended
from helpers_resume import arguments, differences, ledger, make_data, outcome


def batches_done(run: Path) -> list[int]:
    """Numbers of the batches in the ledger, counted over the whole run, in execution order."""
    ledger = run / "ledger.jsonl"
    lines = ledger.read_text().split("\n")[:-1] if ledger.exists() else []
    complete = [line for line in lines if line.endswith("}")]
    return [int(re.match(r'{"batch": (\d+)', line)[1]) for line in complete]


def logged_values(run: Path) -> dict[tuple[str, str], set[str]]:
    """All logged values by step and name, over all sessions, except for speeds."""
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


def mark_phases(file: Path) -> None:
    """Let this process and its forks write the name of their current phase to a file."""
    from magnet_train.callbacks.checkpoint_io import AtomicCheckpointIO
    from magnet_train.callbacks.generation import GenerationCallback
    from magnet_train.module import MagnetModule

    def mark(owner: Any, name: str, phase: str) -> None:
        usual = getattr(owner, name)

        @wraps(usual)
        def marked(*args: Any, **kwargs: Any) -> Any:
            before = read_phase(file)
            file.write_text(phase)
            try:
                return usual(*args, **kwargs)
            finally:
                file.write_text(before)

        setattr(owner, name, marked)

    mark(AtomicCheckpointIO, "save_checkpoint", "checkpoint")
    mark(MagnetModule, "validation_step", "validation")
    mark(GenerationCallback, "_decode", "decoding")


def read_phase(file: Path) -> str:
    """The current phase, from the file of `mark_phases`."""
    return file.read_text() if file.exists() else ""


def wait_for_phase(child: int, file: Path, phase: str) -> int | None:
    """Wait for a phase; returns the exit status if the run ends before it."""
    while (status := ended(child, 0.001)) is None and read_phase(file) != phase:
        pass
    return status


def wait_for_batches(child: int, run: Path, batches: float, within_s: float) -> int | None:
    """Wait for this many batches in the ledger, or this long; returns the exit status if the run
    ends before."""
    end = time.monotonic() + within_s
    while (
        (status := ended(child, 0.002)) is None
        and len(batches_done(run)) < batches
        and time.monotonic() < end
    ):
        pass
    return status


PER_EXAMPLE = ["--model.stage_sampling=example"]
DECODING = [
    "--generation.num_prompts=2",
    "--generation.batch_size=2",
    "--generation.metrics=[]",
    "--generation.baselines=false",
    "--generation.num_media=1",
    "--generation.decoding.decoding_steps=[2,1,1,1]",
]


def kill_training(
    folder: Path,
    kills: int,
    workers: int,
    ranks: int,
    accumulated: int,
    seed: int,
    more: Sequence[str] = (),
) -> list[str]:
    """Differences between the undisturbed and the killed run; empty if they are equal."""
    from magnet_train.callbacks import checkpoint

    phases = ["", "checkpoint", "validation", *["decoding"] * (DECODING[0] in more)]
    data, steps = make_data(folder / "data"), 6 * kills + 5
    options = [
        f"--trainer.max_steps={steps}",
        f"--data.num_workers={workers}",
        "--trainer.val_check_interval=4",
        f"--trainer.accumulate_grad_batches={accumulated}",
        "--trainer.log_every_n_steps=1",
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=.",
        "--trainer.logger.flush_logs_every_n_steps=1",
        "--trainer.logger.name=csv",
        *more,
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
    batch_s = training / (steps * accumulated)
    print(
        f"undisturbed: {steps} steps, {first:.1f} s until the first batch, then {training:.1f} s",
        flush=True,
    )

    draw, phase_file = random.Random(seed), folder / "phase"
    mark_phases(phase_file)
    for number in range(1, kills + 1):
        phase_file.unlink(missing_ok=True)
        phase = phases[number % len(phases)]
        # Half of the attempts also save checkpoints between the steps.
        checkpoint.SAVE_EVERY_S = 0.05 if number % 2 else 1800.0
        before = len(batches_done(run))
        child = attempt(arguments(data, run, *options, lasts_s=0.01), run.with_suffix(".log"))
        begin = time.monotonic()
        max_batches = math.inf
        if phase:
            status, max_wait_s = wait_for_phase(child, phase_file, phase), draw.uniform(0, 0.02)
        elif draw.random() < 0.2:  # while it starts: reads the checkpoint, starts workers …
            status, max_wait_s = None, draw.uniform(0, first)
            # The machine may be faster now than for the undisturbed run.
            max_batches = before + accumulated * ranks
        else:  # during or shortly after one of its first batches
            batches = draw.randint(1, 4 * accumulated)
            status = wait_for_batches(child, run, before + batches * ranks, math.inf)
            max_wait_s = draw.uniform(0, 2 * batch_s)
            max_batches = before + (batches + accumulated) * ranks
        if status is None:
            status = wait_for_batches(child, run, max_batches, max_wait_s)
        delay = time.monotonic() - begin
        assert status is None, (
            f"ended by itself ({status}): {run.with_suffix('.log').read_text()[-3000:]}"
        )
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done = batches_done(run)[before:]
        print(
            f"kill {number:>2} after {delay:.2f} s in {read_phase(phase_file) or 'training'}: "
            f"{f'batches {done[0]} to {done[-1]}' if done else 'no batch'}, "
            f"{len(list(run.rglob('*.ckpt')))} checkpoints, {len(list(run.rglob('*.part')))} half "
            "written",
            flush=True,
        )
    child = attempt(arguments(data, run, *options, lasts_s=0.01), run.with_suffix(".log"))
    status = ended(child, 600)
    assert status == 0, run.with_suffix(".log").read_text()[-3000:]
    print(
        f"{kills} kills, {workers} data workers, {ranks} ranks, {accumulated} accumulated: ", end=""
    )
    return all_differences(twin, run)


def all_differences(twin: Path, run: Path) -> list[str]:
    """Differences of the last checkpoints, of batches, validations and logged rows."""
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
        f"{len(one)} batches and {len(validations[0]) - 1} validations and {len(expected)} logged "
        f"values compared, {len(found)} differences"
    )
    return found


def start_tokenizing(source: Path, out: Path, codec: str) -> int:
    """Start `tokenize` in its own process group; returns its id."""
    arguments = ["tokenize", str(source), f"--out={out}", f"--codec={codec}"]
    return attempt([*arguments, "--crop_s=2", "--shard_size=3"], out.with_suffix(".log"))


def content(out: Path) -> dict[str, bytes]:
    """Content of the shards and index of a folder by name; there may be no other visible files."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name[0] != "."}


def kill_tokenizing(folder: Path, kills: int, seed: int) -> list[str]:
    """Differences between the output of an undisturbed process and of killed ones."""
    codec = make_data_codec(folder / "codec")
    source = folder / "in"
    for number in range(10):
        write_clip(source / f"clip{number:02d}.flac", 5 + number % 3, f"tone {number}", seed=number)
    twin, draw, found = folder / "twin", random.Random(seed), []
    begin = time.monotonic()
    status = ended(start_tokenizing(source, twin, codec), 600)
    assert status == 0, twin.with_suffix(".log").read_text()
    seconds, expected, done, round_ = time.monotonic() - begin, content(twin), 0, 0
    while done < kills:
        out = folder / f"out{round_}"
        child = start_tokenizing(source, out, codec)
        status = ended(child, draw.uniform(0.1, 1.0) * seconds)
        if status is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done += 1
        names = sorted(path.name for path in out.glob("*.tar")) if out.is_dir() else []
        half = len(list(out.glob(".*.tmp")) + list(out.glob(".*.part"))) if out.is_dir() else 0
        print(f"kill {done:>2}: {len(names)} shards, {half} half written", flush=True)
        found += [name for name in names if (out / name).read_bytes() != expected[name]]
        if status is not None:  # it finished
            assert status == 0, out.with_suffix(".log").read_text()[-3000:]
            found += [] if content(out) == expected else [f"folder {round_}"]
            round_ += 1
            seconds *= 0.8
        elif draw.random() < 0.2:
            seconds *= 1.2
    last = folder / f"out{round_}"
    assert ended(start_tokenizing(source, last, codec), 600) == 0
    found += [] if content(last) == expected else ["the last folder"]
    left = [path.name for path in last.iterdir() if path.name.endswith((".part", ".tmp"))]
    print(
        f"{kills} kills in tokenizing, {round_ + 1} folders finished, "
        f"{len(expected)} files each, {len(found) + len(left)} differences"
    )
    return found + left


def main() -> int:
    """Returns 0 if both results are equal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--accumulated", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenize", action="store_true", help="Kill tokenize instead of fit.")
    parser.add_argument("--per_example", action="store_true", help="Draw stages per example.")
    parser.add_argument("--decoding", action="store_true", help="Decode in validations.")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    # tqdm's own lock is shared with forked processes; a killed process would hold it forever.
    tqdm.set_lock(threading.RLock())
    # Imported before the first fork, so that attempts start quickly.
    import magnet_train.cli.fit
    import magnet_train.data.tokenize  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        if given.tokenize:
            found = kill_tokenizing(Path(folder), given.kills, given.seed)
        else:
            more = PER_EXAMPLE * given.per_example + DECODING * given.decoding
            sizes = given.workers, given.ranks, given.accumulated
            found = kill_training(Path(folder), given.kills, *sizes, given.seed, more)
    print("\n".join(found[:20]) or "equal bit for bit")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
