"""`doctor` reports problems that would stop a run, with remedies, and leaves no files."""

import copy
import math
import os
import re
import shutil
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers_data import make_data_codec, write_shards
from helpers_wandb import server
from jsonargparse import Namespace
from make_components import make_t5

import magnet_train.module
from magnet_train.__main__ import main
from magnet_train.callbacks import throughput
from magnet_train.checks import doctor, estimate
from magnet_train.checks.cost import Memory, training_flop
from magnet_train.checks.doctor import CHECKS, Finding
from magnet_train.checks.estimate import Speed, available_memory
from magnet_train.checks.plan import Plan, parse_devices
from magnet_train.cli.fit import build_without_training
from magnet_train.common.errors import UserError
from magnet_train.conditioning import load_text_encoder
from magnet_train.data.pipeline import ShardSet
from magnet_train.model import Magnet, MagnetConfig
from magnet_train.resume import shards_hash

CONF = Path(__file__).parents[1] / "conf"
NETWORK = {"dim": 32, "num_heads": 2, "num_layers": 2}
ASSUMED = Speed(1e9, 1e9, 1.0, "as assumed")
usage = namedtuple("usage", "total used free")


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A codec with shards, another codec, a text encoder, and a valid configuration."""
    folder = tmp_path_factory.mktemp("parts")
    codec = make_data_codec(folder / "codec")
    make_data_codec(folder / "other", seed=1)
    make_t5(folder / "t5")
    write_shards(folder / "train", codec, (5, 3, 4, 5))
    write_shards(folder / "validation", codec, (3,))
    network = "\n".join(f"    {name}: {value}" for name, value in NETWORK.items())
    (folder / "c.yaml").write_text(
        f"model:\n  codec: {codec}\n  text_encoder: {folder / 't5'}\n  crop_s: 2.0\n  "
        f"network:\n{network}\n"
        "  optimizer: {warmup_steps: 1}\n"
        f"data: {{train: {folder / 'train'}, validation: {folder / 'validation'}, "
        "batch_size: 2, num_workers: 1}\n"
        "generation: {num_prompts: 2, metrics: [fad/codec]}\n"
        "trainer: {accelerator: cpu, max_steps: 4, val_check_interval: 2}\n"
    )
    return folder


@pytest.fixture(scope="module")
def plan(parts) -> Plan:
    """The parsed configuration, shared by tests of single checks."""
    made: Any = build_without_training(["--config", str(parts / "c.yaml")], [])
    return Plan(made.parsed, made.datamodule, made.config_init.fit.generation.decoding)


def changed(plan: Plan, options: dict[str, object]) -> Plan:
    """Another plan, with other options; `data.…` are attributes of the data module."""
    config, data = plan.config.clone(), copy.copy(plan.data)
    for name, value in options.items():
        if name.startswith("data."):
            setattr(data, name.removeprefix("data."), value)
            data._sets = {}
        else:
            config[name] = value
    return Plan(config, data, plan.decoding, dict(plan.samples))


def look(check: str, plan: Plan, **options: object) -> list[str]:
    """Findings of one check, runs of spaces as one; `trainer__devices` is `trainer.devices`."""
    plan = changed(plan, {name.replace("__", "."): value for name, value in options.items()})
    try:
        found = [str(finding) for finding in CHECKS[check](plan)]
    except UserError as error:
        found = [f"failed {check}: {error}"]
    return [re.sub(" +", " ", line) for line in found]


def ask(capsys, parts: Path, *options: str) -> tuple[int, dict[str, str], str]:
    """Exit status, messages of each check after its status, and the error line; speed is not
    measured."""
    quick = mock.patch.object(estimate, "measure_speed", lambda _: ASSUMED)
    with quick, mock.patch.object(magnet_train.checks.doctor, "SAMPLING_S", math.inf):
        status = main(["doctor", "--config", str(parts / "c.yaml"), *options])
    printed = capsys.readouterr()
    lines = [re.match(r"(\w+) +([^:]+): (.*)", line) for line in printed.out.splitlines()]
    errors = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert len(errors) == (status != 0)
    return status, {m[2]: f"{m[1]} {m[3]}" for m in lines if m}, "".join(errors)


# --- what holds -----------------------------------------------------------------------------------


def test_the_embedded_default_is_ready_and_nothing_is_left_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert all(line.startswith(("ok ", "warning ", "estimate ")) for line in lines)
    assert any(line.startswith("ok       metrics of musicnn: ships (") for line in lines)
    assert any("48 items in 1 shards" in line and "1 read in full" in line for line in lines)
    assert sum(line.startswith("estimate") for line in lines) == 5 and "measured here" in lines[-2]
    assert list(tmp_path.iterdir()) == []


def test_a_whole_configuration_is_ready(parts, tmp_path, capsys):
    run = tmp_path / "a" / "run"
    status, said, _ = ask(capsys, parts, f"--trainer.default_root_dir={run}")
    assert status == 0
    assert not [what for what, text in said.items() if text.startswith(("failed", "missing"))]
    assert said["batch"] == "ok 1 devices x 2 examples x 1 accumulated batches = 2 per step"
    assert said["train shards"].startswith("ok 17 items in 4 shards")
    assert "4 read in full: 17 items of 100 to 100" in said["train shards"]
    assert said["shards per worker"] == "ok 4 shards for 1 ranks x 1 readers, 4 each"
    assert said["start"] == "ok random weights"
    assert said["validation"].startswith("ok every 2 steps")
    assert said["disk"].endswith("one of them being written") and "3 checkpoints of" in said["disk"]
    assert not run.parent.exists()


def test_the_published_medium_model_is_never_made(parts, monkeypatch, capsys):
    made = []
    build = magnet_train.module.Magnet

    def spied(config: MagnetConfig) -> torch.nn.Module:
        network = build(config)
        made.append({parameter.device.type for parameter in network.parameters()})
        return network

    monkeypatch.setattr(magnet_train.module, "Magnet", spied)
    monkeypatch.setattr(
        estimate, "training_pass", lambda *_: pytest.fail("a network was made to be measured")
    )
    files = [CONF / "music_medium_30s.yaml", CONF / "hardware/gpus_8x80gb.yaml"]
    args = ["doctor", *(f"--config={file}" for file in files)]
    parts_here = [f"--model.codec={parts / 'codec'}", f"--model.text_encoder={parts / 't5'}"]
    data = [f"--data.train={parts / 'train'}", f"--data.validation={parts / 'validation'}"]
    assert main([*args, *parts_here, *data, "--gpu_hour_price=2"]) == 2
    printed = capsys.readouterr()
    assert made == [{"meta"}]
    assert re.search(r"estimate model: 1,8\d\d\.\d M parameters", printed.out)
    assert "calculated for a GPU of 312 TFLOP/s (A100)" in printed.out
    assert re.search(r"[\d,]+ GPU-hours, [\d,]+ at 2 each", printed.out)
    assert "failed   shards per worker:" in printed.out and "4 shards for 8 ranks" in printed.out
    assert re.search(
        r"failed   devices: 8 GPUs per node requested, (but torch .* without CUDA|\d visible)",
        printed.out,
    )


# --- what is wrong --------------------------------------------------------------------------------


def test_every_check_runs_even_if_others_fail(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 10**5))
    shutil.copytree(parts / "validation", tmp_path / "validation")
    shard = tmp_path / "validation" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    status, said, error = ask(
        capsys,
        parts,
        f"--model.codec={parts / 'other'}",
        f"--data.validation={tmp_path / 'validation'}",
        "--trainer.max_steps=-1",
        f"--model.init_from={tmp_path}/gone",
        "--checkpoint.monitor=val/oops",
        "--data.global_batch_size=4",
        "--trainer.accumulate_grad_batches=2",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
    )
    assert status == 2
    assert re.match(
        r"error: \d+ of \d+ checks failed; `fit` would fail too: start, settings, ", error
    )
    for what, sign in {
        "start": f"checkpoint '{tmp_path}/gone': no such file or folder",
        "batch": "accumulate_grad_batches=2: give only one of them",
        "settings": "monitor=val/oops: nothing of that name is logged; choose val/ce, val/fad",
        "train shards": "tokenize again with it, or train with theirs",
        "disk": "0 MB free for 3 checkpoints of",
    }.items():
        assert said[what].startswith("failed ") and sign in said[what], (what, said[what])
    assert "made with codec" in said["validation shards"]
    assert said["metrics of codec"].startswith("ok ")
    assert not (tmp_path / "run").exists()


def test_shards_that_are_too_few_damaged_absent_or_empty(parts, plan, tmp_path, capsys):
    shutil.copytree(parts / "train", tmp_path / "damaged")
    shard = tmp_path / "damaged" / "shard-000003.tar"
    shard.write_bytes(shard.read_bytes()[:-2000])
    status, said, _ = ask(
        capsys,
        parts,
        f"--data.train={tmp_path / 'damaged'}",
        f"--data.validation={tmp_path}",
        "--data.num_workers=9",
        f"--data.test={tmp_path / 'nowhere'}",
    )
    assert status == 2
    assert "shard-000003.tar: broken" in said["train shards"]
    assert "copy it again" in said["train shards"]
    assert "index.json: not there; make it with tokenize" in said["validation shards"]
    assert "nowhere/index.json: not there" in said["test shards"]
    assert (
        "4 shards for 1 ranks x 9 data workers: set --data.num_workers 4"
        in said["shards per worker"]
    )
    write_shards(tmp_path / "empty", str(parts / "codec"), (0,))
    said = look(
        "shards", plan, data__folders=plan.data.folders | {"validation": str(tmp_path / "empty")}
    )
    assert said[1].startswith("failed validation shards: ")
    assert "lists no shards with items" in said[1]


def test_captions_and_lengths_are_reported_with_numbers(parts, tmp_path, monkeypatch, capsys):
    read = ShardSet.read

    def captioned(self: ShardSet, number: int, with_references: bool = False):
        items = read(self, number, with_references)
        for i, item in enumerate(items):
            item["info"]["caption"] = ["", "the same", "the same", "a drum " * 600][i % 4]
        return items

    monkeypatch.setattr(ShardSet, "read", captioned)
    status, said, _ = ask(capsys, parts, "--model.crop_s=4")
    assert status == 0
    assert said["train captions"].startswith("warning 17 read: 35% empty, 82% repeat another")
    assert "18% are cut after 512 tokens" in said["train captions"]
    assert "100% of them shorter than an example (200 frames)" in said["train shards"]
    assert said["train shards"].startswith("warning ")
    assert "tokenize with --crop_s 4 or more" in said["train shards"]


def test_components_that_are_missing_are_named_with_their_source(
    parts, plan, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MAGNET_TRAIN_CACHE", str(tmp_path))
    options = [
        "--model.codec=facebook/encodec_32khz",
        "--model.text_encoder=t5-base",
        "--checkpoint.monitor=val/oops",
    ]
    metrics = "--generation.metrics=[fad/vggish,kl/passt]"
    status, said, error = ask(capsys, parts, *options, metrics)
    assert status == 2 and "codec facebook/encodec_32khz, text encoder t5-base" in error
    assert said["metrics of vggish"].startswith("warning not in the cache")
    assert "metrics of" not in error
    assert "doctor --prefetch downloads" in said["metrics of vggish"]
    assert "vggish-10086976.pth (289 MB, licence Apache-2.0)" in said["metrics of vggish"]
    assert said["text encoder t5-base"].startswith("missing ")
    assert "doctor --prefetch" in said["text encoder t5-base"]
    # Checks that do not need them still run.
    assert said["train shards"].startswith("ok ") and said["shards per worker"].startswith("ok ")
    assert "nothing of that name is logged; choose val/ce, val/fad/vggish" in said["settings"]
    (said,) = look("components", plan, prefetch=True, generation__metrics=("fad/vggish",))[2:]
    assert "HF_HUB_OFFLINE is set" in said


@pytest.mark.parametrize(
    ("options", "sign"),
    [
        (["--model.nonsense=1"], "nonsense"),
        (["--model.network.num_heads=3"], "dim=32 must be even and divisible by num_heads=3"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--seed_everything=-1"], "failed seed_everything=-1: must be from 0 to 4294967295"),
    ],
)
def test_an_invalid_configuration_is_reported_as_by_fit(options, sign, parts, capsys):
    status, said, error = ask(capsys, parts, *options)
    assert status == 2
    assert said["configuration"].startswith("failed ")
    assert sign in said["configuration"]
    assert "checks failed; `fit` would fail too: configuration" in error
    assert said["packages"].startswith("ok ")


def test_checks_that_compute_with_a_refused_setting_say_so(parts, plan, monkeypatch, capsys):
    status, said, error = ask(capsys, parts, "--trainer.val_check_interval=00:00:30:00")
    assert status == 2 and "settings, validation" in error
    assert "val_check_interval=00:00:30:00: training data has no end" in said["settings"]
    assert said["validation"] == "failed cannot be checked before the settings are valid"
    assert said["train shards"].startswith("ok ")
    # With valid settings it is our fault.
    monkeypatch.setitem(CHECKS, "batch", lambda plan: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        list(doctor.doctor(plan))


def test_an_accelerator_that_is_not_supported_is_reported_with_the_devices(parts, capsys):
    status, said, error = ask(capsys, parts, "--trainer.accelerator=tpu")
    assert status == 2 and error.endswith("too: devices")
    assert said["devices"].startswith("failed trainer.accelerator=tpu: not supported; choose auto,")


def test_a_launch_that_fit_refuses_is_reported(parts, monkeypatch, capsys):
    status, said, error = ask(capsys, parts, "--trainer.num_nodes=2")
    assert status == 2 and "launch" in error
    assert said["launch"].startswith("failed trainer.num_nodes=2: started on one node; start it on")
    monkeypatch.setenv("MASTER_ADDR", "node1")  # set by launchers
    assert "launch" not in ask(capsys, parts, "--trainer.num_nodes=2")[1]
    for name, value in {"JOB_NAME": "bash", "STEP_NUM_TASKS": "2", "NTASKS": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert "srun with several tasks in a job named 'bash'" in ask(capsys, parts)[1]["launch"]


def test_a_checkpoint_must_belong_to_the_run(parts, plan, tmp_path, monkeypatch, capsys):
    network = asdict(MagnetConfig(**NETWORK, num_codebooks=4, codebook_size=64, text_dim=32))
    weights = Magnet(MagnetConfig(**network)).state_dict()
    hashes = {"codec": ShardSet.open(parts / "train").index["codec"]["hash"]}
    hashes["train"] = shards_hash(ShardSet.open(parts / "train").index)
    hashes["text_encoder"] = load_text_encoder(str(parts / "t5")).hash
    model = {
        "network": network,
        "codec": str(parts / "codec"),
        "text_encoder": str(parts / "t5"),
        "seed": 1,
    }

    def saved(name: str, **changes) -> str:
        content = {"hyper_parameters": model, "global_step": 3, "run": hashes}
        content["state_dict"] = {f"network.{k}": v for k, v in weights.items()}
        content |= {"optimizer_states": [], "lr_schedulers": [], "loops": {}, "callbacks": {}}
        content |= {"pytorch-lightning_version": "2.6"}
        torch.save(content | changes, tmp_path / name)
        return str(tmp_path / name)

    assert look("start", plan, ckpt_path=saved("a.ckpt")) == [
        f"ok start: resumes after step 3 of {tmp_path}/a.ckpt"
    ]
    (said,) = look("start", plan, ckpt_path=saved("b.ckpt", run=hashes | {"train": "0"}))
    assert "failed start: --ckpt_path: trained on other shards" in said
    (said,) = look("start", plan, ckpt_path=saved("b.ckpt", run=hashes | {"text_encoder": "0"}))
    assert "failed start: --ckpt_path: trained with another text encoder" in said
    (said,) = look("start", plan, ckpt_path=saved("c.ckpt"), model__network__num_layers=3)
    assert "the checkpoint has another model: network.num_layers=3 (checkpoint: 2)" in said
    (tmp_path / "d.ckpt").write_bytes(b"damaged")
    status, said, _ = ask(capsys, parts, f"--ckpt_path={tmp_path / 'd.ckpt'}")
    assert status == 2
    assert "d.ckpt: damaged or truncated" in said["start"]
    assert said["disk"].startswith("ok ")
    (said,) = look("start", plan, ckpt_path=saved("d.ckpt", optimizer_states=None))
    assert "d.ckpt: not a checkpoint of a training run (optimizer_states is missing)" in said
    weights["out_norm.bias"] = torch.full((NETWORK["dim"],), math.nan)
    (said,) = look("start", plan, ckpt_path=saved("d.ckpt"))
    assert "d.ckpt: out_norm.bias has NaN or infinite values" in said
    (tmp_path / "d.ckpt").unlink()
    # A requeued job resumes, independent of its script.
    given = {
        "checkpoint__dirpath": str(tmp_path),
        "trainer__default_root_dir": str(tmp_path / "run"),
    }
    assert look("start", plan, **given) == ["ok start: random weights"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert look("start", plan, **given)[0].startswith("ok start: resumes after step 3")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert look("start", plan, ckpt_path="auto", **given)[0].startswith(
        "ok start: resumes after step 3"
    )
    assert (
        "does not match the model configuration" in look("start", plan, model__init_from="demo")[0]
    )


def test_checkpoints_that_will_be_replaced_have_their_room(plan, tmp_path, monkeypatch):
    """Three are kept: a resumed run with two needs space for one more, a new run for three."""
    size = estimate.checkpoint_bytes(plan)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 1.5 * size))
    saved: dict[str, Any] = {"hyper_parameters": {"network": {}}, "global_step": 3}
    saved |= {"optimizer_states": [], "lr_schedulers": [], "loops": {}, "callbacks": {}}
    for name in ("last.ckpt", "step=0000003.ckpt"):
        torch.save(saved | {"state_dict": {"x": torch.zeros(int(size) // 4)}}, tmp_path / name)
    given = {
        "checkpoint__dirpath": str(tmp_path),
        "trainer__default_root_dir": str(tmp_path / "run"),
    }
    (said,) = look("disk", plan, ckpt_path="auto", **given)
    assert said.startswith("ok disk: ") and "of them exist" in said
    (said,) = look("disk", plan, **given)  # those there are set aside
    assert said.startswith("failed disk: ") and "free for 3 checkpoints" in said
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 0.9 * size))
    # One more is written before an old one is deleted.
    assert look("disk", plan, ckpt_path="auto", **given)[0].startswith("failed disk: ")


def test_a_run_folder_that_cannot_be_written_is_named(plan, tmp_path):
    (tmp_path / "file").write_text("")
    for option in ("trainer.default_root_dir", "checkpoint.dirpath"):
        name = option.replace(".", "__")
        (said,) = look("disk", plan, **{name: str(tmp_path / "file" / "run")})
        assert said.startswith("failed disk: ") and f"set --{option}" in said
    arguments = {"save_dir": str(tmp_path / "file" / "csv")}
    logger = Namespace(class_path="a.CSVLogger", init_args=Namespace(**arguments))
    (said,) = look("disk", plan, trainer__logger=[logger])
    assert said.startswith("failed disk: ") and "set --trainer.logger.init_args.save_dir" in said


def test_a_finding_shows_no_credentials():
    assert "SECRET" not in str(doctor.Finding("ok", "shards", "s3://key:SECRET@bucket/x"))


# --- what fit refuses, and what it starts with ----------------------------------------------------


def test_what_is_validated_is_reported(plan):
    assert look("validation", plan) == ["ok validation: every 2 steps and at the end, 2 prompts"]
    (said,) = look("validation", plan, trainer__limit_val_batches=0)
    assert said == "warning validation: this run does not validate: trainer.limit_val_batches=0"
    assert look("validation", plan, trainer__limit_val_batches=1)[1].startswith(
        "warning validation: sees 2 of 3 items"
    )
    assert look("validation", plan, trainer__fast_dev_run=True) == [
        "ok validation: once, at the end, 2 prompts"
    ]


def test_no_validation_shards_are_needed_where_nothing_is_validated(plan):
    plan = changed(plan, {"data.folders": plan.data.folders | {"validation": None}})
    assert "no validation shards: give --data.validation" in look("shards", plan)[1]
    assert (
        "ok validation shards: none given" in look("shards", plan, trainer__limit_val_batches=0)[1]
    )


def test_a_missing_network_or_reference_is_an_error_if_the_monitor_needs_it(
    plan, tmp_path, monkeypatch
):
    monkeypatch.setenv("MAGNET_TRAIN_CACHE", str(tmp_path))
    metrics = ("fad/codec", "fad/vggish", "kl/passt")
    said = look("components", plan, generation__metrics=metrics)[-2:]
    assert [line.split(": ")[0] for line in said] == [
        "warning metrics of vggish",
        "warning metrics of passt",
    ]
    assert all(line.endswith("without it these metrics are skipped") for line in said)
    said = look(
        "components", plan, generation__metrics=metrics, checkpoint__monitor="val/fad/vggish"
    )[-2:]
    assert [line.split(": ")[0] for line in said] == [
        "missing metrics of vggish",
        "warning metrics of passt",
    ]

    plan = changed(plan, {"generation.metrics": metrics})
    plan.samples["validation"] = [{"reference": None}]  # type: ignore[typeddict-item]
    none = "references of vggish: none, so no fad/vggish; give --generation.reference"
    for monitor, status in ((None, "warning"), ("val/kl/passt", "failed")):
        said = look("references", plan, checkpoint__monitor=monitor)
        assert said[1] == f"warning {none}"
        assert said[2].startswith(f"{status} references of passt: none")
    assert look("references", plan, checkpoint__monitor="val/fad/vggish")[1] == f"failed {none}"
    said = look("references", plan, generation__reference=str(tmp_path))
    assert said[1].startswith(
        f"failed references of vggish: {tmp_path}/vggish.safetensors: no such file"
    )


# --- machine --------------------------------------------------------------------------------------


def test_too_few_cores_files_and_shared_memory_are_warnings(plan, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda p: usage(1, 0, 64 << 20) if str(p) == "/dev/shm" else real(p)
    )
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (256, 256))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    said = look("CPU", plan, trainer__devices=2)
    assert said[0].startswith(
        "warning CPU: 2 cores for 2 ranks and 2 data workers: request more cores"
    )
    assert said[-1].startswith("warning open files: 256 per process; raise it with ulimit -n")
    if Path("/dev/shm").is_dir():
        assert said[1].startswith("warning shared memory: 0.1 GB") and "--shm-size" in said[1]
    # Ranks mostly wait for their GPUs, so eight data workers for each of eight ranks have a core.
    given = {"trainer__accelerator": "gpu", "trainer__devices": 8, "data__num_workers": 8}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert look("CPU", plan, **given)[0] == "ok CPU: 64 cores for 8 ranks and 64 data workers"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(63)), raising=False)
    assert look("CPU", plan, **given)[0].endswith("or set --data.num_workers 7")


def test_memory_is_what_may_still_be_had_within_the_jobs_limit(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal:  9000 kB\nMemFree:  1000 kB\nMemAvailable:  4000 kB\n"
    )
    assert available_memory(tmp_path) == 4000 * 1024
    job = tmp_path / "sys/fs/cgroup/slurm/job_1/step_0"
    job.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/elsewhere\n0::/slurm/job_1/step_0\n")
    for limit, bytes_ in (("max", 4000 * 1024), ("3000000", 3e6), ("9000000", 4000 * 1024)):
        # Limits of the innermost cgroup, the job and a container.
        for folder in (job, job.parent, tmp_path / "sys/fs/cgroup"):
            (folder / "memory.max").write_text(f"{limit}\n")
            assert available_memory(tmp_path) == bytes_
            (folder / "memory.max").write_text("max\n")
    assert available_memory(tmp_path / "nowhere") > 1e8


def test_a_tenth_of_the_memory_stays_free(plan, monkeypatch):
    monkeypatch.setattr(estimate, "measure_speed", lambda _: ASSUMED)
    needed = Memory(
        weights=5e8, gradients=0, moments=0, average=0, copies=0, frozen=0, activations=5e8
    )
    monkeypatch.setattr(estimate.cost, "memory", lambda *_, **__: needed)
    for capacity, status in ((0.95e9, "failed"), (1.05e9, "warning"), (1.15e9, None)):
        monkeypatch.setattr(estimate, "_capacities", lambda _, c=capacity: [c])
        found = [x for x in CHECKS["estimate"](plan) if isinstance(x, Finding)]
        assert [(x.status, x.what) for x in found] == (
            [] if status is None else [(status, "memory")]
        )
        assert all(
            "less a reserve of 10 %" in x.detail and "set --data.batch_size 1" in x.detail
            for x in found
        )


def test_versions_are_held_to_what_the_package_needs(parts, monkeypatch, capsys):
    needs = ["lightning>=99", "nowhere-to-be-had", "laion-clap; extra == 'laion-clap'", "numpy>=1"]
    monkeypatch.setattr(magnet_train.checks.doctor, "_requirements", lambda: needs)
    found = [str(finding) for finding in doctor.check_packages()]
    assert re.match(
        r"failed   packages: lightning 2\.\S+ is installed, >=99 is needed: pip install "
        r"'lightning>=99'",
        found[0],
    )
    assert (
        found[1]
        == "failed   packages: nowhere-to-be-had is missing: pip install 'nowhere-to-be-had'"
    )
    assert found[2].startswith("ok       packages: torch ")
    assert not [line for line in found if "laion" in line]


@pytest.fixture
def online(plan, tmp_path, monkeypatch):
    """Findings of a run with W&B, without other W&B settings."""
    import wandb

    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "HOME": tmp_path,
        "WANDB_CONFIG_DIR": tmp_path / "w",
        "NETRC": tmp_path / "netrc",
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "10")
    logger = Namespace(
        class_path="lightning.pytorch.loggers.WandbLogger", init_args=Namespace(offline=False)
    )
    yield changed(
        plan, {"trainer.logger": [logger], "trainer.default_root_dir": str(tmp_path / "run")}
    )
    wandb.teardown()


def test_without_a_key_the_run_is_logged_offline_and_fast_dev_run_has_no_loggers(online):
    assert look("W&B", online, trainer__fast_dev_run=True) == ["ok W&B: not a logger of this run"]
    (said,) = look("W&B", online)
    assert said.startswith(
        "warning W&B: no API key (`wandb login` sets one): the run will be logged offline; wandb "
        "sync"
    )
    offline = online.config.trainer.logger[0].clone()
    offline.init_args.offline = True
    assert look("W&B", online, trainer__logger=[offline])[0].startswith(
        "ok W&B: offline: wandb sync"
    )


def test_a_refused_key_stops_a_new_run_but_not_a_resumed_one(online, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    with server(lambda _: (401, {"errors": [{"message": "permission denied"}]})) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        (said,) = look("W&B", online)
        assert said.startswith("failed W&B: the key is refused, or the server cannot be reached (")
        assert "WANDB_MODE" in said
        # For a first submission.
        assert look("W&B", online, ckpt_path="auto")[0].startswith("failed ")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "wandb_run_id").write_text("abc\n")
        (said,) = look("W&B", online, ckpt_path="auto")
        assert said.startswith("warning W&B: the key is refused")
        assert "the run will be logged offline" in said


def test_host_and_mode_come_from_the_settings_file_and_the_key_from_netrc(online, tmp_path):
    import wandb

    def accept(request: dict) -> tuple[int, dict]:
        return 200, {
            "data": {"viewer": {"id": "a", "username": "ann", "entity": "ann", "flags": "{}"}}
        }

    (tmp_path / "w").mkdir()
    with server(accept) as url:
        (tmp_path / "w" / "settings").write_text(f"[default]\nbase_url = {url}\n")
        (tmp_path / "netrc").write_text(
            f"machine {url.removeprefix('http://')}\n  login user\n  password {'k' * 40}\n"
        )
        (tmp_path / "netrc").chmod(0o600)
        assert look("W&B", online) == [f"ok W&B: online at {url}, which accepts the key"]
    wandb.teardown()
    (tmp_path / "w" / "settings").write_text("[default]\nmode = disabled\n")
    assert look("W&B", online) == ["warning W&B: disabled by its settings: nothing will be logged"]


def test_utilisation_counts_the_operations_of_the_estimate():
    config = MagnetConfig(**NETWORK, num_codebooks=4, codebook_size=64, text_dim=32)
    mean = sum(training_flop(config, 100, stage) for stage in range(4)) / 4
    assert throughput._flop_per_example(config, 100) == pytest.approx(mean)


def test_gpus_are_looked_at_as_they_are(monkeypatch):
    """With a fake driver: eight GPUs without bfloat16, one of them in use."""
    card = SimpleNamespace(name="V100", total_memory=32 * 10**9)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (16e9 if i == 3 else 32e9, 32e9))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)

    def look(devices: int, precision: str) -> list[str]:
        trainer = SimpleNamespace(
            accelerator="gpu", devices=devices, num_nodes=4, precision=precision
        )
        plan = SimpleNamespace(
            devices=parse_devices(trainer), config=SimpleNamespace(trainer=trainer)
        )
        return [str(finding) for finding in doctor.check_devices(plan)]  # type: ignore

    first, second = look(8, "16-mixed")
    assert first.startswith(
        "ok       devices: 8 GPUs on each of 4 nodes, of which this one was checked: V100 with 32 "
        "GB"
    )
    assert second == "warning  devices: 50% of GPU memory is already in use by other processes"
    with pytest.raises(
        UserError, match=r"precision=bf16-mixed: V100 has no bfloat16; set --trainer\.precision 16"
    ):
        look(2, "bf16-mixed")
    with pytest.raises(
        UserError,
        match="16 GPUs per node requested, 8 visible here; run this where the job will run",
    ):
        look(16, "16-mixed")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match=r"8 GPUs requested, but torch .* is built without NCCL"):
        look(2, "16-mixed")
