"""Quotations in the documents equal the package's text, and links are valid."""

import ast
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from jsonargparse import capture_parser

from magnet_train.cli import commands
from magnet_train.cli.fit import build_without_training

ROOT = Path(__file__).parents[1]
FIT_VERBS = ("fit", "validate", "test", "predict")
DOCUMENTS = ["CONTRIBUTING.md", "README.md", "EXPERIMENTS.md"]
DOCUMENTS += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))


def sentences() -> list[str]:
    """Every literal text of the package; the parts of an f-string count separately."""
    trees = [ast.parse(path.read_text()) for path in sorted((ROOT / "magnet_train").rglob("*.py"))]
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [node.value for node in nodes if isinstance(node.value, str)]


def quoted_errors() -> list[str]:
    """The first column of docs/troubleshooting.md's tables, except messages of other packages."""
    lines = (ROOT / "docs/troubleshooting.md").read_text().splitlines()
    return [match[1] for line in lines if (match := re.match(r"\| `([^`]+)`", line))]


def test_errors_are_quoted_as_they_are_raised():
    known, quotes = sentences(), quoted_errors()
    assert len(quotes) >= 20
    for quote in quotes:
        for part in filter(None, (part.strip() for part in quote.split("…"))):
            assert any(part in text for text in known), (
                f"{quote!r}: nothing in the package says {part!r}"
            )


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
        assert "://" in link or ((ROOT / name).parent / link).exists(), link


def test_contributing_quotes_the_code_as_it_is():
    folders = (ROOT / "magnet_train", ROOT / "tests")
    code = "\n".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    flat = re.sub(r"\s+", " ", code)
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert len(examples) == 3
    for example in examples:
        assert re.sub(r"\s+", " ", example).strip() in flat, example.splitlines()[0]


def drawing(document: str) -> str:
    """The layout drawing in a document, without its fences."""
    return (ROOT / document).read_text().split("## Layout")[1].split("```")[1]


def test_the_layout_is_drawn_once_and_has_every_file_of_the_package():
    assert drawing("README.md") == drawing("CONTRIBUTING.md")
    for path in (ROOT / "magnet_train").iterdir():
        name = f"{path.name}/" if path.is_dir() else path.name
        if not name.startswith("_") and name != "py.typed":
            assert re.search(rf"(?m)[ ─]{re.escape(name)}( |$)", drawing("README.md")), name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 8_000


def documented_commands() -> Iterator[tuple[str, str, str]]:
    """File, verb and arguments of every command in the documents and the heads of conf/."""
    files = [*DOCUMENTS, "data/demo/README.md", "notebooks/README.md"]
    heads = sorted(path for path in (ROOT / "conf").rglob("*.*") if path.suffix != ".py")
    for path in [*(ROOT / name for name in files), *heads]:
        text = re.sub(r"(?m)^# +", "", path.read_text())
        text = re.sub(r"\\\n\s*", " ", text)  # continued lines
        for verb, rest in re.findall(r"magnet_train (\w+)\b([^`\n]*)", text):
            yield path.name, verb, rest.split(" #")[0]
        for job, rest in re.findall(r"sbatch .*?(\w+)\.sbatch\b([^`\n]*)", text):
            yield path.name, "sweep" if job == "sweep" else "fit", rest


def options_of(verb: str) -> set[str]:
    """Names of the options of a verb, with their dashes."""
    parse = partial(commands.run, verb, [])
    if verb == "doctor":
        parse = partial(build_without_training, [], [])
    actions = capture_parser(parse)._actions
    return {name for action in actions for name in action.option_strings}


def test_documented_commands_have_options_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    options = {verb: options_of(verb) for verb in (*commands.VERBS, *FIT_VERBS)}
    found = [command for command in documented_commands() if command[1] in options]
    assert len(found) > 100
    unknown = []
    for file, verb, rest in found:
        for name in re.findall(r"(?<!\S)--?[A-Za-z][\w.]*", rest):
            full = re.sub(r"^--lora\.", "--model.lora.", name)
            is_override = verb == "sweep" and "." in name
            if full not in options["fit" if is_override else verb]:
                unknown.append(f"{file}: {verb} {name}")
    assert not unknown
