"""Table and plot of an ablation from the run folders of a sweep: means over seeds with intervals.

A setting is a combination of parameter values other than the seed. Its 95 % interval (Student's t
over the last values of its seeds) covers other seeds on the same validation clips.

Conclusions are about differences from the first setting, paired by seed: runs with the same seed
share their data order, so the interval of a difference is often much narrower than those of the two
means. Holm's correction is over the settings of a metric.
"""

import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from magnet_train.common.errors import UserError
from magnet_train.common.json_files import read_json
from magnet_train.common.redact import redact
from magnet_train.common.tables import markdown_table
from magnet_train.common.yaml_files import flatten, read_yaml
from magnet_train.sweeps.sweep import Run, short_names
from magnet_train.tracking.logged import find, title

SEEDS = ("seed_everything", "seed")
"""Last parts of the names of seed parameters."""
SKIPPED_METRICS = re.compile(r"/stage\d|/rate|/baseline_|_ci95$|/num_clips$")
RESUME_ONLY_SETTINGS = ("config", "ckpt_path", "model.init_from")
"""Settings that differ between resumed and uninterrupted runs."""
Setting = tuple[Any, ...]
"""A value for each parameter that is not a seed."""
BySetting = dict[Setting, dict[tuple[Any, ...], float]]
"""Values of one metric by setting and seed."""


@dataclass(frozen=True)
class Mean:
    """Mean of one metric over the seeds of one setting."""

    value: float
    half_width: float | None
    """Half width of the 95 % interval; None with one seed."""
    num_seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """From one value per seed.

        >>> mean = Mean.of([1.0, 2.0, 3.0])
        >>> mean.value, round(mean.half_width, 3)
        (2.0, 2.484)
        """
        from scipy.stats import t

        n = len(values)
        mean = statistics.fmean(values)
        if n == 1:
            return cls(mean, None, 1)
        error = statistics.stdev(values) / math.sqrt(n)
        return cls(mean, float(t.ppf(0.975, n - 1)) * error, n)

    def __str__(self) -> str:
        if self.half_width is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} ± {self.half_width:.2g}"


@dataclass(frozen=True)
class Difference:
    """Difference of one metric between a setting and the first one, paired by seed."""

    value: float
    half_width: float
    """Half width of the 95 % interval."""
    effect: float
    """Difference over its standard deviation between seeds (Cohen's d of paired values)."""
    p: float
    """Probability of so large a difference if there is none (two-sided paired t-test); after
    Holm's correction where it is reported."""
    num_seeds: int

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> "Difference":
        """From (value of the setting, value of the first setting) per seed, at least two.

        >>> difference = Difference.of([(2.0, 1.0), (4.0, 2.0), (6.0, 3.0)])
        >>> difference.value, round(difference.p, 3)
        (2.0, 0.074)
        """
        from scipy.stats import t

        n = len(pairs)
        each = [a - b for a, b in pairs]
        mean = statistics.fmean(each)
        deviation = statistics.stdev(each)
        error = deviation / math.sqrt(n)
        if error == 0:  # all differences are equal
            effect = math.copysign(math.inf, mean) if mean else 0.0
            return cls(mean, 0.0, effect, float(not mean), n)
        half_width = float(t.ppf(0.975, n - 1)) * error
        return cls(mean, half_width, mean / deviation, 2 * float(t.sf(abs(mean) / error, n - 1)), n)

    @property
    def direction(self) -> Literal["lower", "higher", ""]:
        """Empty if no difference is shown (p of 0.05 or more)."""
        if self.p >= 0.05:
            return ""
        return "lower" if self.value < 0 else "higher"

    def __str__(self) -> str:
        low, high = self.value - self.half_width, self.value + self.half_width
        return f"{self.value:+.3g} [{low:+.3g}, {high:+.3g}]"


def holm(differences: dict["Setting", Difference]) -> dict["Setting", Difference]:
    """Holm's correction: the smallest of m p-values times m, the next times m - 1, and so on."""
    corrected, largest = {}, 0.0
    by_p = sorted(differences.items(), key=lambda item: item[1].p)
    for rank, (setting, difference) in enumerate(by_p):
        largest = max(largest, min(1.0, difference.p * (len(by_p) - rank)))
        corrected[setting] = replace(difference, p=largest)
    return {setting: corrected[setting] for setting in differences}


