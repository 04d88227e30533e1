"""How good the shipped model is on captions it has not seen: generates the test split and scores
it.

    python data/demo/evaluate_model.py --checkpoint runs/shipped --out data/demo/magnet/metrics.json

Every test caption is decoded once and scored as in validation. The baselines are the codec's
reconstruction of the real clip, and codes drawn by each codebook's frequencies. The text-audio
score comes with its control, the same clips against the other captions, and a 95 % interval by
bootstrap over clips.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from magnet_train.common.assets import demo_path
from magnet_train.common.audio_files import save_plot
from magnet_train.data.pipeline import EvaluationDataset
from magnet_train.data.shards import ShardSet
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.evaluation import scorer
from magnet_train.generator import DecodedItem, Generator, load
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
NUM_PLOTTED = 8


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


def summary(
    features: FeatureSet, reference: ReferenceStatistics, captions: dict[str, str]
) -> dict[str, Any]:
    """The metrics of one system, and how much better clips fit their own caption than others'."""
    records = scorer.score_clips(
        list(METRICS.values()),
        {"musicnn": features},
        {"musicnn": reference},
        captions,
        system="demo",
    )
    values = {record.metric: record.value for record in records}
    assert features.embedder.embed_text is not None
    text = features.embedder.embed_text([captions[key] for key in features.vectors])
    gap, low, high = true_minus_shuffled(
        cosines(torch.stack(list(features.vectors.values())), text)
    )
    named: dict[str, Any] = {name: values[metric] for name, metric in METRICS.items()}
    return named | {"text_audio_true_minus_shuffled": gap, "interval_95": [low, high]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", default="demo", help="Release folder, checkpoint, run folder, or demo."
    )
    parser.add_argument(
        "--shards", type=Path, help="Test shards with references; the embedded demo's by default."
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
    parser.add_argument("--out", type=Path, help="JSON file for the result.")
    parser.add_argument(
        "--picture", type=Path, help="PNG with eight clips above the codec's reconstructions."
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = load(args.checkpoint)
    embedder = load_embedder("musicnn")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in args.decoding.items()}
    settings: DecodingConfig = replace(generator.decoding, **given)
    items = read_items(args.shards or demo_path("shards/test"), generator, args.clips, args.batch)
    captions = {item["key"]: item["caption"] for item in items}
    codes = {item["key"]: item["codes"] for item in items}
    size = generator.codec.facts.codebook_size
    stacked = torch.stack(list(codes.values())).transpose(0, 1)
    frequencies = torch.stack(
        [torch.bincount(row.flatten(), minlength=size).float() for row in stacked]
    )
    drawn = {
        key: scorer.unigram_codes(frequencies, rows.shape[1], seed)
        for seed, (key, rows) in enumerate(codes.items())
    }
    wavs = {}

    def decoded() -> Iterator[DecodedItem]:
        for item in generator.decode_items(captions, args.batch, args.seed, settings):
            if len(wavs) < 2 * NUM_PLOTTED:
                wavs[f"generated: {item.caption}"] = item.wav[0].numpy()
                wavs[f"codec: {item.caption}"] = generator.codec.decode(codes[item.key][None])[
                    0, 0
                ].numpy()
            yield item

    systems = {
        "model": scorer.decoded_clips(decoded()),
        "codec": scorer.clips_from_codes(codes, generator.codec),
        "unigram": scorer.clips_from_codes(drawn, generator.codec),
    }
    real = FeatureSet(embedder)
    for item in items:
        real.embeddings[item["key"]] = item["reference"]["embeddings"]
        real.outputs[item["key"]] = item["reference"]["tags"]
    reference = real.statistics()
    start = time.monotonic()
    report: dict[str, Any] = {
        "clips": len(items),
        "different_captions": len(set(captions.values())),
        "seed": args.seed,
        "level": scorer.SCORED_LEVEL,
        "decoding": vars(settings),
        "codec": generator.codec.facts.hash,
        "checkpoint": generator.about,
    }
    for name, clips in systems.items():
        features = scorer.embed_clips(scorer.prepare_generated(clips), [embedder], name, len(items))
        report[name] = summary(features["musicnn"], reference, captions)
    report["seconds"] = round(time.monotonic() - start)
    text = json.dumps(report, indent=2, default=list)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    if args.picture:
        save_plot(args.picture, wavs, generator.codec.facts.sample_rate)


if __name__ == "__main__":
    main()
