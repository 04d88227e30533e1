"""`evaluate`: audio of any origin against a reference, with records that say how every figure was made.

list -> (generate) -> hear -> gather -> score -> table, JSON, report, listening test. Clips are dealt out to the devices
by their place in the sorted list, heard, and gathered by id; the first device computes. A clip's id is its path in its
folder without suffix, and clips of the same id belong together.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from magnet_train.audio_files import normalize_loudness, recognisable_name, write_audio
from magnet_train.codec import Codec, load_codec
from magnet_train.data.audio import SUFFIXES
from magnet_train.data.shards import find_clips
from magnet_train.errors import UserError
from magnet_train.listening import analyse_study, export_study
from magnet_train.metrics.embedding_sets import fad_per_clip
from magnet_train.metrics.listeners import LISTENERS, Listener, load_listener
from magnet_train.metrics.published import PUBLISHED, RECIPES
from magnet_train.metrics.record import Record, markdown_table, write_records
from magnet_train.metrics.reference_statistics import ReferenceStatistics
from magnet_train.metrics.scoring import NEEDS_REFERENCE, HeardSet, parse_metric, raise_together, score
from magnet_train.page import read_sound
from magnet_train.report import Clip, Report, write_report

EMBEDDED = ("fad/musicnn", "kl/musicnn", "text/musicnn")  # what ships, and needs no download
PUBLISHED_LEVEL = "generated -14 LUFS"
NUM_SHOWN = 8  # prompts in a report, beside the three best and the three worst of each system
SILENT_RMS = 1e-5  # -100 dB of full scale


@dataclass(frozen=True)
class EvaluateOptions:
    """What is scored, against what, and what is written."""

    generated: list[str] = field(default_factory=list)
    """Folders of audio files, each FOLDER or NAME=FOLDER: a row of the table each."""
    reference: str | None = None
    """Folder of real audio, or statistics that --save_reference wrote (their folder, or one of its files)."""
    captions: Path | None = None
    """JSONL or CSV with path and caption of every clip; else what stands beside the files, in .txt or .json."""
    metrics: list[str] = field(default_factory=lambda: list(EMBEDDED))
    """KIND/LISTENER each, of scoring.KINDS and listeners.LISTENERS."""
    checkpoint: str | None = None
    """Release folder, hub id, checkpoint, run folder or "demo": generates for --prompts and scores it too."""
    prompts: Path | None = None
    """Captions to generate for: text with one a line, or JSONL or CSV with path and caption."""
    generated_to: Path = Path("evaluated")
    """Folder for what --checkpoint generates; a subfolder for each seed."""
    seed: int = 0
    """Of the decoding noise."""
    batch_size: int = 4
    """Clips decoded together."""
    out: Path | None = None
    """JSON file for the records."""
    save_reference: Path | None = None
    """Folder for the reference's statistics, a file for each listener, to give as --reference from then on."""
    loudness: bool = True
    """Whether generated clips are brought to -14 LUFS before they are heard, as in the published figures; the real
    ones never are."""
    keep_silent: bool = False
    """Whether silent generated clips are scored like any other, instead of being an error."""
    codec: str | None = None
    """Codec whose reconstructions of the reference are scored as a floor: "demo", a folder or a hub id."""
    published_set: str | None = None
    """MusicCaps or AudioCaps, if --reference is that set, whole: published figures of it then stand in the table."""
    weights: dict[str, str] = field(default_factory=dict)
    """Files of listeners' weights, as in {vggish: FILE}; downloaded once if not given."""
    force: bool = False
    """Whether figures of different protocols are put in one table, which then says so."""
    report: Path | None = None
    """HTML file with players, spectrograms and figures."""
    listening_test: Path | None = None
    """HTML file with a blinded listening test of all systems and the reference; its key is written beside it."""
    study: Path | None = None
    """Key of a listening test whose --ratings are summed up."""
    ratings: list[Path] = field(default_factory=list)
    """CSV files that raters sent back."""
    accelerator: str = "auto"
    """cpu, gpu, or auto."""
    devices: int = 1
    """GPUs, or processes on a CPU, that share the clips."""

    def __post_init__(self) -> None:
        for metric in self.metrics:
            parse_metric(metric)
        if (self.study is None) != (not self.ratings):
            raise UserError("--study and --ratings belong together: give both")
        if not self.generated and self.checkpoint is None and self.save_reference is None and self.study is None:
            raise UserError("nothing to score: give --generated FOLDER, or --checkpoint with --prompts")
        if (self.checkpoint is None) != (self.prompts is None):
            raise UserError("--checkpoint and --prompts belong together: give both")
        if self.batch_size < 1 or self.devices < 1:
            raise UserError(f"batch_size={self.batch_size} and devices={self.devices} must be at least 1")
        if unknown := set(self.weights) - set(LISTENERS):
            raise UserError(f"--weights {min(unknown)}: choose of {', '.join(LISTENERS)}")
        if self.published_set not in (None, *RECIPES):
            raise UserError(f"--published_set {self.published_set}: choose MusicCaps or AudioCaps")
        if self.save_reference is not None and self.reference is None:
            raise UserError("--save_reference: give --reference FOLDER to compute it of")


