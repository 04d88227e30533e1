"""User errors: which errors are the user's, and their one-line messages."""

import errno
import os
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

from magnet_train.common.redact import redact

REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space and continue (fit: with --ckpt_path auto)",
    errno.EDQUOT: "disk quota exceeded; free some space and continue (fit: with --ckpt_path auto)",
    errno.EACCES: "permission denied; change its permissions, or choose another path",
    errno.EPERM: "not permitted; change its permissions, or choose another path",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EISDIR: "is a folder; give a file",
    errno.ENOTDIR: "a part of this path is a file; choose another path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ELOOP: "a symbolic link that leads to itself; give the file it should point to",
    errno.EMFILE: "too many open files; raise the limit with `ulimit -n`",
    errno.EADDRINUSE: "the port is in use; choose another, or unset MASTER_PORT",
}
"""Errors of the operating system that the user can fix."""


class UserError(Exception):
    """A user error: one line that names the file or option, its value and the remedy.

    The command line prints it without a traceback and exits with status 2. Passwords and signatures
    of URLs are removed from the text, because users paste error messages. Lines are joined, and
    control characters of untrusted names are escaped, because terminals interpret them.
    """

    def __init__(self, text: object = ""):
        shown = redact(text)
        if remote := _REMOTE.findall(shown):  # torch adds the traceback of a data worker
            shown = remote[-1]
        super().__init__(printable(" ".join(filter(None, map(str.strip, shown.split("\n"))))))


_REMOTE = re.compile(
    rf"^{re.escape(f'{UserError.__module__}.{UserError.__qualname__}')}: (.+)$", re.MULTILINE
)
"""A UserError in a traceback of another process."""


def printable(text: str) -> str:
    r"""The text with escaped control characters and lone surrogates.

    >>> printable("clip\x1b[31m.wav")
    'clip\\x1b[31m.wav'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def user_error_from(error: BaseException) -> UserError | None:
    """The user error that caused an exception; None if it is a bug, which keeps its traceback.

    User errors are UserErrors (also wrapped, or in the traceback of a data worker or another
    rank), settings that Lightning rejects, operating system errors with a remedy, rejections by
    W&B, and out of memory.
    """
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return cause
    if _REMOTE.search(str(error)):
        return UserError(error)
    for cause in _causes(error):
        text = _refusal(cause)
        if text is not None:
            return UserError(text)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, its causes and, unless suppressed, its contexts.

    An error of this package while it handled another is a bug; one of another library may be a
    consequence, as when Lightning cannot finish what failed.
    """
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        is_separate = cause.__suppress_context__ or _is_raised_here(cause)
        cause = cause.__cause__ or (None if is_separate else cause.__context__)


def _is_raised_here(error: BaseException) -> bool:
    """Whether an error was raised by a line of this package."""
    frames = traceback.extract_tb(error.__traceback__, -1)
    return bool(frames) and Path(frames[0].filename).is_relative_to(Path(__file__).parents[1])


REFUSALS = (
    (r"\S+\.MisconfigurationException: ", "{}"),  # Lightning's
    (r"builtins\.RuntimeError: .*in your SLURM bash script", "{}"),  # Lightning's
    (r"builtins\.ModuleNotFoundError: .*Try .*`pip install", "{}"),  # Lightning's loggers
    (r"builtins\.ValueError: .*value for environment variable", "{}"),  # jsonargparse's
    (r"wandb\.", "W&B: {}; or set WANDB_MODE=offline and `wandb sync` later"),
    (
        r"pydantic\S*\.ValidationError: ",  # W&B's
        "W&B: {}; correct the WANDB_ environment variable",
    ),
    (
        r"\S+\.(DistNetworkError|DistStoreError): ",
        "{}; check MASTER_ADDR and MASTER_PORT, and that all ranks were started",
    ),
    (
        r"\S+: DataLoader worker .* killed by signal: (Killed|Bus error)",
        "{} It lacked memory, or shared memory in /dev/shm: set a lower --data.num_workers, or "
        "request more memory",
    ),
)
"""User errors raised by other libraries: pattern of `module.Class: message`, and the line to print;
{} is the message."""


def _refusal(error: BaseException) -> str | None:
    """One line for a user error raised by another library; None for any other error."""
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return f"{error.filename or 'output'}: {REMEDIES[error.errno]}"
    kind, text = type(error), " ".join(str(error).split())[:300].partition(" [type=")[0]
    for pattern, line in REFUSALS:
        if re.match(pattern, f"{kind.__module__}.{kind.__name__}: {text}"):
            return line.format(text)
    no_memory = isinstance(error, MemoryError) or kind.__name__ == "OutOfMemoryError"
    if no_memory or "can't allocate memory" in text:
        where = "" if not text else f" ({text[:120]})"
        return f"out of memory{where}; choose a smaller batch, a shorter length or a smaller model"
    return None


def integer_from_environment(name: str, default: int = 0) -> int:
    """The integer in an environment variable.

    Args:
        name: name of the variable.
        default: value if it is not set or empty.

    Raises:
        UserError: if it is not an integer.
    """
    text = os.environ.get(name, "").strip()
    try:
        return int(text) if text else default
    except ValueError as error:
        raise UserError(f"{name}={text}: must be a whole number; unset it") from error
