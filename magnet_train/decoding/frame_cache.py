"""Exact reuse between decoding steps: compute only what changed and will be seen.

In a stage whose attention has a window, a block moves information by at most `reach` frames
(context, and half of the convolution). So after l blocks, a frame differs from the last step only
if a code within l * reach frames changed, and it matters only if a masked frame lies within the
reach of the remaining blocks, because only masked frames are sampled. Both sets are known before
the pass. Each block computes their intersection and takes the rest from the steps before; what
changed but was not needed stays marked as outdated until it is needed, also over the end of a
stage. Logits equal those of a full pass up to rounding. docs/decoding.md shows what remains.

A stage that attends to all frames has no such form, and neither has the delay layout, whose last
row sees everything: both run the full pass. So does a stage in which all blocks together reach so
far that nearly all frames would be computed.

Shapes: b examples, k codebooks, t frames, h heads, c entries, d width, m computed frames of all
examples.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from magnet_train.attention import block_size, text_attention
from magnet_train.layout import FrameInputs, rotate
from magnet_train.model import Block, Magnet, Pass, TextKeyValues

LARGEST_REACH = 128
"""Frames that all blocks together may reach: at 120, four fifths of the frames are computed."""
FAR = 1 << 30
"""Distance to a frame that does not exist."""


class CachedForward:
    """Replaces `Magnet.forward` in one decoding: codes `b k t` and a stage -> logits `b t c`.

    Logits are computed at masked frames and 0 elsewhere. A pass waits for the device, because
    shapes depend on the number of frames to compute.
    """

    def __init__(self, model: Magnet, text: TextKeyValues | None):
        """`text` as in `Magnet.trunk`; passes with and without text need separate objects."""
        self.model, self.text = model, text
        self.num_computed: list[int] = []
        """Frames computed by each block in the last pass: outputs, of all examples."""
        self._codes: Tensor | None = None

    @torch.no_grad()
    def __call__(self, codes: Tensor, stage: int) -> Tensor:
        model, (b, _, t) = self.model, codes.shape
        pass_ = model.config.stage(stage)
        if not self._pays(pass_.context, t):
            return model(codes, pass_, self.text)
        x = model.embedded(codes)
        if self._codes is None or self._frames.context != pass_.context:
            self._start(x, codes, pass_)
        assert self._codes is not None
        masked = codes[:, stage] == model.config.mask_id
        changed, needed = _distance((codes != self._codes).any(1)), _distance(masked)
        self._codes = codes
        features = self._trunk(x.flatten(0, 1), changed, needed)
        frames = masked.flatten().nonzero()[:, 0]
        logits = model.logits(model.out_norm(features.index_select(0, frames)), stage)
        return (
            logits.new_zeros(b * t, logits.shape[1]).index_copy_(0, frames, logits).view(b, t, -1)
        )

    def _pays(self, context: int, num_frames: int) -> bool:
        """Whether a stage with this window can reuse frames, and is faster if it does."""
        config = self.model.config
        reach = config.num_layers * (context + config.convolution // 2)
        has_window = not self.model.is_delayed and 0 <= context < num_frames - 1
        return has_window and reach <= LARGEST_REACH

    def _start(self, x: Tensor, codes: Tensor, pass_: Pass) -> None:
        """Empty caches for a window; everything is outdated."""
        num_blocks = len(self.model.blocks)
        frames = self.model.inputs(x, pass_, None)
        assert isinstance(frames, FrameInputs)
        self._frames, self._codes = frames, codes
        # Of each block: what attention sees, and the output.
        shape = 2 * num_blocks, *x.shape[:2]
        self._outdated = torch.ones(shape, dtype=torch.bool, device=x.device)
        self._caches: list[Tensor | None] = [None] * (3 * num_blocks)

    def _trunk(self, x: Tensor, changed: Tensor, needed: Tensor) -> Tensor:
        """All blocks: inputs `b*t d` and distances `b t` to the next changed and masked frame ->
        features `b*t d`, valid at masked frames.
        """
        blocks, context = self.model.blocks, self._frames.context
        side = self.model.config.convolution // 2
        reach = context + side
        self.num_computed = []
        for i, block in enumerate(blocks):
            remaining = (len(blocks) - 1 - i) * reach
            rows = self._due(2 * i, changed <= i * reach + side, needed <= remaining + context)
            inputs = _at(x, rows)
            if block.convolution is not None:
                inputs = inputs + self._convolved(x, block.convolution.weight, rows)
                x = self._updated(3 * i + 1, rows, inputs)
            qkv = self._updated(3 * i, rows, self._rotated(self._projected(block, inputs), rows))
            rows = self._due(2 * i + 1, changed <= (i + 1) * reach, needed <= remaining)
            self.num_computed.append(len(rows))
            y = _at(x, rows)
            if len(rows):
                y = y + block.self_attention.out(self._attention(qkv, rows))
                if self.text is not None:
                    y = y + block.cross_attention.out(self._text(block, y, rows, i))
                y = y + block.ffn_out(F.gelu(block.ffn_in(block.ffn_norm(y))))
            x = self._updated(3 * i + 2, rows, y)
        return x

    def _due(self, level: int, changed: Tensor, needed: Tensor) -> Tensor:
        """Indices of the frames to compute; the others that changed are outdated from now on."""
        outdated = self._outdated[level] | changed
        due = outdated & needed
        self._outdated[level] = outdated & ~due
        return due.flatten().nonzero()[:, 0]

    def _updated(self, index: int, rows: Tensor, values: Tensor) -> Tensor:
        """A cache of all frames, `b*t …`, after writing `values` (`m …`) to `rows`."""
        cache = self._caches[index]
        if len(rows) == self._outdated[0].numel():
            cache = self._caches[index] = values
            return cache
        if cache is None:
            cache = values.new_zeros(self._outdated[0].numel(), *values.shape[1:])
            self._caches[index] = cache
        return cache.index_copy_(0, rows, values)

    def _projected(self, block: Block, inputs: Tensor) -> Tensor:
        """Queries, keys and values: `m d` -> `m 3 h d`."""
        qkv = block.self_attention.qkv(block.self_norm(inputs))
        return qkv.unflatten(1, (3, self.model.config.num_heads, -1))

    def _rotated(self, qkv: Tensor, rows: Tensor) -> Tensor:
        """With rotary positions, if the model has them: `m 3 h d` -> `m 3 h d`."""
        if self._frames.rotation is None:
            return qkv
        cos, sin = (x[rows % len(x)][:, None, None] for x in self._frames.rotation)
        return torch.cat([rotate(qkv[:, :2], (cos, sin)), qkv[:, 2:]], 1)

    def _convolved(self, x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        """Depthwise convolution at `rows`: `b*t d`, `kernel d` -> `m d`."""
        t, side = self._outdated.shape[2], len(weight) // 2
        padded = F.pad(x.view(-1, t, x.shape[1]), (0, 0, side, side)).flatten(0, 1)
        first = rows + rows // t * (2 * side)
        mixed = torch.zeros(len(rows), x.shape[1], dtype=x.dtype, device=x.device)
        for i, tap in enumerate(weight):
            mixed.addcmul_(padded.index_select(0, first + i), tap)
        return mixed

    def _attention(self, qkv: Tensor, rows: Tensor) -> Tensor:
        """Windowed attention at `rows`, in the blocks of queries that have any: -> `m d`."""
        t, context, bias = self._outdated.shape[2], self._frames.context, self._frames.bias
        assert bias is not None
        size, n = block_size(context), bias.shape[1]
        block = rows // t * n + rows % t // size  # of each row, over all examples
        used, slot = block.unique_consecutive(return_inverse=True)
        start = used // n * t
        first = used % n * size
        ahead = torch.arange(-context, size + context, device=rows.device)
        # Frames beyond the ends are hidden by the bias, so any will do.
        around = start[:, None] + (first[:, None] + ahead).clamp(0, t - 1)
        own = around[:, context : context + size]
        q, k, v = (
            qkv[:, i].index_select(0, at.flatten()).view(*at.shape, *qkv.shape[2:]).transpose(1, 2)
            for i, at in enumerate((own, around, around))
        )
        with torch.autocast(q.device.type, enabled=False):  # scores in float32, as in a full pass
            scores = q.float() @ k.float().transpose(2, 3) * q.shape[3] ** -0.5
            weights = (scores + bias[0, used % n][:, None]).softmax(-1)
            y = weights.to(v.dtype) @ v
        y = y.transpose(1, 2).flatten(2).flatten(0, 1)
        return y.index_select(0, slot * size + rows % t % size)

    def _text(self, block: Block, y: Tensor, rows: Tensor, index: int) -> Tensor:
        """Attention to the text at `rows`: `m d` -> `m d`."""
        text, num_heads = self.text, self.model.config.num_heads
        assert text is not None
        q = block.cross_attention.q(block.cross_norm(y))
        # One row of a table for each example, as long as the largest number of frames.
        _, b, t = self._outdated.shape
        example = rows // t
        counts = torch.bincount(example, minlength=b)
        width = int(counts.max())
        place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[example]
        slots = example * width + place
        table = q
        if len(rows) < b * width:
            table = q.new_zeros(b * width, q.shape[1]).index_copy_(0, slots, q)
        queries = table.view(b, width, num_heads, -1).transpose(1, 2)
        out = text_attention(queries, text.keys[index], text.values[index], text.allowed)
        return _at(out.transpose(1, 2).flatten(2).flatten(0, 1), slots)


def _at(x: Tensor, rows: Tensor) -> Tensor:
    """The rows of `n d`, in ascending order and each at most once: `m d`."""
    return x if len(rows) == len(x) else x.index_select(0, rows)


def _distance(marked: Tensor) -> Tensor:
    """Frames to the nearest marked one: bool `b t` -> `b t`.

    >>> _distance(torch.tensor([[False, True, False, False]])).tolist()
    [[1, 0, 1, 2]]
    """
    frame = torch.arange(marked.shape[1], device=marked.device).expand_as(marked)
    before = torch.where(marked, frame, -FAR).cummax(1).values
    behind = torch.where(marked, frame, FAR).flip(1).cummin(1).values.flip(1)
    return torch.minimum(frame - before, behind - frame)
