"""Music drawn at random, for the codec's first lessons: every instrument, every pitch, no score that a test could meet.

python data/demo/random_music.py --out AUDIO/random --hours 2
"""

import argparse
import io
from importlib.util import find_spec
from pathlib import Path

import midirenderer
import numpy as np
import pretty_midi
import soundfile
import soxr
from tqdm import tqdm

from magnet_train.common.folders import replacing

SAMPLE_RATE = 16_000
SCALES = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 10),
    "pentatonic": (0, 2, 4, 7, 9),
}


def random_piece(rng: np.random.Generator, length_s: float) -> pretty_midi.PrettyMIDI:
    """One to four voices that wander through a scale, each now and then in chords; drums in a third of the pieces."""
    midi = pretty_midi.PrettyMIDI()
    tonic, beat = int(rng.integers(12)), 60 / rng.uniform(55, 180)
    scale = list(SCALES.values())[rng.integers(len(SCALES))]
    for _ in range(rng.integers(1, 5)):
        voice = pretty_midi.Instrument(program=int(rng.integers(0, 112)))
        degree, octave = int(rng.integers(len(scale))), int(rng.integers(2, 6))
        chord_share, rest_share = rng.uniform(0, 0.6), rng.uniform(0, 0.3)
        now = 0.0
        while now < length_s:
            duration = beat * rng.choice([0.25, 0.5, 0.5, 1, 1, 2, 4])
            if rng.random() > rest_share:
                degree += int(rng.integers(-3, 4))
                degree = int(np.clip(degree, -7, 14))
                steps = (0, 2, 4) if rng.random() < chord_share else (0,)
                for step in steps:
                    turn, place = divmod(degree + step, len(scale))
                    pitch = 12 * (octave + 1 + turn) + tonic + scale[place]
                    if 24 <= pitch <= 103:
                        sounding = duration * rng.uniform(0.5, 1.0)
                        voice.notes.append(
                            pretty_midi.Note(int(rng.integers(50, 115)), pitch, now, now + sounding)
                        )
            now += duration
        midi.instruments.append(voice)
    if rng.random() < 0.33:
        drums = pretty_midi.Instrument(program=0, is_drum=True)
        pattern = rng.choice([35, 38, 42, 42, 46, 49, 45], size=8)
        for i, now in enumerate(np.arange(0, length_s, beat / 2)):
            if rng.random() < 0.8:
                drums.notes.append(
                    pretty_midi.Note(
                        int(rng.integers(50, 110)), int(pattern[i % 8]), now, now + 0.1
                    )
                )
        midi.instruments.append(drums)
    return midi


def render(midi: pretty_midi.PrettyMIDI, soundfont: bytes, length_s: float) -> np.ndarray:
    """16 kHz mono at -20 dB RMS, peaks at most 0.97."""
    file = io.BytesIO()
    midi.write(file)
    wav, rate = soundfile.read(
        io.BytesIO(bytes(midirenderer.render_wave_from(soundfont, file.getvalue())))
    )
    wav = soxr.resample(wav.mean(1), rate, SAMPLE_RATE)[: round(length_s * SAMPLE_RATE)]
    wav *= 0.1 / max(np.sqrt(np.mean(wav**2)), 1e-4)
    return wav * min(1.0, 0.97 / max(np.abs(wav).max(), 1e-4))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="Folder for the .flac files.")
    parser.add_argument(
        "--hours", type=float, default=2.0, help="Length of all files together, in hours."
    )
    parser.add_argument(
        "--piece_s", type=float, default=20.0, help="Length of one file, in seconds."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the notes.")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    soundfont = (Path(find_spec("pretty_midi").origin).parent / "TimGM6mb.sf2").read_bytes()
    for i in tqdm(range(round(args.hours * 3600 / args.piece_s)), unit="piece"):
        path = args.out / f"random_{args.seed}_{i:05d}.flac"
        if path.exists():
            continue
        wav = render(
            random_piece(np.random.default_rng([args.seed, i]), args.piece_s),
            soundfont,
            args.piece_s,
        )
        with replacing(path) as temporary:
            soundfile.write(temporary, wav, SAMPLE_RATE, subtype="PCM_16", format="FLAC")


if __name__ == "__main__":
    main()
