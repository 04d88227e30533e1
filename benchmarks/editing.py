"""Prompts, seams, continuations and long extensions of `edit` and `generate`, on any model.

    python benchmarks/editing.py prompt --clips 105
    python benchmarks/editing.py prompted --clips 48
    python benchmarks/editing.py seams --clips 24
    python benchmarks/editing.py codebooks --clips 32
    python benchmarks/editing.py continuation --clips 24
    python benchmarks/editing.py extension --minutes 10
    python benchmarks/editing.py examples

Each part writes benchmarks/records/editing_PART.json and renews editing.md beside it; `examples`
writes docs/editing. The records name the weights. Recordings are validation clips decoded by the
codec, so that what is measured is the model's part of a seam, and not that of the codec.

A seam's perplexity: a masked reading by the model itself, of the codes of the result. The 5 frames
behind the seam are masked in one stage, all stages in turn; codebooks below are seen, those above
hidden, as in training. It is divided by the perplexity of frames inside the same result, recorded
and regenerated ones. "Audio encoded again" reads the codes of the written audio instead, with the
codec's cross-fades; regions with the recording's own codes show what the codec alone does there.
Each clip has its own seed. Loops are whole bars at the tempo of the caption, so only clips whose
caption names a tempo are used.
"""

import argparse
import json
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from magnet_train.__main__ import main as main_of_package
from magnet_train.common.assets import demo_path
from magnet_train.common.audio_files import write_sound
from magnet_train.common.folders import write_json
from magnet_train.data.pipeline import EvaluationDataset
from magnet_train.data.shards import ShardSet
from magnet_train.decoding.decode import DecodingConfig, Network, Networks
from magnet_train.decoding.joins import encode_blocks, linear_render
from magnet_train.decoding.keep import Edit
from magnet_train.evaluation.scorer import (
    AudioClip,
    embed_clips,
    prepare_generated,
    score_clips,
)
from magnet_train.generator import Generator, load
from magnet_train.metrics.embedders import load_embedder
from magnet_train.metrics.intervals import bootstrap_interval
from magnet_train.metrics.music import (
    ClipMusic,
    MusicFigure,
    measure_clip,
    parse_tempo,
    score_music,
)
from magnet_train.metrics.scoring import FeatureSet
from magnet_train.release import SavedModel

RECORDS = Path(__file__).parent / "records"
BEHIND = 5
"""Frames behind a seam that are read."""


def validation_items(
    generator: Generator, count: int, length_s: float | None = None
) -> list[dict[str, Any]]:
    """Key, caption, codes `k t` and the reference features of different validation captions.

    Only clips of at least `length_s` seconds are returned; the default is the length of the model's
    training crops.
    """
    frames = round((length_s or generator.crop_s) * generator.codec.facts.frame_rate)
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


def seam_ratio(
    generator: Generator, codes: Tensor, caption: str, seams: list[int], inside: list[int]
) -> Tensor:
    """Log of the perplexity at the seams over that inside, at other frames: a number."""
    at_seams = surprise(generator, codes, caption, seams)
    return at_seams.mean() - surprise(generator, codes, caption, inside).mean()


