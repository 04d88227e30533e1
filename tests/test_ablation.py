"""The ablation's table and plot, from synthetic run folders."""

import json
import math
from pathlib import Path

import pytest
import yaml
from helpers_errors import refusal
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy.stats import ttest_rel

from magnet_train.__main__ import main
from magnet_train.sweeps.ablation import (
    Difference,
    Mean,
    _plot_differences,
    holm,
    plot,
    read_ablation,
    write_ablation,
)
from magnet_train.sweeps.sweep import Run, read_sweep

FAD = {1: [30.0, 31.0, 32.0], 3: [10.0, 11.0, 12.0], 5: [12.0, 13.0, 14.0]}


def make(folder: Path, values: dict[int, list[float]], **parameters: object) -> list[Run]:
    """Finished runs of a sweep over span lengths with a seed for each value."""
    seeds = list(range(max(map(len, values.values()))))
    grid = {
        "seed_everything": {"values": seeds},
        "model.span_len": {"values": list(values)},
        **parameters,
    }
    content = {"method": "grid", "parameters": grid, "command": ["magnet_train", "fit", "${args}"]}
    file = folder / "spans.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    runs = read_sweep(file, folder / "spans")
    for run in runs:
        of_seeds = values[run.values["model.span_len"]]
        if run.values["seed_everything"] < len(of_seeds):
            finish(run, **{"val/fad/musicnn": of_seeds[run.values["seed_everything"]]})
    return runs


def finish(run: Run, config: dict | None = None, **after: float) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    after |= {
        "val/ce/stage0": 1.0,
        "val/ce/stage0/rate0.5": 1.0,
        "val/fad/musicnn_ci95": 2.0,
        "val/num_clips": 24.0,
    }
    metrics = {k: {"before": None, "after": v} for k, v in after.items()}
    (run.folder / "summary.json").write_text(json.dumps({"metrics": metrics}))
    own = {"model": {"span_len": run.values["model.span_len"]}, "trainer": {"max_steps": 800}}
    own["trainer"]["default_root_dir"] = str(run.folder)
    (run.folder / "config.yaml").write_text(yaml.safe_dump(own | (config or {})))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_interval_is_students_over_seeds():
    mean = Mean.of([1.0, 2.0, 3.0])
    assert mean.value == 2 and mean.half_width == pytest.approx(4.3026527 / math.sqrt(3), rel=1e-6)
    assert Mean.of([5.0]) == Mean(5.0, None, 1)
    assert Mean.of([2.0, 2.0]).half_width == 0


def test_a_paired_difference_agrees_with_scipy():
    first, second = [1.0, 2.0, 4.0, 7.0], [1.5, 2.75, 4.25, 8.0]
    difference = Difference.of(list(zip(second, first, strict=True)))
    expected = ttest_rel(second, first)
    assert difference.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert difference.value - difference.half_width == pytest.approx(interval.low)
    assert difference.value + difference.half_width == pytest.approx(interval.high)
    assert Difference.of([(2.0, 1.0), (3.0, 2.0)]).p == 0
    assert Difference.of([(2.0, 2.0), (3.0, 3.0)]).p == 1


def test_holms_correction():
    p = {("a",): 0.01, ("b",): 0.04, ("c",): 0.03, ("d",): 0.005}
    corrected = holm({setting: Difference(1.0, 0.5, 1.0, p, 3) for setting, p in p.items()})
    assert [d.p for d in corrected.values()] == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_a_row_for_each_setting_and_the_differences_below(tmp_path):
    table, picture = write_ablation(make(tmp_path, FAD), tmp_path / "spans")
    lines = table.read_text().splitlines()
    rows = [cells(line) for line in lines if line.startswith("|")]
    assert rows[0] == ["span_len", "seeds", "FAD (musicnn) ↓"]
    assert rows[2:5] == [["1", "3", "31 ± 2.5"], ["3", "3", "11 ± 2.5"], ["5", "3", "13 ± 2.5"]]
    assert rows[5] == ["setting", "metric", "difference", "d", "p", "seeds"]
    assert rows[7] == ["span_len=3", "FAD (musicnn) ↓", "-20 [-20, -20]", "-inf", "0", "3"]
    assert rows[9] == ["run", "FAD (musicnn) ↓"]  # each run
    singles = sorted(float(value) for _, value in rows[11:])
    assert len(singles) == 9
    assert singles == sorted(value for values in FAD.values() for value in values)
    assert (
        "- FAD (musicnn) ↓: lower (better) than with span_len=1: span_len=3 (-20 [-20, -20]); "
        "span_len=5 (-18 [-18, -18])."
    ) in lines
    pixels = imread(picture)
    assert pixels.shape[0] > 200 and pixels[..., :3].std() > 0.01


def test_settings_with_names_are_plotted_as_differences_in_rows(tmp_path):
    runs = [
        Run(
            f"{name},{seed}",
            tmp_path / f"{name},{seed}",
            {"change": name, "seed_everything": seed},
            [],
        )
        for name in ("recipe", "a change with a long name")
        for seed in range(3)
    ]
    for run in runs:
        run.folder.mkdir()
        metrics = {"val/ce": {"after": 5.0 + 0.1 * run.values["seed_everything"] + len(run.name)}}
        (run.folder / "summary.json").write_text(json.dumps({"metrics": metrics}))
        (run.folder / "config.yaml").write_text("{}")
    axis = Figure().subplots()
    _plot_differences(read_ablation(runs), "val/ce", axis)
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "recipe",
        "a change with a long name",
    ]
    points = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o"]
    assert sorted(points) == pytest.approx([0, len("a change with a long name") - len("recipe")])
    plot(read_ablation(runs), tmp_path / "plot.png")
    height, width = imread(tmp_path / "plot.png").shape[:2]
    assert width > 2 * height


