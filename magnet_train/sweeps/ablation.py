"""The table and the plot of an ablation, from the run folders of a sweep: means over seeds with 95 % intervals.

A setting is what the sweep varies besides the seed. Its interval is Student's t over the seeds' last values: how far
the mean would move with other seeds on the same validation clips. With three seeds it reaches 2.5 deviations each way.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from magnet_train.common.errors import UserError
from magnet_train.sweeps.sweep import Run, short_names

SEEDS = ("seed_everything", "seed")  # last parts of the names of parameters that are seeds
LEFT_OUT = re.compile(r"/stage\d|/rate|/floor_|_ci95$|/num_clips$")  # of the table's columns
ITS_OWN = (
    "config",
    "ckpt_path",
    "model.init_from",
)  # settings in which a resumed run differs from an undisturbed one
Setting = tuple[Any, ...]
"""A value for each parameter that is no seed."""


@dataclass(frozen=True)
class Mean:
    """Of one metric over the seeds of one setting."""

    value: float
    half: float | None
    """Half the width of the 95 % interval; None with one seed."""
    num_seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """From a value for each seed.

        >>> mean = Mean.of([1.0, 2.0, 3.0])
        >>> mean.value, round(mean.half, 3)
        (2.0, 2.484)
        """
        from scipy.stats import t

        n, mean = len(values), math.fsum(values) / len(values)
        if n == 1:
            return cls(mean, None, 1)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
        return cls(mean, float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n), n)

    def overlaps(self, other: "Mean") -> bool:
        """Whether the two intervals have a value in common; one of a single seed is a point."""
        return abs(self.value - other.value) <= (self.half or 0.0) + (other.half or 0.0)

    def __str__(self) -> str:
        return f"{self.value:.4g}" + ("" if self.half is None else f" ± {self.half:.2g}")


@dataclass(frozen=True)
class Ablation:
    """What the finished runs of a sweep say."""

    parameters: list[str]
    """Names of what varies besides the seed, short."""
    means: dict[str, dict[Setting, Mean]]
    """Metric to setting to mean, both in order; a metric that a setting does not have is left out there."""
    num_seeds: dict[Setting, int]
    """Finished runs of each setting."""
    notes: list[str]
    """What a reader must know before comparing."""
    figures: dict[str, dict[str, float]]
    """Finished run to metric to its last value."""

    def label(self, setting: Setting) -> str:
        return ", ".join(f"{p}={v}" for p, v in zip(self.parameters, setting, strict=True)) or "all"

    def markdown(self, title: str) -> str:
        """A row for each setting, a column for each metric; below, which intervals overlap, and each run's figures."""
        rows = []
        for setting, count in self.num_seeds.items():
            cells = [str(self.means[m].get(setting, "")) for m in self.means]
            rows.append([*map(str, setting), str(count), *cells])
        runs = [
            [name, *(f"{values[m]:.4g}" if m in values else "" for m in self.means)]
            for name, values in self.figures.items()
        ]
        lines = [
            f"# {title}", "",
            "Last validation of each run: mean over seeds ± half of its 95 % interval (Student's t over seeds).", "",
            *_table([*self.parameters, "seeds", *self.means], rows), "",
            *(f"- {sentence}" for sentence in [*self.notes, *map(self.overlaps, self.means)]), "",
            *_table(["run", *self.means], runs), "",
        ]  # fmt: skip
        return "\n".join(lines)

    def overlaps(self, metric: str) -> str:
        """One sentence: which settings this metric does not tell apart."""
        pairs = list(itertools.combinations(self.means[metric].items(), 2))
        if not pairs:
            return f"`{metric}`: one setting, nothing to compare."
        if any(mean.half is None for mean in self.means[metric].values()):
            return f"`{metric}`: a setting with one seed has no interval, so nothing is told apart; run more seeds."
        alike = [f"{self.label(a)} and {self.label(b)}" for (a, x), (b, y) in pairs if x.overlaps(y)]
        if not alike:
            return f"`{metric}`: no two intervals overlap."
        if len(alike) == len(pairs):
            return f"`{metric}`: all intervals overlap; no setting is told apart from another."
        return f"`{metric}`: intervals overlap, and do not tell apart, for {'; '.join(alike)}."


def read_ablation(runs: Sequence[Run]) -> Ablation:
    """Means over the finished runs of a sweep.

    Raises:
        UserError: if no run is finished, or a summary is damaged or holds no figures.
    """
    finished = [run for run in runs if run.is_finished]
    if not finished:
        raise UserError(f"{runs[0].folder.parent}: no run is finished, so there is no table; run the sweep first")
    names = short_names(list(runs[0].values))
    varied = [p for p in names if p.rsplit(".", 1)[-1] not in SEEDS]
    values: dict[str, dict[Setting, list[float]]] = {}
    counts: dict[Setting, int] = {}
    figures = {run.name: _figures(run) for run in finished}
    for run in finished:
        setting = tuple(_plain(run.values[p]) for p in varied)
        counts[setting] = counts.get(setting, 0) + 1
        for metric, value in figures[run.name].items():
            values.setdefault(metric, {}).setdefault(setting, []).append(value)
    notes = []
    if missing := [run.name for run in runs if not run.is_finished]:
        notes.append(f"**{len(missing)} of {len(runs)} runs are not finished**: {', '.join(missing)}.")
    notes += _differences(finished)
    means = {m: {s: Mean.of(v) for s, v in by_setting.items()} for m, by_setting in values.items()}
    for metric, by_setting in means.items():
        fewer = [s for s in counts if by_setting.get(s, Mean(0, None, 0)).num_seeds < counts[s]]
        if fewer:
            notes.append(f"`{metric}`: not every run of {len(fewer)} of {len(counts)} settings has it.")
    return Ablation([names[p] for p in varied], means, counts, notes, figures)


