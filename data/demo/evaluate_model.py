"""How good the shipped model is on captions it has not seen: generates the test split and scores it.

    python data/demo/evaluate_model.py --checkpoint runs/shipped --out data/demo/magnet/metrics.json

Every test caption is decoded once. Beside the model stand its floors: the codec's reconstruction of the real clip, and
codes drawn from each codebook's own frequencies. The text-audio score comes with its control, the same clips against
the other captions, and a 95 % interval by bootstrap over clips.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from magnet_train.common.assets import demo_path
from magnet_train.common.audio_files import write_picture
from magnet_train.data.pipeline import EvaluationDataset
from magnet_train.data.shards import ShardSet
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.generator import load
from magnet_train.metrics.fad import FrechetAudioDistance
from magnet_train.metrics.kl import TagKL
from magnet_train.metrics.networks.musicnn import Heard, load_musicnn
from magnet_train.metrics.networks.text_audio import load_text_audio, true_minus_shuffled


def hear(wav: torch.Tensor, sample_rate: int) -> Heard:
    """A clip `channels t` as musicnn hears it, at the level the codec gave it."""
    musicnn = load_musicnn()
    return musicnn(musicnn.resample(wav.mean(0), sample_rate))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo", help="Release folder, checkpoint, run folder, or demo.")
    parser.add_argument("--shards", type=Path, help="Test shards with references; the embedded demo's if not given.")
    parser.add_argument("--clips", type=int, default=1000, help="Most captions to generate for.")
    parser.add_argument("--batch", type=int, default=8, help="Clips decoded together.")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the decoding noise.")
    parser.add_argument("--decoding", type=json.loads, default={}, help="JSON of decoding settings to replace.")
    parser.add_argument("--out", type=Path, help="JSON file for the result.")
    parser.add_argument("--picture", type=Path, help="PNG with eight clips above the codec's reconstructions.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator, scorer = load(args.checkpoint), load_text_audio()
    settings: DecodingConfig = replace(
        generator.decoding, **{k: tuple(v) if isinstance(v, list) else v for k, v in args.decoding.items()}
    )
    facts = generator.codec.facts
    shards = ShardSet.open(args.shards or demo_path("shards/test"))
    items, num_frames = [], round(generator.crop_s * facts.frame_rate)
    for batch in EvaluationDataset(shards, num_frames, args.batch):
        items += list(zip(batch["keys"], batch["captions"], batch["codes"], batch["references"], strict=True))
    items = items[: args.clips]
    captions = [caption for _, caption, _, _ in items]
    frequencies = torch.stack([torch.bincount(row.flatten(), minlength=facts.codebook_size).float()
                               for row in torch.stack([c for *_, c, _ in items]).transpose(0, 1)])  # fmt: skip
    clips: dict[str, list[Heard]] = {"model": [], "codec": [], "unigram": []}
    wavs: dict[str, np.ndarray] = {}
    start = time.monotonic()
    for first in tqdm(range(0, len(items), args.batch), unit="batch"):
        group = items[first : first + args.batch]
        padding = args.batch - len(group)
        result = generator.generate(
            [c for _, c, _, _ in group] + [""] * padding, args.seed, [k for k, *_ in group] + ["-"] * padding,
            decoding=settings,
        )  # fmt: skip
        for i, (_, caption, codes, _) in enumerate(group):
            draw = torch.Generator().manual_seed(first + i)
            unigram = torch.stack([torch.multinomial(f, num_frames, True, generator=draw) for f in frequencies])
            made = {"model": result.wav[i]}
            made |= {n: generator.codec.decode(c[None])[0] for n, c in (("codec", codes), ("unigram", unigram))}
            for name, wav in made.items():
                clips[name].append(hear(wav, facts.sample_rate))
            if len(wavs) < 16:
                wavs |= {
                    f"generated: {caption}": made["model"][0].numpy(),
                    f"codec: {caption}": made["codec"][0].numpy(),
                }
    seconds = time.monotonic() - start
    report: dict = {"clips": len(items), "different_captions": len(set(captions)), "seed": args.seed}
    report |= {
        "decoding": vars(settings),
        "seconds": round(seconds),
        "codec": facts.hash,
        "checkpoint": generator.about,
    }
    for name, heard in clips.items():
        fad, kl = FrechetAudioDistance(load_musicnn().dim), TagKL()
        for (*_, reference), h in zip(items, heard, strict=True):
            fad.update_reference(reference["embeddings"])
            fad.update(h.embeddings)
            kl.update(reference["tags"], h.tags)
        similarities = scorer.similarities(captions, heard)
        gap, low, high = true_minus_shuffled(similarities)
        report[name] = {
            "fad_musicnn": fad.compute().item(),
            "kl_musicnn_tags": kl.compute().item(),
            "text_audio": similarities.diagonal().mean().item(),
            "text_audio_true_minus_shuffled": gap,
            "interval_95": [low, high],
        }
    text = json.dumps(report, indent=2, default=list)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    if args.picture:
        write_picture(args.picture, wavs, facts.sample_rate)


if __name__ == "__main__":
    main()
