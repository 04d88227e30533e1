"""The runs of a sweep file without a W&B server: here, some at a time, or as a SLURM array.

The file is W&B's own, and `wandb sweep FILE` takes it as it stands. Of it `method: grid`, `parameters` and the options
of `fit` in `command` are read. What is done stands in the run folders and nowhere else: a run is finished when its
`summary.json` is there, so the same command goes on after any interruption, and several at once share the work.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from magnet_train.common.assets import conf_path
from magnet_train.common.errors import UserError

FIT = (sys.executable, "-m", "magnet_train", "fit")
FOLDER = "--trainer.default_root_dir"
GRACE_S = 60.0
"""Seconds that runs have to save and end after an interruption."""


@dataclass(frozen=True)
class Run:
    """One point of the grid."""

    name: str
    """From its values, as in "span_len=5,seed_everything=1"."""
    folder: Path
    values: dict[str, Any]
    """Parameter to value, for those that the sweep varies."""
    args: list[str]
    """Options of `fit`."""

    @property
    def is_finished(self) -> bool:
        return (self.folder / "summary.json").is_file()

    @property
    def checkpoint(self) -> Path:
        """Where an unfinished run goes on from, if it is there."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"


# --- read ---------------------------------------------------------------------------------------------------------


def read_sweep(file: Path, out: Path) -> list[Run]:
    """The grid in the order of the file, the last parameter varying fastest.

    Args:
        file: W&B sweep configuration.
        out: folder that holds a folder for each run.

    Raises:
        UserError: if the file is no sweep, asks for more than a grid, or gives two runs the same name.
    """
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: unreadable ({' '.join(str(error).split())[:200]}); give a sweep file") from error
    if not isinstance(content, dict) or not content.keys() >= {"method", "parameters", "command"}:
        raise UserError(f"{file}: no sweep: it needs method, parameters and command; see conf/sweep/span_len.yaml")
    if content["method"] != "grid":
        raise UserError(f"{file}: method={content['method']} needs a W&B server (`wandb sweep {file}`); or set grid")
    options, values = _options_of_fit(file, content["command"]), _values(file, content["parameters"])
    varied = [name for name in values if "values" in content["parameters"][name]]
    shown = short_names(varied)
    runs = []
    for point in itertools.product(*values.values()):
        given = dict(zip(values, point, strict=True))
        name = ",".join(f"{shown[p]}={_in_a_name(given[p])}" for p in varied) or file.stem
        flags = [f"--{p}={v}" for p, v in given.items()]  # as W&B's agent writes them
        args = [*options, *flags, f"{FOLDER}={out / name}"]
        runs.append(Run(name, out / name, {p: given[p] for p in varied}, args))
    twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if twice:
        raise UserError(f"{file}: two runs are named {twice[0]}: give each value once")
    return runs


def _options_of_fit(file: Path, command: Any) -> list[str]:
    """What stands between `fit` and `${args}`, without the folder, which is each run's own."""
    words: list[str] = []
    for word in map(str, command) if isinstance(command, list) else []:
        words += word.split() if words[-1:] == ["-S"] else [word]  # env -S splits what follows
    if "magnet_train" not in words or "fit" not in words or words[-1] != "${args}":
        raise UserError(f"{file}: command is not `… -m magnet_train fit … ${{args}}`; see conf/sweep/span_len.yaml")
    options = [w for w in words[words.index("fit") + 1 : -1] if not w.startswith(f"{FOLDER}=")]
    if unknown := [w for w in options if "${" in w]:
        raise UserError(f"{file}: command has {unknown[0]}, which only W&B's agent fills in; write it out")
    return options


def _values(file: Path, parameters: Any) -> dict[str, list[Any]]:
    """Parameter to its choices, one where it is fixed."""
    found: dict[str, list[Any]] = {}
    for name, given in parameters.items() if isinstance(parameters, dict) else []:
        choices = [given["value"]] if isinstance(given, dict) and given.keys() == {"value"} else None
        if isinstance(given, dict) and given.keys() == {"values"} and isinstance(given["values"], list):
            choices = given["values"]
        if not choices or not isinstance(name, str) or any(isinstance(choice, dict) for choice in choices):
            raise UserError(f"{file}: parameter {name}: a grid needs `values: [...]` or `value: ...` of plain values")
        if None in choices:
            raise UserError(f'{file}: parameter {name}: W&B writes an empty value as None; write "null" in quotes')
        found[name] = choices
    if not found:
        raise UserError(f"{file}: no parameters; give at least one with `values: [...]`")
    return found


