"""Runs a verb: parses its options and calls the function that does the work."""

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from magnet_train.common.errors import UserError, integer_from_environment

INTEGER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NODEID", "SLURM_RESTART_COUNT"),
    *("MASTER_PORT", "SLURM_STEP_NUM_TASKS", "PL_SEED_WORKERS", "PL_GLOBAL_SEED"),
    *("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"),
)
"""Environment variables in which torch, Lightning and huggingface_hub, some when imported, expect
integers."""


def run(verb: str, args: list[str]) -> None:
    """Run a verb with its options.

    Raises:
        UserError: if an option, or a file that it names, is invalid.
    """
    for name in INTEGER_VARIABLES:
        integer_from_environment(name)
    # Otherwise tokenizers warns whenever a data worker is forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from jsonargparse import set_parsing_settings

    # Most of what is imported stays: the default threshold, 700, takes a tenth of the start.
    gc.set_threshold(20_000)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    if verb in ("fit", "validate", "test", "predict"):
        _fit_module(shows_help=not {"-h", "--help"}.isdisjoint(args)).run_lightning(verb, args)
    else:
        VERBS[verb](args)


def _fit_module(shows_help: bool = False) -> Any:
    """Imports `cli.fit`.

    If it only shows help, Lightning gets a torchmetrics without what help does not need.
    """
    if shows_help:
        from magnet_train.common.private_api import import_torchmetrics_alone

        import_torchmetrics_alone()
    from magnet_train.cli import fit

    return fit


def tokenize_verb(args: list[str]) -> None:
    from magnet_train.cli.parser import make_parser
    from magnet_train.data.tokenize import TokenizeOptions, tokenize

    parser = make_parser("tokenize", "Encode audio with captions into code shards.")
    source = "Folder of audio files with .txt or .json captions, or a manifest."
    parser.add_argument("input", type=Path, help=source)
    parser.add_argument("--out", type=Path, required=True, help="Folder for the shards.")
    parser.add_options(TokenizeOptions)
    config = parser.parse_args(args)
    tokenize(config.input, config.out, parser.options(config))


def generate_verb(args: list[str]) -> None:
    from magnet_train.cli.generate import GenerateOptions, generate
    from magnet_train.cli.inherited import parse_with_decoding
    from magnet_train.cli.parser import make_parser

    parser = make_parser(
        "generate", "Generate audio from prompts; a JSON next to each file has all settings."
    )
    for path in generate(*parse_with_decoding(parser, GenerateOptions, args)):
        print(path)


def edit_verb(args: list[str]) -> None:
    from magnet_train.cli.edit import EditOptions, edit
    from magnet_train.cli.inherited import parse_with_decoding
    from magnet_train.cli.parser import make_parser

    parser = make_parser(
        "edit FILE", "Regenerate regions of a recording, continue it, or make it a loop."
    )
    if args and not args[0].startswith("-"):  # an option, so that a configuration can give it
        args = ["--audio", *args]
    for path in edit(*parse_with_decoding(parser, EditOptions, args)):
        print(path)


def evaluate_verb(args: list[str]) -> None:
    from magnet_train.cli.inherited import parse_with_decoding
    from magnet_train.cli.parser import make_parser
    from magnet_train.common.products import choose_products
    from magnet_train.evaluation.evaluate import EvaluateOptions, evaluate
    from magnet_train.metrics.embedders import EMBEDDERS
    from magnet_train.metrics.music import MEASURES
    from magnet_train.metrics.scoring import METRICS

    parser = make_parser("evaluate", "Score folders of audio, or a model, against a reference.")
    metrics = (
        f"As METRIC/EMBEDDER or music/MEASURE. Metrics: {', '.join(METRICS)}. Embedders: "
        f"{', '.join(EMBEDDERS)}. Measures: {', '.join(MEASURES)}."
    )
    options, decoding = parse_with_decoding(parser, EvaluateOptions, args, metrics=metrics)
    choose_products()
    try:
        evaluate(options, decoding if options.checkpoint else {})
    finally:
        import torch.distributed as dist

        # Otherwise the interpreter may abort at exit.
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def convert_verb(args: list[str]) -> None:
    from magnet_train.audiocraft.convert import ConvertOptions, convert
    from magnet_train.cli.parser import make_parser

    parser = make_parser(
        "convert", "Convert audiocraft models to releases or back, or checkpoints to releases."
    )
    source = (
        "audiocraft model (folder or hub id, such as magnet-small-10secs), release, checkpoint or "
        "run folder."
    )
    parser.add_argument("source", type=str, help=source)
    parser.add_options(ConvertOptions)
    config = parser.parse_args(args)
    print(convert(config.source, parser.options(config)))


