"""Measures how much there is to read: sizes, complexity, and what one reads along four journeys.

    python benchmarks/house.py                          # this checkout
    python benchmarks/house.py --root OTHER --json a.json
    python benchmarks/house.py --before a.json          # two columns
    python benchmarks/house.py --static                 # only what is counted in the sources

Complexity is radon's (`pip install radon`). Lines of code leave out blank lines, comments and
docstrings. A branch is an if, elif, loop, except, conditional expression, comprehension or
`and`/`or`. A journey is traced: the functions of the package that a real run calls on the way, each
counted once, and the files that they are in.
"""

import argparse
import ast
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

VERBS = ("fit", "tokenize", "generate", "edit", "evaluate", "convert", "sweep", "doctor", "bench")
BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.BoolOp)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FIT = (
    "fit",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--model.network.dim=32",
    "--model.network.num_layers=1",
    "--model.crop_s=4",
    "--model.optimizer.warmup_steps=1",
    "--data.num_workers=0",
    "--generation.num_prompts=2",
    "--generation.batch_size=2",
    "--generation.num_media=1",
    "--generation.decoding.decoding_steps=[2,1,1,1]",
    "--trainer.default_root_dir=run",
)
GENERATE = ("generate", "--prompt", "a slow waltz", "--duration_s", "1", "--out", "out")
JOURNEYS = {FIT: ("batch to loss", "tar to batch", "audio to W&B"), GENERATE: ("prompt to wav",)}
"""Command that is traced, and the journeys in it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="a checkout")
    parser.add_argument("--json", type=Path, help="where to write the figures too")
    parser.add_argument("--before", type=Path, help="figures of another checkout, for a column")
    parser.add_argument("--static", action="store_true", help="run nothing of the program")
    parser.add_argument("--trace", choices=[c[0] for c in JOURNEYS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trace:
        command = next(c for c in JOURNEYS if c[0] == options.trace)
        print(json.dumps(trace(options.root.resolve(), command)))
        return
    after = measure(options.root.resolve(), options.static)
    if options.json:
        options.json.write_text(json.dumps(after, indent=2) + "\n")
    before = json.loads(options.before.read_text()) if options.before else None
    print("| | before | after |\n|---|---|---|" if before else "| | |\n|---|---|")
    for name, value in after.items():
        middle = f" {before.get(name, '')} |" if before else ""
        print(f"| {name} |{middle} {value} |")


def measure(root: Path, static: bool = False) -> dict[str, str]:
    """Figures by name; `static` leaves out options and journeys, which run the program."""
    package = root / "magnet_train"
    sources = {p: p.read_text() for p in sorted(package.rglob("*.py")) if "_demo" not in p.parts}
    tests = [p.read_text() for p in sorted((root / "tests").rglob("*.py"))]
    trees = [ast.parse(text) for text in sources.values()]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = sorted((n.end_lineno or n.lineno) - n.lineno + 1 for n in functions)
    code = sum(lines_of_code(text) for text in sources.values())
    lines = sum(len(text.splitlines()) for text in sources.values())
    test_lines = sum(len(text.splitlines()) for text in tests)
    comprehensions = sum(isinstance(n, COMPREHENSIONS) for n in nodes)
    branches = sum(isinstance(n, BRANCHES) for n in nodes) + comprehensions
    complexity = [value for text in sources.values() for value in complexities(text)]
    texts = [*sources.values(), *tests]
    figures = {
        "files on the top level": len([p for p in sources if p.parent == package]),
        "lines of the package": lines,
        "lines of the tests": f"{test_lines} ({test_lines / (test_lines + lines):.0%} of both)",
        "functions": len(lengths),
        "lines of a function: median / p90 / max": " / ".join(
            str(round(x))
            for x in (statistics.median(lengths), lengths[len(lengths) * 9 // 10], lengths[-1])
        ),
        "complexity: mean / worst": f"{statistics.mean(complexity):.2f} / {max(complexity)}",
        "branches per 100 lines of code": f"{100 * branches / code:.1f}",
        "comprehensions per 100 lines of code": f"{100 * comprehensions / code:.1f}",
        "lines over 100 columns": sum(len(x) > 100 for t in texts for x in t.splitlines()),
        "layers": layers(root),
        "public names": sum(public_names(tree) for tree in trees),
    }
    for verb in () if static else VERBS:
        figures[f"options of {verb}"] = options_of(root, verb)
    for command in () if static else JOURNEYS:
        for journey, value in traced(root, command[0]).items():
            figures[f"journey {journey}: files / lines"] = value
    return {name: str(value) for name, value in figures.items()}


def lines_of_code(text: str) -> int:
    """Lines that are neither blank nor comments nor docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(x.strip()) and x.strip()[0] != "#" and i not in docstrings for i, x in lines)


