"""Creates the report of a training run from its folder."""

import csv
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from magnet_train.common.errors import UserError
from magnet_train.common.json_files import read_json
from magnet_train.common.yaml_files import flatten, read_yaml
from magnet_train.evaluation.charts import Point
from magnet_train.evaluation.page import read_sound
from magnet_train.evaluation.report import Report, ReportClip, load_grids
from magnet_train.evaluation.scorer import CODEC_FOLDER

REAL = "real, through the codec"
"""Column of the codec's reconstructions of real clips: the best that the model can reach."""
_HEADLINES = (
    "val/fad",
    "val/kl",
    "val/text",
    "val/music",
    "val/ce",
    "val/accuracy",
    "train/loss",
    "val",
    "train",
)


def report_from_run(run_folder: str | Path) -> Report:
    """The report of a training run: validation clips, curves and settings.

    Reads `validation/step_*/records.json`; `NAME.wav` with `NAME.json` (prompt, seed, …; `score` is
    the clip's score) and, if it exists, `NAME.npz` with the arrays `codes` and `order`; all
    versions of `*/version_*/metrics.csv` of Lightning's CSVLogger; and `config.yaml`. Missing or
    damaged files become notes in the report.

    Raises:
        UserError: if the folder does not exist.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a training run")
    notes: list[str] = []
    clips = validation_clips(folder, notes)
    curves = _logged_curves(folder, notes)
    settings = _configured(folder, notes)
    name = settings.get("trainer.default_root_dir") or folder.resolve().name
    title = f"Run {Path(str(name)).name}"
    records = _saved_records(folder, notes)
    for record in records:
        _add_comparisons(record, curves)
    return Report(title, settings, clips, curves, records, notes, "FAD of the single clip")


def validation_clips(
    folder: Path, notes: list[str], steps: Collection[int] | None = None
) -> list[dict[str, ReportClip]]:
    """Clips of the validations at `steps` (default: all): one entry per prompt, with the real clip
    as the codec renders it and generated clips by step. What is missing is added to `notes`."""
    rows: dict[str, dict[str, ReportClip]] = {}
    clips: list[ReportClip] = []
    # Names that start with a dot are left by an interrupted write.
    paths = folder.glob("validation/step_*/[!.]*.wav")
    for path in sorted(paths, key=lambda path: (path.name, path.parent.name)):
        step = _number_in(path.parent)
        if steps is not None and step not in steps:
            continue
        if (clip := _read_clip(path, notes)) is None:
            continue
        if path.stem not in rows:
            real = path.parent.parent / CODEC_FOLDER / path.name
            found = _read_clip(real, notes) if real.is_file() else None
            rows[path.stem] = {} if found is None else {REAL: found}
        rows[path.stem][f"step {step}"] = clip
        clips.append(clip)
    without_codes = sum(clip.codes is None and clip.order is None for clip in clips)
    if not clips:
        notes.append("No clips: the run folder has no validation/step_*/*.wav.")
    elif without_codes:
        notes.append(
            f"{without_codes} of {len(clips)} clips are shown without codes and order of "
            "unmasking: there is no .npz next to the audio."
        )
    return list(rows.values())


def _read_clip(path: Path, notes: list[str]) -> ReportClip | None:
    """A clip with its JSON and codes; None, and a note, if the audio is unreadable."""
    place = f"{path.parent.name}/{path.name}"
    try:
        read_sound(path)
    except UserError as error:
        notes.append(f"{place} is skipped: {str(error).removeprefix(f'{path}: ')}")
        return None
    about = _read_json_object(path.with_suffix(".json"))
    if about is None:
        notes.append(
            f"{place}: no readable JSON next to it, so its file name is used as the caption"
        )
        about = {"prompt": path.stem}
    codes = order = None
    try:
        codes, order = load_grids(path)
    except UserError as error:
        notes.append(f"{place}: {str(error).removeprefix(str(path.with_suffix('.npz')) + ': ')}")
    score = about.pop("score", None)
    if not isinstance(score, int | float) or not math.isfinite(score):
        score = None
    caption = str(about.pop("prompt", path.stem))
    return ReportClip(
        path, caption, codes, order, None if score is None else float(score), _settings(about)
    )


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are not None, with dotted names."""
    return {name: value for name, value in flatten(values) if value is not None}