def test_differences_from_the_first_setting_are_put_into_words(tmp_path):
    def said(name: str, values: dict[int, list[float]]) -> str:
        (tmp_path / name).mkdir()
        return read_ablation(make(tmp_path / name, values)).verdict("val/fad/musicnn")

    # The means' intervals overlap widely, and each seed differs by nearly the same amount.
    assert "higher (worse) than with span_len=1: span_len=3" in said(
        "paired", {1: [1.0, 5.0, 9.0], 3: [2.0, 6.1, 10.05]}
    )
    assert "no difference shown from span_len=1: span_len=3." in said(
        "none", {1: [1.0, 2.0, 3.0], 3: [2.5, 1.5, 3.2]}
    )
    assert "only one setting, nothing to compare" in said("alone", {1: [1.0, 2.0, 3.0]})
    assert "no interval with a single seed" in said("one seed", {1: [1.0], 3: [9.0]})


def test_a_second_parameter_has_its_own_column_and_rows(tmp_path):
    runs = make(tmp_path, FAD, **{"model.network.context": {"values": [5, -1]}})
    ablation = read_ablation(runs)
    assert ablation.parameters == ["span_len", "context"]
    assert list(ablation.num_seeds) == [(1, 5), (1, -1), (3, 5), (3, -1), (5, 5), (5, -1)]
    assert "span_len=1, context=-1" in ablation.verdict("val/fad/musicnn")
    write_ablation(runs, tmp_path / "spans")


def test_a_missing_run_is_named_and_its_setting_counts_fewer_seeds(tmp_path):
    ablation = read_ablation(make(tmp_path, FAD | {5: [12.0, 13.0]}))
    assert ablation.num_seeds == {(1,): 3, (3,): 3, (5,): 2}
    assert ablation.notes == ["**1 of 9 runs are not finished**: seed_everything=2,span_len=5."]
    assert str(ablation.means["val/fad/musicnn"][5,]) == "12.5 ± 6.4"


def test_a_metric_that_some_runs_lack_is_named(tmp_path):
    runs = make(tmp_path, FAD)
    finish(runs[0], **{"val/fad/musicnn": 30.0, "val/kl/musicnn": 1.0})
    ablation = read_ablation(runs)
    assert ablation.notes == ["KL (musicnn) ↓: missing in runs of 3 of 3 settings."]
    lines = ablation.markdown("x").splitlines()
    assert [cells(line)[1:] for line in lines if line.startswith("| 1 ")] == [
        ["3", "31 ± 2.5", "1"]
    ]
    assert [cells(line)[1:] for line in lines if line.startswith("| 3 ")] == [["3", "11 ± 2.5", ""]]


def test_settings_that_differ_besides_the_varied_ones_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(Path("."), FAD)
    runs = read_sweep(Path("spans.yaml"), Path("spans"))
    resumed = {"ckpt_path": str(runs[1].folder / "checkpoints" / "last.ckpt")}
    finish(runs[1], resumed, **{"val/fad/musicnn": 10.0})
    csv = {"trainer": {"max_steps": 800, "default_root_dir": str(runs[2].folder.absolute())}}
    finish(runs[2], csv, **{"val/fad/musicnn": 12.0})
    # Varied values, the run's folder and resuming are excluded.
    assert read_ablation(runs).notes == []
    finish(runs[4], {"trainer": {"max_steps": 400}}, **{"val/fad/musicnn": 11.0})
    assert any(
        "Runs also differ in trainer.max_steps** (800, 400)" in n for n in read_ablation(runs).notes
    )
    (runs[4].folder / "config.yaml").unlink()
    assert any("No config.yaml" in n and runs[4].name in n for n in read_ablation(runs).notes)


def test_what_is_no_result_stops_the_table(tmp_path, capsys):
    runs = make(tmp_path, FAD)
    finish(runs[0], **{"val/fad/musicnn": float("nan")})
    assert "summary.json: val/fad/musicnn is nan" in refusal(read_ablation, runs)
    (runs[0].folder / "summary.json").write_text("{")
    assert "summary.json: damaged" in refusal(read_ablation, runs)
    (runs[0].folder / "summary.json").write_text('{"metrics": {}}')
    assert "has no metrics" in refusal(read_ablation, runs)
    assert (
        main(["sweep", str(tmp_path / "spans.yaml"), "--out", str(tmp_path / "other"), "--table"])
        == 2
    )
    assert "no run is finished" in capsys.readouterr().err


def test_the_verb_draws_the_table_again_and_runs_nothing(tmp_path, capsys):
    make(tmp_path, FAD | {5: [12.0]})
    assert (
        main(["sweep", str(tmp_path / "spans.yaml"), "--out", str(tmp_path / "spans"), "--table"])
        == 0
    )
    assert str(tmp_path / "spans" / "table.md") in capsys.readouterr().out
    assert "2 of 9 runs are not finished" in (tmp_path / "spans" / "table.md").read_text()
