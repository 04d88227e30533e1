"""Runs all verbs with hundreds of bad inputs, or each file reader with random bad files for some
minutes of CPU time, and writes a table of expected and actual results.

    python benchmarks/bad_inputs.py [--out benchmarks/records/bad_inputs.md] [--only tokenize …]
    python benchmarks/bad_inputs.py --fuzz 5 [--only shard …]

Each command runs in a separate process, forked from this one after the imports. "Refused" is right
if the last line begins with "error:" and names the option or file, the status is 2, no traceback
was printed, no half-written file is left, and CPU time and memory stay within limits.
"""

import argparse
import functools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import numpy as np
import torch
from bad_files import READERS, Samples, as_json, check, deep, npy, tar_of
from docstring_parser.attrdoc import AttributeDocstrings
from helpers_data import tone, write_clip

from magnet_train.common.assets import demo_path
from magnet_train.common.folders import replacing
from magnet_train.common.tables import markdown_table
from magnet_train.data.manifest import JAMENDO_COLUMNS

MAX_CPU_S, MAX_MB = 30.0, 3000
"""Limits of one command: CPU time in seconds, and memory, imports included."""
MAX_WALL_S = 900.0
"""Seconds after which a command counts as hanging, also on a busy machine."""
SLICE_S = 5.0
"""CPU seconds after which the next reader gets random files."""
FUZZ_COLUMNS = ["reader", "CPU seconds", "files", "refused in a line", "other exceptions"]
FUZZ_HEAD = (
    "# Random bad files\n\nWritten by `python benchmarks/bad_inputs.py --fuzz MINUTES --out FILE`: "
    "each reader gets files of benchmarks/bad_files.py, different ones in each call, "
    "and each call adds to the table in FILE.\n\n"
)
DEMO_CODEBOOKS = json.loads((demo_path("codec") / "config.json").read_text())["num_codebooks"]
INF, NAN, BIG = ".inf", ".nan", "1" + "0" * 20
SMALL_FIT = [
    "--model.network.dim=16",
    "--model.network.num_heads=2",
    "--model.network.num_layers=1",
    "--model.crop_s=1.0",
    "--model.start_from_codec=false",
    "--model.optimizer.warmup_steps=1",
    "--data.batch_size=2",
    "--data.num_workers=0",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=false",
    "--trainer.accelerator=cpu",
    "--trainer.default_root_dir=run",
    "--generation.num_prompts=0",
    "--generation.at_start=false",
    "--generation.metrics=[]",
    "--checkpoint.monitor=null",
]
TWO_PROMPTS = ["--generation.num_prompts=2", "--generation.decoding.decoding_steps=[1]"]


@dataclass(frozen=True)
class Case:
    """A bad input, and the expected result."""

    verb: str
    what: str
    """The input, for the table."""
    args: list[str]
    make: Callable[[Path], Any] = lambda folder: None
    """Writes the files that the arguments name into the command's working folder."""
    expected: str = "refused"
    """Or "skipped" (status 0, and the output names it), "used", or "failed" (by doctor)."""
    words: tuple[str, ...] = ()
    """Texts of which the last line must contain one; if empty, the option's name."""
    environment: dict[str, str] = field(default_factory=dict)


# --- options --------------------------------------------------------------------------------------

