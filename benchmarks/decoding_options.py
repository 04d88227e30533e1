"""What each decoding option is worth on one model, against row passes per clip.

    python benchmarks/decoding_options.py --groups order guidance steps rescoring --clips 104

Writes benchmarks/records/decoding_options.json and .md, and docs/decoding_options.png. Every
setting decodes the same validation captions with the same seeds, so differences from the model's
own settings are paired by clip; p-values have Holm's correction over a group. A row pass is one
pass of the network over all frames of one clip: a unit that no machine changes. Frames that exact
reuse skips are not counted; those of the rescorer are. Finished settings
are kept, and a second run goes on behind them.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from magnet_train.common.assets import demo_path
from magnet_train.common.folders import write_json
from magnet_train.common.tables import markdown_table
from magnet_train.data.pipeline import EvaluationDataset
from magnet_train.data.shards import ShardSet
from magnet_train.evaluation.differences import paired_differences
from magnet_train.evaluation.judge import best_of, load_judge
from magnet_train.evaluation.scorer import (
    AudioClip,
    Features,
    decoded_clips,
    embed_clips,
    prepare_generated,
    score_clips,
)
from magnet_train.generator import Generator, load
from magnet_train.metrics.embedders import load_embedder
from magnet_train.metrics.reference import ReferenceStatistics
from magnet_train.metrics.scoring import FeatureSet
from magnet_train.model import Magnet
from magnet_train.release import SavedModel

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks/records"
METRICS = {
    "fad/musicnn": "FAD",
    "kl/musicnn": "KL",
    "text/musicnn": "text score",
    "music/chroma_change": "chroma change",
    "music/scale_fit": "scale fit",
    "music/key_rank": "key rank",
    "music/beat": "beat",
}
OWN = "model's own settings"


def guided(start: float, end: float) -> dict[str, float]:
    return {"max_cfg_coef": start, "min_cfg_coef": end}


def rescored(weight: float, **more: Any) -> dict[str, Any]:
    return {"span_scoring": "max", "rescorer_weight": weight, **more}


GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "order": {
        "order by probability": {"span_scoring": "prod"},
        "order by probability, noise 4.5": {"span_scoring": "prod", "order_temperature": 4.5},
        "second lap of 0.2": {"second_lap": 0.2},
        "as published: spans of 3 by probability, annealed temperature 3, guidance 10 to 1": {
            "span_len": 3,
            "span_scoring": "max",
            "shared_noise": 1,
            "temperature": 3.0,
            "anneal_temperature": True,
            "top_p": 0.9,
            **guided(10.0, 1.0),
        },
    },
    "guidance": {
        "no guidance": guided(1.0, 1.0),
        "constant 1.5": guided(1.5, 1.5),
        "3 to 1": guided(3.0, 1.0),
        "10 to 1, as published": guided(10.0, 1.0),
    },
    "steps": {
        "40, 40, 8, 6, 6": {"decoding_steps": (40, 40, 8, 6, 6)},
        "12, 12, 4, 4, 4": {"decoding_steps": (12, 12, 4, 4, 4)},
        "20, 20, 1, 1, 1": {"decoding_steps": (20, 20, 1, 1, 1)},
        "5, 5, 2, 2, 2": {"decoding_steps": (5, 5, 2, 2, 2)},
    },
    "rescoring": {
        "order by probability (max), no rescorer": rescored(0.5),
        "rescored, weight 0.7": rescored(0.7, rescorer="RESCORER"),
        "rescored, weight 1": rescored(1.0, rescorer="RESCORER"),
    },
}
"""Settings that differ from the model's own, by group and name."""