# --- list ---------------------------------------------------------------------------------------------------------


def clips_of(folder: Path) -> dict[str, Path]:
    """The audio files of a folder, to its depth, by id and in its order.

    Raises:
        UserError: if there is none, or two of one id.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    clips: dict[str, Path] = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")):
        key = path.relative_to(folder).with_suffix("").as_posix()
        if key in clips:
            raise UserError(f"{clips[key]} and {path}: two clips named {key}; keep one of them")
        clips[key] = path
    if not clips:
        raise UserError(f"{folder}: no audio files ({', '.join(SUFFIXES)}) in it")
    return clips


def systems_of(generated: Sequence[str]) -> dict[str, Path]:
    """Names and folders of `--generated`.

    Raises:
        UserError: if two have one name.
    """
    systems: dict[str, Path] = {}
    for entry in generated:
        name, _, folder = entry.rpartition("=")
        path = Path(folder).expanduser()
        name = name or path.name
        if name in systems:
            raise UserError(f"--generated {entry}: a second system named {name}; write NAME={folder}")
        systems[name] = path
    return systems


def captions_of(file: Path | None, clips: dict[str, Path]) -> dict[str, str]:
    """Captions by clip id: of the manifest if there is one, else of what stands beside the files (`{}` = nothing).

    Raises:
        UserError: if a manifest lacks a clip's caption.
    """
    if file is None:
        captions = {}
        for key, path in clips.items():
            note, text = path.with_suffix(".json"), path.with_suffix(".txt")
            try:
                about = json.loads(note.read_text(encoding="utf-8-sig")) if note.is_file() else {}
                caption = about.get("prompt") or about.get("caption") if isinstance(about, dict) else None
                if not caption and text.is_file():
                    caption = " ".join(text.read_text(encoding="utf-8-sig").split())
            except ValueError as error:
                raise UserError(f"{note}: unreadable caption ({error}); write UTF-8 JSON") from error
            if isinstance(caption, str) and caption:
                captions[key] = caption
        return captions
    found = {Path(clip["name"]).with_suffix("").as_posix(): clip["caption"] for clip in find_clips(file)}
    if missing := [key for key in clips if not found.get(key)]:
        raise UserError(
            f"{file}: {len(found)} captions for {len(clips)} clips; {missing[0]} has none: give each clip's path "
            "without or with suffix, relative to its folder"
        )
    return {key: found[key] for key in clips}


def prompts_of(file: Path) -> dict[str, str]:
    """Captions to generate for, by the id that the clip gets.

    Raises:
        UserError: if the file is unreadable or empty.
    """
    if file.suffix.lower() in (".jsonl", ".csv", ".json"):
        return {Path(c["name"]).with_suffix("").as_posix(): c["caption"] for c in find_clips(file) if c["caption"]}
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {file}: unreadable ({error})") from error
    if not lines:
        raise UserError(f"--prompts {file}: no prompt in it; write one a line")
    if len(set(lines)) < len(lines):
        raise UserError(f"--prompts {file}: a line stands there twice, and would get the same clip; remove it")
    return {recognisable_name(line): line for line in lines}


# --- generate -----------------------------------------------------------------------------------------------------


def generate_for(
    prompts: dict[str, str], options: EvaluateOptions, decoding: dict[str, Any], folder: Path, fabric: Fabric
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Writes a clip for each prompt of this device's share; what decoded it, and codes and order of the first clips.

    Batches are always full, so that the same codes come out for any number of devices.
    """
    from magnet_train.decoding import DecodingConfig
    from magnet_train.generator import load

    generator = load(options.checkpoint or "demo", fabric.device)
    settings = DecodingConfig.from_dict(asdict(generator.decoding) | decoding)
    shown = set(list(prompts)[:NUM_SHOWN])
    own = list(prompts)[fabric.global_rank :: fabric.world_size]
    grids: dict[str, dict[str, Tensor]] = {"codes": {}, "order": {}}
    for first in tqdm(range(0, len(own), options.batch_size), desc="generating", unit="batch", disable=_quiet(fabric)):
        keys = own[first : first + options.batch_size]
        padding = options.batch_size - len(keys)
        captions = [prompts[key] for key in keys] + [""] * padding
        result = generator.generate(captions, options.seed, [*keys, *["padding"] * padding], decoding=settings)
        for i, key in enumerate(keys):
            about = {"prompt": prompts[key], "item": key, "seed": options.seed, "checkpoint": options.checkpoint}
            about["decoding"] = asdict(settings)
            write_audio(folder / f"{key}.wav", result.wav[i].T.cpu().numpy(), result.sample_rate, about)
            if key in shown:
                grids["codes"][key], grids["order"][key] = result.codes[i].cpu(), result.order[i].cpu()
    return asdict(settings), grids


