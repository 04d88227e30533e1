"""Judge the demo's codec on music that it has not heard: against the score, by ear, by its codes.

    python data/demo/evaluate_codec.py --audio AUDIO/test --train AUDIO/train --out figures.json

Against the score (NAME.notes.json): is the most salient pitch a note that sounds, and are onsets
found within 50 ms? The same is asked of the original, since such readings err on real audio too.
By ear: musicnn's tags and embeddings, chroma, level. By its codes: use, cross-entropy of their
frequencies and of a table of counts, repeats. And what codes drawn at random sound like: DC, peaks.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from scipy.ndimage import uniform_filter1d
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from magnet_train.codec.base import Codec, load_codec
from magnet_train.common.folders import write_json
from magnet_train.metrics.baselines import CountTables
from magnet_train.metrics.chroma import chroma, chroma_agreement
from magnet_train.metrics.fad import Moments
from magnet_train.metrics.music import HOP_S, onset_strength
from magnet_train.metrics.networks.musicnn import load_musicnn

SAMPLE_RATE = 16_000
PITCH_HOP = 320
"""Samples between two readings of the salient pitch."""
LOWEST, HIGHEST = 33, 100
"""MIDI numbers between which it is looked for."""
Note = tuple[float, float, int]
"""Onset and duration in seconds, MIDI pitch."""


def salient_pitches(wav: np.ndarray) -> np.ndarray:
    """Return the MIDI number whose eight harmonics hold most, one each 20 ms: `n`."""
    size, width = 4096, 2048
    padded = np.pad(wav, (width // 2, width))
    frames = np.lib.stride_tricks.sliding_window_view(padded, width)[::PITCH_HOP]
    frames = frames[: -(-len(wav) // PITCH_HOP)]
    roots = np.sqrt(np.abs(np.fft.rfft(frames * np.hanning(width), n=size)))
    # Partials stand out from their surroundings; noise does not.
    peaks = np.maximum(roots - uniform_filter1d(roots, 61, axis=1), 0)
    salience = np.zeros((len(peaks), HIGHEST - LOWEST + 1))
    for column, pitch in enumerate(range(LOWEST, HIGHEST + 1)):
        fundamental = 440 * 2 ** ((pitch - 69) / 12) * size / SAMPLE_RATE
        for harmonic in range(1, 9):
            low, high = (fundamental * harmonic * 2 ** (x / 12) for x in (-0.35, 0.35))
            bins = slice(int(np.ceil(low)), max(int(np.ceil(high)), int(np.ceil(low)) + 1))
            if bins.start < size // 2:
                salience[:, column] += 0.75 ** (harmonic - 1) * peaks[:, bins].max(1)
    return LOWEST + salience.argmax(1)


def pitch_hits(wav: np.ndarray, notes: list[Note]) -> float:
    """Return the share of moments with a note at which the salient pitch is one that sounds."""
    top = salient_pitches(wav)
    times = np.arange(len(top)) * PITCH_HOP / SAMPLE_RATE
    surely, perhaps = np.zeros((2, len(top), 128), dtype=bool)
    for onset, duration, pitch in notes:
        surely[(times >= onset + 0.03) & (times < onset + duration), pitch] = True
        perhaps[(times >= onset - 0.03) & (times < onset + duration + 0.08), pitch] = True
    some_note = surely.any(1)
    return float(perhaps[np.arange(len(top)), top][some_note].mean())


def onsets(wav: np.ndarray) -> np.ndarray:
    """Return moments at which something begins, in seconds: peaks of the onset strength."""
    strength = onset_strength(wav, SAMPLE_RATE)
    windows = np.lib.stride_tricks.sliding_window_view
    highest = windows(np.pad(strength, 2), 5).max(1)
    usual = windows(np.pad(strength, 12, mode="edge"), 25).mean(1)
    return np.flatnonzero((strength == highest) & (strength > usual + 3)) * HOP_S


def onset_hits(wav: np.ndarray, notes: list[Note]) -> np.ndarray:
    """Return how many onsets are right within 50 ms, are in the score, are found."""
    wanted: list[float] = []
    for onset in sorted(note[0] for note in notes):
        if not wanted or onset - wanted[-1] > 0.04:  # one chord, one onset
            wanted.append(onset)
    found = onsets(wav)
    right = i = j = 0
    while i < len(wanted) and j < len(found):
        apart = found[j] - wanted[i]
        right += abs(apart) <= 0.05
        i += apart > -0.05
        j += apart <= 0.05
    return np.array([right, len(wanted), len(found)])


def f1(hits: np.ndarray) -> float:
    """Return 2 right / (wanted + found)."""
    return float(2 * hits[0] / (hits[1] + hits[2]))


def audio(folder: Path, clips: int | None, seconds: float) -> list[tuple[Path, np.ndarray]]:
    """Read at most so many .flac files, spread over a folder."""
    files = sorted(folder.glob("*.flac"))
    files = files[:: max(1, len(files) // clips)][:clips] if clips else files
    if len(files) < 2:
        raise SystemExit(
            f"error: {folder} holds {len(files)} .flac files; two are needed for the controls"
        )
    length = round(seconds * SAMPLE_RATE)
    return [(path, soundfile.read(path, frames=length, dtype="float32")[0]) for path in files]


def judge_codes(codes: list[Tensor], tables: CountTables) -> dict[str, list[float]]:
    """Return figures of each codebook; `codes` are `k t`."""
    size = tables.unigram.shape[1]
    repeats = [(row[:, 1:] == row[:, :-1]).double().mean(1) for row in codes]
    rows = torch.cat(codes, dim=1)
    return {
        "entries_used": [len(row.unique()) / size for row in rows],
        "unigram_ce": torch.cat([tables.unigram_losses(c[None])[0] for c in codes], 1)
        .mean(1)
        .tolist(),
        "bigram_ce": torch.cat([tables.bigram_losses(c[None])[0] for c in codes], 1)
        .mean(1)
        .tolist(),
        "repeats": torch.stack(repeats).mean(0).tolist(),
    }


def judge_random_codes(codec: Codec, clips: int = 16, frames: int = 250) -> dict[str, float]:
    """Return DC and peaks of what the codec makes of codes drawn evenly, each frame for itself."""
    facts = codec.facts
    generator = torch.Generator().manual_seed(0)
    shape = (clips, facts.num_codebooks, frames)
    wav = codec.decode(torch.randint(facts.codebook_size, shape, generator=generator))[:, 0]
    power = torch.fft.rfft(wav).abs().square()
    freqs = torch.fft.rfftfreq(wav.shape[1], 1 / facts.sample_rate)
    return {
        "largest_mean": wav.mean(1).abs().max().item(),
        "power_below_20_hz": (power[:, freqs < 20].sum() / power.sum()).item(),
        "rms": wav.square().mean().sqrt().item(),
        "peak": wav.abs().max().item(),
        "share_clipped": (wav.abs() >= 0.999).double().mean().item(),
    }


def judge(codec: Codec, clips: list[tuple[Path, np.ndarray]]) -> tuple[dict, list[Tensor]]:
    """Return figures of the reconstructions, and the codes."""
    musicnn = load_musicnn()
    heard: dict[str, list] = {"real": [], "codec": []}
    chromas, pitches, levels, all_codes = [], [], [], []
    onset_sums = {"real": np.zeros(3), "codec": np.zeros(3)}
    for path, wav in tqdm(clips, unit="clip"):
        codes = codec.encode(torch.from_numpy(wav)[None, None])
        all_codes.append(codes[0])
        made = codec.decode(codes)[0, 0, : len(wav)].numpy()
        for side, sound in (("real", wav), ("codec", made)):
            heard[side].append(musicnn(torch.from_numpy(sound)))
        chromas.append((chroma(wav, SAMPLE_RATE), chroma(made, SAMPLE_RATE)))
        levels.append(20 * np.log10(np.sqrt(np.mean(made**2) / np.mean(wav**2))))
        notes = json.loads(path.with_suffix(".notes.json").read_text())
        notes = [(t, d, p) for t, d, p, *_ in notes if t < len(wav) / SAMPLE_RATE - 0.1]
        pitches.append((pitch_hits(wav, notes), pitch_hits(made, notes)))
        # The score's notes leave out the drums.
        if not json.loads(path.with_suffix(".json").read_text())["drums"]:
            onset_sums["real"] += onset_hits(wav, notes)
            onset_sums["codec"] += onset_hits(made, notes)

    def cosine(field: str, shift: int) -> float:
        real, made = (
            torch.stack([getattr(output, field).mean(0) for output in heard[side]])
            for side in ("real", "codec")
        )
        return F.cosine_similarity(real, made.roll(shift, 0)).mean().item()

    def pitch_classes(shift: int) -> np.ndarray:
        originals, others = zip(*chromas, strict=True)
        pairs = zip(originals, others[shift:] + others[:shift], strict=True)
        return np.mean([chroma_agreement(*pair) for pair in pairs], axis=0)

    windows = {
        side: Moments.of(torch.cat([output.embeddings for output in outputs]))
        for side, outputs in heard.items()
    }
    (chroma_cosine, same_class), (control_cosine, control_class) = map(pitch_classes, (0, 1))
    real_pitch, codec_pitch = np.mean(pitches, axis=0)
    figures = {
        "clips": len(clips),
        "pitch_sounds_real": float(real_pitch),
        "pitch_sounds": float(codec_pitch),
        "onset_f1_real": f1(onset_sums["real"]),
        "onset_f1": f1(onset_sums["codec"]),
        "tag_cosine": cosine("tags", 0),
        "tag_cosine_control": cosine("tags", 1),
        "embedding_cosine": cosine("embeddings", 0),
        "embedding_cosine_control": cosine("embeddings", 1),
        "chroma_cosine": float(chroma_cosine),
        "chroma_cosine_control": float(control_cosine),
        "strongest_pitch_class_agrees": float(same_class),
        "strongest_pitch_class_agrees_control": float(control_class),
        "level_db": float(np.mean(levels)),
        "fad_musicnn": windows["codec"].distance(windows["real"]),
    }
    return figures, all_codes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codec", default="demo", help="Codec to judge: demo, or a folder.")
    parser.add_argument("--audio", type=Path, required=True, help="Folder of unseen clips.")
    parser.add_argument("--train", type=Path, help="Folder of clips that codes are counted in.")
    parser.add_argument("--clips", type=int, help="Use only so many files, spread over the folder.")
    parser.add_argument("--train_clips", type=int, default=400, help="Files that are counted.")
    parser.add_argument("--seconds", type=float, default=30, help="Length used of each file.")
    parser.add_argument("--out", type=Path, help="JSON file for the result.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    codec = load_codec(args.codec)
    result: dict = {"codec_hash": codec.facts.hash}
    figures, codes = judge(codec, audio(args.audio, args.clips, args.seconds))
    result |= figures | {"random_codes": judge_random_codes(codec)}
    if args.train:
        counted = [
            codec.encode(torch.from_numpy(wav)[None, None])[0]
            for _, wav in tqdm(audio(args.train, args.train_clips, args.seconds), unit="clip")
        ]
        result |= judge_codes(codes, CountTables.count(counted, codec.facts.codebook_size))
    print(json.dumps(result, indent=2))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
