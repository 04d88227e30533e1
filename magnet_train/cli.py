"""The verbs' work: LightningCLI for training and its like, plain functions for the rest."""

import contextlib
import errno
import gc
import io
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from magnet_train.assets import conf_path
from magnet_train.errors import UserError, user_error_of

T = TypeVar("T")
LIGHTNING_VERBS = ("fit", "validate", "test", "predict")


def run(verb: str, args: list[str]) -> None:
    """Run a verb with its options.

    Raises:
        UserError: for every mistake in the options, the files they name, or the room left on the disk.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or tokenizers warns at every fork of a loader
    from jsonargparse import set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a setting's sentence is its help text
    try:
        if verb in LIGHTNING_VERBS:
            _run_lightning(verb, args)
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


# --- fit, validate, test, predict ---------------------------------------------------------------------------------


@lru_cache
def _codec_facts(name: str) -> Any:
    from magnet_train.codec import load_codec

    return load_codec(name).facts


@lru_cache
def _text_dim(name: str) -> int:
    from magnet_train.conditioning import load_text_encoder

    return load_text_encoder(name).dim


def _or_else(find: Callable[[str], T], otherwise: Callable[[], T]) -> Callable[[str], T]:
    """`find`, and `otherwise` where that meets a mistake of the user's."""

    def found(name: str) -> T:
        try:
            return find(name)
        except UserError:
            return otherwise()

    return found


