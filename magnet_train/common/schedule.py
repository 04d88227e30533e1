"""Learning-rate schedules, as factors of the base rate at each optimizer step.

Both have the off-by-ones of the reference: the cosine's first update has rate 0, the inverse square root's
1 / warmup_steps.
"""

import math


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
    return update / max(warmup_steps, 1) if update < warmup_steps else (max(warmup_steps, 1) / update) ** 0.5
