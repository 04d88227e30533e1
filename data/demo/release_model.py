"""Puts a trained run into `data/demo/magnet`, the release that ships: config, weights in half
precision, card.
 python data/demo/release_model.py --checkpoint runs/demo_shipped --metrics metrics.json --trained
"…"
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from magnet_train.codec.base import load_codec
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.generator import load

CARD = """---
license: mit
pipeline_tag: text-to-audio
tags: [magnet, arxiv:2401.04577]
---

# The demo's MAGNeT

{parameters:.1f} M parameters, {crop_s:g}-second clips at 16 kHz. It plays at once:

    python -m magnet_train generate --prompt "a slow chorale for string quartet" --out generated

It shows that the whole way works on two CPU cores. `audio/` has twelve of its clips beside the real
ones.

**Trained on** 40 hours of music rendered from public-domain scores (data/demo/README.md), on
nothing else.
{trained}
Configuration: conf/demo.yaml with conf/demo_shipped.yaml. Decoding: {decoding}

**Measured** on {clips} test captions ({different} different), one 10-second clip each, against the
original clips (`data/demo/evaluate_model.py`):

| | FAD (musicnn) ↓ | KL (musicnn tags) ↓ | text-audio ↑ | true minus shuffled, 95 % interval |
|---|---|---|---|---|
{rows}

{music}

"codec" is the codec's reconstruction of the real clips, the best that any model on these codes
could do; "unigram" are codes drawn from each codebook's own frequencies, what no model at all would
do. The text-audio scorer was trained on original audio of the training split only. None of these
figures is comparable with published FAD, KL or CLAP: another network listens.

**What is wrong with it**: {faults} Eight prompts beside codec reconstructions of the real clips:
`spectrograms.jpg`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="Run folder or checkpoint.")
    parser.add_argument(
        "--metrics", type=Path, help="JSON that evaluate_model.py wrote; the card quotes it."
    )
    parser.add_argument(
        "--music", type=Path, help="Markdown with the music figures; the card quotes it."
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
    generator = load(args.checkpoint)
    demo_codec = load_codec("demo")
    if demo_codec.facts.hash != generator.codec.facts.hash:
        raise SystemExit(f"{args.checkpoint}: trained on another codec than data/demo/codec")
    generator.codec = demo_codec  # the run may name it by a path of its machine
    generator.decoding = DecodingConfig.from_dict(vars(generator.decoding) | args.decoding)
    generator.about |= {"trained": args.trained, "data": "40 hours of data/demo", "licence": "MIT"}
    generator.network.half()
    rows, clips, different = "", 0, 0
    music = args.music.read_text().strip() if args.music else ""
    if args.metrics:
        report = json.loads(args.metrics.read_text())
        clips, different = report["clips"], report["different_captions"]
        for name in ("model", "codec", "unigram"):
            r = report[name]
            low, high = r["interval_95"]
            rows += f"| {name} | {r['fad_musicnn']:.1f} | {r['kl_musicnn_tags']:.3f} "
            rows += f"| {r['text_audio']:.3f} | "
            rows += f"{r['text_audio_true_minus_shuffled']:.3f} [{low:.3f}, {high:.3f}] |\n"
    fresh = args.out.with_name(f"{args.out.name}.new")
    generator.save(
        fresh,
        CARD.format(
            parameters=sum(p.numel() for p in generator.network.parameters()) / 1e6,
            crop_s=generator.crop_s,
            trained=args.trained,
            clips=clips,
            different=different,
            decoding=vars(replace(generator.decoding)),
            rows=rows.strip(),
            music=music,
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