@dataclass(frozen=True)
class Ablation:
    """Results of the finished runs of a sweep."""

    parameters: list[str]
    """Short names of the parameters other than the seed."""
    means: dict[str, dict[Setting, Mean]]
    """Means by metric and setting; settings without the metric are absent."""
    differences: dict[str, dict[Setting, Difference]]
    """By metric: differences from the first setting, for settings with two seeds in common."""
    num_seeds: dict[Setting, int]
    """Finished runs of each setting."""
    notes: list[str]
    """Warnings about the comparison."""
    values: dict[str, dict[str, float]]
    """Last values by finished run and metric."""

    def label(self, setting: Setting) -> str:
        pairs = zip(self.parameters, setting, strict=True)
        return ", ".join(f"{name}={value}" for name, value in pairs) or "all"

    def markdown(self, heading: str) -> str:
        """Tables of settings and differences, a conclusion per metric, and a table of all runs."""
        metrics = [title(metric) for metric in self.means]
        rows = []
        for setting, count in self.num_seeds.items():
            cells = [str(by_setting.get(setting, "")) for by_setting in self.means.values()]
            rows.append([*map(str, setting), str(count), *cells])
        runs = []
        for name, values in self.values.items():
            cells = [f"{values[m]:.4g}" if m in values else "" for m in self.means]
            runs.append([name, *cells])
        num_left = len(self.parameters)
        settings_table = markdown_table([*self.parameters, "seeds", *metrics], rows, num_left)
        runs_table = markdown_table(["run", *metrics], runs)
        sentences = "\n".join(f"- {s}" for s in [*self.notes, *map(self.verdict, self.means)])
        return (
            f"# {heading}\n\n"
            "Last validation of each run: mean over seeds ± half the width of its 95 % interval "
            "(Student's t over seeds).\n\n"
            f"{settings_table}\n\n{sentences}\n\n{self._differences_table()}{runs_table}\n"
        )

    def _differences_table(self) -> str:
        rows = [
            [
                self.label(setting),
                title(metric),
                str(d),
                f"{d.effect:.2g}",
                f"{d.p:.2g}",
                str(d.num_seeds),
            ]
            for metric, by_setting in self.differences.items()
            for setting, d in by_setting.items()
        ]
        if not rows:
            return ""
        heads = ["setting", "metric", "difference", "d", "p", "seeds"]
        return (
            f"Differences from {self.label(next(iter(self.num_seeds)))} with the same seed: mean, "
            "95 % interval, mean over standard deviation, and p (paired t-test, Holm's "
            f"correction).\n\n{markdown_table(heads, rows, 2)}\n\n"
        )

    def verdict(self, metric: str) -> str:
        """One sentence: the settings that differ from the first one in this metric."""
        name = title(metric)
        if len(self.means[metric]) < 2:
            return f"{name}: only one setting, nothing to compare."
        differences = self.differences.get(metric, {})
        if not differences:
            return f"{name}: no interval with a single seed; run more seeds to compare settings."
        first = self.label(next(iter(self.num_seeds)))
        better = entry.better if (entry := find(metric)) else ""

        def than(direction: str) -> str:
            meaning = "" if not better else " (better)" if direction == better else " (worse)"
            return f"{direction}{meaning} than with {first}"

        heads = {
            "lower": than("lower"),
            "higher": than("higher"),
            "": f"no difference shown from {first}",
        }
        parts: dict[str, list[str]] = {direction: [] for direction in heads}
        for setting, difference in differences.items():
            shown = f" ({difference})" if difference.direction else ""
            parts[difference.direction].append(f"{self.label(setting)}{shown}")
        sentences = [f"{heads[way]}: {'; '.join(some)}" for way, some in parts.items() if some]
        return f"{name}: {'. '.join(sentences)}."


