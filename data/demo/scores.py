"""Read public-domain scores as plain notes, and find out which of them share a melody.

Reads music21's corpus (installed with `pip install -e '.[music]'`) and writes one JSON file
per score:

    {"id", "collection", "title", "composer", "style", "key", "tonic", "mode", "metre", "bar_ql",
     "pickup_ql", "parts": [[[onset, duration, pitch]]]}

Onsets and durations are in quarter notes, pitches are MIDI numbers, parts run from the highest
down. Bar lines stand at pickup_ql + n * bar_ql throughout; a score is cut where its bars leave that
grid.

    python data/demo/scores.py --out AUDIO/scores

Only encodings without a restriction on use are read; README.md next to this file lists them.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import re
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from magnet_train.common.folders import write_text

COLLECTIONS = {
    # folder of music21's corpus: (composer, style where the title names none, pattern of files)
    "ryansMammoth": ("traditional", "tune", "*.abc"),
    "airdsAirs": ("traditional", "air", "*.abc"),
    "oneills1850": ("traditional", "tune", "*.abc"),
    "bach": ("Johann Sebastian Bach", "chorale", "*.mxl"),
}
STYLES = (
    "reel",
    "jig",
    "hornpipe",
    "strathspey",
    "clog",
    "march",
    "walk-around",
    "polka",
    "waltz",
    "quickstep",
    "minuet",
    "fling",
    "slip jig",
    "breakdown",
    "cotillion",
    "gavotte",
    "rigadoon",
    "schottische",
    "lilt",
    "air",
)
ADDED = "oneills1850"
"""Collection that was added after the first split: it names no family that others belong to."""
TIMEOUT_S = 300
MIN_NOTES = 24
# Krumhansl and Kessler's profiles: how well each pitch class fits a major and a minor key on C.
KEY_PROFILES = {
    "major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}
TONICS = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")


def style_of(title: str, path: str, fallback: str, rhythm: str = "") -> str:
    """Return the dance that the title, the file name or the tune book's rhythm field names.

    >>> style_of("The Devil's Dream Reel", "", "tune")
    'reel'
    >>> style_of("The Kid on the Mountain", "", "tune", rhythm="slipjig")
    'slip jig'
    """
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", f"{title} {Path(path).stem} {rhythm}").lower()
    text = text.replace("slipjig", "slip jig")
    found = [s for s in STYLES if re.search(rf"\b{s.replace('-', '[- ]')}s?\b", text)]
    return max(found, key=len) if found else fallback


def read_rhythms(path: Path) -> dict[str, str]:
    """Return the rhythm field (`R:`) of each tune of an ABC file, by the tune's number."""
    tunes = re.split(r"^X:\s*", path.read_text(errors="replace"), flags=re.MULTILINE)[1:]
    rhythms = {
        tune.split(None, 1)[0]: re.search(r"^R:\s*(.+)$", tune, re.MULTILINE)
        for tune in tunes
        if tune.strip()
    }
    return {number: field[1].strip() for number, field in rhythms.items() if field}


def read(path: Path, root: Path) -> Iterator[dict[str, Any]]:
    """Yield the scores of one file; tune books hold hundreds."""
    from music21 import converter, stream

    parsed = converter.parse(path, forceSource=True)
    scores = list(parsed.scores) if isinstance(parsed, stream.Opus) else [parsed]
    folder = path.relative_to(root).parts[0]
    composer, style, _ = COLLECTIONS[folder]
    rhythms = read_rhythms(path) if path.suffix == ".abc" else {}
    name = re.sub(
        r"[^a-z0-9]+", "-", f"{path.relative_to(root / folder).with_suffix('')}".lower()
    ).strip("-")
    for index, score in enumerate(scores):
        try:
            notes = plain_notes(score)
        except Exception as error:  # music21 raises whatever its importer met
            print(
                f"skipped {path.name} no. {index}: {type(error).__name__}: {error}", file=sys.stderr
            )
            continue
        if sum(map(len, notes["parts"])) < MIN_NOTES:
            continue
        title = re.sub(r"\s+", " ", (score.metadata and score.metadata.title) or path.stem).strip(
            " ."
        )
        rhythm = rhythms.get(str(score.metadata and score.metadata.number), "")
        yield {
            "id": f"{folder.lower()}_{name}" + (f"_{index:03d}" if len(scores) > 1 else ""),
            "collection": folder,
            "source": str(path.relative_to(root)),
            "title": title,
            "composer": composer,
            "style": style_of(title, path.name, style, rhythm),
            **notes,
        }


