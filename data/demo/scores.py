"""Public-domain scores as plain notes, and which of them are the same tune.

Reads music21's corpus (installed with `pip install 'magnet-train[music]'`) and writes one JSON per score:

    {"id", "collection", "title", "composer", "style", "key", "metre", "bar_ql", "parts": [[[onset, duration, pitch]]]}

onsets and durations in quarter notes, pitches as MIDI numbers, parts from the highest down.

    python data/demo/scores.py --out AUDIO/scores

Only encodings without a restriction on use are read; README.md beside this file lists them.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

COLLECTIONS = {
    # folder of music21's corpus: (composer, style, pattern of files)
    "ryansMammoth": ("traditional", "", "*.abc"),
    "airdsAirs": ("traditional", "air", "*.abc"),
    "bach": ("Johann Sebastian Bach", "chorale", "*.mxl"),
    "haydn": ("Joseph Haydn", "string quartet movement", "*.mxl"),
    "mozart": ("Wolfgang Amadeus Mozart", "string quartet movement", "*.mxl"),
    "joplin": ("Scott Joplin", "ragtime", "*.mxl"),
}
STYLES = (
    "reel", "jig", "hornpipe", "strathspey", "clog", "march", "walk-around", "polka", "waltz", "quickstep", "minuet",
    "fling", "slip jig", "breakdown", "cotillion", "gavotte", "rigadoon", "schottische", "lilt", "air",
)  # fmt: skip
TIMEOUT_S = 90


def style_of(title: str, path: str, fallback: str) -> str:
    """The dance that title or file name give away.

    >>> style_of("The Devil's Dream Reel", "", "tune")
    'reel'
    """
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", f"{title} {Path(path).stem}").lower()
    found = [s for s in STYLES if s in text or s.replace(" ", "-") in text]
    return max(found, key=len) if found else fallback


def read(path: Path, root: Path) -> Iterator[dict[str, Any]]:
    """The scores of one file; tune books hold hundreds."""
    from music21 import converter, stream

    parsed = converter.parse(path)
    scores = list(parsed.scores) if isinstance(parsed, stream.Opus) else [parsed]
    folder = path.relative_to(root).parts[0]
    composer, style, _ = COLLECTIONS[folder]
    for number, score in enumerate(scores):
        try:
            notes = plain_notes(score)
        except Exception as error:  # music21 raises whatever its importer met
            print(f"skipped {path.name} no. {number}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        if sum(map(len, notes["parts"])) < 24:
            continue
        title = re.sub(r"\s+", " ", (score.metadata and score.metadata.title) or path.stem).strip(" .")
        name = re.sub(r"[^a-z0-9]+", "-", f"{path.relative_to(root / folder).with_suffix('')}".lower()).strip("-")
        yield {
            "id": f"{folder.lower()}_{name}" + (f"_{number:03d}" if len(scores) > 1 else ""),
            "collection": folder,
            "source": str(path.relative_to(root)),
            "title": title,
            "composer": composer,
            "style": style_of(title, path.name, style or "tune"),
            **notes,
        }


def plain_notes(score: Any) -> dict[str, Any]:
    """Key, metre and notes of a music21 score, chords taken apart, ties joined."""
    from music21 import key, meter

    score = score.stripTies()
    parts = []
    for part in score.parts or [score]:
        notes = [
            [float(n.getOffsetInHierarchy(part)), float(n.quarterLength), int(pitch.midi)]
            for n in part.recurse().notes
            if n.quarterLength > 0 and not n.duration.isGrace
            for pitch in n.pitches
        ]
        if notes:
            parts.append(sorted(notes))
    parts.sort(key=lambda notes: -sum(p for _, _, p in notes) / len(notes))
    given = list(score.recurse().getElementsByClass(key.Key))
    tonality = given[0] if given and given[0].mode in ("major", "minor") else score.analyze("key")
    metre = next(iter(score.recurse().getElementsByClass(meter.TimeSignature)), None)
    return {
        "key": f"{tonality.tonic.name.replace('-', ' flat').replace('#', ' sharp')} {tonality.mode}",
        "tonic": tonality.tonic.pitchClass,
        "mode": tonality.mode,
        "metre": metre.ratioString if metre else "4/4",
        "bar_ql": float(metre.barDuration.quarterLength) if metre else 4.0,
        "parts": parts,
    }


def _convert(job: tuple[Path, Path, Path]) -> str | None:
    """One corpus file to JSON files; the reason if that failed."""
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
            file.with_suffix(".tmp").write_text(json.dumps(score))
            os.replace(file.with_suffix(".tmp"), file)
        done.touch()
    except Exception as error:  # a broken encoding costs its file, not the run
        return f"{path.relative_to(root)}: {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return None


def fingerprint(notes: list[list[float]], length: int = 8) -> set[tuple[int, ...]]:
    """Runs of `length` intervals with their rhythm, of the highest voice: the same in any key and tempo.

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
    return {tuple(x for move in moves[i : i + length] for x in move) for i in range(len(moves) - length + 1)}


def families(prints: dict[str, set], share: float = 0.15, common: int = 12) -> dict[str, str]:
    """Scores that share at least `share` of the shorter one's runs belong together: id -> id of the family's first.

    Runs that stand in more than `common` scores are scales and cadences and say nothing.
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
            first, second = sorted((root(a), root(b)))
            parent[second] = first
    return {name: root(name) for name in prints}


def split_of(family: str, heldout_permille: int = 65) -> str:
    """train, validation or test, by the family's name alone: a score added later moves no other."""
    place = int(hashlib.sha256(family.encode()).hexdigest()[:8], 16) % 1000
    return "validation" if place < heldout_permille else "test" if place < 2 * heldout_permille else "train"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Folder for the JSON files; finished ones are kept.")
    parser.add_argument("--processes", type=int, default=1, help="Files parsed at the same time.")
    args = parser.parse_args()
    import music21

    root = Path(music21.__file__).parent / "corpus"
    (args.out / "done").mkdir(parents=True, exist_ok=True)
    jobs = [(p, root, args.out) for f, (*_, glob) in COLLECTIONS.items() for p in sorted((root / f).rglob(glob))]
    jobs.sort(key=lambda job: job[0].parts[-2] != "airdsAirs")  # the long books first, or one worker ends alone
    failed = []
    with multiprocessing.Pool(args.processes) as pool:
        for reason in tqdm(pool.imap_unordered(_convert, jobs), total=len(jobs), unit="file"):
            failed += [reason] if reason else []
    scores = [json.loads(p.read_text()) for p in sorted(args.out.glob("*.json")) if p.name != "families.json"]
    family = families({s["id"]: fingerprint(s["parts"][0]) for s in scores})
    length = {s["id"]: max(t + d for part in s["parts"] for t, d, _ in part) for s in scores}
    table = {n: {"family": f, "split": split_of(f), "length_ql": length[n]} for n, f in family.items()}
    (args.out / "families.json").write_text(json.dumps(table, indent=0))
    sizes = Counter(family.values())
    print(f"{len(scores)} scores, {len(sizes)} families; {sum(n - 1 for n in sizes.values())} repeat another's tune")
    print(f"largest families: {sizes.most_common(5)}")
    print(
        f"splits: {Counter(v['split'] for v in table.values())}",
        f"collections: {Counter(s['collection'] for s in scores)}",
        sep="\n",
    )
    print(f"{len(failed)} files failed", *failed, sep="\n  ")


if __name__ == "__main__":
    main()
