"""Public-domain scores from music21's corpus as plain note events, their families, and the split.

Parsing is the slow part of making the demo's music, so each score is parsed once and kept as a small JSON.
Repeats are not unfolded: a score is what is written, each strain once (of two endings, the last).

    python data/demo/scores.py parse --out WORK/scores
    python data/demo/scores.py split --scores WORK/scores --out WORK/split.json
"""

import argparse
import json
import math
import os
import re
import signal
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from multiprocessing import Pool
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

SPLITS = ("train", "validation", "test")


class Event(NamedTuple):
    """One note."""

    onset: float
    """Start, in quarter lengths from the beginning of the score."""
    duration: float
    """Length, in quarter lengths."""
    pitch: int
    """MIDI pitch as it sounds; 60 is middle C."""


@dataclass(frozen=True)
class Score:
    """What the arranger and the captions need to know of a piece."""

    id: str
    path: str
    """Place in music21's corpus, with the tune's number where a file holds many."""
    collection: str
    title: str
    composer: str
    genre: str
    """Kind of piece ("reel", "chorale"), empty where the source does not say."""
    metre: str
    bar: float
    """Length of a full bar, in quarter lengths."""
    bars: list[float]
    """Where each bar begins, in quarter lengths."""
    length: float
    """Length of the whole, in quarter lengths."""
    tonic: int
    """Pitch class of the key, 0 = C."""
    mode: str
    """"major", "minor", "dorian", "mixolydian" ..."""
    key: str
    """The key in words, such as "B flat major"."""
    parts: list[list[Event]]
    """One list of events for each part, from the highest to the lowest."""

    def save(self, path: Path) -> None:
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(json.dumps(asdict(self)))
        aside.rename(path)

    @classmethod
    def load(cls, path: Path) -> "Score":
        fields = json.loads(path.read_text())
        fields["parts"] = [[Event(*event) for event in part] for part in fields["parts"]]
        return cls(**fields)


# --- Which scores -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collection:
    """A part of the corpus whose encodings carry no restriction on use, as far as their files say."""

    name: str
    files: tuple[str, ...]
    """Glob patterns below the corpus folder."""
    composer: str
    """Empty: each tune says it itself, or it is traditional."""
    genre: str = ""


