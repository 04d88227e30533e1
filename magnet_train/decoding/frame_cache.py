"""Passes of one decoding that compute only the frames that matter to the step: faster, and not
exact.
 Between two steps of a stage most codes stay. This keeps the queries, keys and values of every
layer and computes anew only the frames that the step predicts and those whose codes changed since
the last one; the others keep what the network made of them when they were last computed, although a
neighbour has changed since. How much that costs in the metrics is measured in EXPERIMENTS.md. The
first pass of a stage is exact.

Shapes: b examples, k codebooks, t frames, h heads, c entries, d width, m frames computed anew, of
    all examples.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from magnet_train.attention import text_attention, windowed_attention
from magnet_train.model import Magnet, TextKeyValues, rotate


class CachedForward:
    """A stand-in for `Magnet.forward` in one decoding: codes `b k t` and a stage -> logits `b t c`.

    To be called with the codes of one step after the other. Waits for the device at each pass,
    since the number of frames to compute decides the shapes.
    """

    def __init__(self, model: Magnet, text: TextKeyValues | None):
        """`text` as of `Magnet.trunk`; a pass with text and one without need an object each."""
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
            self.frames = model.frame_inputs(
                x.view(b, t, -1), model.config.stage(stage).context, None
            )
        else:
            active = (codes != self.codes).any(1) | (codes[:, stage] == model.config.mask_id)
        self.codes = codes
        rows = active.flatten().nonzero()[:, 0]
        x = x[rows]  # m d
        for i, block in enumerate(model.blocks):
            if block.convolution is not None:
                self.inputs[i][rows] = x
                x = x + block.convolution(self.inputs[i].view(b, t, -1), None)[active]
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
        """What the active frames (`b t`) get from all frames: `b t 3d` -> `m d`."""
        q, k, v = qkv.unflatten(2, (3, self.model.config.num_heads, -1)).permute(
            2, 0, 3, 1, 4
        )  # each b h t d
        if self.frames.rotation is not None:
            q = rotate(q, *self.frames.rotation)
            k = rotate(k, *self.frames.rotation)
        if self.frames.context >= 0:  # the window is cheap enough to be computed for all
            y = windowed_attention(q, k, v, self.frames.context, bias=self.frames.bias)
            return y.transpose(1, 2).flatten(2)[active]
        examples = zip(q, k, v, active, strict=True)
        parts = [
            F.scaled_dot_product_attention(q[None, :, a], k[None], v[None])[0]
            for q, k, v, a in examples
        ]
        return torch.cat([part.transpose(0, 1).flatten(1) for part in parts])
