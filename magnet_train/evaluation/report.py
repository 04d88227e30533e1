"""HTML reports of a training run or of several systems: players, spectrograms and metrics.

`write_report` writes a Report; `run_report.report_from_run` creates one from a run folder.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from magnet_train.common.audio_files import (
    clipped_share,
    magnitude_spectrogram,
    normalize_for_listening,
)
from magnet_train.common.errors import UserError
from magnet_train.common.yaml_files import flatten
from magnet_train.evaluation.charts import Point, draw_charts
from magnet_train.evaluation.page import Audio, audio_uri, data_uri, read_sound, text, write_page
from magnet_train.metrics.networks.frontend import mel_filters
from magnet_train.tracking.logged import arrow

NUM_RANKED = 3
"""Number of best and of worst clips listed per system."""


@dataclass(frozen=True)
class ReportClip:
    """A clip in a report."""

    audio: Audio
    """File, or samples `t` or `t channels` and their sample rate in Hz; normalised to -14 LUFS in
    the page."""
    caption: str
    codes: np.ndarray | None = None
    """`k t`, integers from the codec."""
    order: np.ndarray | None = None
    """`k t`, the step in its stage at which a code became final; -1 = given (`Generated.order`)."""
    score: float | None = None
    """Per-clip score, to rank clips."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Details such as seed and item; collapsed."""


@dataclass(frozen=True)
class Report:
    """Content of a report; all fields except the title are optional."""

    title: str
    """Heading of the page."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values by name; collapsed."""
    clips: Sequence[Mapping[str, ReportClip]] = ()
    """One entry per prompt: clips by checkpoint or system."""
    curves: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    """Points by metric. `…/stage0`, `…/rate0.5` and `…/baseline_codec` share one chart."""
    records: Sequence[Mapping[str, Any]] = ()
    """Metric records as dicts with `metric` and `value`. `system`, `before`, `interval` (low and
    high), `baseline_codec`, `baseline_unigram` and `num_clips` have columns too; all other fields
    that are not None are the collapsed protocol."""
    notes: Sequence[str] = ()
    """Warnings, such as missing parts."""
    score: str = "score"
    """Name of the per-clip score; lower is better."""