def _read_json_object(path: Path) -> dict[str, Any] | None:
    try:
        about = read_json(path)
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) else None


def _logged_curves(folder: Path, notes: list[str]) -> dict[str, list[Point]]:
    """Curves from all versions of the log; at equal steps the later version is used. `NAME_ci95` is
    the interval of NAME."""
    found: dict[str, dict[float, float]] = {}
    skipped: dict[str, int] = {}
    files = sorted(folder.glob("*/version_*/metrics.csv"), key=lambda file: _number_in(file.parent))
    for path in files:
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except (OSError, ValueError, csv.Error) as error:
            notes.append(f"{path.relative_to(folder)} is skipped: {error}")
            continue
        for row in rows:
            _add_row(row, found, skipped)
    if not files:
        notes.append("No curves: the run folder has no metrics.csv of a CSVLogger.")
    for name, count in skipped.items():
        values = "1 value that is" if count == 1 else f"{count} values that are"
        notes.append(f"{name}: {values} not finite, skipped")
    return {
        name: _with_interval(name, found)
        for name in sorted(found, key=_rank)
        if not _is_interval(name, found)
    }


def _number_in(folder: Path) -> int:
    """The number in a folder's name, such as step_000800."""
    return int(re.sub(r"\D", "", folder.name) or 0)


def _add_row(
    row: Mapping[str, Any], found: dict[str, dict[float, float]], skipped: dict[str, int]
) -> None:
    """Add the values of one row of the log; counts values that are not finite."""
    step = _float(row.get("step"))
    for name, cell in row.items():
        if step is None or name in ("step", "epoch", None) or cell in (None, ""):
            continue
        value = _float(cell)
        if value is None:
            skipped[name] = skipped.get(name, 0) + 1
        else:
            found.setdefault(name, {})[step] = value


def _is_interval(name: str, found: Mapping[str, Any]) -> bool:
    return name.endswith("_ci95") and name.removesuffix("_ci95") in found


def _with_interval(name: str, found: Mapping[str, Mapping[float, float]]) -> list[Point]:
    half = found.get(f"{name}_ci95", {})
    points: list[Point] = []
    for step, value in sorted(found[name].items()):
        if step in half:
            points.append((step, value, value - half[step], value + half[step]))
        else:
            points.append((step, value, None, None))
    return points


def _rank(name: str) -> tuple[int, int, str]:
    """Sort key: main metrics first, curves by mask rate and the number of clips last."""
    first = next(
        (i for i, start in enumerate(_HEADLINES) if name.startswith(start)), len(_HEADLINES)
    )
    group = 2 if name == "val/num_clips" else int("/rate" in name)
    return group, first, name


def _float(cell: Any) -> float | None:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _configured(folder: Path, notes: list[str]) -> dict[str, Any]:
    try:
        config = read_yaml(folder / "config.yaml", "config.yaml")
    except UserError:
        config = None
    if not isinstance(config, dict):
        notes.append("No settings: the run folder has no readable config.yaml.")
        return {}
    return _settings(config)


def _add_comparisons(record: dict[str, Any], curves: Mapping[str, Sequence[Point]]) -> None:
    """Add a metric's value before training and its unigram baseline, where they were logged."""
    name = f"val/{record['metric']}"
    if (points := curves.get(name)) and points[0][0] == 0 and len(points) > 1:
        record["before"] = points[0][1]
    if points := curves.get(f"{name}/baseline_unigram"):
        record["baseline_unigram"] = points[-1][1]


def _saved_records(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The records of the last validation that wrote some."""
    files = sorted(folder.glob("validation/step_*/records.json"))
    if not files:
        return []
    try:
        return [dict(record) for record in read_json(files[-1]) if "metric" in record]
    except (OSError, ValueError, TypeError) as error:
        notes.append(f"The records of {files[-1].parent.name} are damaged ({error}) and not shown.")
        return []
