"""Attention: over all frames, over a window of frames, and over text.

Shapes: b examples, h heads, t frames (queries), s text tokens, d width of a head, n blocks, q
queries of a block, w keys visible to a block. `allowed` is bool, True = may be attended.

A dense mask computes T² scores to keep 2 * context + 1 of each row. Here queries are grouped in
blocks of 32, and each block attends to its own keys and `context` more on each side: 42 instead of
1500 keys at a context of 5, so time and memory are linear in T. Neighbouring blocks are taken by
slicing, whose gradient is a plain addition (that of `unfold` scatters). The mask of the blocks is
shared by all layers, and only queries, keys and values are kept for the backward pass.
`dense.dense_attention` is the reference implementation.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from magnet_train.common.private_api import softmax_backward

QUERIES_PER_BLOCK = 32
FRAMES_PER_PIECE = (
    6000  # of all heads together: 1.5 MB of queries at 64 channels, about a core's cache
)
SCORES_PER_PIECE = 2**20


def dense_window(num_frames: int, context: int, valid: Tensor | None = None, device=None) -> Tensor:
    """Dense mask of the window: bool `t t`, or `b 1 t t` with `valid` (`b t`, False = padding)."""
    frame = torch.arange(num_frames, device=device)
    allowed = (frame[:, None] - frame[None, :]).abs() <= context
    if valid is None:
        return allowed
    # A padded frame attends to itself, so that no row is empty; valid frames do not attend to it.
    return (allowed & valid[:, None, :] | torch.eye(num_frames, dtype=torch.bool, device=device))[
        :, None
    ]


def block_size(context: int) -> int:
    """Queries per block: at least the context, so that a block sees only its direct neighbours."""
    return max(QUERIES_PER_BLOCK, context)


def window_bias(t: int, context: int, valid: Tensor | None = None, device: Any = None) -> Tensor:
    """Bias on the scores of each block, 0 or -inf: float32 `1 n q w`, or `b n q w` with `valid`.

    Args:
        t: number of frames.
        context: frames visible on each side; 0 = only itself.
        valid: `b t`, False = padding, which only attends to itself.
        device: where to compute it (default: the CPU).
    """
    context = min(context, t - 1)
    size = block_size(context)
    n = -(-t // size)
    query = torch.arange(n * size, device=device).view(n, size, 1)
    key = torch.arange(n, device=device).view(n, 1, 1) * size - context
    key = key + torch.arange(size + 2 * context, device=device)
    allowed = (((query - key).abs() <= context) & (key >= 0) & (key < t))[None]
    if valid is not None:
        allowed = allowed & valid[:, key.clamp(0, t - 1).view(n, -1)][:, :, None]  # b n 1 w
    # Queries beyond the end, and padded ones, attend to themselves: a row without keys gives NaN.
    allowed = allowed | (query == key)
    return torch.zeros(allowed.shape, device=device).masked_fill_(~allowed, -math.inf)


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention of each frame to those in a window around it (MAGNeT, Sec. 3.3): `b h t d`.

    `bias` is `window_bias`, which all layers share.
    """
    # Precision is chosen here, because autocast would not apply in the backward pass.
    with torch.autocast(q.device.type, enabled=False):
        if torch.compiler.is_compiling():  # the compiler decides what to save and what to recompute
            return _Blocks(q, k, v, bias).output()
        return _InPieces.apply(q, k, v, bias)  # type: ignore[no-any-return]


class _Blocks:
    """Queries, keys and values in blocks, with output and gradients; m = b h n, all blocks."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor):
        self.shape, (self.n, self.size, width) = q.shape, bias.shape[1:]
        self.context = (width - self.size) // 2
        self.queries = self._blocks(q).flatten(0, 2)  # m q d
        self.keys, self.values = self._with_neighbours(k), self._with_neighbours(v)  # m w d
        # For such small blocks, plain products are faster than torch's fused attention on a CPU
        # (9 against 7 times the speed of a dense mask).
        scale = q.shape[3] ** -0.5
        if _is_low_precision_on_cpu(q):
            # bfloat16 products are several times faster on CPUs that have them; only the scores
            # are rounded.
            scores = torch.bmm(self.queries, self.keys.transpose(1, 2)).float().mul_(scale)
            scores.view(*q.shape[:2], *bias.shape[1:]).add_(bias[:, None])
        else:
            # Scores are float32 at any precision, as in fused attention.
            queries, keys = self.queries.float(), self.keys.float()
            bias = bias[:, None].expand(*q.shape[:2], -1, -1, -1).flatten(0, 2)
            scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scale)
        self.weights = scores.softmax(-1)

    def output(self) -> Tensor:
        return self._frames(torch.bmm(self.weights.to(self.values.dtype), self.values))

    def gradients(self, of_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values, `b h t d` each."""
        gradient = self._blocks(of_output).flatten(0, 2)
        of_values = torch.bmm(self.weights.to(gradient.dtype).transpose(1, 2), gradient)
        of_weights = torch.bmm(gradient, self.values.transpose(1, 2))
        # Softmax backward as in torch.
        of_scores = softmax_backward(of_weights, self.weights)
        of_scores = of_scores.mul_(self.shape[3] ** -0.5).to(gradient.dtype)
        of_queries, of_keys = (
            torch.bmm(of_scores, self.keys),
            torch.bmm(of_scores.transpose(1, 2), self.queries),
        )
        return (
            self._frames(of_queries),
            self._sum_of_neighbours(of_keys),
            self._sum_of_neighbours(of_values),
        )

    def _blocks(self, x: Tensor) -> Tensor:
        """`b h t d` -> `b h n q d`, padded with zeros at the end."""
        missing = self.n * self.size - x.shape[2]
        return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, (self.n, self.size))

    def _frames(self, x: Tensor) -> Tensor:
        """`m q d`, or an equivalent shape, -> `b h t d`."""
        return x.reshape(*self.shape[:2], self.n * self.size, -1)[:, :, : self.shape[2]]

    def _with_neighbours(self, x: Tensor) -> Tensor:
        """`b h t d` -> `m w d`: each block with its neighbours' nearest frames."""
        x, context = self._blocks(x), self.context
        if context > 0:
            left = F.pad(x[:, :, :-1, -context:], (0, 0, 0, 0, 1, 0))
            right = F.pad(x[:, :, 1:, :context], (0, 0, 0, 0, 0, 1))
            x = torch.cat([left, x, right], 3)
        return x.flatten(0, 2)

    def _sum_of_neighbours(self, x: Tensor) -> Tensor:
        """The adjoint of `_with_neighbours`: sums the gradients of a frame's copies."""
        x, context = x.view(*self.shape[:2], self.n, -1, self.shape[3]), self.context
        own = x[:, :, :, context : context + self.size]
        if context > 0:
            own[:, :, :-1, -context:] += x[:, :, 1:, :context]
            own[:, :, 1:, :context] += x[:, :, :-1, context + self.size :]
        return self._frames(own)


