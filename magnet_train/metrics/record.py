"""Records: metrics with their protocol, and tables of comparable records."""

import datetime
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import magnet_train
from magnet_train.common import tables
from magnet_train.common.errors import UserError
from magnet_train.common.folders import write_json
from magnet_train.common.json_files import read_json
from magnet_train.metrics.published import Published

MIN_CLIPS = 250
"""Tables warn below this: with 256 clips of 19 windows, the bias of FAD is 2.6 % of the windows'
total variance."""

PROTOCOL = (
    *("metric", "convention", "embedder", "embedder_hash", "resampler", "windowing", "level"),
    "reference_hash",
)
"""Fields that must agree in comparable records."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One metric of one system.

    Raises:
        UserError: if the value, its interval or a baseline is not finite, or there are no clips.
    """

    system: str
    """Checkpoint, release or folder that was scored."""
    metric: str
    """METRIC/EMBEDDER: "fad/vggish", "kl/passt", "text/clap"."""
    value: float
    embedder: str
    """Id of the network."""
    embedder_hash: str
    """Hash of its weights."""
    resampler: str
    """Name of the resampler, for clips with another sample rate than the network's."""
    windowing: str
    """Length and hop of the windows, such as "1 s every 0.5 s"."""
    num_clips: int
    num_windows: int
    level: str = "as it is"
    """Level of the embedded clips: "as it is", or for example "generated mono at -14 LUFS"."""
    convention: str | None = None
    """Convention of KL, a name of `kl.CONVENTIONS`."""
    reference_hash: str | None = None
    """Hash of the reference set (`hash_of_ids`); None for a metric without a reference."""
    decoding: dict[str, Any] | None = None
    """Decoding settings; None for audio that was not decoded here."""
    seed: int | None = None
    """Seed of the decoding noise."""
    interval: tuple[float, float] | None = None
    """95 % interval over clips; None for a single clip."""
    baseline_real: float | None = None
    """The same metric for other real clips."""
    baseline_codec: float | None = None
    """The same metric for the codec's reconstructions of real clips, an upper bound for models."""
    details: dict[str, float] | None = None
    """Further numbers, such as the R² of an extrapolation."""
    clipped_share: float | None = None
    """Mean share of clipped samples in the embedded clips, 0 to 1; None if not measured."""
    sample_rates: tuple[int, ...] = ()
    """Sample rates of the clips, in Hz."""
    published_protocol: str | None = None
    """Set only if a published protocol was followed with the complete set, e.g.
    "audiocraft/MusicCaps"."""
    version: str = magnet_train.__version__
    """Version of this package."""
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())

    def __post_init__(self) -> None:
        # Types as in JSON, so that records are equal after writing and reading.
        if self.interval is not None:
            low, high = self.interval
            object.__setattr__(self, "interval", (low, high))
        object.__setattr__(self, "sample_rates", tuple(self.sample_rates))
        object.__setattr__(self, "decoding", json.loads(json.dumps(self.decoding)))
        numbers = [
            self.value,
            *(self.interval or ()),
            self.baseline_real,
            self.baseline_codec,
            self.clipped_share,
        ]
        for number in numbers:
            if number is not None and not math.isfinite(number):
                raise UserError(
                    f"{self.metric} of {self.system}: metric is {number}; check the audio"
                )
        if self.num_clips < 1 or self.num_windows < 1:
            raise UserError(
                f"{self.metric} of {self.system}: {self.num_clips} clips, {self.num_windows} "
                "windows"
            )

    @property
    def protocol(self) -> dict[str, Any]:
        """Fields that must agree in comparable records; for FAD including the number of clips."""
        more = ("num_clips",) if self.metric.split("/")[0] == "fad" else ()
        return {name: getattr(self, name) for name in (*PROTOCOL, *more)}


def compare(records: Sequence[Record], force: bool = False) -> list[str]:
    """Differences in protocol between the first record and the others, one sentence each.

    Raises:
        UserError: if there is a difference, unless `force`.
    """
    differences = []
    for record in records[1:]:
        first = records[0].protocol
        for name, value in record.protocol.items():
            if first.get(name) != value:
                differences.append(
                    f"{records[0].system} and {record.system}: {records[0].metric} differs in "
                    f"{name}, {first.get(name)!r} and {value!r}"
                )
    if differences and not force:
        raise UserError(f"{differences[0]}; score both in the same way, or use --force true")
    return differences


