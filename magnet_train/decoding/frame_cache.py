"""Approximate forward passes that recompute only some frames in each step.

Most codes do not change between two steps of a stage. This caches the queries, keys and values of
every layer and recomputes only masked frames and those whose codes changed; the others are
outdated if a neighbour changed. EXPERIMENTS.md has the effect on metrics. The first pass of a stage
is exact.

Shapes: b examples, k codebooks, t frames, h heads, c entries, d width, m recomputed frames of all
examples.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from magnet_train.attention import text_attention, windowed_attention
from magnet_train.layout import FrameInputs
from magnet_train.model import Magnet, TextKeyValues


class CachedForward:
    """Replaces `Magnet.forward` in one decoding: codes `b k t` and a stage -> logits `b t c`.

    Call it with the codes of consecutive steps. Each pass waits for the device, because shapes
    depend on the number of frames to compute.
    """

    def __init__(self, model: Magnet, text: TextKeyValues | None):
        """`text` as in `Magnet.trunk`; passes with and without text need separate objects."""
        self.model, self.text, self.stage = model, text, -1

    @torch.no_grad()
    def __call__(self, codes: Tensor, stage: int) -> Tensor:
        model, (b, _, t) = self.model, codes.shape
        x = model.embedded(codes).flatten(0, 1)  # (b t) d
        if stage != self.stage:
            self.stage, active = stage, torch.ones(b, t, dtype=torch.bool, device=codes.device)
            self.qkv = [x.new_empty(b * t, 3 * x.shape[1]) for _ in model.blocks]
            self.inputs = [x.new_empty(b * t, x.shape[1]) for _ in model.blocks]
            self.logits = x.new_empty(b * t, model.config.codebook_size)
            frames = model.frame_inputs(x.view(b, t, -1), model.config.stage(stage), None)
            assert isinstance(frames, FrameInputs)
            self.frames = frames
        else:
            active = (codes != self.codes).any(1) | (codes[:, stage] == model.config.mask_id)
        self.codes = codes
        rows = active.flatten().nonzero()[:, 0]
        x = x[rows]  # m d
        for i, block in enumerate(model.blocks):
            if block.convolution is not None:
                self.inputs[i][rows] = x
                x = x + block.convolution(self.inputs[i].view(b, t, -1), self.frames)[active]
            self.qkv[i][rows] = block.self_attention.qkv(block.self_norm(x))
            x = x + block.self_attention.out(self._frames(self.qkv[i].view(b, t, -1), active))
            if self.text is not None:
                queries = x.new_zeros(b * t, x.shape[1])
                queries[rows] = block.cross_attention.q(block.cross_norm(x))
                q = queries.view(b, t, model.config.num_heads, -1).transpose(1, 2)
                y = text_attention(q, self.text.keys[i], self.text.values[i], self.text.allowed)
                x = x + block.cross_attention.out(y.transpose(1, 2).flatten(2).flatten(0, 1)[rows])
            x = x + block.ffn_out(F.gelu(block.ffn_in(block.ffn_norm(x))))
        self.logits[rows] = model.logits(model.out_norm(x), stage)
        return self.logits.view(b, t, -1)

    def _frames(self, qkv: Tensor, active: Tensor) -> Tensor:
        """Self-attention of the active frames (`b t`) to all frames: `b t 3d` -> `m d`."""
        q, k, v = qkv.unflatten(2, (3, self.model.config.num_heads, -1)).permute(
            2, 0, 3, 1, 4
        )  # each b h t d
        q, k = self.frames.rotated(q, k)
        if self.frames.context >= 0:  # windowed attention is cheap enough for all frames
            y = windowed_attention(q, k, v, self.frames.context, bias=self.frames.bias)
            return y.transpose(1, 2).flatten(2)[active]
        examples = zip(q, k, v, active, strict=True)
        parts = [
            F.scaled_dot_product_attention(q[None, :, a], k[None], v[None])[0]
            for q, k, v, a in examples
        ]
        return torch.cat([part.transpose(0, 1).flatten(1) for part in parts])
