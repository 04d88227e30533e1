"""What each verb does with its options; those of Lightning are in `training`."""

import contextlib
import errno
import gc
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from magnet_train.common.errors import UserError, message_of
from magnet_train.common.folders import writable_folder


def run(verb: str, args: list[str]) -> None:
    """Run a verb with its options.

    Raises:
        UserError: for every mistake in the options, the files they name, or the room left on the disk.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or tokenizers warns at every fork of a loader
    from jsonargparse import set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a setting's sentence is its help text
    try:
        if verb in ("fit", "validate", "test", "predict"):
            _training().run_lightning(verb, args)
        elif verb == "tokenize":
            _run_tokenize(args)
        elif verb == "generate":
            _run_generate(args)
        elif verb == "evaluate":
            _run_evaluate(args)
        elif verb == "sweep":
            _run_sweep(args)
        elif verb == "doctor":
            _run_doctor(args)
        elif verb == "convert":
            _run_convert(args)
        elif verb == "bench":
            _run_bench(args)
        elif verb == "dashboard":
            _run_dashboard(args)
    except OSError as error:
        remedies = {
            errno.ENOSPC: "the disk is full: free some space, then run the same command again",
            errno.EDQUOT: "your quota is used up: free some space, then run the same command again",
            errno.EACCES: "no permission to write there: choose another folder",
            errno.EROFS: "the file system is read-only: choose another folder",
        }
        if error.errno not in remedies:
            raise
        raise UserError(f"{error.filename or 'output'}: {remedies[error.errno]}") from error


def _training() -> Any:
    """The module with all that Lightning needs, whose import takes seconds."""
    gc.disable()  # what is made there stays for good: looking through it again and again takes seconds more
    try:
        from magnet_train.cli import fit as training
    finally:
        gc.enable()
    return training


# --- tokenize, convert, evaluate, bench, generate ---------------------------------------------------------------------


def _parser(verb: str, description: str) -> Any:
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            if isinstance(ex, UserError):
                raise ex
            raise UserError(message_of(message)) from ex

        def parse_args(self, args: list[str], **settings: Any) -> Any:  # type: ignore[override]
            """With `--save-reference` understood as `--save_reference`."""
            spelt = [re.sub(r"^--[\w.-]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in args]
            return super().parse_args(spelt, **settings)

    parser = Parser(prog=f"python -m magnet_train {verb}", description=description)
    parser.add_argument("--config", action="config", help="YAML file with any of these options; repeatable.")
    return parser


def _run_tokenize(args: list[str]) -> None:
    from magnet_train.data.tokenize import TokenizeOptions, tokenize

    parser = _parser("tokenize", "Turn a folder of audio with captions into code shards.")
    parser.add_argument("input", type=Path, help="Folder of audio files with .txt or .json captions, or a manifest.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the shards.")
    parser.add_class_arguments(TokenizeOptions, nested_key=None, as_group=False)
    config = parser.parse_args(args)
    values = {k: v for k, v in vars(config).items() if k not in ("input", "out", "config")}
    tokenize(config.input, config.out, TokenizeOptions(**values))


def _run_convert(args: list[str]) -> None:
    from magnet_train.audiocraft.convert import ConvertOptions, convert

    parser = _parser(
        "convert", "Turn audiocraft's models into releases of ours, or back, or checkpoints into releases."
    )
    parser.add_argument(
        "source",
        type=str,
        help="Folder or hub id with audiocraft's files (magnet-small-10secs …), or a release, checkpoint or run.",
    )
    parser.add_class_arguments(ConvertOptions, nested_key=None, as_group=False)
    config = parser.parse_args(args)
    values = {k: v for k, v in vars(config).items() if k not in ("source", "config")}
    print(convert(config.source, ConvertOptions(**values)))


def _run_evaluate(args: list[str]) -> None:
    from magnet_train.decoding.decode import DecodingConfig
    from magnet_train.evaluation.evaluate import DEFAULT_METRICS, EvaluateOptions, evaluate
    from magnet_train.metrics.embedders import EMBEDDERS
    from magnet_train.metrics.scoring import METRICS

    parser = _parser("evaluate", "Score folders of audio, or a model, against a reference.")
    parser.add_argument(
        "--generated", type=str, nargs="+", default=[],
        help="Folders of audio files, each FOLDER or NAME=FOLDER: a row of the table each.",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", type=str, nargs="+", default=list(DEFAULT_METRICS),
        help=f"METRIC/EMBEDDER each; metrics: {', '.join(METRICS)}; embedders: {', '.join(EMBEDDERS)}.",
    )  # fmt: skip
    parser.add_argument("--ratings", type=Path, nargs="+", default=[], help="CSV files that raters sent back.")
    own = {"generated", "metrics", "ratings"}
    parser.add_class_arguments(EvaluateOptions, nested_key=None, as_group=False, skip=own)
    parser.add_class_arguments(DecodingConfig, "decoding", as_group=True)
    config = parser.parse_args(args)
    options = EvaluateOptions(**{k: v for k, v in vars(config).items() if k not in ("decoding", "config")})
    try:
        evaluate(options, _given_decoding(config, args))
    finally:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():  # left to the interpreter's end, it may abort
            dist.destroy_process_group()


def _given_decoding(config: Any, args: list[str]) -> dict[str, Any]:
    """The settings of decoding that were given: what is not is as the checkpoint says, not as the class has it."""
    given = {a.split("=")[0].removeprefix("--decoding.") for a in args if a.startswith("--decoding.")}
    return {k: v for k, v in vars(config.decoding).items() if k in given}


def _run_sweep(args: list[str]) -> None:
    from magnet_train.sweeps.ablation import write_ablation
    from magnet_train.sweeps.sweep import exec_run, read_sweep, sweep

    parser = _parser(
        "sweep", "Run a W&B sweep file without a W&B server, going on where it stopped; then draw its table."
    )
    parser.add_argument("file", type=Path, help="Sweep file with method: grid, as in conf/sweep.")
    parser.add_argument("--out", type=Path, help="Folder for the runs' folders and the table; runs/NAME of the file.")
    parser.add_argument("--jobs", type=int, help="Runs at a time: 1 here, all at once under SLURM if not given.")
    parser.add_argument("--slurm", action="store_true", help="Submit an array job, a task for each run.")
    parser.add_argument("--run", type=int, help="Only the run of this number, from 0: a task of an array job.")
    parser.add_argument("--table", action="store_true", help="Only draw the table of what is finished again.")
    config = parser.parse_args(args)
    out = (config.out or Path("runs") / config.file.stem).expanduser()
    runs = read_sweep(config.file, out)
    if config.run is not None:
        exec_run(config.file, runs, config.run)
        return
    done = config.table or sweep(config.file, runs, _parse_fit, config.jobs, config.slurm)
    if config.table or any(run.is_finished for run in runs):
        print("table       {}\nplot        {}".format(*write_ablation(runs, out)))
    if not done:
        sys.exit(1)


def _parse_fit(args: list[str]) -> None:
    """Parse the options of `fit`, make what it would, and go no further.

    Raises:
        UserError: if they do not hold.
    """
    passed_over: list[Exception] = []
    with _without_chatter():
        _training().try_fit(args, passed_over)
    if passed_over:
        raise passed_over[0]


def _run_doctor(args: list[str]) -> None:
    if "--prefetch" not in args:
        os.environ["HF_HUB_OFFLINE"] = "1"  # looking must not fetch; read when the hub's package is imported
    problems: list[Exception] = []
    made: Any = None
    try:
        with _without_chatter():
            made = _training().try_fit(args, problems)
    except Exception as error:  # whatever the parser and Lightning make of a configuration
        problems.append(error)

    from magnet_train.checks.doctor import Finding, doctor
    from magnet_train.checks.plan import Plan
    from magnet_train.common.pretrained import one_line

    def reason(error: Exception) -> str:
        return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"

    plan, findings = None, [Finding("failed", "start" if made else "configuration", reason(e)) for e in problems]
    if made is not None:
        findings.insert(0, Finding("ok", "configuration", "valid"))
        plan = Plan(made.parsed, made.datamodule, made.config_init.fit.generation.decoding)
    print("\n".join(map(str, findings)))
    for found in doctor(plan, {finding.what for finding in findings}):
        print(found if isinstance(found, Finding) else f"estimate {found}", flush=True)
        findings += [found] if isinstance(found, Finding) else []
    if plan is None:
        print("         the other checks need a configuration that holds")
    if wrong := [finding.what for finding in findings if finding.status in ("missing", "failed")]:
        raise UserError(f"{len(wrong)} of {len(findings)} checks failed, and a run would too: {', '.join(wrong)}")


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """What Lightning tells and warns of while it is set up is not about the run that is asked for."""
    import logging
    import warnings

    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _run_bench(args: list[str]) -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or the profiler warns of memory that was there before it
    from magnet_train.checks.bench import bench
    from magnet_train.checks.measure import BenchOptions

    parser = _parser("bench", "Measure time and memory of attention, training and decoding beside their slow twins.")
    parser.add_argument("--only", type=str, nargs="+", default=[], help="Parts to measure; all if none is given.")
    parser.add_class_arguments(BenchOptions, nested_key=None, as_group=False, skip={"only"})
    bench(BenchOptions(**{k: v for k, v in vars(parser.parse_args(args)).items() if k != "config"}))


def _run_dashboard(args: list[str]) -> None:
    from magnet_train.tracking.dashboard import DashboardOptions, dashboard

    parser = _parser("dashboard", "Lay out a W&B project's figures, or lay them out anew; prints the address.")
    parser.add_class_arguments(DashboardOptions, nested_key=None, as_group=False)
    print(dashboard(DashboardOptions(**{k: v for k, v in vars(parser.parse_args(args)).items() if k != "config"})))


@dataclass(frozen=True)
class GenerateOptions:
    """What `generate` makes of prompts."""

    prompt: list[str] = field(default_factory=list)
    """Captions, one file each."""
    prompts_file: Path | None = None
    """Text file with one caption a line, added to --prompt."""
    unconditional: bool = False
    """Whether files are made without any text, one for each variation, beside those of the prompts."""
    out: Path = Path("generated")
    """Folder for the audio files."""
    checkpoint: str = "demo"
    """Release folder, hub id, checkpoint, run folder, or "demo" for the shipped model."""
    seed: int = 0
    """Seed of the first variation of each prompt; the next has the next seed."""
    variations: int = 1
    """Files made of each prompt."""
    duration_s: float | None = None
    """Length in seconds; as trained if not given."""
    continue_from: Path | None = None
    """Audio file whose beginning every result keeps and continues."""
    continue_s: float = 3.0
    """Seconds of --continue_from that are kept."""
    format: str = "wav"
    """wav or flac."""
    pictures: bool = True
    """Whether a spectrogram with the order of unmasking is written beside each file."""
    batch_size: int = 4
    """Files decoded together; changes nothing but speed and memory."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU if there is one."""
    precision: Literal["32", "bf16"] = "32"
    """Of the network: 32, or bf16, which is faster on GPUs and gives other, equally good audio."""
    compiled: bool = False
    """Whether the network is compiled, which takes minutes at first and pays for many files on a GPU."""


