"""Stand-ins for programs that are found on the path."""

from pathlib import Path


def program(path: Path, script: str) -> None:
    """A bash script that can be called."""
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