NOT_NUMBERS = (NAN, "x", "[1, 2]", '""')
WRONG_VALUES: dict[str, dict[str, tuple[str, ...]]] = {
    "tokenize": {
        "crop_s": (*NOT_NUMBERS, INF, "-1", "0", "1e9", "1e-9"),
        "hop_s": (NAN, "x", "[1, 2]", INF, "-1", "0", "1e9", "1e-9"),
        "min_s": (*NOT_NUMBERS, INF, "-1", "0", "99"),
        "silence_db": (*NOT_NUMBERS, INF, "1"),
        "mixtures": (*NOT_NUMBERS, INF, "-1", "1e9"),
        "mixture_snr_db": (*NOT_NUMBERS, INF, "-1", "1e9"),
        "shard_size": (*NOT_NUMBERS, "0", "-1", "1.5", BIG),
        "batch_size": (*NOT_NUMBERS, "0", "-1", "1.5"),
        "processes": (*NOT_NUMBERS, "0", "-1", "1000000"),
        "split": ("../x", '""', "a/b", "x" * 300, "a b", "*"),
        "embedder": ("x", "vggish"),
        "validation": (NAN, "x", "-1", "1", "2"),
        "caption_from": ("x",),
        "codec": ("/nowhere", "./nowhere", "a/b/c", "no/such", "demo@99", "demo@0", "demo@²"),
    },
    "generate": {
        "seed": (*NOT_NUMBERS, "-1", BIG, "1.5"),
        "variations": (*NOT_NUMBERS, "0", "-1", "10000000"),
        "batch_size": (*NOT_NUMBERS, "0", "-1"),
        "duration_s": (NAN, "x", "[1, 2]", INF, "-1", "0", "1e9"),
        "continue_s": (*NOT_NUMBERS, INF, "-1", "0", "1e9"),
        "format": ("mp3", "5"),
        "precision": ("16", "x"),
        "device": ("gpu", "cuda:99", "tpu", '""'),
        "plots": ("maybe", "2"),
        "checkpoint": ("/nowhere", "./nowhere", "a/b/c", "no/such"),
        "prompts_file": ("/nowhere", "/", "/dev/null"),
        "continue_from": ("/nowhere", "/", "/dev/null"),
        "decoding.decoding_steps": (
            "[0]",
            "[-1]",
            "[]",
            "[1,1,1,1,1,1,1]",
            "x",
            "[.nan]",
            "[99999]",
        ),
        "decoding.temperature": (*NOT_NUMBERS, INF, "0", "-1"),
        "decoding.top_p": (*NOT_NUMBERS, INF, "-0.1", "1.1", "[0.9, 1.1]"),
        "decoding.top_k": (*NOT_NUMBERS, "-1", "1.5"),
        "decoding.max_cfg_coef": (NAN, "x", "[1, -2]", '""', INF, "-1", "[]"),
        "decoding.min_cfg_coef": (NAN, "x", "[1, -2]", '""', INF, "-1", "[]"),
        "decoding.span_len": (*NOT_NUMBERS, "0", "-1", "1.5"),
        "decoding.span_arrangement": ("x",),
        "decoding.span_scoring": ("x",),
        "decoding.order_temperature": (*NOT_NUMBERS, INF, "-1"),
        "decoding.shared_noise": (NAN, "x", "[1, 0]", '""', "0", "-1"),
    },
    "evaluate": {
        "batch_size": (*NOT_NUMBERS, "0", "-1"),
        "devices": (*NOT_NUMBERS, "0", "-1", "100000"),
        "seed": ("x", "1.5"),
        "metrics": ("x", "fad", "fad/x", "/", "kl/none", "5"),
        "kl_convention": ("x",),
        "published_set": ("x",),
        "reference": ("/nowhere",),
        "generated": ("/nowhere", "a=/nowhere"),
        "captions": ("/nowhere.jsonl",),
        "checkpoint": ("demo",),
        "study": ("key.json",),
        "ratings": ("r.csv",),
        "prompts": ("p.txt",),
        "out": (".",),
        "report": (".",),
    },
    "fit": {
        "seed_everything": ("-1", BIG, "x", "1.5", NAN),
        "model.crop_s": (NAN, INF, "-1", "0", "1e9", "0.001", "x"),
        "model.span_len": ("0", "-1", "1000000000", "1.5"),
        "model.guidance_dropout": (NAN, "-0.1", "1.1"),
        "model.stage_sampling": ("x",),
        "model.stage_weights": ("[0]", "[1e308, 1e308]", "[-1]", "[.nan]", "[1,1,1,1,1,1,1]"),
        "model.codec": ("/nowhere", "no/such"),
        "model.text_encoder": ("/nowhere", "no/such"),
        "model.init_from": ("/nowhere", "no/such"),
        "model.optimizer.name": ("sgd",),
        "model.optimizer.lr": (NAN, INF, "0", "-1"),
        "model.optimizer.betas": ("[2, 3]", "[1]", "[.nan, 0.9]", "0.9"),
        "model.optimizer.eps": ("0", "-1", NAN),
        "model.optimizer.weight_decay": ("-1", NAN, INF),
        "model.optimizer.warmup_steps": ("-1", "1.5"),
        "model.optimizer.schedule": ("x",),
        "model.network.dim": ("0", "-16", "10000000", "17"),
        "model.network.num_layers": ("0", "-1", "100000000"),
        "model.network.num_heads": ("0", "3"),
        "model.network.context": ("-2", "[1,1,1,1,1,1,1]"),
        "data.batch_size": ("0", "-1", "1.5", BIG),
        "data.num_workers": ("-1", "x"),
        "data.train": ("/nowhere", "{a", "/tmp/*/nowhere", "no-such://x"),
        "trainer.accelerator": ("gpu", "x", "tpu"),
        "trainer.devices": ("0", "-5", "x"),
        "trainer.num_nodes": ("0", "-1", "2"),
        "trainer.strategy": ("foo", "fsdp3", "deepspeed"),
        "trainer.precision": ("bf16-true", "16-true", "64-true", "7"),
        "trainer.max_steps": ("-5", "x"),
        "trainer.max_epochs": ("-5",),
        "trainer.max_time": ("x", "1:2"),
        "trainer.overfit_batches": ("1",),
        "trainer.accumulate_grad_batches": ("0", "-1"),
        "trainer.val_check_interval": ("0", "-1", "0.5", "00:00:00:01"),
        "trainer.limit_val_batches": ("-1",),
        "trainer.log_every_n_steps": ("0", "-1"),
        "trainer.gradient_clip_val": ("-1", NAN),
        "trainer.gradient_clip_algorithm": ("x",),
        "trainer.callbacks": ("x",),
        "checkpoint.monitor": ("val/nothing", "train/los"),
        "checkpoint.mode": ("x",),
        "checkpoint.save_top_k": ("-7",),
        "checkpoint.every_n_train_steps": ("0", "-1"),
        "averaging.decay": ("-1", "2", NAN),
        "averaging.every_n_steps": ("0", "-1"),
        "generation.num_prompts": ("-1",),
        "generation.metrics": ("[fad/x]", "[x]"),
        "ckpt_path": ("/nowhere", "./nowhere.ckpt", "/dev/null", "best", "hpc", "registry:x"),
        "model.no_such": ("1",),
        "model.more_span_lens": ("[0]", "[1000000]", "x"),
        "model.beginning_share": (NAN, "-1", "2"),
        "model.prompt_weight": (NAN, "-1"),
        "model.distil_guidance": ("true",),
        "data.global_batch_size": ("0", "-1", "1.5"),
        "data.crop_schedule": ("[[0, 1]]", "[[1, 0]]", "[[.nan, 1]]", "[[0.001, 1]]", "x"),
        "data.crop_start": ("x",),
        "data.val_split": (NAN, "-1", "0.1", "1"),
        "model.lora.rank": ("-1", "x", "4", BIG),
        "model.lora.alpha": (NAN, "0"),
        "model.lora.dropout": (NAN, "1", "-1"),
        "tracker": ("x",),
        "data.predict_split": ("x",),
        "data.augmentation.word_dropout": (NAN, "-1", "2"),
        "nan_guard.max_consecutive": ("0", "x"),
        "watchdog.factor": (NAN, "0", "-1"),
        "watchdog.min_seconds": (NAN, "-1"),
        "generation.batch_size": ("0", "-1"),
        "generation.max_seconds": (NAN, INF, "0", "-1"),
        "generation.num_media": ("-1",),
        "generation.decoding.decoding_steps": ("[0]", "[1,1,1,1,1,1,1]"),
        "generation.decoding.temperature": (NAN, "0"),
        "generation.decoding.top_p": ("2", "[]", "[1,1,1,1,1,1,1]"),
        "generation.decoding.autoregressive_s": ("-1", "0.5"),
        "trainer.limit_train_batches": ("-1", "0", "0.5"),
        "trainer.limit_test_batches": ("-1",),
        "trainer.num_sanity_val_steps": ("-5",),
        "trainer.check_val_every_n_epoch": ("1",),
        "trainer.fast_dev_run": ("-1",),
        "trainer.min_steps": ("x",),
        "trainer.profiler": ("x",),
        "trainer.logger": ("x",),
        "trainer.plugins": ("x",),
        "trainer.deterministic": ("x",),
        "trainer.enable_checkpointing": ("false",),
        "trainer.default_root_dir": ("/proc/x", "in/a.wav"),
        "trainer.reload_dataloaders_every_n_epochs": ("-1",),
        "checkpoint.dirpath": ("/proc/x", "in/a.wav"),
        "tracking.upload_checkpoints": ("x",),
        "trainer.min_epochs": ("1.5",),
        "trainer.limit_predict_batches": ("-1", NAN),
        "trainer.enable_progress_bar": ("2",),
        "trainer.enable_model_summary": ("2",),
        "trainer.enable_autolog_hparams": ("2",),
        "trainer.benchmark": ("2",),
        "trainer.inference_mode": ("2",),
        "trainer.use_distributed_sampler": ("2",),
        "trainer.detect_anomaly": ("2",),
        "trainer.sync_batchnorm": ("2",),
        "trainer.barebones": ("2", "true"),
        "model.network.ffn_ratio": ("0", "-1", BIG),
        "model.network.positions": ("x",),
        "model.network.convolution": ("-1", "2", BIG),
        "model.network.order": ("x",),
        "model.start_from_codec": ("2",),
        "model.compiled": ("2",),
        "model.lora.include": ("x",),
        "model.lora.exclude": ("x",),
        "data.validation": ("/nowhere",),
        "data.augmentation.merge_p": (NAN, "2"),
        "data.augmentation.drop_caption_p": (NAN, "2"),
        "data.augmentation.drop_field_p": (NAN, "2"),
        "generation.decoding.anneal_temperature": ("2",),
        "generation.decoding.top_k": ("-1",),
        "generation.decoding.greedy": ("2",),
        "generation.decoding.max_cfg_coef": (NAN, "-1", "[]", "[1,1,1,1,1,1,1]"),
        "generation.decoding.min_cfg_coef": (NAN, "-1", "[]", "[1,1,1,1,1,1,1]"),
        "generation.decoding.span_len": ("0", "1.5"),
        "generation.decoding.span_arrangement": ("x",),
        "generation.decoding.span_scoring": ("x",),
        "generation.decoding.order_temperature": (NAN, "-1"),
        "generation.decoding.second_lap": (NAN, "-1", "2"),
        "generation.decoding.shared_noise": ("0", "[]", "[1,1,1,1,1,1,1]"),
        "generation.decoding.autoregressive_temperature": (NAN, "-1"),
        "generation.decoding.autoregressive_top_k": ("-1",),
        "generation.decoding.autoregressive_cfg_coef": (NAN, "-1"),
        "generation.decoding.rescorer_weight": (NAN, "-1", "[]"),
        "generation.decoding.rescorer_temperature": (NAN, "0", "[]"),
        "generation.decoding.rescore_stages": ("[-1]", "x"),
        "generation.decoding.reference_compat": ("2", "true"),
        "generation.at_start": ("2",),
        "generation.baselines": ("2",),
        "generation.seed": ("x", "1.5"),
        "weights_only": ("x",),
    },
    "edit": {
        "audio": ("/nowhere", "/dev/null", "/", "in/a.txt"),
        "regenerate": ("2:1", "x", "-1:2", "1:1", ".nan:2", "99:100", "1:2:3", "1:1.001"),
        "keep": ("2:1", "x"),
        "from_s": (NAN, "x", INF, "-1", "1e9"),
        "to_s": (NAN, "x", INF, "-1", "1", "1e9"),
        "loop_s": (NAN, "x", INF, "-1", "0", "1e9"),
        "loop_start_s": (NAN, "x", "-1", "1e9"),
        "seam_s": (NAN, "x", "-1", "1e9"),
        "bars": ("0", "-1", "x", "1.5"),
        "bpm": ("0", "5000", NAN, "x"),
        "beats_per_bar": ("0", "-1", "x"),
        "intensity": (NAN, INF, "0", "-1", "1.1", "x"),
        "hint_period_s": (NAN, "0", "-1", "x"),
        "hint_onsets_s": (NAN, "0", "-1", "x"),
        "hint_codebooks": ("-1", "99", "x"),
        "keep_coarse": ("-1", "99", "x"),
        "keep_fine": ("-1", "99", "x"),
        "prompts": ("/nowhere.csv", "/dev/null"),
        "seed": ("-1", "x", BIG),
        "variations": ("0", "-1", "x", "10000000"),
        "best_of": ("0", "-1", "x"),
        "format": ("mp3",),
        "precision": ("16",),
        "plots": ("maybe",),
        "device": ("gpu", "cuda:99"),
        "checkpoint": ("/nowhere", "a/b/c", "in"),
        "out": ("in/a.wav", "/proc/x"),
        "config": ("no.yaml", "in"),
        "decoding.temperature": (NAN, "0"),
        "decoding.decoding_steps": ("[0]", "[1,1,1,1,1,1,1]", "x"),
        "decoding.autoregressive_s": ("-1", "1"),
        "no_such": ("1",),
    },
    "bench": {
        "only": ("x", "gpu"),
        "repeats": ("0", "-1", "x", NAN, BIG),
        "threads": ("0", "x", "100000"),
        "num_frames": ("0", "-1", "x", "1.5", BIG),
        "batch_size": ("0", "-1", "x", BIG),
        "device": ("tpu", "cuda", "cpu:0"),
        "json": ("in", "/proc/x/y.json", "in/a.wav/x.json"),
        "config": ("no.yaml", "in"),
        "no_such": ("1",),
    },
    "sweep": {
        "run": ("99", "-1", "x"),
        "jobs": ("0", "-1", "x"),
        "model.no_such": ("1",),
        "model.crop_s": ("x",),
        "model.span_len": ("7",),
        "trainer.default_root_dir": ("elsewhere",),
        "out": ("in/a.wav", "/proc/x", "s3://b/x"),
    },
    "app": {
        "port": ("0", "65536", "x", "1.5"),
        "model": ("/nowhere", "in", "a/b/c"),
        "allow": ("in/a.wav",),
        "out": ("in/a.wav", "/proc/x"),
        "device": ("gpu", "cuda:99"),
        "share": ("maybe",),
        "no_such": ("1",),
    },
}
"""Values that options of each verb must refuse."""
REQUIRED_ARGS: dict[str, list[str]] = {
    "tokenize": ["in", "--out", "out"],
    "generate": ["--prompt", "a", "--out", "out"],
    "evaluate": ["--generated", "in", "--reference", "in"],
    "fit": SMALL_FIT,
    "edit": ["--audio=in/a.wav", "--out=out", "--prompt=a", "--regenerate=1:2"],
    "bench": [],
    "sweep": ["s.yaml", "--out", "out"],
    "app": [],
}
"""Further arguments that each verb needs; the last value of a repeated option is used."""
GRID = {
    "method": "grid",
    "parameters": {"model.span_len": {"values": [1, 3]}},
    "command": ["python", "-m", "magnet_train", "fit", "${args}"],
}


def wrong_options() -> Iterator[Case]:
    for verb, options in WRONG_VALUES.items():
        for option, given in options.items():
            for value in given:
                args = [*REQUIRED_ARGS[verb], f"--{option}={value}"]
                name = option.rpartition(".")[2]
                words = (
                    name,
                    name.replace("_", " "),
                    value.rpartition("=")[2].strip("./[]") or value,
                )
                if option == "data.validation":
                    args.append(f"--data.train={demo_path('shards/train')}")
                if verb == "edit":
                    words += ("region", "loop", "hint", "nothing left", "outside")
                shown = value if len(value) < 40 else f"{value[:20]}…"
                yield Case(verb, f"`--{option}={shown}`", args, basic_files, words=words)


def doctors() -> Iterator[Case]:
    """Options that `fit` would refuse."""
    for case in wrong_options():
        if case.verb == "fit":
            yield replace(case, verb="doctor", expected="failed")
    for what, args, word in (
        ("no configuration", ["--config", "no.yaml"], "no.yaml"),
        ("a broken configuration", ["--config", "c.yaml"], "c.yaml"),
        ("a folder as configuration", ["--config", "in"], "in"),
        ("a broken checkpoint", ["--ckpt_path", "c.ckpt"], "c.ckpt"),
        ("a broken model to start from", ["--model.init_from", "c.ckpt"], "c.ckpt"),
        ("a folder without shards", ["--data.train", "in", "--data.validation", "in"], "index"),
        ("a rescorer that is not there", [*TWO_PROMPTS, "--generation.decoding.rescorer=./x"], "x"),
        (
            "references that are not there",
            [*TWO_PROMPTS, "--generation.metrics=[fad/vggish]", "--generation.reference=x"],
            "x/vggish.safetensors",
        ),
        (
            "a strategy that is not there",
            ["--trainer.strategy=ModelParallelStrategy"],
            "invalid strategy name",
        ),
        (
            "a strategy that writes folders",
            ["--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy"],
            "fsdp2",
        ),
        (
            "a callback that stops at nothing",
            ["--trainer.callbacks={class_path: EarlyStopping, init_args: {monitor: val/x}}"],
            "val/x",
        ),
        (
            "a logger's folder that cannot be written",
            ["--trainer.logger={class_path: CSVLogger, init_args: {save_dir: /proc/x}}"],
            "/proc/x",
        ),
        ("a price that is none", ["--gpu_hour_price", NAN], "gpu_hour_price"),
        ("a run folder that cannot be written", ["--trainer.default_root_dir", "/proc/x"], "proc"),
        ("a folder of checkpoints that is a file", ["--checkpoint.dirpath", "c.yaml"], "c.yaml"),
        ("two errors", ["--checkpoint.monitor=x", "--model.span_len=99"], "checkpoint.monitor=x"),
    ):
        yield Case("doctor", what, [*SMALL_FIT, *args], broken_files, "failed", (word,))


