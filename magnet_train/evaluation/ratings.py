"""Analysis of a listening test: a table with intervals from the raters' CSV files and the key.

The files are untrusted: invalid content is a one-line error.
"""

import csv
import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from magnet_train.common.errors import UserError
from magnet_train.common.tables import markdown_table
from magnet_train.evaluation.listening_test import PLAYED_SHARE
from magnet_train.metrics.intervals import bootstrap_interval

COLUMNS = ("rater", "trial", "blinded_id", "question", "rating", "seconds_listened", "order")
MAX_BYTES = 1 << 26
"""Size of a key or of a rater's file."""
MIN_REFERENCE = 85
"""Expected minimum quality rating of the hidden reference, 1 to 100; BS.1534 uses 90."""
MAX_SHARE = 0.15
"""Maximum share of references rated below that, as in BS.1534, and of ratings without listening;
more exclude a rater."""
MIN_ANSWERED = 0.5
"""Minimum share of clips that a rater must have rated."""
ROUNDING_S = 0.01
"""The page rounds seconds to two decimals."""


@dataclass(frozen=True)
class SystemRating:
    """Ratings of one system on one question."""

    system: str
    question: str
    """`quality` or `relevance`."""
    mean: float
    """Mean of all counted ratings, 1 to 100."""
    interval: tuple[float, float] | None
    """95 % interval; None for a single rater."""
    num_ratings: int
    """Number of counted ratings."""


@dataclass(frozen=True)
class RatingsTable:
    """Result of a listening test."""

    title: str
    """Title of the test."""
    rows: tuple[SystemRating, ...]
    """One per system and question; systems by decreasing quality."""
    dropped: Mapping[str, str]
    """Reasons for excluding raters, by rater."""
    num_unplayed: int
    """Ratings ignored because the clip was not played to its end, without excluded raters'."""
    protocol: str
    """How the values were computed, in one sentence."""

    def to_markdown(self) -> str:
        """The table, the protocol and the excluded raters."""
        questions = list(dict.fromkeys(row.question for row in self.rows))
        cells = {(row.system, row.question): row for row in self.rows}
        rows = []
        for system in dict.fromkeys(row.system for row in self.rows):
            found = [cells[system, question] for question in questions]
            counts = " + ".join(str(row.num_ratings) for row in found)
            rows.append([system, *(_format(row) for row in found), counts])
        parts = [
            f"# {self.title}",
            markdown_table(["system", *questions, "ratings"], rows),
            self.protocol,
        ]
        if self.num_unplayed:
            parts.append(
                "Ratings that do not count because the clip was not played to its end: "
                f"{self.num_unplayed}."
            )
        if self.dropped:
            parts.append(
                "\n".join(
                    f"- dropped: {rater} ({reason})" for rater, reason in self.dropped.items()
                )
            )
        return "\n\n".join(parts) + "\n"


def _format(row: SystemRating) -> str:
    if row.interval is None:
        return f"{row.mean:.1f} (one rater)"
    low, high = row.interval
    return f"{row.mean:.1f} [{low:.1f}, {high:.1f}]"


