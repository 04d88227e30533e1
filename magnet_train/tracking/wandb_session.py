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

LOGIN_HINT = (
    "set another WANDB_API_KEY, or WANDB_MODE=offline and `wandb sync` later, or --trainer.logger "
    "false"
)


# --- before a run starts --------------------------------------------------------------------------


def prepare_wandb(
    folder: Path, verb: str, resumes: bool, online: bool, uploads: bool = False
) -> None:
    """Sets those of W&B's environment variables that are not set, and checks the login.

    A training run has one id, kept in `wandb_run_id` in its folder, so that its sessions are one
    W&B run, online and offline. Files wait for their upload in the run folder: W&B's default is the
    home folder, which is small on clusters and not synchronised with the run.

    Args:
        folder: Run folder.
        verb: fit, validate …; only `fit` has an id of its own.
        resumes: Whether the run resumes from a checkpoint, if there is one.
        online: Whether a logger may need the network; WANDB_MODE may still forbid it.
        uploads: Whether checkpoints are uploaded at the end, which may take an hour.

    Raises:
        UserError: see `require_wandb_login`.
    """
    values = {
        "WANDB_PROJECT": "magnet_train",
        "WANDB_JOB_TYPE": verb,
        "WANDB_DATA_DIR": str((folder / "wandb").absolute()),
        # Seconds in which its service must start; 30 by default, too few on a busy disk.
        "WANDB_X_SERVICE_WAIT": "300",
        # Seconds of rows that a SIGKILL may cost; 15 by default.
        "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1",
        "WANDB_FINISH_TIMEOUT": "0" if uploads else "900",  # seconds; 0 = no limit
        "WANDB_FINISH_TIMEOUT_RAISES": "true",
    }
    file = folder / "wandb_run_id"
    is_known = verb == "fit" and resumes and file.is_file()
    if "WANDB_SWEEP_ID" not in os.environ:  # whose agent names its runs
        values["WANDB_NAME"] = folder.resolve().name
        if verb == "fit" and rank_zero_only.rank == 0:
            values["WANDB_RUN_ID"] = file.read_text().strip() if is_known else secrets.token_hex(5)
            values["WANDB_RESUME"] = "allow"
    for name, value in values.items():
        os.environ.setdefault(name, value)
    if rank_zero_only.rank != 0:
        return
    if online:
        require_wandb_login(folder, is_known)
    if verb == "fit":
        write_text(file, f"{os.environ.get('WANDB_RUN_ID', '')}\n")


def require_wandb_login(folder: Path, resumes: bool) -> None:
    """Checks within seconds, and before anything is trained, that W&B accepts the run.

    Without a key the run is logged offline. If login fails, a new run stops; a resumed run, perhaps
    requeued at night, continues offline, and its W&B run loses nothing by that.

    Args:
        folder: Run folder.
        resumes: Whether this is not the run's first session.

    Raises:
        UserError: if the key is refused or the server cannot be reached.
    """
    import wandb

    state, reason = check_wandb_login()
    if state in ("online", "off"):
        return
    if state == "refused" and not resumes:
        raise UserError(f"W&B: {reason}; {LOGIN_HINT}")
    wandb.setup().settings.mode = "offline"
    rank_zero_warn(
        f"W&B: {reason}; this run is logged offline, and `wandb sync {folder / 'wandb'}` uploads it"
    )


def check_wandb_login() -> tuple[Literal["online", "off", "no key", "refused"], str]:
    """Whether W&B can be online, and a text that says why, or where.

    `off`: its settings, wherever they are, name a mode without network, which is then the text.
    `refused`: the server does not accept the key or cannot be reached. Verifying a key takes
    seconds if the server does not answer.
    """
    import wandb
    from wandb.errors import CommError

    settings = wandb.setup().settings
    if settings.mode not in ("online", "run", "shared"):
        return "off", settings.mode
    try:
        with _quick_answers(settings):
            if wandb.login(
                verify=True, prompt=False
            ):  # a prompt would wait all night for an answer
                return "online", settings.base_url
    except CommError as error:
        return (
            "refused",
            "the key is refused, or there is no network "
            f"({' '.join(str(error).split()).rstrip('.')})",
        )
    return "no key", "no API key (`wandb login` sets one)"


@contextmanager
def _quick_answers(settings: Any) -> Iterator[None]:
    """W&B's service tries twice, each time for WANDB_HTTP_TIMEOUT seconds, and then says why it
    failed.

    By default it tries for minutes, and `wandb.login` stops waiting after WANDB_HTTP_TIMEOUT and
    reports only that the service is busy; a process that ends soon after may wait ten minutes for
    the service to end (wandb 0.31, a third of the times). That still happens if the server asks for
    a long pause (Retry-After).
    """
    from wandb.env import HTTP_TIMEOUT, get_http_timeout

    attempt_s = get_http_timeout(10)
    quick = private_api.quick_requests(attempt_s)
    before = {name: getattr(settings, name) for name in quick}
    timeout = os.environ.get(HTTP_TIMEOUT)
    try:
        for name, value in quick.items():
            setattr(settings, name, value)
        os.environ[HTTP_TIMEOUT] = str(
            2 * attempt_s + 10
        )  # so that `wandb.login` outlasts both attempts
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)
        os.environ.pop(HTTP_TIMEOUT)
        if timeout is not None:
            os.environ[HTTP_TIMEOUT] = timeout


# --- at its end -----------------------------------------------------------------------------------

FINISH_TIMEOUT_S = 60.0
"""Seconds for W&B's last uploads of a run that has to end: its GPUs are needed elsewhere, or other
ranks wait."""


def finish_wandb(status: int, quickly: bool = False) -> None:
    """Ends this process's W&B run, if it has one, and says how to upload what could not be
    uploaded.

    Args:
        status: Exit status of the process, which W&B shows.
        quickly: Whether within FINISH_TIMEOUT_S, whatever WANDB_FINISH_TIMEOUT says. If not all is
            uploaded by then this ends the process, at whose exit W&B would try again.
    """
    wandb: Any = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    remedy = (
        f"it is kept, and `wandb sync --include-online {wandb.run.settings.sync_dir}` uploads it"
    )
    if not quickly:
        _finish(wandb, status, remedy)
        return
    finishing = threading.Thread(target=_finish, args=(wandb, status, remedy), daemon=True)
    finishing.start()
    finishing.join(FINISH_TIMEOUT_S)
    if finishing.is_alive():
        rank_zero_warn(f"W&B: not all was uploaded within {FINISH_TIMEOUT_S:g} s; {remedy}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _finish(wandb: Any, status: int, remedy: str) -> None:
    settings = wandb.run.settings
    try:
        wandb.finish(exit_code=status)
    except TimeoutError:
        wandb.teardown(exit_code=status)  # which writes what its service still holds
        rank_zero_warn(f"W&B: not all was uploaded within {settings.finish_timeout:g} s; {remedy}")
    except Exception as error:  # its service was killed, as by a signal to all processes
        rank_zero_warn(
            f"W&B: not all may have been uploaded ({type(error).__name__}: {error}); {remedy}"
        )
