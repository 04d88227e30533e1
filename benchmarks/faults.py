"""Makes each fault happen to a tiny run in processes of its own, and draws a table of what happened
and what was lost.

    python benchmarks/faults.py [--out benchmarks/records/faults.md] [--only disk signal …]

"Nothing" in the last column was found out: the run went on after the fault, and its batches,
validations, weights (raw and averaged), optimizer and counters are equal, bit for bit, to those of
a run that was never disturbed. What a run has to do again, since its last checkpoint, is not
counted as lost.
"""

import argparse
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers_programs import LONGEST_S, attempt, ended, wait_for
from helpers_resume import arguments, differences, ledger, make_data, outcome
from helpers_wandb import recorder
from kill_and_resume import kill_training

STEPS = 8
Row = tuple[str, str]
"""What happened, and what was lost."""


class Place:
    """Where runs are made: data, a folder, and an undisturbed twin for each set of options."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder, make_data(folder / "data")
        self._twins: dict[tuple[str, ...], Path] = {}

    def twin(self, *options: str) -> Path:
        if options not in self._twins:
            run = self.folder / f"twin{len(self._twins)}"
            status, said = fit(self, run, *options)
            assert status == 0, said
            self._twins[options] = run
        return self._twins[options]

    def lost(self, run: Path, *options: str) -> str:
        """Goes on with a run until its end, and compares it with its twin."""
        twin = self.twin(*options)
        status, said = fit(self, run, *options)
        assert status == 0, said
        found = differences(outcome(twin), outcome(run))
        one, two = ledger(twin), ledger(run)
        found += [
            f"batch {place}"
            for place in one.keys() | two.keys()
            if one.get(place) != two.get(place)
        ]
        return "nothing" if not found else f"{len(found)} differences: {'; '.join(found[:3])}"


def start(place: Place, run: Path, *options: str, **where: Any) -> tuple[int, Path]:
    """A run's process group and its log."""
    log = run.with_suffix(".log")
    log.unlink(missing_ok=True)
    return attempt(
        arguments(place.data, run, f"--trainer.max_steps={STEPS}", *options, **where), log
    ), log


def fit(place: Place, run: Path, *options: str, **where: Any) -> tuple[int, str]:
    """Exit status and what was said, of a run that ends by itself."""
    child, log = start(place, run, *options, **where)
    status = ended(child, 240)
    if status is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return (-1 if status is None else status), log.read_text()


def line(said: str, *words: str) -> str:
    """The line with all these words, in code quotes."""
    lines = [
        text.partition("Warning: ")[2] or text for text in said.splitlines() if "warn(" not in text
    ]
    found = [text for text in lines if all(word in text for word in words)]
    assert found, f"nothing with {words} in:\n{said[-3000:]}"
    return f"`{found[-1].strip()}`"


def wait_for_batch(run: Path, batch: int) -> None:
    ledger = run / "ledger.jsonl"
    wait_for(
        lambda: ledger.exists() and len(ledger.read_text().splitlines()) > batch,
        f"batch {batch} in {run}",
    )


# --- one function a fault -------------------------------------------------------------------------


def kill(place: Place) -> Row:
    """SIGKILL of the whole process group, 20 times at random moments
    (benchmarks/kill_and_resume.py)"""
    folder = place.folder / "kills"
    folder.mkdir()
    found = kill_training(folder, kills=20, workers=2, ranks=1, accumulated=2, seed=0)
    return (
        "gone at once; each start went on from the newest whole checkpoint",
        "nothing" if not found else str(found),
    )


def signals(place: Place) -> Row:
    """SIGTERM to all processes, twice at once, as at preemption under a launcher"""
    run, workers = place.folder / "signals", "--data.num_workers=2"
    child, log = start(place, run, workers, "--trainer.logger=WandbLogger", lasts_s=0.3)
    wait_for_batch(run, 2)
    begin = time.monotonic()
    for process in descendants(child) * 2:  # by the scheduler and by a launcher
        with suppress(ProcessLookupError):  # it ended at the first
            os.kill(process, signal.SIGTERM)
    status = ended(child, 240)
    seconds = time.monotonic() - begin
    assert status == 0, log.read_text()[-3000:]
    return (
        f"status {status} after {seconds:.1f} s: {line(log.read_text(), 'stopped at step')}",
        place.lost(run, workers),
    )


def service(place: Place) -> Row:
    """W&B's service process is killed, as by a kernel that is short of memory"""
    run = place.folder / "service"
    child, log = start(
        place, run, "--trainer.logger=WandbLogger", "--trainer.log_every_n_steps=1", lasts_s=0.3
    )
    wait_for_batch(run, 2)
    (pid,) = [
        p for p in descendants(child) if "wandb-core" in Path(f"/proc/{p}/cmdline").read_text()
    ]
    os.kill(pid, signal.SIGKILL)
    status = ended(child, 240)
    assert status == 1, log.read_text()[-3000:]
    text = line(log.read_text(), "ConnectionResetError:")
    return f"status 1, upon which a job file queues it again: {text}", place.lost(run)


