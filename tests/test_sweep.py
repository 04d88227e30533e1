"""Sweeps: shipped files with W&B's agent and our parser; failing and stopped runs."""

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_programs import LONGEST_S, program, wait_for
from helpers_rescoring import count_readings

from magnet_train.__main__ import main
from magnet_train.cli import commands
from magnet_train.sweeps import sweep
from magnet_train.sweeps.sweep import read_sweep

ROOT = Path(__file__).parents[1]
SBATCH = ROOT / "conf" / "slurm"
SWEEPS = sorted(p.name for p in (ROOT / "conf" / "sweep").glob("*.yaml"))
ABLATIONS = sorted(p.name for p in (ROOT / "conf" / "ablation").glob("*.yaml"))
HEAD = {
    "method": "grid",
    "command": ["${env}", "${interpreter}", "-m", "magnet_train", "fit", "${args}"],
}

# An instant `fit` that records its times, checkpoint and exit.
FAKE_FIT = """
import json, os, pathlib, signal, sys, time
given = dict(a[2:].split("=", 1) for a in sys.argv[1:] if a.startswith("--"))
folder = pathlib.Path(given["trainer.default_root_dir"])
folder.mkdir(parents=True, exist_ok=True)
def note(**what):
    with open(folder / "notes", "a") as file:
        file.write(json.dumps(what) + "\\n")
signal.signal(signal.SIGTERM, lambda *_: (note(told_to_end=time.time()), os._exit(143)))
mode = os.environ.get("WANDB_MODE")
note(pid=os.getpid(), start=time.time(), ckpt=given.get("ckpt_path"), mode=mode)
if given.get("x") == "bad":
    print("epoch 0\\nerror: the shards are gone\\n\\x1b[1;34mwandb\\x1b[0m: goodbye")
    sys.exit(2)
time.sleep(float(given.get("wait", "0")))
while not all(map(os.path.exists, filter(None, given.get("until", "").split(":")))):
    time.sleep(0.02)
metrics = {"val/ce": {"before": None, "after": 1.0}}
summary = {"metrics": metrics, "seconds": {"training": 7200.0}}
(folder / "summary.json").write_text(json.dumps(summary))
note(end=time.time())
"""


def write(path: Path, **content: object) -> Path:
    path.write_text(yaml.safe_dump(HEAD | content, sort_keys=False))
    return path


def grid(folder: Path, *values: object, **fixed: object) -> Path:
    """A sweep file over values of x; other parameters are fixed."""
    parameters = {"x": {"values": list(values)}} | {k: {"value": v} for k, v in fixed.items()}
    return write(folder / "s.yaml", parameters=parameters)


def notes(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "notes").read_text().splitlines()]


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """Replaces `fit` with FAKE_FIT, whose options are not parsed; returns a folder for the runs."""
    script = tmp_path / "fake_fit.py"
    script.write_text(FAKE_FIT)
    monkeypatch.setattr(sweep, "FIT", (sys.executable, "-S", "-E", str(script)))
    monkeypatch.setattr(commands, "check_fit", lambda args: None)
    monkeypatch.setattr(commands, "estimate_fit", lambda args: ["each run: 3 h"])
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return tmp_path / "runs"


def status(*args: object) -> int:
    try:
        return main(["sweep", *map(str, args)])
    except SystemExit as end:
        return int(end.code or 0)


# --- the shipped files ----------------------------------------------------------------------------


