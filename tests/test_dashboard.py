"""The workspace has a panel for each defined name, is created once, and has one-line errors."""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from helpers_wandb import VIEWER, server

from magnet_train.__main__ import main
from magnet_train.tracking.dashboard import OVER_HOURS, DashboardOptions, workspace
from magnet_train.tracking.logged import HOURS, LOGGED, SECTIONS, STEP

COMMAND = ["dashboard", "--entity", "e", "--project", "p"]


@pytest.fixture(autouse=True)
def _session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B in the state of a new process, with a key."""
    before = dict(os.environ)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "10")
    yield
    wandb.teardown()
    os.environ.clear()
    os.environ.update(before)


def panels() -> dict[str, list[dict[str, Any]]]:
    """Panel configurations by section, as sent to W&B."""
    spec = workspace(DashboardOptions("e", "p"))._to_model().spec
    sections = json.loads(spec.model_dump_json(by_alias=True, exclude_none=True))["section"][
        "panelBankConfig"
    ]
    return {s["name"]: [panel["config"] for panel in s["panels"]] for s in sections["sections"]}


def test_every_defined_name_is_drawn_in_its_section_over_steps():
    found = panels()
    for section in SECTIONS:
        entries = [entry for entry in LOGGED if entry.section == section and entry.shown]
        assert len(found[section]) == len(entries)
        for config, entry in zip(found[section], entries, strict=True):
            if entry.name == "gen/clips":
                assert '"val": "gen/clips"' in json.dumps(config)
            elif entry.is_media:
                assert config["mediaKeys"] == [entry.name]
            else:
                assert config["xAxis"] == STEP
                names = config["metrics"] or [config["metricRegex"]]
                key = entry.name.format(k=3, rate=0.5, metric="fad", embedder="passt-10s")
                assert re.fullmatch(names[0], key)
    assert {entry.section for entry in LOGGED} == set(SECTIONS)


def test_figures_are_drawn_over_hours_too():
    over_hours = panels()["over hours of audio"]
    assert len(over_hours) == len(OVER_HOURS)
    assert {config["xAxis"] for config in over_hours} == {HOURS}


def test_the_command_makes_one_workspace_however_often_it_is_called(monkeypatch, capsys):
    views: dict[str, dict[str, Any]] = {}

    def answer(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        query, given = request.get("query", ""), request.get("variables", {})
        if "upsertView" in query:
            view = given.get("id") or f"view{len(views)}"
            views[view] = given
            return 200, {
                "data": {
                    "upsertView": {"view": {"id": view, "name": given["name"]}, "inserted": True}
                }
            }
        if "allViews" in query:
            found = [{"id": i, **v} for i, v in views.items() if v["name"] == given["viewName"]]
            project = {"allViews": {"edges": [{"node": node} for node in found]}}
            return 200, {"data": {"project": project if given["projectName"] == "p" else None}}
        return 200, {"data": {"viewer": VIEWER}}

    with server(answer) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        assert [main(COMMAND), main(COMMAND)] == [0, 0] and list(views) == ["view0"]
        assert capsys.readouterr().out.splitlines() == [f"{url}/e/p?nw=magnettrain"] * 2
        assert main([*COMMAND[:-1], "q"]) == 2
    assert "--entity e --project q: W&B has no such project" in error(capsys)


def error(capsys: Any) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def test_a_refused_key_and_no_network_are_one_line(monkeypatch, capsys):
    with server(lambda request: (401, {"errors": [{"message": "permission denied"}]})) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        assert main(COMMAND) == 2
    assert "permission denied); `wandb login`" in error(capsys)


def test_no_network_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert main(COMMAND) == 2
    assert "dial tcp 127.0.0.1:9: connect: connection refused" in error(capsys)


def test_without_a_key_or_offline_there_is_no_workspace(monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY")
    assert main(COMMAND) == 2
    assert "`wandb login` on a machine with internet access sets a key" in error(capsys)
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(COMMAND) == 2
    assert "unset WANDB_MODE, and run this with internet access" in error(capsys)


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert main(COMMAND) == 2
    assert "pip install -e '.[dashboard]'" in error(capsys)
