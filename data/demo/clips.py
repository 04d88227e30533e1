"""A handful of short recordings in every shape that `tokenize` meets: formats, sample rates, mono and stereo.

    python data/demo/clips.py --scores AUDIO/scores --out data/demo/clips

The pieces are of the test split, in arrangements that no other file has; a `.txt` beside each holds its caption.
"""

import argparse
import hashlib
import json
import os
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr
from arrange import Arrangement, arrange
from captions import caption
from render import SYNTH_RATE, facts_of, level, synthesise
from scipy.signal import butter, sosfiltfilt
from tqdm import tqdm


class Form(NamedTuple):
    """How one clip is stored."""

    suffix: str
    rate: int
    """In Hz."""
    channels: int
    length_s: float


# Lossless ones are the short ones, so that all sixteen stay within a few megabytes.
FORMS = (
    Form("wav", 16_000, 1, 12), Form("flac", 44_100, 2, 10), Form("ogg", 48_000, 2, 20), Form("mp3", 44_100, 2, 16),
    Form("wav", 22_050, 2, 8), Form("flac", 16_000, 1, 20), Form("ogg", 22_050, 1, 14), Form("mp3", 48_000, 2, 18),
    Form("wav", 44_100, 1, 8), Form("flac", 48_000, 1, 9), Form("ogg", 44_100, 2, 16), Form("mp3", 22_050, 1, 15),
    Form("flac", 22_050, 2, 11), Form("mp3", 16_000, 1, 20), Form("ogg", 16_000, 1, 10), Form("flac", 44_100, 1, 13),
)  # fmt: skip
FADE_S = 0.4


def order(text: str) -> int:
    """A number that depends on the text alone: shuffles, and seeds."""
    return int(hashlib.sha256(f"clip {text}".encode()).hexdigest()[:8], 16)


def show(score: dict[str, Any], piece: Arrangement) -> set[str]:
    """What a listener may tell apart: the players, the kind of piece, the form."""
    return {*(player for player, _ in piece.voices), score["style"], piece.form, *(["drums"] if piece.drums else [])}


def choose(pieces: dict[str, tuple[dict[str, Any], Arrangement]], count: int) -> list[str]:
    """Pieces that between them show the most instruments, styles and forms: each the one that adds most."""
    left, shown, chosen = sorted(pieces, key=order), set[str](), list[str]()
    while left and len(chosen) < count:
        wares = {name: show(*pieces[name]) for name in left}
        best = max(left, key=lambda name: len(wares[name] - shown))
        shown |= wares[best]
        chosen.append(best)
        left.remove(best)
    return chosen


def excerpt(piece: Arrangement, form: Form) -> np.ndarray:
    """The beginning of a piece as it will be stored, `t c`, faded out, at -20 dB RMS."""
    wav = soxr.resample(synthesise(piece)[: round(form.length_s * SYNTH_RATE)], SYNTH_RATE, form.rate)
    if form.channels == 1:
        wav = wav.mean(1, keepdims=True)
    # The soundfont's alto saxophone rests on a constant that a listener never hears and a level meter does.
    wav = sosfiltfilt(butter(2, 20, "highpass", fs=form.rate, output="sos"), wav, axis=0)
    fade = round(FADE_S * form.rate)
    wav[-fade:] *= np.linspace(1, 0, fade)[:, None]
    return level(wav)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, required=True, help="Folder that scores.py wrote.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the clips.")
    parser.add_argument("--pool", type=int, default=80, help="Number of test pieces from which the clips are chosen.")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = json.loads((args.scores / "families.json").read_text())
    longest = max(form.length_s for form in FORMS)
    pieces = dict[str, tuple[dict[str, Any], Arrangement]]()
    for name in islice(sorted((n for n in table if table[n]["split"] == "test"), key=order), args.pool):
        score = json.loads((args.scores / f"{name}.json").read_text())
        piece = arrange(score, order(name))
        if piece.length_s > longest and all(notes and notes[0][0] < 4 for _, notes in piece.voices):
            pieces[name] = score, piece
    for name, form in tqdm(list(zip(choose(pieces, len(FORMS)), cycle(FORMS), strict=False)), unit="clip"):
        score, piece = pieces[name]
        facts = facts_of(score, piece)
        file = args.out / f"{name}_{'-'.join(facts['instruments'])[:48].replace(' ', '-').lower()}.{form.suffix}"
        aside = file.with_name(f".{file.name}")
        soundfile.write(aside, excerpt(piece, form), form.rate, format=form.suffix.upper())
        file.with_suffix(".txt").write_text(caption(facts, np.random.default_rng(order(name))) + "\n")
        os.replace(aside, file)


if __name__ == "__main__":
    main()
