"""`summary.json` of a run, and the same as text at the end of `fit`."""

from pathlib import Path
from typing import Any


def summary_text(summary: dict[str, Any], run_folder: Path) -> str:
    """The summary as text; metrics by mask rate and intervals are only in the JSON."""
    lines = ["", f"run folder  {run_folder}", f"checkpoint  {summary['checkpoint']}"]
    for name in ("audio", "plots"):
        paths = [Path(path) for path in summary[name]]
        if paths:
            lines.append(
                f"{name:<11} {len(paths)} files in {paths[0].parent}, e.g. {paths[0].name}"
            )
    lines += ["", f"{'metric':<44}{'before':>10}{'after':>10}"]
    for key, values in summary["metrics"].items():
        if "/rate" not in key and not key.endswith("_ci95"):
            before = "" if values["before"] is None else f"{values['before']:.4g}"
            lines.append(f"{key:<44}{before:>10}{values['after']:>10.4g}")
    seconds = [f"{name} {value:.0f} s" for name, value in summary["seconds"].items()]
    return "\n".join([*lines, "", "  ".join(seconds)])