def write_ablation(runs: Sequence[Run], out: Path) -> tuple[Path, Path]:
    """`table.md` and `plot.png` in `out`, drawn again from the run folders.

    Raises:
        UserError: as `read_ablation`.
    """
    ablation = read_ablation(runs)
    table, picture = out / "table.md", out / "plot.png"
    table.write_text(ablation.markdown(out.name))
    plot(ablation, picture)
    return table, picture


def plot(ablation: Ablation, path: Path) -> None:
    """A panel for each metric: means with intervals over the first parameter, a line for each setting of the others."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = math.ceil(math.sqrt(len(ablation.means)))
    rows = math.ceil(len(ablation.means) / columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(ablation.means) :]:
        axis.set_visible(False)
    numbers = all(isinstance(value, (int, float)) for setting in ablation.num_seeds for value in setting[:1])
    ticks = list(dict.fromkeys(str(setting[0]) if setting else "all" for setting in ablation.num_seeds))
    for axis, (metric, means) in zip(axes, ablation.means.items(), strict=False):
        lines: dict[Setting, list[tuple[int, Mean]]] = {}
        for setting, mean in means.items():
            place = ticks.index(str(setting[0]) if setting else "all")
            lines.setdefault(setting[1:], []).append((place, mean))
        for i, (rest, points) in enumerate(lines.items()):
            shift = 0.08 * (i - (len(lines) - 1) / 2)  # or intervals would hide each other
            axis.errorbar(
                [place + shift for place, _ in points], [mean.value for _, mean in points],
                yerr=[mean.half or 0.0 for _, mean in points], fmt="o-" if numbers else "o", capsize=3,
                label=", ".join(f"{p}={v}" for p, v in zip(ablation.parameters[1:], rest, strict=True)),
            )  # fmt: skip
        axis.set_xticks(range(len(ticks)), ticks, fontsize=8, rotation=0 if max(map(len, ticks)) < 8 else 20)
        axis.set_title(metric, fontsize=9)
        axis.set_xlabel(ablation.parameters[0] if ablation.parameters else "", fontsize=8)
        if len(lines) > 1:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]


def _plain(value: Any) -> Any:
    """A list as text, so that a setting can be a key."""
    return value if isinstance(value, (str, int, float, bool)) else str(value)


def _figures(run: Run) -> dict[str, float]:
    """Metric to value of the last validation, those of single stages and mask rates left out."""
    file = run.folder / "summary.json"
    try:
        metrics = {k: float(v["after"]) for k, v in json.loads(file.read_text())["metrics"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({type(error).__name__}); remove it and run the sweep again") from error
    if bad := [k for k, v in metrics.items() if not math.isfinite(v)]:
        raise UserError(f"{file}: {bad[0]} is {metrics[bad[0]]}; look at the run, remove it and run the sweep again")
    if not metrics:
        raise UserError(f"{file}: holds no metrics; remove the folder and run the sweep again")
    return {k: v for k, v in metrics.items() if not LEFT_OUT.search(k)}


def _differences(runs: Sequence[Run]) -> list[str]:
    """A sentence for each setting in which runs differ although the sweep does not vary it.

    So that a base configuration changed halfway through is not read as an effect.
    """
    settings: list[dict[str, str]] = []
    without = []
    for run in runs:
        files = [run.folder / "config.yaml", *run.folder.glob("*/version_*/config.yaml")]
        files = sorted((f for f in files if f.is_file()), key=lambda f: f.stat().st_mtime)
        if not files:
            without.append(run.name)
            continue
        try:
            flat = _flat(yaml.safe_load(files[-1].read_text()) or {})
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
            raise UserError(f"{files[-1]}: unreadable; remove the folder and run the sweep again") from error
        own = (str(run.folder.absolute()), str(run.folder))
        settings.append({k: str(v).replace(own[0], "RUN").replace(own[1], "RUN") for k, v in flat})
    notes = []
    for name in dict.fromkeys(itertools.chain(*settings)):
        values = dict.fromkeys(each.get(name, "not given") for each in settings)
        if len(values) > 1 and name not in (*runs[0].values, *ITS_OWN):
            notes.append(f"**Runs differ in {name} too** ({', '.join(values)}), which the sweep does not vary.")
    if without:
        notes.append(f"No config.yaml, so nobody can tell whether other settings were alike: {', '.join(without)}.")
    return notes


def _flat(config: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in config.items():
        pairs += _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else [(f"{above}{key}", value)]
    return pairs
