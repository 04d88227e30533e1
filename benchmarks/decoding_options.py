"""What each decoding option is worth on one model, against row passes per clip.

    python benchmarks/decoding_options.py --groups order guidance steps rescoring --clips 104
    python benchmarks/decoding_options.py --groups distilled --teacher RELEASE --distilled RUN
    python benchmarks/decoding_options.py --groups noise --repeats 3 --name decoding_noise
    python benchmarks/decoding_options.py --groups beginning --checkpoint HYBRID \
        --name hybrid_beginning

Writes NAME.json and .md into benchmarks/records, and docs/NAME.png. Every
setting decodes the same validation captions with the same seeds, so differences from the first row
of a table are paired by clip; p-values have Holm's correction over a group. A row pass is one
pass of the network over all frames of one clip: a unit that no machine changes. Frames that exact
reuse skips are not counted; those of the rescorer are. Finished settings
are kept, and a second run goes on behind them.

The group `distilled` compares a run of `fit --model.distil_guidance true` with guidance from 3 to
1, and writes the divergence of its logits from the guided ones. Its teacher is the checkpoint as a
release whose config.json says max_cfg_coef 3.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm import tqdm

from magnet_train.common.assets import demo_path
from magnet_train.common.folders import write_json
from magnet_train.common.tables import markdown_table
from magnet_train.data.pipeline import EvaluationDataset
from magnet_train.data.shards import ShardSet
from magnet_train.decoding import decode
from magnet_train.decoding.decode import DecodingConfig
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
from magnet_train.loss import MaskedLoss
from magnet_train.metrics.embedders import load_embedder
from magnet_train.metrics.fixed_masks import MASK_RATES, fixed_span_mask
from magnet_train.metrics.reference import ReferenceStatistics
from magnet_train.metrics.scoring import FeatureSet
from magnet_train.model import Magnet
from magnet_train.module import MagnetModule
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
OWN = "model's own settings, one lap"
"""What the others are compared with: the second lap is one of the options."""


def guided(start: float | tuple[float, ...], end: float) -> dict[str, Any]:
    return {"max_cfg_coef": start, "min_cfg_coef": end}


def rescored(weight: float, **more: Any) -> dict[str, Any]:
    return {"span_scoring": "max", "rescorer_weight": weight, **more}


GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "order": {
        "order by probability": {"span_scoring": "prod"},
        "order by probability, noise 4.5": {"span_scoring": "prod", "order_temperature": 4.5},
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
    "lap": {
        "second lap of 0.2": {"second_lap": 0.2},
        "second lap of 0.35": {"second_lap": 0.35},
        "second lap of 0.5": {"second_lap": 0.5},
    },
    "noise": {
        "random order, noise shared by 25 frames above attacks": {"shared_noise": (1, 25)},
        "random order, noise shared by 25 frames in all stages": {"shared_noise": 25},
        "order by probability (max)": {"span_scoring": "max"},
        "order by probability (max), noise shared by 25 frames above attacks": {
            "span_scoring": "max",
            "shared_noise": (1, 25),
        },
        "order by probability (max), noise shared by 25 frames in all stages": {
            "span_scoring": "max",
            "shared_noise": 25,
        },
    },
    "nucleus": {
        "0.95 in all stages": {"top_p": 0.95},
        "0.95, 0.95, 0.5": {"top_p": (0.95, 0.95, 0.5)},
        "0.95, 0.5, 0.5": {"top_p": (0.95, 0.5, 0.5)},
        "0.8, 0.8, 0.5": {"top_p": (0.8, 0.8, 0.5)},
    },
    "guidance": {
        "no guidance": guided(1.0, 1.0),
        "1.5 to 1 in stage 0, attacks": guided((1.5, 1.0), 1.0),
        "1.5 to 1 in stage 1, pitches": guided((1.0, 1.5, 1.0), 1.0),
        "2 to 1 in stage 1, pitches": guided((1.0, 2.0, 1.0), 1.0),
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
    "beginning": {
        "all in parallel": {"autoregressive_s": 0.0},
        "1 s autoregressive": {"autoregressive_s": 1.0},
        "2.5 s autoregressive": {"autoregressive_s": 2.5},
        "5 s autoregressive": {"autoregressive_s": 5.0},
        "all autoregressive": {"autoregressive_s": 10.0},
    },
    "mixture": {
        "steps 5, 5, 2, 2, 2": {"decoding_steps": (5, 5, 2, 2, 2)},
        "sampled from the mixture with the rescorer, weight 0.5": {
            "decoding_steps": (5, 5, 2, 2, 2),
            "mixture": 0.5,
        },
    },
    "distilled": {
        "guidance 3 to 1": guided(3.0, 1.0),
        "no guidance": guided(1.0, 1.0),
        "distilled from 3 to 1, no guidance": {"distilled": True, **guided(1.0, 1.0)},
    },
}
"""Settings that differ from the model's own, by group and name."""
WITH_BASELINE = ("beginning", "mixture", "distilled")
"""Groups whose first setting is what the others are compared with, instead of the model's own."""