def bar_grid(bars: list[tuple[float, float]], bar_ql: float) -> tuple[float, float]:
    """Return the length of the upbeat and where the bars leave the grid, both in quarter notes.

    A first bar that is shorter than the metre says is an upbeat. Later short bars belong to the
    grid in pairs: the last bar of a section and the upbeat of the next one make up one bar. The
    first bar that crosses a line of the grid ends it.

    Args:
        bars: onset and duration of each bar, in quarter notes.
        bar_ql: duration of a full bar.

    >>> bar_grid([(0, 1), (1, 4), (5, 3), (8, 1), (9, 4)], 4)
    (1, inf)
    >>> bar_grid([(0, 4), (4, 4), (8, 1), (9, 4)], 4)
    (0.0, 8)
    """
    if not bars:
        return 0.0, float("inf")
    pickup = bars[0][1] if bars[0][1] < bar_ql - 1e-3 else 0.0
    for (start, length), (onset, duration) in itertools.pairwise(bars):
        phase = (onset - pickup + 1e-3) % bar_ql
        if phase + duration > bar_ql + 2e-3:
            return pickup, start if length < bar_ql / 2 else onset
    return pickup, float("inf")


def estimate_key(notes: list[list[float]]) -> list[tuple[int, str]]:
    """Rank all 24 keys (tonic as pitch class, mode) by Krumhansl's correlation with durations."""
    histogram = np.zeros(12)
    for _, duration, pitch in notes:
        histogram[int(pitch) % 12] += duration
    keys = {
        (tonic, mode): np.corrcoef(histogram, np.roll(profile, tonic))[0, 1]
        for mode, profile in KEY_PROFILES.items()
        for tonic in range(12)
    }
    return sorted(keys, key=lambda key: -keys[key])


def key_is_clear(score: dict[str, Any]) -> bool:
    """Say whether the notes agree with the source's key.

    They rank it first, or second and end on its tonic.
    Of a piece in several parts, the lowest ends on the tonic.
    """
    last = score["parts"][-1][-1][2] % 12
    return score["key_rank"] == 1 or (score["key_rank"] == 2 and last == score["tonic"])


def plain_notes(score: Any) -> dict[str, Any]:
    """Return key, metre, upbeat and notes of a music21 score; ties are joined."""
    from music21 import key, meter

    metres = [m for m in score.recurse().getElementsByClass(meter.TimeSignature)]
    metre = metres[0] if metres else None
    bar_ql = float(metre.barDuration.quarterLength) if metre else 4.0
    first = score.parts[0] if score.parts else score
    bars = [
        (float(m.offset), float(m.duration.quarterLength))
        for m in first.getElementsByClass("Measure")
    ]
    pickup_ql, grid_end = bar_grid(bars, bar_ql)
    changes = [
        float(m.getOffsetInHierarchy(score))
        for m in metres
        if m.ratioString != metres[0].ratioString
    ]
    end = min([grid_end, *changes])
    score = score.stripTies()
    parts = []
    for part in score.parts or [score]:
        notes = [
            [float(n.getOffsetInHierarchy(part)), float(n.quarterLength), int(pitch.midi)]
            for n in part.recurse().notes
            if n.quarterLength > 0 and not n.duration.isGrace
            for pitch in n.pitches
        ]
        notes = [[t, min(d, end - t), p] for t, d, p in notes if t < end]
        if notes:
            parts.append(sorted(notes))
    if not parts:
        raise ValueError("no notes")
    parts.sort(key=lambda notes: -sum(p for _, _, p in notes) / len(notes))
    ranked = estimate_key([note for part in parts for note in part])
    given = [k for k in score.recurse().getElementsByClass(key.Key) if k.mode in KEY_PROFILES]
    tonic, mode = (given[0].tonic.pitchClass, given[0].mode) if given else ranked[0]
    return {
        "key": f"{TONICS[tonic]} {mode}",
        "tonic": tonic,
        "mode": mode,
        "key_rank": ranked.index((tonic, mode)) + 1,
        "metre": metre.ratioString if metre else "4/4",
        "bar_ql": bar_ql,
        "pickup_ql": pickup_ql,
        "parts": parts,
    }


