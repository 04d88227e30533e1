"""`evaluate`: audio of any origin against a reference, with records that say how every figure was made.

list -> (generate) -> hear -> gather -> score -> table, JSON, report, listening test. Clips are dealt out to the devices
by their place in the sorted list, heard, and gathered by id; the first device computes. A clip's id is its path in its
folder without suffix, and clips of the same id belong together.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from magnet_train.codec.base import Codec, load_codec
from magnet_train.common.audio_files import normalize_loudness, recognisable_name, write_audio
from magnet_train.common.errors import UserError
from magnet_train.data.audio import SUFFIXES, duration_s
from magnet_train.data.manifest import find_clips
from magnet_train.evaluation.listening_test import analyse_study, export_study
from magnet_train.evaluation.page import read_sound
from magnet_train.evaluation.report import Clip, Report, write_report
from magnet_train.metrics.distributed import gather_by_id
from magnet_train.metrics.embedders import LISTENERS, Listener, load_listener
from magnet_train.metrics.embedding_sets import fad_per_clip
from magnet_train.metrics.kl import CONVENTIONS
from magnet_train.metrics.published import PUBLISHED, RECIPES
from magnet_train.metrics.record import Record, markdown_table, write_records
from magnet_train.metrics.reference import ReferenceStatistics
from magnet_train.metrics.scoring import NEEDS_REFERENCE, HeardSet, parse_metric, score, together

EMBEDDED = ("fad/musicnn", "kl/musicnn", "text/musicnn")  # what ships, and needs no download
Change = Callable[[np.ndarray, int, str, Path], np.ndarray]
"""Samples `t channels`, their rate, the clip's id and its file -> samples `t channels`."""
PUBLISHED_SIZES = {"MusicCaps": (5469, 5521)}  # clips: those that audiocraft had, and all
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
    """Folder for what --checkpoint generates; a subfolder for every model, seed and set of prompts."""
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
    kl_convention: str | None = None
    """Name of another convention of KL than the listener's, such as stable-audio-metrics (kl.CONVENTIONS)."""
    codec: str | None = None
    """Codec whose reconstructions of the reference are scored as a floor: "demo", a folder or a hub id."""
    published_set: str | None = None
    """MusicCaps or AudioCaps, if --reference is that set, whole: published figures of it then stand in the table."""
    weights: dict[str, str] = field(default_factory=dict)
    """Files of listeners' weights, as in {vggish: FILE}, downloaded once if not given; of codec the codec's name."""
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
        if self.kl_convention not in (None, *CONVENTIONS):
            raise UserError(f"--kl_convention {self.kl_convention}: choose of {', '.join(CONVENTIONS)}")
        for name in ("out", "report", "listening_test"):
            _check_place(f"--{name}", getattr(self, name), is_folder=False)
        _check_place("--save_reference", self.save_reference, is_folder=True)
        if self.published_set not in (None, *RECIPES):
            raise UserError(f"--published_set {self.published_set}: choose MusicCaps or AudioCaps")
        if self.save_reference is not None and (self.reference is None or _saved_files(self.reference)):
            raise UserError("--save_reference: give --reference FOLDER, with audio, to compute it of")


def _check_place(option: str, path: Path | None, is_folder: bool) -> None:
    """Nothing, if a file (or folder) can be written there: better known before an hour of scoring than after."""
    if path is None:
        return
    try:
        (path if is_folder else path.parent).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror}); choose another place") from error
    if not is_folder and path.is_dir():
        raise UserError(f"{option} {path}: is a folder; give the name of a file")


def _saved_files(reference: str) -> list[Path]:
    """The files of saved statistics that `--reference` names; none if it is a folder of audio."""
    path = Path(reference).expanduser()
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


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
        if name == "reference":
            raise UserError(f"--generated {entry}: the name reference is taken; write NAME={folder}")
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
    found = _of_manifest(file)
    missing, unused = [k for k in clips if k not in found], [k for k in found if k not in clips]
    if missing or unused:
        which = f"{missing[0]} has none" if missing else f"{unused[0]} is no clip"
        raise UserError(
            f"{file}: {len(found)} captions for {len(clips)} clips; {which}: give the clips' paths within their folder"
        )
    return {key: found[key] for key in clips}