class Bench:
    """A generator that counts row passes, the captions, and the features of their real clips."""

    def __init__(
        self,
        generator: Generator,
        clips: int,
        repeats: int,
        batch: int,
        rescorer: str,
        distilled: str | None,
    ) -> None:
        self.generator, self.batch, self.rescorer = generator, batch, rescorer
        self.distilled = distilled
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
        chosen = list(self.captions.items())[:clips]
        self.captions = dict(chosen)
        for key, caption in chosen:
            for repeat in range(1, repeats):  # under another id, so with other noise
                self.captions[f"{key}_again{repeat}"] = caption
                real.outputs[f"{key}_again{repeat}"] = real.outputs[key]
        self.references: dict[str, ReferenceStatistics] = {"musicnn": real.statistics()}
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
        settings, generator = dict(settings), self.generator
        mixture = settings.pop("mixture", None)
        if settings.pop("distilled", False):
            generator = load(str(self.distilled), dtype=torch.bfloat16)
            self._count(generator.network)
        if settings.get("rescorer") or mixture:
            rescorer = generator._rescorer(self.rescorer)
            if self.rescorer not in self._counted:
                self._count(rescorer.network)  # type: ignore[attr-defined]
            self._counted.add(self.rescorer)
        if settings.get("rescorer"):
            settings["rescorer"] = self.rescorer
        decoding = replace(self.generator.decoding, **settings)
        with sampling_from_mixture(generator, rescorer, mixture) if mixture else nullcontext():
            made = generator.decode_items(self.captions, self.batch, seed, decoding)
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


@contextmanager
def sampling_from_mixture(generator: Generator, rescorer: Any, weight: float) -> Iterator[None]:
    """Sample from the mixture with a rescorer (Eq. 5), instead of ranking spans with it (Fig. 4).

    For a rescorer that does not look at the sampled codes, a MAGNeT, and temperature 1.
    """
    networks, logits = generator._networks, decode.guided_logits

    def with_rescorer(prompts: list[str], config: DecodingConfig) -> decode.Networks:
        return networks(prompts, config)._replace(rescorer=rescorer.reading(prompts))

    def mixed(passes: Any, codes: Tensor, stage: int, *rest: Any) -> Tensor:
        masked = codes[:, stage] == generator.codec.facts.codebook_size
        ours, theirs = logits(passes, codes, stage, *rest), passes.rescorer(codes, masked, stage)
        ours, theirs = ours.float().softmax(-1), theirs.float().softmax(-1)
        return ((1 - weight) * ours + weight * theirs).log()

    patches = patch.object(generator, "_networks", with_rescorer)
    with patches, patch.object(decode, "guided_logits", mixed):
        yield


