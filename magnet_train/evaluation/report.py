"""A run, or systems side by side, in one HTML file: to be heard, seen, mailed and kept, without an account.

`write_report` draws a Report that anyone fills in; `report_of_run` fills one from the folder of a training run.
"""

import base64
import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from magnet_train.common.audio_files import normalize_loudness
from magnet_train.common.errors import UserError
from magnet_train.evaluation.page import Audio, audio_uri, data_uri, read_sound, text, write_page
from magnet_train.metrics.networks.musicnn import slaney_mel_filters

Point = tuple[float, float, float | None, float | None]
"""(step, value, low, high) of a curve; low and high bound its interval, or are None."""

NUM_RANKED = 3
"""Best and worst clips that are named for each system."""
NUM_OPEN_CHARTS = 6
"""Charts that are seen at once; the others unfold."""
LONGEST_CURVE = 400
"""Points of one curve that are drawn; a longer one is drawn in means."""


@dataclass(frozen=True)
class Clip:
    """One piece of audio, and what is known about it."""

    audio: Audio
    """File, or samples `t` or `t channels` and their rate in Hz; brought to -14 LUFS in the page."""
    caption: str
    """What it was made from."""
    codes: np.ndarray | None = None
    """`k t`, integers from the codec."""
    order: np.ndarray | None = None
    """`k t`, the step in its stage at which a code became final; -1 = given (`Generated.order`)."""
    score: float | None = None
    """Per-clip score, by which the best and worst are found."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Seed, item and the like, shown folded."""


@dataclass(frozen=True)
class Report:
    """What one page shows; every part but the title may be empty."""

    title: str
    """Heading of the page."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Name to value, shown folded."""
    clips: Sequence[Mapping[str, Clip]] = ()
    """One entry for each prompt: checkpoint or system to its clip."""
    curves: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    """Metric to its points. `…/stage0`, `…/rate0.5` and `…/floor_codec` share the chart of what stands before them."""
    records: Sequence[Mapping[str, Any]] = ()
    """Figures, as `asdict` of a metrics record: `system`, `metric`, `value`, `interval` (low, high) and `num_clips`
    have columns of their own; every other field that is not None belongs to the protocol, which unfolds."""
    notes: Sequence[str] = ()
    """What a reader must know first, such as what is missing."""
    score: str = "score"
    """Name of the per-clip score."""
    lower_is_better: bool = False
    """Whether a low per-clip score is a good one."""


def write_report(path: str | Path, report: Report) -> int:
    """Write the report as one HTML file that loads nothing; its size in bytes comes back.

    A clip of 10 s takes about 100 kB of the page at 16 kHz and 150 kB at 44.1 kHz: MP3 (see `page.audio_uri`), a
    JPEG of 96 mel bands by 480 columns (12 kB, where a PNG of 64 shades takes 22), and base64's third on both.

    Raises:
        UserError: if a file is unreadable, arrays do not fit, a number is not finite, or the page cannot be written.
    """
    sections = {
        "Figures": _records(report.records),
        "Curves": _curves(report.curves),
        "Best and worst": _ranked(report),
        "Clips": _clips(report),
        "Settings": _settings(report.settings),
    }
    sections = {name: body for name, body in sections.items() if body}
    links = "".join(f'<li><a href="#{_anchor(name)}">{name}</a></li>' for name in sections)
    systems = list(_systems(report))
    count = sum(len(row) for row in report.clips)
    lead = f"{_plural(count, 'clip')}: {_plural(len(report.clips), 'prompt')}, {len(systems)} systems or checkpoints."
    notes = "".join(f"<li>{text(note)}</li>" for note in report.notes)
    body = [
        f'<header>\n<h1>{text(report.title)}</h1>\n<p class="faint">{lead}</p>',
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n<main>',
        f'<aside class="notes" aria-label="Notes"><ul>{notes}</ul></aside>' if notes else "",
        *(f'<section id="{_anchor(name)}">\n<h2>{name}</h2>\n{part}\n</section>' for name, part in sections.items()),
        "</main>",
    ]
    return write_page(Path(path), report.title, "\n".join(body), "report.js")


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _systems(report: Report) -> dict[str, None]:
    """Columns in the order of their first appearance."""
    return {name: None for row in report.clips for name in row}


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _definitions(values: Mapping[str, Any]) -> str:
    return f"<dl>{''.join(f'<dt>{text(k)}</dt><dd>{text(_number(v))}</dd>' for k, v in values.items())}</dl>"


