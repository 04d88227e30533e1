"""Reference implementation of the network: simple and slow, computed as in audiocraft.

Stages above 0 use a dense mask over all pairs of frames, repeated over heads, batch and layers.
Logits of all codebooks are computed at all frames, and each decoding pass recomputes the text's
keys and values, with the null condition as a second row of the batch. Tests compare the optimized
network with it, and `bench` measures both. Shapes as in model.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from magnet_train.attention import dense_window
from magnet_train.model import Magnet, sinusoidal_positions


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, context: int, valid: Tensor | None = None
) -> Tensor:
    """`windowed_attention` with a dense mask; context -1 = all frames."""
    if context < 0:
        allowed = None if valid is None else valid[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    b, h, t, _ = q.shape
    allowed = dense_window(t, context, valid, q.device).expand(b, h, t, t)
    # audiocraft `transformer.py` repeats a mask of floats in each layer, and autograd keeps it.
    bias = torch.zeros(b, h, t, t, dtype=q.dtype, device=q.device).masked_fill_(
        ~allowed, -torch.inf
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def dense_rotation(x: Tensor) -> Tensor:
    """Rotary positions as a product with complex numbers: `b h t d` -> `b h t d`."""
    t, d = x.shape[2:]
    angle = torch.arange(t, device=x.device)[:, None] / 10_000 ** (
        torch.arange(0, d, 2, device=x.device) / d
    )
    turned = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([turned.real, turned.imag], dim=-1)


def dense_convolution(x: Tensor, weight: Tensor, valid: Tensor | None) -> Tensor:
    """The depthwise convolution as a sum of shifted copies: `b t d`, `kernel d` -> `b t d`."""
    if valid is not None:
        x = x * valid[..., None]
    side = len(weight) // 2
    padded = F.pad(x, (0, 0, side, side))
    shifted = [padded[:, i : i + x.shape[1]] * row for i, row in enumerate(weight)]
    return torch.stack(shifted).sum(0)


def dense_logits(
    model: Magnet,
    codes: Tensor,
    stage: int,
    states: Tensor,
    tokens: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """Logits of all codebooks at all frames `b k t c`; states are `b s e`, tokens `b s` bool."""
    context = model.config.stage(stage).context
    features = _features(
        model,
        codes,
        states,
        tokens,
        lambda q, k, v: dense_attention(q, k, v, context, valid),
        lambda x, weight: dense_convolution(x, weight, valid),
    )
    books = range(model.config.num_codebooks)
    return torch.stack([F.linear(features, model.head[k]) for k in books], dim=1)


def dense_delayed_logits(
    model: Magnet, codes: Tensor, stage: int, states: Tensor, tokens: Tensor, prompt: int
) -> Tensor:
    """`dense_logits` in the delay layout with `prompt` causal rows."""
    books, t = codes.shape[1:]
    columns = torch.full((*codes.shape[:2], t + books), model.config.mask_id)
    for k in range(books):
        columns[:, k, 1 + k : 1 + k + t] = codes[:, k]
    allowed = delayed_mask(t, books, stage, model.config.stage(stage).context, prompt)
    near = delayed_mask(t, books, stage, -1, prompt)
    near[prompt:stage] = near[max(prompt, stage + t) :] = False  # no frame, no neighbours
    features = _features(
        model,
        columns,
        states,
        tokens,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=allowed),
        lambda x, weight: _masked_convolution(x, weight, near),
    )
    return torch.stack([F.linear(features[:, k : k + t], model.head[k]) for k in range(books)], 1)


def delayed_mask(num_frames: int, books: int, stage: int, context: int, prompt: int) -> Tensor:
    """What each row of the delay layout may attend to: bool `s s`, rows by columns."""
    row = torch.arange(num_frames + books)[:, None]
    column = row.T
    frame = column - 1 - stage  # of the stage's codebook
    own = (frame >= 0) & (frame < num_frames)
    if context >= 0:
        own = own & ((row - stage - frame).abs() <= context)
    is_frame = (row >= stage) & (row < stage + num_frames)
    return torch.where(row < prompt, column <= row, own | ~is_frame)


def _masked_convolution(x: Tensor, weight: Tensor, allowed: Tensor) -> Tensor:
    """The convolution around the next column, over the allowed columns of each row."""
    s, side = x.shape[1], len(weight) // 2
    y = torch.zeros_like(x)
    for row in range(s):
        for i, tap in enumerate(weight):
            column = row + 1 + i - side
            if 0 <= column < s and allowed[row, column]:
                y[:, row] = y[:, row] + x[:, column] * tap
    return y


def _features(
    model: Magnet,
    codes: Tensor,
    states: Tensor,
    tokens: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    convolve: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """What the heads get, `b t d`, under any attention between frames."""
    config = model.config
    x = sum((model.embedding[k][codes[:, k]] for k in range(config.num_codebooks)), torch.zeros(()))
    if config.positions != "rotary":
        x = x + sinusoidal_positions(codes.shape[2], config.dim, codes.device)
    text = model.text_projection(states) * tokens[..., None]
    some = tokens.any(1)
    for block in model.blocks:
        if block.convolution is not None:
            x = x + convolve(x, block.convolution.weight)
        attention = block.self_attention
        q, k, v = attention.qkv(block.self_norm(x)).chunk(3, dim=-1)
        q, k, v = (
            part.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for part in (q, k, v)
        )
        if config.positions != "sinusoidal":
            q, k = (dense_rotation(part) for part in (q, k))
        x = x + attention.out(attend(q, k, v).transpose(1, 2).flatten(2))
        cross = block.cross_attention
        q, (k, v) = cross.q(block.cross_norm(x)), cross.kv(text).chunk(2, dim=-1)
        q, k, v = (part.unflatten(2, (cross.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        allowed = (tokens | ~some[:, None])[:, None, None, :].expand(
            -1, config.num_heads, x.shape[1], -1
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed) * some[:, None, None, None]
        x = x + cross.out(y.transpose(1, 2).flatten(2))
        x = x + block.ffn_out(F.gelu(block.ffn_in(block.ffn_norm(x))))
    return model.out_norm(x)


def dense_networks(
    model: Magnet, states: Tensor, tokens: Tensor
) -> tuple[Callable[[Tensor, int], Tensor], Callable[[Tensor, int], Tensor]]:
    """The conditional and the null pass of `decode`, each with its own text encoding."""

    def conditional(codes: Tensor, stage: int) -> Tensor:
        return dense_logits(model, codes, stage, states, tokens)[:, stage]

    def null(codes: Tensor, stage: int) -> Tensor:
        return dense_logits(
            model, codes, stage, torch.zeros_like(states), torch.zeros_like(tokens)
        )[:, stage]

    return conditional, null