def short_names(parameters: list[str]) -> dict[str, str]:
    """Each parameter's last part, or all of it where that is not enough to tell it from another."""
    last = {name: name.rsplit(".", 1)[-1] for name in parameters}
    count = Counter(last.values())
    return {name: short if count[short] == 1 else name for name, short in last.items()}


def _in_a_name(value: Any) -> str:
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+-]", "-", text)


# --- run here -----------------------------------------------------------------------------------------------------


def run_here(runs: Sequence[Run], jobs: int = 1) -> dict[str, str]:
    """Runs what is not finished, `jobs` at a time; the name of each run that failed, and why.

    Each writes into `log.txt` in its folder, and goes on from its last checkpoint where it has one. Nothing that was
    started outlives an interruption.

    Args:
        runs: of one sweep.
        jobs: processes at a time; they share the CPU's cores.

    Raises:
        KeyboardInterrupt: on Ctrl-C, SIGTERM or SIGHUP, once the runs have ended.
    """
    waiting, running, failed = [r for r in runs if not r.is_finished], {}, {}
    elsewhere: set[str] = set()
    told: list[int] = []
    # Noted, not raised: between the start of a process and its entry here it would be left behind. What is ignored
    # stays so: under nohup a sweep outlives its terminal.
    stops = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    previous = [signal.signal(s, lambda number, frame: told.append(number)) for s in stops]
    try:
        while (waiting or running) and not told:
            for process, (run, start) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[process]
                seconds = f"after {time.monotonic() - start:.0f} s"
                if run.is_finished:
                    _say(f"{run.name}: finished {seconds}")
                else:
                    failed[run.name] = f"exit status {process.returncode}: {last_line(run.log)}"
                    _say(f"{run.name}: failed {seconds}, {failed[run.name]}")
            for run in list(waiting):
                if len(running) == jobs or told:
                    break
                process = _start(run, jobs)
                if process is not None:
                    running[process] = run, time.monotonic()
                elif not run.is_finished:  # another sweep runs it, or one that was killed left it running
                    if run.name not in elsewhere:
                        _say(f"{run.name}: another process runs it; waiting for that")
                    elsewhere.add(run.name)
                    continue
                waiting.remove(run)
            time.sleep(0.1)
    finally:
        for s in stops:
            signal.signal(s, signal.default_int_handler)  # a second one cuts the waiting short
        _end(list(running))
        for s, handler in zip(stops, previous, strict=True):
            signal.signal(s, handler)
    if told:
        raise KeyboardInterrupt
    return failed


def _start(run: Run, jobs: int) -> "subprocess.Popen[bytes] | None":
    """The run's process; None if another process has it, or had it and finished it."""
    if (lock := _lock(run)) is None:
        return None
    try:
        if run.is_finished:
            return None
        command = _command(run)
        _say(f"{run.name}: {f'goes on from {run.checkpoint}' if run.checkpoint.is_file() else 'begins'}")
        with run.log.open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=[lock],
                env=_environment(run, jobs), start_new_session=True,  # Ctrl-C is for this process, which ends them all
            )  # fmt: skip
    finally:
        os.close(lock)


def _lock(run: Run) -> int | None:
    """A lock on the run's folder; None if another process has it.

    The run's process inherits it, so that it lasts as long as that does, even where this one is killed.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(run.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        _say(f"{run.folder}: this file system has no locks, so start each run once only")
    return lock


def _command(run: Run) -> list[str]:
    """Begins or goes on: a truncated checkpoint is passed over."""
    return [*FIT, *run.args, "--ckpt_path=auto"]


def _environment(run: Run, jobs: int) -> dict[str, str]:
    """W&B offline and grouped, and the cores shared, unless the environment says otherwise."""
    own = {"WANDB_MODE": "offline", "WANDB_RUN_GROUP": run.folder.parent.name, "WANDB_NAME": run.name}
    if jobs > 1:
        own["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    # An exported id would make all runs one run of W&B.
    given = {k: v for k, v in os.environ.items() if k not in ("WANDB_NAME", "WANDB_RUN_ID", "WANDB_RESUME")}
    return own | given


def _end(processes: "list[subprocess.Popen[bytes]]") -> None:
    """Asks all to save and end, and kills what has not ended after GRACE_S or at a second Ctrl-C."""
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        _signal(process, signal.SIGTERM)
    try:
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    for process in processes:
        _signal(process, signal.SIGKILL)  # to all that it started too
        process.wait()


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def last_line(log: Path) -> str:
    """The last line that says something; W&B's farewell and our own note of the command do not."""
    try:
        text = log.read_text(errors="replace")[-20_000:]
        lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;]*m", "", text))  # without colours
    except OSError:
        lines = []
    said = [line.strip() for line in lines if line.strip() and not line.startswith(("wandb:", "$ "))]
    return said[-1][:300] if said else f"it said nothing; see {log}"


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def state_table(runs: Sequence[Run], failed: dict[str, str]) -> str:
    """A line for each run: finished, failed and why, to go on, or to begin."""
    width = max(len(run.name) for run in runs)
    lines = []
    for run in runs:
        state = f"failed    {failed[run.name]}" if run.name in failed else "finished" if run.is_finished else None
        lines.append(f"{run.name:<{width}}  {state or ('to go on' if run.checkpoint.is_file() else 'to begin')}")
    count = sum(run.is_finished for run in runs)
    return "\n".join([*lines, f"{count} of {len(runs)} runs are finished"])


