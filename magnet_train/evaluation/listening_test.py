"""A listening test that anyone can run: one HTML file to hand out, one key to keep, CSV files to analyse.

Systems are rated side by side for each caption, blind, on two questions and a scale from 1 to 100, with hidden
reference and anchors among them, in the manner of MUSHRA (ITU-R BS.1534). The paper's own study asked the same two
questions; here, too, every clip is brought to -14 LUFS.
"""

import csv
import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from magnet_train.common.audio_files import normalize_loudness
from magnet_train.common.errors import UserError
from magnet_train.data.audio import SUFFIXES
from magnet_train.evaluation.page import audio_uri, read_sound, text, write_page

QUESTIONS = {
    "quality": ("How good does it sound, whatever the text says?", "bad", "excellent"),
    "relevance": ("How well does it match the text?", "not at all", "perfectly"),
}
LOWPASS, MISMATCH = "anchor: low-pass 3.5 kHz", "anchor: other caption"
COLUMNS = ("rater", "trial", "blinded_id", "question", "rating", "seconds_listened", "order")
HEARD_SHARE = 0.95
"""Share of a clip that must have been played before its ratings count."""


@dataclass(frozen=True)
class Study:
    """What was exported."""

    page: Path
    """The HTML file to hand out."""
    key: Path
    """JSON that says which system is behind which id; it stays with who runs the study."""
    size: int
    """Of the page, in bytes."""
    num_trials: int
    """Captions, each a screen of the page."""
    num_clips: int
    """Clips on all screens together, anchors included."""


def export_study(
    systems: str | Path | Mapping[str, Path],
    out: str | Path,
    reference: str | None = "reference",
    title: str = "Listening test",
    lossless: bool = True,
) -> Study:
    """Write a listening test as one HTML file, and its key beside it as `NAME_key.json`.

    Clips belong together by their captions: `prompt` or `caption` in the JSON beside a clip, or the `.txt` beside it.
    On each screen stand all systems' clips for one caption, cut to the shortest of them so that length tells
    nothing, among them the hidden reference and two anchors made of it: low-passed at 3.5 kHz, to tell who hears no
    difference in quality, and the real clip of another caption, to tell who does not read.
    Ids are random and audio carries no tags; the page knows no names of systems or files.

    Args:
        systems: name to a folder of audio files; or a folder whose subfolders are the systems.
        out: of the HTML file.
        reference: name of the system that holds the real clips; None = a study without reference and anchors.
        title: heading of the page.
        lossless: FLAC, so that no encoder is rated; MP3 makes the page a fifth of the size (`page.audio_uri`).

    Raises:
        UserError: if a system lacks a caption or has one twice, audio or captions are unreadable, there are fewer
            captions than the anchors need, or a file cannot be written.
    """
    folders = _system_folders(systems)
    if reference is not None and reference not in folders:
        raise UserError(
            f"reference={reference!r}: no such system among {', '.join(folders)}; name the one that holds the real "
            "clips, or give None for a study without reference and anchors"
        )
    if not set(folders) - {reference}:
        raise UserError(f"{systems}: holds no system beside the reference; add a folder of generated clips")
    files = {name: _clips_by_caption(folder) for name, folder in folders.items()}
    captions = sorted(set().union(*files.values()))
    for name, own in files.items():
        if missing := [caption for caption in captions if caption not in own]:
            raise UserError(
                f"{folders[name]}: no clip for {len(missing)} of {len(captions)} captions, such as {missing[0]!r}; "
                "generate it, or take it out of the other systems"
            )
    if reference is not None and len(captions) < 2:
        raise UserError(f"{systems}: one caption; the anchor of another caption needs two or more")
    others = _mismatched(captions) if reference is not None else {}
    clips: dict[str, dict[str, Any]] = {}
    trials: list[str] = []
    for number, caption in enumerate(captions, 1):
        sounds = {name: read_sound(own[caption]) for name, own in files.items()}
        if reference is not None:
            wav, sample_rate = sounds[reference]
            sounds[LOWPASS] = low_passed(wav, sample_rate), sample_rate
            sounds[MISMATCH] = read_sound(files[reference][others[caption]])
        seconds = min(len(wav) / sample_rate for wav, sample_rate in sounds.values())
        blinded: dict[str, str] = {}
        for name, (wav, sample_rate) in sounds.items():
            blinded_id = secrets.token_hex(5)
            wav = _faded(normalize_loudness(wav[: round(seconds * sample_rate)], sample_rate), sample_rate)
            clips[blinded_id] = {"trial": number, "system": name, "caption": caption, "seconds": round(seconds, 3)}
            blinded[blinded_id] = audio_uri(wav, sample_rate, lossless)
        trials.append(_trial(number, caption, blinded))
    study_id = hashlib.sha256("".join(sorted(clips)).encode()).hexdigest()[:10]
    page = Path(out)
    key = page.with_name(f"{page.stem}_key.json")
    about = {
        "study": study_id,
        "title": title,
        "questions": {name: question for name, (question, _, _) in QUESTIONS.items()},
        "reference": reference,
        "systems": list(dict.fromkeys(clip["system"] for clip in clips.values())),
        "clips": clips,
    }
    size = write_page(page, title, _body(title, study_id, trials, len(clips), reference is not None), "study.js")
    try:
        aside = key.with_name(f".{key.name}")
        aside.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, key)
    except OSError as error:
        raise UserError(f"{key}: cannot be written ({error}); choose another place or free some space") from error
    return Study(page, key, size, len(captions), len(clips))


