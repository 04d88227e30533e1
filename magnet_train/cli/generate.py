"""`generate`: prompts to audio files, each with a JSON to reproduce it."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
from magnet_train.common.folders import writable_folder
from magnet_train.common.ranges import check_values

if TYPE_CHECKING:
    import torch

    from magnet_train.decoding.decode import DecodingConfig, DecodingStep
    from magnet_train.generator import DecodedItem, Generator


@dataclass(frozen=True)
class GenerateOptions(OutputOptions):
    """Options of `generate`."""

    prompt: list[str] = field(default_factory=list)
    """Captions, each in quotes; one file per caption."""
    prompts_file: Path | None = None
    """File with more prompts: text with one per line, or JSONL or CSV with captions."""
    unconditional: bool = False
    """Also generate without text, one file per variation."""
    duration_s: float | None = None
    """Length in seconds (default: the trained length); longer clips are decoded in windows."""
    loop: bool = False
    """Generate seamless loops of length --duration_s."""
    continue_from: Path | None = None
    """Audio prompt: every output starts with the last --continue_s seconds of this file."""
    continue_s: float = 3.0
    """Seconds of --continue_from to keep; a shorter file is kept completely."""
    batch_size: int = 4
    """Prompts per batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        seconds = f"[0.02, {MAX_DURATION_S}] seconds"
        check_values(self, "--", batch_size="[1, 100000]", continue_s=seconds, duration_s=seconds)
        if self.loop and self.continue_from is not None:
            raise UserError("--loop: give it without --continue_from, or use `edit --loop`")


@dataclass(frozen=True)
class Job:
    """One file to generate."""

    prompt: str
    seed: int


def generate(options: GenerateOptions, decoding: dict[str, Any]) -> list[Path]:
    """Generate and write audio files for all prompts and variations.

    Args:
        options: prompts and files.
        decoding: replaces decoding settings of the checkpoint.

    Returns:
        The audio files, in the order in which they were written.

    Raises:
        UserError: if there is no prompt, or a setting or file is not valid.
    """
    from magnet_train.decoding.autoregressive import check_decoding

    prompts = all_prompts(options)
    jobs = list_jobs(prompts, options.seed, options.variations, options.best_of)
    saved = check_model(options, decoding)
    check_decoding(saved.network, saved.decoding, options.duration_s or saved.crop_s)
    chooser = Chooser(options, prompts)
    if options.continue_from is not None:
        from magnet_train.data.audio import read_as_recorded

        if not options.continue_from.is_file():
            raise UserError(f"--continue_from {options.continue_from}: no such file")
        read_as_recorded(options.continue_from)  # refused before the model is loaded
    writable_folder(options.out, "--out")
    generator = load_generator(options)
    files = generate_files(generator, saved.decoding, options, jobs, chooser)
    return [path for path, _ in files]


def all_prompts(options: GenerateOptions) -> list[str]:
    """All prompts; the empty string stands for generation without text.

    Raises:
        UserError: if there is no prompt, one is empty, or the file cannot be read.
    """
    from magnet_train.data.manifest import read_prompts

    prompts = list(options.prompt)
    if options.prompts_file is not None:
        prompts += read_prompts(options.prompts_file.expanduser())
    for prompt in prompts:
        if not prompt.strip():
            raise UserError("empty prompt; use --unconditional true to generate without text")
        readable = prompt.encode(errors="replace").decode()
        if readable != prompt:
            raise UserError(f"prompt {readable!r}: not valid UTF-8; write it again")
    if options.unconditional:
        prompts.append("")
    if not prompts:
        raise UserError("no prompt; give --prompt TEXT or --prompts_file FILE")
    return prompts


def list_jobs(prompts: Sequence[str], seed: int, variations: int, seeds: int = 1) -> list[Job]:
    """One job per prompt and variation, all different. Each has `seeds` seeds.

    >>> [job.seed for job in list_jobs(["a", "b", "a"], seed=5, variations=2)]
    [5, 6, 5, 6, 7, 8]
    """
    count: Counter[str] = Counter()
    jobs = []
    for prompt in prompts:
        for _ in range(variations):
            jobs.append(Job(prompt, seed + seeds * count[prompt]))
            count[prompt] += 1
    return jobs


