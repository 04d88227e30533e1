"""Modules import only from the layers below them in CONTRIBUTING.md's drawing."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "magnet_train"
LAYERS = [
    {"__main__"},
    {"cli"},
    {"app"},
    {"cli.generate", "cli.edit", "cli.output", "checks"},
    {"callbacks"},
    {"module", "evaluation"},
    {"sweeps"},
    {"tracking", "data"},
    {"metrics"},
    {"generator", "audiocraft", "decoding.load_rescorer", "resume"},
    {"release", "adapters", "sharding"},
    {"decoding", "dense", "checks.cost"},
    {"model", "conditioning", "codec"},
    {"layout"},
    {"attention", "masking", "loss", "optimizer", "common"},
]
"""From the top down: a file imports from its own layer and from those below."""
LIGHTNING = {
    "cli",
    "module",
    "data.datamodule",
    "callbacks",
    "evaluation",
    "tracking.wandb_session",
}
LIGHTNING |= {"common.private_api"}
WANDB = {"tracking", "callbacks", "common.private_api"}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, including imports in functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def modules() -> dict[str, Path]:
    paths = (p for p in PACKAGE.rglob("*.py") if "_demo" not in p.parts)
    named = {p.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): p for p in paths}
    return {name: path for name, path in named.items() if name != "__init__"}


def test_imports_point_down():
    layers = {name: i for i, names in enumerate(LAYERS) for name in names}

    def layer(module: str) -> int:
        """Of a file that has an entry, or of its folder."""
        folder, *rest = module.split(".")
        file = f"{folder}.{rest[0]}" if rest else folder
        return layers[file] if file in layers else layers.get(folder, 99)

    wrong = []
    for name, path in modules().items():
        own = {other for other in imports(path) if other.startswith("magnet_train.")}
        above = [o for o in own if layer(o.removeprefix("magnet_train.")) < layer(name)]
        wrong += [f"{name} imports {other}" for other in above]
    assert not wrong


def test_lightning_and_wandb_stay_in_their_folders():
    wrong = []
    for name, path in modules().items():
        used = {module.split(".")[0] for module in imports(path)}
        places = {name, name.split(".")[0]}
        if "lightning" in used and not places & LIGHTNING:
            wrong.append(f"{name} imports lightning")
        if used & {"wandb", "wandb_workspaces"} and not places & WANDB:
            wrong.append(f"{name} imports wandb")
        if used & {"audiocraft", "xformers", "pytorch_lightning"}:
            wrong.append(f"{name} imports a package that the project does not use")
    assert not wrong
