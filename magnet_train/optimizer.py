"""Optimizers and learning-rate schedules.
 The schedules are factors of the peak rate and have the off-by-ones of the reference: the cosine's
first update has rate 0, the inverse square root's 1 / warmup_steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from magnet_train.common.errors import UserError


def cosine_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from 0, then half a cosine down to 0 at `total_steps` (0 ever after).

    >>> [round(cosine_factor(s, warmup_steps=10, total_steps=20), 3) for s in (0, 5, 10, 15, 20)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return step / warmup_steps
    if step >= total_steps:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))


def inverse_sqrt_factor(step: int, warmup_steps: int) -> float:
    """Linear warm-up, then falling with the square root of the number of updates.

    >>> [round(inverse_sqrt_factor(s, warmup_steps=4), 3) for s in (0, 3, 15)]
    [0.25, 1.0, 0.5]
    """
    update = step + 1
    return (
        update / max(warmup_steps, 1)
        if update < warmup_steps
        else (max(warmup_steps, 1) / update) ** 0.5
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule; the defaults are those published for the medium 30-second model."""

    name: Literal["adamw", "dadapt_adam"] = "adamw"
    """AdamW, or D-Adaptation's Adam, which finds the step size itself and takes lr as a factor: 1
    (package `dadaptation`).
    """
    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's two running means, per update."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on every parameter."""
    schedule: Literal["cosine", "inverse_sqrt", "constant"] = "cosine"
    """Learning-rate schedule after warm-up; cosine reaches 0 at the trainer's last step."""
    warmup_steps: int = 4000
    """Length of the linear warm-up, in optimizer steps; a tenth of a run that is no longer than
    that.
    """

    def __post_init__(self) -> None:
        ranges = {
            "lr": (0 < self.lr < math.inf, "above 0"),
            "betas": (
                len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
                "two numbers in [0, 1)",
            ),
            "eps": (0 < self.eps < math.inf, "above 0"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "warmup_steps": (self.warmup_steps >= 0, "0 or more"),
        }
        for name, (is_valid, expected) in ranges.items():
            if not is_valid:
                raise UserError(f"optimizer: {name}={getattr(self, name)} must be {expected}")
        if self.name not in ("adamw", "dadapt_adam"):
            raise UserError(f"optimizer name={self.name}: choose adamw or dadapt_adam")
        if self.schedule not in ("cosine", "inverse_sqrt", "constant"):
            raise UserError(f"schedule={self.schedule}: choose cosine, inverse_sqrt or constant")

    def warmup_within(self, total_steps: float) -> int:
        """Steps of warm-up in a run of `total_steps`, infinite if it has no end.

        >>> [OptimizerConfig(warmup_steps=50).warmup_within(total) for total in (800, 51, 50, 5)]
        [50, 50, 5, 0]

        Raises:
            UserError: if the schedule is a cosine, which has to know its end, and the run has none.
        """
        if self.schedule == "cosine" and not math.isfinite(total_steps):
            raise UserError(
                "schedule=cosine: the run has no end; set --trainer.max_steps, or choose "
                "--model.optimizer.schedule "
                "inverse_sqrt"
            )
        return self.warmup_steps if self.warmup_steps < total_steps else int(total_steps) // 10

    def settings(self) -> dict[str, Any]:
        """What torch's optimizer takes."""
        return {
            "lr": self.lr,
            "betas": tuple(self.betas),
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }


def schedule_factor(config: OptimizerConfig, total_steps: float) -> Callable[[int], float]:
    """The factor of the peak rate at each optimizer step of a run of `total_steps`."""
    warmup_steps = config.warmup_within(total_steps)

    def factor(step: int) -> float:
        if config.schedule == "cosine":
            return cosine_factor(step, warmup_steps, int(total_steps))
        if config.schedule == "inverse_sqrt":
            return inverse_sqrt_factor(step, warmup_steps)
        return min(1.0, (step + 1) / max(warmup_steps, 1))

    return factor


def allows_fused(precision: str, clips_gradients: bool) -> bool:
    """Whether one kernel may update all tensors.

    Lightning refuses to clip gradients before a fused optimizer under a mixed precision, and fp16's
    scaler leaves unscaling to a fused optimizer, which a skipped step would not have.
    """
    return not precision.startswith("16") and not (clips_gradients and precision.endswith("-mixed"))


def make_optimizer(
    config: OptimizerConfig, parameters: list[nn.Parameter], fused: bool
) -> torch.optim.Optimizer:
    """The optimizer of `config`.

    Raises:
        UserError: if the package that it needs is not installed.
    """
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, fused=fused, **config.settings())
    return _dadaptation().DAdaptAdam(parameters, decouple=True, **config.settings())


def _dadaptation() -> Any:
    try:
        import dadaptation
    except ModuleNotFoundError as error:
        raise UserError(
            "optimizer name=dadapt_adam: the package dadaptation is missing; "
            "install it with `pip install 'magnet-train[dadaptation]'`"
        ) from error
    return dadaptation