def analyse_ratings(
    csv_files: Sequence[str | Path],
    key: str | Path,
    num_draws: int = 2000,
    seed: int = 0,
) -> RatingsTable:
    """Mean and 95 % interval of every system on every question.

    The ratings of one rater are not independent, so the interval is a percentile bootstrap over
    raters (Davison and Hinkley, "Bootstrap Methods", 1997, ch. 3.8). It covers other raters for
    these captions, but not other captions. With fewer than about ten raters it is too narrow.

    Args:
        csv_files: one per rater.
        key: JSON written by `export_listening_test` next to the page.
        num_draws: number of bootstrap samples.
        seed: seed of the bootstrap.

    Raises:
        UserError: if a file is not part of this test, a rater is repeated, a rating is not an
            integer from 1 to 100, a system has no rating, or no rater is left.
    """
    answers = _read_key(Path(key))
    by_rater = _read_raters([Path(f) for f in csv_files], answers)
    _check_complete(answers, by_rater, "has no rating in any file")
    kept: dict[str, list[_Rating]] = {}
    dropped: dict[str, str] = {}
    num_unplayed = 0
    for rater, ratings in by_rater.items():
        played = [
            r
            for r in ratings
            if r.seconds >= PLAYED_SHARE * answers.seconds[r.blinded_id] - ROUNDING_S
        ]
        reason = _reason_to_drop(answers, ratings, played)
        if reason:
            dropped[rater] = reason
        else:
            kept[rater] = played
            num_unplayed += len(ratings) - len(played)
    if not kept:
        reasons = "; ".join(f"{rater} {reason}" for rater, reason in dropped.items())
        raise UserError(f"no rater is left: {reasons}; ask more raters")
    _check_complete(answers, kept, "has no rating from the raters kept")
    raters = "1 rater" if len(kept) == 1 else f"{len(kept)} raters"
    protocol = (
        f"Mean of {raters} on a scale from 1 to 100, [95 % interval] by bootstrap over raters "
        f"({num_draws} draws, seed {seed}); study {answers.study}, {answers.num_trials} captions, "
        "the clips of a caption at one loudness."
    )
    rows = _rows(answers, kept, num_draws, seed)
    return RatingsTable(answers.title, rows, dropped, num_unplayed, protocol)


@dataclass(frozen=True)
class _Rating:
    blinded_id: str
    question: str
    rating: int
    seconds: float


@dataclass(frozen=True)
class _Key:
    """The content of a key file, after checking it."""

    study: str
    title: str
    questions: tuple[str, ...]
    reference: str | None
    systems: tuple[str, ...]
    system: Mapping[str, str]
    """System by blinded id."""
    seconds: Mapping[str, float]
    """Length of the clip by blinded id."""
    num_trials: int


def _read_key(path: Path) -> _Key:
    """Read and check the key.

    Raises:
        UserError: if it is unreadable, or not the key of a listening test.
    """
    try:
        about = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}: not JSON ({reason}); give the _key.json of the page") from error
    try:
        return _parse_key(about)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path}: not the key of a listening test; give the _key.json of the page"
        ) from error


def _parse_key(about: Any) -> _Key:
    clips = {str(key): dict(clip) for key, clip in about["clips"].items()}
    systems = tuple(about["systems"])
    seconds = {key: float(clip["seconds"]) for key, clip in clips.items()}
    names = [about["study"], about["title"], *about["questions"], *systems]
    if about["reference"] is not None:
        names.append(about["reference"])
    holds = {
        "no list is empty": all(map(bool, (clips, systems, about["questions"]))),
        "names are text": all(isinstance(name, str) for name in names),
        "clips are of these systems": {c["system"] for c in clips.values()} == set(systems),
        "durations are positive": all(0 < value < math.inf for value in seconds.values()),
    }
    if not all(holds.values()):
        raise ValueError(f"not so: {min(holds, key=holds.__getitem__)}")
    return _Key(
        study=about["study"],
        title=about["title"],
        questions=tuple(about["questions"]),
        reference=about["reference"],
        systems=systems,
        system={key: clip["system"] for key, clip in clips.items()},
        seconds=seconds,
        num_trials=len({int(clip["trial"]) for clip in clips.values()}),
    )


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():  # opening a named pipe would block
            raise UserError(f"{path}: no such file")
        if path.stat().st_size > MAX_BYTES:
            raise UserError(
                f"{path}: larger than {MAX_BYTES:,} bytes; not a file of a listening test"
            )
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: unreadable ({error}); save it again as UTF-8") from error


