"""Private parts of Lightning, jsonargparse, wandb and torch that this package uses.

Functions are named after their purpose; section headings give the version that was checked.
tests/test_private_api.py calls all of them, so that it fails if an update removes one. The parser
of all verbs needs this file, so torch is imported only where it is called.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    import lightning.pytorch as L
    import torch
    from torch import Tensor

# --- Lightning 2.6.6: trainer ---------------------------------------------------------------------


def attached_trainer(module: L.LightningModule) -> L.Trainer | None:
    """The module's trainer; None without one, where the public property raises."""
    return module._trainer


def cluster_environment(trainer: L.Trainer) -> Any:
    """The environment that Lightning detected: SLURM, torchrun …"""
    return trainer._accelerator_connector.cluster_environment


def keep_signal_handlers(trainer: L.Trainer) -> None:
    """Keep Lightning from restoring the signal handlers that it replaced."""
    trainer._signal_connector._original_handlers = {}


def omit_sigterm_broadcast(trainer: L.Trainer) -> None:
    """Disable Lightning's exchange, in every batch, of whether a rank received SIGTERM.

    It waits for the device, and our handler replaces Lightning's.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None


def waits_for_results(trainer: L.Trainer) -> bool:
    """Whether ranks were forked or spawned by a launcher that waits for each of them forever."""
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def kill_launched_ranks(trainer: L.Trainer) -> None:
    """Kill the ranks that this process started as scripts; they might wait for it for long."""
    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        for process in launcher.procs:
            process.kill()
        # Lightning's monitor of these processes would kill this one before it prints the error.
        launcher.procs.clear()


def saves_distributed_checkpoints(trainer: L.Trainer) -> bool:
    """Whether ModelParallelStrategy writes a checkpoint as a folder of shards."""
    return bool(getattr(trainer.strategy, "_save_distributed_checkpoint", False))


# --- Lightning 2.6.6: what is logged --------------------------------------------------------------


def forget_logged(trainer: L.Trainer) -> None:
    """Drop values of `self.log` from earlier training batches, which would be logged again."""
    results = trainer.fit_loop.epoch_loop._results
    if not all(metric.has_reset for metric in results.values()):
        results.reset()


def unwritten_row(trainer: L.Trainer) -> dict[str, Any] | None:
    """`values` and `step` that loggers will get for the current batch; None if nothing is due."""
    loop = trainer.fit_loop.epoch_loop
    counts: Any = loop.batch_progress.current
    is_batch_ending = trainer.training and counts.completed < counts.processed
    if (
        not is_batch_ending
        or loop._should_accumulate()
        or not trainer._logger_connector.should_update_logs
    ):
        return None
    values = {
        name: float(value) for name, value in trainer._logger_connector.metrics["log"].items()
    }
    return {"values": values, "step": loop._batches_that_stepped}


# --- Lightning 2.6.6: progress in a checkpoint ----------------------------------------------------


def failed_while_restoring(error: BaseException) -> bool:
    """Whether an error was raised while Lightning restored the state of a checkpoint."""
    frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(
        code.co_filename.endswith("checkpoint_connector.py") and "restore" in code.co_name
        for code in frames
    )


class Progress:
    """Batch counters in a checkpoint of `fit`, which Lightning restores; changed in place."""

    def __init__(self, checkpoint: Mapping[str, Any]):
        loops = checkpoint["loops"]["fit_loop"]
        self._training: dict[str, Any] = loops["epoch_loop.batch_progress"]
        self._validation: dict[str, Any] = loops["epoch_loop.val_loop.batch_progress"]
        self._loop: dict[str, Any] = loops["epoch_loop.state_dict"]

    @property
    def num_batches(self) -> int:
        """Batches of this rank completed so far."""
        return self._training["total"]["processed"]

    def is_at_batch_end(self) -> bool:
        """Whether it was saved at the end of a batch, before the batch counts as completed."""
        return self._training["total"]["completed"] == self.num_batches - 1

    def move_to_batch_end(self, num_batches: int) -> None:
        """Set the counters as if saved at the end of batch `num_batches` of the run."""
        difference = num_batches - self.num_batches
        for counts in (self._training["total"], self._training["current"]):
            done = max(0, counts["processed"] + difference)
            counts |= {
                "ready": done,
                "started": done,
                "processed": done,
                "completed": max(0, done - 1),
            }
        self._training["is_last_batch"] = False

    def complete_batch(self) -> None:
        """Set the counters as if the current batch were completed."""
        for counts in (self._training["total"], self._training["current"]):
            counts["completed"] = counts["processed"]

    def set_validation(self, num_started: int) -> None:
        """Set the counters to `num_started` started and no completed validation batches."""
        for counts in (self._validation["total"], self._validation["current"]):
            counts |= {"ready": num_started, "started": num_started, "processed": 0, "completed": 0}

    def take_back_logged_step(self) -> None:
        """Let the step that was in progress be logged again."""
        self._loop["_batches_that_stepped"] -= 1


# --- jsonargparse 4.53 ----------------------------------------------------------------------------


def parse_without_defaults(parser: Any, args: list[str]) -> Any:
    """Options given by files and flags, without defaults and linked options, not yet validated."""
    from jsonargparse import ArgumentParser
    from jsonargparse._link_arguments import skip_apply_links

    with skip_apply_links():
        return ArgumentParser.parse_args(parser, args, defaults=False, _skip_validation=True)


def list_options(kind: Any) -> dict[str, tuple[type, Any, str]]:
    """Fields of a dataclass that are lists: type of an item, default and help text by name."""
    from jsonargparse._parameter_resolvers import get_signature_parameters

    texts = {parameter.name: parameter.doc for parameter in get_signature_parameters(kind)}
    lists = {}
    for field in fields(kind):
        hint: Any = get_type_hints(kind)[field.name]
        if get_origin(hint) is list:
            default: Any = field.default_factory
            lists[field.name] = (get_args(hint)[0], default(), texts[field.name] or "")
    return lists


def all_actions(parser: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A parser's actions, including subcommands', each with its name: `fit.trainer.max_steps`."""
    for action in parser._actions:
        for name, inner in (getattr(action, "_name_parser_map", None) or {}).items():
            yield from all_actions(inner, f"{prefix}{name}.")
        yield f"{prefix}{action.dest}", action