def broken_files(folder: Path) -> None:
    """A clip, a broken configuration and a broken checkpoint."""
    basic_files(folder)
    (folder / "c.yaml").write_text("a: [")
    (folder / "c.ckpt").write_bytes(b"PK no archive")


def edits() -> Iterator[Case]:
    """Bad recordings and timelines, and options that exclude each other."""
    audio = ["--audio=in/a.wav", "--out=out", "--prompt=a"]
    region = "--regenerate=1:2"
    for what, args, word in (
        ("no recording", ["--out=out", region], "edit FILE"),
        ("nothing to do", audio, "nothing left"),
        ("regions to keep and to regenerate", [*audio, region, "--keep=2:3"], "not both"),
        ("regions that overlap", [*audio, "--regenerate", "1:2", "1.5:3"], "overlaps"),
        ("two prompts for one region", [*audio[:2], region, "-p", "a", "b"], "2 prompts"),
        ("a loop without a length", [*audio, "--loop"], "--loop_s"),
        ("a loop of two lengths", [*audio, "--loop_s=2", "--bars=1", "--bpm=120"], "--loop_s"),
        ("a loop that continues", [*audio, "--loop_s=2", "--to_s=9"], "--to_s"),
        ("a loop of a fraction of a sample", [*audio, "--loop_s=1.00001"], "samples"),
        ("a continuation without an end", [*audio, "--from_s=1"], "--to_s"),
        ("all codebooks kept", [*audio, region, "--keep_coarse=9"], "nothing left"),
        ("a judge that is none", [*audio, region, "--best_of=2", "--judge=x"], "judge"),
        ("prompts twice", [*audio, region, "--prompts=p.csv"], "not both"),
    ):
        yield Case("edit", what, args, basic_files, words=(word,))
    for what, content, word in (
        ("empty", "", "no prompt"),
        ("no UTF-8", b"\xff", "UTF-8"),
        ("no at_s", "caption\na\n", "at_s"),
        ("at_s a text", "at_s,caption\nx,a\n", "at_s"),
        ("at_s NaN", "at_s,caption\nnan,a\n", "at_s"),
        ("at_s negative", "at_s,caption\n-1,a\n", "at_s"),
        ("at_s behind the end", "at_s,caption\n0,a\n99,b\n", "at_s"),
        ("not sorted", "at_s,caption\n2,a\n1,b\n", "sort"),
        ("an open quote", 'at_s,caption\n0,"a\n', "line 2"),
        ("a time twice", "at_s,caption\n0,a\n0,b\n", "sort"),
        ("no caption", "at_s,caption\n0,\n", "line 2"),
        ("a caption null", "at_s,caption\n0,a\n1,null\n", "line 3"),
        ("at_s infinite", "at_s,caption\ninf,a\n", "at_s"),
        ("at_s of 500 digits", f"at_s,caption\n{10**499},a\n", "at_s"),
        ("two columns of one name", "at_s,caption,caption\n0,a,b\n", "line 1"),
        ("binary", b"\0\xff\xfe", "UTF-8"),
    ):
        args = ["--audio=in/a.wav", "--out=out", region, "--prompts=p.csv"]
        yield Case("edit", f"timeline: {what}", args, put("p.csv", content), words=(word,))
    nan = bytearray(wav())
    nan[200:204] = struct.pack("<f", math.nan)
    for what, content in (
        ("text", b"no audio"),
        ("empty", b""),
        ("NaN", bytes(nan)),
        ("cut in its middle", wav()[:30_000]),
        ("a rate of 1 Hz", wav(rate=1)),
        ("samples in integer units", wav(gain=32767)),
    ):
        args = ["--audio=in/bad.wav", "--out=out", "--prompt=a", "--regenerate=0.2:0.5"]
        make = put("in/bad.wav", content)
        yield Case("edit", f"recording: {what}", args, make, words=("bad.wav",))
    yield Case("edit", "recording: a FIFO", args, fifo("in/bad.wav"), words=("bad.wav",))


def basic_files(folder: Path) -> None:
    """A clip and a sweep file."""
    write_clip(folder / "in" / "a.wav", 4.0, "a tone", 16_000)
    (folder / "s.yaml").write_text(json.dumps(GRID))


def verbs() -> Iterator[Case]:
    for args, word in (
        (["genrate"], "generate"),
        (["--fit"], "--fit"),
        (["fit", "fit"], "fit"),
        (["validate"], "ckpt_path"),
        (["test"], "ckpt_path"),
        (["predict"], "ckpt_path"),
        (["validate", "--ckpt_path=/nowhere"], "nowhere"),
        (["test", "--ckpt_path=/dev/null"], "/dev/null"),
        (["predict", "--ckpt_path=in"], "in"),
        (["predict", "--seed_everything=-1", "--ckpt_path=x"], "x: no such file"),
        (["tokenize"], "input"),
        (["tokenize", "in"], "out"),
        (["tokenize", "/nowhere", "--out", "out"], "/nowhere"),
        (["tokenize", "in/a.wav", "--out", "out"], "a.wav"),
        (["tokenize", "in", "--out", "in/a.wav"], "a.wav"),
        (["tokenize", "in", "--out", "/proc/x"], "/proc/x"),
        (["generate"], "prompt"),
        (["generate", "--prompt", ""], "empty prompt"),
        (["generate", "--prompt", "a", "--out", "in/a.wav"], "a.wav"),
        (["generate", "--prompt", "caf\udce9"], "UTF-8"),
        (["generate", "--promt", "a"], "did you mean --prompt?"),
        (["evaluate"], "nothing to score"),
        (["evaluate", "--generated", "in"], "reference"),
        (["convert"], "source"),
        (["convert", "demo"], "out"),
        (["convert", "demo", "--out", "in"], "in"),
        (["convert", "/nowhere", "--out", "out"], "/nowhere"),
        (["convert", "demo", "--out", "out", "--to", "x"], "to x"),
        (["convert", "demo", "--out", "out", "--push_to_hub", "a b"], "push_to_hub"),
        (["convert", "demo", "--out", "in/a.wav/x"], "a.wav"),
        (["sweep"], "file"),
        (["sweep", "/nowhere.yaml"], "/nowhere.yaml"),
        (["sweep", "in"], "in"),
        (["sweep", "s.yaml", "--out", "out", "--table"], "out"),
        (["sweep", "s.yaml", "--out", "out", "--slurm"], "sbatch"),
        (["sweep", "s.yaml", "--out", "out", "--time", "1:00:00"], "--slurm"),
        (["convert", "demo", "--out", "s3://b/x"], "URL"),
        (["convert", "demo", "--out", "out", "--to", "audiocraft"], "audiocraft lacks"),
        (["generate", "--prompt", "a", "--out", "s3://b/x"], "URL"),
        (["edit", "in/a.wav", "--prompt=a", "--regenerate=1:2", "--out=s3://b/x"], "URL"),
        (["bench", "--json=s3://b/x.json"], "URL"),
        (["evaluate", "--generated", "in", "--metrics", "music/beat", "--out", "s3://b/x"], "URL"),
        (
            [
                "evaluate",
                "--generated",
                "in",
                "--metrics",
                "fad/musicnn",
                "--reference",
                "in/a.wav",
            ],
            "a.wav",
        ),
        (
            [
                "evaluate",
                "--generated",
                "in",
                "--metrics",
                "vendi/musicnn",
                "--weights={musicnn: x}",
            ],
            "bundled",
        ),
        (["dashboard", "--no_such=1"], "no_such"),
        (["dashboard"], "entity"),
        (["dashboard", "--entity=a"], "WANDB_MODE"),
        (["app", "in"], "in"),
        (["--print_completion", "fish"], "fish"),
        (["--print_completion"], "bash or zsh"),
        (["evaluate", "--generated", "in", "in", "--metrics", "music/beat"], "second system"),
        (["evaluate", "--generated", "reference=in", "--metrics", "music/beat"], "reference"),
        (["evaluate", "--generated", "in", "--codec=demo", "--metrics", "music/beat"], "codec"),
        (["evaluate", "--generated", "in", "--save_reference=x"], "save_reference"),
        (["evaluate", "--study=key.json"], "ratings"),
        (["evaluate", "--checkpoint=demo"], "prompts"),
        (["evaluate", "--generated", "in", "--weights={x: y}"], "weights"),
        (["evaluate", "--generated", "in", "--kl_convention=x"], "kl_convention"),
        (["evaluate", "--generated", "in", "--accelerator=gpu"], "accelerator"),
        (["evaluate", "--generated", "in", "--out=/proc/x.json"], "--out /proc"),
    ):
        verb = args[0] if not args[0].startswith("-") else "(none)"
        yield Case(
            verb,
            f"`{' '.join(args)}`".encode(errors="replace").decode(),
            args,
            basic_files,
            words=(word,),
        )


# --- files ----------------------------------------------------------------------------------------


def put(name: str, content: bytes | str) -> Callable[[Path], None]:
    """Writes a file next to a valid clip."""

    def make(folder: Path) -> None:
        basic_files(folder)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def fifo(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        basic_files(folder)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(folder / name)

    return make


ALIAS_BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (n + 1, n + 1, b",".join([b"*%c" % n] * 9)) for n in range(97, 107)
)


def configurations() -> Iterator[Case]:
    for what, content, word in (
        ("binary", b"\xe3\x00\xff\x01", "UTF-8"),
        ("no UTF-8", b"seed: 1 # \xff", "UTF-8"),
        ("an open bracket", b"a: [", "YAML"),
        ("a list", b"- 1\n- 2\n", "c.yaml"),
        ("a bomb of aliases", ALIAS_BOMB, "c.yaml"),
        ("2 MB", b"#" * 2_000_000, "larger"),
        ("a tag of Python", b"seed: !!python/object/apply:os.getcwd []", "YAML"),
        ("a key of another verb", b"crop_z: 1", "crop_z"),
        ("deep lists", deep(5000), "c.yaml"),
        ("a date that is none", b"seed: 2001-99-99", "seed"),
        ("a null for a number", b"seed: null", "seed"),
        ("an option twice", b"batch_size: 1\nbatch_size: 2", "twice"),
    ):
        for verb in ("generate", "tokenize"):
            args = [*REQUIRED_ARGS[verb], "--config", "c.yaml"]
            words = (word, "c.yaml", word.replace("seed", "--seed"))
            if "seed" in word and verb == "tokenize":
                continue
            yield Case(verb, f"configuration: {what}", args, put("c.yaml", content), words=words)
    args = [*REQUIRED_ARGS["generate"], "--config"]
    yield Case(
        "generate", "configuration: a FIFO", [*args, "c.yaml"], fifo("c.yaml"), words=("c.yaml",)
    )
    yield Case("generate", "configuration: none", [*args, "no.yaml"], words=("no.yaml",))
    yield Case("generate", "configuration: a folder", [*args, "in"], basic_files, words=("in",))


