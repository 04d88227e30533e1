"""Tiny interrupted runs, and their comparison with an uninterrupted run."""

import json
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from helpers_data import make_data_codec, write_shards
from lightning.pytorch.callbacks import Callback


class Ledger(Callback):
    """Records each batch and its result, and injects faults at given positions."""

    def __init__(  # noqa: PLR0913  each is one disturbance
        self,
        file: str,
        stop_at: int = -1,
        stop_in_validation: int = -1,
        save_at: int = -1,
        bad_losses: tuple[int, ...] = (),
        bad_gradients: tuple[int, ...] = (),
        signal_at: int = -1,
        signal: int = 0,
        lasts_s: float = 0.0,
        stop_rank: int = -1,
        hog_at: int = -1,
    ):
        """Batches are counted from 0 over the whole run, validations by the step before them; -1 =
        never.

        All ranks stop, or only `stop_rank`; at `hog_at` the last rank allocates 800 MB.
        """
        self.file, self.save_at = Path(file), save_at
        self.stop_at, self.stop_in_validation = stop_at, stop_in_validation
        self.bad_losses, self.bad_gradients = bad_losses, bad_gradients
        self.signal_at, self.signal, self.lasts_s = signal_at, signal, lasts_s
        self.stop_rank, self.hog_at = stop_rank, hog_at

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ):
        count = trainer.fit_loop.total_batch_idx
        if count == self.stop_at and self.stop_rank in (-1, trainer.global_rank):
            raise RuntimeError("as planned")
        is_last = trainer.global_rank == trainer.world_size - 1
        if count == self.signal_at and is_last:
            os.kill(os.getpid(), self.signal)
        if count == self.hog_at and is_last:
            self.hog = torch.ones(200_000_000)
        time.sleep(self.lasts_s)

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor
    ):
        if trainer.fit_loop.total_batch_idx in self.bad_losses and trainer.is_global_zero:
            loss.data.fill_(float("nan"))

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule):
        if trainer.fit_loop.total_batch_idx in self.bad_gradients and trainer.is_global_zero:
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            grads[0].fill_(float("inf"))

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any):
        if trainer.global_step == self.stop_in_validation and self.stop_rank in (
            -1,
            trainer.global_rank,
        ):
            raise RuntimeError("as planned")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any
    ):
        count = trainer.fit_loop.total_batch_idx
        line = {"batch": count, "rank": trainer.global_rank, "keys": batch["keys"]}
        line["captions"], line["codes"] = batch["captions"], int(batch["codes"].sum())
        line["loss"] = outputs["loss"].item().hex()
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if count == self.save_at:
            folder = trainer.checkpoint_callback.dirpath  # type: ignore
            trainer.save_checkpoint(Path(folder) / "between.ckpt")

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any
    ):
        with self.file.with_suffix(".validated").open("a") as file:
            file.writelines(
                f"{trainer.global_step} {trainer.global_rank} {key}\n" for key in batch["keys"]
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule):
        if trainer.is_global_zero:
            with self.file.with_suffix(".validations").open("a") as file:
                ce = trainer.callback_metrics["val/ce"].item().hex()
                file.write(f"{trainer.global_step} {ce}\n")


def make_data(folder: Path) -> Path:
    """A codec and shards of 24 crops of two seconds; returns the folder."""
    codec = make_data_codec(folder / "codec")
    write_shards(folder / "train", codec, (5, 3, 4, 5, 3, 4))
    write_shards(folder / "validation", codec, (2,))
    return folder


def arguments(data: Path, run: Path, *options: str, **ledger: Any) -> list[str]:
    """Arguments of a fit, which later options may override; the ledger is in the run folder."""
    run.mkdir(parents=True, exist_ok=True)
    config = run.parent / f"{run.name}.json"
    ledger = {"file": str(run / "ledger.jsonl")} | ledger
    callbacks = [{"class_path": "helpers_resume.Ledger", "init_args": ledger}]
    config.write_text(json.dumps({"trainer": {"callbacks": callbacks}}))
    return [
        *(
            f"fit --config={config} --model.codec={data / 'codec'} --data.train={data / 'train'} "
            f"--data.validation={data / 'validation'} --trainer.default_root_dir={run} "
            "--ckpt_path=auto --model.network.dim=16 --model.network.num_heads=2 "
            "--model.network.num_layers=1 --model.crop_s=1.0 --model.optimizer.warmup_steps=1 "
            "--model.optimizer.lr=0.01 --data.batch_size=2 --data.num_workers=0 "
            "--averaging.every_n_steps=2 --averaging.decay=0.9 "
            "--checkpoint.every_n_train_steps=2 --trainer.accelerator=cpu --trainer.max_steps=8 "
            "--trainer.val_check_interval=1000 --trainer.logger=false "
            "--trainer.enable_progress_bar=false --trainer.enable_model_summary=false "
            "--trainer.num_sanity_val_steps=0 --trainer.gradient_clip_val=1.0 "
            "--generation.num_prompts=0 --generation.at_start=false"
        ).split(),
        *options,
    ]


def ledger(run: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """Lines by (batch, rank); a repeated batch must be equal.

    A truncated last line is from a killed batch.
    """
    lines: dict[tuple[int, int], dict[str, Any]] = {}
    for text in (run / "ledger.jsonl").read_text().split("\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        assert lines.setdefault((line["batch"], line["rank"]), line) == line
    return lines


def outcome(run: Path) -> dict[str, Any]:
    """The final state to compare: raw and averaged weights, optimizer, schedule, counters."""
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    loops = saved["loops"]["fit_loop"]
    names = (
        "state_dict",
        "current_model_state",
        "averaging_state",
        "optimizer_states",
        "lr_schedulers",
    )
    callbacks = {
        k.split("{")[0]: v
        for k, v in saved["callbacks"].items()
        if not k.startswith("RunCheckpoint")
    }
    return {name: saved[name] for name in names} | {
        "step": saved["global_step"],
        "batches": {
            k: loops["epoch_loop.batch_progress"]["total"][k] for k in ("ready", "processed")
        },
        "logged": loops["epoch_loop.state_dict"],
        "callbacks": callbacks,
    }


def differences(one: Any, two: Any, at: str = "") -> list[str]:
    """Keys at which two final states are not bit-identical."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return [d for key in one for d in differences(one[key], two[key], f"{at}/{key}")]
    if isinstance(one, (list, tuple)) and type(one) is type(two) and len(one) == len(two):
        return [
            d
            for i, (a, b) in enumerate(zip(one, two, strict=True))
            for d in differences(a, b, f"{at}/{i}")
        ]
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape
        return [] if same and torch.equal(one, two) else [at]
    return [] if type(one) is type(two) and one == two else [f"{at}: {one!s:.60} and {two!s:.60}"]