def read_ablation(runs: Sequence[Run]) -> Ablation:
    """Means over the finished runs of a sweep.

    Raises:
        UserError: if no run is finished, or a summary is damaged or without metrics.
    """
    finished = [run for run in runs if run.is_finished]
    if not finished:
        raise UserError(f"{runs[0].folder.parent}: no run is finished; run the sweep first")
    short = short_names(list(runs[0].values))
    varied = [name for name in short if name.rsplit(".", 1)[-1] not in SEEDS]
    settings = {run.name: tuple(_hashable(run.values[name]) for name in varied) for run in finished}
    values = {run.name: _read_metrics(run) for run in finished}
    num_seeds = Counter(settings.values())
    seeds = [name for name in short if name not in varied]
    by_metric = _by_metric(finished, settings, seeds, values)
    means = {metric: _means(by_setting) for metric, by_setting in by_metric.items()}
    first = next(iter(num_seeds))
    differences = {metric: _from_first(first, of) for metric, of in by_metric.items()}
    notes = [*_unfinished(runs), *_differences(finished), *_missing(by_metric, num_seeds)]
    labels = [short[name] for name in varied]
    return Ablation(labels, means, differences, num_seeds, notes, values)


def _by_metric(
    runs: Sequence[Run],
    settings: dict[str, Setting],
    seeds: Sequence[str],
    values: dict[str, dict[str, float]],
) -> dict[str, BySetting]:
    """Values of each metric, from settings and metrics by run; `seeds` are names of parameters."""
    found: dict[str, BySetting] = {}
    for run in runs:
        seed = tuple(run.values[name] for name in seeds)
        for metric, value in values[run.name].items():
            found.setdefault(metric, {}).setdefault(settings[run.name], {})[seed] = value
    return found


def _means(by_setting: BySetting) -> dict[Setting, Mean]:
    return {setting: Mean.of(list(values.values())) for setting, values in by_setting.items()}


def _from_first(first: Setting, by_setting: BySetting) -> dict[Setting, Difference]:
    """Differences of all other settings from the first, over the seeds that both have."""
    reference = by_setting.get(first, {})
    pairs = {
        setting: [(v, reference[seed]) for seed, v in of_seeds.items() if seed in reference]
        for setting, of_seeds in by_setting.items()
        if setting != first
    }
    return holm({s: Difference.of(both) for s, both in pairs.items() if len(both) > 1})


def _unfinished(runs: Sequence[Run]) -> Iterator[str]:
    names = [run.name for run in runs if not run.is_finished]
    if names:
        yield f"**{len(names)} of {len(runs)} runs are not finished**: {', '.join(names)}."


def _missing(by_metric: dict[str, BySetting], num_seeds: dict[Setting, int]) -> Iterator[str]:
    for metric, by_setting in by_metric.items():
        fewer = sum(len(by_setting.get(setting, {})) < n for setting, n in num_seeds.items())
        if fewer:
            yield f"{title(metric)}: missing in runs of {fewer} of {len(num_seeds)} settings."


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (int, float, bool)) else redact(value)


def _read_metrics(run: Run) -> dict[str, float]:
    """Metrics of the last validation, without those of single stages and mask rates."""
    file = run.folder / "summary.json"
    try:
        content = read_json(file)["metrics"]
        metrics = {name: float(value["after"]) for name, value in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: damaged ({type(error).__name__}); remove it and run the sweep again"
        ) from error
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise UserError(
                f"{file}: {name} is {value}; check the run, remove it and run the sweep again"
            )
    if not metrics:
        raise UserError(f"{file}: has no metrics; remove the folder and run the sweep again")
    return {name: v for name, v in metrics.items() if not SKIPPED_METRICS.search(name)}


def _differences(runs: Sequence[Run]) -> list[str]:
    """A warning per setting that differs between runs although the sweep does not vary it.

    Otherwise a change of the base configuration during the sweep would look like an effect.
    """
    settings = {run.name: _read_settings(run) for run in runs}
    known = [found for found in settings.values() if found is not None]
    notes = []
    for name in dict.fromkeys(itertools.chain(*known)):
        values = dict.fromkeys(found.get(name, "not given") for found in known)
        if len(values) > 1 and name not in (*runs[0].values, *RESUME_ONLY_SETTINGS):
            notes.append(
                f"**Runs also differ in {name}** ({', '.join(values)}), which the sweep does not "
                "vary."
            )
    unknown = [name for name, found in settings.items() if found is None]
    if unknown:
        notes.append(f"No config.yaml, so other settings are unknown: {', '.join(unknown)}.")
    return notes