def write_report(path: str | Path, report: Report) -> int:
    """Write the report as a self-contained HTML file; returns its size in bytes.

    A clip of 10 s takes about 100 kB at 16 kHz and 150 kB at 44.1 kHz: MP3 (see `page.audio_uri`)
    and a JPEG of 96 mel bands by 480 columns (12 kB), both in base64.

    Raises:
        UserError: if a file is unreadable, shapes do not match, or the page cannot be written.
    """
    sections = {
        "Metrics": _records(report.records),
        "Curves": draw_charts(report.curves),
        "Best and worst": _ranked(report),
        "Clips": _clips(report),
        "Settings": _settings(report.settings),
    }
    sections = {name: body for name, body in sections.items() if body}
    links = "".join(f'<li><a href="#{_anchor(name)}">{name}</a></li>' for name in sections)
    systems = list(_systems(report))
    count = sum(len(row) for row in report.clips)
    lead = (
        f"{_plural(count, 'clip')}: {_plural(len(report.clips), 'prompt')}, {len(systems)} "
        "systems or checkpoints."
    )
    notes = "".join(f"<li>{text(note)}</li>" for note in report.notes)
    body = [
        f'<header>\n<h1>{text(report.title)}</h1>\n<p class="faint">{lead}</p>',
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n<main>',
        f'<aside class="notes" aria-label="Notes"><ul>{notes}</ul></aside>' if notes else "",
        *(
            f'<section id="{_anchor(name)}">\n<h2>{name}</h2>\n{part}\n</section>'
            for name, part in sections.items()
        ),
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
    rows = [f"<dt>{text(k)}</dt><dd>{text(_number(v))}</dd>" for k, v in values.items()]
    return f"<dl>{''.join(rows)}</dl>"


# --- Clips ----------------------------------------------------------------------------------------


def _clips(report: Report) -> str:
    rows = []
    for i, row in enumerate(report.clips):
        captions = list(dict.fromkeys(clip.caption for clip in row.values()))
        heading = text(" / ".join(caption or "(no text)" for caption in captions))
        cells = "\n".join(
            # An empty cell keeps the columns aligned.
            _cell(f"clip-{i}-{j}", name, row[name], report)
            if name in row
            else '<div class="clip faint">no clip</div>'
            for j, name in enumerate(_systems(report))
        )
        rows.append(
            f'<article class="prompt">\n<h3>{heading}</h3>\n'
            f'<div class="cells">\n{cells}\n</div>\n</article>'
        )
    return "\n".join(rows)


def _cell(anchor: str, system: str, clip: ReportClip, report: Report) -> str:
    name = f"clip {clip.caption!r} of {system}"
    wav, sample_rate = read_sound(clip.audio, name)
    clipped = clipped_share(wav)
    wav = normalize_for_listening(wav, sample_rate)
    title = text(f"{system}: {clip.caption}")
    score = ""
    if clip.score is not None:
        score = f"<small>{text(report.score)} {clip.score:.3g} ↓</small>"
    about = dict(clip.about)
    about["clipped samples"] = f"{about.pop('clipped_share', clipped):.2%}"
    details = f"<details><summary>About this clip</summary>{_definitions(about)}</details>"
    return (
        f'<section class="clip" id="{anchor}">\n'
        f"<header><h4>{text(system)}</h4>{score}</header>\n"
        f'<figure class="spectrogram"><img alt="Spectrogram of {title}" '
        f'src="{spectrogram_uri(wav, sample_rate)}"><i></i>'
        f"<figcaption><span>{sample_rate / 2000:g} kHz, mel</span>"
        f"<span>{len(wav) / sample_rate:.1f} s</span></figcaption></figure>\n"
        f'<audio controls preload="metadata" aria-label="{title}" '
        f'src="{audio_uri(wav, sample_rate)}"></audio>\n'
        f"{_grids(clip, name)}{details}</section>"
    )


def spectrogram_uri(wav: np.ndarray, sample_rate: int) -> str:
    """Mel spectrogram of `t channels` as a JPEG data URI: 96 bands, at most 480 columns, 80 dB."""
    from matplotlib.image import imsave

    window = 2048
    columns = 480
    bands = 96
    mono = np.pad(wav.mean(1), window // 2)
    power = magnitude_spectrogram(mono, window, math.ceil(len(wav) / columns)) ** 2
    mel = mel_filters(sample_rate, window, bands, "slaney").numpy() @ power.T
    level = 10 * np.log10(np.maximum(mel, 1e-8))
    top = max(level.max(), -20.0)  # so that silence is dark
    buffer = io.BytesIO()
    imsave(buffer, level, format="jpg", cmap="magma", origin="lower", vmin=top - 80, vmax=top)
    return data_uri("image/jpeg", buffer.getvalue())


def _grids(clip: ReportClip, name: str) -> str:
    """Codes and order as numbers; the page's script draws them when they are expanded."""
    arrays = _checked_grids(clip, name)
    if not arrays:
        return ""
    rows, columns = next(iter(arrays.values())).shape
    numbers = " ".join(
        f'data-{what}="{base64.b64encode(array.astype(np.int64).astype("<u2").tobytes()).decode()}"'
        for what, array in arrays.items()
    )
    captions = {
        "codes": f"Codes: {rows} codebooks, the lowest on top; {columns} frames; a colour per code",
        "order": "Order of unmasking: dark = decided first in its codebook, grey = given",
    }
    canvases = "".join(
        f'<figure class="grid"><canvas role="img" aria-label="{captions[what]}" '
        f'data-shows="{what}"></canvas>'
        f"<figcaption>{captions[what]}</figcaption></figure>"
        for what in arrays
    )
    slider = ""
    if "order" in arrays:
        slider = (
            '<div class="passes"><label>Passes of decoding '
            '<input type="range" min="0" max="1" value="1"><output></output></label>'
            '<button type="button" class="small">Animate</button></div>'
        )
    title = {2: "Codes and order of unmasking"}.get(len(arrays)) or next(iter(arrays)).capitalize()
    return (
        f'<details class="grids"><summary>{title}</summary>'
        f'<div class="grids-data" data-rows="{rows}" data-columns="{columns}" {numbers}>'
        f"{canvases}{slider}</div></details>\n"
    )


def _checked_grids(clip: ReportClip, name: str) -> dict[str, np.ndarray]:
    """Codes and order of a clip, if they exist.

    Raises:
        UserError: if their shapes differ or a value is out of range.
    """
    given = {"codes": clip.codes, "order": clip.order}
    arrays = {what: np.asarray(array) for what, array in given.items() if array is not None}
    shapes = {array.shape for array in arrays.values()}
    for what, array in arrays.items():
        if array.ndim != 2 or array.size == 0 or len(shapes) > 1:
            raise UserError(
                f"{name}: {what} of shape {array.shape}; codes and order are both `k t`"
            )
        low, high = (0, 65_535) if what == "codes" else (-1, 32_767)
        if not np.issubdtype(array.dtype, np.integer) or array.min() < low or array.max() > high:
            raise UserError(f"{name}: {what} must be integers from {low} to {high}")
    return arrays


def _ranked(report: Report) -> str:
    """The best and worst clips of each system, with links and play buttons."""
    blocks = []
    for j, system in enumerate(_systems(report)):
        scored = [
            (clip.score, f"clip-{i}-{j}", clip.caption)
            for i, row in enumerate(report.clips)
            if (clip := row.get(system)) is not None and clip.score is not None
        ]
        scored.sort(key=lambda entry: entry[0])
        count = min(NUM_RANKED, len(scored) // 2)  # no clip is in both lists
        if count:
            lists = {"Best": scored[:count], "Worst": scored[::-1][:count]}
            parts = "".join(
                f"<h4>{title}</h4><ol>{_entries(part)}</ol>" for title, part in lists.items()
            )
            blocks.append(f"<div><h3>{text(system)}</h3>{parts}</div>")
    if not blocks:
        return ""
    lead = f'<p class="faint">By {text(report.score)}, lower is better.</p>'
    return f'{lead}<div class="ranked">{"".join(blocks)}</div>'


def _entries(ranked: Sequence[tuple[float, str, str]]) -> str:
    return "".join(
        f'<li><button type="button" class="small" data-plays="{anchor}" '
        f'aria-label="Play {text(caption)}">▶</button><span>{score:.3g}</span>'
        f'<a href="#{anchor}">{text(caption or "(no text)")}</a></li>'
        for score, anchor, caption in ranked
    )


# --- Metrics, settings ----------------------------------------------------------------------------


_COLUMNS = {
    "system": "System",
    "metric": "Metric",
    "before": "Before training",
    "value": "Value",
    "interval": "95 % interval",
    "baseline_codec": "Codec (ceiling)",
    "baseline_unigram": "Unigrams (baseline)",
    "num_clips": "Clips",
}


def _records(records: Sequence[Mapping[str, Any]]) -> str:
    rows = [_record_row(record) for record in records]
    heads = _COLUMNS | {"protocol": ""}
    shown = {key: head for key, head in heads.items() if any(key in row for row in rows)}
    if not shown:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in shown.values())
    body = "".join(
        "<tr>" + "".join(f'<td class="{key}">{row.get(key, "")}</td>' for key in shown) + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _record_row(record: Mapping[str, Any]) -> dict[str, str]:
    """The cells of one record, by column."""
    record = {name: value for name, value in flatten(record) if value is not None}
    row = {name: text(_number(record[name])) for name in _COLUMNS if name in record}
    metric = str(record["metric"])
    if found := arrow(metric) or arrow(f"val/{metric}"):
        row["metric"] += f" {found}"
    if "interval" in record:
        row["interval"] = " to ".join(_number(float(end)) for end in record["interval"])
    protocol = {name: value for name, value in record.items() if name not in _COLUMNS}
    if protocol:
        row["protocol"] = f"<details><summary>protocol</summary>{_definitions(protocol)}</details>"
    return row


def _settings(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    summary = _plural(len(settings), "setting")
    return f"<details><summary>{summary}</summary>{_definitions(settings)}</details>"


def load_grids(audio: Path) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Codes and unmasking steps `k t` from the `.npz` next to an audio file; None if it has none.

    Raises:
        UserError: if the file is damaged.
    """
    path = audio.with_suffix(".npz")
    if not path.is_file():
        return None, None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("codes", "order") if name in file}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{path}: its codes are unreadable ({error})") from error
    return arrays.get("codes"), arrays.get("order")
