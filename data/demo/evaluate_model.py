"""Scores a model on the captions of the test split, next to real clips and baselines.

    python data/demo/evaluate_model.py --checkpoint runs/shipped --out data/demo/magnet/metrics.json

Each caption is decoded once and scored as in validation. Baselines: the codec's reconstruction of
the real clip, and codes drawn from the counts of single codes (unigram) and of pairs (bigram).
The first two stages (attacks and pitches) are also scored on masks of fixed rates, next to copying
the nearest visible code.
All intervals are 95 %, by bootstrap over clips.
"""

import argparse
import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from music_table import baseline_clips, measure_systems, read_codes
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from magnet_train.common.assets import demo_path
from magnet_train.common.audio_files import draw_spectrogram
from magnet_train.data.pipeline import EvaluationDataset
from magnet_train.data.shards import ShardSet
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.evaluation import scorer
from magnet_train.evaluation.scorer import AudioClip
from magnet_train.generator import Generator, load
from magnet_train.masking import span_mask
from magnet_train.metrics.baselines import CountTables, copy_nearest
from magnet_train.metrics.chroma import chroma
from magnet_train.metrics.clap_score import cosines
from magnet_train.metrics.embedders import load_embedder
from magnet_train.metrics.networks.text_audio import true_minus_shuffled
from magnet_train.metrics.reference import ReferenceStatistics
from magnet_train.metrics.scoring import FeatureSet

METRICS = {
    "fad_musicnn": "fad/musicnn",
    "kl_musicnn_tags": "kl/musicnn",
    "text_audio": "text/musicnn",
}
MASK_RATES = (0.1, 0.3, 0.6, 0.9)
NUM_PLOTTED = 12


def read_items(
    folder: Path, generator: Generator, num_clips: int, batch_size: int
) -> list[dict[str, Any]]:
    """Key, caption, codes and reference of the first items of the shards."""
    num_frames = round(generator.crop_s * generator.codec.facts.frame_rate)
    items = []
    for batch in EvaluationDataset(ShardSet.open(folder), num_frames, batch_size):
        for row in zip(
            batch["keys"], batch["captions"], batch["codes"], batch["references"], strict=True
        ):
            items.append(dict(zip(("key", "caption", "codes", "reference"), row, strict=True)))
    return items[:num_clips]


def real_clips(folder: Path, keys: Iterable[str], crop_s: float) -> list[AudioClip]:
    """The audio that the codes were made of; a key ends with its offset in ms.

    Since tokenize stores part of the file's hash in the key, this may stand before the offset.
    """
    clips = []
    for key in keys:
        stem, offset_ms = key.rsplit("_", 1)
        stem = re.sub(r"-[0-9a-f]{10}$", "", stem)
        path = folder / f"{stem}.flac"
        rate = soundfile.info(path).samplerate
        start = round(int(offset_ms) * rate / 1000)
        wav, _ = soundfile.read(path, round(crop_s * rate), start, dtype="float32")
        clips.append(AudioClip(key, torch.from_numpy(wav)[None], rate))
    return clips


def summary(
    clips: list[AudioClip], reference: ReferenceStatistics, captions: dict[str, str], name: str
) -> dict[str, Any]:
    """FAD, KL and text score of one system, and how much better clips fit their own caption."""
    embedder = load_embedder("musicnn")
    prepared = scorer.prepare_generated(clips)
    features: FeatureSet = scorer.embed_clips(prepared, [embedder], name, len(clips))["musicnn"]
    records = scorer.score_clips(
        list(METRICS.values()),
        {"musicnn": features},
        {"musicnn": reference},
        captions,
        system="demo",
    )
    values = {record.metric: record.value for record in records}
    assert embedder.embed_text is not None
    text = embedder.embed_text([captions[key] for key in features.vectors])
    gap, low, high = true_minus_shuffled(
        cosines(torch.stack(list(features.vectors.values())), text)
    )
    named: dict[str, Any] = {name: values[metric] for name, metric in METRICS.items()}
    return named | {"text_audio_true_minus_shuffled": gap, "interval_95": [low, high]}