def low_passed(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Samples `t channels` with nothing above 4 kHz and everything below 3.5 kHz, not delayed.

    Keeps to the low anchor of ITU-R BS.1534-3: 0.1 dB up to 3.5 kHz, at least 25 dB down at 4 kHz.

    Raises:
        UserError: if the rate leaves nothing to take away.
    """
    from scipy.signal import fftconvolve, firwin, kaiserord

    if sample_rate <= 8000:
        raise UserError(f"sample_rate={sample_rate}: the anchor low-passed at 3.5 kHz needs clips above 8 kHz")
    taps, _ = kaiserord(60, 500 / (sample_rate / 2))
    kernel = np.asarray(firwin(taps | 1, 3750, width=500, fs=sample_rate))
    return fftconvolve(wav, kernel[:, None], mode="full", axes=0)[len(kernel) // 2 :][: len(wav)].astype(np.float32)


def _faded(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """With 20 ms of fade at the end, where a cut would click."""
    length = min(len(wav), round(0.02 * sample_rate))
    ramp = np.ones((len(wav), 1), dtype=wav.dtype)
    ramp[len(wav) - length :, 0] = np.linspace(1, 0, length)
    return wav * ramp


def _system_folders(systems: str | Path | Mapping[str, Path]) -> dict[str, Path]:
    if isinstance(systems, Mapping):
        folders = {name: Path(folder) for name, folder in systems.items()}
    else:
        root = Path(systems)
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; give one whose subfolders are the systems")
        folders = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != "."}
        if not folders:
            raise UserError(f"{root}: holds no folders; give one whose subfolders are the systems")
    for name, folder in folders.items():
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder, given for the system {name!r}")
        if name in (LOWPASS, MISMATCH):
            raise UserError(f"system {name!r}: the name of an anchor; choose another")
    return folders


def _clips_by_caption(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        caption = _caption(path)
        if caption in files:
            raise UserError(f"{path}: has the caption of {files[caption].name}, {caption!r}; keep one of them")
        files[caption] = path
    if not files:
        raise UserError(f"{folder}: holds no audio files ({', '.join(SUFFIXES)})")
    return files


def _caption(path: Path) -> str:
    note, sidecar = path.with_suffix(".json"), path.with_suffix(".txt")
    try:
        if note.is_file():
            about = json.loads(note.read_text(encoding="utf-8"))
            about = about if isinstance(about, dict) else {}
            caption = next((about[k] for k in ("prompt", "caption", "description") if about.get(k)), None)
            if caption is not None:
                return str(caption).strip()
        if sidecar.is_file():
            return sidecar.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the caption beside it is unreadable ({error}); repair it") from error
    raise UserError(f"{path}: no caption; put it into {sidecar.name}, or as prompt into {note.name}")


def _mismatched(captions: Sequence[str]) -> dict[str, str]:
    """To each caption another one, all different: moved by the distance at which fewest words are shared."""
    words = [set(caption.lower().split()) for caption in captions]
    n = len(captions)

    def shared(shift: int) -> float:
        pairs = [(words[i], words[(i + shift) % n]) for i in range(n)]
        return sum(len(a & b) / max(1, len(a | b)) for a, b in pairs)

    best = min(range(1, n), key=shared)
    return {caption: captions[(i + best) % n] for i, caption in enumerate(captions)}


# --- The page -------------------------------------------------------------------------------------------------------


def _trial(number: int, caption: str, clips: Mapping[str, str]) -> str:
    """One screen; its clips in the order of their random ids, until the rater's own order is drawn."""
    cards = "\n".join(_card(blinded_id, clips[blinded_id]) for blinded_id in sorted(clips))
    return (
        f'<section class="trial" data-trial="{number}" hidden>\n<h2 tabindex="-1"></h2>\n'
        f'<p class="faint">The text:</p>\n<blockquote class="caption">{text(caption or "(no text)")}</blockquote>\n'
        f"{cards}\n</section>"
    )


def _card(blinded_id: str, source: str) -> str:
    sliders = "".join(
        f'<div class="question"><label for="{name}-{blinded_id}">{text(question)}</label><output>–</output>'
        f'<input type="range" class="untouched" id="{name}-{blinded_id}" data-question="{name}" min="1" max="100" '
        f'value="50" aria-valuetext="not rated yet"><span class="ends"><span>1 {low}</span><span>100 {high}</span>'
        "</span></div>"
        for name, (question, low, high) in QUESTIONS.items()
    )
    return (
        f'<article class="clip" data-id="{blinded_id}">\n<h3></h3>\n<audio controls preload="none" src="{source}">'
        f'</audio>\n{sliders}<p class="state"></p></article>'
    )


def _body(title: str, study_id: str, trials: Sequence[str], num_clips: int, has_anchors: bool) -> str:
    hidden = " Some clips are recordings of real music; some were made worse on purpose." if has_anchors else ""
    each = num_clips // len(trials)
    return f"""<main class="study" data-study="{study_id}" data-heard="{HEARD_SHARE}">
<header><h1>{text(title)}</h1></header>
<section id="welcome">
<p>You will hear {num_clips} short clips, {each} at a time, each time for one text. Please rate every clip from 1 to
100 on two questions, and use the whole scale.{hidden}</p>
<ul>
<li>Wear headphones, in a quiet room, and set a comfortable level with the first clip; all are equally loud.</li>
<li>Play every clip to its end before you rate it: otherwise its rating does not count. Play it again as you like.</li>
<li>Your ratings are kept in this browser. You can stop at any time and go on later under the same name.</li>
<li>At the end you save a CSV file; please send it to who gave you this page. Nothing is sent by itself.</li>
</ul>
<p><label for="rater">Your name, or an id that was given to you</label></p>
<div class="steps"><input type="text" id="rater" autocomplete="off" maxlength="80">
<button type="button" class="main" id="begin">Begin</button></div>
</section>
<progress id="progress" max="{len(trials)}" value="0" aria-label="Screens done" hidden></progress>
{chr(10).join(trials)}
<section id="finish" hidden>
<h2 tabindex="-1">Thank you</h2>
<p>All clips are rated. Save the file and send it to who gave you this page.</p>
</section>
<p class="message" id="message" role="status"></p>
<div class="steps" id="steps" hidden>
<button type="button" id="back">Back</button>
<button type="button" class="main" id="next">Next</button>
<button type="button" id="save">Save what is rated so far (CSV)</button>
</div>
</main>"""


# --- The analysis ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rated:
    """What one system got on one question."""

    system: str
    """Its name, no longer blinded."""
    question: str
    """`quality` or `relevance`."""
    mean: float
    """Of all ratings that count, 1 to 100."""
    interval: tuple[float, float] | None
    """95 %; None where a single rater leaves nothing to resample."""
    num_ratings: int
    """Ratings that count."""
    num_raters: int
    """Raters they come from."""


@dataclass(frozen=True)
class StudyTable:
    """Result of a listening test: a row for each system and question, and who was left out."""

    title: str
    """Of the study."""
    rows: tuple[Rated, ...]
    """Systems by falling quality."""
    num_raters: int
    """Who were kept."""
    dropped: Mapping[str, str]
    """Rater to the reason why none of the ratings count."""
    num_unheard: int
    """Ratings of kept raters that do not count because the clip was not heard to its end."""
    protocol: str
    """How the figures were made, in one sentence."""

    def to_markdown(self) -> str:
        """The table, and below it the raters left out and the protocol."""
        names = list(dict.fromkeys(row.question for row in self.rows))
        cells = {(row.system, row.question): row for row in self.rows}
        lines = [f"# {self.title}", "", f"| system | {' | '.join(names)} | ratings |", "|---" * (len(names) + 2) + "|"]
        for system in dict.fromkeys(row.system for row in self.rows):
            own = [cells[system, name] for name in names]
            values = [f"{r.mean:.1f} {'(one rater)' if r.interval is None else _between(r.interval)}" for r in own]
            name = system.replace("|", "\\|")
            lines.append(f"| {name} | {' | '.join(values)} | {' + '.join(str(r.num_ratings) for r in own)} |")
        lines += ["", self.protocol]
        if self.num_unheard:
            lines.append(f"Not counted, since the clip was not heard to its end: {self.num_unheard} of their ratings.")
        lines += [""] * bool(self.dropped) + [
            f"- left out: {rater} ({reason})" for rater, reason in self.dropped.items()
        ]
        return "\n".join(lines) + "\n"


def _between(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:.1f}, {interval[1]:.1f}]"