def options_that_need_a_value(parser: Any) -> Iterator[str]:
    """Options whose type excludes null; the parser accepts null for all."""
    for name, action in all_actions(parser):
        hint = getattr(action, "_typehint", None)
        takes_null = hint in (None, Any, type(None)) or type(None) in get_args(hint)
        if not takes_null and action.default is not None:
            yield name


def option_groups(parser: Any) -> Iterator[str]:
    """Groups of options; the parser accepts numbers and lists for them."""
    from jsonargparse._actions import _ActionConfigLoad

    return (name for name, a in all_actions(parser) if isinstance(a, _ActionConfigLoad))


def boolean_options(parser: Any) -> Iterator[str]:
    """Options that take true or false, with dashes."""
    for _, action in all_actions(parser):
        hint = getattr(action, "_typehint", None)
        if hint is bool or set(get_args(hint)) == {bool, type(None)}:
            yield from action.option_strings


# --- Lightning 2.6.6: console ---------------------------------------------------------------------


def count_steps_in_bar(trainer: L.Trainer) -> None:
    """Make the rich progress bar count the run's optimizer steps instead of an epoch's batches."""
    from lightning.pytorch.callbacks import RichProgressBar

    class StepBar(RichProgressBar):
        @property
        def total_train_batches(self) -> int | float:
            return self.trainer.max_steps if self.trainer.max_steps > 0 else math.inf

        def _get_train_description(self, current_epoch: int) -> str:
            return f"{'Training':<10}"

        def on_train_batch_end(
            self,
            trainer: L.Trainer,
            module: L.LightningModule,
            outputs: Any,
            batch: Any,
            batch_idx: int,
        ) -> None:
            step = trainer.global_step - 1
            super().on_train_batch_end(trainer, module, outputs, batch, step)

        def get_metrics(self, *args: Any) -> dict[str, Any]:
            return {k: v for k, v in super().get_metrics(*args).items() if k != "v_num"}

    # Lightning creates the bar, and refuses another one where it is switched off.
    if isinstance(bar := trainer.progress_bar_callback, RichProgressBar):
        bar.__class__ = StepBar


