"""Make sixteen short recordings in the formats, sample rates and channels that `tokenize` meets.

    python data/demo/clips.py --scores AUDIO/scores --out data/demo/clips

The pieces are from the test split, in arrangements that no other file has; the `.txt` next to each
contains its caption.
"""

import argparse
import hashlib
import json
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr
from arrange import Arrangement, arrange
from captions import caption
from render import facts_of, level
from synth import SYNTH_RATE, synthesise
from tqdm import tqdm

from magnet_train.common.folders import replacing


class Form(NamedTuple):
    """How one clip is stored."""

    suffix: str
    rate: int
    """In Hz."""
    channels: int
    length_s: float


# Lossless ones are the short ones, so that all sixteen stay within a few megabytes.
FORMS = (
    Form("wav", 16_000, 1, 12),
    Form("flac", 44_100, 2, 10),
    Form("ogg", 48_000, 2, 20),
    Form("mp3", 44_100, 2, 16),
    Form("wav", 22_050, 2, 8),
    Form("flac", 16_000, 1, 20),
    Form("ogg", 22_050, 1, 14),
    Form("mp3", 48_000, 2, 18),
    Form("wav", 44_100, 1, 8),
    Form("flac", 48_000, 1, 9),
    Form("ogg", 44_100, 2, 16),
    Form("mp3", 22_050, 1, 15),
    Form("flac", 22_050, 2, 11),
    Form("mp3", 16_000, 1, 20),
    Form("ogg", 16_000, 1, 10),
    Form("flac", 44_100, 1, 13),
)
FADE_S = 0.4


def order(text: str) -> int:
    """Return a number that depends on the text alone, to shuffle and as a seed."""
    return int(hashlib.sha256(f"clip {text}".encode()).hexdigest()[:8], 16)


def show(score: dict[str, Any], piece: Arrangement) -> set[str]:
    """List what a listener may tell apart: players, style, form."""
    return {
        *(voice.instrument for voice in piece.voices),
        score["style"],
        piece.form,
        *(["drums"] if piece.drums else []),
    }


def choose(pieces: dict[str, tuple[dict[str, Any], Arrangement]], count: int) -> list[str]:
    """Choose pieces that show many instruments, styles and forms: each next one adds the most."""
    left = sorted(pieces, key=order)
    shown = set[str]()
    chosen = list[str]()
    while left and len(chosen) < count:
        traits = {name: show(*pieces[name]) for name in left}
        best = max(left, key=lambda name: len(traits[name] - shown))
        shown |= traits[best]
        chosen.append(best)
        left.remove(best)
    return chosen


def excerpt(piece: Arrangement, form: Form) -> np.ndarray:
    """Return the beginning of a piece as it will be stored, `t c`, faded out, at -20 dB RMS."""
    wav = soxr.resample(
        synthesise(piece)[: round(form.length_s * SYNTH_RATE)], SYNTH_RATE, form.rate
    )
    if form.channels == 1:
        wav = wav.mean(1, keepdims=True)
    fade = round(FADE_S * form.rate)
    wav[-fade:] *= np.linspace(1, 0, fade)[:, None]
    return level(wav, form.rate)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scores", type=Path, required=True, help="Folder that scores.py wrote.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the clips.")
    parser.add_argument(
        "--pool",
        type=int,
        default=80,
        help="Number of test pieces from which the clips are chosen.",
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = json.loads((args.scores / "families.json").read_text())
    pieces = dict[str, tuple[dict[str, Any], Arrangement]]()
    for name in islice(
        sorted((n for n in table if table[n]["split"] == "test"), key=order), args.pool
    ):
        score = json.loads((args.scores / f"{name}.json").read_text())
        piece = arrange(score, order(name))
        if all(voice.notes and voice.notes[0][0] < 4 for voice in piece.voices):
            pieces[name] = score, piece
    for name, form in tqdm(
        list(zip(choose(pieces, len(FORMS)), cycle(FORMS), strict=False)), unit="clip"
    ):
        score, piece = pieces[name]
        facts = facts_of(score, piece)
        players = "-".join(facts["instruments"])[:48].replace(" ", "-").lower()
        file = args.out / f"{name}_{players}.{form.suffix}"
        file.with_suffix(".txt").write_text(
            caption(facts, np.random.default_rng(order(name))) + "\n"
        )
        with replacing(file) as temporary:
            soundfile.write(temporary, excerpt(piece, form), form.rate, format=form.suffix.upper())


if __name__ == "__main__":
    main()
