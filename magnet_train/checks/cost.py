"""Calculates the cost of a run: parameters, memory, checkpoint size, floating-point operations.

Memory is the sum of what `model.Block` saves for the backward pass; tests compare it with the
allocator's count. 1 GB = 10^9 bytes.
"""

from dataclasses import dataclass
from math import pi
from typing import Any

import torch

from magnet_train.model import MagnetConfig

NUM_TEXT = 32
"""Assumed number of tokens per caption."""
MEAN_MASK_RATE = 2 / pi
"""Mean of the cosine schedule in training: the share of frames whose logits are computed."""
MOMENTS = {"adamw": 2, "dadapt_adam": 3}
"""Optimizer states per weight; D-Adaptation's third is the mean of its steps.
"""
FULL = 4
"""Bytes of a float32."""
RESERVE = 0.1
"""Share of a device's memory reserved for CUDA's context, NCCL and fragmentation."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device by purpose."""

    weights: float
    gradients: float
    moments: float
    """Optimizer states."""
    average: float
    """Averaged weights."""
    copies: float
    """Weights in half precision, buffers for gradients, and weights gathered by FSDP."""
    frozen: float
    """The text encoder's weights."""
    activations: float
    """Activations saved for the backward pass, and temporaries."""
    validation: float = 0.0
    """Total during validation if sharded weights are gathered; without temporaries of decoding."""

    @property
    def in_training(self) -> dict[str, float]:
        """Memory of a training step by purpose."""
        return {name: value for name, value in vars(self).items() if name != "validation"}

    @property
    def state(self) -> float:
        """The part of a training step that does not depend on the batch."""
        return sum(self.in_training.values()) - self.activations

    @property
    def total(self) -> float:
        """Maximum over training and validation."""
        return max(sum(self.in_training.values()), self.validation)


def num_parameters(config: MagnetConfig) -> int:
    """Number of parameters of the network."""
    d, books = config.dim, config.num_codebooks
    ends = books * (2 * config.codebook_size + 1) * d + (config.text_dim + 1) * d + 2 * d
    return ends + config.num_layers * parameters_of_block(config)


def parameters_of_block(config: MagnetConfig) -> int:
    """Self-attention (4 d²), cross-attention (4 d²), feed-forward layer, norms and convolution."""
    return (8 + 2 * config.ffn_ratio) * config.dim**2 + (6 + config.convolution) * config.dim


def bytes_of(precision: Any) -> tuple[int, int]:
    """Bytes of a weight and of a matrix product's output, for one of Lightning's precisions.

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
    """Peak bytes of a forward and backward pass without weights and gradients, at stage 0.

    Stage 0 is the most expensive. Each block saves, per frame and channel: the inputs of its three
    parts, in float32; queries, keys, values and output of self-attention; query, output and output
    without the null captions of cross-attention; and the hidden values of the feed-forward layer.
    Norms and GELU are recomputed. In addition there are logits and their gradients at masked frames
    or, if that is more, the temporaries of the last feed-forward layer's backward pass: GELU's
    output, its gradient, its input's gradient, and that of a weight.
    """
    _, half = bytes_of(precision)
    # Of the residual stream.
    full = max(half, FULL) if str(precision or 32).endswith("mixed") or half >= FULL else half
    d = config.dim
    frames = batch_size * num_frames
    kept = frames * d * (3 * full + (3 + 1 + 3 + config.ffn_ratio) * half)
    text = batch_size * NUM_TEXT * 2 * d * half
    passing = frames * d * 3 * config.ffn_ratio * half + config.ffn_ratio * d * d * full
    predicted = batch_size * predicted_codes(config, num_frames)
    logits = predicted * config.codebook_size * (half + 3 * FULL)
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
        config: the network.
        precision: Lightning's name.
        optimizer: a key of MOMENTS.
        activations: bytes of a batch's forward and backward pass.
        ranks: number of devices.
        sharded: whether weights, gradients, moments and average are sharded (FSDP2).
        frozen: bytes of the text encoder.
    """
    full, half = bytes_of(precision)
    parameters = num_parameters(config)
    block = parameters_of_block(config)
    own = parameters * full / (ranks if sharded else 1)
    # Autocast's copies of unsharded weights are kept for the backward pass.
    rounded = parameters * half if half < full else 0.0
    copies = rounded
    validation = 0.0
    if sharded:  # the current block and the next; in validation all blocks
        copies += 2 * block * full
        validation = own * (3 + MOMENTS[optimizer]) + frozen + parameters * full + rounded
    elif ranks > 1:  # DDP's buckets
        copies += parameters * full
    moments = MOMENTS[optimizer] * own
    return Memory(own, own, moments, own, copies, frozen, activations, validation)


def largest_batch(given: Memory, batch_size: int, capacity: float) -> int:
    """Largest batch on a device of `capacity` bytes with a reserve; 0 = no batch or no validation.

    Args:
        given: memory at `batch_size`; its activations are proportional to the batch.
        batch_size: batch size of `given`.
        capacity: bytes of the device.
    """
    room = capacity * (1 - RESERVE)
    if given.validation > room:
        return 0
    return max(0, int((room - given.state) / (given.activations / batch_size)))


def checkpoint_bytes(config: MagnetConfig, optimizer: str, precision: Any = None) -> float:
    """Size of a checkpoint: raw weights, their average, and the optimizer's moments."""
    return num_parameters(config) * bytes_of(precision)[0] * (2 + MOMENTS[optimizer])


def training_flop(config: MagnetConfig, num_frames: int, stage: int) -> float:
    """FLOP of one example, forward and backward: three times the forward pass."""
    predicted = round(predicted_codes(config, num_frames))
    return 3 * useful_flop(config, num_frames, stage, predicted, NUM_TEXT)


def predicted_codes(config: MagnetConfig, num_frames: int) -> float:
    """Mean number of predicted codes per example in training: the masked frames of a stage, and for
    a hybrid half of all codes.
    """
    beginning = {"parallel": 0.0, "hybrid": 0.5, "autoregressive": 1.0}[config.order]
    masked = MEAN_MASK_RATE * (1 - beginning) * num_frames
    return masked + beginning * config.num_codebooks * num_frames


def decoding_flop(config: MagnetConfig, num_frames: int, decoding_steps: tuple[int, ...]) -> float:
    """FLOP of one generated clip with guidance, which needs two forward passes per step."""
    return sum(
        2 * steps * useful_flop(config, num_frames, stage, num_frames, NUM_TEXT)
        for stage, steps in enumerate(decoding_steps[: config.num_codebooks])
    )


def useful_flop(
    config: MagnetConfig, num_frames: int, stage: int, num_predicted: int, num_text: int
) -> float:
    """FLOP that one example needs in a forward pass, without masked-out positions."""
    d = config.dim
    context = config.stage(stage).context
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
"""Dense half-precision peak with float32 accumulation, by part of the device's name (data sheets).
"""


def peak_flop(device: torch.device, precision: str) -> float | None:
    """Peak FLOP per second of a device in half precision; None if it is not known.

    Args:
        device: device of the model.
        precision: Lightning's name; the table has half precision only.
    """
    if device.type != "cuda" or "16" not in precision:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOP.items() if part in name), None)