def sweep_verb(args: list[str]) -> None:
    from magnet_train.cli.parser import make_parser
    from magnet_train.sweeps.sweep import SweepOptions, exec_run, read_sweep, sweep

    args, overrides = _split_overrides(args)
    description = (
        "Run a W&B sweep file without a W&B server; unfinished runs are resumed. Options of `fit` "
        "with a dot, such as --trainer.max_steps 200, win over the file."
    )
    parser = make_parser("sweep", description)
    parser.add_argument("file", type=Path, help="Sweep file with method: grid, as in conf/sweep.")
    parser.add_options(SweepOptions)
    config = parser.parse_args(args)
    options = parser.options(config)
    out = (options.out or Path("runs") / config.file.stem).expanduser()
    runs = read_sweep(config.file, out, overrides)
    if options.run is not None:
        exec_run(config.file, runs, options.run)
        return
    done = options.table or sweep(config.file, runs, check_fit, estimate_fit, options, overrides)
    if options.table or (not options.dry_run and any(run.is_finished for run in runs)):
        from magnet_train.sweeps.ablation import write_ablation

        table, plot = write_ablation(runs, out)
        print(f"table       {table}\nplot        {plot}")
    if not done:
        sys.exit(1)


def _split_overrides(args: list[str]) -> tuple[list[str], list[str]]:
    """Options of `sweep`, and those of `fit` as NAME=VALUE: the ones with a dot in their name.

    >>> _split_overrides(["a.yaml", "--trainer.max_steps", "2", "--jobs", "1", "--model.compiled"])
    (['a.yaml', '--jobs', '1'], ['--trainer.max_steps=2', '--model.compiled=true'])
    """
    own: list[str] = []
    overrides: list[str] = []
    given = iter([*args, ""])
    word = next(given)
    while word:
        name, has_value, _ = word.partition("=")
        following = next(given)
        if not (name.startswith("--") and "." in name):
            own.append(word)
        elif has_value:
            overrides.append(word)
        elif following and not following.startswith("--"):
            overrides.append(f"{word}={following}")
            following = next(given)
        else:
            overrides.append(f"{word}=true")
        word = following
    return own, overrides


def estimate_fit(args: list[str]) -> Iterator[str]:
    """Lines on how long `fit` takes with these options, measured on a few blocks."""
    from magnet_train.checks.estimate import estimate_run

    with _without_chatter():
        plan = _fit_module().build_without_training(args, []).plan()
    try:
        lines = estimate_run(plan).lines
    except (RuntimeError, ValueError) as error:
        lines = (f"run: the time cannot be measured here ({error})",)
    yield from (f"each {line}" for line in lines if line.startswith("run:"))


def check_fit(args: list[str]) -> None:
    """Parse the options of `fit` and build everything that it needs, without training.

    Raises:
        UserError: if `fit` would refuse them.
    """
    errors: list[Exception] = []
    with _without_chatter():
        built = _fit_module().build_without_training(args, errors)
    if errors:
        raise errors[0]
    from magnet_train.checks.plan import check_settings

    check_settings(built.parsed)


