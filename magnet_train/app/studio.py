"""The app without its page: generate, edit, cancel, presets, validation clips.

Clips are written by the functions of the verbs `generate` and `edit`, with the same JSON. One
generation runs at a time, in a thread, and sends `Update`s to the page.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from magnet_train.app.access import Access
from magnet_train.app.players import Clip, clips_html, order_html
from magnet_train.cli.edit import EditOptions, edit_files, list_cues, parse_region, read_recording
from magnet_train.cli.generate import GenerateOptions, all_prompts, generate_files, list_jobs
from magnet_train.cli.output import Chooser, check_model, load_generator, recipe
from magnet_train.common.errors import UserError, user_error_from
from magnet_train.common.folders import safe_name, writable_folder, write_json
from magnet_train.common.ranges import check_types
from magnet_train.common.yaml_files import read_yaml
from magnet_train.decoding.decode import DecodingConfig, DecodingStep
from magnet_train.evaluation.judge import DEFAULT_JUDGE, MUSIC_JUDGES
from magnet_train.evaluation.run_report import REAL, validation_clips
from magnet_train.release import SavedModel

if TYPE_CHECKING:
    from magnet_train.evaluation.judge import Judge
    from magnet_train.generator import Generator

POLL_S = 0.25
"""Time between two updates of a running generation, in seconds."""
JUDGES = (DEFAULT_JUDGE, *(f"music/{name}" for name in MUSIC_JUDGES))
NO_JUDGE = "none"
FORM_TYPES: dict[str, Any] = {
    "prompt": list[str],
    "lora": list[str],
    "checkpoint": str,
    "seed": int,
    "loop": bool,
    "duration_s": float | None,
}
"""Types of the options of `generate` that the page has fields for."""
PATHS = ("audio", "continue_from", "prompts_file", "prompts", "reference")
"""Options of `generate` and `edit` that name files."""


class Cancelled(Exception):
    """Raised in the thread of a generation that was cancelled."""


@dataclass(frozen=True)
class Update:
    """One update of the page during a generation."""

    message: str
    picture: str = ""
    """HTML of the order of unmasking so far."""
    clip: Clip | None = None
    """A clip that is ready."""


class Progress:
    """Progress of a running generation: counts decoding steps, and stops when cancelled."""

    def __init__(self) -> None:
        self.cancelled = Event()
        self.is_waiting = True
        self.total = 0
        """Steps of all takes; 0 before the model is loaded."""
        self.done = 0
        self._last = (0, -1)
        self._order = self._masked = np.zeros((0, 0))

    def __call__(self, step: DecodingStep) -> None:
        """Record a step of the decoding."""
        self.check()
        place, masked = (step.stage, step.index), step.masked[0].cpu().numpy()
        order, shape = self._order, (step.codes.shape[1], len(masked))
        if place <= self._last or order.shape != shape:  # a new clip or window
            order = np.full(shape, -1)
        order, undecided = order.copy(), np.zeros(shape, bool)
        order[step.stage][masked] = step.index
        undecided[step.stage] = masked
        undecided[step.stage + 1 :] = True
        self._order, self._masked, self._last = order, undecided, place
        self.done += 1

    def check(self) -> None:
        """Raise Cancelled if the generation was cancelled."""
        if self.cancelled.is_set():
            raise Cancelled

    def update(self) -> Update:
        """The current state, for the page."""
        if self.is_waiting:
            return Update("Waiting for another generation to end")
        if not self.total:
            return Update("Loading the model")
        picture = order_html(self._order, self._masked) if self._order.size else ""
        return Update(f"Step {self.done} of {self.total}", picture)


class Studio:
    """Model, folders and running generations of an app."""

    def __init__(self, model: str, allow: Sequence[Path], out: Path, device: str = "auto"):
        """
        Args:
            model: model to start with, as `--checkpoint` of `generate`.
            allow: folders whose recordings, models and runs may be opened, besides `out`.
            out: folder for takes, edits, uploaded recordings and presets.
            device: device, as `--device` of `generate`.

        Raises:
            UserError: if there is no usable model, or `out` cannot be written.
        """
        SavedModel.open(model)
        self.out = writable_folder(out.expanduser().resolve(), "--out")
        folders = [path.expanduser().resolve() for path in allow]
        for folder in folders:
            if folder.exists() and not folder.is_dir():
                raise UserError(f"--allow {folder}: not a folder")
        self.access = Access((self.out, *folders), tuple(dict.fromkeys([model, "demo"])))
        self.model, self.device = model, device
        self._running: dict[str, Progress] = {}
        self._lock = Lock()
        self._loaded: tuple[Any, Generator] | None = None
        self._judges: dict[str, Judge] = {}

    # --- generations ------------------------------------------------------------------------------

    def generate(
        self, session: str, takes: int, judge: str, options: Mapping[str, Any]
    ) -> Iterator[Update]:
        """Generate takes with consecutive seeds.

        Args:
            session: the browser tab.
            takes: number of takes.
            judge: metric that scores them, or NO_JUDGE.
            options: options of `generate`, as in a clip's JSON.

        Raises:
            UserError: if an option or file is not valid.
        """
        values, decoding = self._checked(options)
        request = GenerateOptions(
            **values, device=self.device, variations=takes, batch_size=1, plots=False
        )
        return self._follow(session, lambda p: self._takes(request, decoding, judge, p))

    def edit(self, session: str, options: Mapping[str, Any]) -> Iterator[Update]:
        """Edit a recording.

        Args:
            session: the browser tab.
            options: options of `edit`, as in a result's JSON.

        Raises:
            UserError: if an option or file is not valid.
        """
        values, decoding = self._checked(options)
        request = EditOptions(**values, out=self.out / "edits", device=self.device, plots=False)
        return self._follow(session, lambda p: self._edits(request, decoding, p))

    def cancel(self, session: str) -> str:
        """Stop the generation of a browser tab; returns a message."""
        progress = self._running.get(session)
        if progress is None:
            return "Nothing is running"
        progress.cancelled.set()
        return "Cancelling"

    def _checked(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options with allowed files and models, and the decoding settings among them."""
        values = {name: value for name, value in options.items() if value is not None}
        for name in PATHS:
            if name in values:
                values[name] = self.access.file(str(values[name]))
        decoding = dict(values.pop("decoding", {}))
        values["checkpoint"] = self.access.model(values.get("checkpoint", self.model))
        values["lora"] = [self.access.adapter(text) for text in values.get("lora", [])]
        if decoding.get("rescorer"):
            decoding["rescorer"] = self.access.model(decoding["rescorer"])
        DecodingConfig.from_dict(decoding)
        return values, decoding

    def _new_folder(self, name: str) -> Path:
        """A new numbered folder, so that equal prompts and seeds do not replace older takes."""
        parent = writable_folder(self.out / name, "--out")
        number = max((int(p.name) for p in parent.iterdir() if p.name.isdecimal()), default=0)
        while True:
            number += 1
            try:
                (parent / f"{number:04d}").mkdir()
            except FileExistsError:
                continue
            return parent / f"{number:04d}"

    def _follow(self, session: str, work: Callable[[Progress], Iterator[Clip]]) -> Iterator[Update]:
        """Run `work` in a thread, and yield its clips and, in between, its progress."""
        self.cancel(session)
        progress = self._running[session] = Progress()
        finished: SimpleQueue[Clip | Exception | None] = SimpleQueue()

        def run() -> None:
            try:
                while not self._lock.acquire(timeout=POLL_S):
                    progress.check()
                try:
                    progress.is_waiting = False
                    progress.check()
                    for clip in work(progress):
                        finished.put(clip)
                        progress.check()
                finally:
                    self._lock.release()
                finished.put(None)
            except Exception as error:
                finished.put(error)

        Thread(target=run, daemon=True).start()
        try:
            yield from _updates(progress, finished)
        finally:
            progress.cancelled.set()
            if self._running.get(session) is progress:
                del self._running[session]

    def _load(
        self, options: GenerateOptions | EditOptions, decoding: dict[str, Any]
    ) -> "tuple[Generator, DecodingConfig]":
        """The model, and its decoding settings with the given ones; the model is kept in memory
        until another one or a newer checkpoint is requested.
        """
        saved = check_model(options, decoding)
        key = options.checkpoint, options.lora, saved.file, saved.file.stat().st_mtime_ns
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # one model at a time in memory
            self._loaded = key, load_generator(options)
        return self._loaded[1], saved.decoding

    def _takes(
        self, options: GenerateOptions, decoding: dict[str, Any], judge: str, progress: Progress
    ) -> Iterator[Clip]:
        import torch

        prompts = all_prompts(options)
        jobs = list_jobs(prompts, options.seed, options.variations)
        generator, settings = self._load(options, decoding)
        frames = torch.ones(max(1, generator.num_frames(options.duration_s)))
        options = replace(options, out=self._new_folder("takes"))
        progress.total = len(jobs) * generator.count_steps(frames.bool(), settings)
        chooser = Chooser(options, prompts)
        files = generate_files(generator, settings, options, jobs, chooser, progress)
        for job, (path, item) in zip(jobs, files, strict=True):
            note = self._score(judge, item.wav.cpu(), item.sample_rate, item.caption)
            order = item.unmask_step.cpu().numpy()
            yield Clip(path, f"Seed {job.seed}", note, order)

    def _score(self, name: str, wav: Any, sample_rate: int, caption: str) -> str:
        """Score of a take, as text; empty if the judge cannot be used here."""
        from magnet_train.evaluation.judge import best_of, check_judge, load_judge
        from magnet_train.evaluation.scorer import AudioClip

        if name == NO_JUDGE:
            return ""
        try:
            check_judge(name, None, [caption])
            if name not in self._judges:
                self._judges[name] = load_judge(name, None, "cpu")
            clip = AudioClip("take", wav, sample_rate)
            _, score = best_of([clip], caption, self._judges[name])
        except UserError as error:
            return f"no score: {error}"
        return f"{name} {score:.3f} ↑"

    def _edits(
        self, options: EditOptions, decoding: dict[str, Any], progress: Progress
    ) -> Iterator[Clip]:
        assert options.audio is not None
        wav, sample_rate = read_recording(options.audio)
        generator, settings = self._load(options, decoding)
        facts = generator.codec.facts
        plan = options.edit().plan(
            wav.shape[1], sample_rate, facts.frame_rate, facts.num_codebooks, generator.crop_s
        )
        progress.total = generator.count_steps(plan.to_decode, settings)
        cues = list_cues(options, plan.num_samples / sample_rate)
        chooser = Chooser(options, [caption for _, caption in cues])
        recording = wav, sample_rate
        files = edit_files(generator, settings, options, recording, cues, chooser, progress)
        for path, edited in files:
            regions = json.loads(path.with_suffix(".json").read_text())["regions_s"]
            order = edited.unmask_step.cpu().numpy()
            yield Clip(path, f"Seed {edited.seed}", "edited", order, regions)

    # --- recordings and presets -------------------------------------------------------------------

    def add_recording(self, upload: str) -> Path:
        """Copy an uploaded recording to the output folder, so that its edits can be repeated.

        Raises:
            UserError: if it is not audio.
        """
        source = Path(upload)
        try:
            read_recording(source)
        except UserError as error:
            raise UserError(str(error).replace(f"{source}", source.name)) from error
        digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
        folder = writable_folder(self.out / "recordings", "--out")
        path = folder / f"{safe_name(source.stem)}-{digest}{source.suffix.lower()}"
        shutil.copyfile(source, path)
        return path

    def open_recording(self, text: str) -> Path:
        """A recording in an allowed folder.

        Raises:
            UserError: if it is outside of them, missing or not audio.
        """
        path = self.access.file(text)
        read_recording(path)
        return path

    def save_preset(self, name: str, options: Mapping[str, Any]) -> Path:
        """Save the options of `generate` under a name, in the format of a clip's JSON.

        Raises:
            UserError: if an option or the name is not valid.
        """
        if not name.strip():
            raise UserError("the preset has no name; write one")
        values, decoding = self._checked(options)
        folder = writable_folder(self.out / "presets", "--out")
        path = folder / f"{safe_name(name.strip())}.json"
        made = recipe(GenerateOptions(**values), DecodingConfig.from_dict(decoding))
        write_json(path, {"options": made})
        return path

    def presets(self) -> list[str]:
        """Names of the saved presets."""
        return sorted(path.stem for path in (self.out / "presets").glob("*.json"))

    def preset(self, name: str) -> dict[str, Any]:
        """The options of a saved preset.

        Raises:
            UserError: if there is none of that name.
        """
        if name not in self.presets():
            raise UserError(f"{name}: no such preset; choose one from the list")
        return read_options(self.out / "presets" / f"{name}.json")

    def decoding_settings(self, model: str) -> DecodingConfig:
        """Decoding settings of a model.

        Raises:
            UserError: if it is not usable, or outside the allowed folders.
        """
        return SavedModel.open(self.access.model(model)).decoding

    # --- runs -------------------------------------------------------------------------------------

    def steps_of_run(self, run: str) -> list[int]:
        """Optimizer steps of the run's validations, newest first.

        Raises:
            UserError: if the folder is missing or outside the allowed folders.
        """
        found = self.access.folder(run).glob("validation/step_*")
        numbers = (path.name.removeprefix("step_") for path in found)
        return sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)

    def run_html(self, run: str, steps: Sequence[int], prompts: int) -> str:
        """Validation clips at these steps side by side, beside the real ones.

        Raises:
            UserError: if the folder is missing or outside the allowed folders.
        """
        notes: list[str] = []
        rows = validation_clips(self.access.folder(run), notes, steps)[:prompts]
        parts = []
        for i, row in enumerate(rows):
            names = sorted(row, key=lambda name: (name != REAL, len(name), name))
            clips = [
                Clip(
                    Path(str(row[name].audio)),
                    name,
                    "" if row[name].score is None else f"FAD {row[name].score:.3g} ↓",
                    row[name].order,
                )
                for name in names
            ]
            caption = next(clip.caption for clip in row.values())
            parts.append(f"<h3>{_escape(caption)}</h3>{clips_html(clips, f'run{i}')}")
        return "".join(parts) or "<p>No validation clips yet.</p>"


