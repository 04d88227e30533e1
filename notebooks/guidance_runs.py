"""The runs that ablation.ipynb reads: the shipped model at several strengths of guidance, each with several seeds.

    python guidance_runs.py      # writes guidance_runs.csv, a line for each run; those that it holds are not repeated

The caption of each of the demo's 16 clips, 4.5 s long (two windows of musicnn), scored against the clips.
"""

import csv
from dataclasses import replace
from pathlib import Path

import torch

import magnet_train
from magnet_train.common.assets import demo_path
from magnet_train.common.audio_files import normalize_loudness
from magnet_train.evaluation.evaluate import captions_of, clips_of
from magnet_train.metrics.embedders import load_listener
from magnet_train.metrics.scoring import HeardSet, score
from magnet_train.evaluation.page import read_sound

OUT = Path(__file__).with_suffix(".csv")
METRICS = ("fad", "kl", "text")


def main() -> None:
    clips = clips_of(demo_path("clips"))
    captions = captions_of(None, clips)
    real = HeardSet(listener := load_listener("musicnn"))
    for key, path in clips.items():
        wav, rate = read_sound(path)
        real.add(key, torch.from_numpy(wav.T.copy()), rate)
    reference, model = real.statistics(), magnet_train.load("demo")
    done = set()
    if OUT.exists():
        with OUT.open(newline="") as file:
            done = {(float(row["guidance"]), int(row["seed"])) for row in csv.DictReader(file)}
    else:
        OUT.write_text(",".join(("guidance", "seed", *METRICS)) + "\n")
    for seed, guidance in ((s, g) for s in range(5) for g in (1.0, 1.5, 4.0)):
        if (guidance, seed) in done:
            continue
        decoding, heard = replace(model.decoding, max_cfg_coef=guidance), HeardSet(listener)
        for keys in (list(clips)[:8], list(clips)[8:]):
            made = model.generate([captions[k] for k in keys], seed, keys, duration_s=4.5, decoding=decoding)
            for key, wav in zip(keys, made.wav, strict=True):
                loud = normalize_loudness(wav.T.numpy(), made.sample_rate)  # as `evaluate` hears generated clips
                heard.add(key, torch.from_numpy(loud.T.copy()), made.sample_rate)
        values = [score(f"{metric}/musicnn", heard, reference, captions, system="demo").value for metric in METRICS]
        with OUT.open("a") as file:
            file.write(",".join([f"{guidance:g}", str(seed), *(f"{value:.4f}" for value in values)]) + "\n")


if __name__ == "__main__":
    main()