# --- hear ---------------------------------------------------------------------------------------------------------


def hear_clips(
    clips: dict[str, Path], listeners: Sequence[Listener], fabric: Fabric, what: str,
    change: Callable[[np.ndarray, int, Path], np.ndarray] = lambda wav, *_: wav,
) -> dict[str, HeardSet]:  # fmt: skip
    """What every listener hears in the clips, on all devices; `change` gets `t channels`, the rate and the file.

    Raises:
        UserError: on all devices, if a clip of any cannot be heard.
    """
    heard = {listener.name: HeardSet(listener) for listener in listeners}
    failure: str | None = None
    own = list(clips.items())[fabric.global_rank :: fabric.world_size]
    try:
        for key, path in tqdm(own, desc=f"hearing {what}", unit="clip", disable=_quiet(fabric)):
            wav, sample_rate = read_sound(path)
            tensor = torch.from_numpy(np.ascontiguousarray(change(wav, sample_rate, path).T))
            for part in heard.values():
                try:
                    part.put(key, part.listener(tensor, sample_rate, str(path)), sample_rate)
                except UserError as error:
                    raise UserError(f"{error}") from error
    except UserError as error:
        failure = str(error)
    raise_together(failure)
    return {name: part.gathered() for name, part in heard.items()}


def _as_published(loudness: bool, keep_silent: bool) -> Callable[[np.ndarray, int, Path], np.ndarray]:
    """What is done to a generated clip before it is heard."""

    def change(wav: np.ndarray, sample_rate: int, path: Path) -> np.ndarray:
        if not keep_silent and np.sqrt(np.mean(np.square(wav))) < SILENT_RMS:
            raise UserError(f"{path}: silent; generate it again, or score silence with --keep_silent true")
        return np.asarray(normalize_loudness(wav, sample_rate), dtype=np.float32) if loudness else wav

    return change


def _through(codec: Codec) -> Callable[[np.ndarray, int, Path], np.ndarray]:
    """A clip as the codec gives it back, at the clip's own rate."""
    from magnet_train.metrics.frontend import resample

    facts = codec.facts

    @torch.no_grad()
    def change(wav: np.ndarray, sample_rate: int, path: Path) -> np.ndarray:
        mono = resample(torch.from_numpy(wav.T.copy()), sample_rate, facts.sample_rate)
        again = codec.decode(codec.encode(mono.expand(facts.channels, -1)[None]))[0].cpu()
        return resample(again, facts.sample_rate, sample_rate)[: len(wav), None].numpy()

    return change


def _quiet(fabric: Fabric) -> bool:
    return fabric.global_rank > 0


# --- the verb -----------------------------------------------------------------------------------------------------


