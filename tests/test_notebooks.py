"""The notebooks run from top to bottom with the bundled files, and their stored outputs are small.

python tests/test_notebooks.py     # runs them and stores their outputs
 Cells run as in Jupyter, which need not be installed: one namespace, the last expression shown,
open figures closed after each cell.
"""

import ast
import base64
import io
import json
import os
import re
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import magnet_train

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
MOST_PNG_BYTES = 60_000
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def read(name: str) -> dict[str, Any]:
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))


def run(notebook: dict[str, Any]) -> None:
    """Run all code cells in order, in the folder of notebooks, and store their outputs."""
    import matplotlib

    matplotlib.use("Agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        try:
            cell["outputs"] = outputs_of("".join(cell["source"]), namespace, number)
        except Exception as error:
            error.add_note(f"in code cell {number}: {cell['source'][0].strip()}")
            raise
        cell["execution_count"] = number


def outputs_of(source: str, namespace: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """A cell's printed text, the value of its last expression unless it ends with a semicolon, and
    its figures.
    """
    import matplotlib.pyplot as plt

    source = "\n".join("" if line.startswith(("%", "!")) else line for line in source.splitlines())
    body = ast.parse(source).body
    is_shown = bool(body) and isinstance(body[-1], ast.Expr) and not source.rstrip().endswith(";")
    last = ast.Expression(body.pop().value) if is_shown else None  # type: ignore[attr-defined]
    outputs: list[dict[str, Any]] = []
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(ast.Module(body, []), f"cell {number}", "exec"), namespace)
        value = None if last is None else eval(compile(last, f"cell {number}", "eval"), namespace)
    if printed.getvalue():
        outputs.append(
            {"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(True)}
        )
    if value is not None:
        data: dict[str, Any] = {"text/plain": repr(value).splitlines(True)}
        if hasattr(value, "_repr_html_"):
            # Audio players and scripts only work in a running notebook, so they are not stored.
            assert value._repr_html_()
        if hasattr(value, "_repr_png_"):
            data["image/png"] = base64.b64encode(value._repr_png_()).decode()
        outputs.append(
            {
                "output_type": "execute_result",
                "execution_count": number,
                "metadata": {},
                "data": data,
            }
        )
    for figure in map(plt.figure, plt.get_fignums()):
        data = {"text/plain": ["<Figure>"], **picture_of(figure)}
        outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
    plt.close("all")
    return outputs


def picture_of(figure: Any) -> dict[str, str]:
    """PNG for lines; JPEG for spectrograms, which would be ten times larger as PNG."""
    for form, settings in (("png", {}), ("jpeg", {"pil_kwargs": {"quality": 75}})):
        file = io.BytesIO()
        figure.savefig(file, format=form, bbox_inches="tight", **settings)
        if file.tell() < MOST_PNG_BYTES:
            break
    return {f"image/{form}": base64.b64encode(file.getvalue()).decode()}


def renew(names: list[str]) -> None:
    os.chdir(NOTEBOOKS)
    sys.path.insert(0, str(NOTEBOOKS))
    for name in names:
        notebook = read(name)
        run(notebook)
        (NOTEBOOKS / f"{name}.ipynb").write_text(
            json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_top_to_bottom(name, monkeypatch, tmp_path):
    import matplotlib

    monkeypatch.chdir(NOTEBOOKS)
    monkeypatch.syspath_prepend(NOTEBOOKS)
    import show

    class ShortMovie(show.Movie):
        def __init__(self, figure, draw, num_frames, fps):
            super().__init__(figure, draw, min(num_frames, 3), fps)

    monkeypatch.setattr(show, "Movie", ShortMovie)
    monkeypatch.setattr(show, "AUDIO", tmp_path)
    load = magnet_train.load

    def load_quick(path: str) -> Any:
        model = load(path)
        model.decoding = replace(model.decoding, decoding_steps=(2, 1))
        return model

    monkeypatch.setattr(magnet_train, "load", load_quick)
    notebook = read(name)
    for cell in notebook["cells"]:  # a minute of training would take too long
        cell["source"] = [re.sub("^STEPS = .*", "STEPS = 12", line) for line in cell["source"]]
    with matplotlib.rc_context({"figure.dpi": 40, "savefig.dpi": 40}):  # quicker to draw
        run(notebook)
    shown = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert (
        sum(any(kind.startswith("image/") for kind in output.get("data", {})) for output in shown)
        >= 2
    )


def test_a_cell_that_raises_is_named_and_magics_are_skipped():
    good = {
        "cell_type": "code",
        "source": ["%matplotlib inline\n", "x = 2\n", "print(x)\n", "x + 1"],
    }
    bad = {"cell_type": "code", "source": ["x / 0"]}
    with pytest.raises(ZeroDivisionError) as failure:
        run({"cells": [{"cell_type": "markdown", "source": []}, good, bad]})
    assert failure.value.__notes__ == ["in code cell 2: x / 0"]
    printed, shown = good["outputs"]
    assert (printed["text"], shown["data"]) == (["2\n"], {"text/plain": ["3"]})


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_notebook_is_small_and_names_no_machine(name):
    path = NOTEBOOKS / f"{name}.ipynb"
    assert path.stat().st_size < 300_000
    audio = (NOTEBOOKS / "audio").glob(f"{name}-*")
    assert sum(file.stat().st_size for file in audio) < 200_000
    notebook = read(name)
    for cell in notebook["cells"]:
        assert len(cell["source"]) <= 25 or cell["cell_type"] == "markdown", cell["source"][0]
        words = "".join(cell["source"]) + "".join(
            "".join(output.get("text", [])) + "".join(output.get("data", {}).get("text/plain", []))
            for output in cell.get("outputs", [])
        )
        assert not re.search(r"/(home|tmp|root|work|Users)/", words)
    numbers = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert numbers == list(range(1, len(numbers) + 1)), "run `python tests/test_notebooks.py`"


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_notebook_lead_somewhere(name):
    text = "".join(
        "".join(c["source"]) for c in read(name)["cells"] if c["cell_type"] == "markdown"
    )
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in link:
            assert (NOTEBOOKS / link).exists(), link


if __name__ == "__main__":
    renew(sys.argv[1:] or NAMES)