# --- Clips ----------------------------------------------------------------------------------------------------------


def _clips(report: Report) -> str:
    rows = []
    for i, row in enumerate(report.clips):
        captions = list(dict.fromkeys(clip.caption for clip in row.values()))
        heading = text(" / ".join(caption or "(no text)" for caption in captions))
        cells = "\n".join(
            # An empty place keeps the columns of all prompts in line.
            _cell(f"clip-{i}-{j}", name, row[name], report) if name in row else '<div class="clip faint">no clip</div>'
            for j, name in enumerate(_systems(report))
        )
        rows.append(f'<article class="prompt">\n<h3>{heading}</h3>\n<div class="cells">\n{cells}\n</div>\n</article>')
    return "\n".join(rows)


def _cell(anchor: str, system: str, clip: Clip, report: Report) -> str:
    name = f"clip {clip.caption!r} of {system}"
    wav, sample_rate = read_sound(clip.audio, name)
    wav = normalize_loudness(wav, sample_rate)
    heard = text(f"{system}: {clip.caption}")
    score = "" if clip.score is None else f"<small>{text(report.score)} {_finite(clip.score, name):.3g}</small>"
    about = f"<details><summary>About this clip</summary>{_definitions(clip.about)}</details>" if clip.about else ""
    return (
        f'<section class="clip" id="{anchor}">\n'
        f"<header><h4>{text(system)}</h4>{score}</header>\n"
        f'<figure class="spectrogram"><img alt="Spectrogram of {heard}" src="{spectrogram_uri(wav, sample_rate)}">'
        f"<i></i><figcaption><span>{sample_rate / 2000:g} kHz, mel</span><span>{len(wav) / sample_rate:.1f} s</span>"
        "</figcaption></figure>\n"
        f'<audio controls preload="metadata" aria-label="{heard}" src="{audio_uri(wav, sample_rate)}"></audio>\n'
        f"{_grids(clip, name)}{about}</section>"
    )


