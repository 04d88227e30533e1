"""Cross-entropy and divergence at masked frames, as sums and counts to add up over ranks."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from magnet_train.masking import masked_positions


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
    def concatenate(cls, parts: "Iterable[MaskedLoss]") -> "MaskedLoss":
        """Concatenate the losses of several batches."""
        sums = zip(*((part.ce, part.correct, part.count) for part in parts), strict=True)
        return cls(*map(torch.cat, sums))

    def __getitem__(self, examples: slice) -> "MaskedLoss":
        """The sums of some of the examples."""
        return MaskedLoss(self.ce[examples], self.correct[examples], self.count[examples])

    def mean(self) -> Tensor:
        """Mean over all masked frames of the batch (MAGNeT, Eq. 2); 0 if there is none."""
        return self.ce.sum() / self.count.sum().clamp(min=1)

    def accuracy(self) -> Tensor:
        """Accuracy over all masked frames of the batch; 0 if there is none."""
        return self.correct.sum() / self.count.sum().clamp(min=1)


def balanced_mean(stage: MaskedLoss, prompt: MaskedLoss, prompt_weight: float) -> Tensor:
    """Hybrid MAGNeT's objective: mean over the masked frames of a stage and the codes of
    beginnings, the latter weighted by `prompt_weight`. 0 if there are none.
    """
    count = stage.count.sum() + prompt_weight * prompt.count.sum()
    return (stage.ce.sum() + prompt_weight * prompt.ce.sum()) / count.clamp(min=1)


def masked_cross_entropy(logits: Tensor, targets: Tensor, masked: Tensor) -> MaskedLoss:
    """Loss of logits `n c` at the n frames `masked` (bool `b t`, no padding), in row-major order.

    `targets` are codes `b t`. If `masked` is on the host, nothing waits for the device. Raises
    ValueError if `logits` has another number of frames.
    """
    positions = _positions(logits, masked)
    wanted = targets.flatten().index_select(0, positions)
    # Softmax in float32 at any precision: in bf16 the sum over 2048 entries is too inaccurate.
    ce = F.cross_entropy(logits.float(), wanted, reduction="none")
    return _sums(ce, logits.detach().argmax(1) == wanted, positions, masked)


def masked_divergence(logits: Tensor, teacher: Tensor, masked: Tensor) -> MaskedLoss:
    """KL divergence of the network's distribution from a teacher's, in nats, as `ce`.

    A frame is correct if its most likely entry is the teacher's.

    Args:
        logits: `n c`, as in `masked_cross_entropy`.
        teacher: `n c`, logits without gradient.
        masked: `b t` bool, n frames True.

    Raises:
        ValueError: if `logits` has another number of frames than `masked`.
    """
    positions = _positions(logits, masked)
    ours, theirs = logits.float().log_softmax(1), teacher.float().log_softmax(1)
    kl = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
    return _sums(kl, logits.detach().argmax(1) == teacher.argmax(1), positions, masked)


def _positions(logits: Tensor, masked: Tensor) -> Tensor:
    """Positions of the n masked frames in `b t`, on the device of the logits."""
    positions = masked_positions(masked, logits.device)
    if len(positions) != len(logits):
        raise ValueError(f"{len(logits)} rows of logits for {len(positions)} masked frames")
    return positions


def _sums(loss: Tensor, correct: Tensor, positions: Tensor, masked: Tensor) -> MaskedLoss:
    """Sums over the n frames by example."""
    num_examples, num_frames = masked.shape
    sums = torch.zeros(3, num_examples, device=loss.device)
    columns = torch.stack([loss, correct.float(), torch.ones_like(loss)])
    return MaskedLoss(*sums.index_add(1, positions // num_frames, columns))