def _escape(caption: str) -> str:
    from magnet_train.evaluation.page import text

    return text(caption or "(no text)")


def _updates(
    progress: Progress, finished: "SimpleQueue[Clip | Exception | None]"
) -> Iterator[Update]:
    """Updates of a generation until it ends.

    Raises:
        UserError: if it failed because of a user error.
    """
    shown, clips = None, 0
    while True:
        try:
            result = finished.get(timeout=POLL_S)
        except Empty:
            state = progress.is_waiting, progress.total, progress.done
            if state != shown:
                shown = state
                yield progress.update()
            continue
        if isinstance(result, Clip):
            clips += 1
            yield Update(progress.update().message, clip=result)
        elif isinstance(result, Cancelled):
            yield Update(f"Cancelled after step {progress.done} of {progress.total}")
            return
        elif isinstance(result, Exception):
            raise user_error_from(result) or result
        else:
            yield Update(f"Done: {clips} {'file' if clips == 1 else 'files'} saved")
            return


def read_options(path: Path) -> dict[str, Any]:
    """The options in the JSON of a clip or preset.

    Raises:
        UserError: if it has none, or they are not valid.
    """
    content = read_yaml(path, path.name)
    options = content.get("options") if isinstance(content, dict) else None
    if not isinstance(options, dict) or not isinstance(options.get("decoding"), dict):
        raise UserError(f"{path.name}: no options in it; give the JSON next to a generated clip")
    try:
        check_types({k: v for k, v in options.items() if k in FORM_TYPES}, FORM_TYPES)
        DecodingConfig.from_dict(options["decoding"])
    except (TypeError, UserError) as error:
        raise UserError(f"{path.name}: {error}; give the JSON next to a generated clip") from error
    return options