def manifests() -> Iterator[Case]:
    row = '{"path": "in/a.wav", "caption": "x"}\n'
    good = "path,caption\nin/a.wav,x\n"
    for name, what, content, word in (
        ("m.jsonl", "empty", "", "no audio"),
        ("m.jsonl", "no JSON", "{", "line 1"),
        ("m.jsonl", "second line no JSON", row + "{x}", "line 2"),
        ("m.jsonl", "a list in a line", row + "[1]", "line 2"),
        ("m.jsonl", "deep lists", row + deep(3000).decode(), "line 2"),
        ("m.jsonl", "no path", '{"caption": "x"}', "no path"),
        ("m.jsonl", "a path that is a number", '{"path": 5, "caption": "x"}', "no path"),
        ("m.jsonl", "no UTF-8", row.encode() + b"\xff", "UTF-8"),
        ("m.csv", "no UTF-8", b"path,caption\n\xff,x", "UTF-8"),
        ("m.csv", "an open quote", 'path,caption\nin/a.wav,"x\nb,y\n', "line 2"),
        ("m.csv", "more columns than names", "path,caption\nin/a.wav,x,y\n", "line 2"),
        ("m.csv", "two columns of one name", "path,path\na,b\n", "line 1"),
        ("m.csv", "no path", "caption\nx\n", "no path"),
        ("m.csv", "a field of 200 kB", good + "a," + "x" * 200_000, "line 3"),
        ("m.csv", "only a head", "path,caption\n", "no audio"),
        ("m.jsonl.gz", "no gzip", b"abc", "unreadable"),
        ("m.jsonl.gz", "a damaged gzip", b"\x1f\x8b\x08\0\0\0\0\0\0\0\xff\xff", "unreadable"),
        ("m.xlsx", "of another kind", b"PK", "m.xlsx"),
        ("m.jsonl", "a field twice", '{"path": "a", "text": "x", "Text": "y"}', "two values"),
        ("m.tsv", "MTG-Jamendo's without a path", "\t".join(JAMENDO_COLUMNS) + "\nt\ta", "no path"),
    ):
        args = ["tokenize", name, "--out", "out", "--crop_s=1"]
        yield Case("tokenize", f"manifest: {what}", args[1:], put(name, content), words=(word,))
    yield Case(
        "tokenize",
        "manifest: a FIFO",
        ["m.jsonl", "--out", "out"],
        fifo("m.jsonl"),
        words=("m.jsonl",),
    )
    for what, extra, word in (
        ("a file that is not there", '{"path": "gone.wav", "caption": "x"}', "no such file"),
        ("a NUL in a path", '{"path": "a\\u0000.wav", "caption": "x"}', "cannot be"),
        ("no name in a path", '{"path": "..//.", "caption": "x"}', "regular file"),
        ("an offset beyond a float", f'{{"path": "in/a.wav", "offset": {10**400}}}', "offset"),
        ("a caption of 1 MB", f'{{"path": "in/a.wav", "caption": "{"x " * 500_000}"}}', "shorten"),
        ("a caption that is a number", '{"path": "in/a.wav", "caption": 5}', "caption"),
        ("offset NaN", '{"path": "in/a.wav", "caption": "y", "offset": "x"}', "offset"),
        ("a negative offset", '{"path": "in/a.wav", "caption": "y", "offset": -1}', "offset"),
        (
            "an offset beyond the end",
            '{"path": "in/a.wav", "caption": "y", "offset": 99}',
            "offset",
        ),
        ("duration 0", '{"path": "in/a.wav", "caption": "y", "duration": 0}', "duration"),
        ("a row twice", row.strip(), "twice"),
        ("caption null", '{"path": "in/b.wav", "caption": null}', "no such file"),
    ):
        make = put("m.jsonl", row + extra)
        args = ["m.jsonl", "--out", "out", "--crop_s=1", "--min_s=0.5"]
        yield Case("tokenize", f"manifest, one row: {what}", args, make, "skipped", (word,))
    for what, content in (
        ("U+2028 in a caption", "a\\u2028b"),
        ("a caption of two lines", "a\\nb"),
    ):
        make = put("m.jsonl", f'{{"path": "in/a.wav", "caption": "{content}"}}')
        yield Case("tokenize", f"manifest: {what}", ["m.jsonl", "--out", "out"], make, "used")
    for what, content, word in (
        ("empty", b"", "no prompt"),
        ("no UTF-8", b"\xff\xfe", "UTF-8"),
        ("only empty lines", b"\n\n  \n", "no prompt"),
    ):
        args = ["--prompts_file", "p.txt", "--out", "out"]
        yield Case("generate", f"prompts: {what}", args, put("p.txt", content), words=(word,))
    args = ["--prompts_file", "p.jsonl", "--out", "out"]
    yield Case(
        "generate",
        "prompts: a row without one",
        args,
        put("p.jsonl", '{"a": 1}'),
        words=("line 1",),
    )


def sidecars() -> Iterator[Case]:
    for what, content in (
        ("no JSON", b"{"),
        ("a list", b"[1]"),
        ("no UTF-8", b"\xff"),
        ("a caption that is a list", b'{"caption": ["x"]}'),
        ("deep objects", b'{"a":' * 3000 + b"1" + b"}" * 3000),
        ("2 MB", b'"' + b"x" * 2_000_000 + b'"'),
        ("empty", b""),
    ):

        def make(folder: Path, content: bytes = content) -> None:
            basic_files(folder)
            write_clip(folder / "in" / "bad.wav", 2.0, None, 16_000)
            (folder / "in" / "bad.json").write_bytes(content)

        args = ["in", "--out", "out", "--crop_s=1"]
        yield Case("tokenize", f"`.json` beside a clip: {what}", args, make, "skipped", ("bad",))


