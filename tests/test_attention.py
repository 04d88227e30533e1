"""Windowed attention in blocks equals attention with a dense mask, forward and backward."""

import pytest
import torch
from torch.nn import functional as F

from magnet_train.attention import (
    dense_window,
    text_attention,
    window_bias,
    windowed_attention,
)


@pytest.mark.parametrize("context", [0, 1, 5, 40, 200])
@pytest.mark.parametrize("num_frames", [1, 7, 64, 77])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_equal_the_dense_mask(context, num_frames, padded):
    q, k, v = (torch.randn(2, 3, num_frames, 8, requires_grad=True) for _ in range(3))
    valid = None
    if padded:
        valid = (
            torch.arange(num_frames)[None]
            < torch.tensor([num_frames, max(1, num_frames // 2)])[:, None]
        )
    weight = torch.randn(2, 3, num_frames, 8)
    if valid is not None:
        weight = weight * valid[:, None, :, None]
    fast = windowed_attention(q, k, v, window_bias(num_frames, context, valid))
    mask = dense_window(num_frames, context, valid)
    slow = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(fast * weight, slow * weight, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad((fast * weight).sum(), (q, k, v)),
        torch.autograd.grad((slow * weight).sum(), (q, k, v)),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_null_caption_gives_exactly_nothing_and_padding_changes_nothing():
    q, k, v = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8)
    allowed = torch.tensor([[True, True, False, False], [False] * 4])
    out = text_attention(q, k, v, allowed)
    assert (out[1] == 0).all() and not out.isnan().any()
    alone = text_attention(q[:1], k[:1, :, :2], v[:1, :, :2], allowed[:1, :2])
    assert torch.allclose(out[:1], alone, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_half_precision_by_autocast_trains_and_stays_near_float32(padded):
    """Forward under autocast and backward outside of it, as in Lightning."""
    x = torch.randn(2, 77, 3 * 32, requires_grad=True)
    weight = torch.randn(96, 96) / 10
    valid = torch.arange(77)[None] < torch.tensor([[77], [40]]) if padded else None

    def loss(half: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            q, k, v = (x @ weight).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            assert q.dtype == (torch.bfloat16 if half else torch.float32)
            y = windowed_attention(q, k, v, window_bias(77, 5, valid))
            assert y.dtype == q.dtype
        return y.float().square().mean()

    exact, near = (torch.autograd.grad(loss(half), x)[0] for half in (False, True))
    assert (exact - near).abs().max() < 0.03 * exact.abs().max()


def test_a_context_beyond_the_sequence_costs_no_more_than_the_sequence():
    q, k, v = torch.randn(3, 1, 1, 20, 8)
    bias = window_bias(20, 10_000)
    assert torch.equal(bias, window_bias(20, 19))
    assert torch.allclose(
        windowed_attention(q, k, v, bias), F.scaled_dot_product_attention(q, k, v), atol=1e-6
    )