class Bench:
    """A generator that counts row passes, the captions, and the features of their real clips."""

    def __init__(self, generator: Generator, clips: int, batch: int, rescorer: str) -> None:
        self.generator, self.batch, self.rescorer = generator, batch, rescorer
        self.embedders = [load_embedder("musicnn"), load_embedder("music")]
        self.captions: dict[str, str] = {}
        real = FeatureSet(self.embedders[0])
        frames = round(generator.crop_s * generator.codec.facts.frame_rate)
        shards = ShardSet.open(demo_path("shards/validation"))
        for items in EvaluationDataset(shards, frames, 8):
            for i, key in enumerate(items["keys"]):
                if items["valid"][i].all():
                    real.embeddings[key] = items["references"][i]["embeddings"]
                    real.outputs[key] = items["references"][i]["tags"]
                    self.captions[key] = items["captions"][i]
        self.references: dict[str, ReferenceStatistics] = {"musicnn": real.statistics()}
        self.captions = dict(list(self.captions.items())[:clips])
        self.passes = 0.0
        self._count(generator.network)
        self._counted = {""}

    def _count(self, network: Magnet) -> None:
        """Count the frames that each block of a network computes, from now on."""
        frames = round(self.generator.crop_s * self.generator.codec.facts.frame_rate)

        def count(module: object, inputs: tuple[Tensor], output: Tensor) -> None:
            rows = inputs[0].numel() / inputs[0].shape[-1]
            self.passes += rows / (frames * len(network.blocks))

        for block in network.blocks:
            block.ffn_in.register_forward_hook(count)

    def decode(self, settings: dict[str, Any], seed: int = 0) -> list[AudioClip]:
        if settings.get("rescorer"):
            settings = settings | {"rescorer": self.rescorer}
            rescorer = self.generator._rescorer(self.rescorer)
            if self.rescorer not in self._counted:
                self._count(rescorer.network)  # type: ignore[attr-defined]
            self._counted.add(self.rescorer)
        decoding = replace(self.generator.decoding, **settings)
        made = self.generator.decode_items(self.captions, self.batch, seed, decoding)
        total = len(self.captions)
        return list(tqdm(decoded_clips(made), total=total, unit="clip", leave=False))

    def best(self, count: int) -> list[AudioClip]:
        judge = load_judge("text/musicnn", None, "cpu")
        rounds = zip(*(self.decode({}, seed) for seed in range(count)), strict=True)
        return [clips[best_of(clips, self.captions[clips[0].key], judge)[0]] for clips in rounds]

    def measure(self, make: Callable[[], list[AudioClip]]) -> tuple[float, Features]:
        """Row passes per clip, and the features of the clips."""
        self.passes = 0.0
        clips = make()
        passes = self.passes / len(clips)
        prepared = prepare_generated(clips)
        return passes, embed_clips(prepared, self.embedders, "embed", len(clips), quiet=True)

    def figures(self, features: Features) -> dict[str, Any]:
        """Value and 95 % interval of each metric."""
        records = score_clips(list(METRICS), features, self.references, self.captions, system="")
        return {r.metric: {"value": r.value, "interval": r.interval} for r in records}

    def differences(self, systems: dict[str, Features]) -> dict[str, dict[str, Any]]:
        """Differences from the first system, by system and metric."""
        captions = dict.fromkeys(systems, self.captions)
        found = paired_differences(list(METRICS), systems, self.references, captions)
        by_system: dict[str, dict[str, Any]] = {}
        for (metric, system), difference in found.items():
            about = asdict(difference) | {"significant": bool(difference.direction)}
            by_system.setdefault(system, {})[metric] = about
        return by_system


def rows_of(group: str, rows: list[dict[str, Any]]) -> list[list[str]]:
    """Lines of the table: `*` marks a difference from the model's own settings, p < 0.05."""

    def cell(row: dict[str, Any], metric: str) -> str:
        figure = row["figures"].get(metric)
        if figure is None:
            return ""
        text = f"{figure['value']:.3g}"
        difference = row.get("differences", {}).get(metric)
        if difference is None:
            return text
        low, high = (difference["value"] + sign * difference["half_width"] for sign in (-1, 1))
        star = " *" if difference["significant"] else ""
        return f"{text} ({low:+.2g} to {high:+.2g}){star}"

    chosen = [row for row in rows if row["group"] in ("", group)]
    return [
        [row["name"], f"{row['row_passes']:.0f}", *(cell(row, m) for m in METRICS)]
        for row in chosen
    ]