def _read_raters(files: Sequence[Path], answers: _Key) -> dict[str, list[_Rating]]:
    """Ratings by rater."""
    if not files:
        raise UserError("csv_files=[]: no ratings; give the CSV files of the raters")
    by_rater: dict[str, list[_Rating]] = {}
    origin: dict[str, Path] = {}
    for path in dict.fromkeys(files):
        for line, row in enumerate(_read_rows(path), 2):
            rater = row["rater"]
            if origin.setdefault(rater, path) != path:
                raise UserError(
                    f"{path}: rater {rater!r} is already in {origin[rater]}; keep only the later "
                    "file"
                )
            by_rater.setdefault(rater, []).append(
                _parse_rating(row, f"{path} line {line}", answers)
            )
    for rater, ratings in by_rater.items():
        [((blinded_id, question), count)] = Counter(
            (r.blinded_id, r.question) for r in ratings
        ).most_common(1)
        if count > 1:
            raise UserError(
                f"{origin[rater]}: rater {rater!r} rated {blinded_id} ({question}) {count} times; "
                "keep one"
            )
    return by_rater


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), restval="")
        header = reader.fieldnames or []
        rows = list(reader)
    except csv.Error as error:
        raise UserError(f"{path}: unreadable ({error}); ask the rater to save it again") from error
    if missing := [column for column in COLUMNS if column not in header]:
        raise UserError(
            f"{path}: not a CSV of a listening test, the column {missing[0]!r} is missing"
        )
    if not rows:
        raise UserError(f"{path}: has no ratings; remove it")
    return rows


def _parse_rating(row: Mapping[str, str], place: str, answers: _Key) -> _Rating:
    if row["blinded_id"] not in answers.system or row["question"] not in answers.questions:
        raise UserError(
            f"{place}: {row['blinded_id']} ({row['question']}) is not in this study; give the key "
            "of the rated page"
        )
    rating = row["rating"].strip()
    if not re.fullmatch(r"[1-9][0-9]?|100", rating):
        raise UserError(
            f"{place}: rating={rating!r} must be a whole number from 1 to 100; repair or remove "
            "the line"
        )
    try:
        seconds = float(row["seconds_listened"])
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(
            f"{place}: seconds_listened={row['seconds_listened']!r} must be a number of seconds"
        )
    return _Rating(row["blinded_id"], row["question"], int(rating), seconds)


def _reason_to_drop(answers: _Key, ratings: Sequence[_Rating], played: Sequence[_Rating]) -> str:
    """Why a rater is excluded; empty if not."""
    expected = len(answers.system) * len(answers.questions)
    references = [
        r.rating
        for r in played
        if r.question == "quality" and answers.system[r.blinded_id] == answers.reference
    ]
    low = sum(rating < MIN_REFERENCE for rating in references)
    unplayed = len(ratings) - len(played)
    if len(ratings) < MIN_ANSWERED * expected:
        return f"gave {len(ratings)} of {expected} ratings"
    if unplayed > MAX_SHARE * len(ratings):
        return f"did not play {unplayed} of {len(ratings)} rated clips to their end"
    if low > MAX_SHARE * len(references):
        return f"rated {low} of {len(references)} hidden references below {MIN_REFERENCE}"
    return ""


def _check_complete(answers: _Key, by_rater: Mapping[str, Sequence[_Rating]], lack: str) -> None:
    rated = {
        (answers.system[r.blinded_id], r.question) for ratings in by_rater.values() for r in ratings
    }
    for system, question in itertools.product(answers.systems, answers.questions):
        if (system, question) not in rated:
            raise UserError(f"system {system!r} {lack} ({question}); collect more ratings")


def _rows(
    answers: _Key, kept: Mapping[str, Sequence[_Rating]], num_draws: int, seed: int
) -> tuple[SystemRating, ...]:
    rows = []
    for place in itertools.product(answers.systems, answers.questions):
        by_rater = [
            [r.rating for r in ratings if (answers.system[r.blinded_id], r.question) == place]
            for ratings in kept.values()
        ]
        values = [torch.tensor(ratings, dtype=torch.float64) for ratings in by_rater]
        is_shared = sum(map(bool, by_rater)) > 1
        interval = bootstrap_interval(values, num_draws, seed) if is_shared else None
        total = torch.cat(values)
        mean = total.mean().item()
        rows.append(SystemRating(*place, mean, interval, len(total)))
    first = answers.questions[0]
    quality = {row.system: row.mean for row in rows if row.question == first}
    # Stable: questions keep their order.
    return tuple(sorted(rows, key=lambda row: -quality[row.system]))
