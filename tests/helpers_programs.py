"""Fake programs on the path, and time limits for processes."""

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

LONGEST_S = 1000
"""Seconds after which a program that a test launches hangs, whatever else the machine does. A test
gets more, so that this limit, which says what hangs, comes first."""


def wait_for(happened: Callable[[], object], what: str) -> None:
    """Wait for a condition that another process or thread fulfils."""
    deadline = time.monotonic() + LONGEST_S
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


def program(path: Path, script: str) -> None:
    """Write an executable bash script."""
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def attempt(arguments: list[str], log: Path, environment: Mapping[str, str] | None = None) -> int:
    """Starts the command in a new process group; returns its id."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    os.environ.update(environment or {})
    # Lightning reads the rank when it is imported, which was before the fork.
    rank_zero_only.rank = int(os.environ.get("RANK", "0"))
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    # The test's streams would capture the output.
    sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, closefd=False) for n in (1, 2))
    warnings.showwarning = lambda message, category, *_: print(
        f"{category.__name__}: {message}", file=sys.stderr
    )  # or the test would collect it
    status = 1
    try:
        from magnet_train.__main__ import main

        status = main(arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child: int, within_s: float) -> int | None:
    """Exit status, or None if the process still runs after this time."""
    end = time.monotonic() + within_s
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.002)