def analyse_study(
    csv_files: Sequence[str | Path],
    key: str | Path,
    min_reference: float = 85,
    max_share: float = 0.15,
    min_answered: float = 0.5,
    num_draws: int = 2000,
    seed: int = 0,
) -> StudyTable:
    """Mean and 95 % interval of every system on every question, from the raters' CSV files and the key.

    A rater's ratings hang together (everyone uses the scale in their own way), so the interval resamples raters, with
    all of their ratings, and not ratings: a percentile bootstrap by clusters (Davison and Hinkley, "Bootstrap
    Methods", 1997, ch. 3.8). It says how far other raters would agree about these very captions; other captions are
    not part of it. A mixed model would answer for both, at the price of assuming ratings that run into 1 and 100 to
    be normal. With fewer than about ten raters such intervals come out too narrow.

    Raters are left out whole, and named, in this order: who answered too little; who skipped over clips; who rated
    the hidden reference low (BS.1534 leaves out at 90 and 15 %).

    Args:
        csv_files: one for each rater.
        key: JSON that `export_study` wrote beside the page.
        min_reference: quality below which a rating of the hidden reference counts against the rater, 1 to 100.
        max_share: of the references rated below that, and of ratings without listening, that a rater may have.
        min_answered: share of all ratings asked for that a rater must have given.
        num_draws: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        UserError: if a file is no CSV of this study, a rater comes twice, a rating is no whole number from 1 to 100,
            a system has no rating, or no rater is left.
    """
    about = _read_key(Path(key))
    clips: dict[str, dict[str, Any]] = about["clips"]
    by_rater = _read_raters([Path(f) for f in csv_files], clips, about["questions"])
    _check_complete(about, [r for ratings in by_rater.values() for r in ratings], "has no rating in any file")
    expected = len(clips) * len(about["questions"])
    num_references = sum(clip["system"] == about["reference"] for clip in clips.values())
    kept: dict[str, list[_Rating]] = {}
    dropped: dict[str, str] = {}
    num_unheard = 0
    for rater, ratings in by_rater.items():
        # The page rounds seconds to two places.
        heard = [r for r in ratings if r.seconds >= HEARD_SHARE * clips[r.blinded_id]["seconds"] - 0.01]
        references = [
            r.rating for r in heard if r.question == "quality" and clips[r.blinded_id]["system"] == about["reference"]
        ]
        low = sum(rating < min_reference for rating in references)
        if len(ratings) < min_answered * expected:
            dropped[rater] = f"gave {len(ratings)} of {expected} ratings"
        elif len(ratings) - len(heard) > max_share * len(ratings):
            dropped[rater] = f"did not hear {len(ratings) - len(heard)} of {len(ratings)} rated clips to their end"
        elif num_references and low > max_share * len(references):
            dropped[rater] = f"rated {low} of {len(references)} hidden references below {min_reference:g}"
        else:
            kept[rater] = heard
            num_unheard += len(ratings) - len(heard)
    if not kept:
        reasons = "; ".join(f"{rater} {reason}" for rater, reason in dropped.items())
        raise UserError(f"no rater is left: {reasons}; ask more raters, or loosen the filters")
    _check_complete(about, [r for ratings in kept.values() for r in ratings], "has no rating from the raters kept")
    protocol = (
        f"Mean of {len(kept)} rater{'s' * (len(kept) > 1)} on a scale from 1 to 100, "
        "[95 % interval] by bootstrap over raters "
        f"({num_draws} draws, seed {seed}); study {about['study']}, {len({c['trial'] for c in clips.values()})} "
        "captions, all clips at -14 LUFS."
    )
    rows = _table(about, kept, num_draws, seed)
    return StudyTable(about["title"], rows, len(kept), dropped, num_unheard, protocol)


