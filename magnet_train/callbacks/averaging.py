"""Averaged weights: Lightning's own callback with the reference's bias correction."""

from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class WeightEMA(WeightAveraging):
    """Exponential average of the weights, on which validation runs and which checkpoints hold as `state_dict`.

    The raw weights stand beside it as `current_model_state`. The average is corrected for its start (audiocraft
    `optim/ema.py`): the n-th update weighs 1 / (1 + d + … + d^n), so that the random initial weights are gone at
    once instead of lingering for a thousand steps.
    """

    def __init__(self, decay: float = 0.99, every_n_steps: int = 10):
        """Sets how far the average looks back.

        Args:
            decay: weight of the past at each update, 0 to 1; 0.99 every 10 steps looks back a thousand steps.
            every_n_steps: optimizer steps between updates.
        """
        if not 0 <= decay < 1 or every_n_steps < 1:
            from magnet_train.errors import UserError

            raise UserError(f"averaging: decay={decay} must be in [0, 1), every_n_steps={every_n_steps} at least 1")
        self.every_n_steps = every_n_steps

        def update(average: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
            weight = (1 - decay) / (1 - decay ** (num_averaged + 1))
            return average + (current - average) * weight

        super().__init__(avg_fn=update)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and (step_idx + 1) % self.every_n_steps == 0