def _run_generate(args: list[str]) -> None:
    from magnet_train.decoding.decode import DecodingConfig

    parser = _parser("generate", "Turn prompts into audio files, each with a JSON that says how to make it again.")
    parser.add_argument("--prompt", type=str, nargs="+", default=[], help="Captions in quotes, one file each.")
    parser.add_class_arguments(GenerateOptions, nested_key=None, as_group=False, skip={"prompt"})
    parser.add_class_arguments(DecodingConfig, "decoding", as_group=True)
    config = parser.parse_args(args)
    options = GenerateOptions(**{k: v for k, v in vars(config).items() if k not in ("decoding", "config")})
    for path in generate(options, _given_decoding(config, args)):
        print(path)


def generate(options: GenerateOptions, decoding: dict[str, Any]) -> list[Path]:
    """Audio files for all prompts and variations; `decoding` replaces settings of the checkpoint.

    Raises:
        UserError: if there is no prompt, or any option does not hold.
    """
    prompts = list(options.prompt)
    if options.prompts_file is not None:
        try:
            prompts += [line.strip() for line in options.prompts_file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts_file {options.prompts_file}: unreadable ({error})") from error
    if any(not p.strip() for p in prompts):
        raise UserError("a prompt is empty: write what to play, or use --unconditional true")
    if options.unconditional:
        prompts.append("")
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT or --prompts_file FILE (one caption a line)")
    from magnet_train.decoding.decode import DecodingConfig

    DecodingConfig.from_dict(decoding)  # a value out of range is named before the model is loaded
    if options.format not in ("wav", "flac"):
        raise UserError(f"--format {options.format}: choose wav or flac")
    if options.variations < 1 or options.batch_size < 1:
        raise UserError("--variations and --batch_size must be at least 1")
    writable_folder(options.out)

    import torch
    from tqdm import tqdm

    from magnet_train.common.audio_files import slug, write_audio, save_plot
    from magnet_train.generator import load

    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    generator = load(options.checkpoint, device, dtype, options.compiled)
    settings = DecodingConfig.from_dict(asdict(generator.decoding) | decoding)
    start_codes = None
    if options.continue_from is not None:
        from magnet_train.data.audio import read_audio

        facts = generator.codec.facts
        wav = torch.from_numpy(read_audio(options.continue_from, facts.sample_rate, facts.channels))
        wav = wav[:, : round(options.continue_s * facts.sample_rate)]
        start_codes = generator.codec.encode(wav[None].to(device))
    jobs = [(prompt, options.seed + i) for prompt in prompts for i in range(options.variations)]
    written = []
    with tqdm(total=len(jobs), unit="file", disable=len(jobs) == 1) as bar:
        for seed in sorted({s for _, s in jobs}):
            same_seed = [p for p, s in jobs if s == seed]
            for first in range(0, len(same_seed), options.batch_size):
                batch = same_seed[first : first + options.batch_size]
                begin = None if start_codes is None else start_codes.expand(len(batch), -1, -1)
                result = generator.generate(
                    batch, seed, duration_s=options.duration_s, decoding=settings, prompt_codes=begin
                )
                for i, prompt in enumerate(batch):
                    about = {
                        "prompt": prompt,
                        "seed": seed,
                        "duration_s": result.wav.shape[-1] / result.sample_rate,
                        "checkpoint": options.checkpoint,
                        "decoding": asdict(settings),
                        "precision": options.precision,
                        "codec": generator.codec.facts.to_dict(),
                        "continue_from": None if options.continue_from is None else str(options.continue_from),
                        "continue_s": None if options.continue_from is None else options.continue_s,
                        "model": generator.about,
                    }
                    path = options.out / f"{slug(prompt, seed)}.{options.format}"
                    wav = result.wav[i].T.cpu().numpy()
                    write_audio(path, wav, result.sample_rate, about)
                    if options.pictures:
                        title = {prompt or "(no text)": wav.mean(1)}
                        save_plot(
                            path.with_suffix(".png"), title, result.sample_rate, result.order[i].cpu().numpy()
                        )
                    written.append(path)
                    bar.update()
    return written