@dataclass(frozen=True)
class _Rating:
    blinded_id: str
    question: str
    rating: int
    seconds: float


def _read_key(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable ({error}); give the _key.json of the page") from error
    fields = {"study", "title", "questions", "reference", "systems", "clips"}
    if not isinstance(about, dict) or not fields <= set(about):
        raise UserError(f"{path}: not the key of a listening test; give the _key.json of the page")
    return about


def _read_raters(
    files: Sequence[Path], clips: Mapping[str, Any], questions: Mapping[str, str]
) -> dict[str, list[_Rating]]:
    if not files:
        raise UserError("csv_files=[]: no ratings; give the CSV files that the raters saved")
    by_rater: dict[str, list[_Rating]] = {}
    origin: dict[str, int] = {}
    for number, path in enumerate(files):
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, restval="")
                header, rows = reader.fieldnames or [], list(reader)
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"{path}: unreadable ({error}); ask the rater to save it again") from error
        if missing := [column for column in COLUMNS if column not in header]:
            raise UserError(f"{path}: no CSV of a listening test, it lacks the column {missing[0]!r}")
        if not rows:
            raise UserError(f"{path}: holds no ratings; leave it out")
        for line, row in enumerate(rows, 2):
            rater = row["rater"]
            first = files[origin.setdefault(rater, number)]
            if origin[rater] != number:
                raise UserError(f"{path}: the rater {rater!r} is in {first} already; keep the later of them")
            by_rater.setdefault(rater, []).append(_rating(row, f"{path} line {line}", clips, questions))
    for rater, ratings in by_rater.items():
        (pair, count), *_ = Counter((r.blinded_id, r.question) for r in ratings).most_common(1)
        if count > 1:
            path = files[origin[rater]]
            raise UserError(f"{path}: the rater {rater!r} rated {pair[0]} ({pair[1]}) {count} times; keep one")
    return by_rater


