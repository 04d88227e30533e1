"""Cross-entropy of one codebook at its masked frames, as sums and counts to add up over ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class MaskedLoss:
    """Sums over the masked frames of each example, `b` each; 0 if an example has none."""

    ce: Tensor
    """Cross-entropy in nats, with gradient."""
    correct: Tensor
    """Number of correct frames (by argmax)."""
    count: Tensor
    """Masked frames."""

    @classmethod
    def concatenate(cls, parts: "list[MaskedLoss]") -> "MaskedLoss":
        """Concatenate the losses of several batches."""
        return cls(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("ce", "correct", "count")
            )
        )

    def mean(self) -> Tensor:
        """Mean over all masked frames of the batch (MAGNeT, Eq. 2); 0 if there is none."""
        return self.ce.sum() / self.count.sum().clamp(min=1)

    def accuracy(self) -> Tensor:
        """Accuracy over all masked frames of the batch; 0 if there is none."""
        return self.correct.sum() / self.count.sum().clamp(min=1)


def masked_cross_entropy(logits: Tensor, targets: Tensor, masked: Tensor) -> MaskedLoss:
    """Loss at the masked frames.

    Args:
        logits: `n c`, at the n masked frames only, in row-major order of `masked`.
        targets: `b t`, the codes of the stage.
        masked: `b t` bool, n frames True; never padding.

    Raises:
        ValueError: if `logits` has another number of frames than `masked`.
    """
    rows = masked.nonzero()[:, 0]
    if len(rows) != len(logits):
        raise ValueError(f"{len(logits)} rows of logits for {len(rows)} masked frames")
    wanted = targets[masked]
    # Softmax in float32 at any precision: in bf16 the sum over 2048 entries is too inaccurate.
    ce = F.cross_entropy(logits.float(), wanted, reduction="none")
    correct = (logits.detach().argmax(1) == wanted).float()
    sums = torch.zeros(3, len(masked), device=logits.device)
    return MaskedLoss(*sums.index_add(1, rows, torch.stack([ce, correct, torch.ones_like(ce)])))
