"""Programs: stand-ins for some that are found on the path, and how long one may take."""

from pathlib import Path

LONGEST_S = 1000
"""Seconds after which a program that a test launches hangs, whatever else the machine does. A test gets more, so that
this limit, which says what hangs, comes first."""


def program(path: Path, script: str) -> None:
    """A bash script that can be called."""
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
