"""Reproducible weights and audio for comparing our networks with the packages that publish them."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

TOKENS = [0, 5, 17, 200, 44, 9, 2]


def named_weights(shapes: Mapping[str, Sequence[int]], gain: float = 1.0) -> dict[str, Tensor]:
    """A tensor for each name: normal numbers seeded by its name, with a scale that preserves
    activations.
    """
    weights = {}
    for name, shape in shapes.items():
        x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
        if name.endswith("running_var"):
            x = np.abs(x) + 0.5
        elif len(shape) < 2:
            is_norm = "norm" in name.lower() or ".bn" in name or name == "head.0.weight"
            x = 0.1 * x + (is_norm and name.endswith("weight"))
        else:
            x = x * gain / np.sqrt(np.prod(shape[1:]))
        weights[name] = torch.from_numpy(np.asarray(x, dtype=np.float32))
    return weights


def wave(samples: int, sample_rate: int) -> Tensor:
    """A rising tone in noise."""
    t = np.arange(samples) / sample_rate
    noise = np.random.RandomState(0).standard_normal(samples)
    tone = np.sin(2 * np.pi * 220 * t * (1 + 0.1 * t))
    return torch.from_numpy((0.3 * tone + 0.1 * noise).astype(np.float32))