COLLECTIONS = (
    Collection("airds", ("airdsAirs/*.abc",), ""),
    Collection("oneills", ("oneills1850/*.abc",), ""),
    Collection("ryans", ("ryansMammoth/*.abc",), ""),
    Collection("bach", ("bach/*.mxl",), "J. S. Bach", "chorale"),
    Collection("haydn", ("haydn/*/*.mxl",), "Joseph Haydn", "string quartet movement"),
    Collection("mozart", ("mozart/k155/*.mxl", "mozart/k156/*.mxl", "mozart/k458/*.mxl", "mozart/k80/*.mxl"),
               "W. A. Mozart", "string quartet movement"),
    Collection("mozart_piano", ("mozart/k545/*.mxl",), "W. A. Mozart", "piano sonata movement"),
    Collection("joplin", ("joplin/*.mxl",), "Scott Joplin", "ragtime"),
    Collection("handel", ("handel/*/*.mxl",), "G. F. Handel", "aria"),
    Collection("schumann_clara", ("schumann_clara/*.mxl",), "Clara Schumann", "polonaise"),
    Collection("schumann_robert", ("schumann_robert/opus41no1/*.mxl",), "Robert Schumann", "string quartet movement"),
    Collection("schumann_song", ("schumann_robert/*.mxl",), "Robert Schumann", "art song"),
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One score still in its file."""

    id: str
    path: str
    collection: Collection
    abc: str = ""
    """The tune's own text, for files that hold many."""


def corpus_folder() -> Path:
    """Where the installed music21 keeps its scores."""
    import music21

    return Path(music21.__file__).parent / "corpus"


def draw(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(sha256(text.encode()).digest()[:7]) / 2**56


def sources(tunes_per_book: int) -> list[Source]:
    """Every usable score, tune books thinned to `tunes_per_book`, in an order that is shuffled but fixed."""
    corpus, found = corpus_folder(), list[Source]()
    for collection in COLLECTIONS:
        here = list[Source]()
        for file in sorted(path for pattern in collection.files for path in corpus.glob(pattern)):
            place = file.relative_to(corpus).as_posix()
            if file.suffix == ".abc":
                tunes = re.split(r"(?m)^(?=X:)", file.read_text(encoding="utf-8", errors="replace").replace("\r", ""))
                for text in tunes[1:]:
                    number = text[2:].split("\n")[0].strip()
                    unique = f"{file.stem}_{number}" if len(tunes) > 2 else file.stem
                    here.append(Source(identifier(collection.name, unique), f"{place}#{number}", collection, text))
            else:
                stem = "_".join(file.relative_to(corpus).with_suffix("").parts[1:])
                here.append(Source(identifier(collection.name, stem), place, collection))
        here.sort(key=lambda source: draw(source.id))
        found += here[:tunes_per_book] if not collection.composer else here
    # Long movements first: they are few, and a worker that meets one last would keep the others waiting.
    few = Counter(source.collection.name for source in found)
    return sorted(found, key=lambda source: (few[source.collection.name] > 50, draw(source.id)))


def identifier(collection: str, name: str) -> str:
    """A name fit for files: letters, digits, dots and dashes."""
    return f"{collection}_{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-')}"


# --- Parsing ------------------------------------------------------------------------------------------------------

TONICS = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
# In minor a G sharp is likelier than an A flat, and a D sharp no likelier than an E flat.
MINOR_TONICS = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "G sharp", "A", "B flat", "B")
# How much of each scale degree a piece in major or minor holds (Krumhansl and Kessler 1982).
PROFILES = {
    "major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}
TITLE_GENRES = ("slip jig", "jig", "reel", "hornpipe", "strathspey", "quickstep", "quick step", "march", "minuet",
                "waltz", "polka", "gavotte", "cotillion", "rondo", "clog", "air", "highland fling", "allemande")  # fmt: skip
GENRE_METRES = {"jig": ("6/8", "9/8", "12/8"), "slip jig": ("9/8",), "reel": ("2/4", "4/4", "2/2"),
                "hornpipe": ("2/4", "4/4", "2/2", "3/2"), "strathspey": ("4/4", "2/2"), "waltz": ("3/4", "3/8"),
                "minuet": ("3/4", "3/8"), "polka": ("2/4",), "clog": ("2/4", "4/4", "2/2")}  # fmt: skip
# How O'Neill ordered his 1,850 tunes (1903), where a tune does not say its kind itself.
ONEILL_ORDER = ((1, 625, "air"), (701, 1115, "jig"), (1116, 1175, "slip jig"), (1176, 1555, "reel"), (1556, 1743, "hornpipe"))


def key_name(tonic: int, mode: str) -> str:
    """>>> key_name(10, "major")
    'B flat major'
    """
    return f"{(MINOR_TONICS if mode != 'major' else TONICS)[tonic]} {mode}"


def find_key(parts: list[list[Event]]) -> tuple[int, str]:
    """Tonic and mode by the key profiles; that the piece ends on its tonic in the bass counts for much."""
    weights = [0.0] * 12
    for event in (event for part in parts for event in part):
        weights[event.pitch % 12] += event.duration
    end = max(event.onset for part in parts for event in part)
    final = min((event for part in parts for event in part if event.onset + event.duration > end), key=lambda e: e.pitch)

    def fit(tonic: int, mode: str) -> float:
        profile = PROFILES[mode]
        mean, level = sum(profile) / 12, sum(weights) / 12
        pairs = [(profile[(pitch - tonic) % 12] - mean, weights[pitch] - level) for pitch in range(12)]
        norm = math.sqrt(sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs)) or 1.0
        return sum(a * b for a, b in pairs) / norm + 0.15 * (final.pitch % 12 == tonic)

    return max(((tonic, mode) for tonic in range(12) for mode in PROFILES), key=lambda key: fit(*key))


def genre_of(source: Source, title: str, metre: str) -> str:
    """The kind of tune by its R: field, its title, or O'Neill's order; empty where the metre contradicts it."""
    if source.collection.genre:
        return source.collection.genre
    field = re.search(r"(?m)^R: *(.+)$", source.abc)
    kind = field[1].strip().lower().replace("slipjig", "slip jig").replace("double jig", "jig") if field else ""
    if kind not in TITLE_GENRES:
        words = re.sub(r"[^a-z ]", " ", title.lower())
        kind = next((genre for genre in TITLE_GENRES if re.search(rf"\b{genre}\b", words)), "")
    if not kind and source.collection.name == "oneills":
        number = int(re.sub(r"\D", "", source.path.split("#")[1]) or 0)
        kind = next((genre for first, last, genre in ONEILL_ORDER if first <= number <= last), "")
    kind = kind.replace("quick step", "quickstep")
    return kind if metre in GENRE_METRES.get(kind, (metre,)) else ""


def composer_of(source: Source) -> str:
    """Who wrote it: the collection's composer, the C: field of a tune, or "traditional"."""
    if source.collection.composer:
        return source.collection.composer
    field = re.search(r"(?m)^C: *(.+)$", source.abc)
    name = field[1].strip().strip('"') if field else ""
    plausible = re.fullmatch(r"[A-Z][A-Za-z.' ]{4,40}", name) and not re.search(r"(?i)trad|anon|irish|scot|coll", name)
    return name.title() if plausible else "traditional"


def clean_abc(text: str) -> str:
    """The tune without fingerings and bowings, which music21 would read as chords or stumble over."""
    lines = []
    for line in text.split("\n"):
        if not re.match(r"[A-Za-z]:", line):
            line = re.sub(r'"[^"]*"', "", line)
            line = re.sub(r"(?<![A-Za-z:])[uvTM](?=[\^_=A-Ga-g\[({~.])|[~`]", "", line)
        lines.append(line)
    return "\n".join(lines)


def part_events(part: Any, starts: dict[int, float]) -> list[Event]:
    """The notes of one music21 part; `starts` gives the place of each kept measure by its index, in quarter lengths."""
    events, open_ties = list[Event](), dict[int, int]()
    for index, measure in enumerate(part.getElementsByClass("Measure")):
        if index not in starts:
            continue
        for element in measure.flatten().notes:
            if "Harmony" in element.classes or not element.duration.quarterLength:
                continue  # a chord name above the staff, or a grace note
            onset = round(starts[index] + float(element.offset), 4)
            duration = round(float(element.duration.quarterLength), 4)
            for note in element.notes if element.isChord else [element]:
                pitch = note.pitch.midi
                last = open_ties.pop(pitch, None)
                if note.tie and note.tie.type in ("stop", "continue") and last is not None:
                    events[last] = events[last]._replace(duration=round(onset + duration - events[last].onset, 4))
                else:
                    last = len(events)
                    events.append(Event(onset, duration, pitch))
                if note.tie and note.tie.type in ("start", "continue"):
                    open_ties[pitch] = last
    return sorted(events)


def first_endings(part: Any) -> set[int]:
    """Indices of the measures that stand under a first ending which a second one follows."""
    brackets = list(part.recurse().getElementsByClass("RepeatBracket"))
    if not any("2" in str(bracket.number) for bracket in brackets):
        return set()
    measures = {id(measure): index for index, measure in enumerate(part.getElementsByClass("Measure"))}
    firsts = (bracket for bracket in brackets if str(bracket.number) == "1")
    return {measures.get(id(measure), -1) for bracket in firsts for measure in bracket.getSpannedElements()}


def parse(source: Source) -> Score:
    """Reads one score with music21.

    Raises:
        ValueError: if what was read is no music that can be used (too short, no notes, a metre that changes).
    """
    from music21 import converter

    if source.abc:
        stream: Any = converter.parse(clean_abc(source.abc), format="abc")
    else:
        stream = converter.parse(corpus_folder() / source.path)
        stream.toSoundingPitch(inPlace=True)
    parts = list(stream.parts)
    metres = [time.ratioString for time in parts[0].recurse().getElementsByClass("TimeSignature")]
    if not metres:
        raise ValueError("no metre")
    if source.abc and len(set(metres)) > 1:
        raise ValueError("the metre changes")
    metre = Counter(metres).most_common(1)[0][0]
    columns = zip(*(part.getElementsByClass("Measure") for part in parts), strict=False)
    skipped, starts, now = first_endings(parts[0]), dict[int, float](), 0.0
    for index, column in enumerate(columns):
        if index not in skipped:
            starts[index] = now
            now = round(now + max(float(measure.highestTime) for measure in column), 4)
    voices = [events for events in (part_events(part, starts) for part in parts) if events]
    if sum(map(len, voices)) < 24:
        raise ValueError("fewer than 24 notes")
    voices.sort(key=lambda events: -sum(event.pitch for event in events) / len(events))
    given = parts[0].recurse().getElementsByClass("Key").first() if source.abc else None
    tonic, mode = (given.tonic.pitchClass, given.mode) if given is not None else find_key(voices)
    title = (stream.metadata and stream.metadata.title) or source.path.split("/")[-1].split(".mxl")[0]
    title = re.sub(r"\s+", " ", title.replace("_", " ")).strip(" .")
    numerator, denominator = map(int, metre.split("/"))
    return Score(
        id=source.id,
        path=source.path,
        collection=source.collection.name,
        title=title,
        composer=composer_of(source),
        genre=genre_of(source, title, metre),
        metre=metre,
        bar=4 * numerator / denominator,
        bars=list(starts.values()),
        length=now,
        tonic=tonic,
        mode=mode,
        key=key_name(tonic, mode),
        parts=voices,
    )


def parse_one(task: tuple[Source, Path, float]) -> tuple[str, str]:
    """Parses one score into the cache; returns its id and what went wrong, empty for nothing."""
    source, out, timeout_s = task
    path = out / f"{source.id}.json"
    if path.exists():
        return source.id, ""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"took more than {timeout_s:g} s")

    # Processor time, not wall time: what is skipped must not depend on who else uses the machine.
    signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, timeout_s)
    try:
        parse(source).save(path)
        return source.id, ""
    except Exception as error:
        return source.id, f"{type(error).__name__}: {str(error)[:120]}"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


