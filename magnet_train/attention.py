"""Attention: over all frames, over a window of frames, and over text.

Shapes: b examples, h heads, t frames (queries), s text tokens, d width of a head, n blocks, q queries of a
block, w keys that a block may see. `allowed` is bool, True = may be attended.

Why the window is fast: a dense mask computes T² scores to keep 2 * context + 1 of each row. Here queries lie in
blocks of 32, and each block meets its own keys and `context` more on either side: 42 instead of 1500 at a context of
5. So time and memory grow with T. Neighbours come by slicing, whose backward pass is a plain addition (`unfold` would
scatter), and the mask of the blocks is made once for all layers. `twin.dense_attention` is the slow, obvious form.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

QUERIES_PER_BLOCK = 32


def dense_window(num_frames: int, context: int, valid: Tensor | None = None, device=None) -> Tensor:
    """The window as a mask over all pairs: bool `t t`, or `b 1 t t` with `valid` (`b t`, False = padding)."""
    frame = torch.arange(num_frames, device=device)
    allowed = (frame[:, None] - frame[None, :]).abs() <= context
    if valid is None:
        return allowed
    # A padded frame keeps itself, so that no row is empty; nothing real attends to it.
    return (allowed & valid[:, None, :] | torch.eye(num_frames, dtype=torch.bool, device=device))[:, None]


def block_size(context: int) -> int:
    """Queries in a block: at least as many as the context, so that a block's neighbours hold all it sees."""
    return max(QUERIES_PER_BLOCK, context)


def window_bias(q: Tensor, context: int, valid: Tensor | None = None) -> Tensor:
    """What is added to the scores of each block's keys, 0 or -inf: `1 n q w`, or `(b h) n q w` with `valid`.

    Args:
        q: queries, `b h t d`; gives shape, precision and device.
        context: frames visible on each side.
        valid: `b t`, False = padding, seen by nobody but itself.
    """
    t, size = q.shape[2], block_size(context)
    n = -(-t // size)
    query = torch.arange(n * size, device=q.device).view(n, size, 1)
    key = torch.arange(n, device=q.device).view(n, 1, 1) * size - context
    key = key + torch.arange(size + 2 * context, device=q.device)
    allowed = ((query - key).abs() <= context) & (key >= 0) & (key < t)
    if valid is not None:
        allowed = allowed & valid[:, key.clamp(0, t - 1).view(n, -1)][:, :, None]  # b n 1 w
    # Queries behind the end, and padded ones, keep themselves: a row without keys would be NaN.
    allowed = allowed | (query == key)
    bias = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill_(~allowed, -math.inf)
    return bias[None] if valid is None else bias.repeat_interleave(q.shape[1], 0)


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, context: int, valid: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Attention of each frame to the frames at most `context` away (MAGNeT, Sec. 3.3): `b h t d` each.

    Args:
        q: queries.
        k: keys.
        v: values.
        context: frames visible on each side; 0 = only itself.
        valid: `b t`, False = padding, seen by nobody but itself; not read if `bias` is given.
        bias: `window_bias` of such queries, where several layers share it.
    """
    b, h, t, d = q.shape
    size = block_size(context)
    n = -(-t // size)

    def blocks(x: Tensor) -> Tensor:  # b h t d -> (b h) n q d
        x = F.pad(x, (0, 0, 0, n * size - t)) if t % size else x
        return x.unflatten(2, (n, size)).flatten(0, 1)

    def with_neighbours(x: Tensor) -> Tensor:  # (b h) n q d -> (b h n) w d
        if context > 0:
            left = F.pad(x[:, :-1, -context:], (0, 0, 0, 0, 1, 0))
            right = F.pad(x[:, 1:, :context], (0, 0, 0, 0, 0, 1))
            x = torch.cat([left, x, right], 2)
        return x.flatten(0, 1)

    bias = window_bias(q, context, valid) if bias is None else bias
    keys, values = with_neighbours(blocks(k)), with_neighbours(blocks(v))
    # Plain products: so small, they beat torch's fused attention on a CPU (9 against 7 times the dense mask's speed).
    bias = bias.expand(b * h, -1, -1, -1).flatten(0, 1)
    scores = torch.baddbmm(bias, blocks(q).flatten(0, 1), keys.transpose(1, 2), alpha=d**-0.5)
    out = torch.bmm(scores.softmax(-1, dtype=torch.float32).to(values.dtype), values)
    return out.view(b, h, n * size, d)[:, :, :t]


def text_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attention of frames to text: `b h t d`, `b h s d`, `b h s d`, `b s` -> `b h t d`.

    An example without text (the null condition of guidance) gets exactly zero.
    """
    some = allowed.any(1)
    # Rows without text attend to anything and are zeroed after: a softmax over nothing is NaN.
    mask = (allowed | ~some[:, None])[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out * some[:, None, None, None].to(out.dtype)
