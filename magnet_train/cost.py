"""What a run takes, by arithmetic: parameters, memory of a device, size of a checkpoint,
floating-point operations.
 Memory follows from what `model.Block` keeps for the backward pass, line by line; tests hold it to
what the allocator counts. Bytes are bytes, GB are 10^9 of them.
"""

from dataclasses import dataclass
from math import pi
from typing import Any

import torch

from magnet_train.model import MagnetConfig

NUM_TEXT = 32
"""Tokens that a caption is taken to have."""
MEAN_MASK_RATE = 2 / pi
"""Of the cosine schedule at an even draw: the share of frames whose logits are computed."""
MOMENTS = {"adamw": 2, "dadapt_adam": 3}
"""Tensors as large as the weights that an optimizer keeps; D-Adaptation's third is the mean of its
steps.
"""
FULL = 4
"""Bytes of a float32."""
RESERVE = 0.1
"""Share of a device's memory that CUDA's context, NCCL and what lies between tensors are left
with.
"""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they are for."""

    weights: float
    gradients: float
    moments: float
    """Of the optimizer."""
    average: float
    """Of the weights."""
    copies: float
    """Of weights in half precision, of gradients for their exchange, and of what FSDP gathers."""
    frozen: float
    """The text encoder's weights."""
    activations: float
    """What is kept for the backward pass, and what that takes besides."""
    validation: float = 0.0
    """All of a validation, if all weights are whole then beside the shards; without what decoding
    computes.
    """

    @property
    def in_training(self) -> dict[str, float]:
        """What there is at once in a step, by name."""
        return {name: value for name, value in vars(self).items() if name != "validation"}

    @property
    def state(self) -> float:
        """All of a step that does not depend on the batch."""
        return sum(self.in_training.values()) - self.activations

    @property
    def total(self) -> float:
        """The most that there is at once."""
        return max(sum(self.in_training.values()), self.validation)


def num_parameters(config: MagnetConfig) -> int:
    """Trained numbers of the network."""
    d, books = config.dim, config.num_codebooks
    ends = books * (2 * config.codebook_size + 1) * d + (config.text_dim + 1) * d + 2 * d
    return ends + config.num_layers * parameters_of_block(config)


def parameters_of_block(config: MagnetConfig) -> int:
    """Of self-attention (4 d²), cross-attention (4 d²), the feed-forward layer, three norms and the
    convolution.
    """
    return (8 + 2 * config.ffn_ratio) * config.dim**2 + (6 + config.convolution) * config.dim


def bytes_of(precision: Any) -> tuple[int, int]:
    """Bytes of a weight, and of a number that a matrix product makes, under Lightning's name of a
    precision.

    >>> bytes_of("bf16-mixed"), bytes_of("bf16-true"), bytes_of(None)
    ((4, 2), (2, 2), (4, 4))
    """
    name = str(precision or 32)
    if name.startswith("64"):
        return 8, 8
    if name.startswith("32"):
        return FULL, FULL
    return (2 if name.endswith("true") else FULL), 2


def activation_bytes(
    config: MagnetConfig, batch_size: int, num_frames: int, precision: Any
) -> float:
    """Most bytes that a forward and backward pass takes beyond weights and gradients, at stage 0,
    the dearest.

    Each block keeps, per frame and channel: the input of its three parts, in float32; queries,
    keys, values and output of self-attention; query, output and output without the null captions of
    cross-attention; and the feed-forward layer's inner values. Norms and GELU are made again. On
    top come logits and their gradients where frames are masked, or, if that is more, what the last
    feed-forward layer's backward pass makes: GELU's output, its gradient, its input's gradient, and
    that of a weight.
    """
    _, half = bytes_of(precision)
    # Of the residual stream.
    full = max(half, FULL) if str(precision or 32).endswith("mixed") or half >= FULL else half
    d, frames = config.dim, batch_size * num_frames
    kept = frames * d * (3 * full + (3 + 1 + 3 + config.ffn_ratio) * half)
    text = batch_size * NUM_TEXT * 2 * d * half
    passing = frames * d * 3 * config.ffn_ratio * half + config.ffn_ratio * d * d * full
    logits = MEAN_MASK_RATE * frames * config.codebook_size * (half + 3 * FULL)
    return config.num_layers * (kept + text) + max(passing, logits)


