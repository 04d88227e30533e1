"""The job files of conf/slurm with fake srun and scontrol."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers_programs import LONGEST_S, program

ROOT = Path(__file__).parents[1]
JOBS = sorted((ROOT / "conf" / "slurm").glob("*.sbatch"))
TINY = (
    "--model.network.dim=32 --model.network.num_heads=2 --model.network.num_layers=1 "
    "--model.crop_s=3.2 --model.optimizer.warmup_steps=1 --data.batch_size=2 "
    "--data.num_workers=0 --trainer.accelerator=cpu --trainer.max_steps=6 "
    "--trainer.limit_val_batches=1 --generation.at_start=false --generation.num_prompts=0 "
    "--trainer.enable_progress_bar=false --trainer.val_check_interval=6"
).split()


@pytest.mark.parametrize("job", JOBS, ids=lambda p: p.stem)
def test_a_job_file_is_what_its_head_says(job: Path):
    text = job.read_text()
    assert subprocess.run(["bash", "-n", str(job)]).returncode == 0
    # Of the steps, not of the batch script.
    for option in ("--requeue", "--open-mode=append", "--signal=SIGUSR1@900"):
        assert f"#SBATCH {option}\n" in text
    assert "HF_HUB_OFFLINE" in text and "WANDB_MODE" in text and f"conf/slurm/{job.name}" in text


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 8), (2, 4)])
def test_the_readmes_command_starts_the_same_resuming_run_each_time(nodes, gpus, tmp_path: Path):
    """A fake sbatch reads the job file's options and its own, and runs a copy of the file."""
    tools = tmp_path / "tools"
    tools.mkdir()
    calls = tmp_path / "calls.txt"
    program(tools / "python", f'echo "$SLURM_PROCID $@" >> {calls}')
    program(
        tools / "srun",
        """
        while [[ $1 == --* ]]; do shift; done
        for (( i = 0; i < SLURM_NTASKS; i++ )); do SLURM_PROCID=$i "$@"; done""",
    )
    program(
        tools / "sbatch",
        f"""
        own=()
        while [[ $1 == --* ]]; do own+=("$1"); shift; done
        cp "$1" {tmp_path}/slurm_script; shift
        size() {{
            {{ sed -n "s/^#SBATCH //p" {tmp_path}/slurm_script; printf '%s\\n' "${{own[@]}}"; }} |
                sed -n "s/^--$1=//p" | tail -1
        }}
        SLURM_JOB_NUM_NODES=$(size nodes) SLURM_NTASKS_PER_NODE=$(size ntasks-per-node)
        SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE)) SLURM_CPUS_PER_TASK=8
        SLURM_JOB_ID=$RANDOM SLURM_SUBMIT_DIR=$PWD
        export ${{!SLURM_*}}
        cd {tmp_path} && bash slurm_script "$@" """,
    )
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    command = re.search("sbatch conf/slurm/one_node.sbatch .*", readme)
    assert command is not None
    options = command[0].split(maxsplit=2)[2]
    job = command[0]
    if nodes > 1:
        sizes = f"--nodes={nodes} --gpus-per-node={gpus} --ntasks-per-node={gpus}"
        job = f"sbatch {sizes} conf/slurm/several_nodes.sbatch {options}"
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    env["PATH"] = f"{tools}:{env['PATH']}"
    given = f"--ckpt_path auto {' '.join(options.split())} "
    given += f"--trainer.num_nodes {nodes} --trainer.devices {gpus}"
    expected = [f" -m magnet_train doctor {given}"]
    expected += [f"{rank} -m magnet_train fit {given}" for rank in range(nodes * gpus)]
    for _ in range(2):
        calls.write_text("")
        subprocess.run(["bash", "-c", job], cwd=ROOT, env=env, check=True)
        assert calls.read_text().splitlines() == expected