class _InPieces(torch.autograd.Function):
    """Computes a few heads at a time, so that a piece stays in the cache.

    Only queries, keys and values are saved: the backward pass recomputes scores and copies of
    neighbours, which is as fast as reading them from memory.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        out = torch.empty_like(q)
        for piece in _pieces(q, bias.shape[3]):
            out[piece] = _Blocks(q[piece], k[piece], v[piece], _of_piece(bias, piece)).output()
        return out

    @staticmethod
    def backward(ctx: Any, *of_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors
        gradients = tuple(torch.empty_like(x) for x in (q, k, v))
        for piece in _pieces(q, bias.shape[3]):
            blocks = _Blocks(q[piece], k[piece], v[piece], _of_piece(bias, piece))
            for whole, part in zip(gradients, blocks.gradients(of_output[0][piece]), strict=True):
                whole[piece] = part
        return *gradients, None


def _pieces(q: Tensor, num_keys: int) -> list[tuple[slice, slice]]:
    """Slices of examples and heads that are computed together; on a GPU all of them.

    Each query has `num_keys` scores.
    """
    b, h, t, _ = q.shape
    if q.device.type != "cpu":
        return [(slice(None), slice(None))]
    frames = min(FRAMES_PER_PIECE, SCORES_PER_PIECE // num_keys)
    heads = min(h, max(1, frames // t))
    examples = max(1, frames // (heads * t))
    return [
        (slice(i, i + examples), slice(j, j + heads))
        for i in range(0, b, examples)
        for j in range(0, h, heads)
    ]


def _of_piece(bias: Tensor, piece: tuple[slice, slice]) -> Tensor:
    return bias if len(bias) == 1 else bias[piece[0]]


def _is_low_precision_on_cpu(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype == torch.bfloat16


def full_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of every frame to every frame, with a bias `b 1 1 t` or `1 1 t t`, 0 or -inf.

    In bfloat16 on a CPU, the backward pass of torch's fused attention is slow; plain products, a
    few heads at a time, take a third of its time.
    """
    if not _is_low_precision_on_cpu(q) or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    t = q.shape[2]
    hidden = torch.zeros(1, 1, 1, t) if bias is None else bias.float()
    with torch.autocast("cpu", enabled=False):  # all frames form one block without neighbours
        return _InPieces.apply(q, k, v, hidden.expand(-1, -1, t, t))  # type: ignore


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of every row to itself and those before it: `b h t d` each -> `b h t d`."""
    if not _is_low_precision_on_cpu(q) or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    t = q.shape[2]
    return full_attention(q, k, v, torch.full((1, 1, t, t), -math.inf).triu(1))


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Activation checkpointing: `function(*inputs)` that saves only its inputs.

    Used for norms and GELU, which are cheap to recompute and large to save. A linear layer at the
    end of `function` is not recomputed: the second run stops at that layer's input.
    """
    # A compiler decides for itself what to recompute.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def text_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attention of frames to text: `b h t d`, `b h s d`, `b h s d`, `b s` -> `b h t d`.

    An example without text (the null condition of guidance) gets exactly zero.
    """
    some = allowed.any(1)
    # Examples without text attend to all tokens and are zeroed afterwards: an empty softmax is NaN.
    mask = (allowed | ~some[:, None])[:, None, None, :]
    if _is_low_precision_on_cpu(q) and not torch.compiler.is_compiling():
        out = recomputed(_text_products, q, k, v, mask)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out * some[:, None, None, None].to(out.dtype)


def _text_products(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attention to few tokens as plain products, in a third of the time of torch's fused attention.

    A softmax over so short a last axis is slow, so tokens come before frames: `b h s t`.
    """
    scores = (k @ q.transpose(2, 3)).float() * q.shape[3] ** -0.5
    weights = scores.masked_fill(~allowed.transpose(2, 3), -math.inf).softmax(2).to(v.dtype)
    return weights.transpose(2, 3) @ v