def evaluate(options: EvaluateOptions, decoding: dict[str, Any] | None = None) -> list[Record]:
    """Scores all systems; the records come back on every device, tables and files are written by the first.

    Raises:
        UserError: for whatever cannot be scored; nothing is computed over fewer clips than there are.
    """
    if options.study is not None:
        print(analyse_study(options.ratings, options.study).to_markdown())
        if not options.generated and options.checkpoint is None and options.save_reference is None:
            return []
    strategy = "auto" if options.devices == 1 else "ddp"
    fabric = Fabric(accelerator=options.accelerator, devices=options.devices, strategy=strategy)
    fabric.launch()
    systems = {name: clips_of(folder) for name, folder in systems_of(options.generated).items()}
    names = dict.fromkeys(parse_metric(metric)[1] for metric in options.metrics)
    device = str(fabric.device)
    listeners = [load_listener(name, options.weights.get(name), device) for name in names]
    references, real_clips = _references(options, listeners, fabric)
    settings: dict[str, dict[str, Any]] = {}
    grids: dict[str, dict[str, Tensor]] = {"codes": {}, "order": {}}
    if options.checkpoint is not None and options.prompts is not None:
        name = "ours" if "ours" not in systems else options.checkpoint
        folder = options.generated_to / f"seed{options.seed}"
        failure = None
        try:
            decoded, grids = generate_for(prompts_of(options.prompts), options, decoding or {}, folder, fabric)
            settings[name] = {"decoding": decoded, "seed": options.seed}
        except UserError as error:
            failure = str(error)
        raise_together(failure)
        wanted = prompts_of(options.prompts)
        systems[name] = {key: path for key, path in clips_of(folder).items() if key in wanted}
    floors = _floors(options, listeners, references, real_clips, fabric)
    level = PUBLISHED_LEVEL if options.loudness else "as it is"
    records: list[Record] = []
    heard_by: dict[str, dict[str, HeardSet]] = {}
    for system, clips in systems.items():
        heard_by[system] = hear_clips(
            clips, listeners, fabric, system, _as_published(options.loudness, options.keep_silent)
        )
        captions = captions_of(options.captions, clips)
        if not captions and real_clips:  # the clips' counterparts may have what they lack
            captions = {k: v for k, v in captions_of(None, real_clips).items() if k in clips}
        for metric in options.metrics:
            _, name = parse_metric(metric)
            about = {"system": system, "level": level, **settings.get(system, {}), **floors.get(metric, {})}
            record = score(metric, heard_by[system][name], references.get(name), captions, **about)
            records.append(_published(record, options.published_set))
    if fabric.global_rank == 0:
        _write(options, records, heard_by, references, systems, real_clips, grids)
    return records


def _references(
    options: EvaluateOptions, listeners: Sequence[Listener], fabric: Fabric
) -> tuple[dict[str, ReferenceStatistics], dict[str, Path]]:
    """The reference as each listener heard it, and its clips where it is audio."""
    if options.reference is None:
        if needs := [m for m in options.metrics if parse_metric(m)[0] in NEEDS_REFERENCE and options.generated]:
            raise UserError(f"{needs[0]} needs --reference: a folder of real audio, or saved statistics")
        return {}, {}
    path = Path(options.reference).expanduser()
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if files:
        saved = {}
        for listener in listeners:
            file = path if path.is_file() else path / f"{listener.name}.safetensors"
            if not file.is_file():
                raise UserError(f"{file}: not there; save the reference with metrics of {listener.name} too")
            saved[listener.name] = ReferenceStatistics.load(
                file, embedder=listener.id, embedder_hash=listener.hash, windowing=listener.windowing
            )
        return saved, {}
    clips = clips_of(path)
    heard = hear_clips(clips, listeners, fabric, "the reference")
    statistics = {name: part.statistics() for name, part in heard.items()}
    if options.save_reference is not None and fabric.global_rank == 0:
        for name, part in statistics.items():
            part.save(options.save_reference / f"{name}.safetensors")
    return statistics, clips


