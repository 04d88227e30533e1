"""Runs for ablation.ipynb: the bundled model with several guidance coefficients and seeds.

    python guidance_runs.py      # adds missing runs to guidance_runs.csv

The stored file is from the demo's model of 2026-11-21; remove it to measure the current model. Each
run generates 4.5 s (two windows of musicnn) for each of the demo's 16 captions, scored against the
clips.
"""

import csv
from dataclasses import replace
from pathlib import Path

import torch

import magnet_train
from magnet_train.common.assets import demo_path
from magnet_train.common.audio_files import normalize_loudness
from magnet_train.evaluation.clips import list_clips, load_captions
from magnet_train.metrics.embedders import load_embedder
from magnet_train.metrics.scoring import FeatureSet, score
from magnet_train.evaluation.page import read_sound

OUT = Path(__file__).with_suffix(".csv")
METRICS = ("fad", "kl", "text")


def main() -> None:
    clips = list_clips(demo_path("clips"))
    captions = load_captions(None, clips)
    embedder = load_embedder("musicnn")
    real = FeatureSet(embedder)
    for key, clip in clips.items():
        wav, rate = read_sound(clip.path)
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
        decoding = replace(model.decoding, max_cfg_coef=guidance)
        features = FeatureSet(embedder)
        for keys in (list(clips)[:8], list(clips)[8:]):
            made = model.generate([captions[k] for k in keys], seed, keys, duration_s=4.5, decoding=decoding)
            for key, wav in zip(keys, made.wav, strict=True):
                loud = normalize_loudness(wav.T.numpy(), made.sample_rate)  # as `evaluate` levels generated clips
                features.add(key, torch.from_numpy(loud.T.copy()), made.sample_rate)
        values = [score(f"{metric}/musicnn", features, reference, captions, system="demo").value for metric in METRICS]
        with OUT.open("a") as file:
            file.write(",".join([f"{guidance:g}", str(seed), *(f"{value:.4f}" for value in values)]) + "\n")


if __name__ == "__main__":
    main()