def doctor_verb(args: list[str]) -> None:
    if "--prefetch" not in args:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's package is imported
    plan, findings = _plan_of(args)
    from magnet_train.checks.doctor import Finding, doctor

    print("\n".join(map(str, findings)))
    for found in doctor(plan, {finding.what for finding in findings}):
        if isinstance(found, Finding):
            print(found, flush=True)
            findings.append(found)
        else:
            print(f"estimate {found}", flush=True)
    if plan is None:
        print("         the other checks need a valid configuration")
    wrong = [finding.what for finding in findings if finding.status in ("missing", "failed")]
    if wrong:
        names = ", ".join(wrong)
        count = f"{len(wrong)} of {len(findings)} checks failed"
        raise UserError(f"{count}; `fit` would fail too: {names}")


def _plan_of(args: list[str]) -> tuple[Any, list[Any]]:
    """The plan of `fit` with these options, None if they are invalid, and findings about them."""
    errors: list[Exception] = []
    built: Any = None
    try:
        with _without_chatter():
            built = _fit_module().build_without_training(args, errors)
    except Exception as error:  # the parser and Lightning raise many types
        errors.append(error)

    from magnet_train.checks.doctor import Finding
    from magnet_train.cli.run_folder import check_run_folder

    if built is None:
        return None, [Finding("failed", "configuration", _reason(error)) for error in errors]
    findings = [Finding("ok", "configuration", "valid")]
    findings += [Finding("failed", "start", _reason(error)) for error in errors]
    checks = {
        "run folder": lambda: check_run_folder(built.parsed),
        "launch": lambda: _fit_module().check_launch(built.trainer),
    }
    for what, check in checks.items():
        try:
            check()
        except UserError as error:
            findings.append(Finding("failed", what, str(error)))
    return built.plan(), findings


def _reason(error: Exception) -> str:
    from magnet_train.common.errors import user_error_from
    from magnet_train.common.pretrained import one_line

    mistake = user_error_from(error)
    return f"{type(error).__name__}: {one_line(error)}" if mistake is None else str(mistake)


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Silences Lightning's log messages and warnings during a dry run."""
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


def bench_verb(args: list[str]) -> None:
    # Otherwise the profiler warns about memory allocated before it started.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from magnet_train.checks.bench import bench
    from magnet_train.checks.measure import BenchOptions
    from magnet_train.cli.parser import make_parser
    from magnet_train.common.products import choose_products

    parser = make_parser("bench", "Measure time and memory of attention, training and decoding.")
    parser.add_options(BenchOptions)
    options = parser.options(parser.parse_args(args))
    choose_products()
    bench(options)


def dashboard_verb(args: list[str]) -> None:
    from magnet_train.cli.parser import make_parser
    from magnet_train.tracking.dashboard import DashboardOptions, dashboard

    parser = make_parser(
        "dashboard", "Create or update a W&B workspace with panels for all logged metrics."
    )
    parser.add_options(DashboardOptions)
    print(dashboard(parser.options(parser.parse_args(args))))


def app_verb(args: list[str]) -> None:
    from magnet_train.cli.app import AppOptions, app
    from magnet_train.cli.parser import make_parser

    parser = make_parser("app", "Serve a local web app to generate, edit and compare.")
    parser.add_options(AppOptions)
    app(parser.options(parser.parse_args(args)))


def print_completion(shell: str, descriptions: dict[str, str]) -> None:
    """Print a script for tab completion of the verbs, which come with their descriptions.

    Raises:
        UserError: if the shell is not supported, or shtab is missing.
    """
    from magnet_train.cli.completion import completion_script

    def parse(verb: str) -> None:
        if verb == "doctor":
            _fit_module().build_without_training([], [])
        else:
            run(verb, [])

    parsers = {verb: partial(parse, verb) for verb in descriptions}
    print(completion_script(shell, descriptions, parsers))


VERBS: dict[str, Callable[[list[str]], None]] = {
    "tokenize": tokenize_verb,
    "generate": generate_verb,
    "edit": edit_verb,
    "evaluate": evaluate_verb,
    "convert": convert_verb,
    "sweep": sweep_verb,
    "doctor": doctor_verb,
    "bench": bench_verb,
    "dashboard": dashboard_verb,
    "app": app_verb,
}