# --- Families and the split ---------------------------------------------------------------------------------------


def top_line(score: Score) -> list[Event]:
    """The highest note at each onset of the first part."""
    highest = dict[float, Event]()
    for event in score.parts[0]:
        if event.onset not in highest or event.pitch > highest[event.onset].pitch:
            highest[event.onset] = event
    return [highest[onset] for onset in sorted(highest)]


def fingerprint(score: Score, size: int = 6) -> set[tuple[object, ...]]:
    """What identifies a melody in any key and at any tempo: n-grams of its top line.

    Two kinds, since settings of one tune differ in ornaments: `size` intervals in semitones with the ratio of the
    notes' lengths (in octaves of time, whole numbers), and `size` + 2 intervals between the notes that sound on the
    beats (a beat is a quarter, or three eighths where eighths come in threes). A run of repeated notes or of mere
    scale steps in one direction says nothing and is left out.
    """
    line = top_line(score)
    shifts = [b.onset - a.onset for a, b in zip(line, line[1:], strict=False)]
    steps = [b.pitch - a.pitch for a, b in zip(line, line[1:], strict=False)]
    ratios = [round(math.log2(b / a)) for a, b in zip(shifts, shifts[1:], strict=False)]
    notes = (("notes", *zip(steps[i : i + size], ratios[i : i + size - 1] + [0], strict=True))
             for i in range(len(ratios) - size + 2) if telling(steps[i : i + size]))  # fmt: skip
    beat = 1.5 if score.metre in ("6/8", "9/8", "12/8") else 1.0
    # Beats are counted from the bar lines, so that an upbeat does not shift them.
    ends = [*score.bars[1:], score.length]
    grid = [start + i * beat for start, end in zip(score.bars, ends, strict=True) for i in range(math.ceil((end - start) / beat))]
    on_beat, index = list[int](), 0
    for time in grid:
        while index + 1 < len(line) and line[index + 1].onset <= time + 1e-3:
            index += 1
        on_beat.append(line[index].pitch)
    leaps, long = [b - a for a, b in zip(on_beat, on_beat[1:], strict=False)], size + 2
    beats = (("beats", *leaps[i : i + long]) for i in range(len(leaps) - long + 1) if telling(leaps[i : i + long]))
    return set(notes) | set(beats)