@torch.no_grad()
def stage_scores(
    generator: Generator, codes: Tensor, captions: list[str], tables: CountTables, stage: int
) -> dict[str, Any]:
    """Cross-entropy and accuracy of a stage on single masked frames, at fixed mask rates.

    Args:
        generator: the model.
        codes: `b k t`.
        captions: one for each example.
        tables: counts of the training codes.
        stage: the stage; codebooks below it are visible, those above are masked.
    """
    network, mask_id = generator.network, codes.new_tensor(generator.codec.facts.codebook_size)
    states, allowed = generator.text_encoder(captions)
    states = states.to(network.head.dtype)
    bigram = tables.bigram_losses(codes)[:, stage].mean().item()
    scores: dict[str, Any] = {"bigram_cross_entropy": bigram}
    for rate in MASK_RATES:
        noise = torch.Generator().manual_seed(0)
        masked = span_mask(torch.full((len(codes),), rate), codes.shape[2], 1, noise)
        shown = torch.full_like(codes, int(mask_id))
        shown[:, :stage] = codes[:, :stage]
        shown[:, stage] = torch.where(masked, mask_id, codes[:, stage])
        losses, right = [], []
        for rows in torch.arange(len(codes)).split(16):
            text = states[rows], allowed[rows]
            pass_ = network.config.stage(stage)
            logits = network.masked_logits(shown[rows], pass_, text, masked[rows]).float()
            targets = codes[rows, stage][masked[rows]]
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
            right.append((logits.argmax(1) == targets).float())
        copied = (copy_nearest(codes[:, stage], masked) == codes[:, stage])[masked]
        scores[str(rate)] = {
            "cross_entropy": torch.cat(losses).mean().item(),
            "accuracy": torch.cat(right).mean().item(),
            "copying_accuracy": copied.float().mean().item(),
        }
    return scores