def _convert(job: tuple[Path, Path, Path]) -> str | None:
    """Convert one corpus file to JSON files; return the reason if that failed."""
    path, root, out = job
    done = out / "done" / hashlib.sha256(str(path.relative_to(root)).encode()).hexdigest()[:16]
    if done.exists():
        return None

    def give_up(*_: object) -> None:
        raise TimeoutError(f"longer than {TIMEOUT_S} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(TIMEOUT_S)
    try:
        for score in read(path, root):
            file = out / f"{score['id']}.json"
            write_text(file, json.dumps(score))
        done.touch()
    except Exception as error:  # a broken encoding costs its file, not the run
        return f"{path.relative_to(root)}: {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return None


def fingerprint(notes: list[list[float]], length: int = 8) -> set[tuple[int, ...]]:
    """Return all runs of `length` intervals, with their rhythm, of the highest voice.

    They are the same in any key and tempo.

    >>> tune = [[i / 2, 0.5, 60 + p] for i, p in enumerate((0, 2, 4, 5, 7, 5, 4, 2, 0, 7))]
    >>> fingerprint(tune) == fingerprint([[2 * t, 2 * d, p + 5] for t, d, p in tune])
    True
    """
    top: dict[float, tuple[float, float]] = {}
    for onset, duration, pitch in notes:
        if onset not in top or pitch > top[onset][1]:
            top[onset] = (duration, pitch)
    line = [top[t] for t in sorted(top)]
    moves = [(int(b[1] - a[1]), round(4 * b[0] / a[0])) for a, b in itertools.pairwise(line)]
    return {
        tuple(x for move in moves[i : i + length] for x in move)
        for i in range(len(moves) - length + 1)
    }


def families(prints: dict[str, set], share: float = 0.15, common: int = 12) -> dict[str, str]:
    """Group scores that share at least `share` of the shorter one's runs.

    Returns id -> id of the family's first.
    Runs that occur in more than `common` scores are scales and cadences, and are ignored.
    """
    holders = defaultdict(list)
    for name, runs in sorted(prints.items()):
        for run in runs:
            holders[run].append(name)
    shared: Counter[tuple[str, str]] = Counter()
    for names in holders.values():
        if 2 <= len(names) <= common:
            shared.update((a, b) for i, a in enumerate(names) for b in names[i + 1 :])
    parent = {name: name for name in prints}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for (a, b), count in shared.items():
        if count >= max(3, share * min(len(prints[a]), len(prints[b]))):
            first, second = sorted((root(a), root(b)), key=lambda n: (n.startswith(ADDED), n))
            parent[second] = first
    return {name: root(name) for name in prints}


def split_of(family: str, heldout_permille: int = 65) -> str:
    """Return train, validation or test by the family's name: a score added later moves no other."""
    place = int(hashlib.sha256(family.encode()).hexdigest()[:8], 16) % 1000
    return (
        "validation"
        if place < heldout_permille
        else "test"
        if place < 2 * heldout_permille
        else "train"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="Folder for the JSON files; finished ones are kept."
    )
    parser.add_argument("--processes", type=int, default=1, help="Files parsed at the same time.")
    args = parser.parse_args()
    import music21

    root = Path(music21.__file__).parent / "corpus"
    (args.out / "done").mkdir(parents=True, exist_ok=True)
    jobs = [
        (p, root, args.out)
        for f, (*_, glob) in COLLECTIONS.items()
        for p in sorted((root / f).rglob(glob))
    ]
    jobs.sort(
        key=lambda job: -job[0].stat().st_size
    )  # long books first, so that all workers end together
    failed = []
    with multiprocessing.Pool(args.processes) as pool:
        for reason in tqdm(pool.imap_unordered(_convert, jobs), total=len(jobs), unit="file"):
            failed += [reason] if reason else []
    scores = [
        json.loads(p.read_text())
        for p in sorted(args.out.glob("*.json"))
        if p.name != "families.json"
    ]
    family = families({s["id"]: fingerprint(s["parts"][0]) for s in scores})
    table = {
        s["id"]: {
            "family": family[s["id"]],
            "split": split_of(family[s["id"]]),
            "length_ql": max(t + d for part in s["parts"] for t, d, _ in part),
            "key_is_clear": key_is_clear(s),
        }
        for s in scores
    }
    (args.out / "families.json").write_text(json.dumps(table, indent=0))
    sizes = Counter(family.values())
    repeats = len(scores) - len(sizes)
    print(f"{len(scores)} scores, {len(sizes)} families; {repeats} repeat another's tune")
    print(f"largest families: {sizes.most_common(5)}")
    print(f"splits: {Counter(v['split'] for v in table.values())}")
    print(f"collections: {Counter(s['collection'] for s in scores)}")
    print(f"{len(failed)} files failed", *failed, sep="\n  ")


if __name__ == "__main__":
    main()