# --- SLURM --------------------------------------------------------------------------------------------------------


def become(file: Path, runs: Sequence[Run], number: int) -> None:
    """Turns this process into one run of a sweep, so that signals reach that; a finished run ends it at once.

    Args:
        file: that the runs were read from.
        runs: all of the sweep's.
        number: of the run, from 0, in the order of the grid.

    Raises:
        UserError: if there is no such run, or another process has it.
    """
    if not 0 <= number < len(runs):
        raise UserError(
            f"--run {number}: {file} has runs 0 to {len(runs) - 1}; give --array=0-{len(runs) - 1} to sbatch"
        )
    run = runs[number]
    if run.is_finished:
        _say(f"{run.name}: finished before")
        return
    if os.environ.get("SLURM_PROCID", "0") == "0":  # of several ranks the first holds the lock for all
        if (lock := _lock(run)) is None:
            raise UserError(f"{run.folder}: another process has this run; wait for that, or cancel it")
        os.set_inheritable(lock, True)
    _say(f"{run.name}: see {run.log}")
    log = os.open(run.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.execve(FIT[0], _command(run), _environment(run, jobs=1))


def slurm_command(file: Path, runs: Sequence[Run], jobs: int | None = None) -> list[str]:
    """Of the array job, one task for each run that is not finished: conf/slurm/sweep.sbatch with what it needs.

    Args:
        file: of the sweep.
        runs: all of the sweep's, so that a run keeps its task's number.
        jobs: tasks at a time; None = as many as the cluster gives.
    """
    tasks = ",".join(str(i) for i, run in enumerate(runs) if not run.is_finished) + (f"%{jobs}" if jobs else "")
    out = runs[0].folder.parent
    job = [str(conf_path("slurm/sweep.sbatch")), str(file), "--out", str(out)]
    return ["sbatch", f"--job-name={out.name}", f"--array={tasks}", f"--output={out}/slurm_%a.txt", *job]


def submit(command: list[str]) -> str:
    """What sbatch answers.

    Raises:
        UserError: if there is none, or it refuses.
    """
    if shutil.which(command[0]) is None:
        raise UserError(f"no sbatch here, nothing was submitted; where there is one: {shlex.join(command)}")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = " ".join(done.stderr.split())[:300]
        raise UserError(
            f"sbatch refuses the job ({said}); SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT and the like in the "
            f"environment are taken, or edit a copy of {conf_path('slurm/sweep.sbatch')}"
        )
    return done.stdout.strip()


# --- the verb -----------------------------------------------------------------------------------------------------


def sweep(
    file: Path,
    runs: Sequence[Run],
    check: Callable[[list[str]], object],
    jobs: int | None = None,
    slurm: bool = False,
) -> bool:
    """Runs a sweep, or hands it to SLURM; whether nothing failed.

    Args:
        file: that the runs were read from.
        runs: of `read_sweep`.
        check: parses the options of `fit`; every unfinished run's are parsed before anything starts.
        jobs: runs at a time; None = one here, as many as the cluster gives under SLURM.
        slurm: whether it is handed to sbatch as an array job.

    Raises:
        UserError: if a run's options do not hold, or sbatch refuses.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: give at least 1")
    print(state_table(runs, {}), flush=True)
    unfinished = [run for run in runs if not run.is_finished]
    for run in unfinished:
        try:
            check(run.args)
        except UserError as error:
            raise UserError(f"{file}: run {run.name}: {error}") from error
    if not unfinished:
        return True
    if slurm:
        runs[0].folder.parent.mkdir(parents=True, exist_ok=True)
        print(submit(slurm_command(file, runs, jobs)))
        return True
    failed = run_here(runs, jobs or 1)
    print(state_table(runs, failed), flush=True)
    return not failed
