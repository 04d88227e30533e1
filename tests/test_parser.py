"""The parser of all verbs: defaults and one-line errors."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_errors import command_error

from magnet_train.__main__ import main
from magnet_train.cli.fit import build_without_training
from magnet_train.cli.parser import find_config, make_parser
from magnet_train.common.assets import conf_path, shipped_configurations
from magnet_train.common.errors import UserError
from magnet_train.common.yaml_files import MAX_BYTES
from magnet_train.release import SavedModel

SMALL = {"dim": 32, "num_heads": 2, "num_layers": 1}


def printed(capsys: Any, *args: str) -> dict[str, Any]:
    """Output of `--print_config`, which is only YAML."""
    with pytest.raises(SystemExit) as ended:
        main([*args, "--print_config"])
    assert ended.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("given, used", [(None, "passive"), ("active", "active")])
def test_waiting_threads_leave_the_cores_to_others(given, used):
    """For every verb, before torch is imported, unless the user chose otherwise."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    script = (
        "import os, sys\n"
        "from magnet_train import __main__\n"
        "from magnet_train.cli import commands\n"
        "loaded = lambda *_: print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])\n"
        "commands.run = loaded\n"
        "__main__.main(['fit'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", used], done.stderr


def test_verbs_start_without_what_they_do_not_use(tmp_path):
    """In one process: from the verb that needs least to the one that needs most."""
    script = (
        "import sys\n"
        "from magnet_train.__main__ import main\n"
        "def run(args, *names):\n"
        "    try:\n"
        "        assert main(args) in (0, None), args\n"
        "    except SystemExit as ended:\n"
        "        assert ended.code == 0, args\n"
        "    print('loaded', {*names} & {*sys.modules}, file=sys.stderr)\n"
        "hub = 'transformers', 'huggingface_hub', 'lightning', 'torchmetrics', 'wandb'\n"
        "compiler = 'torch._dynamo', 'sympy'\n"
        "run(['sweep', '--help'], 'torch', *hub)\n"
        "clip = ['generate', '-p', 'a waltz', '--duration_s', '0.08', '--plots', 'false']\n"
        f"run([*clip, '--out', {str(tmp_path)!r}], 'matplotlib', *hub, *compiler)\n"
        "run(['fit', '--help'], 'transformers', 'matplotlib')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    found = [line for line in done.stderr.splitlines() if line.startswith("loaded")]
    assert found == ["loaded set()"] * 3, done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["fit"],
        ["fit", "--model.init_from", "demo"],
        ["validate", "--model.init_from", "demo"],
        ["generate", "--decoding.top_p", "0.5"],
        ["evaluate", "--generated", "a", "--reference", "b"],
        ["tokenize", "a", "--out", "b"],
        ["convert", "demo", "--out", "b"],
        ["sweep", "a.yaml"],
        ["bench"],
        ["dashboard", "--entity", "me"],
    ],
    ids=lambda args: " ".join(args[:2]),
)
def test_print_config_round_trips(args, tmp_path, capsys):
    first = printed(capsys, *args)
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(first))
    assert printed(capsys, args[0], "--config", str(file)) == first


@pytest.mark.parametrize("given", ["flag", "dashes", "config", "group file", "group text"])
def test_decoding_settings_are_the_given_ones_then_the_checkpoints(given, tmp_path, capsys):
    settings = {"max_cfg_coef": 3.25, "top_p": 0.5}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"decoding": settings}))
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(settings))
    args = {
        "flag": ["--decoding.max_cfg_coef=3.25", "--decoding.top_p=0.5"],
        "dashes": ["--decoding.max-cfg-coef", "3.25", "--decoding.top-p", "0.5"],
        "config": ["--config", str(tmp_path / "c.yaml")],
        "group file": ["--decoding", str(tmp_path / "d.yaml")],
        "group text": ["--decoding", json.dumps(settings)],
    }[given]
    expected = asdict(SavedModel.open("demo").decoding) | settings
    found = printed(capsys, "generate", *args)["decoding"]
    assert found == json.loads(json.dumps(expected))


