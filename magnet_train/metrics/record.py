"""A figure with its protocol: what was measured, with which network, on what, and what it may be compared with."""

import datetime
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import magnet_train
from magnet_train.common.errors import UserError
from magnet_train.metrics.published import Published

FEWEST_CLIPS = 250
"""At 256 clips of 19 windows FAD lies 2.6 % of the windows' total variance above that of endless clips; below, more."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One figure of one system.

    Raises:
        UserError: if the value or an end of its interval is NaN or infinite, or there is no clip.
    """

    system: str
    """What was scored: a checkpoint, a release, a folder."""
    metric: str
    """Its key: "fad/vggish", "kl/passt", "clap"."""
    value: float
    embedder: str
    """Id of the network."""
    embedder_hash: str
    """Of its weights."""
    resampler: str
    """Name of the one in use where a clip's rate is another than the network's."""
    windowing: str
    """Length and hop, as in "1 s every 0.5 s"."""
    num_clips: int
    num_windows: int
    level: str = "as it is"
    """What was done to the level: "as it is", or as in "generated -14 LUFS"."""
    convention: str | None = None
    """Of KL, a name of `kl.CONVENTIONS`."""
    reference_hash: str | None = None
    """Names the reference set (`hash_of_ids`); None for a metric that has none."""
    decoding: dict[str, Any] | None = None
    """Settings of the decoding; None for audio that was not decoded here."""
    seed: int | None = None
    """Of the decoding noise."""
    interval: tuple[float, float] | None = None
    """95 % over clips; None where there is but one."""
    floor_real: float | None = None
    """The same metric of other real clips."""
    floor_codec: float | None = None
    """The same metric of the codec's reconstruction of real clips: what a perfect model would reach."""
    details: dict[str, float] | None = None
    """What belongs to the figure, such as the R² of an extrapolation."""
    sample_rates: tuple[int, ...] = ()
    """Of the clips, in Hz."""
    published_protocol: str | None = None
    """Set only if a published recipe was followed in full, its set included, as in "audiocraft/MusicCaps"."""
    version: str = magnet_train.__version__
    """Of this package."""
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())

    def __post_init__(self) -> None:
        if self.interval is not None:  # a list, where JSON was read
            low, high = self.interval
            object.__setattr__(self, "interval", (low, high))
        object.__setattr__(self, "sample_rates", tuple(self.sample_rates))
        # What JSON makes of it, so that a record read is equal to the one written.
        object.__setattr__(self, "decoding", json.loads(json.dumps(self.decoding)))
        for number in (self.value, *(self.interval or ()), self.floor_real or 0.0, self.floor_codec or 0.0):
            if not math.isfinite(number):
                raise UserError(f"{self.metric} of {self.system}: {number} is no figure; look at the audio")
        if self.num_clips < 1 or self.num_windows < 1:
            raise UserError(f"{self.metric} of {self.system}: {self.num_clips} clips, {self.num_windows} windows")

    @property
    def protocol(self) -> dict[str, Any]:
        """What two records must share to be comparable; for FAD the number of clips too, since FAD falls with it."""
        names = ["metric", "convention", "embedder", "embedder_hash", "resampler", "windowing", "level"]
        names += ["reference_hash"] + ["num_clips"] * (self.metric.split("/")[0] == "fad")
        return {name: getattr(self, name) for name in names}


def compare(records: Sequence[Record], force: bool = False) -> list[str]:
    """What keeps records from being compared with the first, a sentence each; empty if nothing does.

    Raises:
        UserError: with the first such sentence, unless forced.
    """
    differences = []
    for record in records[1:]:
        first = records[0].protocol
        for name, value in record.protocol.items():
            if first.get(name) != value:
                differences.append(
                    f"{records[0].system} and {record.system}: {records[0].metric} differs in {name}, "
                    f"{first.get(name)!r} and {value!r}"
                )
    if differences and not force:
        raise UserError(f"{differences[0]}; score both alike, or force the comparison")
    return differences


