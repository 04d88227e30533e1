"""Independent reference values of tests/fixtures/metrics."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures" / "metrics"


def facts(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name).read_text())


def arrays(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / name) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def near(value: float, expected: float, tolerance: float = 1e-6) -> bool:
    """Within 1e-6, absolute or relative: the fixtures' tolerance."""
    return abs(value - expected) <= tolerance * max(1.0, abs(expected))