def _run_lightning(verb: str, args: list[str], trial: list[Exception] | None = None) -> Any:
    """Run a verb; or, where `trial` is a list, parse and make all that it would, and go no further.

    Returns:
        The LightningCLI, with the configuration as `parsed` after a trial. None if a trial failed: what was wrong, and
        what was passed over to learn more, is in the list.
    """
    import warnings

    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what is logged has been summed over ranks already
    gc.disable()  # what these imports make stays for good: looking through it again and again takes seconds
    try:
        from lightning.fabric.plugins.environments.lightning import LightningEnvironment
        from lightning.pytorch.callbacks import ModelCheckpoint
        from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
        from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
        from lightning.pytorch.utilities import rank_zero_info

        from magnet_train.callbacks.averaging import WeightEMA
        from magnet_train.callbacks.finite import FiniteGuard
        from magnet_train.callbacks.generation import GenerationCallback, PredictionWriter
        from magnet_train.callbacks.preemption import Preemption
        from magnet_train.callbacks.resume import ExactResume, validation_is_due
        from magnet_train.callbacks.throughput import Throughput
        from magnet_train.callbacks.tracking import SaveConfig, Tracking, prepare_wandb
        from magnet_train.callbacks.watchdog import Watchdog
        from magnet_train.data.datamodule import MagnetDataModule
        from magnet_train.model import MagnetConfig
        from magnet_train.module import MagnetModule
        from magnet_train.release import read_checkpoint
        from magnet_train.resume import newest_whole_checkpoint
    finally:
        gc.enable()

    class Parser(LightningArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            cause: BaseException | None = ex
            while cause is not None:  # a dataclass that refuses its values, wrapped by the parser
                if isinstance(cause, UserError):
                    raise cause
                cause = cause.__cause__ or cause.__context__
            raise UserError(_one_line(message)) from ex

    class MagnetCLI(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            """Only the one that is asked for: each takes as long to set up."""
            return {verb: LightningCLI.subcommands()[verb]}

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments("model.crop_s", "data.crop_s")
            parser.link_arguments("model.codec", "data.codec")
            parser.link_arguments("seed_everything", "data.seed")
            parser.link_arguments("seed_everything", "model.seed")
            codec, text = "model.codec", "model.text_encoder"
            facts, dim = _codec_facts, _text_dim
            if trial is not None:  # whether they are here is for doctor to say; as published if not
                facts, dim = _or_else(_codec_facts, MagnetConfig), _or_else(_text_dim, lambda: MagnetConfig.text_dim)
                parser.add_argument("--prefetch", action="store_true", help="Fetch what is missing.")
                parser.add_argument("--gpu_hour_price", type=float, help="Of one GPU for an hour, for the estimate.")
            parser.link_arguments(codec, "model.network.num_codebooks", lambda n: facts(n).num_codebooks)
            parser.link_arguments(codec, "model.network.codebook_size", lambda n: facts(n).codebook_size)
            parser.link_arguments(text, "model.network.text_dim", dim)
            parser.add_lightning_class_args(GenerationCallback, "generation")
            parser.add_lightning_class_args(WeightEMA, "averaging")
            parser.add_lightning_class_args(FiniteGuard, "finite")
            parser.add_lightning_class_args(Watchdog, "watchdog")
            parser.add_lightning_class_args(Tracking, "tracking")
            parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
            parser.set_defaults(
                {
                    "checkpoint.save_last": True,
                    "checkpoint.filename": "{step:07d}",
                    "checkpoint.save_on_exception": False,
                }
            )

        def _parse_ckpt_path(self) -> None:
            """Nothing: Lightning would lay the checkpoint's settings over the command line."""

        def before_instantiate_classes(self) -> None:
            config = self.config[verb]
            self.run_folder = _writable_folder(Path(config.trainer.default_root_dir or "runs/run"))
            config.trainer.default_root_dir = str(self.run_folder)
            if config.checkpoint.dirpath is None:
                config.checkpoint.dirpath = str(self.run_folder / "checkpoints")
            if verb == "fit" and config.ckpt_path is None and int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0:
                config.ckpt_path = "auto"  # queued again: whoever wrote the job meant it to go on
            goes_on = config.ckpt_path is not None
            if config.ckpt_path == "auto":
                newest = newest_whole_checkpoint([self.run_folder, Path(config.checkpoint.dirpath)])
                config.ckpt_path = None if newest is None else str(newest)
                rank_zero_info(f"--ckpt_path auto: {newest or 'no checkpoint yet, training begins'}")
            if config.ckpt_path is not None:  # else each resume would begin another last-v1, last-v2 …
                config.checkpoint.enable_version_counter = False
            loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
            loggers = [logger for logger in loggers if hasattr(logger, "class_path")]
            for logger in loggers:
                if logger.init_args.get("save_dir") in (None, "."):  # CSVLogger knows no default
                    logger.init_args.save_dir = str(self.run_folder)
            of_wandb = [logger for logger in loggers if logger.class_path.endswith(".WandbLogger")]
            if of_wandb and not config.trainer.fast_dev_run:
                online = not all(logger.init_args.get("offline") for logger in of_wandb)
                prepare_wandb(self.run_folder, verb, goes_on, online)

        def fit(self, model: Any, **kwargs: Any) -> None:
            """Validate the untrained model, train, and sum up."""
            start = time.monotonic()
            generation = self.config_init[verb].generation
            generation.within_fit = True
            before: dict[str, float] = {}
            seconds: dict[str, float] = {}
            trial: Any = self.trainer
            validates = trial.limit_val_batches > 0 and not trial.fast_dev_run
            if generation.at_start and validates and not kwargs.get("ckpt_path"):
                before = dict(self.trainer.validate(model, datamodule=kwargs["datamodule"], verbose=False)[0])
                seconds["validation before training"] = time.monotonic() - start
            start = time.monotonic()
            self.trainer.fit(model, **kwargs)
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
            done = progress.total.processed, progress.current.processed, self.trainer.current_epoch
            if not self.trainer.callback_metrics and validation_is_due(self.trainer, *done):
                # Resumed after the last step, as killed in its validation: Lightning has nothing left to do.
                self.trainer.validate(model, datamodule=kwargs["datamodule"], verbose=False)
            spent = generation.seconds
            seconds["validation in training"] = spent
            seconds["training"] = time.monotonic() - start - spent
            if self.trainer.is_global_zero:
                self._sum_up(before, seconds)

        def _sum_up(self, before: dict[str, float], seconds: dict[str, float]) -> None:
            generation = self.config_init[verb].generation
            after = {k: v.item() for k, v in self.trainer.callback_metrics.items() if k.startswith("val/")}
            best = self.trainer.checkpoint_callback
            summary = {
                "metrics": {k: {"before": before.get(k), "after": after[k]} for k in sorted(after)},
                "audio": [str(p) for p in generation.audio],
                "checkpoint": str(getattr(best, "last_model_path", "") or getattr(best, "best_model_path", "")),
                "pictures": [str(p) for p in generation.pictures],
                "seconds": {k: round(v, 1) for k, v in seconds.items()},
            }
            _write_json(self.run_folder / "summary.json", summary)
            print(_summary_text(summary, self.run_folder))
            if summary["audio"]:
                from magnet_train.report import report_of_run, write_report

                write_report(self.run_folder / "report.html", report_of_run(self.run_folder))
                print(f"report      {self.run_folder / 'report.html'}")

    StrategyRegistry.register(
        "fsdp2",
        ModelParallelStrategy,
        "weights sharded over all ranks",
        override=True,
        save_distributed_checkpoint=False,
    )

    class Trial(MagnetCLI):
        """Makes what `fit` makes, but a network of one number, and one process where the devices are not here."""

        def before_instantiate_classes(self) -> None:
            self.parsed = self.config[verb].clone()
            given = self.config[verb].model
            MagnetConfig(**vars(given.network))
            for name in MagnetConfig.__dataclass_fields__:
                given.network[name] = 2 if name == "dim" else 1
            if not given.start_from_codec or given.init_from is None:  # both are a mistake, which it names
                given.start_from_codec, given.init_from = False, None
            given.compiled = False

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            from magnet_train.doctor import devices_of

            if not devices_of(self.parsed.trainer).are_here:
                kwargs |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": None}
                kwargs["plugins"] = [LightningEnvironment()]
            return super().instantiate_trainer(**kwargs)

        def _run_subcommand(self, subcommand: str) -> None:
            """Nothing: all is made, which is what was asked."""

    try:
        args = _completed(args, read_checkpoint)
    except UserError as error:
        if trial is None:
            raise
        trial.append(error)
        args = _completed(_from_nothing(args), read_checkpoint)
    argv, sys.argv = sys.argv, [sys.argv[0], verb, *args]
    try:
        return (MagnetCLI if trial is None else Trial)(
            MagnetModule,
            MagnetDataModule,
            parser_class=Parser,
            seed_everything_default=2036,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "logger": LOGGERS if verb == "fit" else None,
                # After averaging, whose update belongs to the step that is saved.
                "callbacks": [PredictionWriter(), ExactResume(), Throughput(), Preemption()],
                "plugins": [{"class_path": "magnet_train.callbacks.checkpoint_io.AtomicCheckpointIO"}],
                "use_distributed_sampler": False,  # the data module deals out items itself, each exactly once
            },
        )
    except Exception as error:
        _explain(error, args)
        if type(error).__module__.startswith("wandb."):  # which is imported in callbacks only
            text = " ".join(str(error).split())[:300]
            raise UserError(f"W&B: {text}; or set WANDB_MODE=offline and `wandb sync` later") from error
        raise
    finally:
        sys.argv = argv


LOGGERS = [
    {"class_path": "lightning.pytorch.loggers.WandbLogger"},
    {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        # Written at once: what a kill takes would not be logged again after a checkpoint that was saved since.
        "init_args": {"save_dir": ".", "name": "csv", "flush_logs_every_n_steps": 1},
    },
]
"""Of `fit`, unless a configuration says otherwise; they write into the run folder."""


def _completed(args: list[str], read: Any) -> list[str]:
    """The options over the configuration that holds where they say nothing.

    Raises:
        UserError: if the checkpoint or the release that they name is not there, or broken.
    """
    _check_checkpoint(args, read)
    given = _option("--model.init_from", args)
    start = given if given is not None else _in_configs("init_from", args)
    start = None if start == "null" else start
    bare = not any(a == "--config" or a.startswith(("--config=", "-c")) for a in args) and "--help" not in args
    if bare:
        args = ["--config", str(conf_path("demo.yaml" if start is None else "finetune.yaml")), *args]
        print(f"no --config given: using {args[1]}")
    # What a checkpoint or a release says holds unless a configuration or an option says otherwise.
    base = _settings_of_checkpoint(args) if _given_checkpoints(args) else {}
    if base:
        args = [*args, "--model.init_from", "null"]  # its weights are the checkpoint's
    elif start is not None:
        base = _inherited(start)
    if base:
        place = 2 if bare and start is None else 0  # over the embedded default, which nobody asked for
        args = [*args[:place], "--config", json.dumps(base), *args[place:]]
    return args


def _from_nothing(args: list[str]) -> list[str]:
    """The options without checkpoint and release."""
    kept = list(args)
    for name in ("--ckpt_path", "--model.init_from"):
        kept = [a for a in kept if not a.startswith(f"{name}=")]
        while name in kept:
            del kept[(at := kept.index(name)) : at + 2]
    return [*kept, "--model.init_from", "null"]  # over what a configuration file says


def _option(name: str, args: list[str]) -> str | None:
    """The last value given to an option."""
    given = [b for a, b in itertools.pairwise(args) if a == name]
    given += [a.split("=", 1)[1] for a in args if a.startswith(f"{name}=")]
    return given[-1] if given else None


def _in_configs(setting: str, args: list[str]) -> str | None:
    """A setting of the model in the last configuration file that has it."""
    import yaml

    files = [b for a, b in itertools.pairwise(args) if a in ("--config", "-c")]
    files += [a.split("=", 1)[1] for a in args if a.startswith("--config=")]
    for file in reversed(files):
        try:
            config = yaml.safe_load(Path(file).read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            continue  # the parser will name it
        if isinstance(config, dict) and isinstance(model := config.get("model"), dict) and model.get(setting):
            return str(model[setting])
    return None


def _inherited(init_from: str) -> dict[str, Any]:
    """What a model that training starts from says of itself, as a configuration."""
    from magnet_train.release import Trained

    trained = Trained.open(init_from)
    return {
        "model": {
            "init_from": init_from,
            "network": {k: v for k, v in trained.network.to_dict().items() if k not in LINKED},
            "codec": trained.codec["id"],
            "text_encoder": trained.text_encoder,
            "crop_s": trained.crop_s,
            "span_len": trained.decoding.span_len,
            "guidance_dropout": trained.guidance_dropout,
        },
        "generation": {"decoding": asdict(trained.decoding)},
    }


LINKED = ("num_codebooks", "codebook_size", "text_dim")  # of the network; they follow from codec and text encoder


def _settings_of_checkpoint(args: list[str]) -> dict[str, Any]:
    """The settings of the model in the checkpoint that is named, as a configuration."""
    from magnet_train.release import read_checkpoint

    file = Path(_given_checkpoints(args)[-1])
    if not file.is_file():  # last, best …: the run's own, under its own configuration
        return {}
    given = dict(read_checkpoint(file).get("hyper_parameters", {}))
    if "network" not in given:
        raise UserError(f"{file}: not a checkpoint of magnet_train; choose another")
    seed = given.pop("seed", None)
    given["network"] = {k: v for k, v in given["network"].items() if k not in LINKED}
    return {"model": given, "seed_everything": seed}


def _check_checkpoint(args: list[str], read: Any) -> None:
    """Name a missing or broken --ckpt_path before Lightning meets it, which it does while it parses."""
    for name in _given_checkpoints(args):
        if name not in ("auto", "last", "best", "hpc", "registry", "null"):
            read(Path(name))


def _given_checkpoints(args: list[str]) -> list[str]:
    given = [b for a, b in itertools.pairwise(args) if a == "--ckpt_path"]
    return given + [a.split("=", 1)[1] for a in args if a.startswith("--ckpt_path=")]


def _one_line(message: str) -> str:
    """The parser's message without its line breaks and the long way it came."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    return " ".join(dict.fromkeys(lines))[:600]


def _explain(error: Exception, args: list[str]) -> None:
    """Turn the user's mistakes that come wrapped, and Lightning's errors about files the user named, into one line.

    Raises:
        UserError: if it is such an error.
    """
    if (mistake := user_error_of(error)) is not None:
        raise mistake
    text = str(error)
    for sign in ("PytorchStreamReader", "Error(s) in loading state_dict", "checkpoint", "Weights only load failed"):
        if sign in text and ("load" in text.lower() or "reader" in text.lower()):
            given = f"--ckpt_path {' '.join(_given_checkpoints(args))}"
            raise UserError(f"{given}: {text.splitlines()[0][:300]}; choose another checkpoint") from error


def _writable_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"run folder {folder}: cannot be written ({error.strerror}); set --trainer.default_root_dir to another"
        ) from error
    return folder


def _write_json(path: Path, value: Any) -> None:
    path.with_suffix(".tmp").write_text(json.dumps(value, indent=2) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def _summary_text(summary: dict[str, Any], run_folder: Path) -> str:
    """The summary as people read it; rates by mask rate and intervals stay in the JSON."""
    lines = ["", f"run folder  {run_folder}", f"checkpoint  {summary['checkpoint']}"]
    for name in ("audio", "pictures"):
        if summary[name]:
            folder = Path(summary[name][0]).parent
            lines.append(f"{name:<11} {len(summary[name])} files in {folder}, e.g. {Path(summary[name][0]).name}")
    lines += ["", f"{'metric':<44}{'before':>10}{'after':>10}"]
    for key, pair in summary["metrics"].items():
        if "/rate" not in key and not key.endswith("_ci95"):
            before = "" if pair["before"] is None else f"{pair['before']:.4g}"
            lines.append(f"{key:<44}{before:>10}{pair['after']:>10.4g}")
    lines += ["", "  ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items())]
    return "\n".join(lines)


# --- tokenize, convert, evaluate, bench, generate ---------------------------------------------------------------------


def _parser(verb: str, description: str) -> Any:
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            if isinstance(ex, UserError):
                raise ex
            raise UserError(_one_line(message)) from ex

        def parse_args(self, args: list[str], **settings: Any) -> Any:  # type: ignore[override]
            """With `--save-reference` understood as `--save_reference`."""
            spelt = [re.sub(r"^--[\w.-]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in args]
            return super().parse_args(spelt, **settings)

    parser = Parser(prog=f"python -m magnet_train {verb}", description=description)
    parser.add_argument("--config", action="config", help="YAML file with any of these options; repeatable.")
    return parser


def _run_tokenize(args: list[str]) -> None:
    from magnet_train.data.shards import TokenizeOptions, tokenize

    parser = _parser("tokenize", "Turn a folder of audio with captions into code shards.")
    parser.add_argument("input", type=Path, help="Folder of audio files with .txt or .json captions, or a manifest.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the shards.")
    parser.add_class_arguments(TokenizeOptions, nested_key=None, as_group=False)
    config = parser.parse_args(args)
    values = {k: v for k, v in vars(config).items() if k not in ("input", "out", "config")}
    tokenize(config.input, config.out, TokenizeOptions(**values))


def _run_convert(args: list[str]) -> None:
    from magnet_train.convert import ConvertOptions, convert

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
    from magnet_train.decoding import DecodingConfig
    from magnet_train.evaluate import EMBEDDED, EvaluateOptions, evaluate
    from magnet_train.metrics.listeners import LISTENERS
    from magnet_train.metrics.scoring import KINDS

    parser = _parser("evaluate", "Score folders of audio, or a model, against a reference.")
    parser.add_argument(
        "--generated", type=str, nargs="+", default=[],
        help="Folders of audio files, each FOLDER or NAME=FOLDER: a row of the table each.",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", type=str, nargs="+", default=list(EMBEDDED),
        help=f"KIND/LISTENER each; kinds: {', '.join(KINDS)}; listeners: {', '.join(LISTENERS)}.",
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
    from magnet_train.ablation import write_ablation
    from magnet_train.sweep import become, read_sweep, sweep

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
    out = config.out or Path("runs") / config.file.stem
    runs = read_sweep(config.file, out)
    if config.run is not None:
        become(config.file, runs, config.run)
        return
    done = config.table or sweep(config.file, runs, _parse_fit, config.jobs, config.slurm)
    if config.table or any(run.is_finished for run in runs):
        print("table       {}\nplot        {}".format(*write_ablation(runs, out)))
    if not done:
        sys.exit(1)


def _parse_fit(args: list[str]) -> None:
    """Parse the options of `fit` and go no further.

    Raises:
        UserError: if they do not hold.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):  # its way to say that it printed
        _run_lightning("fit", [*args, "--print_config"])


def _run_doctor(args: list[str]) -> None:
    if "--prefetch" not in args:
        os.environ["HF_HUB_OFFLINE"] = "1"  # looking must not fetch; read when the hub's package is imported
    problems: list[Exception] = []
    made: Any = None
    try:
        with _without_chatter():
            made = _run_lightning("fit", args, problems)
    except Exception as error:  # whatever the parser and Lightning make of a configuration
        problems.append(error)

    from magnet_train.doctor import Finding, Plan, doctor
    from magnet_train.pretrained import one_line

    def reason(error: Exception) -> str:
        return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"

    plan, findings = None, [Finding("failed", "start" if made else "configuration", reason(e)) for e in problems]
    if made is not None:
        findings.insert(0, Finding("ok", "configuration", "holds, option by option"))
        plan = Plan(made.parsed, made.datamodule, made.model, made.config_init.fit.generation.decoding)
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
    from magnet_train.bench import bench
    from magnet_train.measure import BenchOptions

    parser = _parser("bench", "Measure time and memory of attention, training and decoding beside their slow twins.")
    parser.add_argument("--only", type=str, nargs="+", default=[], help="Parts to measure; all if none is given.")
    parser.add_class_arguments(BenchOptions, nested_key=None, as_group=False, skip={"only"})
    bench(BenchOptions(**{k: v for k, v in vars(parser.parse_args(args)).items() if k != "config"}))


def _run_dashboard(args: list[str]) -> None:
    from magnet_train.dashboard import DashboardOptions, dashboard

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
    from magnet_train.decoding import DecodingConfig

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
    from magnet_train.decoding import DecodingConfig

    DecodingConfig.from_dict(decoding)  # a value out of range is named before the model is loaded
    if options.format not in ("wav", "flac"):
        raise UserError(f"--format {options.format}: choose wav or flac")
    if options.variations < 1 or options.batch_size < 1:
        raise UserError("--variations and --batch_size must be at least 1")
    _writable_folder(options.out)

    import torch
    from tqdm import tqdm

    from magnet_train.audio_files import recognisable_name, write_audio, write_picture
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
                    path = options.out / f"{recognisable_name(prompt, seed)}.{options.format}"
                    wav = result.wav[i].T.cpu().numpy()
                    write_audio(path, wav, result.sample_rate, about)
                    if options.pictures:
                        title = {prompt or "(no text)": wav.mean(1)}
                        write_picture(
                            path.with_suffix(".png"), title, result.sample_rate, result.order[i].cpu().numpy()
                        )
                    written.append(path)
                    bar.update()
    return written
