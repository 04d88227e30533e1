"""Every file in conf/ is parsed unchanged, built with reduced width, and trained for one step."""

from pathlib import Path

import pytest
import yaml
from helpers_data import write_shards
from make_components import make_codec, make_t5

from magnet_train.__main__ import main
from magnet_train.audiocraft.convert import ConvertOptions, convert

CONF = Path(__file__).parents[1] / "conf"
MODELS = sorted(p.name for p in CONF.glob("*.yaml"))
NARROW = "--model.network.dim 32 --model.network.num_heads 2 --model.network.num_layers 2".split()
QUICK = [
    "--trainer.accelerator",
    "cpu",
    "--trainer.devices",
    "1",
    "--trainer.num_nodes",
    "1",
    "--trainer.logger",
    "false",
    "--trainer.strategy",
    "auto",  # in this process, DDP would leave its process group to the tests that follow
    "--trainer.precision",
    "32-true",
    "--trainer.fast_dev_run",
    "true",
    "--generation.num_prompts",
    "0",
    "--data.batch_size",
    "2",
    "--data.num_workers",
    "0",
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Path]:
    """A codec in the published format with shards, a text encoder, and a release of the bundled
    model.
    """
    folder = tmp_path_factory.mktemp("parts")
    make_codec(folder / "codec")
    make_t5(folder / "t5")
    write_shards(folder / "shards", str(folder / "codec"), [3, 3])
    convert("demo", ConvertOptions(out=folder / "release"))
    return {name: folder / name for name in ("codec", "t5", "shards", "release")}


def launch(configs: list[str], parts: dict[str, Path], out: Path) -> int:
    own = any(c.startswith(("music", "hybrid", "sound", "modern", "attm")) for c in configs)
    args = ["fit", *(x for c in configs for x in ("--config", str(CONF / c))), *QUICK]
    if configs[0].startswith("demo_"):
        args[1:1] = ["--config", str(CONF / "demo.yaml")]
    if "finetune.yaml" in configs:
        args += ["--model.init_from", str(parts["release"])]
    else:
        args += NARROW
    if own:
        args += ["--model.codec", str(parts["codec"]), "--model.text_encoder", str(parts["t5"])]
        args += ["--data.train", str(parts["shards"]), "--data.validation", str(parts["shards"])]
    return main([*args, "--trainer.default_root_dir", str(out)])


@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_trains(name, parts, tmp_path, capsys):
    assert launch([name], parts, tmp_path / "run") == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(p.name for p in (CONF / "hardware").glob("*.yaml")))
def test_a_machine_is_laid_over_a_model(name, parts, tmp_path, capsys):
    assert launch(["music_small_10s.yaml", f"hardware/{name}"], parts, tmp_path / "run") == 0, (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_starts_with_what_it_is_and_how_to_run_it(name):
    head = [line for line in (CONF / name).read_text().splitlines() if line.startswith("#")]
    assert any("python -m magnet_train fit" in line for line in head)
    assert head[0].rstrip().endswith((".", "?"))


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith(("music", "hybrid", "sound"))])
def test_published_shapes_and_batches_are_those_of_the_paper(name):
    config = yaml.safe_load((CONF / name).read_text())
    kind, size, length = name.removesuffix(".yaml").split("_")
    shape = {"small": (1024, 16, 24), "medium": (1536, 24, 48), "large": (2048, 32, 48)}[size]
    assert tuple(config["model"]["network"][k] for k in ("dim", "num_heads", "num_layers")) == shape
    batch = {"10s": 576, "30s": 192}[length] if kind != "sound" else 128
    assert config["data"]["global_batch_size"] == batch
    assert config["model"]["crop_s"] == float(length.removesuffix("s"))
    assert config["generation"]["decoding"]["decoding_steps"][0] == {"10s": 20, "30s": 60}[length]
