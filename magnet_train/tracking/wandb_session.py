"""A W&B session: login, environment variables, and its end."""

import os
import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from magnet_train.common import private_api
from magnet_train.common.errors import UserError
from magnet_train.common.folders import write_text

REMEDY = "set another WANDB_API_KEY, or WANDB_MODE=offline and `wandb sync` later, or --trainer.logger false"


# --- before a run begins ------------------------------------------------------------------------------------------


def prepare_wandb(folder: Path, verb: str, goes_on: bool, online: bool, uploads: bool = False) -> None:
    """Sets W&B's environment variables for this process, as far as they are not set, and tries the key.

    A training run has one id, kept in `wandb_run_id` in its folder, so that its sessions are one run of W&B, online
    and offline. What artifacts hold waits in the run folder until it is sent: W&B's own place for it is the home
    folder, which is small on clusters, and not where the run is synchronised from.

    Args:
        folder: of the run.
        verb: fit, validate …; only `fit` has an id of its own.
        goes_on: whether a checkpoint is gone on from, if there is one.
        online: whether a logger may want the network; WANDB_MODE has a say in it.
        uploads: whether checkpoints are sent at the end, which may take an hour.

    Raises:
        UserError: see `check_key`.
    """
    values = {
        "WANDB_PROJECT": "magnet_train",
        "WANDB_JOB_TYPE": verb,
        "WANDB_DATA_DIR": str((folder / "wandb").absolute()),
        "WANDB_X_SERVICE_WAIT": "300",  # seconds in which its service must start; 30 by default, too few on a busy disk
        "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1",  # seconds of rows that a SIGKILL may cost; 15 by default
        "WANDB_FINISH_TIMEOUT": "0" if uploads else "900",  # seconds; 0 = W&B tries for as long as it likes
        "WANDB_FINISH_TIMEOUT_RAISES": "true",
    }
    file = folder / "wandb_run_id"
    known = verb == "fit" and goes_on and file.is_file()
    if "WANDB_SWEEP_ID" not in os.environ:  # whose agent names its runs
        values["WANDB_NAME"] = folder.resolve().name
        if verb == "fit" and rank_zero_only.rank == 0:
            values["WANDB_RUN_ID"] = file.read_text().strip() if known else secrets.token_hex(5)
            values["WANDB_RESUME"] = "allow"
    for name, value in values.items():
        os.environ.setdefault(name, value)
    if rank_zero_only.rank != 0:
        return
    if online:
        check_key(folder, known)
    if verb == "fit":
        write_text(file, f"{os.environ.get('WANDB_RUN_ID', '')}\n")


def check_key(folder: Path, goes_on: bool) -> None:
    """Whether W&B takes the run, found out within seconds and before anything is trained.

    Without a key a run is logged offline. A key that is refused, or a server that is not to be reached, ends a run that
    begins; one that goes on, perhaps requeued at night, does so offline, and its W&B run loses nothing by that.

    Args:
        folder: of the run.
        goes_on: whether it is not its first session.

    Raises:
        UserError: if the key is refused or the server is not to be reached.
    """
    import wandb

    state, why = try_key()
    if state in ("online", "off"):
        return
    if state == "refused" and not goes_on:
        raise UserError(f"W&B: {why}; {REMEDY}")
    wandb.setup().settings.mode = "offline"
    rank_zero_warn(f"W&B: {why}; this run is logged offline, and `wandb sync {folder / 'wandb'}` sends it")


def try_key() -> tuple[Literal["online", "off", "no key", "refused"], str]:
    """Whether W&B can be online by its own settings, wherever they stand, and words for it.

    `off` is a mode that needs no network, which is then the text; `refused` is a key that the server does not take, or
    a server that is not to be reached. A key is shown to the server, which takes seconds where that does not answer.
    """
    import wandb
    from wandb.errors import CommError

    settings = wandb.setup().settings
    if settings.mode not in ("online", "run", "shared"):
        return "off", settings.mode
    try:
        with _answers_in_time(settings):
            if wandb.login(verify=True, prompt=False):  # a question would wait all night for an answer
                return "online", settings.base_url
    except CommError as error:
        return "refused", f"the key is refused, or there is no network ({' '.join(str(error).split()).rstrip('.')})"
    return "no key", "no API key (`wandb login` sets one)"


@contextmanager
def _answers_in_time(settings: Any) -> Iterator[None]:
    """W&B's service process tries twice, each time for WANDB_HTTP_TIMEOUT seconds, and says why it failed.

    Left to itself it tries for minutes, and `wandb.login` stops waiting after WANDB_HTTP_TIMEOUT. What it says then is
    that the service is busy; and a process that ends soon after may wait ten minutes for the service to end (wandb
    0.31, a third of the times). A server that asks for a long pause (Retry-After) still has that happen.
    """
    from wandb.env import HTTP_TIMEOUT, get_http_timeout

    attempt = get_http_timeout(10)
    quick = private_api.quick_requests(attempt)
    before = {name: getattr(settings, name) for name in quick}
    waits = os.environ.get(HTTP_TIMEOUT)
    try:
        for name, value in quick.items():
            setattr(settings, name, value)
        os.environ[HTTP_TIMEOUT] = str(2 * attempt + 10)  # not the first to give up
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)
        os.environ.pop(HTTP_TIMEOUT)
        if waits is not None:
            os.environ[HTTP_TIMEOUT] = waits


IN_A_HURRY_S = 60.0
"""Seconds that W&B gets of a run that has to end: its GPUs are wanted elsewhere, or other ranks wait for it."""


def finish_wandb(status: int, in_a_hurry: bool = False) -> None:
    """Ends this process's W&B run, if it has one, and says how to send what could not be sent.

    Args:
        status: exit status of the process, of which W&B is told.
        in_a_hurry: within a minute, whatever WANDB_FINISH_TIMEOUT says. If not all is sent by then this ends the
            process, at whose exit W&B would go on trying.
    """
    wandb: Any = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    again = f"it is kept, and `wandb sync --include-online {wandb.run.settings.sync_dir}` sends it"
    if not in_a_hurry:
        _finish(wandb, status, again)
        return
    finishing = threading.Thread(target=_finish, args=(wandb, status, again), daemon=True)
    finishing.start()
    finishing.join(IN_A_HURRY_S)
    if finishing.is_alive():
        rank_zero_warn(f"W&B: not all was sent within {IN_A_HURRY_S:g} s; {again}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _finish(wandb: Any, status: int, again: str) -> None:
    settings = wandb.run.settings
    try:
        wandb.finish(exit_code=status)
    except TimeoutError:
        wandb.teardown(exit_code=status)  # which writes what its service still holds
        rank_zero_warn(f"W&B: not all was sent within {settings.finish_timeout:g} s; {again}")
    except Exception as error:  # its service was killed, as by a signal to all processes
        rank_zero_warn(f"W&B: not all may have been sent ({type(error).__name__}: {error}); {again}")


# --- while it runs ------------------------------------------------------------------------------------------------