def telling(steps: list[int]) -> bool:
    """Whether a run of intervals is more than a repeated note or a scale."""
    return len(set(steps)) > 2 and (min(steps) < 0 < max(steps))


def families(prints: dict[str, set[tuple[object, ...]]], share: float = 0.25, rare: int = 12) -> dict[str, str]:
    """Groups pieces that share a melody, as {piece: family}; a family is called after its first member.

    Two pieces are one family if at least `share` of the smaller fingerprint of the same kind, and no fewer than
    six n-grams, stands in the other. N-grams found in more than `rare` pieces are common property and count for none.

    Args:
        prints: for each piece, its fingerprint.
        share: part of the smaller fingerprint, 0 to 1.
        rare: most pieces that an n-gram may stand in.
    """
    owners = defaultdict[tuple[object, ...], list[str]](list)
    for piece, grams in sorted(prints.items()):
        for gram in grams:
            owners[gram].append(piece)
    common = defaultdict[tuple[str, str, object], int](int)
    sizes = Counter((piece, gram[0]) for piece, grams in prints.items() for gram in grams)
    for gram, pieces in owners.items():
        if len(pieces) <= rare:
            for i, first in enumerate(pieces):
                for second in pieces[i + 1 :]:
                    common[first, second, gram[0]] += 1
    parent = {piece: piece for piece in prints}

    def root(piece: str) -> str:
        while parent[piece] != piece:
            piece = parent[piece]
        return piece

    for (first, second, kind), count in common.items():
        if count >= max(6, share * min(sizes[first, kind], sizes[second, kind])):
            low, high = sorted((root(first), root(second)))
            parent[high] = low
    return {piece: root(piece) for piece in prints}


