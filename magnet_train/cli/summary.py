"""Text of a run's `summary.json`, printed at the end of `fit`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magnet_train.tracking.logged import title

BASELINES = ("baseline_unigram", "baseline_copying")
COLUMNS_NOTE = (
    "ceiling = real clips through the codec; baseline = codes drawn by their frequencies, for "
    "accuracy the nearest visible code"
)
LISTEN_FOR = {
    "chroma_change": "notes that change",
    "scale_fit": "notes of one scale",
    "key_rank": "the caption's key",
    "beat": "a beat at the caption's tempo",
}


def what_to_listen_for(metrics: dict[str, Any]) -> list[str]:
    """One line per music measure: "heard", "partly" or "not yet".

    "Heard" means at least three quarters of the distance from codes drawn by their frequencies to
    the codec's reconstructions of real clips, and "partly" at least one quarter.
    """
    lines = []
    for measure, meaning in LISTEN_FOR.items():
        name = f"val/music/{measure}"
        names = (name, f"{name}/baseline_codec", f"{name}/baseline_unigram")
        if any(key not in metrics for key in names):
            continue
        value, real, random = (metrics[key]["after"] for key in names)
        covered = (value - random) / (real - random) if real != random else 0.0
        verdict = "heard" if covered >= 0.75 else "partly" if covered >= 0.25 else "not yet"
        lines.append(
            f"{meaning:<32}{verdict:<8}  {value:.2f} (real clips {real:.2f}, random codes "
            f"{random:.2f})"
        )
    return ["", "what to listen for", *lines] if lines else []


def metric_lines(metrics: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """A table with a row per metric or codebook, and the line that explains its columns.

    Values by mask rate, intervals and the bigram baseline are only in the JSON.

    Args:
        metrics: `before` and `after` by logged name; `before` may be None.
    """
    lines = [f"{'metric':<32}{'before':>10}{'after':>10}{'ceiling':>10}{'baseline':>10}"]
    for name, values in metrics.items():
        if re.search(r"/(rate|baseline_)|_ci95$", name):
            continue
        ceiling = metrics.get(f"{name}/baseline_codec", {}).get("after")
        found = (metrics.get(f"{name}/{baseline}", {}).get("after") for baseline in BASELINES)
        baseline = next((value for value in found if value is not None), None)
        cells = (values["before"], values["after"], ceiling, baseline)
        row = "".join(f"{'' if cell is None else f'{cell:.4g}':>10}" for cell in cells)
        lines.append(f"{title(name):<32}{row}".rstrip())
    return [*lines, COLUMNS_NOTE]


def summary_text(summary: dict[str, Any], run_folder: Path) -> str:
    """The summary as text."""
    lines = ["", f"run folder  {run_folder}", f"checkpoint  {summary['checkpoint']}"]
    for name in ("audio", "plots"):
        paths = [Path(path) for path in summary[name]]
        if paths:
            lines.append(
                f"{name:<11} {len(paths)} files in {paths[0].parent}, e.g. {paths[0].name}"
            )
    lines += ["", *metric_lines(summary["metrics"])]
    seconds = [f"{name} {value:.0f} s" for name, value in summary["seconds"].items()]
    listening = what_to_listen_for(summary["metrics"])
    return "\n".join([*lines, *listening, "", "  ".join(seconds)])


def closing_block(run_folder: Path, locations: Mapping[str, str]) -> str:
    """What to open and to run next: the last lines on the screen.

    Args:
        run_folder: the run's folder.
        locations: address of the run, or the command that shows it, by the tracker's name.
    """
    report = run_folder / "report.html"
    lines = [f"report      open {report}"] if report.exists() else []
    lines += [f"{tracker:<11} {location}" for tracker, location in locations.items()]
    command = f'python -m magnet_train generate --checkpoint {run_folder} -p "a slow waltz"'
    return "\n".join([*lines, f"next        {command}"])