def _rating(row: Mapping[str, str], place: str, clips: Mapping[str, Any], questions: Mapping[str, str]) -> _Rating:
    if row["blinded_id"] not in clips or row["question"] not in questions:
        raise UserError(
            f"{place}: {row['blinded_id']} ({row['question']}) is not in this study; give the key of the page that "
            "was rated"
        )
    rating = row["rating"].strip()
    if not (rating.isascii() and rating.isdigit() and 1 <= int(rating) <= 100):
        raise UserError(f"{place}: rating={rating!r} is no whole number from 1 to 100; repair or remove the line")
    try:
        seconds = float(row["seconds_listened"])
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UserError(f"{place}: seconds_listened={row['seconds_listened']!r} is no length of time")
    return _Rating(row["blinded_id"], row["question"], int(rating), seconds)


def _check_complete(about: Mapping[str, Any], ratings: Sequence[_Rating], lack: str) -> None:
    rated = {(about["clips"][r.blinded_id]["system"], r.question) for r in ratings}
    for system in about["systems"]:
        for question in about["questions"]:
            if (system, question) not in rated:
                raise UserError(f"system {system!r} {lack} ({question}); collect more ratings")


def _table(
    about: Mapping[str, Any], kept: Mapping[str, Sequence[_Rating]], num_draws: int, seed: int
) -> tuple[Rated, ...]:
    """Sums per rater and cell first: a draw is then one product of how often each rater was drawn with the sums."""
    cells = [(system, question) for system in about["systems"] for question in about["questions"]]
    place = {cell: i for i, cell in enumerate(cells)}
    sums, counts = np.zeros((2, len(kept), len(cells)))
    for i, ratings in enumerate(kept.values()):
        for r in ratings:
            j = place[about["clips"][r.blinded_id]["system"], r.question]
            sums[i, j] += r.rating
            counts[i, j] += 1
    drawn = np.random.default_rng(seed).multinomial(len(kept), np.full(len(kept), 1 / len(kept)), size=num_draws)
    drawn_sums, drawn_counts = drawn @ sums, drawn @ counts
    rows = []
    for j, (system, question) in enumerate(cells):
        raters = int((counts[:, j] > 0).sum())
        has_any = drawn_counts[:, j] > 0  # a draw may hold none of the few who rated this
        means = drawn_sums[has_any, j] / drawn_counts[has_any, j]
        low, high = np.quantile(means, (0.025, 0.975)) if raters > 1 else (0.0, 0.0)
        interval = (float(low), float(high)) if raters > 1 else None
        total = counts[:, j].sum()
        rows.append(Rated(system, question, float(sums[:, j].sum() / total), interval, int(total), raters))
    quality = {row.system: row.mean for row in rows if row.question == "quality"}
    return tuple(sorted(rows, key=lambda row: -quality[row.system]))  # stable: questions stay in their order