def work_of(piece: str) -> str:
    """Movements of one work belong together: `haydn_opus1no1_movement2` -> `haydn_opus1no1`."""
    return re.sub(r"-(movement\d+.*|\d\w+)$", "", piece)


def split_of(family: str, heldout_share: float) -> str:
    """train, validation or test for a family, by its name alone: a new score never moves an old one."""
    place = draw(f"split {family}")
    return "test" if place < heldout_share else "validation" if place < 2 * heldout_share else "train"


def make_split(scores: Iterable[Score], heldout_share: float) -> dict[str, dict[str, str]]:
    """{piece: {"family": ..., "split": ...}}; movements of one work are one family, and long works train."""
    scores = list(scores)
    prints = {score.id: fingerprint(score) for score in tqdm(scores, unit="score", desc="fingerprints")}
    family_of = families(prints)
    for piece in family_of:
        work = work_of(piece)
        if work != piece:
            family_of[piece] = work
    books = {score.id: score.collection for score in scores}
    members = Counter(family_of.values())
    short = {"bach", "airds", "oneills", "ryans"}
    training = {family for piece, family in family_of.items() if books[piece] not in short}
    # A melody that came to many forms would make one split monotonous: it trains.
    training |= {family for family, count in members.items() if count > 6}
    return {piece: {"family": family, "split": "train" if family in training else split_of(family, heldout_share)}
            for piece, family in sorted(family_of.items())}  # fmt: skip


def describe_duplicates(split: dict[str, dict[str, str]]) -> Iterator[str]:
    """Lines that say how many pieces share a melody, and how many families reach over several collections."""
    groups = defaultdict[str, list[str]](list)
    for piece, place in split.items():
        groups[place["family"]].append(piece)
    shared = [pieces for pieces in groups.values() if len(pieces) > 1]
    books = [pieces for pieces in shared if len({piece.split("_")[0] for piece in pieces}) > 1]
    yield f"{len(split)} pieces, {len(groups)} families"
    yield f"{sum(map(len, shared))} pieces share a melody with another, in {len(shared)} families"
    yield f"{len(books)} families reach over two or more collections"
    yield f"the largest family has {max(map(len, groups.values()))} pieces"


def load_all(folder: Path) -> list[Score]:
    """Every score in the cache, in the order of the names."""
    return [Score.load(path) for path in sorted(folder.glob("[!.]*.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    parsing = verbs.add_parser("parse", help="Reads the scores into a folder of small JSON files.")
    parsing.add_argument("--out", type=Path, required=True, help="Folder for one JSON per score.")
    parsing.add_argument("--tunes_per_book", type=int, default=450, help="Most tunes taken from one tune book.")
    parsing.add_argument("--timeout_s", type=float, default=20, help="Longest parsing of one score, in seconds of processor time.")
    parsing.add_argument("--workers", type=int, default=1, help="Number of processes.")
    splitting = verbs.add_parser("split", help="Finds the families and writes the split.")
    splitting.add_argument("--scores", type=Path, required=True, help="Folder that `parse` wrote.")
    splitting.add_argument("--out", type=Path, required=True, help="JSON file to write.")
    splitting.add_argument("--heldout_share", type=float, default=0.1, help="Part of the families in each of validation and test, 0 to 0.5.")
    args = parser.parse_args()
    if args.verb == "split":
        split = make_split(load_all(args.scores), args.heldout_share)
        aside = args.out.with_name(f".{args.out.name}")
        aside.write_text(json.dumps(split, indent=0))
        aside.rename(args.out)
        print(*describe_duplicates(split), sep="\n")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    tasks = [(source, args.out, args.timeout_s) for source in sources(args.tunes_per_book)]
    with Pool(args.workers) as pool:
        results = list(tqdm(pool.imap_unordered(parse_one, tasks), total=len(tasks), unit="score"))
    failures = sorted((piece, reason) for piece, reason in results if reason)
    (args.out.parent / "scores_skipped.json").write_text(json.dumps(dict(failures), indent=1))
    print(f"{len(results) - len(failures)} scores read, {len(failures)} skipped:")
    for reason, count in Counter(reason.split(":")[0] for _, reason in failures).most_common():
        print(f"  {count:5d} {reason}")


if __name__ == "__main__":
    main()
