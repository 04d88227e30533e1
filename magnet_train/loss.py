"""Cross-entropy of one codebook at its masked frames, as a sum and a count: sums cross ranks, means
come last.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class MaskedLoss:
    """Sums over the masked frames of each example, `b` each; an example without any counts zero."""

    ce: Tensor
    """Cross-entropy in nats, with gradient."""
    correct: Tensor
    """Frames whose most likely entry is the right one."""
    count: Tensor
    """Masked frames."""

    @classmethod
    def concatenate(cls, parts: "list[MaskedLoss]") -> "MaskedLoss":
        """Of several batches as of one; their examples one after another."""
        return cls(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("ce", "correct", "count")
            )
        )

    def mean(self) -> Tensor:
        """Mean over all masked frames of the batch, so longer masks weigh more (MAGNeT, Eq. 2); 0
        if there is none.
        """
        return self.ce.sum() / self.count.sum().clamp(min=1)

    def accuracy(self) -> Tensor:
        """Share of the masked frames whose most likely entry is the right one; 0 if there is
        none.
        """
        return self.correct.sum() / self.count.sum().clamp(min=1)


def masked_cross_entropy(logits: Tensor, targets: Tensor, masked: Tensor) -> MaskedLoss:
    """Loss at the masked frames, given the logits at just these.

    Args:
        logits: `n c`, of the n masked frames in the order in which `masked` lists them.
        targets: `b t`, the codes of the stage.
        masked: `b t` bool, n frames True; padding is never among them.

    Raises:
        ValueError: if `logits` has another number of frames than `masked`.
    """
    rows = masked.nonzero()[:, 0]
    if len(rows) != len(logits):
        raise ValueError(f"{len(logits)} rows of logits for {len(rows)} masked frames")
    wanted = targets[masked]
    # Softmax in float32 whatever the precision of the network: the sum over 2048 entries loses too
    # much in bf16.
    ce = F.cross_entropy(logits.float(), wanted, reduction="none")
    correct = (logits.detach().argmax(1) == wanted).float()
    sums = torch.zeros(3, len(masked), device=logits.device)
    return MaskedLoss(*sums.index_add(1, rows, torch.stack([ce, correct, torch.ones_like(ce)])))
