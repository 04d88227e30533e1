"""How good the demo's codec is on music it has not seen: entries used, tags kept, pitch kept.

    python data/demo/evaluate_codec.py --codec data/demo/codec --audio AUDIO/test

Pitch is compared by chroma: the 12 pitch classes of each moment, in the original and in the reconstruction. Beside
each figure stands its control, the same comparison with another clip.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch.nn import functional as F
from tqdm import tqdm

from magnet_train.codec.base import load_codec
from magnet_train.metrics.chroma import chroma, chroma_agreement
from magnet_train.metrics.fad import Moments
from magnet_train.metrics.networks.musicnn import load_musicnn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", default="demo", help="Codec to judge: demo, or a folder.")
    parser.add_argument("--audio", type=Path, required=True, help="Folder of 16 kHz .flac files of unseen scores.")
    parser.add_argument("--clips", type=int, help="Use only so many files, spread over the folder.")
    parser.add_argument("--seconds", type=float, default=30, help="Length used of each file, in seconds.")
    parser.add_argument("--out", type=Path, help="JSON file for the result.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    codec, musicnn = load_codec(args.codec), load_musicnn()
    files = sorted(args.audio.glob("*.flac"))
    files = files[:: max(1, len(files) // args.clips)][: args.clips] if args.clips else files
    if len(files) < 2:
        raise SystemExit(f"error: {args.audio} holds {len(files)} .flac files; two are needed for the controls")
    used = torch.zeros(codec.facts.num_codebooks, codec.facts.codebook_size, dtype=torch.bool)
    real_windows, made_windows = [], []
    tags, embeddings, chromas = [], [], []
    for path in tqdm(files, unit="clip"):
        wav, rate = soundfile.read(path, frames=round(args.seconds * 16_000), dtype="float32")
        codes = codec.encode(torch.from_numpy(wav)[None, None])
        for k, row in enumerate(codes[0]):
            used[k, row] = True
        out = codec.decode(codes)[0, 0, : len(wav)].numpy()
        real, made = (musicnn(torch.from_numpy(w)) for w in (wav, out))
        real_windows.append(real.embeddings)
        made_windows.append(made.embeddings)
        tags.append((real.tags.mean(0), made.tags.mean(0)))
        embeddings.append((real.embeddings.mean(0), made.embeddings.mean(0)))
        chromas.append((chroma(wav, rate), chroma(out, rate)))
    real, made = (torch.stack(side) for side in zip(*tags, strict=True))
    real_embedding, made_embedding = (torch.stack(side) for side in zip(*embeddings, strict=True))

    def pitch(shift: int) -> np.ndarray:
        originals, others = zip(*chromas, strict=True)
        pairs = zip(originals, others[shift:] + others[:shift], strict=True)
        return np.mean([chroma_agreement(*pair) for pair in pairs], axis=0)

    (chroma_cosine, same_class), (control_cosine, control_class) = pitch(0), pitch(1)
    result = {
        "codec_hash": codec.facts.hash,
        "clips": len(files),
        "entries_used": used.float().mean(1).tolist(),
        "tag_cosine": F.cosine_similarity(real, made).mean().item(),
        "tag_cosine_control": F.cosine_similarity(real, made.roll(1, 0)).mean().item(),
        "embedding_cosine": F.cosine_similarity(real_embedding, made_embedding).mean().item(),
        "embedding_cosine_control": F.cosine_similarity(real_embedding, made_embedding.roll(1, 0)).mean().item(),
        "chroma_cosine": float(chroma_cosine),
        "chroma_cosine_control": float(control_cosine),
        "strongest_pitch_class_agrees": float(same_class),
        "strongest_pitch_class_agrees_control": float(control_class),
        "fad_musicnn": Moments.of(torch.cat(made_windows)).distance(Moments.of(torch.cat(real_windows))),
    }
    text = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
