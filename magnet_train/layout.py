"""Layout of codes in the network's sequence, and the attention of its rows.

MAGNeT's layout is parallel: column t has all codes of frame t, and row t predicts them. The layout
of MusicGen and hybrid MAGNeT is delayed: T frames and K codebooks give S = T + K columns. Code
(k, t) is in column 1 + t + k, all other entries are the mask id, and the code is predicted in row
t + k, the column before its own. So a causal row does not see the codes that it predicts.

The network uses the delay layout in two ways (`Pass`):

- causal: a row attends to the columns up to its own
- as a stage of MAGNeT: rows k … k + T - 1 are the frames of codebook k and attend to the columns
  1 + k … k + T, which have its codes, fully or in a window as in the parallel layout; the K other
  rows attend to all columns

In training of a hybrid, rows before an example's prompt step are causal and the others belong to
the stage (audiocraft, branch hybrid_magnet).

Shapes: b examples, k codebooks, t frames, s columns, h heads, d width.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from magnet_train.attention import (
    causal_attention,
    full_attention,
    window_bias,
    windowed_attention,
)


def delayed(codes: Tensor, special: int) -> Tensor:
    """Codes in the delay layout: `b k t` -> `b k t+k`, filled up with `special`."""
    b, k, t = codes.shape
    columns = codes.new_full((b, k, t + k), special)
    for book in range(k):
        columns[:, book, 1 + book : 1 + book + t] = codes[:, book]
    return columns


def undelayed(columns: Tensor) -> Tensor:
    """The inverse of `delayed`: `b k s` -> `b k t`."""
    k = columns.shape[1]
    t = columns.shape[2] - k
    return torch.stack([columns[:, book, 1 + book : 1 + book + t] for book in range(k)], 1)


def predicting_rows(features: Tensor, codebook: int, num_codebooks: int) -> Tensor:
    """Rows of the delay layout `b s d` that predict a codebook, one per frame: `b t d`."""
    return features[:, codebook : features.shape[1] - num_codebooks + codebook]


def prompt_frames(steps: Tensor, num_codebooks: int, num_frames: int) -> Tensor:
    """Codes predicted by rows before a prompt step: `b` -> bool `b k t`.

    For step p, these are the first p - k frames of codebook k.
    """
    frame = torch.arange(num_frames, device=steps.device)
    codebook = torch.arange(num_codebooks, device=steps.device)[:, None]
    return frame + codebook < steps[:, None, None]


# --- what rows attend to --------------------------------------------------------------------------


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """Queries or keys `b h t d` with RoPE (Su et al., 2021), in float32; None = unchanged. Channel
    i pairs with channel i + d/2; scores then depend only on the distance of two frames.
    """
    if rotation is None:
        return x
    cos, sin = rotation
    whole = x.float()
    # Both halves at once: [first cos - second sin, second cos + first sin] in few passes.
    swapped = whole.roll(x.shape[-1] // 2, -1).mul_(torch.cat([-sin, sin], -1))
    return (whole * torch.cat([cos, cos], -1)).add_(swapped).to(x.dtype)


@dataclass(frozen=True)
class FrameInputs:
    """Inputs shared by all blocks of a pass, in the parallel layout."""

    context: int
    """Frames visible on each side; -1 = all."""
    bias: Tensor | None
    """Added to the attention scores, 0 or -inf; None = all frames are visible."""
    valid: Tensor | None
    """`b t`, False = padding; None = no padding."""
    rotation: tuple[Tensor, Tensor] | None
    """Cosines and sines, `t d/2` each; None = positions are sinusoidal."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention: queries, keys and values `b h t d` -> `b h t d`."""
        q, k = rotate(q, self.rotation), rotate(k, self.rotation)
        if self.context >= 0:
            assert self.bias is not None
            return windowed_attention(q, k, v, self.bias)
        return full_attention(q, k, v, self.bias)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Depthwise convolution over frames: `b t d`, `kernel d` -> `b t d`; padding is zero."""
        if self.valid is not None:
            x = x.masked_fill(~self.valid[..., None], 0)
        kernel, dim = weight.shape
        mixed = F.conv1d(x.transpose(1, 2), weight.T[:, None], padding=kernel // 2, groups=dim)
        return mixed.transpose(1, 2)


@dataclass(frozen=True)
class DelayedInputs:
    """Inputs shared by all blocks in the delay layout: one stage after a causal beginning."""

    frames: FrameInputs
    """Inputs for attention among the stage's frames, without positions."""
    codebook: int
    """Codebook k of the stage."""
    num_frames: int
    """T."""
    causal: Tensor | bool
    """Causal rows, bool `b s`; or whether all rows are causal."""
    rotation: tuple[Tensor, Tensor] | None
    """Cosines and sines of the columns, `s d/2` each; None = positions are sinusoidal."""
    seen: Tensor | None
    """Columns that are not padding, bool `b 1 1 s`; None = no padding."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As in FrameInputs, for rows and columns."""
        q, k = rotate(q, self.rotation), rotate(k, self.rotation)
        if self.causal is True:
            return causal_attention(q, k, v)
        rows, columns = self._rows, self._columns
        of_frames = self.frames.attend(q[:, :, rows], k[:, :, columns], v[:, :, columns])
        others = torch.cat([q[:, :, : rows.start], q[:, :, rows.stop :]], 2)
        of_others = F.scaled_dot_product_attention(others, k, v, attn_mask=self.seen)
        before, behind = of_others.split([rows.start, others.shape[2] - rows.start], 2)
        of_stage = torch.cat([before, of_frames, behind], 2)
        if self.causal is False:
            return of_stage
        return torch.where(self.causal[:, None, :, None], causal_attention(q, k, v), of_stage)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """As in FrameInputs: a stage's row uses the columns around its frame, a causal row only
        those up to its own, and other rows none.
        """
        before = _convolve_before(x, weight)
        if self.causal is True:
            return before
        rows = self._rows
        of_frames = self.frames.convolve(x[:, self._columns], weight)
        of_stage = F.pad(of_frames, (0, 0, rows.start, x.shape[1] - rows.stop))
        if self.causal is False:
            return of_stage
        return torch.where(self.causal[..., None], before, of_stage)

    @property
    def _rows(self) -> slice:
        return slice(self.codebook, self.codebook + self.num_frames)

    @property
    def _columns(self) -> slice:
        return slice(self.codebook + 1, self.codebook + 1 + self.num_frames)


