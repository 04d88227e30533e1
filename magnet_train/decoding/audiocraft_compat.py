"""audiocraft's choice of what to mask again (896ec7c, `models/lm_magnet.py`), faults included.

For comparisons with published results only; `decoding.py` does the right thing. It differs in this:

- a prompt that ends inside a span leaves that span maskable, although its frames are given again at
  each step
- ties fall as `torch.topk` lets them fall
- sliding spans: a binary search over their number returns what it tried last instead of the closest
 Two more faults are the callers' to reproduce: `decode` drops the frames behind the last whole
span, and `Generator.generate` lets captions' padding be attended to.

Shapes: b examples, t frames, u units (spans of the grid), s spans.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

NEVER = -1e4


def remask_grid(
    certainty: Tensor, masked: Tensor, fixed: Tensor, share: Tensor, span_len: int, scoring: str
) -> Tensor:
    """Least certain units of a grid, t a multiple of the span: `b t` -> bool `b t`."""
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
    """Least certain spans that may begin anywhere: `b t` -> bool `b t`."""
    scores = (-certainty.log()).masked_fill(~masked, NEVER)
    target = max(int(share * int((~fixed).sum(1)[0])), 1)
    if span_len <= 1:
        return _top(scores, target) & ~fixed
    return torch.stack([least_probable_spans(row, target, span_len) for row in scores]) & ~fixed


def least_probable_spans(scores: Tensor, target: int, span_len: int) -> Tensor:
    """The mask that a binary search for `target` frames tried last: scores `t` -> bool `t`."""
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
