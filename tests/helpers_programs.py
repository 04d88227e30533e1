"""Programs: stand-ins for some that are found on the path, and how long one may take."""

import time
from collections.abc import Callable
from pathlib import Path

LONGEST_S = 1000
"""Seconds after which a program that a test launches hangs, whatever else the machine does. A test gets more, so that
this limit, which says what hangs, comes first."""


def wait_for(happened: Callable[[], object], what: str) -> None:
    """Until it has happened, which another process or thread sees to."""
    deadline = time.monotonic() + LONGEST_S
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


def program(path: Path, script: str) -> None:
    """A bash script that can be called."""
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
