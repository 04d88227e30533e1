"""Scores become audio files of about 30 seconds with captions, one folder a split, ready for `tokenize`.

    python data/demo/render.py --scores AUDIO/scores --out AUDIO

Each piece is arranged (arrange.py), played by midirenderer on the soundfont that pretty_midi carries, brought to
16 kHz mono at -20 dB RMS, and cut into files with a wording of their own (captions.py). Finished pieces are kept.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import midirenderer
import numpy as np
import pretty_midi
import soundfile
import soxr
from arrange import INSTRUMENTS, Arrangement, arrange, tempo_word
from captions import caption, key_name
from tqdm import tqdm

SAMPLE_RATE, SYNTH_RATE = 16_000, 48_000
EXCERPT_S, SHORTEST_S = 30.0, 12.0
LICENCE = "score: public domain; encoding and audio: see data/demo/README.md"


@cache
def _soundfont() -> bytes:
    return (Path(find_spec("pretty_midi").origin).parent / "TimGM6mb.sf2").read_bytes()


def synthesise(piece: Arrangement) -> np.ndarray:
    """48 kHz stereo `t 2`, as the synthesiser gives it."""
    midi = pretty_midi.PrettyMIDI()
    for name, notes in piece.voices:
        player = pretty_midi.Instrument(program=INSTRUMENTS[name][0])
        player.notes = [pretty_midi.Note(v, p, t, t + d) for t, d, p, v in notes]
        midi.instruments.append(player)
    if piece.drums:
        kit = pretty_midi.Instrument(program=0, is_drum=True)
        kit.notes = [pretty_midi.Note(v, p, t, t + d) for t, d, p, v in piece.drums]
        midi.instruments.append(kit)
    file = io.BytesIO()
    midi.write(file)
    return soundfile.read(io.BytesIO(bytes(midirenderer.render_wave_from(_soundfont(), file.getvalue()))))[0]


def level(wav: np.ndarray) -> np.ndarray:
    """At -20 dB RMS, peaks at most 0.97."""
    wav = wav * (0.1 / max(float(np.sqrt(np.mean(wav**2))), 1e-4))
    return wav * min(1.0, 0.97 / max(float(np.abs(wav).max()), 1e-4))


def facts_of(score: dict, piece: Arrangement) -> dict:
    """What a caption may say."""
    return {
        "instruments": sorted({name for name, _ in piece.voices}) + (["drums"] if piece.drums else []),
        "ensemble": piece.ensemble,
        "form": piece.form,
        "drums": bool(piece.drums),
        "key": key_name(piece.tonic, score["mode"]),
        "tempo_bpm": piece.tempo_bpm,
        "tempo": tempo_word(piece.tempo_bpm),
        "metre": score["metre"],
        **{k: score[k] for k in ("style", "title", "composer", "collection", "source")},
    }


def render(job: tuple[Path, Path, str, str]) -> tuple[float, float]:
    """One score to files; seconds written, and of these seconds that are no repetition."""
    path, out, split, family = job
    note = out / "pieces" / f"{path.stem}.json"
    if note.exists():
        done = json.loads(note.read_text())
        return done["seconds"], done["distinct_s"]
    score = json.loads(path.read_text())
    seed = int(hashlib.sha256(score["id"].encode()).hexdigest()[:8], 16)
    piece = arrange(score, seed)
    wav = soxr.resample(synthesise(piece).mean(1), SYNTH_RATE, SAMPLE_RATE)
    wav = level(wav[: round((piece.length_s + 0.5) * SAMPLE_RATE)])
    facts, seconds = facts_of(score, piece), 0.0
    for number, start in enumerate(range(0, len(wav), round(EXCERPT_S * SAMPLE_RATE))):
        excerpt = wav[start : start + round(EXCERPT_S * SAMPLE_RATE)]
        if len(excerpt) < SHORTEST_S * SAMPLE_RATE or np.sqrt(np.mean(excerpt**2)) < 0.01:
            continue
        name = f"{score['id']}_{facts['ensemble'].split(',')[0].replace(' ', '-').lower()}_{number:02d}"
        about = {"caption": caption(facts, np.random.default_rng([seed, number])), **facts}
        about |= {"piece": score["id"], "family": family, "licence": LICENCE}
        _write(out / split / f"{name}.json", lambda p, about=about: p.write_text(json.dumps(about)))
        _write(
            out / split / f"{name}.flac",
            lambda p, w=excerpt: soundfile.write(p, w, SAMPLE_RATE, "PCM_16", format="FLAC"),
        )
        seconds += len(excerpt) / SAMPLE_RATE
    done = {"seconds": seconds, "distinct_s": min(seconds, piece.distinct_s), "instruments": facts["instruments"]}
    done |= {k: facts[k] for k in ("collection", "tempo", "style", "form")} | {"split": split}
    _write(note, lambda p: p.write_text(json.dumps(done)))
    return seconds, done["distinct_s"]


def _write(path: Path, write) -> None:
    """Aside, then moved, so that a reader meets whole files only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    write(aside)
    os.replace(aside, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, required=True, help="Folder that scores.py wrote.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the split folders.")
    parser.add_argument("--processes", type=int, default=1, help="Pieces rendered at the same time.")
    parser.add_argument("--least_ql", type=float, default=32, help="Shortest score rendered, in quarter notes.")
    parser.add_argument("--limit", type=int, help="Render only so many pieces, spread over all.")
    args = parser.parse_args()
    table = json.loads((args.scores / "families.json").read_text())
    # Shuffled by name, so that the first hour is a fair sample of all.
    names = sorted(table, key=lambda n: hashlib.sha256(n.encode()).digest())
    names = [n for n in names if table[n]["length_ql"] >= args.least_ql][: args.limit]
    jobs = [(args.scores / f"{n}.json", args.out, table[n]["split"], table[n]["family"]) for n in names]
    total = distinct = 0.0
    with multiprocessing.Pool(args.processes) as pool, tqdm(total=len(jobs), unit="piece") as bar:
        for seconds, new in pool.imap_unordered(render, jobs):
            total, distinct = total + seconds, distinct + new
            bar.set_postfix_str(f"{total / 3600:.2f} h, {distinct / 3600:.2f} h distinct")
            bar.update()
    print(f"{total / 3600:.2f} hours, of these {distinct / 3600:.2f} h without repetitions, in {args.out}")


if __name__ == "__main__":
    main()