def _convolve_before(x: Tensor, weight: Tensor) -> Tensor:
    """Causal part of the convolution around the next column: `b s d` -> `b s d`."""
    side = len(weight) // 2
    if side == 0:
        return torch.zeros_like(x)
    padded = F.pad(x.transpose(1, 2), (side - 1, 0))
    return F.conv1d(padded, weight[:side].T[:, None], groups=x.shape[2]).transpose(1, 2)


Inputs = FrameInputs | DelayedInputs


def causal_rows(prompt: Tensor | int, num_columns: int, device: Any) -> Tensor | bool:
    """Causal rows, those before a prompt step per example (`b`) or for all: bool `b s`, or whether
    all rows are causal; -1 = all.
    """
    if isinstance(prompt, int) and (prompt <= 0 or prompt >= num_columns):
        return prompt != 0
    steps = torch.as_tensor(prompt, device=device).reshape(-1, 1)
    return torch.arange(num_columns, device=device) < steps


def frame_inputs(
    x: Tensor, context: int, valid: Tensor | None, rotation: tuple[Tensor, Tensor] | None
) -> FrameInputs:
    """Inputs that blocks share for frames `b t d`."""
    num_frames, bias = x.shape[1], None
    if 0 <= context < num_frames - 1:
        bias = window_bias(num_frames, context, valid, x.device)
        return FrameInputs(context, bias, valid, rotation)
    if valid is not None:  # hides padding: `b 1 1 t`
        zeros = torch.zeros(valid.shape, dtype=x.dtype, device=valid.device)
        bias = zeros.masked_fill_(~valid, -math.inf)[:, None, None]
    return FrameInputs(-1, bias, valid, rotation)  # a window that covers all frames is none