def write_records(path: str | Path, records: Sequence[Record]) -> None:
    """Write records as a JSON list."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [asdict(record) for record in records])


def read_records(path: str | Path) -> list[Record]:
    """Read records written by `write_records`.

    Raises:
        UserError: if the file is missing or damaged, or has unknown fields.
    """
    try:
        rows = read_json(Path(path))
        known = {f.name for f in fields(Record)}
        for row in rows:
            if unknown := row.keys() - known:
                raise UserError(
                    f"{path}: unknown field {min(unknown)}; it was written by another version"
                )
        return [Record(**row) for row in rows]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: missing or not a list of records ({error}); score again"
        ) from error


def markdown_table(
    records: Sequence[Record], force: bool = False, published: Iterable[Published] = ()
) -> str:
    """A Markdown table with a row per system and a column per metric with its 95 % interval;
    warnings follow.

    Baselines have their own rows, and so have `published` values with the same protocol and set as
    all records of their metric.

    Raises:
        UserError: for records that cannot be compared, unless `force`, which adds a note; and for
            two records of one system and metric.
    """
    columns = _columns(records)
    notes = []
    for column in columns.values():
        notes += [f"Not comparable: {line}." for line in compare(list(column.values()), force)]
    rows = [*_system_rows(records, columns), *_baseline_rows(columns)]
    published_rows, sources = _published_rows(columns, published)
    rows += published_rows
    notes += [f"Published: {source}." for source in sources]
    notes += _warnings(records)
    table = tables.markdown_table(["system", "clips", *columns], rows)
    return "\n".join([table, *(f"\n{note}" for note in notes)]) + "\n"


_Columns = dict[str, dict[str, Record]]
"""Records by metric and system."""


def _columns(records: Sequence[Record]) -> _Columns:
    columns: _Columns = {}
    for record in records:
        column = columns.setdefault(record.metric, {})
        if record.system in column:
            raise UserError(
                f"{record.system} has two records of {record.metric}: give the systems different "
                "names"
            )
        column[record.system] = record
    return columns


def _system_rows(records: Sequence[Record], columns: _Columns) -> list[list[str]]:
    rows = []
    for system in dict.fromkeys(record.system for record in records):
        cells = [_cell(column.get(system)) for column in columns.values()]
        counts = dict.fromkeys(
            f"{column[system].num_clips:,}" for column in columns.values() if system in column
        )
        rows.append([system, " / ".join(counts), *cells])
    return rows


def _cell(record: Record | None) -> str:
    if record is None:
        return ""
    interval = (
        "" if record.interval is None else f" [{record.interval[0]:.3f}, {record.interval[1]:.3f}]"
    )
    return f"{record.value:.3f}{interval}"


def _baseline_rows(columns: _Columns) -> list[list[str]]:
    """Rows of the baselines that records have."""
    rows = []
    for title, baseline in (
        ("real clips", "baseline_real"),
        ("codec reconstruction (ceiling)", "baseline_codec"),
    ):
        cells = [
            _range([getattr(r, baseline) for r in column.values()]) for column in columns.values()
        ]
        if any(cells):
            rows.append([title, "", *cells])
    return rows


def _range(values: Iterable[float | None]) -> str:
    """The range of values, or a single value if they agree."""
    known = [value for value in values if value is not None]
    return " to ".join(dict.fromkeys(f"{v:.3f}" for v in (min(known), max(known)))) if known else ""


def _published_rows(
    columns: _Columns, published: Iterable[Published]
) -> tuple[list[list[str]], list[str]]:
    """Rows of comparable published results, and their sources."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for figure in published:
        column = columns.get(figure.metric, {})
        if column and all(
            record.published_protocol == figure.protocol for record in column.values()
        ):
            found.setdefault((figure.model, figure.source), {})[figure.metric] = (
                f"{figure.value:.2f}"
            )
    rows = []
    for (model, _), values in found.items():
        rows.append([f"{model} (published)", "", *(values.get(metric, "") for metric in columns)])
    return rows, list(dict.fromkeys(source for _, source in found))


def _warnings(records: Sequence[Record]) -> list[str]:
    """Warnings for numbers of clips that are too small for FAD."""
    fewest: dict[str, int] = {}
    for record in records:
        fewest[record.system] = min(record.num_clips, fewest.get(record.system, record.num_clips))
    lines = []
    for number in dict.fromkeys(n for n in fewest.values() if n < MIN_CLIPS):
        systems = ", ".join(system for system, n in fewest.items() if n == number)
        lines.append(
            f"Warning: {systems}: {number} clips; below {MIN_CLIPS}, FAD is strongly biased "
            "upwards and intervals are wide."
        )
    return lines