def wav(rate: int = 16_000, seconds: float = 1.0, gain: float = 1.0, bits: str = "float") -> bytes:
    """A WAV with a header built by hand."""
    samples = tone(seconds, 16_000)[:, 0] * np.float32(gain)
    data = samples.tobytes() if bits == "float" else (samples * 32767).astype("<i2").tobytes()
    kind, size = (3, 4) if bits == "float" else (1, 2)
    head = struct.pack("<HHIIHH", kind, 1, rate, rate * size % 2**32, size, 8 * size)
    body = (
        b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", len(data)) + data
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def sounds() -> Iterator[Case]:
    good = wav(bits="int")
    at = good.index(b"data")
    nan = bytearray(wav())
    nan[200:204] = struct.pack("<f", math.nan)
    skipped = {
        "empty": b"",
        "text": b"this is no audio",
        "zeros": bytes(5000),
        "a head without samples": good[: at + 8],
        "cut in its head": good[:20],
        "cut in its middle": good[: len(good) // 2],
        "NaN": bytes(nan),
        "samples of 3e38": wav(gain=3e38),
        "samples in integer units": wav(gain=32767),
        "a rate of 1 Hz": wav(rate=1),
        "a rate of 0 Hz": wav(rate=0),
        "a rate of 4 GHz": wav(rate=2**32 - 1),
        "no channels": good[:22] + b"\0\0" + good[24:],
        "9,999 channels": good[:22] + struct.pack("<H", 9999) + good[24:],
        "an unknown coding": good[:20] + b"\x77\x77" + good[22:],
        "digital silence": wav(gain=0.0),
        "0.1 s": wav(seconds=0.1),
    }
    used = {
        "sizes of 0": good[:4] + bytes(4) + good[8 : at + 4] + bytes(4) + good[at + 8 :],
        "sizes of 0xFFFFFFFF": good[:4]
        + b"\xff" * 4
        + good[8 : at + 4]
        + b"\xff" * 4
        + good[at + 8 :],
        "a RIFF size that counts its own head": good[:4] + struct.pack("<I", len(good)) + good[8:],
        "bytes behind the samples": good + b"LIST\4\0\0\0abcd",
    }
    args = ["in", "--out", "out", "--crop_s=1", "--min_s=0.5"]
    for what, content in skipped.items():
        make = put("in/bad.wav", content)
        yield Case("tokenize", f"WAV: {what}", args, captioned(make), "skipped", ("bad.wav",))
    for what, content in used.items():
        yield Case("tokenize", f"WAV: {what}", args, captioned(put("in/bad.wav", content)), "used")
    for suffix in (".flac", ".ogg", ".mp3", ".opus", ".aiff", ".m4a", ".wma"):
        for what, content in (
            ("text", b"this is no audio"),
            ("empty", b""),
            ("zeros", bytes(3000)),
        ):
            make = captioned(put(f"in/bad{suffix}", content))
            yield Case("tokenize", f"{suffix}: {what}", args, make, "skipped", (f"bad{suffix}",))
    yield Case(
        "tokenize",
        "a FIFO called .wav",
        args,
        captioned(fifo("in/bad.wav")),
        "skipped",
        ("bad.wav",),
    )
    for what, content in (("text", b"no audio"), ("empty", b""), ("NaN", bytes(nan))):
        given = [*REQUIRED_ARGS["generate"], "--continue_from", "in/bad.wav"]
        make = put("in/bad.wav", content)
        yield Case("generate", f"--continue_from: {what}", given, make, words=("bad.wav",))
    for what, content in (("text", b"no audio"), ("NaN", bytes(nan)), ("empty", b"")):
        make = put("in/bad.wav", content)
        given = [*REQUIRED_ARGS["evaluate"], "--metrics", "fad/musicnn"]
        yield Case("evaluate", f"a clip: {what}", given, make, words=("bad.wav",))


def captioned(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(folder: Path) -> None:
        make(folder)
        (folder / "in" / "bad.txt").write_text("bad")

    return both


def broken_shards(samples: Samples) -> Iterator[Case]:
    """`fit` refuses bad indexes and bad validation shards; it skips bad training shards."""
    from magnet_train.codec.base import load_codec

    demo = load_codec("demo").facts.to_dict()

    def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            write_set(folder / "data", demo)
            file = folder / "data" / "index.json"
            content = json.loads(file.read_text())
            changed = change(content)
            file.write_bytes(
                changed if isinstance(changed, bytes) else json.dumps(content).encode()
            )

        return make

    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "binary": lambda c: b"\xff\0",
        "empty": lambda c: b"",
        "a list": lambda c: b"[]",
        "deep lists": lambda c: deep(5000),
        "no codec": lambda c: c.pop("codec") and None,
        "codec a list": lambda c: c.update(codec=[]),
        "another codec": lambda c: c["codec"].update(hash="0" * 16),
        "frame_rate 0": lambda c: c["codec"].update(frame_rate=0),
        "frame_rate NaN": lambda c: c["codec"].update(frame_rate=math.nan),
        "num_codebooks a text": lambda c: c["codec"].update(num_codebooks="4"),
        "num_codebooks 10^8": lambda c: c["codec"].update(num_codebooks=10**8),
        "no shards": lambda c: c.pop("shards") and None,
        "shards an object": lambda c: c.update(shards={}),
        "an empty list of shards": lambda c: c.update(shards=[]),
        "a shard called ../x.tar": lambda c: c["shards"][0].update(name="../x.tar"),
        "a shard twice": lambda c: c["shards"].append(c["shards"][0]),
        "num_examples negative": lambda c: c["shards"][0].update(num_examples=-1),
        "num_examples 10^9": lambda c: c["shards"][0].update(num_examples=10**9),
        "num_examples a text": lambda c: c["shards"][0].update(num_examples="2"),
        "sha256 a number": lambda c: c["shards"][0].update(sha256=5),
    }
    for what, change in changes.items():
        args = [*SMALL_FIT, "--data.train=data", "--data.validation=data"]
        words = ("index.json", "data", "codec")
        yield Case("fit", f"index: {what}", args, index(change), words=words)
    shards: dict[str, tuple[list[tuple[str, bytes]] | bytes, str]] = {
        "cut off": (b"", "s.tar"),
        "a key that leads elsewhere": (item(key="../x"), "key"),
        "no codes": (item()[1:], "no codes"),
        "no JSON": (item()[:1], "no json"),
        "codes of float": (item(codes=np.zeros((DEMO_CODEBOOKS, 30), np.float32)), "float32"),
        "codes of one codebook": (item(codes=np.zeros((1, 30), np.uint16)), "codebooks"),
        "codes out of range": (
            item(codes=np.full((DEMO_CODEBOOKS, 30), 60_000, np.uint16)),
            "codebooks",
        ),
        "key missing": (item(about={"caption": "x", "duration_s": 1.2}), "key"),
        "duration_s missing": (item(about={"key": "k", "caption": "x"}), "duration_s"),
        "duration_s NaN": (
            item(about={"key": "k", "caption": "x", "duration_s": math.nan}),
            "duration_s",
        ),
        "duration_s 1e308": (
            item(about={"key": "k", "caption": "x", "duration_s": 1e308}),
            "duration_s",
        ),
        "duration_s negative": (
            item(about={"key": "k", "caption": "x", "duration_s": -1}),
            "duration_s",
        ),
        "a caption that is a number": (
            item(about={"key": "k", "caption": 5, "duration_s": 1}),
            "caption",
        ),
        "JSON a list": (item(about=[]), "object"),
        "JSON deep": (item(about=b"[" * 50_000), "nested"),
        "another key in its JSON": (
            item(about={"key": "z", "caption": "x", "duration_s": 1}),
            "key",
        ),
    }
    for what, (members, word) in shards.items():

        def make(folder: Path, members: Any = members) -> None:
            write_set(folder / "good", demo)
            write_set(
                folder / "data", demo, tar_of(members) if isinstance(members, list) else b"x" * 700
            )

        args = [*SMALL_FIT, "--data.train=good", "--data.validation=data"]
        yield Case("fit", f"validation shard: {what}", args, make, words=(word, "s-0.tar"))
        tried = ("cut off", "key", "duration_s missing", "duration_s NaN", "codes of float")
        tried += ("a caption", "JSON")
        if what.startswith(tried):
            args = [*SMALL_FIT, "--data.train=data", "--data.validation=good"]
            yield Case("fit", f"training shard: {what}", args, make, "skipped", ("skipping shard",))


def item(
    key: str = "k", codes: np.ndarray | None = None, about: Any = None
) -> list[tuple[str, bytes]]:
    codes = np.zeros((DEMO_CODEBOOKS, 30), np.uint16) if codes is None else codes
    about = {"key": key, "caption": "x", "duration_s": 1.2} if about is None else about
    return [
        (f"{key}.codes.npy", npy(codes)),
        (f"{key}.json", about if isinstance(about, bytes) else as_json(about)),
    ]


def write_set(folder: Path, codec: dict[str, Any], bad: bytes | None = None) -> None:
    """Three shards of two items each; the first may be `bad`, with a matching checksum."""
    import hashlib

    folder.mkdir()
    entries = []
    for number in range(3):
        content = tar_of([part for i in range(2) for part in item(f"k{number}{i}")])
        if number == 0 and bad is not None:
            content = bad
        (folder / f"s-{number}.tar").write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        count = 1 if number == 0 and bad is not None else 2
        entries.append({"name": f"s-{number}.tar", "num_examples": count, "sha256": sha256})
    index = {"format": 1, "codec": codec, "shards": entries, "skipped": []}
    (folder / "index.json").write_text(json.dumps(index))


class RunsCode:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch RAN",)


def releases(samples: Samples) -> Iterator[Case]:
    release = samples.release
    config = json.loads((release / "config.json").read_text())

    def released(change: Callable[[Path, dict[str, Any]], Any]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            shutil.copytree(release, folder / "m")
            content = json.loads(json.dumps(config))
            if not isinstance(change(folder / "m", content), bytes | int):
                (folder / "m" / "config.json").write_text(json.dumps(content))

        return make

    def flip(folder: Path, _: Any) -> int:
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        return file.write_bytes(content)

    def code(folder: Path, content: dict[str, Any]) -> None:
        (folder / "text_encoder").mkdir()
        about = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}
        (folder / "text_encoder" / "config.json").write_text(json.dumps(about))
        content["text_encoder"]["id"] = "./text_encoder"

    changes: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
        "no weights": lambda f, c: (f / "model.safetensors").unlink(),
        "a flipped bit of the weights": flip,
        "weights cut off": lambda f, c: os.truncate(f / "model.safetensors", 900),
        "weights a text": lambda f, c: (f / "model.safetensors").write_text("x"),
        "configuration binary": lambda f, c: (f / "config.json").write_bytes(b"\xff\0"),
        "configuration a list": lambda f, c: (f / "config.json").write_bytes(b"[]"),
        "configuration deep": lambda f, c: (f / "config.json").write_bytes(deep(5000)),
        "configuration of 2 MB": lambda f, c: (f / "config.json").write_bytes(b" " * 2_000_000),
        "format 99": lambda f, c: c.update(format=99),
        "network null": lambda f, c: c.update(network=None),
        "num_layers 10^8": lambda f, c: c["network"].update(num_layers=10**8),
        "dim 10^9": lambda f, c: c["network"].update(dim=10**9),
        "dim a text": lambda f, c: c["network"].update(dim="8"),
        "num_codebooks 10^8": lambda f, c: c["codec"].update(num_codebooks=10**8),
        "codec null": lambda f, c: c.update(codec=None),
        "codec /etc": lambda f, c: c["codec"].update(id="/etc"),
        "text encoder null": lambda f, c: c.update(text_encoder=None),
        "text encoder ../x": lambda f, c: c["text_encoder"].update(id="../x"),
        "text encoder with code": code,
        "crop_s NaN": lambda f, c: c.update(crop_s=math.nan),
        "crop_s 1e12": lambda f, c: c.update(crop_s=1e12),
        "temperature 0": lambda f, c: c["decoding"].update(temperature=0),
        "decoding a list": lambda f, c: c.update(decoding=[]),
        "provenance a text": lambda f, c: c.update(provenance="x"),
        "sha256 of another file": lambda f, c: c.update(sha256="0" * 64),
    }
    for what, change in changes.items():
        args = ["--checkpoint", "m", *REQUIRED_ARGS["generate"]]
        yield Case("generate", f"release: {what}", args, released(change), words=("m/",))
        if what in ("no weights", "network null", "format 99"):
            args = ["m", "--out", "out"]
            yield Case("convert", f"release: {what}", args, released(change), words=("m/",))


def checkpoints(samples: Samples) -> Iterator[Case]:
    def saved(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            content = samples.checkpoint
            changed = change(content)
            if isinstance(changed, bytes):
                (folder / "c.ckpt").write_bytes(changed)
            else:
                torch.save(content, folder / "c.ckpt")

        return make

    first = next(iter(samples.checkpoint["state_dict"]))
    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "empty": lambda c: b"",
        "a text": lambda c: b"hello",
        "a list": lambda c: pickle.dumps([1, 2]),
        "code": lambda c: pickle.dumps(RunsCode()),
        "no state_dict": lambda c: c.pop("state_dict") and None,
        "state_dict a list": lambda c: c.update(state_dict=[]),
        "a weight NaN": lambda c: c["state_dict"][first].fill_(math.nan) is None,
        "a weight of integers": lambda c: c["state_dict"].update(
            {first: c["state_dict"][first].long()}
        ),
        "a weight of another shape": lambda c: c["state_dict"].update({first: torch.zeros(3)}),
        "a weight less": lambda c: c["state_dict"].pop(first) is None,
        "no settings": lambda c: c.pop("hyper_parameters") and None,
        "crop_s NaN": lambda c: c["hyper_parameters"].update(crop_s=math.nan),
        "num_layers 10^8": lambda c: c["hyper_parameters"]["network"].update(num_layers=10**8),
        "codec a number": lambda c: c["hyper_parameters"].update(codec=5),
        "span_len a text": lambda c: c["hyper_parameters"].update(span_len="x"),
        "settings a list": lambda c: c.update(hyper_parameters=[1]),
    }
    for what, change in changes.items():
        for verb, args in (
            ("generate", ["--checkpoint", "c.ckpt", *REQUIRED_ARGS["generate"]]),
            ("convert", ["c.ckpt", "--out", "out"]),
        ):
            yield Case(verb, f"checkpoint: {what}", args, saved(change), words=("c.ckpt",))
    in_use = {name: change for name, change in changes.items() if name != "a list"}
    in_use |= {
        "an unknown setting": lambda c: c["hyper_parameters"].update(evil=1),
        "optimizer a list": lambda c: c["hyper_parameters"].update(optimizer=[1]),
        "no parts of the run": lambda c: c.update(run={}),
    }
    for what, change in in_use.items():
        for verb in ("fit", "doctor"):
            args = [*SMALL_FIT, "--ckpt_path=c.ckpt"]
            expected = "refused" if verb == "fit" else "failed"
            words = ("c.ckpt", "crop_s", "span_len", "codec", "num_layers", "another model")
            yield Case(verb, f"checkpoint: {what}", args, saved(change), expected, words)
    yield Case(
        "generate",
        "checkpoint: a FIFO",
        ["--checkpoint", "c.ckpt", *REQUIRED_ARGS["generate"]],
        fifo("c.ckpt"),
        words=("c.ckpt",),
    )

    def bomb(folder: Path) -> None:
        with zipfile.ZipFile(folder / "c.ckpt", "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("x/data.pkl", bytes(50_000_000))

    args = ["--checkpoint", "c.ckpt", *REQUIRED_ARGS["generate"]]
    yield Case("generate", "checkpoint: a compressed archive", args, bomb, words=("c.ckpt",))
    for what, content in (("a text", b"x"), ("empty", b""), ("a list", pickle.dumps([1]))):
        make = put("a/state_dict.bin", content)
        yield Case(
            "convert",
            f"audiocraft's file: {what}",
            ["a", "--out", "out"],
            make,
            words=("state_dict.bin",),
        )


def codecs(samples: Samples) -> Iterator[Case]:
    config = json.loads((samples.codec / "config.json").read_text())
    for name, value in (
        ("num_filters", 10**6),
        ("hidden_size", 10**12),
        ("codebook_size", 10**9),
        ("target_bandwidths", [1e9]),
        ("target_bandwidths", []),
        ("num_lstm_layers", 10**8),
        ("upsampling_ratios", [2] * 10_000),
        ("sampling_rate", -1),
        ("sampling_rate", "x"),
        ("model_type", "llama"),
        ("model_type", None),
        ("auto_map", {"AutoModel": "evil.C"}),
    ):

        def make(folder: Path, name: str = name, value: Any = value) -> None:
            basic_files(folder)
            shutil.copytree(samples.codec, folder / "codec")
            (folder / "codec" / "config.json").write_text(json.dumps(config | {name: value}))

        args = [*REQUIRED_ARGS["tokenize"], "--codec", "codec"]
        yield Case("tokenize", f"codec: {name}={str(value)[:30]}", args, make, words=("codec",))


def listening_tests(samples: Samples) -> Iterator[Case]:
    from magnet_train.evaluation.ratings import COLUMNS

    key = samples.listening_key
    head = ",".join(COLUMNS)
    rows = [
        f"r,1,{clip},{question},90,1.0,1" for clip in key["clips"] for question in key["questions"]
    ]
    table = "\n".join([head, *rows])

    def files(about: Any, text: Any) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            content = about if isinstance(about, bytes) else as_json(about)
            (folder / "key.json").write_bytes(content)
            (folder / "r.csv").write_bytes(text if isinstance(text, bytes) else text.encode())

        return make

    keys: dict[str, Any] = {
        "binary": b"\xff\0",
        "empty": b"",
        "a list": b"[]",
        "deep": deep(5000),
        "systems null": key | {"systems": None},
        "systems a text": key | {"systems": "ours"},
        "clips a list": key | {"clips": [1]},
        "seconds a text": key | {"clips": {"a1": {"system": "ours", "trial": 1, "seconds": "x"}}},
        "seconds NaN": key | {"clips": {"a1": {"system": "ours", "trial": 1, "seconds": math.nan}}},
        "no questions": key | {"questions": []},
        "title a number": key | {"title": 5},
        "trial 1e400": key | {"clips": {"a1": {"system": "ours", "trial": 10**400, "seconds": 1}}},
        "another study": key | {"clips": {"zz": {"system": "ours", "trial": 1, "seconds": 1}}},
    }
    args = ["--study", "key.json", "--ratings", "r.csv"]
    for what, about in keys.items():
        yield Case(
            "evaluate",
            f"key of a listening test: {what}",
            args,
            files(about, table),
            words=("key.json", "r.csv"),
        )
    texts: dict[str, Any] = {
        "binary": b"\xff\0",
        "empty": "",
        "only a head": head,
        "a column less": table.replace("seconds_listened", "s"),
        "a rating of 0": table.replace(",90,", ",0,"),
        "a rating of 101": table.replace(",90,", ",101,"),
        "a rating of ²": table.replace(",90,", ",²,"),
        "a rating of 1.5": table.replace(",90,", ",1.5,"),
        "seconds NaN": table.replace(",1.0,", ",nan,"),
        "seconds negative": table.replace(",1.0,", ",-1,"),
        "a clip of another study": table.replace("a1", "zz"),
        "a question that was not asked": table.replace("relevance", "x"),
        "a row twice": f"{table}\n{rows[0]}",
        "a system without ratings": "\n".join([head, *rows[:2]]),
        "a field of 200 kB": table + "\n" + "x" * 200_000,
        "a NUL": table.replace("r,1", "\0,1"),
    }
    for what, text in texts.items():
        if what == "a NUL":  # a name like any other
            yield Case("evaluate", "ratings: a NUL in a name", args, files(key, text), "used")
            continue
        yield Case(
            "evaluate",
            f"ratings: {what}",
            args,
            files(key, text),
            words=("r.csv", "system", "rater"),
        )


def sweeps() -> Iterator[Case]:
    span = {"model.span_len": {"values": [1, 3]}}
    contents: dict[str, Any] = {
        "binary": b"\xff\0",
        "empty": b"",
        "a list": b"[]",
        "a bomb of aliases": ALIAS_BOMB,
        "deep lists": deep(5000),
        "method bayes": GRID | {"method": "bayes"},
        "no parameters": {k: v for k, v in GRID.items() if k != "parameters"},
        "parameters a list": GRID | {"parameters": [1]},
        "parameters null": GRID | {"parameters": None},
        "values empty": GRID | {"parameters": {"model.span_len": {"values": []}}},
        "values a text": GRID | {"parameters": {"model.span_len": {"values": "123"}}},
        "a distribution": GRID | {"parameters": {"model.span_len": {"min": 1, "max": 3}}},
        "a value null": GRID | {"parameters": {"model.span_len": {"values": [None, 1]}}},
        "a value twice": GRID | {"parameters": {"model.span_len": {"values": [1, 1]}}},
        "10^12 runs": GRID
        | {"parameters": span | {f"p{i}": {"values": list(range(100))} for i in range(6)}},
        "no command": {k: v for k, v in GRID.items() if k != "command"},
        "command a text": GRID | {"command": "fit"},
        "command of objects": GRID | {"command": [{"a": 1}]},
        "an unknown parameter": GRID | {"parameters": {"model.no_such": {"values": [1, 2]}}},
        "a value of the wrong type": GRID | {"parameters": {"model.span_len": {"values": ["x"]}}},
        "a value out of range": GRID | {"parameters": {"model.span_len": {"values": [1, -1]}}},
        "a parameter named 5": GRID | {"parameters": {5: {"values": [1]}}},
        "two methods": b"method: grid\nmethod: grid\n",
        "a command of another program": GRID | {"command": ["rm", "-rf", "${args}"]},
        "a command without ${args}": GRID | {"command": ["python", "-m", "magnet_train", "fit"]},
        "${env}": GRID | {"command": ["${env}", "-m", "magnet_train", "fit", "${x}", "${args}"]},
    }
    for what, content in contents.items():
        data = content if isinstance(content, bytes) else as_json(content)
        yield Case(
            "sweep",
            f"sweep: {what}",
            ["s.yaml", "--out", "out"],
            put("s.yaml", data),
            words=("s.yaml",),
        )
    yield Case(
        "sweep", "sweep: a FIFO", ["f.yaml", "--out", "out"], fifo("f.yaml"), words=("f.yaml",)
    )


def adapter_folders(samples: Samples) -> Iterator[Case]:
    """LoRA adapters that `generate` refuses."""
    config = json.loads((samples.adapter / "adapter_config.json").read_text())

    def changed(change: Callable[[Path, dict[str, Any]], Any]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            shutil.copytree(samples.adapter, folder / "lora")
            content = dict(config)
            change(folder / "lora" / "adapter_model.safetensors", content)
            (folder / "lora" / "adapter_config.json").write_text(json.dumps(content))

        return make

    changes: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
        "another model's": lambda w, c: None,
        "no weights": lambda w, c: w.unlink(),
        "weights a text": lambda w, c: w.write_text("x"),
        "weights cut off": lambda w, c: os.truncate(w, w.stat().st_size - 9),
        "r a text": lambda w, c: c.update(r="2"),
        "r 0": lambda w, c: c.update(r=0),
        "r 3": lambda w, c: c.update(r=3),
        "lora_alpha NaN": lambda w, c: c.update(lora_alpha=math.nan),
        "peft_type IA3": lambda w, c: c.update(peft_type="IA3"),
        "use_dora": lambda w, c: c.update(use_dora=True),
    }
    args = [*REQUIRED_ARGS["generate"], "--lora"]
    for what, change in changes.items():
        yield Case(
            "generate", f"adapter: {what}", [*args, "lora"], changed(change), words=("lora",)
        )
    for what, name in (("none", "gone"), ("a file", "in/a.wav"), ("strength NaN", "lora:nan")):
        make = changed(lambda w, c: None) if "lora" in name else basic_files
        yield Case("generate", f"adapter: {what}", [*args, name], make, words=(name,))


def rescorers(samples: Samples) -> Iterator[Case]:
    """Models that `generate` refuses as rescorer."""
    from make_components import make_musicgen

    def release(folder: Path) -> None:
        shutil.copytree(samples.release, folder / "r")
        file = folder / "r" / "config.json"
        config = json.loads(file.read_text())
        config["codec"] = {"id": "demo", "hash": "0" * 16}
        file.write_text(json.dumps(config))

    def musicgen(**changes: Any) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            made = samples.made("musicgen", make_musicgen)
            shutil.copytree(made, folder / "r")
            config = json.loads((folder / "r" / "config.json").read_text())
            (folder / "r" / "config.json").write_text(json.dumps(config | changes))

        return make

    for what, make in (
        ("none", basic_files),
        ("a folder of audio", lambda f: write_clip(f / "r" / "a.wav", 1.0, None)),
        ("a release with another codec", release),
        ("a MusicGen of other codes", musicgen()),
        ("a MusicGen for melodies", musicgen(model_type="musicgen_melody")),
        ("a MusicGen without a decoder", musicgen(decoder=None)),
        ("a MusicGen whose decoder is a list", musicgen(decoder=[1])),
        ("a configuration that is a list", put("r/config.json", "[]")),
        ("a FIFO", fifo("r/config.json")),
    ):
        args = [*REQUIRED_ARGS["generate"], "--decoding.rescorer=./r"]
        yield Case("generate", f"rescorer: {what}", args, make, words=("rescorer", "r/", "r:"))


def notes() -> Iterator[Case]:
    """JSON files of clips that are given as --config."""
    options = {"prompt": ["a"], "seed": 1, "decoding": {"top_p": 0.9}}
    for what, content, word in (
        ("options a list", {"options": [1]}, "options"),
        ("an unknown option", {"options": options | {"evil": 1}}, "evil"),
        ("a seed that is a text", {"options": options | {"seed": "x"}}, "seed"),
        ("a prompt that is an object", {"options": options | {"prompt": {"a": 1}}}, "prompt"),
        ("decoding a number", {"options": options | {"decoding": 3}}, "decoding"),
        ("top_p a text", {"options": options | {"decoding": {"top_p": "x"}}}, "top_p"),
        ("of an edit", {"options": options | {"regenerate": ["1:2"]}}, "regenerate"),
        ("checkpoint a number", {"options": options | {"checkpoint": 5}}, "5"),
        ("lora a text", {"options": options | {"lora": "x"}}, "lora"),
    ):
        args = ["--config", "clip.json", "--out", "out"]
        make = put("clip.json", json.dumps(content))
        yield Case("generate", f"a clip's JSON: {what}", args, make, words=(word,))


def plans(samples: Samples) -> Iterator[Case]:
    """Damaged files of an earlier `tokenize`; reports of shards are made again."""
    from bad_files import _read_plan

    def planned(path: Path) -> None:
        path.mkdir()
        _read_plan(path, None, samples)

    def changed(name: str, content: Any) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            source = samples.made("planned", planned)
            shutil.copytree(source, folder, dirs_exist_ok=True)
            shutil.copytree(samples.codec, folder / "codec")
            file = folder / "out" / name
            old = json.loads(file.read_text())
            value = content(old) if callable(content) else content
            file.write_bytes(value if isinstance(value, bytes) else as_json(value))

        return make

    args = ["in", "--out", "out", "--codec", "codec", "--min_s=0.1"]
    for what, content in (
        ("a list", []),
        ("deep lists", deep(5000)),
        ("no codec", lambda p: {k: v for k, v in p.items() if k != "codec"}),
        ("codec a text", lambda p: p | {"codec": "x"}),
        ("another codec", lambda p: p | {"codec": p["codec"] | {"hash": "0" * 16}}),
        ("rounds an object", lambda p: p | {"rounds": {}}),
        ("rounds of numbers", lambda p: p | {"rounds": [[1]]}),
        ("a clip that is gone", lambda p: p | {"rounds": [["0" * 32]]}),
        ("other settings", lambda p: p | {"settings": {}}),
        ("format 99", lambda p: p | {"format": 99}),
        ("binary", b"\xff\0"),
    ):
        make = changed(".plan.json", content)
        yield Case("tokenize", f"plan: {what}", args, make, words=("out",))
    for what, content in (
        ("a list", []),
        ("binary", b"\xff\0"),
        ("deep lists", deep(5000)),
        ("num_examples -1", lambda p: p | {"num_examples": -1}),
        ("another name", lambda p: p | {"name": "../x.tar"}),
        ("another checksum", lambda p: p | {"sha256": "0" * 64}),
        ("skipped a text", lambda p: p | {"skipped": "x"}),
    ):
        make = changed(".shard-000000.json", content)
        yield Case("tokenize", f"report of a shard: {what}", args, make, "used")


def references(samples: Samples) -> Iterator[Case]:
    """Statistics and captions that `evaluate` refuses."""
    from safetensors.torch import save_file

    args = ["--generated", "in", "--reference", "ref", "--metrics", "fad/musicnn"]
    about = {"format": 1, "num_windows": 5, "num_clips": 2, "embeddings": [], "logits": []}
    names = ("ids_hash", "embedder", "embedder_hash", "resampler", "windowing")
    about |= dict.fromkeys(names, "x")
    eye = torch.eye(3, dtype=torch.float64)
    tensors = {"mean": eye[0].clone(), "covariance": eye}
    for what, text, content in (
        ("no metadata", None, tensors),
        ("metadata no JSON", "{", tensors),
        ("metadata deep", "[" * 5000, tensors),
        ("metadata a list", "[]", tensors),
        ("format 99", json.dumps(about | {"format": 99}), tensors),
        ("no mean", json.dumps(about), {"covariance": eye}),
        ("a mean of integers", json.dumps(about), tensors | {"mean": torch.ones(3).int()}),
        ("covariance NaN", json.dumps(about), tensors | {"covariance": eye * math.nan}),
        ("10^400 windows", json.dumps(about | {"num_windows": 10**400}), tensors),
        ("ids of windows that are not there", json.dumps(about | {"logits": ["a"]}), tensors),
        ("another network", json.dumps(about), tensors),
    ):

        def make(folder: Path, text: Any = text, content: Any = content) -> None:
            basic_files(folder)
            (folder / "ref").mkdir()
            metadata = None if text is None else {"reference_statistics": text}
            save_file(content, folder / "ref" / "musicnn.safetensors", metadata)

        yield Case("evaluate", f"statistics: {what}", args, make, words=("musicnn.safetensors",))
    make = put("ref/musicnn.safetensors", "x")
    yield Case("evaluate", "statistics: a text", args, make, words=("musicnn.safetensors",))
    for what, content, word in (
        ("of other clips", '{"path": "b.wav", "caption": "x"}', "a has none"),
        ("a path that leads elsewhere", '{"path": "../a.wav", "caption": "x"}', "outside"),
        ("no caption", '{"path": "a.wav", "caption": null}', "caption"),
        ("a clip twice", '{"path": "a.wav", "caption": "x"}\n' * 2, "two clips"),
        ("no JSON", "{", "line 1"),
    ):
        given = ["--generated", "in", "--metrics", "text/musicnn", "--captions", "c.jsonl"]
        make = put("c.jsonl", content)
        yield Case("evaluate", f"captions: {what}", given, make, words=(word,))
    for what, content, word in (
        ("empty", "", "no prompt"),
        ("a line twice", "a\na\n", "repeated"),
        ("no UTF-8", b"\xff", "UTF-8"),
    ):
        given = ["--checkpoint=demo", "--prompts=p.txt", "--metrics", "text/musicnn"]
        yield Case("evaluate", f"prompts: {what}", given, put("p.txt", content), words=(word,))


def dacs(samples: Samples) -> Iterator[Case]:
    """Folders of DAC codecs that `tokenize` refuses."""
    from test_dac import make_dac

    folder = samples.made("dac", make_dac)
    config = json.loads((folder / "config.json").read_text())
    for name, value in (
        ("n_codebooks", 10**6),
        ("n_codebooks", 0),
        ("codebook_size", 10**9),
        ("codebook_size", 32),
        ("encoder_hidden_size", 10**8),
        ("downsampling_ratios", [0, 4]),
        ("downsampling_ratios", "x"),
        ("sampling_rate", 0),
        ("sampling_rate", None),
        ("codebook_dim", -1),
    ):

        def make(target: Path, name: str = name, value: Any = value) -> None:
            basic_files(target)
            shutil.copytree(folder, target / "codec")
            (target / "codec" / "config.json").write_text(json.dumps(config | {name: value}))

        args = [*REQUIRED_ARGS["tokenize"], "--codec", "codec"]
        yield Case("tokenize", f"DAC: {name}={str(value)[:30]}", args, make, words=("codec",))


def jamendo() -> Iterator[Case]:
    """Damaged metadata of MTG-Jamendo."""
    head = "\t".join(JAMENDO_COLUMNS) + "\n"
    row = "t\ta\tb\tin/a.wav\t4\tgenre---jazz\n"
    for what, content, expected, word in (
        ("only a head", head, "refused", "no audio"),
        ("an open quote", head + row.replace("jazz", '"jazz'), "used", ""),
        ("no tags", head + row.replace("\tgenre---jazz", ""), "used", ""),
        ("tags without a category", head + row.replace("genre---", ""), "used", ""),
        (
            "a file that is not there",
            head + row + row.replace("a.wav", "b.wav"),
            "skipped",
            "b.wav",
        ),
        ("a row twice", head + row + row, "skipped", "twice"),
        ("a NUL in a path", head + row + row.replace("a.wav", "\0"), "skipped", "line 3"),
    ):
        args = ["m.tsv", "--out", "out", "--crop_s=1"]
        words = (word,) if word else ()
        yield Case("tokenize", f"MTG-Jamendo: {what}", args, put("m.tsv", content), expected, words)


def environments() -> Iterator[Case]:
    for name, value in (
        ("SLURM_RESTART_COUNT", "abc"),
        ("SLURM_STEP_NUM_TASKS", "x"),
        ("RANK", "x"),
        ("WORLD_SIZE", "1.5"),
        ("MASTER_PORT", "abc"),
        ("SLURM_NTASKS", "2"),
        ("WANDB_SILENT", "abc"),
        ("WANDB_MODE", "xyz"),
        ("WANDB_INIT_TIMEOUT", "abc"),
        ("WANDB_RUN_ID", "a/b"),
        ("WANDB_PROJECT", "a/b"),
        ("MAGNET_TRAIN_CACHE", "/proc/nowhere"),
    ):
        expected = "used" if name == "MAGNET_TRAIN_CACHE" else "refused"
        args = SMALL_FIT if expected == "refused" else REQUIRED_ARGS["tokenize"]
        if name.startswith("WANDB"):
            args = [*args, "--trainer.logger=WandbLogger"]
        verb = "fit" if expected == "refused" else "tokenize"
        words = (name, "ntasks")
        yield Case(verb, f"{name}={value}", args, basic_files, expected, words, {name: value})


def addresses() -> Iterator[Case]:
    """URLs with credentials for options that do not accept URLs."""
    for what, url in (
        ("password of a store", "s3://key:SECRET@b/x"),
        ("password with a mark", "http://u:S?SECRET@127.0.0.1:9/x"),
        ("signature", "http://h/x?sig=SECRET"),
    ):
        for verb, option, args in (
            ("fit", "--ckpt_path", [*SMALL_FIT, "--ckpt_path", url]),
            ("fit", "--trainer.default_root_dir", [*SMALL_FIT, "--trainer.default_root_dir", url]),
            ("fit", "--config", ["--config", url]),
            ("generate", "--checkpoint", [*REQUIRED_ARGS["generate"], "--checkpoint", url]),
            ("tokenize", "SOURCE", [url, "--out", "out"]),
            ("tokenize", "--out", ["in", "--out", url]),
            ("evaluate", "--reference", ["--generated", "in", "--reference", url]),
        ):
            words = ("***",)
            yield Case(verb, f"`{option}`: a {what}", args, basic_files, words=words)


def all_cases(samples: Samples) -> list[Case]:
    return [
        *manifests(),
        *sidecars(),
        *sounds(),
        *codecs(samples),
        *releases(samples),
        *checkpoints(samples),
        *listening_tests(samples),
        *sweeps(),
        *adapter_folders(samples),
        *rescorers(samples),
        *notes(),
        *plans(samples),
        *references(samples),
        *dacs(samples),
        *jamendo(),
        *configurations(),
        *environments(),
        *addresses(),
        *verbs(),
        *wrong_options(),
        *broken_shards(samples),
        *edits(),
        *doctors(),
    ]


# --- running --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Result of a command."""

    status: int
    output: str
    cpu_s: float
    mb: float
    leftovers: list[str]

    @property
    def last_line(self) -> str:
        lines = [line.rpartition("\r")[2].strip() for line in self.output.split("\n")]
        lines = [line for line in lines if line]
        return lines[-1] if lines else ""


def run(case: Case) -> Outcome:
    """Run the command in a separate process and an empty folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case.make(folder)
        before = set(folder.rglob("*"))
        log = folder / "said.log"
        child = os.fork()
        if child == 0:
            _run_child(case, folder, log)
        status, cpu_s, mb = _wait(child)
        new = set(folder.rglob("*")) - before
        leftovers = [path.name for path in new if path.suffix in (".part", ".tmp", ".new")]
        if (folder / "RAN").exists():
            leftovers.append("code was run")
        output = log.read_text(errors="replace")
        if "SECRET" in output or any("SECRET" in path.name for path in new):
            leftovers.append("a password is shown")
        return Outcome(status, output, cpu_s, mb, leftovers)


def _cache_field_docs() -> None:
    """Parse the source of each class once for all commands: a third of the time of a parser."""
    parse = AttributeDocstrings.get_attr_docs
    cached = functools.cache(lambda cls: parse(AttributeDocstrings(), cls))
    AttributeDocstrings.get_attr_docs = lambda self, cls: cached(cls)


def _run_child(case: Case, folder: Path, log: Path) -> None:
    """Run the command in the forked process; never returns."""
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.environ.update(case.environment)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT)
        for number, target in ((os.open(os.devnull, os.O_RDONLY), 0), (handle, 1), (handle, 2)):
            os.dup2(number, target)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = (
            os.fdopen(n, "w", 1, closefd=False, errors="replace") for n in (1, 2)
        )
        in_use = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MAX_MB * 10**6,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(2 * MAX_CPU_S), int(2 * MAX_CPU_S)))
        if case.verb == "app":  # its options are checked before the page, which needs gradio
            sys.modules["gradio"] = module_from_spec(ModuleSpec("gradio", None))
        from magnet_train.__main__ import main

        verb = [] if case.args[:1] == [case.verb] or case.verb == "(none)" else [case.verb]
        status = main([*verb, *case.args])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait(child: int) -> tuple[int, float, float]:
    """Status, CPU time in seconds and memory in MB of a process, which is killed if it hangs."""
    end = time.monotonic() + MAX_WALL_S
    while True:
        pid, status, used = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def find_problems(case: Case, found: Outcome) -> str:
    """Problems of the result, in one line; empty if it is right."""
    problems = []
    has_word = any(word in found.output.replace("\n", " ") for word in case.words)
    if "Traceback (most recent call last)" in found.output:
        problems.append("traceback")
    if found.cpu_s > MAX_CPU_S or found.mb > MAX_MB:
        problems.append(f"{found.cpu_s:.0f} s, {found.mb:.0f} MB")
    problems += found.leftovers
    if case.expected in ("refused", "failed"):
        ok = found.status == 2 or (case.expected == "failed" and found.status == 1)
        if not ok or not found.last_line.startswith("error: "):
            problems.append(f"status {found.status}")
        named = found.last_line if case.expected == "refused" else found.output
        if case.words and not any(word in named for word in case.words):
            problems.append("does not name it")
    elif found.status != 0:
        problems.append(f"status {found.status}")
    elif case.expected == "skipped" and not has_word:
        problems.append("not named")
    return ", ".join(problems)


def describe(found: Outcome, case: Case) -> str:
    """Status and output of a command, for the table."""
    line = found.last_line
    if case.expected == "skipped":
        lines = [text for text in found.output.split("\n") if any(w in text for w in case.words)]
        line = lines[-1].rpartition("\r")[2] if lines else line
    if case.expected == "failed":
        wrong = ("failed", "missing")
        lines = [text for text in found.output.split("\n") if text.startswith(wrong)]
        line = lines[0] if lines else line
    line = re.sub(r"/tmp/\w+/", "…/", table_cell(line.replace("`", "'")))
    line = line.replace(str(Path(__file__).resolve().parents[1]), "…")
    return f"{found.status}: {line[:160]}"


def table(only: list[str], kinds: list[str], out: Path | None) -> int:
    """Run the cases that the table does not have yet; returns the number of wrong results."""
    done = {} if out is None else read_table(out)
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            (case.verb, table_cell(case.what)): case
            for case in all_cases(Samples(Path(folder)))
            if (not only or case.verb in only)
            and (not kinds or any(kind in case.what for kind in kinds))
        }
        for number, (place, case) in enumerate(cases.items(), 1):
            if place not in done:
                found = run(case)
                verdict = find_problems(case, found) or "right"
                done[place] = [*place, case.expected, describe(found, case), verdict]
                if verdict != "right":
                    print(" | ".join(done[place]), flush=True)
                if out is not None:
                    write_table(done.values(), out)
            if number % 25 == 0 or number == len(cases):
                print(summary(done.values()), flush=True)
    return sum(row[-1] != "right" for row in done.values())


def table_cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def read_table(out: Path) -> dict[tuple[str, str], list[str]]:
    """Right rows of an earlier call, by verb and input; all others are run again."""
    lines = out.read_text().splitlines() if out.exists() else []
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {(row[1], row[2]): row[1:] for row in cells if len(row) == 6 and row[-1] == "right"}


def summary(rows: Collection[list[str]]) -> str:
    num_right = sum(row[-1] == "right" for row in rows)
    return f"{len(rows)} bad inputs, {num_right} right, {len(rows) - num_right} wrong"


def write_table(rows: Collection[list[str]], out: Path) -> None:
    """Replace the table; a person's note above it stays."""
    by_verb = Counter(row[0] for row in rows)
    head = (
        "# Bad inputs\n\nWritten by `python benchmarks/bad_inputs.py --out FILE`: what was "
        "expected, and the exit status with the line that was printed. `skipped`: one item is "
        "skipped and named, the others are used; `failed`: doctor says it.\n\n"
        f"{summary(rows)}. By verb: {', '.join(f'{v} {n}' for v, n in by_verb.items())}.\n\n"
    )
    head += written_note(out)
    columns = ["", "verb", "input", "expected", "got", "verdict"]
    numbered = [[str(number), *row] for number, row in enumerate(rows, 1)]
    lines = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *numbered)]
    with replacing(out) as temporary:
        temporary.write_text(head + "\n".join(lines) + "\n")