def agents_argv(name: str, point: dict, folder: Path) -> list[str]:
    """Arguments after `fit` in a W&B agent's command for a point of a sweep."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    config = yaml.safe_load((ROOT / "conf" / "sweep" / name).read_text())
    given = create_sweep_command_args({"args": {k: {"value": v} for k, v in point.items()}})
    given |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [config["program"]]}
    argv: list[str] = []
    # As wandb_agent.Agent._command_run puts it together.
    for word in create_sweep_command(list(config["command"])):
        argv += given[word[2:-1]] if word.startswith("${") and word.endswith("}") else [word]
    program(folder / "python", 'printf "%s\\n" "$@"')
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "WANDB_RUN_ID": "abc123"}
    said = subprocess.run(
        argv, env=env, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert said[:3] == ["-m", "magnet_train", "fit"]
    return said[3:]


def points(name: str) -> list[dict]:
    """All points of a shipped sweep, fixed parameters included."""
    parameters = yaml.safe_load((ROOT / "conf" / "sweep" / name).read_text())["parameters"]
    choices = [given.get("values", [given.get("value")]) for given in parameters.values()]
    return [dict(zip(parameters, point, strict=True)) for point in itertools.product(*choices)]


@pytest.mark.parametrize("name", SWEEPS)
def test_what_wandbs_agent_starts_our_parser_takes_and_our_sweep_starts_too(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    file = Path("conf/sweep") / name
    runs = read_sweep(file, tmp_path)
    for point, run in list(zip(points(name), runs, strict=True))[:: max(1, len(runs) - 1)]:
        theirs = agents_argv(name, point, tmp_path)
        assert theirs.count("--trainer.default_root_dir=runs/wandb/abc123") == 1
        theirs.remove("--trainer.default_root_dir=runs/wandb/abc123")
        assert run.args == [*theirs, f"--trainer.default_root_dir={tmp_path / run.name}"]
    with pytest.raises(SystemExit) as end:
        main(["fit", *run.args, "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert end.value.code == 0
    for parameter, value in point.items():
        found = config
        for part in parameter.split("."):
            found = found[part]
        assert found == value, parameter
    logger = config["trainer"]["logger"][0]["init_args"]
    # Otherwise an agent's runs are not uploaded.
    assert not logger["offline"] and logger["name"] is None


@pytest.mark.parametrize("base", ["training", "decoding"])
def test_every_ablation_is_parsed_over_its_base(base, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    is_training = base == "training"
    mine = [n for n in ABLATIONS if n.startswith(("span_len", "context", "stage")) == is_training]
    mine = [f"{base}.yaml", *(n for n in mine if n not in ("training.yaml", "decoding.yaml"))]
    configs = [f"conf/ablation/{n}" for n in mine]
    if is_training:
        configs.insert(0, "conf/demo.yaml")
    with pytest.raises(SystemExit) as end:
        main(["fit", *(f"--config={c}" for c in configs), "--print_config"])
    assert end.value.code == 0 and len(mine) > 5
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    "name", [f"ablation/{n}" for n in ABLATIONS] + [f"sweep/{n}" for n in SWEEPS]
)
def test_a_file_starts_with_question_base_command_cost_and_expectation(name):
    lines = (ROOT / "conf" / name).read_text().splitlines()
    head = [line for line in lines if line.startswith("#")]
    assert head == lines[: len(head)]
    text = " ".join(head)
    assert ("?" if "the base, to" not in text and "Base of" not in text else ".") in text
    for part in ("Base", "Cost", "Expected", "python -m magnet_train", f"conf/{name}"):
        assert part in text, part


# --- the grid -------------------------------------------------------------------------------------


def test_the_grid_is_in_the_order_of_the_file_and_names_come_from_values(tmp_path):
    parameters = {
        "seed_everything": {"values": [1, 2]},
        "model.lr": {"value": 0.1},
        "a.steps": {"values": [[20, 5], [1]]},
        "b.on": {"values": [True, False]},
    }
    runs = read_sweep(write(tmp_path / "s.yaml", parameters=parameters), tmp_path / "out")
    assert [r.name for r in runs[:3]] == [
        "seed_everything=1,steps=20-5,on=True",
        "seed_everything=1,steps=20-5,on=False",
        "seed_everything=1,steps=1,on=True",
    ]
    assert len(runs) == len({r.folder for r in runs}) == 8
    assert runs[0].args == [
        "--seed_everything=1",
        "--model.lr=0.1",
        "--a.steps=[20, 5]",
        "--b.on=True",
        f"--trainer.default_root_dir={runs[0].folder}",
    ]


def test_parameters_of_the_same_last_name_are_named_in_full(tmp_path):
    parameters = {
        "model.seed": {"values": [-1]},
        "data.seed": {"values": [0, 1]},
        "x.lr": {"values": [5, 6]},
    }
    runs = read_sweep(write(tmp_path / "s.yaml", parameters=parameters), tmp_path)
    assert runs[0].name == "model.seed=-1,data.seed=0,lr=5"


ONE = {"x": {"values": [1]}}
BAD = {
    "nothing there": (None, "no such file"),
    "not YAML": ("a: [", "not valid YAML"),
    "no sweep": ({"method": None}, "a sweep needs"),
    "bayes": ({"method": "bayes", "parameters": ONE}, "method='bayes' needs a W&B server"),
    "a range": ({"parameters": {"x": {"min": 0, "max": 1}}}, "parameter x: a grid needs"),
    "no values": ({"parameters": {"x": {"values": []}}}, "parameter x: a grid needs"),
    "nested": ({"parameters": {"x": {"parameters": ONE}}}, "parameter x: a grid needs"),
    "nothing to vary": ({"parameters": {}}, "no parameters"),
    "None": ({"parameters": {"x": {"values": [1, None]}}}, '"null" in quotes'),
    "twice": ({"parameters": {"x": {"values": [1, 2, 1]}}}, "two runs are named x=1"),
    "alike in a name": ({"parameters": {"x": {"values": ["a b", "a/b"]}}}, "named x=a-b"),
    "another program": ({"parameters": ONE, "command": ["train.py", "${args}"]}, "command is not"),
    "a macro": (
        {"parameters": ONE, "command": ["magnet_train", "fit", "${args_json}", "${args}"]},
        "only W&B's agent replaces",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_gets_one_line(case, tmp_path, capsys, fake):
    content, want = BAD[case]
    if isinstance(content, str):
        (tmp_path / "s.yaml").write_text(content)
    elif content is not None:
        given = {name: value for name, value in (HEAD | content).items() if value is not None}
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(given))
    assert status(tmp_path / "s.yaml", "--out", fake) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and want in lines[0] and "s.yaml" in lines[0]
    assert not fake.exists()


def test_a_value_of_the_wrong_type_is_found_before_anything_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "FIT", ("false",))
    file = write(tmp_path / "s.yaml", parameters={"model.span_len": {"values": [3, "three"]}})
    assert status(file, "--out", tmp_path / "runs") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "run span_len=three" in line and "span_len" in line
    assert not (tmp_path / "runs").exists()
    assert status(file, "--jobs", 0) == 2 and "--jobs=0" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["/proc/x", "s3://key:SECRET@bucket/x"])
def test_a_folder_that_cannot_be_written_is_named(out, tmp_path, fake, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status(grid(tmp_path, 1), "--out", out) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: --out" in error and "SECRET" not in error and not (tmp_path / "s3:").exists()


# --- the scheduler --------------------------------------------------------------------------------


def test_runs_are_sequential_and_finished_ones_are_kept(tmp_path, fake, capsys):
    file = grid(tmp_path, 3, 1, 2, wait=0.1)
    assert status(file, "--out", fake) == 0
    said = [notes(fake / f"x={x}") for x in (3, 1, 2)]
    assert [len(n) for n in said] == [2, 2, 2]
    assert said[0][1]["end"] <= said[1][0]["start"] and said[1][1]["end"] <= said[2][0]["start"]
    assert said[0][0]["mode"] == "offline" and said[0][0]["ckpt"] == "auto"
    shutil.rmtree(fake / "x=1")
    assert status(file, "--out", fake) == 0
    assert [len(notes(fake / f"x={x}")) for x in (3, 1, 2)] == [2, 2, 2]
    assert "3 of 3 runs are finished" in capsys.readouterr().out
    assert (fake / "table.md").is_file() and (fake / "plot.png").is_file()


def test_overrides_reach_every_run_and_progress_has_the_metric(tmp_path, fake, capsys):
    file = grid(tmp_path, 1, 2, y=0)
    given = (file, "--out", fake, "--a.wait", "0.01", "--y.z", "--dry_run")
    assert status(*given) == 0 and not (fake / "x=1").exists()
    said = capsys.readouterr().out
    assert "each run: 3 h" in said and said.count("--a.wait=0.01 --y.z=true") == 2
    assert status(*given[:-1]) == 0
    command = (fake / "x=2" / "log.txt").read_text()
    assert "--y=0 --a.wait=0.01 --y.z=true --trainer.default_root_dir=" in command
    said = capsys.readouterr().out
    assert said.count("finished, val/ce 1 (after") == 2
    assert "1 of 2 runs are finished; about 2 h left" in said
    for option, says in (
        (("--trainer.default_root_dir", "a"), "the runs' folders are in --out"),
        (("--time", "1:00:00"), "only with --slurm"),
        (("--jops", "2"), "did you mean --jobs?"),
        (("--jobs", "0"), "at least 1"),
    ):
        assert status(file, "--out", fake, *option) == 2
        assert says in capsys.readouterr().err


def test_as_many_run_together_as_jobs_say(tmp_path, fake):
    # Each waits for the other to start.
    until = ":".join(str(fake / f"x={x}" / "notes") for x in (1, 2))
    file = grid(tmp_path, 1, 2, 3, 4, 5, until=until)
    assert status(file, "--out", fake, "--jobs", 2) == 0
    spans = [(n[0]["start"], n[1]["end"]) for n in (notes(fake / f"x={x}") for x in range(1, 6))]
    together = [sum(a <= start < b for a, b in spans) for start, _ in spans]
    assert max(together) == 2


def test_an_unfinished_run_resumes_from_its_checkpoint(tmp_path, fake, capsys):
    last = fake / "x=1" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    file = grid(tmp_path, 1, 2)
    assert status(file, "--out", fake) == 0
    assert all(notes(fake / f"x={x}")[0]["ckpt"] == "auto" for x in (1, 2))
    out = capsys.readouterr().out
    assert re.search(r"x=1 +\| to resume", out) and re.search(r"x=2 +\| to start", out)


def test_a_failed_run_is_reported_and_the_others_continue(tmp_path, fake, capsys):
    file = grid(tmp_path, "bad", 2)
    assert status(file, "--out", fake) == 1
    out = capsys.readouterr().out
    assert "failed, exit status 2: error: the shards are gone" in out
    assert "1 of 2 runs are finished" in out
    assert (fake / "x=2" / "summary.json").is_file()
    assert "1 of 2 runs are not finished" in (fake / "table.md").read_text()


def test_credentials_in_an_address_are_neither_written_nor_shown(tmp_path, fake, capsys):
    address = "s3://key:S3CRET@bucket/train"
    file = grid(tmp_path, address)
    for more in (["--dry_run"], ["--slurm", "--dry_run"], []):
        assert status(file, "--out", fake, f"--data.train={address}", *more) == 0
    assert "***@bucket/train" in (shown := capsys.readouterr().out) and "S3CRET" not in shown
    files = [path for path in fake.rglob("*") if path.is_file()]
    assert any("***@bucket/train" in path.read_text() for path in files if path.name == "log.txt")
    assert not [p for p in files if "S3CRET" in str(p) or b"S3CRET" in p.read_bytes()]


def start_sweep(python: str, file: Path, out: Path) -> "subprocess.Popen[str]":
    """The command in a separate process, with FAKE_FIT."""
    code = (
        "import sys\n"
        "from magnet_train.__main__ import main\n"
        "from magnet_train.cli import commands\n"
        "from magnet_train.sweeps import sweep\n"
        f"sweep.FIT = {sweep.FIT!r}\n"
        "commands.check_fit = lambda args: None\n"
        "commands.estimate_fit = lambda args: []\n"
        f"sys.exit(main(['sweep', {str(file)!r}, '--out', {str(out)!r}, '--jobs', '2']))"
    )
    return subprocess.Popen(
        [python, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def wait_for_files(*files: Path) -> None:
    wait_for(lambda: all(f.exists() and f.read_text() for f in files), f"{files}")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextlib.contextmanager
def handled(number: int, handler: Any) -> Iterator[None]:
    """A signal handler that children inherit."""
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_runs_with_a_one_line_message(number, python, tmp_path, fake):
    file = grid(tmp_path, 1, 2, 3, wait=500)
    with handled(signal.SIGINT, signal.default_int_handler):  # background jobs ignore it
        process = start_sweep(python, file, fake)
    wait_for_files(fake / "x=1" / "notes", fake / "x=2" / "notes")
    process.send_signal(number)
    _, err = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 130 and err.strip().splitlines() == ["interrupted"]
    for x in (1, 2):
        first, *rest = notes(fake / f"x={x}")
        assert "told_to_end" in rest[-1] and not is_alive(first["pid"])
    assert not (fake / "x=3").exists()


def test_an_interruption_as_a_run_is_started_leaves_none_behind(
    tmp_path, fake, monkeypatch, capsys
):
    file, started, start = grid(tmp_path, 1, 2, wait=500), [], sweep._start

    def start_told(run: sweep.Run, jobs: int) -> Any:
        started.append(start(run, jobs))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(sweep, "_start", start_told)
    assert status(file, "--out", fake, "--jobs", "2") == 130
    assert [process.returncode is not None for process in started] == [True]
    assert "interrupted" in capsys.readouterr().err


def test_under_nohup_a_sweep_outlives_its_terminal(python, tmp_path, fake):
    file = grid(tmp_path, 1, wait=1)
    with handled(signal.SIGHUP, signal.SIG_IGN):
        process = start_sweep(python, file, fake)
    wait_for_files(fake / "x=1" / "notes")
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=LONGEST_S)
    assert process.returncode == 0 and (fake / "x=1" / "summary.json").is_file()


def test_a_run_that_a_killed_sweep_left_behind_is_waited_for_not_started_twice(
    python, tmp_path, fake, monkeypatch
):
    until, said = tmp_path / "until", []
    file = grid(tmp_path, 1, until=str(until))
    process = start_sweep(python, file, fake)
    wait_for_files(fake / "x=1" / "notes")
    process.kill()
    process.communicate()

    def say(text: str) -> None:
        said.append(text)
        if "already running elsewhere" in text:
            until.touch()

    monkeypatch.setattr(sweep, "log", say)
    assert status(file, "--out", fake) == 0 and until.exists(), said
    assert len([n for n in notes(fake / "x=1") if "start" in n]) == 1


# --- SLURM ----------------------------------------------------------------------------------------


def test_the_array_job_has_a_task_for_each_unfinished_run_and_runs_it(
    python, tmp_path, fake, capsys, monkeypatch
):
    fake = tmp_path / "runs of 'mine'"
    file = grid(tmp_path, 0, 1, 2, y="a b")
    (fake / "x=0").mkdir(parents=True)
    (fake / "x=0" / "summary.json").write_text('{"metrics": {"val/ce": {"after": 1.0}}}')
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    options = ("--slurm", "--jobs", 4, "--partition", "gpu", "--time", "9:00:00", "--a.b", 3)
    assert status(file, "--out", fake, *options) == 2
    said = capsys.readouterr().err.strip()
    words = shlex.split(
        said.removeprefix("error: no sbatch on this machine; nothing was submitted; run: ")
    )
    assert words[2] == "--array=1,2%4"
    assert words[4:6] == ["--partition=gpu", "--time=9:00:00"]
    words = words[6:]
    assert words == [str(SBATCH / "sweep.sbatch"), str(file), "--out", str(fake), "--a.b=3"]
    # The job as SLURM would run it, with the interpreter of the fake `fit`.
    program(tools / "srun", 'shift; exec "$@"')
    program(tools / "python", f'shift 2\nexec {python} {tmp_path / "with_fake.py"} "$@"')
    (tmp_path / "with_fake.py").write_text(
        "import sys\nfrom magnet_train.__main__ import main\n"
        "from magnet_train.sweeps import sweep\n"
        f"sweep.FIT = {sweep.FIT!r}\nsys.exit(main())\n"
    )
    for task in ("0", "1", "2"):
        env = os.environ | {
            "SLURM_ARRAY_JOB_ID": "5",
            "SLURM_ARRAY_TASK_ID": task,
            "PYTHONPATH": str(ROOT),
        }
        subprocess.run(["bash", *words], env=env, check=True, cwd=tmp_path)
    assert not (fake / "x=0" / "notes").exists()
    assert [notes(fake / f"x={x}")[0]["mode"] for x in (1, 2)] == ["offline"] * 2
    assert notes(fake / "x=2")[0]["ckpt"] == "auto" and (fake / "x=2" / "log.txt").is_file()
    assert status(file, "--out", fake, "--slurm") == 0  # nothing is left to do
    assert "3 of 3 runs are finished" in capsys.readouterr().out
    assert status(file, "--out", fake, "--run", 3) == 2
    said = capsys.readouterr().err
    assert "--run 3: " in said and "has runs 0 to 2" in said


def test_a_task_leaves_a_run_alone_that_another_process_has(tmp_path, fake, capsys):
    file = grid(tmp_path, 1)
    run = read_sweep(file, fake)[0]
    lock = sweep._lock(run)
    assert status(file, "--out", fake, "--run", 0) == 2
    assert "another process has this run" in capsys.readouterr().err
    os.close(lock)


def test_sbatch_is_called_where_it_is_and_its_refusal_is_one_line(
    tmp_path, fake, capsys, monkeypatch
):
    file = grid(tmp_path, 1, 2)
    program(tmp_path / "sbatch", f'echo "$@" > {tmp_path / "asked"}; echo "Submitted batch job 77"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert status(file, "--out", fake, "--slurm") == 0
    assert "Submitted batch job 77" in capsys.readouterr().out
    assert "--array=0,1 " in (tmp_path / "asked").read_text()
    program(tmp_path / "sbatch", 'echo "invalid partition" >&2; exit 1')
    assert status(file, "--out", fake, "--slurm") == 2
    assert (
        "sbatch refuses the job (invalid partition); give --partition, --account and --time"
        in capsys.readouterr().err
    )


# --- for real -------------------------------------------------------------------------------------

TINY = (
    "--model.network.dim=32 --model.network.num_heads=2 --model.network.num_layers=2 "
    "--model.crop_s=3.2 --model.optimizer.warmup_steps=1 --data.batch_size=2 "
    "--data.num_workers=0 --trainer.accelerator=cpu --trainer.max_steps=2 "
    "--trainer.val_check_interval=2 --trainer.check_val_every_n_epoch=null "
    "--trainer.limit_val_batches=1 --generation.at_start=false "
    "--trainer.num_sanity_val_steps=0 --trainer.enable_model_summary=false "
    "--trainer.enable_progress_bar=false --trainer.logger=false --generation.num_prompts=0"
).split()


@pytest.mark.slow
def test_a_real_sweep_trains_its_runs_and_makes_a_table(python, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "FIT", (python, *sweep.FIT[1:]))
    (tmp_path / "base.yaml").write_text("{}\n")
    command = [*f"-m magnet_train fit --config {tmp_path}/base.yaml".split(), *TINY, "${args}"]
    parameters = {"seed_everything": {"values": [1, 2]}, "model.span_len": {"value": 5}}
    file = write(tmp_path / "spans.yaml", command=command, parameters=parameters)
    assert status(file, "--out", tmp_path / "out") == 0
    assert "2 of 2 runs are finished" in capsys.readouterr().out
    table = (tmp_path / "out" / "table.md").read_text()
    assert "± " in table
    assert not [text for text in ("| all |", "Runs also differ", "No config") if text in table]
    config = yaml.safe_load((tmp_path / "out" / "seed_everything=2" / "config.yaml").read_text())
    assert config["model"]["span_len"] == 5 and config["seed_everything"] == 2


@pytest.mark.slow
def test_an_ablation_of_decoding_validates_the_model_as_it_was_loaded(tmp_path, monkeypatch):
    import torch

    from magnet_train.decoding.rescoring import MagnetRescorer
    from magnet_train.release import SavedModel

    rescored = count_readings(monkeypatch, MagnetRescorer)
    monkeypatch.chdir(ROOT)
    args = (
        "fit --config=conf/ablation/decoding.yaml --config=conf/ablation/rescoring.yaml "
        "--data.num_workers=0 --trainer.logger=false --trainer.limit_val_batches=1 "
        "--generation.num_prompts=1 --generation.batch_size=1 --generation.num_media=0 "
        "--generation.metrics=[text/musicnn] --generation.decoding.decoding_steps=[1]"
    ).split()
    assert main([*args, f"--trainer.default_root_dir={tmp_path}"]) == 0
    assert rescored == [1]
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    averaged, raw = checkpoint["state_dict"], checkpoint["current_model_state"]
    loaded = SavedModel.open("demo").weights().items()
    assert all(torch.equal(averaged[f"network.{k}"], v.float()) for k, v in loaded)
    # The average is used: the raw weights have changed.
    assert any(not torch.equal(raw[f"network.{k}"], v.float()) for k, v in loaded)