def _of_manifest(file: Path) -> dict[str, str]:
    """Captions by id, of JSONL or CSV.

    Raises:
        UserError: if a row has no caption, an id comes twice, or a path leads out of the folder.
    """
    found: dict[str, str] = {}
    for clip in find_clips(file):
        path = Path(clip.name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{file}: {path} leads out of the folder; give paths relative to it")
        key = clip.id
        if not clip.caption:
            raise UserError(f"{file}: {path} has no caption; write one, or remove the row")
        if key in found:
            raise UserError(f"{file}: {key} comes twice; keep one caption of a clip")
        found[key] = clip.caption
    return found


def prompts_of(file: Path) -> dict[str, str]:
    """Captions to generate for, by the id that the clip gets.

    Raises:
        UserError: if the file is unreadable or empty, or a row has no caption or no id of its own.
    """
    if file.suffix.lower() in (".jsonl", ".csv", ".json"):
        return _of_manifest(file)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {file}: unreadable ({error})") from error
    if not lines:
        raise UserError(f"--prompts {file}: no prompt in it; write one a line")
    if len(set(lines)) < len(lines):
        raise UserError(f"--prompts {file}: a line stands there twice, and would get the same clip; remove it")
    # The name's own four digits are for people; among hundreds of like beginnings they come twice.
    return {f"{recognisable_name(line)}{hashlib.sha256(line.encode()).hexdigest()[4:12]}": line for line in lines}


# --- generate -----------------------------------------------------------------------------------------------------


def generate_for(
    prompts: dict[str, str], options: EvaluateOptions, decoding: dict[str, Any], folder: Path, fabric: Fabric
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Writes a clip for each prompt of this device's share; what decoded it, and codes and order of the first clips.

    Batches are always full, so that the same codes come out for any number of devices.
    """
    from magnet_train.decoding.decode import DecodingConfig
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
    change: Change,
) -> dict[str, HeardSet]:  # fmt: skip
    """What every listener hears in the clips, on all devices; `change` gets `t channels`, the rate and the file.

    Raises:
        UserError: on all devices, if a clip of any cannot be heard.
    """
    heard = {listener.name: HeardSet(listener) for listener in listeners}
    own = list(clips.items())[fabric.global_rank :: fabric.world_size]
    with together():
        for key, path in tqdm(own, desc=f"hearing {what}", unit="clip", disable=_quiet(fabric)):
            wav, sample_rate = read_sound(path)
            tensor = torch.from_numpy(np.ascontiguousarray(change(wav, sample_rate, key, path).T))
            for part in heard.values():
                try:
                    part.add(key, tensor, sample_rate)
                except UserError as error:
                    raise UserError(f"{path}: {str(error).removeprefix(f'{key}: ')}") from error
    return {name: part.gathered() for name, part in heard.items()}


def _unchanged(wav: np.ndarray, sample_rate: int, key: str, path: Path) -> np.ndarray:
    if np.sqrt(np.mean(np.square(wav))) < SILENT_RMS:
        raise UserError(f"{path}: silent; remove it from the reference")
    return wav


def _as_published(options: EvaluateOptions, seconds: dict[str, float]) -> Change:
    """What is done to a generated clip before it is heard: cut to its real counterpart's length, and levelled."""

    def change(wav: np.ndarray, sample_rate: int, key: str, path: Path) -> np.ndarray:
        if not options.keep_silent and np.sqrt(np.mean(np.square(wav))) < SILENT_RMS:
            raise UserError(f"{path}: silent; generate it again, or score silence with --keep_silent true")
        if options.loudness:
            wav = np.asarray(normalize_loudness(wav, sample_rate), dtype=np.float32)
        return wav[: round(seconds[key] * sample_rate)] if key in seconds else wav

    return change


def _through(codec: Codec, options: EvaluateOptions) -> Change:
    """A clip as the codec gives it back, at the clip's own rate, then treated as a generated one."""
    from magnet_train.metrics.networks.frontend import resample

    facts, published = codec.facts, _as_published(options, {})

    @torch.no_grad()
    def change(wav: np.ndarray, sample_rate: int, key: str, path: Path) -> np.ndarray:
        mono = resample(torch.from_numpy(wav.T.copy()), sample_rate, facts.sample_rate)
        again = codec.decode(codec.encode(mono.expand(facts.channels, -1)[None]))[0].cpu()
        again = resample(again, facts.sample_rate, sample_rate)[: len(wav), None].numpy()
        return published(again, sample_rate, key, path)

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
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(analyse_study(options.ratings, options.study).to_markdown())
        if not options.generated and options.checkpoint is None and options.save_reference is None:
            return []
    try:
        strategy = "auto" if options.devices == 1 else "ddp"
        fabric = Fabric(accelerator=options.accelerator, devices=options.devices, strategy=strategy)
    except Exception as error:  # Lightning's own, of several kinds
        what = f"--accelerator {options.accelerator} --devices {options.devices}"
        raise UserError(f"{what}: {str(error).splitlines()[0]}; choose cpu, gpu or auto") from error
    fabric.launch()
    with together():
        systems = {name: clips_of(folder) for name, folder in systems_of(options.generated).items()}
        prompts = prompts_of(options.prompts) if options.prompts is not None else {}
        names = dict.fromkeys(parse_metric(metric)[1] for metric in options.metrics)
        listeners = [load_listener(name, options.weights.get(name), str(fabric.device)) for name in names]
        real = _Reference.open(options, listeners)
        _check(options, systems, prompts, real)
    if real.clips:
        real.hear(listeners, fabric)
    if options.save_reference is not None and fabric.global_rank == 0:
        for name, part in real.statistics.items():
            part.save(options.save_reference / f"{name}.safetensors")
    grids: dict[str, dict[str, Tensor]] = {"codes": {}, "order": {}}
    made: dict[str, Any] = {}
    if options.checkpoint is not None:
        name = "ours" if "ours" not in systems else options.checkpoint
        folder = options.generated_to / _name_of(options, decoding or {}, prompts)
        with together():
            settings, grids = generate_for(prompts, options, decoding or {}, folder, fabric)
        made = {"system": name, "decoding": settings, "seed": options.seed}
        with together():
            systems[name] = {key: path for key, path in clips_of(folder).items() if key in prompts}
        grids = {what: gather_by_id(part) for what, part in grids.items()}
    floors = _floors(options, listeners, real, fabric)
    level = PUBLISHED_LEVEL if options.loudness else "as it is"
    records: list[Record] = []
    heard_by: dict[str, dict[str, HeardSet]] = {}
    captions: dict[str, dict[str, str]] = {}
    for system, clips in systems.items():
        heard_by[system] = hear_clips(clips, listeners, fabric, system, _as_published(options, real.seconds))
        with together():
            own = captions_of(options.captions, clips) or captions_of(None, real.clips)
            captions[system] = {key: own[key] for key in clips if key in own}
            for metric in options.metrics:
                _, name = parse_metric(metric)
                about = {"level": level, **(made if made.get("system") == system else {}), **floors[metric]}
                record = score(
                    metric, heard_by[system][name], real.statistics.get(name), captions[system],
                    options.kl_convention, **({"system": system} | about),
                )  # fmt: skip
                records.append(_published(record, options.published_set, real))
    if fabric.global_rank == 0:
        _write(options, records, heard_by, real, systems, captions, grids, made.get("system"))
    return records


@dataclass
class _Reference:
    """The real clips as each listener heard them: of audio, or of saved statistics."""

    clips: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Lengths of the clips, to which generated ones of the same id are cut."""
    heard: dict[str, HeardSet] = field(default_factory=dict)
    statistics: dict[str, ReferenceStatistics] = field(default_factory=dict)

    @classmethod
    def open(cls, options: EvaluateOptions, listeners: Sequence[Listener]) -> "_Reference":
        """The saved statistics, or the audio that is to be heard; empty if no reference is given."""
        if options.reference is None:
            if needs := [m for m in options.metrics if parse_metric(m)[0] in NEEDS_REFERENCE]:
                raise UserError(f"{needs[0]} needs --reference: a folder of real audio, or saved statistics")
            return cls()
        path = Path(options.reference).expanduser()
        if not _saved_files(options.reference):
            clips = clips_of(path)
            return cls(clips, {key: duration_s(file) for key, file in clips.items()})
        saved = {}
        for listener in listeners:
            file = path if path.is_file() else path / f"{listener.name}.safetensors"
            if not file.is_file():
                raise UserError(f"{file}: not there; save the reference with metrics of {listener.name} too")
            saved[listener.name] = ReferenceStatistics.load(
                file, embedder=listener.id, embedder_hash=listener.hash, windowing=listener.windowing
            )
        return cls(statistics=saved)

    def hear(self, listeners: Sequence[Listener], fabric: Fabric) -> None:
        """Has the clips heard; a collective."""
        self.heard = hear_clips(self.clips, listeners, fabric, "the reference", _unchanged)
        with together():
            # Names alone do not tell a reference from another one with the same names.
            names = [f"{k} {hashlib.sha256(path.read_bytes()).hexdigest()}" for k, path in self.clips.items()]
            self.statistics = {name: part.statistics(names=names) for name, part in self.heard.items()}

    def ids(self, listener: str) -> set[str]:
        """Of the clips that a KL can be paired with."""
        return set(self.clips) or set(self.statistics[listener].logits)


def _check(
    options: EvaluateOptions, systems: dict[str, dict[str, Path]], prompts: dict[str, str], real: _Reference
) -> None:
    """What can be known to fail before an hour is spent on it.

    Raises:
        UserError: if KL has a clip without a counterpart, or a codec's floor has no audio.
    """
    for metric in options.metrics:
        kind, name = parse_metric(metric)
        for keys in [*systems.values(), *([prompts] if prompts else [])]:
            if kind == "kl" and (missing := [key for key in keys if key not in real.ids(name)]):
                raise UserError(
                    f"{metric}: clip {missing[0]} has no counterpart in the reference; KL pairs clips by name: give "
                    "--prompts as JSONL or CSV with the paths of the real clips, or leave KL out of --metrics"
                )
    if options.codec is not None and not real.clips:
        raise UserError("--codec: its floor needs the reference as audio; give its folder as --reference")


def _name_of(options: EvaluateOptions, decoding: dict[str, Any], prompts: dict[str, str]) -> str:
    """A folder's name for what is generated, other than that of any other model, seed, decoding and prompts."""
    what = json.dumps([options.checkpoint, options.seed, decoding, prompts], sort_keys=True, default=str)
    return f"{Path(str(options.checkpoint)).stem}_seed{options.seed}_{hashlib.sha256(what.encode()).hexdigest()[:8]}"


def _floors(
    options: EvaluateOptions, listeners: Sequence[Listener], real: _Reference, fabric: Fabric
) -> dict[str, dict[str, float]]:
    """Real against real (halves of the reference; real clips with their captions), and the codec against real."""
    floors: dict[str, dict[str, float]] = {metric: {} for metric in options.metrics}
    if not real.clips:
        return floors
    again: dict[str, HeardSet] = {}
    if options.codec is not None:
        with together():
            codec = load_codec(options.codec).to(fabric.device)
        again = hear_clips(real.clips, listeners, fabric, "the codec", _through(codec, options))
    captions = captions_of(None, real.clips)
    for metric in options.metrics:
        kind, name = parse_metric(metric)
        reference = real.statistics[name]
        pairs: dict[str, tuple[HeardSet, ReferenceStatistics]] = {}
        if name in again:
            pairs["floor_codec"] = again[name], reference
        if kind.startswith("text"):
            pairs["floor_real"] = real.heard[name], reference
        elif kind in NEEDS_REFERENCE and kind != "kl":
            one, two = _halves(real.heard[name])
            pairs["floor_real"] = one, two.statistics()
        for floor, (heard, against) in pairs.items():
            with suppress(UserError):  # too few clips, or no captions, for this floor: the figure may have its meaning
                floors[metric][floor] = score(
                    metric, heard, against, captions, options.kl_convention, system=floor
                ).value
    return floors


def _halves(heard: HeardSet) -> tuple[HeardSet, HeardSet]:
    """Its clips in two halves, drawn by chance."""
    keys = list(heard.embeddings)
    order = [keys[i] for i in np.random.default_rng(0).permutation(len(keys))]
    parts = (sorted(order[: len(order) // 2]), sorted(order[len(order) // 2 :]))
    one, two = (HeardSet(heard.listener, {k: heard.embeddings[k] for k in part}) for part in parts)
    return one, two


def _published(record: Record, published_set: str | None, real: _Reference) -> Record:
    """With the name of the published protocol, if it was followed to the letter: its set, whole, included."""
    followed = (
        record.metric in RECIPES.get(published_set or "", ())
        and record.level == PUBLISHED_LEVEL
        and record.convention in (None, "audiocraft")
        and record.num_clips in PUBLISHED_SIZES.get(published_set or "", (len(real.clips),))
        and record.num_clips == len(real.clips)
    )
    return replace(record, published_protocol=f"audiocraft/{published_set}") if followed else record


def _write(
    options: EvaluateOptions, records: list[Record], heard_by: dict[str, dict[str, HeardSet]], real: _Reference,
    systems: dict[str, dict[str, Path]], captions: dict[str, dict[str, str]], grids: dict[str, dict[str, Tensor]],
    ours: str | None,
) -> None:  # fmt: skip
    if options.out is not None:  # first of all: whatever a table refuses, the figures are kept
        write_records(options.out, records)
        print(f"records: {options.out}")
    if options.save_reference is not None:
        print(f"reference: {options.save_reference}")
    if options.report is not None:
        write_report(options.report, _report(options, records, heard_by, real, systems, captions, grids, ours))
        print(f"report: {options.report}")
    if options.listening_test is not None:
        folders = systems_of(options.generated)
        if ours is not None:
            folders[ours] = next(iter(systems[ours].values())).parent
        if real.clips:
            folders["reference"] = Path(str(options.reference)).expanduser()
        study = export_study(folders, options.listening_test, "reference" if real.clips else None)
        print(f"listening test: {study.page} ({study.num_trials} captions), its key: {study.key}")
    if records:
        print(markdown_table(records, options.force, PUBLISHED))


def _report(
    options: EvaluateOptions, records: list[Record], heard_by: dict[str, dict[str, HeardSet]], real: _Reference,
    systems: dict[str, dict[str, Path]], captions: dict[str, dict[str, str]], grids: dict[str, dict[str, Tensor]],
    ours: str | None,
) -> Report:  # fmt: skip
    """The first prompts, and of each system the clips that lie nearest to the reference and farthest."""
    fads = [parse_metric(r.metric)[1] for r in records if r.metric.startswith("fad/")]
    scores: dict[str, dict[str, float]] = {}
    for system, heard in heard_by.items():
        if fads and all(len(x) > 1 for x in heard[fads[0]].embeddings.values()):
            scores[system] = fad_per_clip(heard[fads[0]].embeddings, real.statistics[fads[0]].moments)
    keys: dict[str, None] = {}
    for system, clips in systems.items():
        ranked = list(scores.get(system, ()))
        keys |= dict.fromkeys([*list(clips)[:NUM_SHOWN], *ranked[:3], *ranked[-3:]])
    rows = []
    for key in keys:
        row: dict[str, Clip] = {}
        for system, clips in systems.items():
            if key in clips:
                caption, value = captions[system].get(key, key), scores.get(system, {}).get(key)
                codes, order = (grids[n][key].numpy() if system == ours and key in grids[n] else None for n in grids)
                row[system] = Clip(clips[key], caption, codes, order, value)
        if key in real.clips:
            row["real"] = Clip(real.clips[key], captions_of(None, {key: real.clips[key]}).get(key, key))
        rows.append(row)
    shown = [asdict(record) for record in records]
    settings = {k: str(v) for k, v in asdict(options).items() if v not in (None, [], {})}
    name = f"FAD of the clip alone ({fads[0]})" if fads else "score"
    return Report("Evaluation", settings, rows, records=shown, score=name, lower_is_better=True)
