"""Render scores as 30-second audio files with captions, one folder per split, ready for `tokenize`.

    python data/demo/render.py --scores AUDIO/scores --out AUDIO

Each take of a score is arranged (arrange.py), played by midirenderer on the soundfont that
pretty_midi carries, mixed to 16 kHz mono, high-passed at 25 Hz, set to -20 dB RMS and given a
caption (captions.py). NAME.json next to NAME.flac holds the caption and the facts; NAME.notes.json
holds [onset_s, duration_s, pitch, velocity, is_lead] of every note. Finished takes are kept. The
order is shuffled: whatever has been rendered so far is a fair sample.
"""

import argparse
import hashlib
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from arrange import MUSIC_S, Arrangement, arrange, tempo_word
from captions import caption, key_name
from scipy.signal import butter, sosfiltfilt
from synth import mix
from tqdm import tqdm

from magnet_train.common.folders import replacing

SAMPLE_RATE = 16_000
HIGH_PASS_HZ = 25
MIN_SCORE_QL = 24
TAKES = {"train": 4, "validation": 1, "test": 1}
LICENCE = "score: public domain; encoding and audio: see data/demo/README.md"


def level(wav: np.ndarray, rate: int) -> np.ndarray:
    """High-pass at HIGH_PASS_HZ, and set `t` or `t c` to -20 dB RMS, peaks at most 0.97."""
    wav = sosfiltfilt(butter(2, HIGH_PASS_HZ, "highpass", fs=rate, output="sos"), wav, axis=0)
    wav = wav * (0.1 / max(float(np.sqrt(np.mean(wav**2))), 1e-4))
    return wav * min(1.0, 0.97 / max(float(np.abs(wav).max()), 1e-4))


def facts_of(score: dict, piece: Arrangement) -> dict:
    """Collect what a caption may say."""
    players = list(dict.fromkeys(voice.instrument for voice in piece.voices))
    return {
        "instruments": sorted(players) + (["drums"] if piece.drums else []),
        "lead": piece.ensemble,
        "accompaniment": [
            voice.instrument for voice in piece.voices if voice.role in ("chords", "bass")
        ],
        "form": piece.form,
        "drums": bool(piece.drums),
        "key": key_name(piece.tonic, score["mode"]),
        "tonic": piece.tonic,
        "mode": score["mode"],
        "tempo_bpm": round(piece.tempo_bpm, 3),
        "tempo": tempo_word(piece.tempo_bpm),
        "beat_s": round(piece.beat_s, 3),
        "bar_s": round(piece.bar_s, 3),
        "first_bar_s": round(piece.first_bar_s, 3),
        "metre": score["metre"],
        **{k: score[k] for k in ("style", "title", "composer", "collection", "source")},
    }


def seed_of(score_id: str, take: int) -> int:
    """Return the seed of one arrangement of a score."""
    return int(hashlib.sha256(f"{score_id} take {take}".encode()).hexdigest()[:8], 16)


def render(job: tuple[Path, Path, str, str, int]) -> float:
    """Render one take of a score, unless it exists, and return its length in seconds."""
    path, out, split, family, take = job
    name = f"{path.stem}_take{take}"
    about_path = out / split / f"{name}.json"
    if about_path.exists():
        return MUSIC_S
    score = json.loads(path.read_text())
    seed = seed_of(score["id"], take)
    piece = arrange(score, seed)
    wav = level(mix(piece, SAMPLE_RATE, MUSIC_S, out / "notes"), SAMPLE_RATE)
    facts = facts_of(score, piece)
    about = {"caption": caption(facts, np.random.default_rng([seed, 1])), **facts}
    about |= {"piece": score["id"], "take": take, "family": family, "licence": LICENCE}
    notes = sorted(
        [round(t, 4), round(d, 4), pitch, velocity, voice.role == "lead"]
        for voice in piece.voices
        for t, d, pitch, velocity in voice.notes
    )
    _write(out / split / f"{name}.notes.json", lambda p: p.write_text(json.dumps(notes)))
    _write(
        out / split / f"{name}.flac",
        lambda p: soundfile.write(p, wav, SAMPLE_RATE, "PCM_16", format="FLAC"),
    )
    _write(about_path, lambda p: p.write_text(json.dumps(about)))
    return MUSIC_S


def _write(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        write(temporary)


def plan(scores: Path, out: Path, splits: list[str]) -> list[tuple[Path, Path, str, str, int]]:
    """List the takes to render: first takes of all scores in a shuffled order, then second ones."""
    table = json.loads((scores / "families.json").read_text())
    names = [
        n
        for n, about in table.items()
        if about["length_ql"] >= MIN_SCORE_QL and about["key_is_clear"]
    ]
    names.sort(key=lambda n: hashlib.sha256(n.encode()).digest())
    jobs = []
    for take in range(max(TAKES.values())):
        for n in names:
            split = table[n]["split"]
            if split in splits and take < TAKES[split]:
                jobs.append((scores / f"{n}.json", out, split, table[n]["family"], take))
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scores", type=Path, required=True, help="Folder that scores.py wrote.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the split folders.")
    parser.add_argument(
        "--processes", type=int, default=1, help="Number of takes rendered at the same time."
    )
    parser.add_argument(
        "--splits", nargs="+", choices=TAKES, default=list(TAKES), help="Splits to render."
    )
    parser.add_argument(
        "--hours", type=float, help="Stop after so many hours of audio, those found included."
    )
    args = parser.parse_args()
    jobs = plan(args.scores, args.out, args.splits)
    if args.hours is not None:
        jobs = jobs[: round(args.hours * 3600 / MUSIC_S)]
    total = 0.0
    with multiprocessing.Pool(args.processes) as pool, tqdm(total=len(jobs), unit="take") as bar:
        for seconds in pool.imap_unordered(render, jobs):
            total += seconds
            bar.set_postfix_str(f"{total / 3600:.2f} h")
            bar.update()
    print(f"{total / 3600:.2f} hours in {args.out}")


if __name__ == "__main__":
    main()