def descendants(process: int) -> list[int]:
    """A process and all that it began."""
    children = [
        p
        for task in Path(f"/proc/{process}/task").iterdir()
        for p in (task / "children").read_text().split()
    ]
    return [process, *itertools.chain.from_iterable(descendants(int(p)) for p in children)]


def truncated(place: Place) -> Row:
    """the newest checkpoint is cut in half"""
    run = place.folder / "truncated"
    fit(place, run, stop_at=5)
    last = run / "checkpoints" / "last.ckpt"
    os.truncate(last, last.stat().st_size // 2)
    lost = place.lost(run)
    return line(run.with_suffix(".log").read_text(), "skipping checkpoint", "last.ckpt"), lost


def disk(place: Place) -> Row:
    """the disk is full while a checkpoint is written"""
    run = place.folder / "disk"
    folder = run / "checkpoints"
    folder.mkdir(parents=True)
    size = (place.twin() / "checkpoints" / "last.ckpt").stat().st_size
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size * 5 // 2}", "tmpfs", folder]
    )
    if mounted.returncode:
        return "not tried: no right to mount a small disk", "not known"
    try:
        status, said = fit(place, run)
        subprocess.run(["mount", "-o", "remount,size=50m", folder], check=True)
        return f"status {status}: {line(said, 'error:', 'full')}", place.lost(run)
    finally:
        subprocess.run(["umount", folder], check=True)


def not_finite(place: Place) -> Row:
    """gradients that are not finite, once"""
    run = place.folder / "not_finite"
    status, said = fit(place, run, bad_gradients=[3])
    assert status == 0 and len(ledger(run)) == STEPS
    return line(
        said, "skipped"
    ), "that step, for the weights; it is counted in `train/steps_skipped`"


