"""Exports a trained run to `data/demo/magnet`, the bundled release.

    python data/demo/release_model.py --checkpoint runs/shipped --metrics metrics.json --trained "…"

The release is config.json, weights in half precision and a card with the figures of
`evaluate_model.py`.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from magnet_train.codec.base import load_codec
from magnet_train.common.tables import markdown_table
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.generator import load
from magnet_train.metrics.music import MEASURES
from magnet_train.model import Magnet
from magnet_train.release import SavedModel

CARD = """---
license: mit
pipeline_tag: text-to-audio
tags: [magnet, arxiv:2401.04577]
---

# The demo's MAGNeT

{parameters:.1f} M parameters, {crop_s:g}-second clips at 16 kHz. Usage:

    python -m magnet_train generate --prompt "a slow chorale for string quartet" --out generated

It shows that training and generation work on two CPU cores. `audio/` has twelve of its clips and
the corresponding real ones.

**Trained on** 40, in the end 100, hours of music rendered from public-domain scores
(data/demo/README.md) only.
{trained}
Configuration: conf/demo.yaml with conf/demo_shipped.yaml. Decoding:
{decoding}.

**Measured** on {clips} test captions ({different} different), one 10-second clip each, with 95 %
intervals over clips (`data/demo/evaluate_model.py`):

{scores}

FAD and KL use musicnn and the real clips. The text-audio scorer was trained on real audio of the
training split only. "codec" is the codec's reconstruction of the real clips, an upper bound for
models of these codes. "bigram" and "unigram" are codes drawn from bigram and unigram counts. These
values are not comparable with published FAD, KL or CLAP, which use other networks.

{music}

Key rank: rank of the caption's key among 12; 1 is best and 6.5 is chance. Captions without a key or
tempo are not used for key rank or beat. Note lengths: distance to those of the real clips.

The first two stages on single masked frames, at fixed mask rates. The cross-entropy of the bigram
baseline is {bigram[0]:.2f} nats for attacks and {bigram[1]:.2f} for pitches:

{stages}

**Limitations**: {faults}

`spectrograms.jpg` shows the twelve clips of `audio/` beside the real ones, spectrograms on the left
and chroma on the right. `training.png` shows the figures of all releases over core-hours.
"""


SYSTEMS = ("real", "codec", "model", "bigram", "unigram")


def with_interval(value: float, interval: Sequence[float] | None) -> str:
    """As in a table's cell."""
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def score_table(systems: Mapping[str, Any]) -> str:
    """FAD, KL and text score of each system."""
    rows = [
        [
            name,
            f"{s['fad_musicnn']:.1f}",
            f"{s['kl_musicnn_tags']:.3f}",
            f"{s['text_audio']:.3f}",
            with_interval(s["text_audio_true_minus_shuffled"], s["interval_95"]),
        ]
        for name in SYSTEMS
        if (s := systems.get(name))
    ]
    heads = ["", "FAD ↓", "KL of tags ↓", "text-audio ↑", "the same, true minus shuffled ↑"]
    return markdown_table(heads, rows)


def music_table(music: Mapping[str, Any]) -> str:
    """A row for each music measure, a column for each system."""
    present = [name for name in SYSTEMS if name in music]
    rows = []
    for measure in MEASURES:
        cells = [music[name].get(measure) for name in present]
        texts = ["" if c is None else with_interval(c["value"], c["interval"]) for c in cells]
        rows.append([measure.replace("_", " "), *texts])
    return markdown_table(["", *present], rows)


def stages_table(stages: Sequence[Mapping[str, Any]]) -> str:
    """Cross-entropy and accuracy by stage and mask rate, next to copying."""
    rows = [
        [
            codebook,
            rate,
            f"{score['cross_entropy']:.2f}",
            f"{score['accuracy']:.1%}",
            f"{score['copying_accuracy']:.1%}",
        ]
        for codebook, scores in zip(("1 (attacks)", "2 (pitches)"), stages, strict=True)
        for rate, score in scores.items()
        if isinstance(score, dict)
    ]
    right = "right by copying the nearest visible code"
    return markdown_table(["codebook", "mask rate", "cross-entropy", "right", right], rows)


def average_weights(network: Magnet, models: Sequence[SavedModel]) -> None:
    """Set a network's weights to the mean of those of some models of its shape."""
    states = [model.weights() for model in models]
    for name, weight in network.state_dict().items():
        weight.copy_(torch.stack([state[name].float() for state in states]).mean(0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        required=True,
        help="Run folder or checkpoint; the weights of several are averaged.",
    )
    parser.add_argument(
        "--metrics", type=Path, required=True, help="JSON of evaluate_model.py, for the card."
    )
    parser.add_argument("--trained", default="", help="A sentence on steps, time and machine.")
    parser.add_argument("--faults", default="", help="What listening and looking showed.")
    parser.add_argument(
        "--decoding", type=json.loads, default={}, help="JSON of decoding settings to ship."
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "magnet", help="Folder of the release."
    )
    args = parser.parse_args()
    generator = load(args.checkpoint[0])
    average_weights(generator.network, [SavedModel.open(path) for path in args.checkpoint])
    demo_codec = load_codec("demo")
    if demo_codec.facts.hash != generator.codec.facts.hash:
        raise SystemExit(f"{args.checkpoint[0]}: trained on another codec than data/demo/codec")
    generator.codec = demo_codec  # the run may name it by a path of its machine
    generator.decoding = DecodingConfig.from_dict(vars(generator.decoding) | args.decoding)
    origin = {"trained": args.trained, "data": "40 to 100 hours of data/demo", "licence": "MIT"}
    generator.provenance |= origin
    generator.network.half()
    report = json.loads(args.metrics.read_text())
    published = vars(DecodingConfig())
    settings = {k: v for k, v in vars(generator.decoding).items() if v != published[k]}
    fresh = args.out.with_name(f"{args.out.name}.new")
    generator.save(
        fresh,
        CARD.format(
            parameters=sum(p.numel() for p in generator.network.parameters()) / 1e6,
            crop_s=generator.crop_s,
            trained=args.trained,
            clips=report["clips"],
            different=report["different_captions"],
            decoding=", ".join(f"{name}={value}" for name, value in settings.items()),
            bigram=[stage["bigram_cross_entropy"] for stage in report["stages"]],
            scores=score_table(report["systems"]),
            music=music_table(report["music"]),
            stages=stages_table(report["stages"]),
            faults=args.faults or "see EXPERIMENTS.md.",
        ),
    )
    args.out.mkdir(exist_ok=True)  # what else lies there, such as the pictures, stays
    for file in fresh.iterdir():
        file.replace(args.out / file.name)
    fresh.rmdir()
    size = sum(f.stat().st_size for f in args.out.iterdir() if f.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