def complexities(text: str) -> Iterator[int]:
    from radon.complexity import cc_visit
    from radon.visitors import Function

    for block in cc_visit(text):
        if isinstance(block, Function):
            yield block.complexity


def public_names(tree: ast.Module) -> int:
    """Classes and functions on the top level of a module without an underscore."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return sum(isinstance(n, kinds) and not n.name.startswith("_") for n in tree.body)


def layers(root: Path) -> str:
    """Entries of the list of layers that the tests hold."""
    for name in ("test_layers.py", "test_house.py"):
        file = root / "tests" / name
        for node in ast.parse(file.read_text()).body if file.is_file() else []:
            value = getattr(node, "value", None)
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(value, ast.List):
                return str(len(value.elts))
    return "none"


def environment(root: Path) -> dict[str, str]:
    own = {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    return os.environ | own | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def options_of(root: Path, verb: str) -> str:
    """Options in `VERB --help`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "magnet_train", verb, "--help"]
        done = subprocess.run(
            command, env=environment(root), cwd=folder, capture_output=True, text=True
        )
    if done.returncode:
        return "no such verb"
    return str(len(set(re.findall(r"^ +(?:-\w, )?(--[\w.]+)", done.stdout, re.MULTILINE))))


# --- journeys -------------------------------------------------------------------------------------


def traced(root: Path, verb: str) -> dict[str, str]:
    """Files and lines of the journeys of a command, from a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--root", str(root)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, "--trace", verb],
            env=environment(root),
            cwd=folder,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(f"{verb} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def trace(root: Path, command: tuple[str, ...]) -> dict[str, str]:
    """Runs a command in this process, and counts what it calls on its journeys."""
    sys.path.insert(0, str(root))
    package = str(root / "magnet_train")
    codes: dict[str, set[CodeType]] = {journey: set() for journey in JOURNEYS[command]}

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(package):
            return
        for journey, found in codes.items():
            if code not in found and is_on_the_way(frame, journey, package):
                found.add(code)

    from magnet_train.__main__ import main as run

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        status = run(list(command))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    if status:
        raise SystemExit(f"status {status}")
    return {journey: count(found) for journey, found in codes.items()}


def count(codes: set[CodeType]) -> str:
    """Files and lines of functions; a line counts once."""
    lines: dict[str, set[int]] = {}
    for code in codes:
        numbers = [line for _, _, line in code.co_lines() if line is not None]
        whole = range(code.co_firstlineno, max(numbers, default=code.co_firstlineno) + 1)
        lines.setdefault(code.co_filename, set()).update(whole)
    return f"{len(lines)} / {sum(map(len, lines.values()))}"


def is_on_the_way(frame: FrameType, journey: str, package: str) -> bool:
    """Whether a call belongs to a journey, by the functions of the package that lead to it."""
    stack: list[tuple[str, str]] = []
    here: FrameType | None = frame
    while here is not None:
        code = here.f_code
        if code.co_name == "<module>" and code.co_filename.startswith(package):
            return False  # something that runs at import
        if code.co_filename.startswith(package):
            stack.append((code.co_filename.removeprefix(package + "/"), code.co_name))
        here = here.f_back
    if journey == "batch to loss":
        return any(name == "training_step" for _, name in stack)
    if journey == "tar to batch":
        # Where the loader asks for its next batch, or builds the pipeline.
        at = [i for i, (_, name) in enumerate(stack) if name in ("__iter__", "_timed")]
        rooms = ("data/", "common/")
        return bool(at) and all(file.startswith(rooms) for file, _ in stack[: at[-1] + 1])
    if journey == "audio to W&B":
        hooks = ("on_validation_batch_end", "on_validation_epoch_end", "on_validation_end")
        return any(file.startswith("callbacks/") and name in hooks for file, name in stack)
    return True


if __name__ == "__main__":
    main()