@pytest.mark.parametrize("given", ["flag", "config", "group file"])
def test_a_model_that_training_starts_from_gives_the_defaults(given, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("model: {init_from: demo, guidance_dropout: 0.125}")
    (tmp_path / "m.yaml").write_text("{init_from: demo, guidance_dropout: 0.125}")
    args = {
        "flag": ["--model.init_from", "demo", "--model.guidance_dropout", "0.125"],
        "config": ["--config", str(tmp_path / "c.yaml")],
        "group file": ["--model", str(tmp_path / "m.yaml")],
    }[given]
    found = printed(capsys, "fit", *args)
    saved = SavedModel.open("demo")
    assert found["model"]["network"]["dim"] == saved.network.dim
    assert found["model"]["crop_s"] == saved.crop_s
    assert found["generation"]["decoding"]["temperature"] == saved.decoding.temperature
    assert found["model"]["guidance_dropout"] == 0.125
    finetune = yaml.safe_load(conf_path("finetune.yaml").read_text())
    steps = found["trainer"]["max_steps"]
    assert (steps == finetune["trainer"]["max_steps"]) == (given != "config")


def test_help_shows_the_defaults_that_will_be_used(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    steps = yaml.safe_load(conf_path("demo.yaml").read_text())["trainer"]["max_steps"]
    assert f"default: {steps}" in text and "hardware/gpu_1x24gb.yaml" in text


def test_a_shipped_configuration_is_found_by_name_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("conf/music_small_10s.yaml", "music_small_10s.yaml"):
        assert find_config(name) == str(conf_path("music_small_10s.yaml"))
    (tmp_path / "music_small_10s.yaml").write_text("{}")  # a file that is here wins
    assert Path(find_config("music_small_10s.yaml")).resolve().parent == tmp_path
    assert not any(name.startswith(("sweep", "slurm")) for name in shipped_configurations())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xe3\x00\xff", "not UTF-8"),
        (b"a: [", "not valid YAML"),
        (b"a: &a [%s]\nb: &b [%s]\nc: [%s]" % (b"1," * 99, b"*a," * 99, b"*b," * 99), "aliases"),
        (b"a: &a [*a]", "alias"),
        (b"a: 1\nb: 2\na: 3", "a is given twice"),
        (b'{"decoding": "\\u0000"}', "has a null character"),
        (b"- 1", "contains a list"),
        (b"#" * (MAX_BYTES + 1), "larger than"),
        (None, "no such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_no_configuration_is_named(content, says, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    if content is not None:
        file.write_bytes(content)
    line = command_error(capsys, "bench", "--config", str(file))
    assert str(file) in line and says in line


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["genrate"], "did you mean generate?"),
        (["generate", "--promt", "a"], "did you mean --prompt?"),
        (["generate", "--pro", "a"], "--pro"),
        (["fit", "--model.crop_z", "3"], "did you mean --model.crop_s?"),
        (["fit", "--model.optimizer.name", "sgd"], "choose adamw, dadapt_adam"),
        (["fit", "--model.crop_s", "three"], "--model.crop_s three: give a number"),
        (["generate", "--duration_s", "nan"], "--duration_s nan: give a number or null"),
        (["fit", "--seed_everything", "x"], "--seed_everything x: give"),
        (["fit", "--model.optimizer.betas", "[1]"], "betas [1]: give 2 values"),
        (["fit", "--model", "3"], "--model 3: give options"),
        (["fit", "--config", "{checkpoint: 5}"], "--checkpoint 5: give options"),
        (["fit", "--config", "{trainer: [1]}"], "--trainer [1]: give options"),
        (["generate", "--config", "{decoding: 5}"], "--decoding 5: give options"),
        (["generate", "--config", "{prompt: a waltz}"], "--prompt a waltz: give a list"),
        (["generate", "--config", "{lora: {a: 1}}"], "--lora {'a': 1}: give a list"),
        (["fit", "--model.span_len", "null"], "--model.span_len None: give"),
        (["generate", "--seed", "null"], "--seed None: give an integer"),
        (["fit", "--model.optimizer.lr", ".nan"], "--model.optimizer.lr nan"),
        (["fit", "--model.crop_s", ".inf"], "--model.crop_s inf"),
        (["fit", "--seed_everything", "100000000000000000000"], "seed_everything"),
        (["fit", "--trainer.strategy", "foo"], "strategy"),
        (["fit", "--trainer.devices", "0"], "devices"),
        (["fit", "--trainer.num_nodes", "2"], "num_nodes=2: started on one node"),
        (["validate", "--ckpt_path", "auto"], "--ckpt_path auto: no checkpoint in"),
        (
            ["test", "--model.init_from", "demo", "--trainer.precision", "bf16-true"],
            "trainer.precision=bf16-true: weights stay in float32",
        ),
        (
            ["predict", "--model.init_from", "demo", "--trainer.accelerator", "tpu"],
            "trainer.accelerator=tpu: not supported",
        ),
        (["fit", "--checkpoint.save_top_k", "-7"], "save_top_k"),
        (["fit", "--trainer.callbacks", "{class_path: no.X}"], "No module named 'no'"),
        (["fit", "--trainer.callbacks", "{class_path: EarlyStopping}"], "required: monitor"),
        (["fit", "--trainer.logger", "{class_path: MLFlowLogger}"], "pip install -U 'mlflow"),
        (
            [
                "fit",
                "--trainer.logger",
                "{class_path: CSVLogger, init_args: {save_dir: /proc/x}}",
            ],
            "save_dir /proc/x: cannot be written",
        ),
        (["validate"], "--ckpt_path"),
        (["predict"], "--ckpt_path"),
        (["fit", "--ckpt_path", "none.ckpt"], "none.ckpt"),
        (["fit", "--ckpt_path", "last"], "last: no such file"),
        (["fit", "--model.init_from", "./none"], "./none"),
        (["fit", "--config", "s3://key:secret@b/x"], "--config s3://***@b/x: no such file"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_mistakes_are_the_last_line(args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = command_error(capsys, *args)
    assert line.startswith("error: ") and says in line


def test_doctor_notes_a_missing_model_and_checks_the_rest(tmp_path):
    errors: list[Exception] = []
    built = build_without_training(["--ckpt_path", str(tmp_path / "none.ckpt")], errors)
    assert len(errors) == 1 and isinstance(errors[0], UserError)
    assert built.parsed.ckpt_path is None and built.parsed.trainer.max_steps > 0


def test_numbers_within_lists_are_finite_too():
    parser = make_parser("x", "")
    parser.add_argument("--betas", type=list[float])
    with pytest.raises(UserError, match="--betas"):
        parser.parse_args(["--betas", "[0.9, .inf]"])
    assert parser.parse_args(["--betas", "[0.9, 0.5]"]).betas == [0.9, 0.5]


def test_a_boolean_option_needs_no_value(capsys):
    words = ["--unconditional", "--plots", "false", "--decoding.reference-compat", "-p", "a waltz"]
    found = printed(capsys, "generate", *words)
    flags = found["unconditional"], found["plots"], found["decoding"]["reference_compat"]
    assert flags == (True, False, True) and found["prompt"] == ["a waltz"]
    assert vars(make_parser("x", "").given([])) == {}  # `fit` alone


def test_a_tracker_replaces_the_configured_loggers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    built = build_without_training(["--tracker", "csv"], [])
    assert [type(logger).__name__ for logger in built.trainer.loggers] == ["CSVLogger"]