def write_records(path: str | Path, records: Sequence[Record]) -> None:
    """A JSON list of records; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps([asdict(record) for record in records], indent=2) + "\n")
    os.replace(partial, path)


def read_records(path: str | Path) -> list[Record]:
    """Those that `write_records` wrote.

    Raises:
        UserError: if the file is missing or broken, or holds other fields.
    """
    try:
        rows = json.loads(Path(path).read_text())
        known = {f.name for f in fields(Record)}
        for row in rows:
            if unknown := row.keys() - known:
                raise UserError(f"{path}: unknown field {min(unknown)}; it was written by another version")
        return [Record(**row) for row in rows]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: missing or no list of records ({error}); score again") from error


def markdown_table(records: Sequence[Record], force: bool = False, published: Iterable[Published] = ()) -> str:
    """Markdown: a row per system, a column per metric with its 95 % interval, the number of clips; then warnings.

    Floors follow as rows of their own, then figures of `published` whose protocol and set are those of all records
    of their metric.

    Raises:
        UserError: for records of one metric that cannot be compared, unless forced; then the table says so. Also
            for two records of one system and metric, and for none.
    """
    if not records:
        raise UserError("no records to tabulate: score a system first")
    columns: dict[str, dict[str, Record]] = {}
    for record in records:
        column = columns.setdefault(record.metric, {})
        if record.system in column:
            raise UserError(f"{record.system} has two records of {record.metric}: name the systems apart")
        column[record.system] = record
    notes = [f"Not comparable: {line}." for c in columns.values() for line in compare(list(c.values()), force)]

    def counts(some: Iterable[Record]) -> str:
        return " / ".join(dict.fromkeys(f"{r.num_clips:,}" for r in some))

    rows = [["system", "clips", *columns]]
    for system in dict.fromkeys(r.system for r in records):
        cells = [_cell(c[system]) if system in c else "" for c in columns.values()]
        rows.append([system, counts(c[system] for c in columns.values() if system in c), *cells])
    for name, floor in (("real clips", "floor_real"), ("codec reconstruction", "floor_codec")):
        cells = [_floor(c.values(), floor) for c in columns.values()]
        if any(cells):
            rows.append([name, "", *cells])
    theirs: dict[tuple[str, str], dict[str, str]] = {}
    for figure in published:
        for metric, column in columns.items():
            same = all(r.published_protocol == figure.protocol for r in column.values())
            if same and metric == figure.metric:
                theirs.setdefault((figure.model, figure.source), {})[metric] = f"{figure.value:.2f}"
    rows += [[f"{model} (published)", "", *(v.get(m, "") for m in columns)] for (model, _), v in theirs.items()]
    notes += [f"Published: {source}." for source in dict.fromkeys(source for _, source in theirs)]
    fewest = {
        system: min(r.num_clips for r in records if r.system == system)
        for system in dict.fromkeys(r.system for r in records)
    }
    for number in dict.fromkeys(n for n in fewest.values() if n < FEWEST_CLIPS):
        systems = ", ".join(system for system, n in fewest.items() if n == number)
        notes.append(
            f"Warning: {systems}: {number} clips; below {FEWEST_CLIPS} FAD lies well above its value for many clips, "
            "and intervals are wide."
        )
    return "\n".join([*_aligned(rows), *(f"\n{note}" for note in notes)]) + "\n"


def _cell(record: Record) -> str:
    interval = "" if record.interval is None else f" [{record.interval[0]:.3f}, {record.interval[1]:.3f}]"
    return f"{record.value:.3f}{interval}"


def _floor(column: Iterable[Record], floor: str) -> str:
    """The lowest and highest of a column, in one number where they agree: systems of one protocol share a floor."""
    found: list[float] = [getattr(r, floor) for r in column if getattr(r, floor) is not None]
    return " to ".join(dict.fromkeys(f"{v:.3f}" for v in (min(found), max(found)))) if found else ""


def _aligned(rows: list[list[str]]) -> list[str]:
    rows = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    sides = [str.ljust] + [str.rjust] * (len(widths) - 1)
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    lines = []
    for row in rows:
        padded = [side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    return [lines[0], rule, *lines[1:]]