def generate_files(
    generator: "Generator",
    settings: "DecodingConfig",
    options: GenerateOptions,
    jobs: Sequence[Job],
    chooser: Chooser,
    on_step: "Callable[[DecodingStep], None] | None" = None,
) -> "Iterator[tuple[Path, DecodedItem]]":
    """Decode the jobs of each seed in batches, once per candidate, and write the best.

    `on_step` is called after every step, instead of a progress bar.
    """
    import torch
    from tqdm import tqdm

    start = kept_s = None
    if options.continue_from is not None:
        start, kept_s = _audio_prompt(generator, options.continue_from, options.continue_s)
    by_seed: dict[int, list[str]] = {}
    for job in sorted(jobs, key=lambda job: job.seed):
        by_seed.setdefault(job.seed, []).append(job.prompt)
    batches = sum(math.ceil(len(prompts) / options.batch_size) for prompts in by_seed.values())
    num_frames = generator.num_frames(options.duration_s)
    if start is not None and start.shape[2] >= num_frames:
        raise UserError(
            f"--continue_s {options.continue_s:g}: {kept_s:g} s of the file are kept, so nothing "
            f"is left to generate of --duration_s {options.duration_s or generator.crop_s:g}; "
            "keep less, or make it longer"
        )
    steps = generator.count_steps(torch.ones(num_frames, dtype=torch.bool), settings)
    total = batches * options.best_of * steps
    with tqdm(total=total, unit="step", disable=on_step is not None) as bar:
        for seed, prompts in by_seed.items():
            candidates = [
                generator.decode_items(
                    dict(zip(prompts, prompts, strict=True)),
                    min(options.batch_size, len(prompts)),
                    seed + i,
                    settings,
                    options.duration_s,
                    prompt_codes=start,
                    loop=options.loop,
                    on_step=on_step or (lambda _: bar.update()),
                )
                for i in range(options.best_of)
            ]
            for items in zip(*candidates, strict=True):
                best, judged = chooser([i.wav for i in items], items[0].sample_rate, items[0].key)
                made = recipe(
                    options,
                    settings,
                    prompt=[items[best].key] if items[best].key else [],
                    unconditional=not items[best].key,
                    seed=seed + best,
                    continue_s=kept_s,
                )
                codec = generator.codec.facts.to_dict()
                about = judged | {"options": made, "codec": codec, "model": generator.provenance}
                yield _write(items[best], seed + best, options, about), items[best]


def _audio_prompt(
    generator: "Generator", file: Path, seconds: float
) -> tuple["torch.Tensor", float]:
    """Codes `1 k t` of the end of a file, and their length in seconds."""
    import torch

    from magnet_train.data.audio import read_audio

    facts = generator.codec.facts
    wav = torch.from_numpy(read_audio(file, facts.sample_rate, facts.channels))
    num_frames = min(round(seconds * facts.frame_rate), wav.shape[1] // facts.hop_samples)
    if num_frames < 1:
        raise UserError(f"--continue_from {file}: shorter than a frame; give a longer file")
    wav = wav[:, -num_frames * facts.hop_samples :]
    return generator.codec.encode(wav[None].to(generator.device)), num_frames / facts.frame_rate


def _write(item: "DecodedItem", seed: int, options: GenerateOptions, about: dict[str, Any]) -> Path:
    """Writes an audio file, its JSON and, if requested, its plot."""
    import numpy as np
    import torch

    from magnet_train.common.audio_files import (
        normalize_for_listening,
        save_plot,
        slug,
        write_audio,
    )

    path = options.out / f"{slug(item.caption, seed)}.{options.format}"
    wav = item.wav.T.cpu().numpy()
    about = {
        "prompt": item.caption,
        "seed": seed,
        "duration_s": len(wav) / item.sample_rate,
    } | about
    if options.loop:  # normalised between copies of itself, so that its ends still match
        copies = normalize_for_listening(np.tile(wav, (3, 1)), item.sample_rate)
        loop = torch.from_numpy(copies[len(wav) : 2 * len(wav)].T.copy())
        write_exact(path, [loop], item.sample_rate, about)
    else:
        write_audio(path, wav, item.sample_rate, about)
    if options.plots and len(wav) <= MAX_PLOT_S * item.sample_rate:
        title = item.caption or "(no text)"
        order = item.unmask_step.cpu().numpy()
        save_plot(path.with_suffix(".png"), {title: wav.mean(1)}, item.sample_rate, order)
    return path
