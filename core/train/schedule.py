"""Learning-rate schedules as a factor on the configured rates."""

import math

from core.train.config import OptimConfig, Schedule


def lr_factor(optim: OptimConfig, step: int, steps: int) -> float:
    """Factor for the step numbered `step` (from 0) of `steps`: linear warm-up, then the schedule to `min_lr_ratio`.

    The first step already has a rate above zero, the last one reaches the floor.
    """
    warmup = max(1, round(optim.warmup * steps)) if optim.warmup > 0 else 0
    if step < warmup:
        return (step + 1) / warmup
    if optim.schedule is Schedule.constant:
        return 1.0
    progress = (step - warmup + 1) / max(1, steps - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule is Schedule.cosine else 1 - progress
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape
