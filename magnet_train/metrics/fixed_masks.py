"""Cross-entropy and accuracy on fixed masks, by codebook and mask rate.

Training losses of different stages and mask rates differ tenfold; with fixed masks, validations are
comparable.
"""

import hashlib
import math

import torch
from torch import Tensor
from torchmetrics import Metric

from magnet_train.loss import MaskedLoss
from magnet_train.masking import span_mask

MASK_RATES = (0.1, 0.3, 0.5, 0.7, 0.9)


def fixed_span_mask(key: str, stage: int, num_frames: int, span_len: int) -> tuple[Tensor, int]:
    """Mask of a validation item in a stage, bool `t`, and the index of its rate in `MASK_RATES`.

    Mask and rate are functions of the item's key and the stage; rates rotate over stages and items.
    """
    digest = hashlib.sha256(key.encode()).digest()
    rate = (digest[0] + stage) % len(MASK_RATES)
    generator = torch.Generator().manual_seed(int.from_bytes(digest[1:8], "big") + stage)
    return span_mask(torch.tensor([MASK_RATES[rate]]), num_frames, span_len, generator)[0], rate


class FixedMaskMetrics(Metric):
    """float64 sums over items, exact on any number of ranks, including ranks without data."""

    full_state_update = False
    sums: Tensor

    def __init__(self, num_codebooks: int):
        super().__init__()
        # stage, rate, columns: frames' ce, correct frames, frames, items' mean ce, its square,
        # items, copied frames
        zeros = torch.zeros(num_codebooks, len(MASK_RATES), 7, dtype=torch.float64)
        self.add_state("sums", default=zeros, dist_reduce_fx="sum")

    def update(self, stage: int, rates: Tensor, loss: MaskedLoss, copied: Tensor) -> None:
        """Adds a batch.

        Args:
            stage: 0 … K-1.
            rates: `b`, indices of MASK_RATES.
            loss: Sums of the examples.
            copied: `b`, masked frames whose code is that of the nearest visible frame.
        """
        some = (loss.count > 0).double()
        mean = loss.ce.double() / loss.count.double().clamp(min=1)
        columns = [loss.ce.double(), loss.correct.double(), loss.count.double()]
        columns += [mean, mean.square(), some, copied.double()]
        # A clone, because a reset in inference mode leaves an immutable tensor.
        sums = self.sums.clone()
        sums[stage].index_add_(0, rates, torch.stack(columns, dim=1))
        self.sums = sums

    def compute(self) -> dict[str, float]:
        """Metrics by name: means over frames, and half 95 % intervals over items (`_ci95`).

        Rates without frames are omitted.
        """
        values: dict[str, float] = {}
        for stage, by_rate in enumerate(self.sums.cpu()):
            ce, correct, frames, mean, square, items, copied = by_rate.sum(0).tolist()
            if frames:
                values[f"val/ce/stage{stage}"] = ce / frames
                values[f"val/accuracy/stage{stage}"] = correct / frames
                values[f"val/accuracy/stage{stage}/baseline_copying"] = copied / frames
            if items > 1:
                variance = max(0.0, (square - mean**2 / items) / (items - 1))
                values[f"val/ce/stage{stage}_ci95"] = 1.96 * math.sqrt(variance / items)
            for rate, row in zip(MASK_RATES, by_rate.tolist(), strict=True):
                if row[2]:
                    values[f"val/ce/stage{stage}/rate{rate}"] = row[0] / row[2]
                    values[f"val/accuracy/stage{stage}/rate{rate}"] = row[1] / row[2]
                    values[f"val/accuracy/stage{stage}/baseline_copying/rate{rate}"] = (
                        row[6] / row[2]
                    )
        total = self.sums.sum((0, 1)).tolist()
        if total[2]:
            values["val/ce"] = total[0] / total[2]
        return values