def written_note(out: Path) -> str:
    """Text of an existing record that a person added above its table; empty if there is none."""
    old = out.read_text() if out.exists() else ""
    note = re.search(r"^Run on .*?(?=^\|)", old, re.MULTILINE | re.DOTALL)
    return "" if note is None else note[0]


def fuzz(names: list[str], minutes: float, out: Path | None) -> bool:
    """Run each reader on random files for this many minutes of CPU time, in turns of `SLICE_S`.

    The table is written after each turn, and a later call adds to it, so that it can be stopped at
    any time. Exceptions other than UserError are printed with the file that caused them. Returns
    whether this call found any.
    """
    names = names or list(READERS)
    used_s, counts = read_fuzz_table(out)
    has_failed = False
    seed = time.time_ns()
    with tempfile.TemporaryDirectory() as folder:
        samples = Samples(Path(folder))
        while waiting := [name for name in names if used_s[name] < 60 * minutes]:
            name = min(waiting, key=used_s.__getitem__)
            begin = time.process_time()
            while time.process_time() < begin + min(SLICE_S, 60 * minutes):
                seed += 1
                try:
                    counts[name] += check(name, samples, examples=100, seed=seed)
                except Exception:  # of any type but UserError: a fault of the reader
                    has_failed = True
                    print(traceback.format_exc(limit=-4)[:5000], flush=True)
                    counts[name]["failed"] += 1
            used_s[name] += time.process_time() - begin
            rows = {n: [n, f"{used_s[n]:.1f}", *_fuzz_counts(counts[n])] for n in READERS}
            print(" | ".join(rows[name]), flush=True)
            if out is not None:
                table = markdown_table(FUZZ_COLUMNS, list(rows.values()))
                record = FUZZ_HEAD + written_note(out) + table + "\n"
                with replacing(out) as temporary:
                    temporary.write_text(record)
    return has_failed