def bars_s(caption: str, sample_rate: int, longest_s: float) -> float | None:
    """Length of as many bars of four beats as fit, a whole number of samples, in seconds."""
    tempo = parse_tempo(caption)
    if tempo is None or 240 / tempo > longest_s:
        return None
    return round(longest_s * tempo // 240 * 240 / tempo * sample_rate) / sample_rate


@torch.no_grad()
def seams(generator: Generator, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    facts = generator.codec.facts
    rate, hop, longest_s = round(facts.frame_rate), facts.hop_samples, 0.95 * generator.crop_s
    items = [
        item | {"loop_s": loop_s}
        for item in validation_items(generator, 10 * args.clips)
        if (loop_s := bars_s(item["caption"], facts.sample_rate, longest_s)) is not None
    ][: args.clips]
    size = items[0]["codes"].shape[1]
    middle = size // 2
    a, b, c, d = (round(size * share) for share in (0.2, 0.4, 0.6, 0.8))
    regions = Edit(((a / rate, b / rate), (c / rate, d / rate)))
    recorded, made = [a // 2, middle, (d + size) // 2], [(a + b) // 2, (c + d) // 2]
    at_regions = [a, b, c, d], [*recorded, *made]
    # A loop regenerates one second on each side: two places in it, and two in the recording.
    half = rate // 2
    at_loop = (
        [middle],
        [middle - 2 * rate, middle - half - BEHIND, middle + half, middle + 2 * rate],
    )
    found: dict[str, list[Tensor]] = {}
    uncut: dict[str, str] = {}

    def read(name: str, codes: Tensor, caption: str, places: tuple[list[int], list[int]]) -> None:
        found.setdefault(name, []).append(seam_ratio(generator, codes, caption, *places))
        if name not in (*UNCUT, ITSELF):
            uncut[name] = UNCUT[0 if places is at_regions else 1]

    def encoded(wav: Tensor) -> Tensor:
        return encode_blocks(generator.codec, wav)[0]

    def twice(x: Tensor, half: int) -> Tensor:
        """The end of a loop and its beginning, with the seam in the middle."""
        return torch.cat([x[:, -half:], x[:, :half]], 1)

    for i, item in enumerate(items):
        wav, caption = generator.codec.decode(item["codes"][None])[0], item["caption"]
        codes = encoded(wav)
        other = generator.codec.decode(items[(i + 1) % len(items)]["codes"][None])[0]
        read(UNCUT[0], codes, caption, at_regions)
        read(UNCUT[1], codes, caption, at_loop)
        edited = generator.edit(wav, facts.sample_rate, regions, caption, seed=i)[0]
        read("`edit --regenerate`, two regions", edited.codes, caption, at_regions)
        read(ITSELF, edited.codes, caption, (made, recorded))
        read("`edit --regenerate`, audio encoded again", encoded(edited.wav), caption, at_regions)
        same = replace(edited, codes=codes)
        read("the recording's codes in these regions, same", encoded(same.wav), caption, at_regions)
        loop = Edit(loop_s=item["loop_s"])
        looped = generator.edit(wav, facts.sample_rate, loop, caption, seed=i)[0]
        read("`edit --loop`", twice(looped.codes, middle), caption, at_loop)
        again = encoded(twice(looped.wav, middle * hop))
        read("`edit --loop`, audio encoded again", again, caption, at_loop)
        result = generator.generate([caption], i, [item["key"]], item["loop_s"], loop=True)
        read("`generate --loop`", twice(result.codes[0], middle), caption, at_loop)
        again = encoded(twice(result.wav[0], middle * hop))
        read("`generate --loop`, audio encoded again", again, caption, at_loop)
        cut = encoded(wav[:, : looped.wav.shape[1]])
        read("naive repetition of the same length", twice(cut, middle), caption, at_loop)
        joined = torch.cat([codes[:, :middle], encoded(other)[:, middle:]], 1)
        read("naive concatenation of two clips", joined, caption, at_loop)
        print(f"{i + 1} of {len(items)}", flush=True)
        if i > 0:  # a record after every clip, because all of them take long
            yield {"clips": i + 1, "frames_behind": BEHIND, "rows": list(_seam_rows(found, uncut))}


UNCUT = ("uncut music, at the places of the regions", "uncut music, its middle")
ITSELF = "regenerated frames over recorded ones, same audio"


def _seam_rows(found: dict[str, list[Tensor]], uncut: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Ratios by audio, and over those of uncut music at the same places, named by `uncut`."""
    for name, values in found.items():
        ratios = torch.stack(values)
        row = {"audio": name, "ratio": _exp_cell(ratios)}
        if name in uncut:
            row["over uncut music"] = _exp_cell(ratios - torch.stack(found[uncut[name]]))
        yield row


# --- what the network sees of given codes ---------------------------------------------------------


@torch.no_grad()
def prompt(generator: Generator, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
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
        rows.append({"audio": name, "nats": _cell(torch.stack(losses))})
    worse = float((visible_loss > hidden_loss).double().mean())
    yield {"clips": len(items), "clips where visible is worse": round(worse, 3), "rows": rows}


@torch.no_grad()
def prompted(generator: Generator, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Second halves decoded behind given first halves, whose upper codebooks are hidden or not.

    Same noise for all. Each decoded half is compared with its first half by the chroma of both, and
    by the perplexity of the codes at the seam (see above), of frames decoded with it.
    """
    rate, facts = generator.codec.facts.sample_rate, generator.codec.facts
    items = validation_items(generator, args.clips)
    captions = {item["key"]: item["caption"] for item in items}
    codes = torch.stack([item["codes"] for item in items])
    half = codes.shape[2] // 2
    given = torch.zeros_like(codes, dtype=torch.bool)
    given[..., :half] = True
    networks_of = generator._networks

    def visible(prompt: Tensor) -> Callable[..., Networks]:
        """Networks that always see all codebooks of the prompt `b k half`."""

        def show(network: Network) -> Network:
            return lambda codes, stage: network(torch.cat([prompt, codes[..., half:]], 2), stage)

        def networks(prompts: Sequence[str], config: DecodingConfig) -> Networks:
            found = networks_of(prompts, config)
            null = None if found.null is None else show(found.null)
            return Networks(show(found.conditional), null)

        return networks

    names = (
        "the tune itself",
        "given, codebooks above the stage hidden (as in training)",
        "given, codebooks above the stage visible (as audiocraft)",
        "nothing is given",
    )
    made: dict[str, list[Tensor]] = {name: [] for name in names}
    for i in range(0, len(items), 8):
        rows, keys = codes[i : i + 8], list(captions)[i : i + 8]
        cues = [(0, [captions[key] for key in keys])]
        made[names[0]].append(rows)
        made[names[1]].append(generator.fill(rows, given[i : i + 8], cues, 0, keys)[0])
        generator._networks = visible(rows[..., :half])  # type: ignore[method-assign]
        made[names[2]].append(generator.fill(rows, given[i : i + 8], cues, 0, keys)[0])
        generator._networks = networks_of  # type: ignore[method-assign]
        nothing = torch.zeros_like(given[i : i + 8])
        alone, _ = generator.fill(rows, nothing, cues, 0, keys)
        made[names[3]].append(torch.cat([rows[..., :half], alone[..., half:]], 2))
        print(f"{i + len(rows)} of {len(items)}", flush=True)
    seconds = round(facts.frame_rate)
    near = [half + place * seconds for place in (1, 2, 3)]
    music: dict[str, dict[str, ClipMusic]] = {name: {} for name in names}
    chroma: dict[str, list[float]] = {name: [] for name in names}
    seam: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        for key, clip in zip(captions, torch.cat(made[name]), strict=True):
            wav = generator.codec.decode(clip[None])[0]
            first, second = wav.split(
                [half * facts.hop_samples, wav.shape[1] - half * facts.hop_samples], 1
            )
            own = measure_clip(second, rate)
            music[name][key] = own
            chroma[name].append(
                float(np.corrcoef(measure_clip(first, rate).classes, own.classes)[0, 1])
            )
            seam[name].append(seam_ratio(generator, clip, captions[key], [half], near))
    table_rows = []
    for name in names:
        same, ratio = torch.tensor(chroma[name]), torch.stack(seam[name])
        better = torch.tensor(chroma[names[1]]) - same
        table_rows.append(
            {
                "second half": name,
                "correlation of chroma with the first": _cell(same),
                "hidden minus this": _cell(better),
                "seam": _exp_cell(ratio),
            }
            | music_cells(score_music(music[name], captions, music[names[0]]))
        )
    yield {"clips": len(items), "rows": table_rows}


# --- given codebooks ------------------------------------------------------------------------------


@torch.no_grad()
def codebooks(generator: Generator, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Music of clips whose first codebooks are the recording's: which stage loses what?"""
    items = validation_items(generator, args.clips)
    captions = {item["key"]: item["caption"] for item in items}
    codes = torch.stack([item["codes"] for item in items])
    rate = generator.codec.facts.sample_rate
    scores: dict[str, dict[str, MusicFigure]] = {}
    recorded: dict[str, ClipMusic] = {}
    for count in range(codes.shape[1], -1, -1):
        music = {}
        given = torch.zeros_like(codes, dtype=torch.bool)
        given[:, :count] = True
        for i in range(0, len(items), 8):
            keys = list(captions)[i : i + 8]
            cues = [(0, [captions[key] for key in keys])]
            filled, _ = generator.fill(codes[i : i + 8], given[i : i + 8], cues, 0, keys)
            for key, clip in zip(keys, filled, strict=True):
                music[key] = measure_clip(generator.codec.decode(clip[None])[0], rate)
        recorded = recorded or music
        scores[f"the first {count}"] = score_music(music, captions, recorded)
        print(f"{count} given", flush=True)
    rows = [{"given codebooks": name} | music_cells(own) for name, own in scores.items()]
    yield {"clips": len(items), "rows": rows}


# --- continuation ---------------------------------------------------------------------------------


@torch.no_grad()
def continuation(generator: Generator, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Ten seconds behind the first five of a tune: its own, the model's, and those of another."""
    rate, given_s, length_s = generator.codec.facts.sample_rate, 5.0, 15.0
    start = round(given_s * rate)
    items = validation_items(generator, args.clips, length_s)
    captions = {item["key"]: item["caption"] for item in items}
    names = ("the tune itself", "continued by the model", "from the caption alone", "another tune")
    music: dict[str, dict[str, ClipMusic]] = {name: {} for name in names}
    chroma: dict[str, list[float]] = {name: [] for name in names}
    own = [generator.codec.decode(item["codes"][None])[0] for item in items]
    for i, item in enumerate(items):
        beginning = own[i][:, :start]
        edit = Edit(to_s=length_s)
        (continued,) = generator.edit(beginning, rate, edit, item["caption"])
        alone = generator.generate([item["caption"]], 0, [item["key"]], length_s - given_s)
        clips = (own[i][:, start:], continued.wav[:, start:], alone.wav[0], own[i - 1][:, start:])
        pitches = measure_clip(beginning, rate).classes
        for name, clip in zip(names, clips, strict=True):
            measured = measure_clip(clip, rate)
            music[name][item["key"]] = measured
            chroma[name].append(float(np.corrcoef(pitches, measured.classes)[0, 1]))
        print(f"{i + 1} of {len(items)}", flush=True)
    rows = []
    for name in names:
        same = _cell(torch.tensor(chroma[name]))
        scores = score_music(music[name], captions, music[names[0]])
        rows.append({"ten seconds": name, "correlation of chroma": same} | music_cells(scores))
    yield {"clips": len(items), "given_s": given_s, "rows": rows}


# --- extension ------------------------------------------------------------------------------------


def extension(generator: Generator, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
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
        nothing = torch.zeros(facts.channels, 0)
        for name, start in (("first minute", 0), ("last minute", args.minutes - 1)):
            for i in range(6):
                at = round((generator.crop_s + 60 * start + 10 * i) * facts.frame_rate)
                clip = render(at, at + round(10 * facts.frame_rate), nothing, nothing)[:, :piece]
                key = f"{item['key']} {i}"
                captions[key] = item["caption"]
                minutes[name].append(AudioClip(key, clip, facts.sample_rate))
    rows = [
        {"audio": name} | figures(clips, captions, reference) for name, clips in minutes.items()
    ]
    yield {
        "minutes": args.minutes,
        "recordings": len(memory),
        "peak_memory_mb": [round(m) for m in memory],
        "rows": rows,
    }


# --- examples of the documentation ----------------------------------------------------------------


CLIPS = Path(__file__).parents[1] / "data/demo/clips"
EXAMPLES = {
    "region": ["bach_bwv295_bassoon-clarinet-flute-oboe.wav", "--regenerate", "4:8"],
    "loop": ["airdsairs_book4_075_clarinet-dulcimer.flac", "--loop", "--bars", "4", "--bpm", "112"],
    "continuation": ["joplin_maple-leaf-rag_piano.mp3", "--to_s", "140"],
}


def examples(args: argparse.Namespace) -> None:
    """`edit` on three recordings; small audio, plots and recipes in docs/editing."""
    folder = CLIPS.parents[2] / "docs/editing"
    folder.mkdir(exist_ok=True)
    for name, (clip, *options) in EXAMPLES.items():
        with tempfile.TemporaryDirectory() as out:
            model = ["--checkpoint", args.checkpoint, "--precision", "bf16", "--out", out]
            assert main_of_package(["edit", str(CLIPS / clip), *options, *model]) == 0
            (made,) = Path(out).glob("*.wav")
            wav, rate = soundfile.read(made)
            write_sound(folder / f"{name}.ogg", wav, rate, compression_level=0.8)
            shutil.copy(made.with_suffix(".png"), folder / f"{name}.png")


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
    own = {clip.key: captions[clip.key] for clip in clips}
    features = embed_clips(
        prepare_generated(clips), [load_embedder("musicnn")], "", len(clips), quiet=True
    )
    metrics = ["fad/musicnn", "text/musicnn"]
    if all(clip.key in reference.logits for clip in clips):
        metrics.insert(1, "kl/musicnn")
    records = score_clips(metrics, features, {"musicnn": reference}, own, system="edit")
    found = {r.metric: {"value": r.value, "interval": r.interval} for r in records}
    music = score_music({c.key: measure_clip(c.wav, c.sample_rate) for c in clips}, own)
    return found | music_cells(music)


def _cell(values: Tensor) -> dict[str, Any]:
    """The table's cell of a mean over clips."""
    return {"value": float(values.mean()), "interval": bootstrap_interval(values)}


def _exp_cell(logs: Tensor) -> dict[str, Any]:
    """The table's cell of a geometric mean over clips."""
    return {"value": float(logs.mean().exp()), "interval": np.exp(bootstrap_interval(logs))}


def music_cells(figures: dict[str, MusicFigure]) -> dict[str, Any]:
    """The table's cells of music figures."""
    return {
        f"music/{name}": {"value": f.value, "interval": f.interval} for name, f in figures.items()
    }


def table(record: dict[str, Any]) -> list[str]:
    columns = list(dict.fromkeys(key for row in record["rows"] for key in row))

    def cell(row: dict[str, Any], column: str) -> str:
        value, interval = row.get(column, ""), None
        if isinstance(value, dict):
            value, interval = value["value"], value["interval"]
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        return text if interval is None else f"{text} [{interval[0]:.3f}, {interval[1]:.3f}]"

    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(cell(r, c) for c in columns)} |" for r in record["rows"]]


def write_record(part: str, record: dict[str, Any]) -> None:
    write_json(
        RECORDS / f"editing_{part}.json", json.loads(json.dumps(record, default=np.ndarray.tolist))
    )
    lines = ["# Editing", "", "Written by `benchmarks/editing.py`, which says what is measured."]
    for name in PARTS:
        file = RECORDS / f"editing_{name}.json"
        if file.is_file():
            found = json.loads(file.read_text())
            facts = {k: v for k, v in found.items() if k not in ("rows", "weights")}
            lines += ["", f"## {name.capitalize()}", "", f"Weights: {found['weights']}."]
            lines += [", ".join(f"{k} {v}" for k, v in facts.items()) + ".", "", *table(found)]
    (RECORDS / "editing.md").write_text("\n".join(lines) + "\n")
    print("\n".join(table(record)))


PARTS = {
    "prompt": prompt,
    "prompted": prompted,
    "seams": seams,
    "codebooks": codebooks,
    "continuation": continuation,
    "extension": extension,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "examples"])
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--pieces", type=int, default=1, help="Recordings that are continued.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.part == "examples":
        examples(args)
        return
    saved = SavedModel.open(args.checkpoint)
    step = saved.provenance.get("step")
    generator = load(args.checkpoint, dtype=torch.bfloat16)
    start = time.monotonic()
    about = {
        "weights": f"{args.checkpoint}, step {step}, SHA-256 {str(saved.sha256)[:16]}",
        "machine": f"one CPU core, bfloat16, {platform.machine()}, torch {torch.__version__}",
    }
    for record in PARTS[args.part](generator, args):
        write_record(args.part, record | about | {"seconds": round(time.monotonic() - start)})


if __name__ == "__main__":
    main()
