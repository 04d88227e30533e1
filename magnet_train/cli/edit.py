"""`edit`: regenerates parts of a recording, continues it or makes a loop, with a JSON to reproduce
the result."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magnet_train.cli.output import (
    MAX_DURATION_S,
    MAX_PLOT_S,
    Chooser,
    OutputOptions,
    check_model,
    load_generator,
    recipe,
    write_exact,
)
from magnet_train.common.errors import UserError
from magnet_train.common.folders import safe_name, writable_folder
from magnet_train.common.ranges import check_values
from magnet_train.decoding.hints import Hints

if TYPE_CHECKING:
    from torch import Tensor

    from magnet_train.decoding.decode import DecodingConfig, DecodingStep
    from magnet_train.decoding.keep import Edit, Region
    from magnet_train.generator import Cue, Edited, Generator


@dataclass(frozen=True)
class EditOptions(Hints, OutputOptions):
    """Options of `edit`."""

    audio: Path | None = None
    """Recording or earlier result, in any format that `tokenize` reads."""
    prompt: list[str] = field(default_factory=list)
    """One caption, or one per region of --regenerate (default: the caption next to the recording).
    """
    prompts: Path | None = None
    """CSV or JSONL file of prompts over time, with `at_s` (seconds) and `caption`."""
    regenerate: list[str] = field(default_factory=list)
    """Regions START:END to regenerate, in seconds; an empty END means the end."""
    keep: list[str] = field(default_factory=list)
    """Regions START:END to keep, in seconds (empty END = the end); all others are regenerated.
    """
    from_s: float | None = None
    """Start of the continuation in the recording, in seconds (default: its end)."""
    to_s: float | None = None
    """Continue the recording up to this total length, in seconds."""
    loop: bool = False
    """Make a loop of length --loop_s, or of --bars at --bpm."""
    loop_s: float | None = None
    """Length of the loop, in seconds; must be a whole number of samples."""
    bars: int | None = None
    """Length of the loop, in bars."""
    bpm: float | None = None
    """Tempo of the loop, in beats per minute."""
    beats_per_bar: int = 4
    """Beats per bar of the loop."""
    loop_start_s: float = 0.0
    """Start of the loop in the recording, in seconds."""
    seam_s: float = 1.0
    """Seconds to regenerate on each side of a loop's seam, if no region is given."""

    def __post_init__(self) -> None:
        OutputOptions.__post_init__(self)
        Hints.__post_init__(self)
        names = ("from_s", "to_s", "loop_s", "loop_start_s", "seam_s")
        check_values(
            self,
            "--",
            **dict.fromkeys(names, f"[0, {MAX_DURATION_S}] seconds"),
            bpm="[10, 1000] beats per minute",
            bars="[1, 1000]",
            beats_per_bar="[1, 64]",
        )
        self.loop_length_s()

    def loop_length_s(self) -> float | None:
        """Length of the loop in seconds; None = no loop.

        Raises:
            UserError: if it is missing or given twice.
        """
        in_bars = self.bars is not None or self.bpm is not None
        if not (self.loop or in_bars or self.loop_s is not None):
            return None
        if in_bars == (self.loop_s is not None) or (in_bars and not (self.bars and self.bpm)):
            raise UserError("--loop: give its length, --loop_s or both --bars and --bpm")
        if self.bars and self.bpm:
            return self.bars * self.beats_per_bar * 60 / self.bpm
        return self.loop_s

    def edit(self) -> "Edit":
        """The options as an `Edit`.

        Raises:
            UserError: if a region is invalid.
        """
        from magnet_train.decoding.keep import Edit

        return Edit(
            regenerate=tuple(parse_region("regenerate", text) for text in self.regenerate),
            keep=tuple(parse_region("keep", text) for text in self.keep),
            from_s=self.from_s,
            to_s=self.to_s,
            loop_s=self.loop_length_s(),
            loop_start_s=self.loop_start_s,
            seam_s=self.seam_s,
            hints=Hints(**{f.name: getattr(self, f.name) for f in fields(Hints)}),
        )


def edit(options: EditOptions, decoding: dict[str, Any]) -> list[Path]:
    """Edit a recording and write the results.

    Args:
        options: options of `edit`.
        decoding: decoding settings that override the checkpoint's.

    Returns:
        The audio files.

    Raises:
        UserError: if a setting or file is invalid; before a model is loaded.
    """
    from magnet_train.codec.base import load_codec_facts
    from magnet_train.decoding.autoregressive import check_decoding
    from magnet_train.release import codec_facts

    if options.audio is None:
        raise UserError("no recording; give `edit FILE`")
    saved = check_model(options, decoding)
    wav, sample_rate = read_recording(options.audio)
    edit = options.edit()
    facts = codec_facts(saved.codec) or load_codec_facts(saved.codec["id"])
    plan = edit.plan(wav.shape[1], sample_rate, facts.frame_rate, facts.num_codebooks, saved.crop_s)
    duration_s = plan.num_samples / sample_rate
    check_decoding(saved.network, saved.decoding, duration_s)
    cues = list_cues(options, duration_s)
    chooser = Chooser(options, [text for _, text in cues])
    writable_folder(options.out, "--out")
    generator = load_generator(options)
    recording = wav, sample_rate
    files = edit_files(generator, saved.decoding, options, recording, cues, chooser)
    return [path for path, _ in files]


def parse_region(option: str, text: str) -> "Region":
    """Parse START:END in seconds.

    Raises:
        UserError: if it has another form.

    >>> parse_region("keep", "4:8.5"), parse_region("keep", ":2")
    ((4.0, 8.5), (0.0, 2.0))
    """
    start, colon, end = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return float(start or 0), float(end) if end else float("inf")
    except ValueError as error:
        raise UserError(f"--{option} {text}: give START:END in seconds, as in 4:8") from error


