"""The house rules of the package, held by reading its import lines, and its configurations, by parsing them."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "magnet_train"
# From the top down: a file imports only from lines below its own, or from its own line.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"training"},
    {"doctor", "dashboard"},
    {"ablation"},
    {"sweep"},
    {"bench"},
    {"bench_data"},
    {"callbacks.averaging", "callbacks.checkpoint_io", "callbacks.finite", "callbacks.generation",
     "callbacks.preemption", "callbacks.resume", "callbacks.throughput", "callbacks.tracking", "callbacks.watchdog"},
    {"module", "data.datamodule"},
    {"evaluate"},
    {"generator", "convert", "resume"},
    {"options"},
    {"release", "report", "listening"},
    {"logged"},
    {"metrics.scoring"},
    {"metrics.listeners"},
    {"data.shards", "data.pipeline", "data.timed_loader", "metrics.text_audio", "page"},
    {"metrics.vggish", "metrics.passt", "metrics.clap"},
    {"estimate"},
    {"twin", "measure", "reuse", "sharding", "data.places"},
    {"model", "decoding", "conditioning", "metrics.embedders", "metrics.fixed_masks", "data.audio"},
    {"codec", "weights"},
    {"attention", "masking", "loss", "schedule", "audio_files", "metrics.fad", "metrics.kl", "metrics.chroma",
     "metrics.frontend", "metrics.clap_score", "metrics.embedding_sets", "metrics.intervals", "metrics.record",
     "metrics.reference_statistics", "spectral_codec", "pretrained", "reference_compat"},
    {"assets", "folders", "compat", "environment", "metrics.items", "metrics.published", "codec_weights",
     "data.captions"},
    {"errors"},
]  # fmt: skip


def modules() -> dict[str, Path]:
    return {
        str(p.relative_to(PACKAGE).with_suffix("")).replace("/", "."): p
        for p in PACKAGE.rglob("*.py")
        if p.name != "__init__.py" and "_demo" not in p.parts
    }


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_module_has_its_floor():
    assert set(modules()) == set().union(*FLOORS)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down(name):
    floor = {module: i for i, names in enumerate(FLOORS) for module in names}
    for other in imports(modules()[name]):
        other = other.removeprefix("magnet_train.")
        if other in floor and other != name:
            assert floor[other] >= floor[name], f"{name} imports {other}, which stands above it"


@pytest.mark.parametrize("name", sorted(modules()))
def test_lightning_and_wandb_stay_in_their_rooms(name):
    used = {module.split(".")[0] for module in imports(modules()[name])}
    if "lightning" in used:
        assert name in ("training", "module", "data.datamodule", "evaluate") or name.startswith("callbacks.")
    if used & {"wandb", "wandb_workspaces"}:
        assert name.startswith("callbacks.") or name == "dashboard"
    assert not used & {"audiocraft", "xformers", "pytorch_lightning"}