@torch.no_grad()
def divergences(teacher: str, distilled: str, clips: int) -> dict[str, list[float]]:
    """KL of a single pass from the teacher's guided logits, in nats by stage: of the teacher's own
    pass, and of the distilled network's. On validation clips with the masks of validation.
    """
    saved = SavedModel.open(teacher)
    module = MagnetModule(
        saved.network, crop_s=saved.crop_s, init_from=teacher, distil_guidance=True
    )
    module.setup("fit")
    shards, frames = ShardSet.open(demo_path("shards/validation")), round(saved.crop_s * 25)
    batches = [b for b in EvaluationDataset(shards, frames, 8) if b["valid"].all()][: clips // 8]
    found = {}
    for name, weights in ("no guidance", saved), ("distilled", SavedModel.open(distilled)):
        module.network.load_state_dict(weights.weights())
        found[name] = []
        for stage in range(saved.network.num_codebooks):
            losses = []
            for batch in batches:
                masks = [fixed_span_mask(key, stage, frames, 1) for key in batch["keys"]]
                masked = torch.stack([mask for mask, _ in masks])
                rates = torch.tensor([MASK_RATES[rate] for _, rate in masks])
                losses.append(module.distilled_loss(batch, batch["captions"], stage, masked, rates))
            found[name].append(MaskedLoss.concatenate(losses).mean().item())
    return found


def rows_of(group: str, rows: list[dict[str, Any]]) -> list[list[str]]:
    """Lines of the table: `*` marks a difference from the first row, p < 0.05."""

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

    first = () if group in WITH_BASELINE else ("",)
    chosen = [row for row in rows if row["group"] in (*first, group)]
    return [
        [row["name"], f"{row['row_passes']:.0f}", *(cell(row, m) for m in METRICS)]
        for row in chosen
    ]


def write(record: dict[str, Any], name: str) -> None:
    write_json(RECORDS / f"{name}.json", record)
    about = {k: v for k, v in record.items() if k != "rows"}
    lines = ["# Decoding options", "", "Written by `benchmarks/decoding_options.py`.", ""]
    lines += [". ".join(f"{k}: {v}" for k, v in about.items()) + ".", ""]
    lines += [
        "In brackets: 95 % interval of the difference from the first row, paired by "
        "clip. \\*: p < 0.05 after Holm's correction over the group.",
    ]
    for group in dict.fromkeys(row["group"] for row in record["rows"] if row["group"]):
        heads = [group, "row passes", *METRICS.values()]
        lines += ["", markdown_table(heads, rows_of(group, record["rows"]))]
    (RECORDS / f"{name}.md").write_text("\n".join(lines) + "\n")
    plot(record["rows"], ROOT / f"docs/{name}.png")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """FAD, KL, text score, chroma change and scale fit against row passes, or for `beginning`
    against its length, which hardly changes row passes.
    """
    from matplotlib.figure import Figure

    lengths = {name: asked["autoregressive_s"] for name, asked in GROUPS["beginning"].items()}
    by_length = all(row["group"] == "beginning" for row in rows)
    names = ["fad/musicnn", "kl/musicnn", "text/musicnn", "music/chroma_change", "music/scale_fit"]
    figure = Figure(figsize=(17, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(names)), names, strict=True):
        for color, group in enumerate(dict.fromkeys(row["group"] for row in rows)):
            points = [row for row in rows if row["group"] == group]
            values = [row["figures"][metric]["value"] for row in points]
            ends = [row["figures"][metric]["interval"] for row in points]
            errors = [[v - low for v, (low, _) in zip(values, ends, strict=True)]]
            errors += [[high - v for v, (_, high) in zip(values, ends, strict=True)]]
            axes.errorbar(
                [lengths[row["name"]] if by_length else row["row_passes"] for row in points],
                values,
                errors,
                fmt="*" if not group else "o",
                markersize=12 if not group else 5,
                color=f"C{color}",
                alpha=0.8,
                label=group or OWN,
            )
        axes.set(ylabel=METRICS[metric])
        if by_length:
            axes.set(xlabel="seconds decoded autoregressively")
        else:
            axes.set(xscale="log", xlabel="row passes per clip")
            axes.set_xticks([25, 50, 100, 200, 400], labels=["25", "50", "100", "200", "400"])
            axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=6)
    figure.savefig(path, dpi=80)


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    groups = [*GROUPS, "best"]
    default = [group for group in groups if group not in ("beginning", "distilled")]
    parser.add_argument("--groups", nargs="+", choices=groups, default=default)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--weights_are", help="What its weights are, for the record.")
    parser.add_argument("--rescorer", help="Model that rescores (default: the checkpoint itself).")
    parser.add_argument("--rescorer_is", help="What that model is, for the record.")
    parser.add_argument("--distilled", help="Run with distilled guidance.")
    parser.add_argument("--teacher", help="Release that it was distilled from.")
    parser.add_argument("--clips", type=int, default=104)
    parser.add_argument("--repeats", type=int, default=1, help="Clips of each caption.")
    parser.add_argument("--name", default="decoding_options", help="Name of record and plot.")
    parser.add_argument("--best_of", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--work", type=Path, required=True, help="Folder of finished settings.")
    args = parser.parse_args()
    if ("distilled" in args.groups) != (args.distilled is not None):
        parser.error("--groups distilled needs --teacher and --distilled")
    return args


def main() -> None:
    args = parsed_arguments()
    torch.set_num_threads(1)
    saved = SavedModel.open(args.checkpoint)
    generator = load(args.checkpoint, dtype=torch.bfloat16)
    generator.decoding = replace(generator.decoding, second_lap=0.0)
    rescorer = args.rescorer or args.checkpoint
    bench = Bench(generator, args.clips, args.repeats, args.batch, rescorer, args.distilled)
    about = {
        "weights": f"{args.weights_are or Path(args.checkpoint).name}, "
        f"step {saved.provenance.get('step')}"
        + (f", SHA-256 {saved.sha256[:16]}" if saved.sha256 else ""),
        "machine": f"one CPU core, bfloat16, {platform.machine()}, torch {torch.__version__}",
        "clips": f"{len(bench.captions)}, {args.repeats} of each caption",
    }
    if {"rescoring", "mixture"} & set(args.groups):
        about["rescorer"] = args.rescorer_is or "the model itself, without guidance"
    file = RECORDS / f"{args.name}.json"
    rows: list[dict[str, Any]] = []
    if file.is_file():
        before = json.loads(file.read_text())
        rows = [r for r in before["rows"] if r["group"] not in args.groups]
        about = {k: v for k, v in before.items() if k.startswith(("KL", "rescorer"))} | about
    if args.distilled is not None:
        name = "KL from guided logits, nats by stage"
        about[name] = divergences(args.teacher, args.distilled, args.clips)
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

    if set(args.groups) - set(WITH_BASELINE):
        rows = [row for row in rows if row["group"]]
        run("", OWN, lambda: bench.decode({}))
        rows.insert(0, rows.pop())
    own = dict(kept)
    for group in args.groups:
        kept = {} if group in WITH_BASELINE else dict(own)
        first = len(rows)
        if group == "best":
            run(group, f"best of {args.best_of}", lambda: bench.best(args.best_of))
        for name, settings in GROUPS.get(group, {}).items():
            run(group, name, lambda settings=settings: bench.decode(settings))
        found = bench.differences(kept)
        for row in rows[first:]:
            row["differences"] = found.get(row["name"], {})
        write(about | {"rows": rows}, args.name)
    print((RECORDS / f"{args.name}.md").read_text())


if __name__ == "__main__":
    main()