def list_cues(options: EditOptions, total_s: float) -> "list[Cue]":
    """The prompts over time.

    Raises:
        UserError: if the timeline is unreadable, not sorted or ends after the result, or the number
            of prompts is neither one nor that of regions.
    """
    from magnet_train.data.manifest import read_sidecar

    if options.prompts is not None:
        if options.prompt:
            raise UserError("give --prompt or --prompts, not both")
        return read_timeline(options.prompts, total_s)
    if not options.prompt:
        assert options.audio is not None
        return [(0.0, read_sidecar(options.audio)[0])]
    if len(options.prompt) == 1:
        return [(0.0, options.prompt[0])]
    if len(options.prompt) != len(options.regenerate):
        raise UserError(
            f"{len(options.prompt)} prompts for {len(options.regenerate)} regions: give one for "
            "all, or one for each region of --regenerate"
        )
    starts = [parse_region("regenerate", text)[0] for text in options.regenerate]
    return sorted(zip(starts, options.prompt, strict=True))


def read_timeline(file: Path, total_s: float) -> "list[Cue]":
    """Prompts with their start in seconds.

    Raises:
        UserError: if the file or a row is unreadable, not sorted or beyond `total_s`.
    """
    from magnet_train.data.manifest import is_manifest, read_rows, split_caption

    if not is_manifest(file):
        raise UserError(f"--prompts {file}: give a CSV or JSONL file with at_s and caption")
    cues: list[Cue] = []
    for line, row in read_rows(file):
        where = f"--prompts {file}, line {line}"
        caption, others = split_caption(row, where)
        try:
            at_s = float(others.get("at_s", "missing"))
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{where}: at_s must be a number of seconds") from error
        if not 0 <= at_s < total_s:
            raise UserError(f"{where}: at_s={at_s:g} is outside the result of {total_s:.3f} s")
        if cues and at_s <= cues[-1][0]:
            raise UserError(
                f"{where}: at_s={at_s:g} does not follow {cues[-1][0]:g}; sort the rows"
            )
        if not caption:
            raise UserError(f"{where}: no caption; give one")
        cues.append((at_s, caption))
    if not cues:
        raise UserError(f"--prompts {file}: no prompt in it; give rows of at_s and caption")
    return cues


def read_recording(audio: Path) -> "tuple[Tensor, int]":
    """The recording as `channels t`, one or two channels, and its sample rate in Hz."""
    import torch

    from magnet_train.data.audio import read_as_recorded

    wav, sample_rate = read_as_recorded(audio.expanduser())
    return torch.from_numpy(wav.T.copy()), sample_rate


def edit_files(
    generator: "Generator",
    settings: "DecodingConfig",
    options: EditOptions,
    recording: "tuple[Tensor, int]",
    cues: "Sequence[Cue]",
    chooser: Chooser,
    on_step: "Callable[[DecodingStep], None] | None" = None,
) -> "Iterator[tuple[Path, Edited]]":
    """Edit the recording once per variation and candidate, and write the best.

    `on_step` is called after every step, instead of a progress bar.
    """
    from tqdm import tqdm

    edit, (wav, sample_rate) = options.edit(), recording
    facts = generator.codec.facts
    plan = edit.plan(
        wav.shape[1], sample_rate, facts.frame_rate, facts.num_codebooks, generator.crop_s
    )
    steps = generator.count_steps(plan.to_decode, settings)
    total = steps * options.variations * options.best_of
    with tqdm(total=total, unit="step", disable=on_step is not None) as bar:
        for i in range(options.variations):
            candidates = generator.edit(
                wav,
                sample_rate,
                edit,
                cues,
                options.seed + i * options.best_of,
                options.best_of,
                settings,
                on_step or (lambda _: bar.update()),
            )
            wavs = [candidate.wav for candidate in candidates] if options.best_of > 1 else [wav]
            best, judged = chooser(wavs, sample_rate, cues[0][1])
            made = candidates[best]
            yield _write(made, wav, options, settings, cues, generator, judged), made


def _write(
    edited: "Edited",
    before: "Tensor",
    options: EditOptions,
    settings: "DecodingConfig",
    cues: "Sequence[Cue]",
    generator: "Generator",
    judged: dict[str, Any],
) -> Path:
    """Writes an audio file, its JSON and, if requested, its plot."""
    from magnet_train.common.audio_files import save_plot
    from magnet_train.decoding.joins import runs

    assert options.audio is not None
    specific: dict[str, Any] = {"audio": options.audio, "seed": edited.seed}
    if options.prompts is None:
        specific["prompt"] = options.prompt or [text for _, text in cues if text]
    made = recipe(options, settings, **specific)
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{safe_name(options.audio.stem)}_{digest}_seed{edited.seed}.{options.format}"
    regions = [
        tuple(round(edited.seconds(f), 4) for f in run) for run in runs(edited.join.to_decode)
    ]
    about = {"prompt": cues[0][1], "seed": edited.seed, "regions_s": regions} | judged
    codec = generator.codec.facts.to_dict()
    about |= {"options": made, "codec": codec, "model": generator.provenance}
    path = options.out / name
    plots = options.plots and edited.join.num_samples <= MAX_PLOT_S * edited.sample_rate
    blocks = [edited.wav] if plots or options.best_of > 1 else edited.blocks()
    write_exact(path, blocks, edited.sample_rate, about)
    if plots:
        wavs = {"before": before.mean(0).numpy(), "after": edited.wav.mean(0).numpy()}
        steps = edited.unmask_step.cpu().numpy()
        save_plot(path.with_suffix(".png"), wavs, edited.sample_rate, steps, regions)
    return path
