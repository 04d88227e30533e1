"""A W&B session: login, environment variables and shutdown."""

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
from magnet_train.common.redact import redact

LOGIN_HINT = (
    "set another WANDB_API_KEY, or WANDB_MODE=offline and `wandb sync` later, or --trainer.logger "
    "false"
)


# --- before a run starts --------------------------------------------------------------------------


def wandb_loggers(given: Any) -> list[Any]:
    """Settings of the WandbLoggers in `trainer.logger`: one, a list, a boolean or None."""
    loggers = given if isinstance(given, list) else [given]
    return [
        logger.init_args
        for logger in loggers
        if str(getattr(logger, "class_path", "")).endswith(".WandbLogger")
    ]


def prepare_wandb(
    folder: Path, verb: str, resumes: bool, online: bool, uploads: bool = False
) -> None:
    """Set missing W&B environment variables, and check the login.

    The id of a training run is stored in `wandb_run_id` in its folder, so that all sessions are one
    W&B run, online and offline. Files to upload are kept in the run folder, not in the home folder
    (W&B's default), which is small on clusters.

    Args:
        folder: Run folder.
        verb: fit, validate …; only `fit` stores its id.
        resumes: Whether the run resumes from a checkpoint, if there is one.
        online: Whether a logger needs the network, unless WANDB_MODE disables it.
        uploads: Whether checkpoints are uploaded at the end, which may take an hour.

    Raises:
        UserError: see `check_wandb_environment` and `require_wandb_login`.
    """
    values = {
        "WANDB_PROJECT": "magnet_train",
        "WANDB_JOB_TYPE": verb,
        "WANDB_DATA_DIR": str((folder / "wandb").absolute()),
        # Timeout in seconds to start its service; the default of 30 is too short on a busy disk.
        "WANDB_X_SERVICE_WAIT": "300",
        # Seconds of rows that a SIGKILL may lose; the default is 15.
        "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1",
        "WANDB_FINISH_TIMEOUT": "0" if uploads else "900",  # seconds; 0 = no limit
        "WANDB_FINISH_TIMEOUT_RAISES": "true",
        # Its warnings and errors stay; the summary of `fit` has the address.
        "WANDB_SHOW_INFO": "false",
        "WANDB_QUIET": "true",
    }
    file = folder / "wandb_run_id"
    is_known = verb == "fit" and resumes and file.is_file()
    if "WANDB_SWEEP_ID" not in os.environ:  # a sweep's agent names its runs
        values["WANDB_NAME"] = folder.resolve().name
        if verb == "fit" and rank_zero_only.rank == 0:
            values["WANDB_RUN_ID"] = file.read_text().strip() if is_known else secrets.token_hex(5)
            values["WANDB_RESUME"] = "allow"
    for name, value in values.items():
        os.environ.setdefault(name, value)
    if rank_zero_only.rank != 0:
        return
    private_api.record_arguments_through(redact)
    check_wandb_environment()
    if online:
        require_wandb_login(folder, is_known)
    if verb == "fit":
        write_text(file, f"{os.environ.get('WANDB_RUN_ID', '')}\n")


def check_wandb_environment() -> None:
    """Check W&B's environment variables, which it reads only when the run begins.

    Raises:
        UserError: if one has a value that W&B refuses.
    """
    from wandb import Settings
    from wandb.errors import UsageError

    for name, value in os.environ.items():
        try:
            Settings().update_from_env_vars({name: value})
        except (ValueError, UsageError) as error:  # pydantic's has several lines
            reason = str(error).partition("[type=")[0].splitlines()[-1].strip()
            raise UserError(f"{name}={value[:80]}: {reason}; correct or unset it") from error


def require_wandb_login(folder: Path, resumes: bool) -> None:
    """Check the W&B login before training, within seconds.

    Without a key the run is logged offline. If login fails, a new run stops, but a resumed run
    continues offline, without losing data.

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
    """W&B's login status, and a text with the reason or the server.

    `off`: its settings select an offline mode, which is then the text. `refused`: the server
    rejects the key or cannot be reached, which is known after seconds.
    """
    import wandb
    from wandb.errors import CommError

    settings = wandb.setup().settings
    if settings.mode not in ("online", "run", "shared"):
        return "off", settings.mode
    try:
        with _quick_answers(settings):
            if wandb.login(verify=True, prompt=False):  # a prompt would block the run
                return "online", settings.base_url
    except CommError as error:
        return (
            "refused",
            "the key is refused, or the server cannot be reached "
            f"({' '.join(str(error).split()).rstrip('.')})",
        )
    return "no key", "no API key (`wandb login` sets one)"


@contextmanager
def _quick_answers(settings: Any) -> Iterator[None]:
    """Let W&B's service try twice, for WANDB_HTTP_TIMEOUT seconds each, and report the reason.

    By default it retries for minutes, while `wandb.login` stops after WANDB_HTTP_TIMEOUT and
    reports only that the service is busy. A process that exits soon after may then wait ten minutes
    for the service (wandb 0.31). This can still happen if the server sends a long Retry-After.
    """
    from wandb.env import HTTP_TIMEOUT, get_http_timeout

    attempt_s = get_http_timeout(10)
    quick = private_api.quick_requests(attempt_s)
    before = {name: getattr(settings, name) for name in quick}
    timeout = os.environ.get(HTTP_TIMEOUT)
    try:
        for name, value in quick.items():
            setattr(settings, name, value)
        # So that `wandb.login` outlasts both attempts.
        os.environ[HTTP_TIMEOUT] = str(2 * attempt_s + 10)
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)
        os.environ.pop(HTTP_TIMEOUT)
        if timeout is not None:
            os.environ[HTTP_TIMEOUT] = timeout


def run_location() -> str | None:
    """Address of this process's W&B run, or how to upload one that is offline, with the sessions
    before it; None = no run.
    """
    wandb: Any = sys.modules.get("wandb")
    if wandb is None or wandb.run is None or wandb.run.settings.mode == "disabled":
        return None
    # Asked for its address, an offline run prints a warning.
    sessions = Path(wandb.run.settings.sync_dir).parent
    return f"wandb sync {sessions}" if wandb.run.offline else wandb.run.url


# --- at its end -----------------------------------------------------------------------------------

FINISH_TIMEOUT_S = 60.0
"""Seconds for W&B's last uploads of a run that is preempted or failed."""


def finish_wandb(status: int, quickly: bool = False) -> None:
    """End this process's W&B run, if it has one, and print how to upload the rest.

    Args:
        status: Exit status of the process, shown by W&B.
        quickly: Use FINISH_TIMEOUT_S instead of WANDB_FINISH_TIMEOUT, and end the process
            afterwards, because W&B would try again at its exit.
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
        wandb.teardown(exit_code=status)  # writes the service's remaining data
        rank_zero_warn(f"W&B: not all was uploaded within {settings.finish_timeout:g} s; {remedy}")
    except Exception as error:  # e.g. its service was killed by a signal to all processes
        rank_zero_warn(
            f"W&B: not all may have been uploaded ({type(error).__name__}: {error}); {remedy}"
        )
