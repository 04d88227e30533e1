"""SIGTERM and SIGUSR1 end a run within a batch, with a checkpoint."""

import os
import signal
import subprocess
import threading
import time
from types import FrameType
from typing import Any

import lightning.pytorch as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback

from magnet_train.common import private_api
from magnet_train.data.timed_loader import TOGETHER_S

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """Ends the process with status 0: what the signal asked for is done, and nothing is lost.

    A launcher takes any other status for a failure, ends the other ranks in the middle of their ending, and counts it
    as one of its retries; so it is 1 only where the job should be queued again and could not be. A run that is
    finished, and not only stopped, leaves `summary.json`.
    """


class Preemption(Callback):
    """Saves `last.ckpt` at the end of the batch in which a signal arrives, then stops.

    A signal that arrives in a validation waits for its end, since ranks have unequal numbers of validation batches and
    cannot agree before; a second one, more than TOGETHER_S later, ends the process at once unless it is saving.

    The handler only notes the signal: a checkpoint written from within it could catch a step half done (Lightning
    issue 21406). The ranks agree, whichever of them was told. Under SLURM with automatic requeue the requeue signal has
    the job queued again too. Lightning's own handler would save to a file that every later start prefers, however far
    the run has come since; here it is `last.ckpt` like any other.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._received_at = 0.0
        self._requeue_signal: int | None = None
        self._before: dict[int, Any] = {}
        self._is_first_rank = False
        self._is_saving = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Of the untrained model, or the sanity check: they may be long."""
        self._take_signals(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._take_signals(trainer)

    def _take_signals(self, trainer: L.Trainer) -> None:
        """Over from Lightning, whose handler of SIGTERM calls a collective from within itself."""
        if self._before or threading.current_thread() is not threading.main_thread():  # Python takes no handlers there
            return
        self._is_first_rank = trainer.is_global_zero
        environment = private_api.cluster_environment(trainer)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = environment.requeue_signal
        for number in {*SIGNALS, self._requeue_signal} - {None}:
            self._before[number] = signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        agree = trainer.strategy.reduce_boolean_decision
        if not agree(self._received is not None, all=False):
            return
        text = "nothing to save, no step was finished"
        if trainer.global_step:
            saver: Any = trainer.checkpoint_callback
            self._is_saving = True
            saver.save_last(trainer)
            self._is_saving = False
            text = f"saved {saver.last_model_path}"
        requeue = agree(self._requeue_signal is not None and self._received == self._requeue_signal, all=False)
        if requeue:  # upon which SLURM tells all processes to end, and that shall not cut W&B's last seconds short
            for number in self._before:
                signal.signal(number, signal.SIG_IGN)
            self._before = {}
            private_api.keep_signal_handlers(trainer)
        if trainer.is_global_zero:
            name = signal.Signals(self._received).name if self._received else "a signal to another rank"
            after, is_done = _requeue() if requeue else ("go on with --ckpt_path auto", True)
            print(f"stopped at step {trainer.global_step} by {name}: {text}; {after}", flush=True)
            if not is_done:  # the job file may be able to
                raise Preempted(1)
        if private_api.waits_for_results(trainer):
            raise RuntimeError(f"ddp_fork and ddp_spawn know no exit of their ranks without a failure: {text}")
        raise Preempted(0)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received, self._received_at = number, now
        elif now - self._received_at > TOGETHER_S and not self._is_saving:
            if self._received == self._requeue_signal and self._is_first_rank:  # the time is up in a validation
                print(f"ended before a checkpoint could be written: {_requeue()[0]}", flush=True)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:  # else Lightning has put back what was there before itself
                signal.signal(number, handler)
        self._before = {}


def _requeue() -> tuple[str, bool]:
    """Has SLURM queue this job, or this task of its array, again; what came of it, and whether it is done."""
    job, array = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_JOB_ID")
    name = job if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True)
    except OSError as error:
        return f"job {name} could not be queued again ({error}): submit it, unless the job file does", False
    if done.returncode:
        why = " ".join(done.stderr.split())[:300]
        return f"SLURM does not queue job {name} again ({why}): submit it, unless the job file does", False
    return f"job {name} is queued again", True