def _floors(
    options: EvaluateOptions, listeners: Sequence[Listener], references: dict[str, ReferenceStatistics],
    clips: dict[str, Path], fabric: Fabric,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Real against real, and the codec's reconstruction against real, for every metric that has them."""
    floors: dict[str, dict[str, float]] = {metric: {} for metric in options.metrics}
    codec = None if options.codec is None else load_codec(options.codec).to(fabric.device)
    if codec is not None and not clips:
        raise UserError("--codec: its floor needs the reference as audio; give its folder as --reference")
    again = {} if codec is None else hear_clips(clips, listeners, fabric, "the codec", _through(codec))
    captions = captions_of(None, clips)
    for metric in options.metrics:
        kind, name = parse_metric(metric)
        reference = references.get(name)
        if name in again:
            own = {k: v for k, v in captions.items() if k in again[name].embeddings}
            if not kind.startswith("text") or len(own) == len(again[name].embeddings):
                floors[metric]["floor_codec"] = score(metric, again[name], reference, own, system="codec").value
        if reference is not None and kind in NEEDS_REFERENCE and kind != "kl" and len(reference.embeddings) >= 4:
            halves = _halves(reference, next(x for x in listeners if x.name == name))
            floors[metric]["floor_real"] = score(metric, halves[0], halves[1].statistics(), system="real").value
    return floors


def _halves(reference: ReferenceStatistics, listener: Listener) -> tuple[HeardSet, HeardSet]:
    """Its clips in two halves, drawn by chance."""
    keys = list(reference.embeddings)
    order = [keys[i] for i in np.random.default_rng(0).permutation(len(keys))]
    parts = (sorted(order[: len(order) // 2]), sorted(order[len(order) // 2 :]))
    one, two = (HeardSet(listener, {k: reference.embeddings[k] for k in part}) for part in parts)
    return one, two


def _published(record: Record, published_set: str | None) -> Record:
    """With the name of the published protocol, if it was followed to the letter."""
    followed = record.metric in RECIPES.get(published_set or "", ()) and record.level == PUBLISHED_LEVEL
    return replace(record, published_protocol=f"audiocraft/{published_set}") if followed else record


def _write(
    options: EvaluateOptions, records: list[Record], heard_by: dict[str, dict[str, HeardSet]],
    references: dict[str, ReferenceStatistics], systems: dict[str, dict[str, Path]], real_clips: dict[str, Path],
    grids: dict[str, dict[str, Tensor]],
) -> None:  # fmt: skip
    if records:
        print(markdown_table(records, options.force, PUBLISHED))
    if options.out is not None:
        write_records(options.out, records)
        print(f"records: {options.out}")
    if options.save_reference is not None:
        print(f"reference: {options.save_reference}")
    if options.report is not None:
        write_report(options.report, _report(options, records, heard_by, references, systems, real_clips, grids))
        print(f"report: {options.report}")
    if options.listening_test is not None:
        folders = systems_of(options.generated)
        if options.checkpoint is not None:
            folders[list(systems)[-1]] = options.generated_to / f"seed{options.seed}"
        reference = None
        if real_clips:
            reference, folders["reference"] = "reference", Path(str(options.reference)).expanduser()
        study = export_study(folders, options.listening_test, reference)
        print(f"listening test: {study.page} ({study.num_trials} captions), its key: {study.key}")


def _report(
    options: EvaluateOptions, records: list[Record], heard_by: dict[str, dict[str, HeardSet]],
    references: dict[str, ReferenceStatistics], systems: dict[str, dict[str, Path]], real_clips: dict[str, Path],
    grids: dict[str, dict[str, Tensor]],
) -> Report:  # fmt: skip
    """The first prompts, and of each system the clips that lie nearest to the reference and farthest."""
    fads = [parse_metric(r.metric)[1] for r in records if r.metric.startswith("fad/")]
    scores: dict[str, dict[str, float]] = {}
    for system, heard in heard_by.items():
        if fads and all(len(x) > 1 for x in heard[fads[0]].embeddings.values()):
            scores[system] = fad_per_clip(heard[fads[0]].embeddings, references[fads[0]].moments)
    keys: dict[str, None] = {}
    ours = list(systems)[-1] if options.checkpoint is not None else None
    for system, clips in systems.items():
        ranked = list(scores.get(system, ()))
        keys |= dict.fromkeys([*list(clips)[:NUM_SHOWN], *ranked[:3], *ranked[-3:]])
    rows = []
    for key in keys:
        row: dict[str, Clip] = {}
        for system, clips in systems.items():
            if key in clips:
                caption = captions_of(None, {key: clips[key]}).get(key, key)
                codes, order = (grids[n][key].numpy() if system == ours and key in grids[n] else None for n in grids)
                row[system] = Clip(clips[key], caption, codes, order, scores.get(system, {}).get(key))
        if key in real_clips:
            row["real"] = Clip(real_clips[key], captions_of(None, {key: real_clips[key]}).get(key, key))
        rows.append(row)
    shown = [asdict(record) for record in records]
    settings = {k: str(v) for k, v in asdict(options).items() if v not in (None, [], {})}
    name = f"FAD of the clip alone ({fads[0]})" if fads else "score"
    return Report(
        "Evaluation", settings, rows, records=shown, score=name, lower_is_better=True,
    )  # fmt: skip
