"""Quotations in the documents equal the package's text, and links are valid."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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
