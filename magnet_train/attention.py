"""Attention: over all frames, over a window of frames, and over text.

Shapes: b examples, h heads, t frames (queries), s text tokens, d width of a head, n blocks, q queries of a
block, w keys that a block may see. `allowed` is bool, True = may be attended.

A window of `context` frames on each side is computed in blocks of queries against the keys around them, so
its cost grows with T and not with T². `dense_window` is the slow, obvious twin that the tests compare with.
"""

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


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, context: int, valid: Tensor | None = None) -> Tensor:
    """Attention of each frame to the frames at most `context` away (MAGNeT, Sec. 3.3): `b h t d` each.

    Args:
        q: queries.
        k: keys.
        v: values.
        context: frames visible on each side; 0 = only itself.
        valid: `b t`, False = padding, seen by nobody but itself.
    """
    b, h, t, d = q.shape
    size = max(QUERIES_PER_BLOCK, context)
    n = -(-t // size)
    tail = n * size - t
    width = size + 2 * context

    def blocks_of_keys(x: Tensor) -> Tensor:  # b h t d -> (b n) h w d
        x = F.pad(x, (0, 0, context, tail + context))
        return x.unfold(2, width, size).permute(0, 2, 1, 4, 3).reshape(b * n, h, width, d)

    queries = F.pad(q, (0, 0, 0, tail)).view(b, h, n, size, d).transpose(1, 2).reshape(b * n, h, size, d)
    allowed = _block_mask(b, n, size, context, t, valid, q.device)
    out = F.scaled_dot_product_attention(queries, blocks_of_keys(k), blocks_of_keys(v), attn_mask=allowed)
    return out.view(b, n, h, size, d).transpose(1, 2).reshape(b, h, n * size, d)[:, :, :t]


def _block_mask(b: int, n: int, size: int, context: int, t: int, valid: Tensor | None, device) -> Tensor:
    """Which of its keys each query of each block may attend: bool `(b n) 1 q w`."""
    query = torch.arange(n * size, device=device).view(n, size, 1)
    key = (torch.arange(n, device=device) * size - context).view(n, 1, 1) + torch.arange(
        size + 2 * context, device=device
    )
    near = (query - key).abs() <= context
    inside = (key >= 0) & (key < t)
    if valid is None:
        allowed = (near & inside).expand(b, n, size, -1)
    else:
        seen = valid[:, key.clamp(0, t - 1).view(n, -1)][:, :, None, :]  # b n 1 w
        allowed = near & inside & seen
    # Queries behind the end, and padded ones, keep themselves: a row without keys would be NaN.
    return (allowed | (query == key)).reshape(b * n, 1, size, -1)


def text_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attention of frames to text: `b h t d`, `b h s d`, `b h s d`, `b s` -> `b h t d`.

    An example without text (the null condition of guidance) gets exactly zero.
    """
    some = allowed.any(1)
    # Rows without text attend to anything and are zeroed after: a softmax over nothing is NaN.
    mask = (allowed | ~some[:, None])[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out * some[:, None, None, None].to(out.dtype)
