"""Optimizers and learning-rate schedules.

The schedules are factors of the peak rate. As in audiocraft, the first update has rate 0 with the
cosine schedule, and 1 / warmup_steps with the inverse square root.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from magnet_train.common.errors import UserError
from magnet_train.common.ranges import check_values


def cosine_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from 0, then half a cosine down to 0 at `total_steps` and 0 afterwards.

    >>> [round(cosine_factor(s, warmup_steps=10, total_steps=20), 3) for s in (0, 5, 10, 15, 20)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return step / warmup_steps
    if step >= total_steps:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))


def inverse_sqrt_factor(step: int, warmup_steps: int) -> float:
    """Linear warm-up, then inverse square root of the number of updates.

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
    """Optimizer and schedule; defaults as published for the medium 30-second model."""

    name: Literal["adamw", "dadapt_adam"] = "adamw"
    """AdamW, or audiocraft's D-Adaptation, which estimates the step size; use it with lr 1."""
    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Coefficients of the running means of the gradient and its square."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay, applied to all parameters."""
    schedule: Literal["cosine", "inverse_sqrt", "constant"] = "cosine"
    """Learning-rate schedule after warm-up; cosine reaches 0 at the trainer's last step."""
    warmup_steps: int = 4000
    """Linear warm-up, in optimizer steps; a tenth of the run if the run is not longer than this."""

    def __post_init__(self) -> None:
        check_values(
            self,
            "optimizer: ",
            lr="(0, inf)",
            betas="[0, 1)",
            eps="(0, inf)",
            weight_decay="[0, inf)",
            warmup_steps="[0, inf)",
        )

    def warmup_within(self, total_steps: float) -> int:
        """Warm-up steps in a run of `total_steps` (may be infinite).

        >>> [OptimizerConfig(warmup_steps=50).warmup_within(total) for total in (800, 51, 50, 5)]
        [50, 50, 5, 0]

        Raises:
            UserError: if the schedule is cosine and the run has no end.
        """
        if self.schedule == "cosine" and not math.isfinite(total_steps):
            raise UserError(
                "schedule=cosine: the run has no end; set --trainer.max_steps, or choose "
                "--model.optimizer.schedule inverse_sqrt"
            )
        return self.warmup_steps if self.warmup_steps < total_steps else int(total_steps) // 10

    def settings(self) -> dict[str, Any]:
        """Arguments of torch's optimizer."""
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


def allows_fused(precision: str) -> bool:
    """Whether AdamW may be fused: not in fp16, where Lightning's scaler would leave unscaling to
    it, after clipping.
    """
    return not precision.startswith("16")


def make_optimizer(
    config: OptimizerConfig, parameters: list[nn.Parameter], fused: bool
) -> torch.optim.Optimizer:
    """The optimizer of `config`."""
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, fused=fused, **config.settings())
    return DAdaptAdam(parameters, **config.settings())


class DAdaptAdam(torch.optim.Optimizer):
    """Adam whose step size d is estimated (D-Adaptation, arXiv 2301.07733).

    The update is audiocraft's (`optim/dadam.py`). It is the earlier form of the paper, which the
    `dadaptation` package has since replaced: d = (sum(s^2 / v) / (1 - beta2) - G) / sum(|s|), where
    v is the root of Adam's second moment, s the running mean of d lr times the gradient, and G that
    of its weighted square. d never falls. The first moment is not corrected for its bias.

    Sharded weights (DTensor) are updated by shards, and the three sums go over all ranks. The
    estimate stays on the weights' device, so that a step does not wait for it.

    If the attribute `found_inf` is set, as for torch's fused optimizers, a value of 1 skips the
    step: neither weights nor estimate nor state change.

    Args:
        params: one group.
        lr: factor of d; 1 takes the estimate as it is.
        betas: decay of the running means of the gradient, and of its square and s, per update.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times d lr.
        d0: first estimate of the step size.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        d0: float = 1e-6,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"d": d0, "gsq_weighted": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update; does nothing without gradients or at lr 0."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        parameters = [p for p in group["params"] if p.grad is not None]
        if parameters:
            self._step(group, parameters)
        return loss

    def _step(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        states = [self._state_of(parameter) for parameter in parameters]
        if not group["lr"]:
            return
        beta2, device = group["betas"][1], parameters[0].device
        d, gsq_weighted = (  # a checkpoint has them on the CPU
            torch.as_tensor(group[name], dtype=torch.float64, device=device)
            for name in ("d", "gsq_weighted")
        )
        dlr = d * group["lr"]
        found_inf = getattr(self, "found_inf", None)
        taken = torch.ones_like(d) if found_inf is None else 1 - found_inf.double()
        sums = torch.stack([self._moments(p, group, dlr, taken) for p in parameters])
        sums = sums.double().sum(0)
        if any(isinstance(p, DTensor) for p in parameters):
            dist.all_reduce(sums)
        gradients_squared, s_squared, s_norm = sums
        taken = taken * (s_norm > 0)  # otherwise all gradients were 0
        weighted = beta2 * gsq_weighted + (1 - beta2) * dlr**2 * gradients_squared
        estimate = torch.maximum(d, (s_squared / (1 - beta2) - weighted) / s_norm)
        group["gsq_weighted"] = torch.where(taken > 0, weighted, gsq_weighted)
        group["d"] = torch.where(taken > 0, estimate, d)
        for parameter, state in zip(parameters, states, strict=True):
            weight = _local(parameter)
            _, mean, square = (_local(x) for x in state)
            weight.mul_(1 - group["weight_decay"] * dlr * taken)
            weight.sub_(mean.div(square.sqrt().add_(group["eps"])).mul_(taken))

    def _state_of(self, parameter: nn.Parameter) -> list[Tensor]:
        """s and the two moments."""
        state = self.state[parameter]
        for name in ("s", "exp_avg", "exp_avg_sq"):
            state.setdefault(name, torch.zeros_like(parameter))
        return [state[name] for name in ("s", "exp_avg", "exp_avg_sq")]

    def _moments(
        self, parameter: nn.Parameter, group: dict[str, Any], dlr: Tensor, taken: Tensor
    ) -> Tensor:
        """Updates the running means; returns this parameter's part of the three sums.

        Args:
            parameter: with a gradient.
            group: its settings.
            dlr: d times the learning rate.
            taken: 1, or 0 if the step is skipped.
        """
        assert parameter.grad is not None
        gradient = _local(parameter.grad)
        gradient = torch.where(taken > 0, gradient, 0)  # in a skipped step, it may be NaN
        s, mean, square = (_local(x) for x in self._state_of(parameter))
        new1, new2 = ((1 - beta) * taken for beta in group["betas"])
        mean.mul_(1 - new1).add_(gradient * (dlr * new1))
        square.mul_(1 - new2).add_(gradient.square() * new2)
        s.mul_(1 - new2).add_(gradient * (dlr * new2))
        root = square.sqrt().add_(group["eps"])
        return torch.stack([(gradient**2 / root).sum(), (s**2 / root).sum(), s.abs().sum()])


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; other tensors unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