def spectrogram_uri(wav: np.ndarray, sample_rate: int) -> str:
    """A JPEG of 96 mel bands by 480 columns or fewer, the 80 dB below the loudest point, of samples `t channels`.

    The mel axis gives melodies the room that a linear one leaves to hiss.
    """
    from matplotlib.image import imsave

    window, columns, bands = 2048, 480, 96
    mono = np.pad(wav.mean(1), window // 2)
    frames = np.lib.stride_tricks.sliding_window_view(mono, window)[:: math.ceil(len(wav) / columns)]
    power = np.abs(np.fft.rfft(frames * np.hanning(window))) ** 2
    mel = slaney_mel_filters(sample_rate, window, bands).numpy() @ power.T
    level = 10 * np.log10(np.maximum(mel, 1e-8))
    top = max(level.max(), -20.0)  # so that silence is dark
    buffer = io.BytesIO()
    imsave(buffer, level, format="jpg", cmap="magma", origin="lower", vmin=top - 80, vmax=top)
    return data_uri("image/jpeg", buffer.getvalue())


def _grids(clip: Clip, name: str) -> str:
    """Codes and order as numbers, which the page's script draws once they are unfolded."""
    arrays = {what: np.asarray(x) for what, x in (("codes", clip.codes), ("order", clip.order)) if x is not None}
    if not arrays:
        return ""
    for what, array in arrays.items():
        if array.ndim != 2 or array.size == 0 or array.shape != next(iter(arrays.values())).shape:
            raise UserError(f"{name}: {what} of shape {array.shape}; codes and order are both `k t`")
        low, high = (0, 65_535) if what == "codes" else (-1, 32_767)
        if not np.issubdtype(array.dtype, np.integer) or array.min() < low or array.max() > high:
            raise UserError(f"{name}: {what} must be integers from {low} to {high}")
    rows, columns = next(iter(arrays.values())).shape
    numbers = " ".join(
        f'data-{what}="{base64.b64encode(array.astype(np.int64).astype("<u2").tobytes()).decode()}"'
        for what, array in arrays.items()
    )
    captions = {
        "codes": f"Codes: {rows} codebooks, the lowest on top; {columns} frames; a colour for each code",
        "order": "Order of unmasking: dark = decided first in its codebook, grey = given",
    }
    canvases = "".join(
        f'<figure class="grid"><canvas role="img" aria-label="{captions[what]}" data-shows="{what}"></canvas>'
        f"<figcaption>{captions[what]}</figcaption></figure>"
        for what in arrays
    )
    slider = ""
    if "order" in arrays:
        slider = (
            '<div class="passes"><label>Passes of decoding <input type="range" min="0" max="1" value="1">'
            '<output></output></label><button type="button" class="small">Animate</button></div>'
        )
    title = {2: "Codes and order of unmasking"}.get(len(arrays)) or next(iter(arrays)).capitalize()
    return (
        f'<details class="grids"><summary>{title}</summary><div class="grids-data" data-rows="{rows}" '
        f'data-columns="{columns}" {numbers}>{canvases}{slider}</div></details>\n'
    )


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise UserError(f"{name}: the value is {value}; leave it out")
    return value


def _ranked(report: Report) -> str:
    """The best and worst clips of each system, by links and buttons that play the clip itself further below."""
    blocks = []
    for j, system in enumerate(_systems(report)):
        scored = [
            (clip.score, f"clip-{i}-{j}", clip.caption)
            for i, row in enumerate(report.clips)
            if (clip := row.get(system)) is not None and clip.score is not None
        ]
        scored.sort(key=lambda entry: entry[0], reverse=not report.lower_is_better)
        count = min(NUM_RANKED, len(scored) // 2)  # no clip is both
        if count:
            lists = {"Best": scored[:count], "Worst": scored[::-1][:count]}
            parts = "".join(f"<h4>{title}</h4><ol>{_entries(part)}</ol>" for title, part in lists.items())
            blocks.append(f"<div><h3>{text(system)}</h3>{parts}</div>")
    if not blocks:
        return ""
    return f'<p class="faint">By {text(report.score)}.</p><div class="ranked">{"".join(blocks)}</div>'


def _entries(ranked: Sequence[tuple[float, str, str]]) -> str:
    return "".join(
        f'<li><button type="button" class="small" data-plays="{anchor}" aria-label="Play {text(caption)}">▶'
        f'</button><span>{score:.3g}</span><a href="#{anchor}">{text(caption or "(no text)")}</a></li>'
        for score, anchor, caption in ranked
    )


# --- Figures, settings ----------------------------------------------------------------------------------------------


def _records(records: Sequence[Mapping[str, Any]]) -> str:
    heads = {
        "system": "System",
        "metric": "Metric",
        "value": "Value",
        "interval": "95 % interval",
        "num_clips": "Clips",
    }
    rows: list[dict[str, str]] = []
    for record in records:
        record = {name: value for name, value in record.items() if value is not None}
        metric, value = record.get("metric", ""), record.get("value")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"record {metric!r}: value={value!r} is no number; leave it out")
        _finite(value, f"record {metric!r}")
        row = {name: text(_number(record[name])) for name in heads if name in record}
        if "interval" in record:
            row["interval"] = " to ".join(_number(float(end)) for end in record["interval"])
        if protocol := _flat({name: value for name, value in record.items() if name not in heads}):
            row["protocol"] = f"<details><summary>protocol</summary>{_definitions(protocol)}</details>"
        rows.append(row)
    heads["protocol"] = ""
    if not rows:
        return ""
    shown = {key: head for key, head in heads.items() if any(key in row for row in rows)}
    head = "".join(f'<th scope="col">{name}</th>' for name in shown.values())
    body = "".join(
        "<tr>" + "".join(f'<td class="{key}">{row.get(key, "")}</td>' for key in shown) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _settings(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    return f"<details><summary>{_plural(len(settings), 'setting')}</summary>{_definitions(settings)}</details>"


# --- Curves ---------------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 320, 170, 46, 8, 8, 24


def _curves(curves: Mapping[str, Sequence[Point]]) -> str:
    charts: dict[str, dict[str, Sequence[Point]]] = {}
    for name, points in curves.items():
        if points:
            charts.setdefault(re.sub(r"/(stage|rate|floor_)[^/]*$", "", name), {})[name] = points
    drawn = [_chart(name, lines) for name, lines in charts.items()]
    if not drawn:
        return ""
    html = f'<div class="charts">{"".join(drawn[:NUM_OPEN_CHARTS])}</div>'
    if len(drawn) > NUM_OPEN_CHARTS:
        more = "".join(drawn[NUM_OPEN_CHARTS:])
        count = _plural(len(drawn) - NUM_OPEN_CHARTS, "more chart")
        html += f'<details><summary>{count}</summary><div class="charts">{more}</div></details>'
    return html


def _chart(title: str, lines: Mapping[str, Sequence[Point]]) -> str:
    """One SVG: a line for each curve, its interval as a band, values in full under the pointer."""
    for name, points in lines.items():
        for step, *values in points:
            for value in (step, *values):
                _finite(0.0 if value is None else value, f"curve {name}, step {step}")
    lines = {name: _thinned(points) for name, points in lines.items()}
    every = [point for points in lines.values() for point in points]
    steps = [point[0] for point in every]
    values = [value for point in every for value in point[1:] if value is not None]
    x_ticks, y_ticks = _ticks(min(steps), max(steps)), _ticks(min(values), max(values))
    left, right = min(*steps, x_ticks[0]), max(*steps, x_ticks[-1])
    low, high = min(*values, y_ticks[0]), max(*values, y_ticks[-1])

    def x(step: float) -> str:
        return f"{_LEFT + (_WIDTH - _LEFT - _RIGHT) * (step - left) / ((right - left) or 1):.1f}"

    def y(value: float) -> str:
        return f"{_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - low) / ((high - low) or 1):.1f}"

    parts = [
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>'
        f'<text x="{_LEFT - 6}" y="{y(tick)}" dy="0.32em" text-anchor="end">{tick:.4g}</text>'
        for tick in y_ticks
    ]
    parts += [f'<text x="{x(t)}" y="{_HEIGHT - 6}" text-anchor="middle">{_step_label(t)}</text>' for t in x_ticks]
    legend = []
    for i, (name, points) in enumerate(lines.items()):
        floor, short = "floor" if "/floor_" in name else "", name.rpartition("/")[2].replace("_", " ")
        colour = f"var(--line{i % 6})"
        banded = [(step, low, high) for step, _, low, high in points if low is not None and high is not None]
        if len(banded) > 1:
            edge = [f"{x(s)},{y(up)}" for s, _, up in banded] + [f"{x(s)},{y(down)}" for s, down, _ in banded[::-1]]
            parts.append(f'<polygon class="band" fill="{colour}" points="{" ".join(edge)}"/>')
        parts += [  # a band of no width
            f'<line class="line" stroke="{colour}" x1="{x(s)}" x2="{x(s)}" y1="{y(down)}" y2="{y(up)}"/>'
            for s, down, up in banded
            if len(banded) == 1
        ]
        path = " ".join(f"{x(p[0])},{y(p[1])}" for p in points)
        parts.append(f'<polyline class="line {floor}" stroke="{colour}" points="{path}"/>')
        if not floor:
            radius = 3 if len(points) <= 12 else 5  # of many points only the one under the pointer matters
            paint = f'fill="{colour}"' if len(points) <= 12 else 'fill="transparent"'
            parts += [
                f'<circle cx="{x(p[0])}" cy="{y(p[1])}" r="{radius}" {paint}><title>{text(_point_label(name, p))}'
                "</title></circle>"
                for p in points
            ]
        last = _number(float(points[-1][1]))
        legend.append(f'<li><i class="{floor}" style="border-color:{colour}"></i>{text(short)} {last}</li>')
    described = "; ".join(f"{name} ends at {_number(float(points[-1][1]))}" for name, points in lines.items())
    return (
        f'<figure class="chart"><figcaption><h4>{text(title)}</h4></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text(described)}">{"".join(parts)}</svg>'
        f'<ul class="legend">{"".join(legend)}</ul></figure>'
    )


def _point_label(name: str, point: Point) -> str:
    step, value, low, high = point
    interval = "" if low is None or high is None else f" ({low:.4g} to {high:.4g})"
    return f"{name}, step {step:g}: {value:.5g}{interval}"


def _thinned(points: Sequence[Point]) -> list[Point]:
    """In the order of steps; means of neighbours where there are more than LONGEST_CURVE."""
    points = sorted(points, key=lambda point: point[0])
    group = math.ceil(len(points) / LONGEST_CURVE)
    if group == 1:
        return points
    means: list[Point] = []
    for first in range(0, len(points), group):
        columns = list(zip(*points[first : first + group], strict=True))
        step, value, low, high = (None if None in c else sum(c) / len(c) for c in columns)  # type: ignore[arg-type]
        assert step is not None and value is not None
        means.append((step, value, low, high))
    return means


def _step_label(step: float) -> str:
    return f"{step / 1000:g}k" if step >= 10_000 else f"{step:g}"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers in and around [low, high], three to six of them.

    >>> _ticks(0.0, 799.0)
    [0.0, 200.0, 400.0, 600.0, 800.0]
    """
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = power * min(m for m in (1, 2, 5, 10) if m * power >= rough * 0.99)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


# --- A training run -------------------------------------------------------------------------------------------------

_HEADLINES = ("val/fad", "val/kl", "val/text", "val/ce", "val/accuracy", "train/loss", "val", "train")


def report_of_run(run_folder: str | Path) -> Report:
    """The report of one training run: what its validations wrote, its curves, its settings.

    Reads `validation/step_*/records.json`; `NAME.wav` beside it with `NAME.json` (prompt, seed, …; a number under
    `score` is the clip's score) and, where it exists, `NAME.npz` with the arrays `codes` and `order`;
    `*/version_*/metrics.csv` of Lightning's CSVLogger, all versions of a resumed run; and `config.yaml`. What is
    missing or broken becomes a note in the page.

    Raises:
        UserError: if there is no such folder.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a training run")
    notes: list[str] = []
    clips = _validation_clips(folder, notes)
    curves = _logged_curves(folder, notes)
    settings = _configured(folder, notes)
    name = settings.get("trainer.default_root_dir") or folder.resolve().name
    records = _stamped(folder, notes)
    stamped = {f"val/{record['metric']}" for record in records}
    records += [record for record in _last_values(curves, settings) if record["metric"] not in stamped]
    title = f"Run {Path(str(name)).name}"
    return Report(title, settings, clips, curves, records, notes, "FAD of the clip alone", lower_is_better=True)


def _validation_clips(folder: Path, notes: list[str]) -> list[dict[str, Clip]]:
    rows: dict[str, dict[str, Clip]] = {}
    num_clips = num_grids = 0
    for path in sorted(folder.glob("validation/step_*/*.wav"), key=lambda p: (p.name, p.parent.name)):
        if path.name.startswith("."):
            continue  # the rest of a write that was cut off
        place = f"{path.parent.name}/{path.name}"
        try:
            read_sound(path)
            about = _read_about(path.with_suffix(".json"))
        except UserError as error:
            notes.append(f"{place} is left out: {str(error).removeprefix(f'{path}: ')}")
            continue
        if about is None:
            notes.append(f"{place}: no readable JSON beside it, so its file name stands for the caption")
            about = {"prompt": path.stem}
        arrays: dict[str, np.ndarray] = {}
        if path.with_suffix(".npz").is_file():
            try:
                with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
                    arrays = {name: file[name] for name in ("codes", "order") if name in file}
            except (OSError, ValueError, EOFError, BadZipFile) as error:
                notes.append(f"{place}: its codes are unreadable ({error})")
        num_clips, num_grids = num_clips + 1, num_grids + bool(arrays)
        score = about.pop("score", None)
        step = re.sub(r"\D", "", path.parent.name)
        clip = Clip(
            path, str(about.pop("prompt", path.stem)), arrays.get("codes"), arrays.get("order"),
            float(score) if isinstance(score, int | float) and math.isfinite(score) else None, _flat(about),
        )  # fmt: skip
        rows.setdefault(path.stem, {})[f"step {int(step or 0)}"] = clip
    if not rows:
        notes.append("No clips: the run folder holds no validation/step_*/*.wav.")
    elif num_grids < num_clips:
        lack = f"{num_clips - num_grids} of {num_clips} clips are shown without codes and order of unmasking"
        notes.append(f"{lack}: no .npz with them lies beside the audio.")
    return list(rows.values())


def _read_about(path: Path) -> dict[str, Any] | None:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; what is not set is left out."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def _logged_curves(folder: Path, notes: list[str]) -> dict[str, list[Point]]:
    """Curves of all versions, the later one winning at a step; `NAME_ci95` becomes the interval of NAME."""

    def version(path: Path) -> int:
        return int(re.sub(r"\D", "", path.parent.name) or 0)

    found: dict[str, dict[float, float]] = {}
    dropped: dict[str, int] = {}
    files = sorted(folder.glob("*/version_*/metrics.csv"), key=version)
    for path in files:
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except (OSError, ValueError, csv.Error) as error:
            notes.append(f"{path.relative_to(folder)} is left out: {error}")
            continue
        for row in rows:
            step = _float(row.get("step"))
            for name, cell in row.items():
                value = _float(cell)
                if step is None or name in ("step", "epoch", None) or cell in (None, ""):
                    continue
                if value is None:
                    dropped[name] = dropped.get(name, 0) + 1
                else:
                    found.setdefault(name, {})[step] = value
    if not files:
        notes.append("No curves: the run folder holds no metrics.csv of a CSVLogger.")
    notes += [f"{name}: {_plural(count, 'value')} that are not finite are left out" for name, count in dropped.items()]
    curves: dict[str, list[Point]] = {}
    for name in sorted(found, key=_rank):
        if name.endswith("_ci95") and name.removesuffix("_ci95") in found:
            continue
        half = found.get(f"{name}_ci95", {})
        curves[name] = [
            (step, value, value - half[step], value + half[step]) if step in half else (step, value, None, None)
            for step, value in sorted(found[name].items())
        ]
    return curves


def _rank(name: str) -> tuple[int, int, str]:
    first = next((i for i, start in enumerate(_HEADLINES) if name.startswith(start)), len(_HEADLINES))
    return ("/rate" in name) + 2 * (name == "val/num_clips"), first, name


def _float(cell: Any) -> float | None:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _configured(folder: Path, notes: list[str]) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        config = None
    if not isinstance(config, dict):
        notes.append("No settings: the run folder holds no readable config.yaml.")
        return {}
    return _flat(config)


def _stamped(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The records of the last validation that wrote some, with their whole protocol."""
    files = sorted(folder.glob("validation/step_*/records.json"))
    if not files:
        return []
    try:
        return [dict(record) for record in json.loads(files[-1].read_text()) if "metric" in record]
    except (OSError, ValueError, TypeError) as error:
        notes.append(f"The records of {files[-1].parent.name} are broken ({error}) and not shown.")
        return []


def _last_values(curves: Mapping[str, Sequence[Point]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The last validation's figures, each beside its floors and the settings that it depends on."""
    protocol = {
        name: value
        for name, value in settings.items()
        if name.startswith("generation.") or name in ("model.codec", "model.text_encoder", "model.crop_s")
    }
    clips = curves.get("val/num_clips", ())
    records = []
    for name, points in curves.items():
        is_generated = name.startswith(_HEADLINES[:3])
        if "/floor_" in name or not (is_generated or name == "val/ce"):
            continue
        step, value, low, high = points[-1]
        record: dict[str, Any] = {"metric": name, "value": value, "step": int(step)}
        if low is not None and high is not None:
            record["interval"] = (low, high)
        if is_generated:
            record |= {"num_clips": int(clips[-1][1])} if clips else {}
            floors = [other for other in curves if other.startswith(f"{name}/floor_")]
            record |= {other.removeprefix(f"{name}/").replace("_", " "): curves[other][-1][1] for other in floors}
            record |= protocol
        records.append(record)
    return records
