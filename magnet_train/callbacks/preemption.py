"""On SIGTERM or SIGUSR1, saves a checkpoint and ends the run within a few batches."""

import os
import signal
import subprocess
import threading
import time
from functools import partial
from types import FrameType
from typing import Any

import lightning.pytorch as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback

from magnet_train.callbacks.agreement import ranks_agree
from magnet_train.common import private_api
from magnet_train.data.timed_loader import SIGNAL_WINDOW_S

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """Ends the process with status 0 after the checkpoint was saved.

    Launchers treat any other status as a failure: they kill the other ranks and count a retry. The
    status is 1 only if SLURM did not requeue the job. Only finished runs have a `summary.json`.
    """


class Preemption(Callback):
    """Saves `last.ckpt` at the end of the batch in which a signal arrives, then stops.

    Several ranks agree on this every 5 batches, because each time they wait for the device.

    During a validation the signal takes effect at its end, because ranks have different numbers of
    validation batches and cannot agree earlier. A second signal, more than SIGNAL_WINDOW_S later,
    ends the process at once unless it is saving.

    The handler only sets a flag: saving a checkpoint inside it could interrupt a step (Lightning
    issue 21406). All ranks stop if any of them received the signal. Under SLURM with automatic
    requeue, the requeue signal also requeues the job. Lightning's own handler would save to a file
    that every later start prefers, even if it is older than `last.ckpt`.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._received_at = 0.0
        self._requeue_signal: int | None = None
        self._handlers: dict[int, Any] = {}
        """The handlers before ours."""
        self._is_first_rank = False
        self._is_saving = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Handle signals from here on, because the validation before training may take long."""
        self._handle_signals(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._handle_signals(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        if not ranks_agree(trainer):
            return
        any_rank = partial(trainer.strategy.reduce_boolean_decision, all=False)
        if not any_rank(self._received is not None):
            return
        saved = self._save(trainer)
        requeues = any_rank(
            self._requeue_signal is not None and self._received == self._requeue_signal
        )
        # SLURM then signals all processes, which must not interrupt the end of the W&B session.
        if requeues:
            for number in self._handlers:
                signal.signal(number, signal.SIG_IGN)
            self._handlers = {}
            private_api.keep_signal_handlers(trainer)
        if trainer.is_global_zero:
            name = (
                signal.Signals(self._received).name
                if self._received
                else "a signal to another rank"
            )
            what_next, is_requeued = (
                _requeue() if requeues else ("resume with --ckpt_path auto", True)
            )
            print(
                f"stopped at step {trainer.global_step} by {name}: {saved}; {what_next}", flush=True
            )
            if not is_requeued:  # the job script may do it
                raise Preempted(1)
        if private_api.waits_for_results(trainer):
            raise RuntimeError(
                f"ranks of ddp_fork and ddp_spawn cannot exit without a failure: {saved}"
            )
        raise Preempted(0)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._restore_handlers()

    def _handle_signals(self, trainer: L.Trainer) -> None:
        """Replace Lightning's handlers: its SIGTERM handler runs a collective."""
        # Python sets handlers only in the main thread.
        is_main_thread = threading.current_thread() is threading.main_thread()
        if self._handlers or not is_main_thread:
            return
        self._is_first_rank = trainer.is_global_zero
        environment = private_api.cluster_environment(trainer)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = environment.requeue_signal
        for number in {*SIGNALS, self._requeue_signal} - {None}:
            self._handlers[number] = signal.signal(number, self._on_signal)

    def _save(self, trainer: L.Trainer) -> str:
        """Save the checkpoint; returns a message."""
        if not trainer.global_step:
            return "nothing to save, no step was finished"
        checkpoints: Any = trainer.checkpoint_callback
        self._is_saving = True
        checkpoints.save_last(trainer)
        self._is_saving = False
        return f"saved {checkpoints.last_model_path}"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received = number
            self._received_at = now
        elif now - self._received_at > SIGNAL_WINDOW_S and not self._is_saving:
            # Second signal during a validation.
            if self._received == self._requeue_signal and self._is_first_rank:
                print(f"ended before a checkpoint could be saved: {_requeue()[0]}", flush=True)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            # Otherwise Lightning has already restored its own.
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, handler)
        self._handlers = {}


def _requeue() -> tuple[str, bool]:
    """Ask SLURM to requeue this job or array task; returns a message and whether it will."""
    job = os.environ["SLURM_JOB_ID"]
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    name = job if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True)
    except OSError as error:
        return (
            f"job {name} could not be requeued ({error}): submit it again, unless the job script "
            "does",
            False,
        )
    if done.returncode:
        reason = " ".join(done.stderr.split())[:300]
        return (
            f"SLURM does not requeue job {name} ({reason}): submit it again, unless the job "
            "script does",
            False,
        )
    return f"job {name} is requeued", True
