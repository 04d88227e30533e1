"""A small listening test and the CSV files of its raters."""

import csv
import json
from pathlib import Path

import numpy as np
import soundfile

from magnet_train.evaluation.clips import list_clips, load_captions
from magnet_train.evaluation.listening_test import LOWPASS, MISMATCH, export_listening_test
from magnet_train.evaluation.ratings import COLUMNS

RATE = 16_000
CAPTIONS = (
    "a slow air for flute",
    "a fast reel for fiddle </script><b>bold</b>",
    "a waltz for two harps",
)
# Simulated ratings of each system's quality and relevance.
OPINION = {
    "ours": (60, 70),
    "theirs": (40, 70),
    "reference": (95, 95),
    LOWPASS: (20, 90),
    MISMATCH: (95, 10),
}


def write_systems(root: Path, captions=CAPTIONS, systems=("reference", "ours", "theirs")) -> Path:
    """A clip for each system and caption: the pitch encodes the caption, harmonics and level the
    system."""
    for s, system in enumerate(systems):
        (root / system).mkdir(parents=True)
        for c, caption in enumerate(captions):
            t = np.arange(round((1.0 + 0.1 * s) * RATE)) / RATE
            wav = (
                0.05
                * (s + 1)
                * (np.sin(2 * np.pi * 300 * (c + 1) * t) + 0.5 * np.sin(2 * np.pi * 5000 * t))
            )
            path = root / system / f"{system}_{c}.wav"
            soundfile.write(path, wav, RATE)
            if s % 2:
                path.with_suffix(".json").write_text(json.dumps({"prompt": caption, "seed": 0}))
            else:
                path.with_suffix(".txt").write_text(caption + "\n")
    return root


def export(folder: Path, out: Path, **options):
    """Export a listening test from a folder with a subfolder per system."""
    systems = {path.name: list_clips(path) for path in sorted(folder.iterdir())}
    captions = {name: load_captions(None, clips) for name, clips in systems.items()}
    return export_listening_test(systems, captions, out, **options)


def ratings(key: dict, rater: str, opinion: dict, spread: float = 0, seed: int = 0) -> list[dict]:
    """All rows of one rater, as the page writes them."""
    rng, rows = np.random.default_rng(seed), []
    for order, (blinded_id, clip) in enumerate(key["clips"].items(), 1):
        for question, mean in zip(("quality", "relevance"), opinion[clip["system"]], strict=True):
            rating = int(np.clip(round(mean + spread * rng.normal()), 1, 100))
            row = (
                rater,
                clip["trial"],
                blinded_id,
                question,
                rating,
                f"{clip['seconds']:.2f}",
                order,
            )
            rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows


def write_csv(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_ratings(folder: Path, key: dict, raters: dict[str, dict]) -> list[Path]:
    return [
        write_csv(folder / f"{name}.csv", ratings(key, name, opinion))
        for name, opinion in raters.items()
    ]


def shifted(by: float) -> dict:
    """A rater whose ratings are higher by this amount, except for the reference."""
    return {s: (q + by, r + by) if s != "reference" else (q, r) for s, (q, r) in OPINION.items()}