def write(record: dict[str, Any]) -> None:
    write_json(RECORDS / "decoding_options.json", record)
    about = {k: v for k, v in record.items() if k != "rows"}
    lines = ["# Decoding options", "", "Written by `benchmarks/decoding_options.py`.", ""]
    lines += [". ".join(f"{k}: {v}" for k, v in about.items()) + ".", ""]
    lines += [
        "In brackets: 95 % interval of the difference from the model's own settings, paired by "
        "clip. \\*: p < 0.05 after Holm's correction over the group.",
    ]
    for group in dict.fromkeys(row["group"] for row in record["rows"] if row["group"]):
        heads = [group, "row passes", *METRICS.values()]
        lines += ["", markdown_table(heads, rows_of(group, record["rows"]))]
    (RECORDS / "decoding_options.md").write_text("\n".join(lines) + "\n")
    plot(record["rows"], ROOT / "docs/decoding_options.png")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """FAD, text score, chroma change and scale fit against row passes."""
    from matplotlib.figure import Figure

    names = ["fad/musicnn", "text/musicnn", "music/chroma_change", "music/scale_fit"]
    figure = Figure(figsize=(14, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(names)), names, strict=True):
        for color, group in enumerate(dict.fromkeys(row["group"] for row in rows)):
            points = [row for row in rows if row["group"] == group]
            values = [row["figures"][metric]["value"] for row in points]
            ends = [row["figures"][metric]["interval"] for row in points]
            errors = [[v - low for v, (low, _) in zip(values, ends, strict=True)]]
            errors += [[high - v for v, (_, high) in zip(values, ends, strict=True)]]
            axes.errorbar(
                [row["row_passes"] for row in points],
                values,
                errors,
                fmt="*" if not group else "o",
                markersize=12 if not group else 5,
                color=f"C{color}",
                alpha=0.8,
                label=group or OWN,
            )
        axes.set(xscale="log", xlabel="row passes per clip", ylabel=METRICS[metric])
        axes.set_xticks([25, 50, 100, 200, 400], labels=["25", "50", "100", "200", "400"])
        axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=6)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", nargs="+", choices=[*GROUPS, "best"], default=list(GROUPS))
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--rescorer", help="Model that rescores (default: the checkpoint itself).")
    parser.add_argument("--clips", type=int, default=104)
    parser.add_argument("--best_of", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--work", type=Path, required=True, help="Folder of finished settings.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    saved = SavedModel.open(args.checkpoint)
    generator = load(args.checkpoint, dtype=torch.bfloat16)
    bench = Bench(generator, args.clips, args.batch, args.rescorer or args.checkpoint)
    about = {
        "weights": f"{Path(args.checkpoint).name}, step {saved.provenance.get('step')}, "
        f"SHA-256 {str(saved.sha256)[:16]}",
        "machine": f"one CPU core, bfloat16, {platform.machine()}, torch {torch.__version__}",
        "clips": len(bench.captions),
    }
    file = RECORDS / "decoding_options.json"
    rows: list[dict[str, Any]] = []
    if file.is_file():
        rows = [r for r in json.loads(file.read_text())["rows"] if r["group"] not in args.groups]
    args.work.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Features] = {}

    def run(group: str, name: str, make: Callable[[], list[AudioClip]]) -> None:
        path = args.work / f"{group}-{name}.pt".replace(" ", "_").replace(",", "")
        start = time.monotonic()
        if path.is_file():
            passes, parts = torch.load(path, weights_only=True)
        else:
            passes, features = bench.measure(make)
            parts = {n: (f.embeddings, f.outputs, f.vectors) for n, f in features.items()}
            torch.save((passes, parts), path)
        kept[name] = {e.name: FeatureSet(e, *parts[e.name]) for e in bench.embedders}
        row = {"group": group, "name": name, "row_passes": passes}
        rows.append(row | {"figures": bench.figures(kept[name])})
        print(f"{time.monotonic() - start:.0f} s", rows[-1], flush=True)

    rows = [row for row in rows if row["group"]]
    run("", OWN, lambda: bench.decode({}))
    rows.insert(0, rows.pop())
    for group in args.groups:
        kept = {OWN: kept[OWN]}
        first = len(rows)
        if group == "best":
            run(group, f"best of {args.best_of}", lambda: bench.best(args.best_of))
        for name, settings in GROUPS.get(group, {}).items():
            run(group, name, lambda settings=settings: bench.decode(settings))
        found = bench.differences(kept)
        for row in rows[first:]:
            row["differences"] = found[row["name"]]
        write(about | {"rows": rows})
    print((RECORDS / "decoding_options.md").read_text())


if __name__ == "__main__":
    main()
