"""Runs a sweep file without a W&B server, on this machine or as a SLURM array.

The file is a W&B sweep configuration with `method: grid`; `parameters` and the options of `fit` in
`command` are used. All state is in the run folders: a run is finished if its `summary.json` exists.
So the same command resumes after any interruption, and several sweeps at once share the work.
"""

import contextlib
import errno
import fcntl
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magnet_train.common.assets import conf_path
from magnet_train.common.errors import UserError
from magnet_train.common.folders import check_local, writable_folder
from magnet_train.common.json_files import read_json
from magnet_train.common.ranges import check_values
from magnet_train.common.redact import redact
from magnet_train.common.tables import markdown_table
from magnet_train.common.yaml_files import read_yaml

FIT = (sys.executable, "-m", "magnet_train", "fit")
FOLDER = "--trainer.default_root_dir"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOP_TIMEOUT_S = 60.0
"""Seconds for runs to save and exit after an interruption."""
POLL_S = 0.1
MAX_RUNS = 10_000
EXAMPLE = "see conf/sweep/span_len.yaml"


@dataclass(frozen=True)
class Run:
    """One point of the grid."""

    name: str
    """Name made of its values, such as "span_len=5,seed_everything=1"."""
    folder: Path
    values: dict[str, Any]
    """Value of each parameter that the sweep varies."""
    args: list[str]
    """Options of `fit`."""
    metric: str = "val/ce"
    """The sweep's metric, shown when the run is finished."""

    @property
    def is_finished(self) -> bool:
        return (self.folder / "summary.json").is_file()

    @property
    def has_checkpoint(self) -> bool:
        return (self.folder / "checkpoints" / "last.ckpt").is_file()

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def result(self) -> str:
        """The metric of a finished run, such as ", val/ce 2.31"; empty if it is not in there."""
        try:
            value = float(self._summary()["metrics"][self.metric]["after"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        return f", {self.metric} {value:.4g}"

    def seconds(self) -> float | None:
        """Time that a finished run took, in seconds; None if unknown."""
        try:
            return float(sum(self._summary()["seconds"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _summary(self) -> Any:
        return read_json(self.folder / "summary.json")


# --- read -----------------------------------------------------------------------------------------


def read_sweep(file: Path, out: Path, overrides: Sequence[str] = ()) -> list[Run]:
    """The grid in the order of the file; the last parameter varies fastest.

    Args:
        file: W&B sweep configuration.
        out: folder for the runs' folders.
        overrides: options of `fit` for all runs, which win over the file.

    Raises:
        UserError: if the file is not a grid sweep, two runs get the same name, or an override names
            a parameter of the grid or the runs' folder.
    """
    content = _read_grid(file)
    options = _fit_options(file, content["command"])
    choices = _choices(file, content["parameters"])
    varied = [name for name in choices if "values" in content["parameters"][name]]
    _check_overrides(file, overrides, varied)
    metric = _metric_name(content.get("metric"))
    short = short_names(varied)
    if math.prod(map(len, choices.values())) > MAX_RUNS:
        raise UserError(f"{file}: more than {MAX_RUNS:,} runs; give fewer values")
    runs = []
    for point in itertools.product(*choices.values()):
        values = dict(zip(choices, point, strict=True))
        name = ",".join(f"{short[p]}={_name_of(values[p])}" for p in varied) or file.stem
        flags = [f"--{p}={v}" for p, v in values.items()]  # as W&B's agent writes them
        args = [*options, *flags, *overrides, f"{FOLDER}={out / name}"]
        values = {p: values[p] for p in varied}
        runs.append(Run(name, out / name, values, args, metric))
    name, count = Counter(run.name for run in runs).most_common(1)[0]
    if count > 1:
        raise UserError(f"{file}: two runs are named {name}: give each value once")
    return runs


def _metric_name(metric: Any) -> str:
    """Name of the metric that the sweep compares; val/ce if the file has none."""
    name = metric.get("name") if isinstance(metric, dict) else None
    return str(name or "val/ce")


def _read_grid(file: Path) -> dict[str, Any]:
    """Content of a file of a grid sweep."""
    content = read_yaml(file, str(file))
    needed = {"method", "parameters", "command"}
    if not isinstance(content, dict) or not content.keys() >= needed:
        raise UserError(f"{file}: a sweep needs method, parameters and command; {EXAMPLE}")
    if content["method"] != "grid":
        raise UserError(
            f"{file}: method={content['method']!r} needs a W&B server (`wandb sweep {file}`); "
            "or set grid"
        )
    return content


def _check_overrides(file: Path, overrides: Sequence[str], varied: Sequence[str]) -> None:
    """Refuse options that the grid or the runs' folders set."""
    for name in {word[2:].partition("=")[0] for word in overrides if word.startswith("--")}:
        if name in varied:
            raise UserError(f"--{name}: the sweep varies it; leave it out, or change {file}")
        if f"--{name}" == FOLDER:
            reason = "the runs' folders are in --out"
            raise UserError(f"--{name}: {reason}; leave it out, or change {file}")


def _fit_options(file: Path, command: Any) -> list[str]:
    """Options between `fit` and `${args}`, without the run folder, which differs between runs."""
    words: list[str] = []
    for word in command if isinstance(command, list) else []:
        is_split = words[-1:] == ["-S"]  # env -S splits its argument
        words += str(word).split() if is_split else [str(word)]
    if "magnet_train" not in words or "fit" not in words or words[-1] != "${args}":
        raise UserError(f"{file}: command is not `… -m magnet_train fit … ${{args}}`; {EXAMPLE}")
    options = words[words.index("fit") + 1 : -1]
    options = [word for word in options if not word.startswith(f"{FOLDER}=")]
    if unknown := [word for word in options if "${" in word]:
        raise UserError(
            f"{file}: command has {unknown[0]}, which only W&B's agent replaces; write its value"
        )
    return options


def _choices(file: Path, parameters: Any) -> dict[str, list[Any]]:
    """The values of each parameter; one if it is fixed."""
    if not isinstance(parameters, dict) or not parameters:
        raise UserError(f"{file}: no parameters; give at least one with `values: [...]`")
    return {name: _values(file, name, given) for name, given in parameters.items()}


def _values(file: Path, name: Any, given: Any) -> list[Any]:
    """The values of a parameter, given as `values: [...]` or `value: ...`."""
    given = given if isinstance(given, dict) else {}
    values: Any = [given["value"]] if "value" in given else given.get("values")
    is_grid = isinstance(name, str) and len(given) == 1 and isinstance(values, list) and values
    if not is_grid or any(isinstance(v, dict) for v in values):
        raise UserError(
            f"{file}: parameter {name}: a grid needs `values: [...]` or `value: ...` of plain "
            "values"
        )
    if None in values:
        raise UserError(
            f'{file}: parameter {name}: W&B writes an empty value as None; write "null" in quotes'
        )
    return values


def short_names(parameters: list[str]) -> dict[str, str]:
    """The last part of each parameter's name, or the full name if that is ambiguous."""
    last = {name: name.rsplit(".", 1)[-1] for name in parameters}
    count = Counter(last.values())
    return {name: short if count[short] == 1 else name for name, short in last.items()}


def _name_of(value: Any) -> str:
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+-]", "-", redact(text))


# --- run here -------------------------------------------------------------------------------------


def run_here(runs: Sequence[Run], jobs: int = 1) -> dict[str, str]:
    """Run unfinished runs, `jobs` at a time; returns failed runs with reasons.

    Each run writes to `log.txt` in its folder, and resumes from its last checkpoint if it has one.
    An interruption ends all processes.

    Args:
        runs: runs of one sweep.
        jobs: number of concurrent processes; they share the CPU's cores.

    Raises:
        KeyboardInterrupt: on Ctrl-C, SIGTERM or SIGHUP, once the runs have ended.
    """
    scheduler = _Scheduler(runs, jobs)
    with _noted_signals() as received:
        try:
            while scheduler.is_busy and not received:
                scheduler.collect()
                scheduler.start(received)
                time.sleep(POLL_S)
        finally:
            for number in _handled_signals():  # a second Ctrl-C kills the runs
                signal.signal(number, signal.default_int_handler)
            _stop(list(scheduler.running))
    if received:
        raise KeyboardInterrupt
    return scheduler.failed


class _Scheduler:
    """Processes of a sweep."""

    def __init__(self, runs: Sequence[Run], jobs: int):
        self.jobs = jobs
        self.waiting = [run for run in runs if not run.is_finished]
        self.running: dict[subprocess.Popen[bytes], tuple[Run, float]] = {}
        """Run and start time of each process."""
        self.failed: dict[str, str] = {}
        self._runs = runs
        self._elsewhere: set[str] = set()

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.running)

    def collect(self) -> None:
        """Handle processes that have ended."""
        for process, (run, start) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[process]
            state = f"finished{run.result()}"
            if not run.is_finished:
                state = f"failed, exit status {process.returncode}: {last_line(run.log)}"
                self.failed[run.name] = state.removeprefix("failed, ")
            log(f"{run.name}: {state} (after {time.monotonic() - start:.0f} s)")
            if left := time_left(self._runs, self.jobs):
                log(left)

    def start(self, received: list[int]) -> None:
        """Start waiting runs until `jobs` are running or a signal was received."""
        for run in list(self.waiting):
            if len(self.running) == self.jobs or received:
                return
            process = _start(run, self.jobs)
            if process is not None:
                self.running[process] = (run, time.monotonic())
            elif not run.is_finished:  # running in another or a killed sweep
                if run.name not in self._elsewhere:
                    log(f"{run.name}: already running elsewhere; waiting")
                self._elsewhere.add(run.name)
                continue
            self.waiting.remove(run)


def _handled_signals() -> list[signal.Signals]:
    """Signals that are not ignored: under nohup a sweep outlives its terminal."""
    return [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Records signals instead of raising, so that a process cannot start without being tracked."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in _handled_signals()
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(run: Run, jobs: int) -> "subprocess.Popen[bytes] | None":
    """The run's process; None if another process is running it or has finished it."""
    lock = _lock(run)
    if lock is None:
        return None
    try:
        if run.is_finished:
            return None
        command = _command(run)
        log(f"{run.name}: {'resumes from its last checkpoint' if run.has_checkpoint else 'starts'}")
        with run.log.open("ab") as file:
            file.write(f"$ {redact(shlex.join(command))}\n".encode())
            file.flush()
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],
                env=_environment(run, jobs),
                start_new_session=True,  # only this process gets Ctrl-C, and ends all others
            )
    finally:
        os.close(lock)


def _lock(run: Run) -> int | None:
    """A lock on the run's folder; None if another process has it.

    The run's process inherits the lock and keeps it even if this process is killed.
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
        log(f"{run.folder}: this file system has no locks, so start each run only once")
    return lock


def _command(run: Run) -> list[str]:
    return [*FIT, *run.args, "--ckpt_path=auto"]


def _environment(run: Run, jobs: int) -> dict[str, str]:
    """Environment with W&B offline and grouped and with shared cores, unless already set."""
    defaults = {
        "WANDB_MODE": "offline",
        "WANDB_RUN_GROUP": run.folder.parent.name,
        "WANDB_NAME": run.name,
    }
    if jobs > 1:
        defaults["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    # An exported id would merge all runs into one W&B run.
    own = ("WANDB_NAME", "WANDB_RUN_ID", "WANDB_RESUME")
    return defaults | {k: v for k, v in os.environ.items() if k not in own}


def _stop(processes: "list[subprocess.Popen[bytes]]") -> None:
    """Stop all processes; kill the rest after STOP_TIMEOUT_S or a second Ctrl-C."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for process in processes:
        _signal(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        _signal(process, signal.SIGKILL)  # including its child processes
        process.wait()


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def last_line(file: Path) -> str:
    """The last line of a log, except for W&B's output and the command."""
    try:
        text = file.read_text(errors="replace")[-20_000:]
    except OSError:
        text = ""
    text = re.sub(r"\x1b\[[\d;]*m", "", text)  # without colours
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    lines = [line for line in lines if line and not line.startswith(("wandb:", "$ "))]
    return lines[-1][:300] if lines else f"no output; see {file}"


def time_left(runs: Sequence[Run], jobs: int) -> str:
    """How long the unfinished runs will take, by the mean of the finished ones; empty if unknown or
    none is left."""
    seconds = [s for run in runs if run.is_finished and (s := run.seconds()) is not None]
    num_left = sum(not run.is_finished for run in runs)
    if not seconds or not num_left:
        return ""
    hours = math.ceil(num_left / jobs) * sum(seconds) / len(seconds) / 3600
    return f"{len(runs) - num_left} of {len(runs)} runs are finished; about {hours:.2g} h left"


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def state_table(runs: Sequence[Run], failed: dict[str, str]) -> str:
    """A table with the state of each run, and the number of finished runs."""

    def state(run: Run) -> str:
        if run.name in failed:
            return f"failed, {failed[run.name]}"
        if run.is_finished:
            return "finished"
        return "to resume" if run.has_checkpoint else "to start"

    table = markdown_table(["run", "state"], [[run.name, state(run)] for run in runs], num_left=2)
    count = sum(run.is_finished for run in runs)
    return f"{table}\n{count} of {len(runs)} runs are finished"


# --- SLURM ----------------------------------------------------------------------------------------


def exec_run(file: Path, runs: Sequence[Run], index: int) -> None:
    """Replace this process by one run of a sweep, so that the run receives signals.

    Args:
        file: the sweep file.
        runs: all runs of the sweep.
        index: 0-based index of the run in the grid; if it is finished, the process exits.

    Raises:
        UserError: if there is no such run, or another process is running it.
    """
    if not 0 <= index < len(runs):
        raise UserError(
            f"--run {index}: {file} has runs 0 to {len(runs) - 1}; "
            f"give --array=0-{len(runs) - 1} to sbatch"
        )
    run = runs[index]
    if run.is_finished:
        log(f"{run.name}: already finished")
        return
    if os.environ.get("SLURM_PROCID", "0") == "0":  # rank 0 holds the lock for all
        lock = _lock(run)
        if lock is None:
            raise UserError(f"{run.folder}: another process has this run; wait for it or cancel it")
        os.set_inheritable(lock, True)
    log(f"{run.name}: see {run.log}")
    output = os.open(run.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.execve(FIT[0], _command(run), _environment(run, jobs=1))


def slurm_command(
    file: Path,
    runs: Sequence[Run],
    jobs: int | None = None,
    overrides: Sequence[str] = (),
    sbatch: Sequence[str] = (),
) -> list[str]:
    """The sbatch command of an array job with one task per unfinished run.

    Args:
        file: the sweep file.
        runs: all runs of the sweep, so that a run keeps its task id.
        jobs: maximum number of concurrent tasks; None = no limit.
        overrides: as in `read_sweep`.
        sbatch: further options of sbatch.
    """
    tasks = ",".join(str(i) for i, run in enumerate(runs) if not run.is_finished)
    if jobs:
        tasks += f"%{jobs}"
    out = runs[0].folder.parent
    return [
        "sbatch",
        f"--job-name={out.name}",
        f"--array={tasks}",
        f"--output={out}/slurm_%a.txt",
        *sbatch,
        str(conf_path("slurm/sweep.sbatch")),
        str(file),
        "--out",
        str(out),
        *overrides,
    ]


def submit(command: list[str]) -> str:
    """Run sbatch; returns its output.

    Raises:
        UserError: if there is no sbatch, or it refuses the job.
    """
    if shutil.which(command[0]) is None:
        raise UserError(
            f"no sbatch on this machine; nothing was submitted; run: {shlex.join(command)}"
        )
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split())[:300]
        raise UserError(
            f"sbatch refuses the job ({reason}); give --partition, --account and --time, set "
            "SBATCH_QOS and the like in the environment, or edit a copy of "
            f"{conf_path('slurm/sweep.sbatch')}"
        )
    return done.stdout.strip()


# --- the verb -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepOptions:
    """Options of `sweep`."""

    out: Path | None = None
    """Folder for the runs and the table; by default runs/NAME for the file NAME.yaml."""
    jobs: int | None = None
    """Number of concurrent runs; by default 1 on this machine, all under SLURM."""
    slurm: bool = False
    """Submit a SLURM array job with one task per run."""
    partition: str | None = None
    """Partition of the SLURM job."""
    account: str | None = None
    """Account of the SLURM job."""
    time: str | None = None
    """Time limit of each task of the SLURM job, as in 12:00:00."""
    dry_run: bool = False
    """Check the sweep and print its commands, without starting anything."""
    run: int | None = None
    """Run only this index of the grid (0-based); used by SLURM array tasks."""
    table: bool = False
    """Only write the table of the finished runs."""

    def __post_init__(self) -> None:
        check_values(self, "--", jobs="[1, inf)")
        if self.sbatch and not self.slurm:
            raise UserError(f"{self.sbatch[0]}: only with --slurm; add it, or leave this out")

    @property
    def sbatch(self) -> list[str]:
        """Options of sbatch."""
        names = ("partition", "account", "time")
        return [f"--{name}={value}" for name in names if (value := getattr(self, name))]


def sweep(
    file: Path,
    runs: Sequence[Run],
    check: Callable[[list[str]], object],
    estimate: Callable[[list[str]], Iterable[str]],
    options: SweepOptions,
    overrides: Sequence[str] = (),
) -> bool:
    """Run a sweep, or submit it to SLURM; returns whether no run failed.

    Args:
        file: the sweep file.
        runs: from `read_sweep`.
        check: validates options of `fit`; called for every unfinished run before any starts.
        estimate: lines on how long a run of `fit` takes, if no run is finished.
        options: options of `sweep`.
        overrides: as in `read_sweep`.

    Raises:
        UserError: if a run's options are invalid, their folder cannot be written, or sbatch refuses
            the job.
    """
    folder = runs[0].folder.parent
    check_local(folder, "--out")
    print(state_table(runs, {}), flush=True)
    unfinished = [run for run in runs if not run.is_finished]
    _check_runs(file, unfinished, check)
    if not unfinished:
        return True
    jobs = options.jobs or (len(unfinished) if options.slurm else 1)
    known = time_left(runs, jobs)
    for line in [known] if known else estimate(unfinished[0].args):
        print(line, flush=True)
    command = slurm_command(file, runs, options.jobs, overrides, options.sbatch)
    if options.dry_run:
        commands = [command] if options.slurm else [_command(run) for run in unfinished]
        print("would run", *(redact(shlex.join(command)) for command in commands), sep="\n")
        return True
    writable_folder(folder, "--out")
    if options.slurm:
        print(submit(command))
        return True
    failed = run_here(runs, jobs)
    print(state_table(runs, failed), flush=True)
    return not failed


def _check_runs(file: Path, runs: Sequence[Run], check: Callable[[list[str]], object]) -> None:
    """Check the options of each run, before any run starts."""
    for run in runs:
        try:
            check(run.args)
        except UserError as error:
            raise UserError(f"{file}: run {run.name}: {error}") from error