def music_scores(
    systems: Mapping[str, list[AudioClip]], captions: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Music measures of each system: value, interval and number of clips."""
    figures = measure_systems(systems, captions, "real" if "real" in systems else "codec")
    return {
        name: {
            measure: {"value": f.value, "interval": f.interval, "clips": f.num_clips}
            for measure, f in some.items()
        }
        for name, some in figures.items()
    }


def save_comparison(
    path: Path,
    clips: list[AudioClip],
    others: list[AudioClip],
    name: str,
    captions: Mapping[str, str],
) -> None:
    """Save a PNG: one row for each clip, its spectrogram and chromagram beside those of the other.

    Args:
        path: path of the PNG.
        clips: the model's clips.
        others: clips of the same keys.
        name: what the others are.
        captions: caption of each key.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    other = {clip.key: clip for clip in others}
    figure = Figure(figsize=(14, 1.45 * len(clips)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(clips), 4, squeeze=False, sharex=True)
    for row, clip in zip(rows, clips, strict=True):
        pair = {"generated": clip, name: other[clip.key]}
        for column, (source, shown) in enumerate(pair.items()):
            wav = shown.wav[0].numpy()
            draw_spectrogram(row[column], wav, shown.sample_rate)
            draw_chromagram(row[2 + column], wav, shown.sample_rate)
            row[column].set(ylabel="kHz" if column == 0 else "")
            if clip is clips[0]:
                row[2 + column].set_title(source, fontsize=9, loc="right")
        row[0].set_title(captions[clip.key], fontsize=9, loc="left")
        row[1].set_title(name if clip is clips[0] else "", fontsize=9, loc="right")
    for axis in rows[-1]:
        axis.set(xlabel="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def draw_chromagram(axis: Any, wav: np.ndarray, sample_rate: int) -> None:
    """Draw the chroma of a mono clip `t` on matplotlib axes; strong pitch classes are dark."""
    extent = (0, len(wav) / sample_rate, -0.5, 11.5)
    axis.imshow(
        chroma(wav, sample_rate).T, origin="lower", aspect="auto", cmap="Greys", extent=extent
    )
    axis.set_yticks((0, 4, 7), ("C", "E", "G"), fontsize=7)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", default="demo", help="Release folder, checkpoint, run folder, or demo."
    )
    parser.add_argument(
        "--shards", type=Path, help="Test shards with references; the bundled demo's by default."
    )
    parser.add_argument(
        "--train", type=Path, help="Training shards for the counts; the bundled demo's by default."
    )
    parser.add_argument(
        "--audio", type=Path, help="Folder with the real test clips (make_music.py), to score them."
    )
    parser.add_argument(
        "--clips", type=int, default=1000, help="Largest number of captions to generate for."
    )
    parser.add_argument("--batch", type=int, default=8, help="Clips decoded at once.")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the decoding noise.")
    parser.add_argument(
        "--decoding", type=json.loads, default={}, help="JSON of decoding settings to replace."
    )
    parser.add_argument(
        "--bfloat16", action="store_true", help="Run the network in bfloat16 instead of float32."
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result.")
    parser.add_argument("--wavs", type=Path, help="Folder for the model's clips as WAV files.")
    parser.add_argument(
        "--picture",
        type=Path,
        help="PNG with spectrograms and chromagrams of twelve clips beside the real ones, or "
        "beside the codec's without --audio.",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    start = time.monotonic()
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    generator = load(args.checkpoint, dtype=dtype)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in args.decoding.items()}
    settings: DecodingConfig = replace(generator.decoding, **given)
    items = read_items(args.shards or demo_path("shards/test"), generator, args.clips, args.batch)
    captions = {item["key"]: item["caption"] for item in items}
    codes = {item["key"]: item["codes"] for item in items}
    train, _ = read_codes(str(args.train or demo_path("shards/train")))
    tables = CountTables.count(train.values(), generator.codec.facts.codebook_size)

    decoded = generator.decode_items(captions, args.batch, args.seed, settings)
    model = [
        AudioClip(item.key, item.wav.cpu(), item.sample_rate)
        for item in tqdm(decoded, desc="decode", total=len(captions), unit="clip")
    ]
    systems = {"model": model}
    baselines = baseline_clips(codes, generator.codec, tables)
    systems |= {name: list(clips) for name, clips in baselines.items()}
    if args.audio:
        systems["real"] = real_clips(args.audio, codes, generator.crop_s)

    real = FeatureSet(load_embedder("musicnn"))
    for item in items:
        real.embeddings[item["key"]] = item["reference"]["embeddings"]
        real.outputs[item["key"]] = item["reference"]["tags"]
    reference = real.statistics()
    stacked = torch.stack(list(codes.values())).long()
    report: dict[str, Any] = {
        "clips": len(items),
        "different_captions": len(set(captions.values())),
        "seed": args.seed,
        "level": scorer.SCORED_LEVEL,
        "dtype": str(dtype).removeprefix("torch."),
        "decoding": vars(settings),
        "codec": generator.codec.facts.hash,
        "checkpoint": generator.provenance,
        "stages": [
            stage_scores(generator, stacked, list(captions.values()), tables, stage)
            for stage in (0, 1)
        ],
        "systems": {
            name: summary(clips, reference, captions, name) for name, clips in systems.items()
        },
        "music": music_scores(systems, captions),
        "seconds": round(time.monotonic() - start),
    }
    text = json.dumps(report, indent=2, default=list)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    if args.wavs:
        args.wavs.mkdir(parents=True, exist_ok=True)
        for clip in model:
            soundfile.write(args.wavs / f"{clip.key}.wav", clip.wav[0].numpy(), clip.sample_rate)
    if args.picture:
        name = "real" if "real" in systems else "codec"
        save_comparison(args.picture, model[:NUM_PLOTTED], systems[name], name, captions)


if __name__ == "__main__":
    main()