def _read_settings(run: Run) -> dict[str, str] | None:
    """Settings in the newest config.yaml, with the run's folder replaced by a placeholder."""
    files = [run.folder / "config.yaml", *run.folder.glob("*/version_*/config.yaml")]
    files = [file for file in files if file.is_file()]
    if not files:
        return None
    newest = max(files, key=lambda file: file.stat().st_mtime)
    try:
        flat = dict(flatten(read_yaml(newest, str(newest)) or {}))
    except (UserError, ValueError, AttributeError) as error:
        raise UserError(
            f"{newest}: unreadable; remove the folder and run the sweep again"
        ) from error
    texts = {name: str(value) for name, value in flat.items()}
    for folder in (str(run.folder.absolute()), str(run.folder)):
        texts = {name: text.replace(folder, "RUN") for name, text in texts.items()}
    return texts


def write_ablation(runs: Sequence[Run], out: Path) -> tuple[Path, Path]:
    """Write `table.md` and `plot.png` in `out`, from the run folders.

    Raises:
        UserError: as in `read_ablation`.
    """
    ablation = read_ablation(runs)
    table = out / "table.md"
    table.write_text(ablation.markdown(out.name))
    picture = out / "plot.png"
    plot(ablation, picture)
    return table, picture


def plot(ablation: Ablation, path: Path) -> None:
    """Plot one panel per metric.

    If the first parameter has names and there are two seeds or more: differences from the first
    setting, paired by seed. Otherwise: means with intervals over the first parameter, one line per
    combination of the others.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not _is_numeric(ablation) and any(ablation.differences.values()):
        draw, width, height = _plot_differences, 6.0, 1 + 0.3 * len(ablation.num_seeds)
    else:
        draw, width, height = _plot_means, 4.0, 3.0
    columns = math.ceil(math.sqrt(len(ablation.means)))
    rows = math.ceil(len(ablation.means) / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(ablation.means) :]:
        axis.set_visible(False)
    for axis, metric in zip(axes, ablation.means, strict=False):
        draw(ablation, metric, axis)
    figure.savefig(path, dpi=120)


def _plot_differences(ablation: Ablation, metric: str, axis: Any) -> None:
    """One row per setting, the first setting at 0."""
    settings = list(ablation.num_seeds)
    found = ablation.differences.get(metric, {})
    for row, setting in enumerate(settings):
        if setting in found:
            difference = found[setting]
            axis.errorbar(difference.value, row, xerr=difference.half_width, fmt="oC0", capsize=3)
    axis.plot(0, 0, "oC0")
    axis.axvline(0, color="gray", linewidth=1)
    names = [", ".join(map(str, setting)) for setting in settings]
    axis.set_yticks(range(len(settings)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_title(f"{title(metric)}: difference from the first, 95 % interval", fontsize=9)


def _plot_means(ablation: Ablation, metric: str, axis: Any) -> None:
    """One place per value of the first parameter, one line per combination of the others."""
    first = [_first(setting) for setting in ablation.num_seeds]
    ticks = list(dict.fromkeys(map(str, first)))
    lines: dict[Setting, list[tuple[int, Mean]]] = {}
    for setting, mean in ablation.means[metric].items():
        lines.setdefault(setting[1:], []).append((ticks.index(str(_first(setting))), mean))
    for i, (others, points) in enumerate(lines.items()):
        shift = 0.08 * (i - (len(lines) - 1) / 2)  # so that intervals do not cover each other
        places, means = zip(*points, strict=True)
        pairs = zip(ablation.parameters[1:], others, strict=True)
        axis.errorbar(
            [place + shift for place in places],
            [mean.value for mean in means],
            yerr=[mean.half_width or 0.0 for mean in means],
            fmt="o-" if _is_numeric(ablation) else "o",
            capsize=3,
            label=", ".join(f"{name}={value}" for name, value in pairs),
        )
    is_short = max(map(len, ticks)) < 8
    axis.set_xticks(range(len(ticks)), ticks, fontsize=8, rotation=0 if is_short else 20)
    axis.set_title(title(metric), fontsize=9)
    axis.set_xlabel("".join(ablation.parameters[:1]), fontsize=8)
    if len(lines) > 1:
        axis.legend(fontsize=7)


def _is_numeric(ablation: Ablation) -> bool:
    """Whether the first parameter is a number in all settings."""
    return all(isinstance(_first(setting), (int, float)) for setting in ablation.num_seeds)


def _first(setting: Setting) -> Any:
    return setting[0] if setting else "all"
