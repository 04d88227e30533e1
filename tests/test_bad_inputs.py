"""Untrusted files are read or refused in one line, within limits, by each reader and by the command
line (benchmarks/bad_inputs.py has many more cases)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # the script is in no package

from bad_files import READERS, Samples, check


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return Samples(tmp_path_factory.mktemp("samples"))


@pytest.mark.parametrize("name", READERS)
def test_a_file_is_used_or_refused_in_one_line(name: str, samples: Samples):
    counts = check(name, samples, examples=15)
    assert counts["refused"]
