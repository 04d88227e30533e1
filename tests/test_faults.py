"""Faults in complete runs that no other test covers; benchmarks/faults.py has all of them."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers_programs import LONGEST_S


@pytest.mark.slow
def test_nothing_is_lost(python: str):
    script = Path(__file__).parents[1] / "benchmarks" / "faults.py"
    environment = os.environ | {"PYTHONPATH": str(script.parents[1])}
    faults = ["rank_hangs", "outage", "preempted"]
    done = subprocess.run(
        [python, script, "--only", *faults],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = [
        line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")
    ]
    assert [lost for _, _, lost in rows] == ["nothing"] * len(faults)
    # The stopped rank, or the waiting rank.
    assert re.search(r"rank [01], after step \d+: .* usually", rows[0][1])
