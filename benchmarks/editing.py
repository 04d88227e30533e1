"""Seams, long continuations, and decoding options of `edit` and `generate`, on any model.

    python benchmarks/editing.py prompt --clips 105
    python benchmarks/editing.py seams --clips 24
    python benchmarks/editing.py extension --minutes 10
    python benchmarks/editing.py options --clips 24

Each part writes benchmarks/records/editing_PART.json and renews editing.md beside it. The records
name the weights. Recordings are validation clips decoded by the codec, so that what is measured is
the model's part of a seam, and not that of the codec.

A seam's perplexity: a masked reading by the model itself. The 5 frames behind it are masked in one
stage, all stages in turn; codebooks below are seen, those above hidden, as in training. It is
divided by that of frames elsewhere in the same audio, 1 s or more from any seam.
"""

import argparse
import json
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from magnet_train.common.assets import demo_path
from magnet_train.common.folders import write_json
from magnet_train.data.pipeline import EvaluationDataset
from magnet_train.data.shards import ShardSet
from magnet_train.decoding.joins import encode_blocks, linear_render
from magnet_train.decoding.keep import Edit
from magnet_train.evaluation.judge import best_of, load_judge
from magnet_train.evaluation.scorer import (
    AudioClip,
    embed_clips,
    prepare_generated,
    score_clips,
)
from magnet_train.generator import Generator, load
from magnet_train.metrics.embedders import load_embedder
from magnet_train.metrics.intervals import bootstrap_interval
from magnet_train.metrics.music import score_music
from magnet_train.metrics.scoring import FeatureSet
from magnet_train.release import SavedModel

RECORDS = Path(__file__).parent / "records"
BEHIND = 5
"""Frames behind a seam that are read."""


def validation_items(generator: Generator, count: int) -> list[dict[str, Any]]:
    """Key, caption, codes `k t` and the reference features of different validation captions."""
    frames = round(generator.crop_s * generator.codec.facts.frame_rate)
    found = []
    for batch in EvaluationDataset(ShardSet.open(demo_path("shards/validation")), frames, 8):
        for i, key in enumerate(batch["keys"]):
            if batch["valid"][i].all():
                row = {"key": key, "caption": batch["captions"][i], "codes": batch["codes"][i]}
                found.append(row | {"reference": batch["references"][i]})
        if len(found) >= count:
            break
    return found[:count]


# --- seams ----------------------------------------------------------------------------------------


def surprise(generator: Generator, codes: Tensor, caption: str, places: list[int]) -> Tensor:
    """Cross-entropy in nats at `places` of `codes` (`k t`), over BEHIND frames and all stages."""
    network = generator._networks([caption], generator.decoding).conditional
    masked = torch.zeros(codes.shape[1], dtype=torch.bool)
    for place in places:
        masked[place : place + BEHIND] = True
    size, found = generator.codec.facts.codebook_size, []
    for stage in range(len(codes)):
        shown = torch.where(torch.arange(len(codes))[:, None] < stage, codes, size)
        shown[stage] = torch.where(masked, size, codes[stage])
        logits = network(shown[None], stage)[0].float()
        found.append(torch.nn.functional.cross_entropy(logits, codes[stage], reduction="none"))
    total = torch.stack(found).mean(0)
    return torch.stack([total[place : place + BEHIND].mean() for place in places])


def seam_ratio(generator: Generator, codes: Tensor, caption: str, seams: list[int]) -> Tensor:
    """Log of each seam's perplexity over that of the same audio elsewhere."""
    rate = round(generator.codec.facts.frame_rate)
    elsewhere = [
        place
        for place in range(rate, codes.shape[1] - rate, rate)
        if all(abs(place - seam) >= rate for seam in seams)
    ]
    inside = surprise(generator, codes, caption, elsewhere)
    return surprise(generator, codes, caption, seams) - inside.mean()