def omit_anonymous(logger: Any) -> None:
    """Remove a WandbLogger's unset `anonymous` setting, for which W&B prints a warning."""
    settings = getattr(logger, "_wandb_init", {})
    if settings.get("anonymous") is None:
        settings.pop("anonymous", None)


# --- lightning-utilities 0.15 ---------------------------------------------------------------------


def import_torchmetrics_alone() -> None:
    """Import torchmetrics without scipy, matplotlib and transformers, for metrics not used here.

    Their import takes a third of the time of `fit --help`. The metrics that need them are missing
    in this process.
    """
    from lightning_utilities.core import imports

    unused = ("scipy", "matplotlib", "transformers")
    requirement_cache, package_available = imports.RequirementCache, imports.package_available

    class Requirement(requirement_cache):
        def __bool__(self) -> bool:
            return not str(self.requirement).startswith(unused) and super().__bool__()

    patched: Any = imports
    patched.RequirementCache = Requirement
    patched.package_available = lambda name: name not in unused and package_available(name)
    try:
        import_module("torchmetrics")
    finally:
        patched.RequirementCache = requirement_cache
        patched.package_available = package_available


# --- Lightning 2.6.6: command line ----------------------------------------------------------------


@lru_cache
def lightning_cli() -> Any:
    """LightningCLI with its private hooks under public names."""
    from lightning.pytorch.cli import LightningCLI

    class Base(LightningCLI):
        def run_verb(self, run: Callable[[], None]) -> None:
            """Run the verb; may be overridden."""
            run()

        def subcommand_parser(self, verb: str) -> Any:
            return self._subcommand_parsers[verb]

        def _run_subcommand(self, subcommand: str) -> None:
            self.run_verb(lambda: super(Base, self)._run_subcommand(subcommand))

        def _parse_ckpt_path(self) -> None:
            """Disabled: Lightning would override the command line by the checkpoint's settings."""

    return Base


# --- torch 2.11 to 2.13 ---------------------------------------------------------------------------


def softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the scores from that of `weights`, their softmax over the last axis; float32."""
    import torch

    return torch.ops.aten._softmax_backward_data(grad.float(), weights, -1, torch.float32)


def allow_recompiles(number: int) -> None:
    """Allow at least this many compiled variants of a function."""
    import torch

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, number)


def set_last_lr(schedule: torch.optim.lr_scheduler.LRScheduler, lr: float) -> None:
    """Set the value of `get_last_lr` until the next step."""
    schedule._last_lr = [lr]


def memory_changes(profile: torch.profiler.profile) -> list[int]:
    """Bytes allocated (> 0) and freed (< 0) by tensors under `profile_memory=True`, in order."""
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events: list[Any] = profile.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]


def cpu_attention_flop() -> dict[Any, Callable[..., int]]:
    """`custom_mapping` for FlopCounterMode that counts the CPU's fused attention."""
    import torch
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
            q, k, v
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }


# --- wandb 0.31, wandb-workspaces 0.4 -------------------------------------------------------------


def continue_table(table: Any, num_parts: int, parts: list[str]) -> None:
    """Let an incremental `wandb.Table` continue after parts logged by an earlier session."""
    table._increment_num = num_parts
    table._previous_increments_paths = list(parts)


def quick_requests(timeout_s: int) -> dict[str, int]:
    """Settings of wandb for one retry per request, with this timeout."""
    return {
        "x_graphql_retry_max": 1,
        "x_graphql_timeout_seconds": timeout_s,
        "x_graphql_retry_wait_min_seconds": 1,
        "x_graphql_retry_wait_max_seconds": 1,
    }


def record_arguments_through(hide: Callable[[str], str]) -> None:
    """Let wandb record each argument of the command line as `hide` returns it.

    It copies them into its files and to its server, with the passwords in URLs.
    """
    from wandb.sdk.wandb_settings import Settings

    arguments = property(lambda settings: [hide(argument) for argument in sys.argv[1:]])
    Settings._args = arguments  # type: ignore


def name_workspace(workspace: Any, name: str) -> None:
    """Set the name in the workspace's URL."""
    workspace._internal_name = name


def replace_workspace(workspace: Any, saved: Any) -> None:
    """Let `workspace` overwrite `saved` when it is saved."""
    workspace._internal_id = saved._internal_id