def read_fuzz_table(out: Path | None) -> tuple[dict[str, float], dict[str, Counter[str]]]:
    """CPU seconds and counts of each reader in the table of an earlier call, or zeros."""
    used_s = dict.fromkeys(READERS, 0.0)
    counts = {name: Counter[str]() for name in READERS}
    for line in out.read_text().splitlines() if out is not None and out.exists() else []:
        name, *numbers = [cell.strip() for cell in line.strip("|").split("|")]
        if name in READERS:
            used_s[name] = float(numbers[0])
            read, refused, failed = map(int, numbers[1:])
            counts[name].update(used=read - refused, refused=refused, failed=failed)
    return used_s, counts


def _fuzz_counts(count: Counter[str]) -> list[str]:
    read = count["used"] + count["refused"]
    return [str(read), str(count["refused"]), str(count["failed"])]


def main() -> int:
    """Returns 0 if all results are right."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, help="Markdown file of the table.")
    parser.add_argument("--only", nargs="+", default=[], help="Verbs, or readers with --fuzz.")
    parser.add_argument("--fuzz", type=float, help="Minutes of CPU time for each reader.")
    parser.add_argument(
        "--kinds", nargs="+", default=[], help="Only inputs with one of these words."
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    import wandb  # noqa: F401  all imported once, before the forks

    import magnet_train.audiocraft.convert
    import magnet_train.checks.doctor
    import magnet_train.cli.fit
    import magnet_train.cli.generate
    import magnet_train.data.tokenize
    import magnet_train.evaluation.evaluate
    from magnet_train.codec.base import load_codec
    from magnet_train.conditioning import load_text_encoder

    load_codec("demo")
    load_text_encoder("demo")  # with the parts of transformers that it needs
    _cache_field_docs()
    magnet_train.cli.fit.build_without_training(SMALL_FIT, [])

    if given.fuzz is not None:
        return int(fuzz(given.only, given.fuzz, given.out))
    return int(table(given.only, given.kinds, given.out) > 0)


if __name__ == "__main__":
    sys.exit(main())
