"""`generate`: prompts to audio files, each with a JSON of all settings beside it."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from magnet_train.common.errors import UserError
from magnet_train.common.folders import writable_folder

if TYPE_CHECKING:
    import torch

    from magnet_train.decoding.decode import DecodingConfig
    from magnet_train.generator import Generated, Generator

MAX_SEED = 2**63 - 1
MAX_DURATION_S = 3600.0


@dataclass(frozen=True)
class GenerateOptions:
    """Prompts and files."""

    prompt: list[str] = field(default_factory=list)
    """Captions; one file per caption."""
    prompts_file: Path | None = None
    """File with more prompts: text with one per line, or JSONL or CSV with captions."""
    unconditional: bool = False
    """Also generate without text, one file per variation."""
    out: Path = Path("generated")
    """Folder for the audio files."""
    checkpoint: str = "demo"
    """Release folder, hub id, checkpoint, run folder, or "demo" for the bundled model."""
    seed: int = 0
    """Seed; variation i uses seed + i. A repeated prompt continues with the next seeds."""
    variations: int = 1
    """Files per prompt."""
    duration_s: float | None = None
    """Length in seconds (default: the trained length)."""
    continue_from: Path | None = None
    """Audio prompt: every output starts with the first --continue_s seconds of this file."""
    continue_s: float = 3.0
    """Seconds of --continue_from to keep; a shorter file is kept completely."""
    format: Literal["wav", "flac"] = "wav"
    """Format of the audio files."""
    plots: bool = True
    """Write a spectrogram with the order of unmasking beside each file."""
    batch_size: int = 4
    """Prompts per batch."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1 …; auto uses a GPU if there is one."""
    precision: Literal["32", "bf16"] = "32"
    """Precision of the network; bf16 is faster on GPUs and gives different audio."""
    compiled: bool = False
    """Compile the network: takes minutes at the start; for many files on a GPU."""

    def __post_init__(self) -> None:
        _check_range("seed", self.seed, 0, MAX_SEED)
        _check_range("variations", self.variations, 1, 1_000_000)
        _check_range("batch_size", self.batch_size, 1, 100_000)
        _check_range("continue_s", self.continue_s, 0.02, MAX_DURATION_S, "seconds")
        if self.duration_s is not None:
            _check_range("duration_s", self.duration_s, 0.02, MAX_DURATION_S, "seconds")
        if self.format not in ("wav", "flac"):
            raise UserError(f"--format {self.format}: choose wav or flac")
        if self.precision not in ("32", "bf16"):
            raise UserError(f"--precision {self.precision}: choose 32 or bf16")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UserError(f"--device {self.device}: choose auto, cpu, cuda or cuda:N")


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
    from magnet_train.decoding.decode import DecodingConfig

    jobs = list_jobs(all_prompts(options), options.seed, options.variations)
    rescorer = DecodingConfig.from_dict(decoding).rescorer
    device = find_device(options.device)
    if options.continue_from is not None and not options.continue_from.is_file():
        raise UserError(f"--continue_from {options.continue_from}: no such file")
    writable_folder(options.out, "--out")

    import torch

    from magnet_train.generator import load
    from magnet_train.release import SavedModel
    from magnet_train.rescorer import check_rescorer

    if rescorer is not None:
        check_rescorer(rescorer, SavedModel.open(options.checkpoint).codec)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    generator = load(options.checkpoint, device, dtype, options.compiled)
    settings = DecodingConfig.from_dict(asdict(generator.decoding) | decoding)
    return list(_generate_files(generator, settings, options, jobs))


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


def list_jobs(prompts: Sequence[str], seed: int, variations: int) -> list[Job]:
    """One job per prompt and variation, all different.

    >>> [job.seed for job in list_jobs(["a", "b", "a"], seed=5, variations=2)]
    [5, 6, 5, 6, 7, 8]
    """
    count: Counter[str] = Counter()
    jobs = []
    for prompt in prompts:
        for _ in range(variations):
            jobs.append(Job(prompt, seed + count[prompt]))
            count[prompt] += 1
    return jobs


def find_device(name: str) -> str:
    """The device that `--device` names.

    Raises:
        UserError: if this machine does not have it.
    """
    import torch

    count = torch.cuda.device_count()
    if name == "auto":
        return "cuda" if count else "cpu"
    index = int(name.partition(":")[2] or 0)
    if name.startswith("cuda") and index >= count:
        raise UserError(
            f"--device {name}: this machine has {count} CUDA devices; choose another, or cpu"
        )
    return name


def _generate_files(
    generator: "Generator",
    settings: "DecodingConfig",
    options: GenerateOptions,
    jobs: Sequence[Job],
) -> Iterator[Path]:
    from tqdm import tqdm

    start = kept_s = None
    if options.continue_from is not None:
        start, kept_s = _audio_prompt(generator, options.continue_from, options.continue_s)
    about = {
        "checkpoint": options.checkpoint,
        "decoding": asdict(settings),
        "precision": options.precision,
        "codec": generator.codec.facts.to_dict(),
        "continue_from": None if start is None else str(options.continue_from),
        "continue_s": kept_s,
        "model": generator.about,
    }
    with tqdm(total=len(jobs), unit="file", disable=len(jobs) == 1) as bar:
        for batch in _batches(jobs, options.batch_size):
            prompts = [job.prompt for job in batch]
            codes = None if start is None else start.expand(len(batch), -1, -1)
            result = generator.generate(
                prompts,
                batch[0].seed,
                duration_s=options.duration_s,
                decoding=settings,
                prompt_codes=codes,
            )
            for row, job in enumerate(batch):
                yield _write(result, row, job, options, about)
                bar.update()


def _batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Batches of one seed each."""
    for seed in sorted({job.seed for job in jobs}):
        of_seed = [job for job in jobs if job.seed == seed]
        for first in range(0, len(of_seed), size):
            yield of_seed[first : first + size]


def _audio_prompt(
    generator: "Generator", file: Path, seconds: float
) -> tuple["torch.Tensor", float]:
    """Codes `1 k t` of the beginning of a file, and their length in seconds."""
    import torch

    from magnet_train.data.audio import read_audio

    facts = generator.codec.facts
    wav = torch.from_numpy(read_audio(file, facts.sample_rate, facts.channels))
    wav = wav[:, : round(seconds * facts.sample_rate)]
    codes = generator.codec.encode(wav[None].to(generator.device))
    return codes, wav.shape[-1] / facts.sample_rate


def _write(
    result: "Generated", row: int, job: Job, options: GenerateOptions, about: dict[str, Any]
) -> Path:
    """Writes an audio file, its JSON and, if requested, its plot."""
    from magnet_train.common.audio_files import save_plot, slug, write_audio

    path = options.out / f"{slug(job.prompt, job.seed)}.{options.format}"
    wav = result.wav[row].T.cpu().numpy()
    own = {"prompt": job.prompt, "seed": job.seed, "duration_s": len(wav) / result.sample_rate}
    write_audio(path, wav, result.sample_rate, own | about)
    if options.plots:
        title = job.prompt or "(no text)"
        order = result.order[row].cpu().numpy()
        save_plot(path.with_suffix(".png"), {title: wav.mean(1)}, result.sample_rate, order)
    return path


def _check_range(name: str, value: float, least: float, most: float, unit: str = "") -> None:
    if not least <= value <= most:
        raise UserError(f"--{name} {value}: must be between {least:g} and {most:g} {unit}".rstrip())
