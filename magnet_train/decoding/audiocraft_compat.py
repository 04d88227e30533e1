"""audiocraft's remasking (896ec7c, `models/lm_magnet.py`), including its bugs.

Only for comparison with published results. Differences from `remask.py`:

- a span in which a prompt ends can be masked, although its known frames are restored in each step
- ties are resolved by `torch.topk`
- sliding spans: a binary search for their number returns the last number tried, not the closest

Two more bugs are reproduced elsewhere: `decode` drops the frames after the last full span, and
`Generator.generate` attends to the padding of captions.

Shapes: b examples, t frames, u units (spans of the grid), s spans.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

NEVER = -1e4


def remask_grid(
    certainty: Tensor, masked: Tensor, fixed: Tensor, share: Tensor, span_len: int, scoring: str
) -> Tensor:
    """Least certain units of a grid; t is a multiple of the span: `b t` -> bool `b t`."""
    spans = certainty.unflatten(1, (-1, span_len))
    scores = 1 - spans.amax(-1) if scoring == "max" else -spans.log().sum(-1)
    was_masked = masked.unflatten(1, (-1, span_len)).any(-1)
    scores = scores.masked_fill(~was_masked, NEVER)
    num_open = int((~fixed.unflatten(1, (-1, span_len)).all(-1)).sum(1)[0])
    chosen = _top(scores, max(int(share * num_open), 1))
    return chosen.repeat_interleave(span_len, 1) & ~fixed


def remask_sliding(
    certainty: Tensor, masked: Tensor, fixed: Tensor, share: Tensor, span_len: int
) -> Tensor:
    """Least certain spans that start at any frame: `b t` -> bool `b t`."""
    scores = (-certainty.log()).masked_fill(~masked, NEVER)
    target = max(int(share * int((~fixed).sum(1)[0])), 1)
    if span_len <= 1:
        return _top(scores, target) & ~fixed
    return torch.stack([least_probable_spans(row, target, span_len) for row in scores]) & ~fixed


def least_probable_spans(scores: Tensor, target: int, span_len: int) -> Tensor:
    """The last mask of a binary search for `target` frames: scores `t` -> bool `t`."""
    spans = scores.unfold(0, span_len, 1).sum(-1)
    order = spans.topk(len(spans)).indices

    def cover(count: int) -> Tensor:
        starts = torch.zeros_like(scores).index_fill_(0, order[:count], 1)
        return F.max_pool1d(F.pad(starts, (span_len - 1, 0))[None], span_len, 1)[0] > 0

    low, high = max(target // span_len, 1), max(target - span_len + 1, 1)
    mask = cover(round((low + high) / 2))
    while high - low > 1:
        middle = round((low + high) / 2)
        mask = cover(middle)
        if mask.sum() > target:
            high = middle
        else:
            low = middle
    return mask


def _top(scores: Tensor, count: int) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(
        1, scores.topk(count, dim=1).indices, True
    )
