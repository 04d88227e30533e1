"""Several ranks on one machine: processes forked from this one, with all modules imported."""

import itertools
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

from helpers_programs import LONGEST_S, attempt, ended

import magnet_train.cli.fit  # noqa: F401

_numbers = itertools.count(os.getpid())


def free_port() -> int:
    """A port below the kernel's ephemeral range, so no other process takes it before the ranks
    start."""
    while True:
        port = 20_000 + next(_numbers) % 10_000
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def torchrun_environment(ranks: int) -> list[dict[str, str]]:
    """torchrun's environment variables for each process of one node."""
    port = str(free_port())
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "test",
        }
        for rank in range(ranks)
    ]


def fit_on_ranks(
    ranks: int, arguments: list[str], log: Path, within_s: float = LONGEST_S
) -> tuple[list[int], str]:
    """Runs `python -m magnet_train ARGUMENTS` on several ranks; returns exit statuses and output.

    Ranks are not ended if another has failed, unlike with a launcher.

    Raises:
        TimeoutError: if a rank hangs; all ranks are killed.
    """
    arguments = [*arguments, f"--trainer.devices={ranks}"]
    logs = [log.with_suffix(f".{rank}.log") for rank in range(ranks)]
    environments = torchrun_environment(ranks)
    children = [attempt(arguments, file, own) for file, own in zip(logs, environments, strict=True)]
    try:
        end = time.monotonic() + within_s
        found = [ended(child, max(0.0, end - time.monotonic())) for child in children]
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
    text = "".join(f"--- {file.name}\n{file.read_text()}" for file in logs)
    statuses = [status for status in found if status is not None]
    if len(statuses) < ranks:
        raise TimeoutError(f"after {within_s} s: {found}\n{text[-3000:]}")
    return statuses, text