def training_shard(place: Place) -> Row:
    """a training shard is damaged"""
    data = place.folder / "damaged"
    shutil.copytree(place.data, data)
    shard = sorted((data / "train").glob("*.tar"))[0]
    os.truncate(shard, shard.stat().st_size // 2)
    run = place.folder / "training_shard"
    status, said = fit(place, run, f"--data.train={data / 'train'}")
    assert status == 0 and len(ledger(run)) == STEPS
    return line(said, "skipping shard"), "its items, in each epoch; they are counted"


def validation_shard(place: Place) -> Row:
    """a validation shard is damaged"""
    data = place.folder / "damaged_validation"
    shutil.copytree(place.data, data)
    shard = sorted((data / "validation").glob("*.tar"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    run, interval = place.folder / "validation_shard", "--trainer.val_check_interval=4"
    status, said = fit(place, run, interval, f"--data.validation={data / 'validation'}")
    what = f"status {status}: {line(said, 'error:', 'shard')}"
    return what, place.lost(run, interval)


def rank_raises(place: Place) -> Row:
    """one of two ranks raises an error in the middle of an epoch"""
    two = ("--trainer.devices=2", "--trainer.strategy=ddp_fork")
    run = place.folder / "rank_raises"
    begin = time.monotonic()
    status, said = fit(place, run, *two, stop_at=4, stop_rank=1)
    seconds = time.monotonic() - begin
    return (
        f"both end, status {status}, {seconds:.0f} s after the start: {line(said, 'as planned')}",
        place.lost(run, *two),
    )


def rank_dies(place: Place) -> Row:
    """one of two ranks is killed, as by a node that fails"""
    two = ("--trainer.devices=2", "--trainer.strategy=ddp_fork")
    run = place.folder / "rank_dies"
    child, log = start(place, run, *two, lasts_s=0.3)
    wait_for_batch(run, 4)
    ranks = [int(p) for p in Path(f"/proc/{child}/task/{child}/children").read_text().split()]
    begin = time.monotonic()
    os.kill(ranks[-1], signal.SIGKILL)
    status = ended(child, 240)
    seconds = time.monotonic() - begin
    assert status not in (None, 0), log.read_text()[-2000:]
    return f"the other ends too, status {status} after {seconds:.1f} s", place.lost(run, *two)


def rank_hangs(place: Place) -> Row:
    """one of two ranks stands still for a while"""
    two = ("--trainer.devices=2", "--trainer.strategy=ddp_fork")
    quick = ("--watchdog.min_seconds=1", "--watchdog.factor=3")
    run = place.folder / "rank_hangs"
    child, log = start(place, run, *two, *quick, lasts_s=0.1)
    wait_for_batch(run, 8)
    ranks = [int(p) for p in Path(f"/proc/{child}/task/{child}/children").read_text().split()]
    before = log.read_text().count("usually")  # none, but on a machine that others use
    os.kill(ranks[-1], signal.SIGSTOP)
    wait_for(lambda: log.read_text().count("usually") > before, f"a warning in {log}")
    os.kill(ranks[-1], signal.SIGCONT)
    status = ended(child, 240)
    assert status == 0, log.read_text()[-2000:]
    return (
        f"it goes on once the rank does; meanwhile {line(log.read_text(), 'rank ', 'usually')}",
        place.lost(run, *two),
    )


@contextmanager
def served(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class Files(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class Refusing(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def store(place: Place) -> Row:
    """training shards are read over HTTP, and the server has lost one of them"""
    data = place.folder / "served"
    shutil.copytree(place.data, data)
    sorted((data / "train").glob("*.tar"))[0].unlink()
    run = place.folder / "store"
    with served(partial(Files, directory=str(data))) as address:
        os.environ["MAGNET_TRAIN_CACHE"] = str(place.folder / "cache")
        status, said = fit(place, run, f"--data.train={address}/train")
        del os.environ["MAGNET_TRAIN_CACHE"]
    assert status == 0 and len(ledger(run)) == STEPS, said[-3000:]
    return line(said, "skipping shard").replace(
        address, "http://…"
    ), "its items, in each epoch; they are counted"


def key(place: Place) -> Row:
    """a W&B key that is refused"""
    with served(Refusing) as address:
        happens = refused(
            "",
            "W&B",
            options=lambda _: ["--trainer.logger=WandbLogger"],
            environment={
                "WANDB_MODE": "online",
                "WANDB_API_KEY": "0" * 40,
                "WANDB_BASE_URL": address,
            },
        )
        happened, lost = happens(place)
    return happened.replace(address, "http://…"), lost


def outage(place: Place) -> Row:
    """W&B's server goes away while a run trains, and is still away when it ends"""
    run, options = (
        place.folder / "outage",
        ["--trainer.logger=WandbLogger", "--trainer.log_every_n_steps=1"],
    )
    quick = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1", "WANDB_FINISH_TIMEOUT": "5"}
    with (
        recorder() as server,
        environment(WANDB_MODE="online", WANDB_API_KEY="0" * 40, WANDB_BASE_URL=server.url),
    ):
        with environment(**quick):
            child, log = start(place, run, *options, lasts_s=0.5)
        wait_for(lambda: bool(server.rows), f"a row of {run}")
        server.is_down = True
        time.sleep(0.2)  # what was being answered
        arrived = len(server.rows)
        status = ended(child, 240)
        assert status == 0 and len(server.rows) == arrived, log.read_text()[-3000:]
        server.is_down = False
        text = line(log.read_text(), "not all was uploaded")
        command = [sys.executable, "-m", *text.split("`")[2].split()]
        subprocess.run(command, check=True, timeout=LONGEST_S, capture_output=True)
    losses = [
        (row["trainer/global_step"], row["train/loss"])
        for row in server.rows
        if "train/loss" in row
    ]
    assert (
        arrived and {step for step, _ in losses} == set(range(STEPS)) and len(set(losses)) == STEPS
    )
    return f"status 0: {text}, which it did", place.lost(run)


def preempted(place: Place) -> Row:
    """W&B's server is away as a run is preempted; it gets 3 s here, and else a minute"""
    from magnet_train.tracking import wandb_session as tracking

    run, options = (
        place.folder / "preempted",
        ["--trainer.logger=WandbLogger", "--trainer.log_every_n_steps=1"],
    )
    with (
        recorder() as server,
        environment(WANDB_MODE="online", WANDB_API_KEY="0" * 40, WANDB_BASE_URL=server.url),
    ):
        usual, tracking.FINISH_TIMEOUT_S = tracking.FINISH_TIMEOUT_S, 3.0
        child, log = start(place, run, *options, lasts_s=0.3)
        tracking.FINISH_TIMEOUT_S = usual
        wait_for_batch(run, 2)
        server.is_down = True
        begin = time.monotonic()
        os.kill(child, signal.SIGTERM)
        status = ended(child, 240)
        seconds = time.monotonic() - begin
    assert status == 0 and "stopped at step" in log.read_text(), log.read_text()[-3000:]
    return (
        f"status 0 after {seconds:.1f} s: {line(log.read_text(), 'not all was uploaded')}",
        place.lost(run),
    )


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Variables of the processes that are begun in it."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def refused(what: str, *words: str, **of: Any) -> Callable[[Place], Row]:
    """A fault that ends a start before anything is trained, and leaves what was trained as it
    was."""

    def happens(place: Place) -> Row:
        run = place.folder / f"refused_{'_'.join(words)}".replace("/", "-").replace(" ", "_")
        fit(place, run, stop_at=5)
        before = {p: p.read_bytes() for p in run.rglob("*.ckpt")}
        options = of["options"](place)
        with environment(**of.get("environment", {})):
            status, said = fit(place, run, *options)
        assert status == 2, said[-3000:]
        assert before == {p: p.read_bytes() for p in run.rglob("*.ckpt")}, (
            "a checkpoint has changed"
        )
        return f"status {status}: {line(said, 'error:', *words)}", place.lost(run)

    happens.__doc__ = what
    return happens


def other_data(place: Place) -> list[str]:
    from helpers_data import write_shards

    folder = place.folder / "other_data"
    if not folder.exists():
        write_shards(folder, str(place.data / "codec"), (5, 3, 4, 5, 3, 4, 2))
    return [f"--data.train={folder}"]


def other_codec(place: Place) -> list[str]:
    from helpers_data import make_data_codec, write_shards

    folder = place.folder / "other_codec"
    if not folder.exists():
        make_data_codec(folder / "codec", seed=5)
        for split in ("train", "validation"):
            write_shards(folder / split, str(folder / "codec"), (5, 3))
    return [
        f"--model.codec={folder / 'codec'}",
        *(f"--data.{s}={folder / s}" for s in ("train", "validation")),
    ]


def other_text_encoder(place: Place) -> list[str]:
    from make_components import make_t5

    make_t5(place.folder / "t5", dim=384)  # as wide as the demo's
    return [f"--model.text_encoder={place.folder / 't5'}"]


def sweep_value(place: Place) -> Row:
    """a sweep value of the wrong type"""
    file, out, log = place.folder / "sweep.yaml", place.folder / "sweep", place.folder / "sweep.log"
    sweep = (Path(__file__).parents[1] / "conf" / "sweep" / "span_len.yaml").read_text()
    file.write_text(sweep.replace("[1, 2, 3, 5, 7, 10]", "[1, 2, three]"))
    status = ended(attempt(["sweep", str(file), "--out", str(out)], log), 240)
    assert status == 2 and not [*out.rglob("*.ckpt")], log.read_text()[-2000:]
    return (
        f"status {status} before any run begins: {line(log.read_text(), 'error:', 'three')}",
        "nothing",
    )


FAULTS: dict[str, Callable[[Place], Row]] = {
    "kill": kill,
    "signal": signals,
    "truncated": truncated,
    "disk": disk,
    "not_finite": not_finite,
    "training_shard": training_shard,
    "validation_shard": validation_shard,
    "rank_raises": rank_raises,
    "rank_dies": rank_dies,
    "rank_hangs": rank_hangs,
    "store": store,
    "unreachable": refused(
        "an object store that is not to be reached",
        "cannot be reached",
        options=lambda _: ["--data.train=http://127.0.0.1:9/train"],
    ),
    "key": key,
    "outage": outage,
    "preempted": preempted,
    "service": service,
    "ranks": refused(
        "more ranks than shards",
        "shards for 8 ranks",
        options=lambda _: ["--trainer.devices=8", "--trainer.strategy=ddp_fork"],
    ),
    "model": refused(
        "a resume with another model", "another", options=lambda _: ["--model.network.dim=32"]
    ),
    "data": refused("a resume on other shards", "other shards", options=other_data),
    "codec": refused("a resume with another codec", "codec", options=other_codec),
    "text": refused(
        "a resume with another text encoder", "text encoder", options=other_text_encoder
    ),
    "type": refused(
        "a value of the wrong type", "span_len", options=lambda _: ["--model.span_len=1e1"]
    ),
    "sweep": sweep_value,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    # Imported before the first fork, so that a run begins with its work.
    import magnet_train.cli.fit  # noqa: F401

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        place = Place(folder)
        for fault in given.only:
            happened, lost = FAULTS[fault](place)
            happened = happened.replace(str(folder), "…").replace("|", "\\|")
            rows.append(f"| {FAULTS[fault].__doc__} | {happened} | {lost} |")
            print(rows[-1], flush=True)
    if given.out is not None:
        head = (__doc__ or "").split("\n\n", 2)[2]
        table = ["| fault | what happened | what was lost |", "|---|---|---|", *rows]
        given.out.write_text(
            "\n".join(
                [
                    "# Faults",
                    "",
                    f"`python benchmarks/faults.py --out {given.out}`",
                    "",
                    head,
                    *table,
                    "",
                ]
            )
        )


if __name__ == "__main__":
    sys.exit(main())