@pytest.mark.slow
def test_a_job_of_two_tasks_is_stopped_requeued_and_resumed(python: str, tmp_path: Path):
    """The fake srun starts two tasks with SLURM's environment, and sends SIGUSR1 to both after the
    first step. The run starts on one node and resumes on two."""
    tools, run = tmp_path / "tools", tmp_path / "run"
    tools.mkdir()
    program(tools / "python", f'exec {python} "$@"')
    program(tools / "scontrol", f'echo "$@" >> {tmp_path}/scontrol.txt')
    program(
        tools / "srun",
        f"""
        [[ $1 == --* ]] && shift
        for i in 0 1; do
            node=$((i * (SLURM_NNODES - 1)))
            SLURM_PROCID=$i SLURM_NODEID=$node SLURM_LOCALID=$((i - node)) \\
                "$@" > {tmp_path}/rank$i.txt 2>&1 &
        done
        if [[ -z ${{SLURM_RESTART_COUNT:-}} ]]; then
            until [[ -f {run}/started || -z $(jobs -pr) ]]; do sleep 0.1; done
            kill -USR1 $(jobs -p)
        fi
        status=0; for pid in $(jobs -p); do wait $pid || status=$?; done; exit $status""",
    )
    (tmp_path / "slow.py").write_text(
        "import os\nimport time\nfrom pathlib import Path\nfrom lightning.pytorch.callbacks import "
        "Callback\n\n\n"
        "class TillTold(Callback):\n"
        "    def on_train_batch_end(self, trainer, *args):\n"
        "        (Path(trainer.default_root_dir) / 'started').touch()\n"
        "        (told,) = (c for c in trainer.callbacks if type(c).__name__ == 'Preemption')\n"
        "        while 'SLURM_RESTART_COUNT' not in os.environ and told._received is None:\n"
        "            time.sleep(0.02)\n"
    )
    slurm = {
        "JOB_ID": "7",
        "JOB_NAME": "magnet",
        "NTASKS": "2",
        "SUBMIT_DIR": str(ROOT),
        "CPUS_PER_TASK": "1",
        "NODEID": "0",
        "LOCALID": "0",
        "PROCID": "0",  # of the script itself
    }
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    env |= {f"SLURM_{name}": value for name, value in slurm.items()}
    env |= {"PATH": f"{tools}:{env['PATH']}", "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    options = ["--config", "conf/demo.yaml", *TINY, f"--trainer.default_root_dir={run}"]
    options += ["--trainer.callbacks+=slow.TillTold", "--trainer.strategy=ddp"]

    def start(job: str, nodes: int, **more: str) -> str:
        sizes = {"JOB_NUM_NODES": nodes, "NNODES": nodes, "NTASKS_PER_NODE": 2 // nodes}
        sizes["NODELIST"] = ",".join(["localhost"] * nodes)
        done = subprocess.run(
            ["bash", ROOT / f"conf/slurm/{job}.sbatch", *options],
            env=env | {f"SLURM_{name}": str(value) for name, value in sizes.items()} | more,
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
        )
        said = (tmp_path / "rank0.txt").read_text() if (tmp_path / "rank0.txt").exists() else ""
        assert done.returncode == 0, done.stdout + done.stderr + said
        return said

    assert "job 7 is requeued" in start("one_node", 1)
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 7\n"
    assert (run / "checkpoints" / "last.ckpt").is_file() and not (run / "summary.json").exists()
    run_id = (run / "wandb_run_id").read_text().strip()
    said = start("several_nodes", 2, SLURM_RESTART_COUNT="1")
    assert f"--ckpt_path auto: {run / 'checkpoints' / 'last.ckpt'}" in said
    assert (run / "summary.json").is_file()
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 7\n"
    sessions = [p.name for p in (run / "wandb").glob("offline-run-*")]
    # Of W&B they are one run.
    assert len(sessions) == 2 and all(name.endswith(f"-{run_id}") for name in sessions)
    assert (run / "config.yaml").is_file() and [p.name for p in tmp_path.glob("run*")] == ["run"]


@pytest.mark.parametrize("job", JOBS, ids=lambda p: p.stem)
def test_a_job_that_fails_is_queued_again_a_few_times(job: Path, tmp_path: Path):
    """Not after user errors, and a limited number of times; an hour's run resets the count."""
    tools, called = tmp_path / "tools", tmp_path / "scontrol.txt"
    tools.mkdir()
    program(tools / "scontrol", f'echo "$@" >> {called}')
    program(tools / "python", "exit 0")
    slurm = {
        "JOB_ID": "7",
        "JOB_NUM_NODES": "1",
        "NTASKS_PER_NODE": "2",
        "SUBMIT_DIR": str(tmp_path),
    }
    slurm |= {"ARRAY_JOB_ID": "5", "ARRAY_TASK_ID": "2"} if job.stem == "sweep" else {}
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {
        "PATH": f"{tools}:{os.environ['PATH']}"
    }
    env |= {f"SLURM_{name}": value for name, value in slurm.items()}

    def calls(status: int, **more: str) -> int:
        """Calls of scontrol for a job whose srun exits with this status."""
        called.write_text("")
        program(tools / "srun", f"exit {status}")
        assert (
            subprocess.run(["bash", str(job)], env=env | more, capture_output=True).returncode
            == status
        )
        assert {*called.read_text().splitlines()} <= {
            "requeue 5_2" if job.stem == "sweep" else "requeue 7"
        }
        return len(called.read_text().splitlines())

    failed = [calls(status) for status in (2, 137, 1, 137, 137, 137, 137, 2)]
    assert failed == [0, 1, 1, 1, 1, 1, 0, 0]
    # As bash counts them from a job's start.
    assert calls(137, SECONDS="4000") == 1 and calls(137) == 1
    assert [calls(status) for status in (0, 137)] == [0, 1]
    assert len([*tmp_path.glob(".magnet-failures-*")]) == 1
