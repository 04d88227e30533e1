"""Files in conf/ are parsed unchanged and built with reduced width; one of each kind trains."""

from pathlib import Path

import pytest
import yaml
from helpers_data import write_shards
from make_components import make_codec, make_t5

from magnet_train.__main__ import main
from magnet_train.audiocraft.convert import ConvertOptions, convert
from magnet_train.cli.fit import build_without_training

CONF = Path(__file__).parents[1] / "conf"
MODELS = sorted(p.name for p in CONF.glob("*.yaml"))
HARDWARE = sorted(p.name for p in (CONF / "hardware").glob("*.yaml"))
NARROW = "--model.network.dim 32 --model.network.num_heads 2 --model.network.num_layers 2".split()
# With DDP in this process, its process group would be left to the tests that follow.
QUICK = (
    "--trainer.accelerator cpu --trainer.devices 1 --trainer.num_nodes 1 --trainer.strategy auto "
    "--trainer.logger false --trainer.precision 32-true --trainer.fast_dev_run true "
    "--generation.num_prompts 0 --data.batch_size 2 --data.num_workers 0"
).split()


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


def options(configs: list[str], parts: dict[str, Path], out: Path) -> list[str]:
    """Options of a quick `fit` with these configurations."""
    own = any(c.startswith(("music", "hybrid", "sound", "modern", "attm")) for c in configs)
    if configs[0].startswith("demo_"):
        configs = ["demo.yaml", *configs]
    args = [*(f"--config={CONF / c}" for c in configs), *QUICK]
    if "finetune.yaml" in configs:
        args += ["--model.init_from", str(parts["release"])]
    else:
        args += NARROW
    if own:
        args += ["--model.codec", str(parts["codec"]), "--model.text_encoder", str(parts["t5"])]
        args += ["--data.train", str(parts["shards"]), "--data.validation", str(parts["shards"])]
    return [*args, "--trainer.default_root_dir", str(out)]


def is_another_size(name: str) -> bool:
    """Whether a file differs from a `…small_10s` or `…small_30s` in sizes only."""
    smallest = ("music_small_10s.yaml", "hybrid_small_30s.yaml", "sound_small_10s.yaml")
    return name.startswith(("music", "hybrid", "sound")) and name not in smallest


@pytest.mark.parametrize("name", [n for n in MODELS if not is_another_size(n)])
def test_a_configuration_trains(name, parts, tmp_path, capsys):
    args = options([name], parts, tmp_path / "run")
    assert main(["fit", *args]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "names",
    [[n] for n in MODELS if is_another_size(n)]
    + [["music_small_10s.yaml", f"hardware/{name}"] for name in HARDWARE],
    ids=" ".join,
)
def test_another_size_or_machine_is_built(names, parts, tmp_path):
    errors: list[Exception] = []
    built = build_without_training(options(names, parts, tmp_path / "run"), errors)
    assert errors == [] and built.parsed.model.network.dim == 32


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