def edit_options(
    kind: str,
    regions: str,
    loop_s: float | None = None,
    bars: int | None = None,
    bpm: float | None = None,
    to_s: float | None = None,
) -> dict[str, Any]:
    """Options of `edit` for one of the page's buttons.

    Args:
        kind: "regenerate", "loop" or "extend".
        regions: START:END in seconds, separated by spaces. For a loop, the part to loop; its length
            may be replaced by `loop_s`, or by `bars` and `bpm`.
        loop_s: length of the loop, in seconds.
        bars: length of the loop, in bars of four beats.
        bpm: tempo of the loop, in beats per minute.
        to_s: total length with the continuation, in seconds.

    Raises:
        UserError: if a region has another form, or the length is missing.

    >>> edit_options("loop", "2:6")
    {'loop': True, 'loop_start_s': 2.0, 'loop_s': 4.0}
    """
    marked = regions.replace(",", " ").split()
    if kind == "regenerate":
        return {"regenerate": marked}
    if kind == "extend":
        if to_s is None:
            raise UserError("give the total length to extend to, in seconds")
        return {"to_s": to_s, "regenerate": marked}
    if len(marked) > 1:
        raise UserError("mark one region to loop, or none")
    start, end = parse_region("regenerate", marked[0]) if marked else (0.0, float("inf"))
    options: dict[str, Any] = {"loop": True, "loop_start_s": start}
    if bars is not None or bpm is not None:
        return options | {"bars": bars, "bpm": bpm}
    if loop_s is None and end < float("inf"):
        loop_s = round(end - start, 6)
    return options | {"loop_s": loop_s}