def memory(
    config: MagnetConfig,
    precision: Any,
    optimizer: str,
    activations: float,
    ranks: int = 1,
    sharded: bool = False,
    frozen: float = 0.0,
) -> Memory:
    """Bytes on each device in training, with an average of the weights.

    Args:
        config: of the network.
        precision: Lightning's name.
        optimizer: a key of MOMENTS.
        activations: bytes of a batch's forward and backward pass.
        ranks: devices of the run.
        sharded: whether weights, gradients, moments and average are divided among the ranks
            (FSDP2).
        frozen: bytes of the text encoder.
    """
    full, half = bytes_of(precision)
    parameters, block = num_parameters(config), parameters_of_block(config)
    own = parameters * full / (ranks if sharded else 1)
    # Autocast's copies of whole weights are kept for the backward pass.
    rounded = parameters * half if half < full else 0.0
    copies, validation = rounded, 0.0
    if sharded:  # a block that is in use, and the next; in a validation all of them
        copies += 2 * block * full
        validation = own * (3 + MOMENTS[optimizer]) + frozen + parameters * full + rounded
    elif ranks > 1:  # DDP's buckets
        copies += parameters * full
    moments = MOMENTS[optimizer] * own
    return Memory(own, own, moments, own, copies, frozen, activations, validation)


def largest_batch(given: Memory, batch_size: int, capacity: float) -> int:
    """Examples per batch that fit a device of `capacity` bytes, a reserve kept free; 0 = none, or
    no validation.

    Args:
        given: memory at `batch_size`, with which activations grow.
        batch_size: of `given`.
        capacity: in bytes.
    """
    room = capacity * (1 - RESERVE)
    if given.validation > room:
        return 0
    return max(0, int((room - given.state) / (given.activations / batch_size)))


def checkpoint_bytes(
    config: MagnetConfig, optimizer: str, averaged: bool = True, precision: Any = None
) -> float:
    """Size of a checkpoint: raw weights, their average, and the optimizer's moments."""
    return num_parameters(config) * bytes_of(precision)[0] * (1 + averaged + MOMENTS[optimizer])


def training_flop(config: MagnetConfig, num_frames: int, stage: int) -> float:
    """Of one example, forward and backward: three times the forward pass."""
    return 3 * useful_flop(config, num_frames, stage, round(MEAN_MASK_RATE * num_frames), NUM_TEXT)


def decoding_flop(config: MagnetConfig, num_frames: int, decoding_steps: tuple[int, ...]) -> float:
    """Of one generated clip with guidance, which asks the network twice."""
    return sum(
        2 * steps * useful_flop(config, num_frames, stage, num_frames, NUM_TEXT)
        for stage, steps in enumerate(decoding_steps[: config.num_codebooks])
    )


def useful_flop(
    config: MagnetConfig, num_frames: int, stage: int, num_predicted: int, num_text: int
) -> float:
    """Multiplications and additions that one example needs in a forward pass: what a mask hides is
    not counted.
    """
    d, context = config.dim, config.stage(stage).context
    keys = num_frames if context < 0 else min(num_frames, 2 * context + 1)
    weights = config.num_layers * ((4 + 2 + 2 * config.ffn_ratio) * d * d + config.convolution * d)
    pairs = config.num_layers * 2 * d * (keys + num_text)
    text = (config.text_dim + config.num_layers * 2 * d) * d * num_text
    return 2.0 * (num_frames * (weights + pairs) + text + num_predicted * d * config.codebook_size)


PEAK_TFLOP = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "A40": 150,
    "A10": 125,
    "V100": 125,
    "4090": 165,
}
"""Of dense products in half precision with sums in float32, by a part of the device's name;
vendors' data sheets.
"""


def peak_flop(device: torch.device, precision: str) -> float | None:
    """FLOP per second that a device can do at best in half precision; None where that is not known.

    Args:
        device: where the model is.
        precision: Lightning's name; another than half precision has no entry in the table.
    """
    if device.type != "cuda" or "16" not in precision:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOP.items() if part in name), None)
