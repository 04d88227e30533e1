"""The loss covers only the stage's masked frames without padding."""

import pytest
import torch
from torch.nn import functional as F

from magnet_train.loss import masked_cross_entropy
from magnet_train.optimizer import cosine_factor, inverse_sqrt_factor


def test_it_is_the_mean_cross_entropy_over_masked_frames():
    logits, targets = torch.randn(3, 10, 7), torch.randint(7, (3, 10))
    masked = torch.rand(3, 10) < 0.5
    loss = masked_cross_entropy(logits[masked], targets, masked)
    assert torch.allclose(loss.mean(), F.cross_entropy(logits[masked], targets[masked]))
    assert loss.count.tolist() == masked.sum(1).tolist()
    assert loss.correct.sum() == (logits.argmax(-1) == targets)[masked].sum()


def test_no_masked_frame_is_zero_not_nan():
    masked = torch.zeros(2, 5, dtype=torch.bool)
    loss = masked_cross_entropy(
        torch.zeros(0, 7, requires_grad=True), torch.zeros(2, 5, dtype=torch.long), masked
    )
    assert loss.mean() == 0 and loss.count.sum() == 0
    loss.mean().backward()


def test_logits_of_other_frames_are_refused():
    with pytest.raises(ValueError, match="masked frames"):
        masked_cross_entropy(
            torch.zeros(3, 7),
            torch.zeros(1, 5, dtype=torch.long),
            torch.ones(1, 5, dtype=torch.bool),
        )


def test_schedules_are_those_of_the_reference():
    import json
    from pathlib import Path

    path = Path(__file__).parent / "fixtures" / "reference" / "train" / "lr_schedules.json"
    rates = json.loads(path.read_text())
    for step, rate in rates["cosine_base1_warmup4000_total20000"].items():
        assert cosine_factor(int(step), 4000, 20_000) == pytest.approx(rate, abs=1e-9)
    for step, rate in rates["inverse_sqrt_base5e4_warmup3000"].items():
        assert 5e-4 * inverse_sqrt_factor(int(step), 3000) == pytest.approx(rate, rel=1e-9)