@torch.no_grad()
def seams(generator: Generator, args: argparse.Namespace) -> dict[str, Any]:
    facts = generator.codec.facts
    rate, hop = round(facts.frame_rate), facts.hop_samples
    items = validation_items(generator, args.clips)
    size = items[0]["codes"].shape[1]
    borders = [round(size * share) for share in (0.2, 0.4, 0.6, 0.8)]
    loop = round(0.8 * size)
    found: dict[str, list[Tensor]] = {}

    def read(name: str, wav: Tensor, caption: str, places: list[int]) -> None:
        codes = encode_blocks(generator.codec, wav)[0]
        found.setdefault(name, []).append(seam_ratio(generator, codes, caption, places))

    def twice(wav: Tensor) -> Tensor:
        """The middle of a loop that is played twice, with its seam."""
        return torch.cat([wav[:, -size * hop // 2 :], wav[:, : size * hop // 2]], 1)

    for i, item in enumerate(items):
        wav = generator.codec.decode(item["codes"][None])[0]
        other = items[(i + 1) % len(items)]["codes"]
        caption = item["caption"]
        read("uncut music, the same places", wav, caption, borders)
        regions = tuple(
            (a / rate, b / rate) for a, b in zip(borders[::2], borders[1::2], strict=True)
        )
        edited = generator.edit(wav, facts.sample_rate, Edit(regions), caption)[0].wav
        read("`edit --regenerate`, two regions", edited, caption, borders)
        made = generator.edit(wav, facts.sample_rate, Edit(loop_s=loop / rate), caption)[0].wav
        read("`edit --loop`", twice(made), caption, [size // 2])
        generated = generator.generate([caption], 0, [item["key"]], loop / rate, loop=True).wav[0]
        read("`generate --loop`", twice(generated), caption, [size // 2])
        read(
            "naive repetition of the same length", twice(wav[:, : loop * hop]), caption, [size // 2]
        )
        half = generator.codec.decode(other[None])[0][:, : size * hop // 2]
        naive = torch.cat([wav[:, : size * hop // 2], half], 1)
        read("naive concatenation of two clips", naive, caption, [size // 2])
        print(f"{i + 1} of {len(items)}", flush=True)
    rows = []
    for name, values in found.items():
        clips = torch.stack([x.mean() for x in values])
        low, high = bootstrap_interval(clips)
        mean = float(clips.mean())
        rows.append({"audio": name, "ratio": np.exp(mean), "interval": np.exp([low, high])})
    return {"clips": len(items), "frames_behind": BEHIND, "rows": rows}


# --- what the network sees of given codes ---------------------------------------------------------


@torch.no_grad()
def prompt(generator: Generator, args: argparse.Namespace) -> dict[str, Any]:
    """Cross-entropy of stage 0 behind a given half, whose upper codebooks are hidden or not."""
    size, items = generator.codec.facts.codebook_size, validation_items(generator, args.clips)
    found: dict[str, list[Tensor]] = {}
    for item in items:
        codes = item["codes"]
        half = codes.shape[1] // 2
        nothing = torch.full_like(codes, size)
        hidden = nothing.clone()
        hidden[0, :half] = codes[0, :half]
        visible = nothing.clone()
        visible[:, :half] = codes[:, :half]
        network = generator._networks([item["caption"]], generator.decoding).conditional
        shown = {
            "nothing is given": nothing,
            "given, codebooks above the stage hidden (as in training)": hidden,
            "given, codebooks above the stage visible (as audiocraft)": visible,
        }
        for name, seen in shown.items():
            logits = network(seen[None], 0)[0, half:].float()
            loss = torch.nn.functional.cross_entropy(logits, codes[0, half:])
            found.setdefault(name, []).append(loss)
    _, hidden_loss, visible_loss = (torch.stack(x) for x in found.values())
    found["visible minus hidden"] = list(visible_loss - hidden_loss)
    rows = []
    for name, losses in found.items():
        values = torch.stack(losses)
        value = {"value": float(values.mean()), "interval": bootstrap_interval(values)}
        rows.append({"audio": name, "nats": value})
    worse = float((visible_loss > hidden_loss).double().mean())
    return {"clips": len(items), "clips where visible is worse": round(worse, 3), "rows": rows}


# --- extension ------------------------------------------------------------------------------------


def extension(generator: Generator, args: argparse.Namespace) -> dict[str, Any]:
    """Clips continued for minutes; the last minute beside the first, in 10-second pieces."""
    facts = generator.codec.facts
    items = validation_items(generator, max(args.clips, 1))
    reference = real_features(validation_items(generator, 500)).statistics()
    piece = round(10 * facts.sample_rate)
    minutes: dict[str, list[AudioClip]] = {"first minute": [], "last minute": []}
    memory, captions = [], {}
    for item in items[: args.pieces]:
        wav = generator.codec.decode(item["codes"][None])[0]
        edit = Edit(to_s=generator.crop_s + 60 * args.minutes)
        (made,) = generator.edit(wav, facts.sample_rate, edit, item["caption"])
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        render = linear_render(generator.codec, made.codes, facts.sample_rate)
        for name, start in (("first minute", 0), ("last minute", args.minutes - 1)):
            for i in range(6):
                at = round((generator.crop_s + 60 * start + 10 * i) * facts.frame_rate)
                clip = render(at, at + round(10 * facts.frame_rate))[:, :piece]
                key = f"{item['key']} {i}"
                captions[key] = item["caption"]
                minutes[name].append(AudioClip(key, clip, facts.sample_rate))
    rows = [
        {"audio": name} | figures(clips, captions, reference) for name, clips in minutes.items()
    ]
    return {
        "minutes": args.minutes,
        "recordings": len(memory),
        "peak_memory_mb": [round(m) for m in memory],
        "rows": rows,
    }


# --- options of decoding --------------------------------------------------------------------------


OPTIONS: dict[str, dict[str, Any]] = {
    "model's own settings": {},
    "order by probability": {"span_scoring": "prod"},
    "order by probability, noise 1": {"span_scoring": "prod", "order_temperature": 1.0},
    "order by probability, noise 4.5": {"span_scoring": "prod", "order_temperature": 4.5},
    "second lap of 0.2": {"second_lap": 0.2},
}


def options(generator: Generator, args: argparse.Namespace) -> dict[str, Any]:
    items = validation_items(generator, args.clips)
    captions = {item["key"]: item["caption"] for item in items}
    reference = real_features(validation_items(generator, 500)).statistics()
    passes = [0]
    forward = generator._pass

    def counted(codes: Tensor, *rest: Any) -> Tensor:
        passes[0] += len(codes)
        return forward(codes, *rest)

    generator._pass = counted
    judge = load_judge("text/musicnn", None, "cpu")
    rows = []

    def decode(settings: dict[str, Any], seed: int) -> list[AudioClip]:
        decoding = replace(generator.decoding, **settings)
        made = generator.decode_items(captions, args.batch, seed, decoding)
        return [AudioClip(item.key, item.wav.cpu(), item.sample_rate) for item in made]

    def add(name: str, make: Callable[[], list[AudioClip]]) -> None:
        passes[0] = 0
        clips = make()
        row = {"audio": name, "row_passes": passes[0] / len(items)}
        rows.append(row | figures(clips, captions, reference))
        print(rows[-1], flush=True)

    for name, settings in OPTIONS.items():
        add(name, lambda settings=settings: decode(settings, 0))

    def best() -> list[AudioClip]:
        rounds = zip(*(decode({}, seed) for seed in range(args.best_of)), strict=True)
        return [clips[best_of(clips, captions[clips[0].key], judge)[0]] for clips in rounds]

    add(f"best of {args.best_of} by text/musicnn", best)
    generator._pass = forward
    return {"clips": len(items), "rows": rows}


# --- figures and records --------------------------------------------------------------------------


def real_features(items: list[dict[str, Any]]) -> FeatureSet:
    """Features of the original audio, as the shards keep them."""
    real = FeatureSet(load_embedder("musicnn"))
    for item in items:
        real.embeddings[item["key"]] = item["reference"]["embeddings"]
        real.outputs[item["key"]] = item["reference"]["tags"]
    return real


def figures(clips: list[AudioClip], captions: dict[str, str], reference: Any) -> dict[str, Any]:
    """FAD, KL where clips have a real counterpart, text score and music, each with its interval."""
    from magnet_train.metrics.music import measure_clip

    own = {clip.key: captions[clip.key] for clip in clips}
    features = embed_clips(
        prepare_generated(clips), [load_embedder("musicnn")], "", len(clips), quiet=True
    )
    metrics = ["fad/musicnn", "text/musicnn"]
    if all(clip.key in reference.logits for clip in clips):
        metrics.insert(1, "kl/musicnn")
    records = score_clips(metrics, features, {"musicnn": reference}, own)
    found = {r.metric: {"value": r.value, "interval": r.interval} for r in records}
    music = score_music({c.key: measure_clip(c.wav, c.sample_rate) for c in clips}, own)
    return found | {
        f"music/{name}": {"value": f.value, "interval": f.interval} for name, f in music.items()
    }


def table(record: dict[str, Any]) -> list[str]:
    columns = list(dict.fromkeys(key for row in record["rows"] for key in row if key != "interval"))

    def cell(row: dict[str, Any], column: str) -> str:
        value = row.get(column, "")
        interval = row.get("interval") if column == "ratio" else None
        if isinstance(value, dict):
            value, interval = value["value"], value["interval"]
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        return text if interval is None else f"{text} [{interval[0]:.3f}, {interval[1]:.3f}]"

    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(cell(r, c) for c in columns)} |" for r in record["rows"]]


def write_record(part: str, record: dict[str, Any]) -> None:
    write_json(RECORDS / f"editing_{part}.json", json.loads(json.dumps(record, default=list)))
    lines = ["# Editing", "", "Written by `benchmarks/editing.py`, which says what is measured."]
    for name in ("prompt", "seams", "extension", "options"):
        file = RECORDS / f"editing_{name}.json"
        if file.is_file():
            found = json.loads(file.read_text())
            facts = {k: v for k, v in found.items() if k not in ("rows", "weights")}
            lines += ["", f"## {name.capitalize()}", "", f"Weights: {found['weights']}."]
            lines += [", ".join(f"{k} {v}" for k, v in facts.items()) + ".", "", *table(found)]
    (RECORDS / "editing.md").write_text("\n".join(lines) + "\n")
    print("\n".join(table(record)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"prompt": prompt, "seams": seams, "extension": extension, "options": options}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--pieces", type=int, default=1, help="Recordings that are continued.")
    parser.add_argument("--best_of", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    saved = SavedModel.open(args.checkpoint)
    step = saved.provenance.get("step")
    generator = load(args.checkpoint, dtype=torch.bfloat16)
    start = time.monotonic()
    record = parts[args.part](generator, args)
    record["weights"] = f"{args.checkpoint}, step {step}, SHA-256 {str(saved.sha256)[:16]}"
    record["machine"] = f"one CPU core, bfloat16, {platform.machine()}, torch {torch.__version__}"
    record["seconds"] = round(time.monotonic() - start)
    write_record(args.part, record)


if __name__ == "__main__":
    main()
