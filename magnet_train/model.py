"""The transformer: codes, a stage and text in, logits of the stage's codebook out.

- one network for all stages; embeddings and heads are stacked over the K codebooks, and a stage is
  an index
- the codes of a frame are embedded and summed; codebooks above the stage hold the mask id
- stage 0 attends to all frames, the others to `context` frames on each side (MAGNeT, Sec. 3.3)
- every block has cross-attention to the text, whose output is exactly zero without text
- pre-norm, GELU, no biases except in norms and text projection; no dropout
- positions: sinusoids added to the input (published), rotary (RoPE) or both, always in float32
- optional: a depthwise convolution over neighbouring frames at the start of each block

Shapes: b examples, k codebooks, t frames, c entries of a codebook, d width, s text tokens, h heads.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_train.attention import recomputed, text_attention
from magnet_train.common import private_api
from magnet_train.common.errors import UserError
from magnet_train.common.ranges import as_tuple, check_values, per_codebook
from magnet_train.layout import (
    DelayedInputs,
    Inputs,
    causal_rows,
    delayed,
    frame_inputs,
    predicting_rows,
)
from magnet_train.masking import masked_positions


class Pass(NamedTuple):
    """What a forward pass predicts, and its attention window."""

    codebooks: tuple[int, ...]
    """Codebooks whose logits are computed, in this order."""
    context: int = -1
    """Frames visible on each side; -1 = all frames."""
    causal: Tensor | int = 0
    """In the delay layout: number of initial rows with causal attention; -1 = all. One number, or
    one per example, `b`. The other rows belong to the stage of the first codebook.
    """


LARGEST = {
    "dim": 2**16,
    "num_heads": 1024,
    "num_layers": 1024,
    "num_codebooks": 256,
    "codebook_size": 2**16,
    "text_dim": 2**16,
    "ffn_ratio": 64,
}
"""Maximum values, so that a damaged or malicious configuration cannot exhaust memory."""


@dataclass(frozen=True)
class MagnetConfig:
    """Architecture of the network; codebooks and text width follow codec and text encoder."""

    dim: int = 1024
    """Width of the transformer, in channels."""
    num_heads: int = 16
    """Attention heads; must divide `dim`."""
    num_layers: int = 24
    """Transformer blocks."""
    num_codebooks: int = 4
    """Number of codebooks of the codec, and of stages."""
    codebook_size: int = 2048
    """Entries of one codebook; the mask id is one more."""
    text_dim: int = 768
    """Width of the text encoder's states, in channels."""
    context: int | tuple[int, ...] = 5
    """Frames visible on each side; -1 = all frames. A single number applies to stages 1 and up, and
    stage 0 sees all frames, as published. A list has one number per stage, stage 0 first; its last
    number is repeated for further stages.
    """
    ffn_ratio: int = 4
    """Width of the feed-forward layer, in multiples of `dim`."""
    positions: Literal["sinusoidal", "rotary", "both"] = "sinusoidal"
    """Positional encoding: sinusoidal (added to the input, published), rotary (RoPE), or both. With
    rotary alone, the network cannot tell frames apart while all are masked.
    """
    convolution: int = 0
    """Kernel width of a depthwise convolution at the start of each block, in frames (odd); 0 = none
    (published).
    """

    order: Literal["parallel", "hybrid", "autoregressive"] = "parallel"
    """Order of prediction: parallel (MAGNeT), hybrid (an autoregressive beginning, the rest in
    parallel) or autoregressive (MusicGen). The last two use the delay layout.
    """

    def __post_init__(self) -> None:
        if not isinstance(self.context, int):
            object.__setattr__(self, "context", tuple(self.context))  # JSON and YAML give a list
        check_values(self, **{name: f"[1, {most}]" for name, most in LARGEST.items()})
        if self.dim % self.num_heads or self.dim % 2:
            raise UserError(
                f"dim={self.dim} must be even and divisible by num_heads={self.num_heads}"
            )
        if min(as_tuple(self.context), default=-2) < -1:
            raise UserError(
                f"context={self.context} must be 0 or more frames on each side, or -1 for all "
                "frames"
            )
        per_codebook("context", self.context, self.num_codebooks)
        if self.positions != "sinusoidal" and self.dim // self.num_heads % 2:
            raise UserError(
                f"positions={self.positions} needs an even width per head; dim={self.dim}, "
                f"num_heads={self.num_heads}"
            )
        if not 0 <= self.convolution < 1024 or (self.convolution and self.convolution % 2 == 0):
            raise UserError(
                f"convolution={self.convolution} must be an odd number of frames below 1024, "
                "or 0 for none"
            )

    @property
    def mask_id(self) -> int:
        """The extra id of masked frames."""
        return self.codebook_size

    def stage(self, index: int) -> Pass:
        """The pass that predicts codebook `index` from those below it (MAGNeT, Sec. 3.1)."""
        contexts = self.context if isinstance(self.context, tuple) else (-1, self.context)
        return Pass((index,), contexts[min(index, len(contexts) - 1)])

    @property
    def reading(self) -> Pass:
        """The pass that predicts all codebooks, each code from those in the columns before it."""
        return Pass(tuple(range(self.num_codebooks)), causal=-1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Text = tuple[Tensor, Tensor]
"""States of the text encoder, `b s text_dim`, and their mask `b s`, True = token."""


@dataclass(frozen=True)
class TextKeyValues:
    """Keys and values of the text in every block, so that decoding computes them once.

    keys, values: lists of `b h s d`, one per block. allowed: `b s` bool, True = token.
    """

    keys: list[Tensor]
    values: list[Tensor]
    allowed: Tensor


def sinusoidal_positions(num_frames: int, dim: int, device=None) -> Tensor:
    """`t d`: cosines in the first half of the channels, sines in the second; in float32, because
    neighbouring positions beyond 256 would be equal in bfloat16.
    """
    half = dim // 2
    frame = torch.arange(num_frames, dtype=torch.float32, device=device)[:, None]
    channel = torch.arange(half, dtype=torch.float32, device=device)
    phase = frame / 10_000 ** (channel / max(half - 1, 1))
    return torch.cat([phase.cos(), phase.sin()], dim=1)


def stereo_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a mono model for codebooks left 1, right 1, left 2, … (codec/stereo.py).

    Both channels start with the embeddings and heads of their codebook. Embeddings are halved, so
    that their sum in a frame with equal channels is that of the mono model.
    """
    twice = {name: weights[name].repeat_interleave(2, 0) for name in ("embedding", "head")}
    return weights | twice | {"embedding": twice["embedding"] / 2}


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, norm: nn.LayerNorm, frames: Inputs) -> Tensor:
        qkv = recomputed(lambda x: self.qkv(norm(x)), x)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each b h t d
        return self.out(frames.attend(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Projected text `b s d` -> keys and values, `b h s d` each."""
        k, v = self.kv(text).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return k, v

    def forward(
        self, x: Tensor, norm: nn.LayerNorm, k: Tensor, v: Tensor, allowed: Tensor
    ) -> Tensor:
        q = recomputed(lambda x: self.q(norm(x)), x).unflatten(2, (self.num_heads, -1))
        q = q.transpose(1, 2)
        return self.out(text_attention(q, k, v, allowed).transpose(1, 2).flatten(2))


class Convolution(nn.Module):
    """Depthwise convolution over frames, `b t d` -> `b t d`; the layout decides what is near."""

    def __init__(self, dim: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kernel, dim))

    def forward(self, x: Tensor, frames: Inputs) -> Tensor:
        return frames.convolve(x, self.weight)


class Block(nn.Module):
    def __init__(self, config: MagnetConfig):
        super().__init__()
        self.convolution = (
            Convolution(config.dim, config.convolution) if config.convolution else None
        )
        self.self_norm = nn.LayerNorm(config.dim)
        self.self_attention = SelfAttention(config.dim, config.num_heads)
        self.cross_norm = nn.LayerNorm(config.dim)
        self.cross_attention = CrossAttention(config.dim, config.num_heads)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_ratio * config.dim, bias=False)
        self.ffn_out = nn.Linear(config.ffn_ratio * config.dim, config.dim, bias=False)

    def forward(
        self, x: Tensor, frames: Inputs, text: tuple[Tensor, Tensor, Tensor] | None
    ) -> Tensor:
        if self.convolution is not None:
            x = x + self.convolution(x, frames)
        x = x + self.self_attention(x, self.self_norm, frames)
        if text is not None:
            x = x + self.cross_attention(x, self.cross_norm, *text)
        hidden = recomputed(lambda x: self.ffn_in(self.ffn_norm(x)), x)
        return x + recomputed(lambda hidden: self.ffn_out(F.gelu(hidden)), hidden)


class Magnet(nn.Module):
    """MAGNeT's network (Sec. 3): one set of weights for all passes."""

    blocks: "list[Block]"  # a ModuleList, whose items torch leaves untyped

    def __init__(self, config: MagnetConfig):
        super().__init__()
        self.config = config
        self.is_delayed = config.order != "parallel"
        self.text_multiple = 1  # captions are padded to a multiple of this, in tokens
        self.embedding = nn.Parameter(
            torch.empty(config.num_codebooks, config.codebook_size + 1, config.dim)
        )
        self.text_projection = nn.Linear(config.text_dim, config.dim)
        blocks: Any = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.blocks = blocks
        self.out_norm = nn.LayerNorm(config.dim)
        self.head = nn.Parameter(
            torch.empty(config.num_codebooks, config.codebook_size, config.dim)
        )
        self.reset_parameters()

    def compile_blocks(self, **options: Any) -> None:
        """Compile the blocks; all blocks share the compiled code.

        `options` are passed to `torch.compile`. Parameter names do not change.
        """
        self.prepare_for_compile()
        for block in self.blocks:
            block.compile(**options)

    def prepare_for_compile(self) -> None:
        """Pad captions to few lengths, and let the compiler keep a variant for every case.

        Stages, gradients, padding and captions need more than the 8 variants after which the
        compiler silently falls back to eager mode.
        """
        self.text_multiple = 64
        private_api.allow_recompiles(64)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """audiocraft's initialisation (`lm.py` `init_layer`, "gaussian", "current" depth scaling).

        Truncated normals with standard deviation 1/sqrt(fan in), divided by sqrt(2 (i + 1)) in
        block i. As in audiocraft, packed query/key/value projections and the text projection keep
        torch's uniform default.
        """
        if self.embedding.is_meta:  # has no values, and torch would import its compiler for them
            return
        bound = self.config.dim**-0.5

        def gaussian(weight: Tensor, fan_in: int, depth: int | None = None) -> None:
            std = fan_in**-0.5 / math.sqrt(2 * (depth + 1) if depth is not None else 1)
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)

        gaussian(self.embedding, self.config.dim)
        gaussian(self.head, self.config.dim)
        for depth, block in enumerate(self.blocks):
            if block.convolution is not None:
                nn.init.normal_(block.convolution.weight, std=0.5 / self.config.convolution)
            for packed in (
                block.self_attention.qkv,
                block.cross_attention.q,
                block.cross_attention.kv,
            ):
                nn.init.uniform_(packed.weight, -bound, bound)
            for linear in (
                block.self_attention.out,
                block.cross_attention.out,
                block.ffn_in,
                block.ffn_out,
            ):
                # audiocraft scales all linear layers of a block by depth.
                gaussian(linear.weight, linear.in_features, depth)

    @torch.no_grad()
    def start_from_codebooks(self, codebooks: Tensor, generator: torch.Generator) -> None:
        """Initialise embeddings and heads with the codec's codebooks under a random rotation.

        Codes that sound alike then start with similar embeddings. With the published random
        initialisation, a short run spends all its time on learning that notes continue. Heads keep
        the published scale; embeddings get the scale of the positions.

        Args:
            codebooks: `k c e`, any width e.
            generator: draws the rotation, which is shared by all codebooks because their entries
                add up to a frame's latent.
        """
        width = max(codebooks.shape[2], self.config.dim)
        rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        turned = codebooks @ rotation[: codebooks.shape[2], : self.config.dim].to(codebooks)
        turned = turned / turned.square().mean((1, 2), keepdim=True).sqrt()
        self.embedding[:, :-1] = 0.5 * turned  # the mask's embedding stays
        self.head.copy_(turned * self.config.dim**-0.5)

    def encode_text(self, states: Tensor, allowed: Tensor) -> TextKeyValues:
        """Text states `b s text_dim` and mask `b s` (True = token) -> keys and values per block."""
        if missing := -states.shape[1] % self.text_multiple:
            states, allowed = F.pad(states, (0, 0, 0, missing)), F.pad(allowed, (0, missing))
        text = self.text_projection(states) * allowed[..., None].to(states.dtype)
        pairs = [block.cross_attention.keys_values(text) for block in self.blocks]
        return TextKeyValues([k for k, _ in pairs], [v for _, v in pairs], allowed)

    def trunk(
        self, codes: Tensor, pass_: Pass, text: TextKeyValues | None, valid: Tensor | None = None
    ) -> Tensor:
        """Features of every row: `b k t` -> `b t d`; in the delay layout `b s d`.

        Args:
            codes: the mask id marks unknown codes, also all those above the predicted codebooks.
            pass_: `config.stage(k)` for MAGNeT's stages.
            text: from `encode_text`; None = no example has text, and cross-attention is skipped.
            valid: `b t`, False = padding; None = no padding.
        """
        x = self.embedded(delayed(codes, self.config.mask_id) if self.is_delayed else codes)
        inputs = self.inputs(x, pass_, valid)
        for i, block in enumerate(self.blocks):
            of_text = None if text is None else (text.keys[i], text.values[i], text.allowed)
            x = block(x, inputs, of_text)
        return self.out_norm(x)

    def embedded(self, codes: Tensor, first: int = 0) -> Tensor:
        """Input of the first block, from column `first` on: `b k s` -> `b s d`."""
        k, size = self.config.num_codebooks, self.config.codebook_size + 1
        offset = torch.arange(k, device=codes.device)[:, None] * size
        x = F.embedding(codes + offset, self.embedding.flatten(0, 1)).sum(1)
        if self.config.positions == "rotary":  # not added to the input
            return x
        end = first + codes.shape[2]
        positions = sinusoidal_positions(end, self.config.dim, codes.device)[first:]
        return (x.float() + positions).to(x.dtype)

    def rotation(self, num_columns: int) -> tuple[Tensor, Tensor] | None:
        """RoPE's cosines and sines, `t d/2` each in float32; None = positions are sinusoidal."""
        if self.config.positions == "sinusoidal":
            return None
        head_dim, device = self.config.dim // self.config.num_heads, self.head.device
        frame = torch.arange(num_columns, dtype=torch.float32, device=device)[:, None]
        pair = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
        angles = frame / 10_000 ** (2 * pair / head_dim)
        return angles.cos(), angles.sin()

    def inputs(self, x: Tensor, pass_: Pass, valid: Tensor | None) -> Inputs:
        """Inputs that are the same for all blocks, from the embedded codes `b t d`, or `b s d`."""
        rotation = self.rotation(x.shape[1])
        if not self.is_delayed:
            return frame_inputs(x, pass_.context, valid, rotation)
        return self._delayed_inputs(x, pass_, valid, rotation)

    def _delayed_inputs(
        self, x: Tensor, pass_: Pass, valid: Tensor | None, rotation: tuple[Tensor, Tensor] | None
    ) -> DelayedInputs:
        num_frames, stage = x.shape[1] - self.config.num_codebooks, pass_.codebooks[0]
        frames = frame_inputs(x[:, :num_frames], pass_.context, valid, None)
        seen = None
        if valid is not None:  # columns beside the stage's own are never padding
            beside = (1 + stage, self.config.num_codebooks - 1 - stage)
            seen = F.pad(valid, beside, value=True)[:, None, None]
        causal = causal_rows(pass_.causal, x.shape[1], x.device)
        return DelayedInputs(frames, stage, num_frames, causal, rotation, seen)

    def rows(self, features: Tensor, codebook: int) -> Tensor:
        """Features of the rows that predict a codebook, one for each frame: `b s d` -> `b t d`."""
        if not self.is_delayed:
            return features
        return predicting_rows(features, codebook, self.config.num_codebooks)

    def logits(self, features: Tensor, codebook: int) -> Tensor:
        """Logits of one codebook: `… d` -> `… c`."""
        return F.linear(features, self.head[codebook])

    def masked_logits(
        self, codes: Tensor, pass_: Pass, text: Text, masked: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """Training forward pass: logits `n c` at the n masked frames, codebook after codebook.

        `masked` is `b t` for a pass of one codebook, `b m t` for m; on the host, so that nothing
        waits for the device. Other arguments as in `trunk`.
        """
        features = self.trunk(codes, pass_, self.encode_text(*text), valid)
        of_books = masked.reshape(len(masked), len(pass_.codebooks), -1).unbind(1)
        logits = []
        for book, frames in zip(pass_.codebooks, of_books, strict=True):
            rows = self.rows(features, book).flatten(0, 1)
            chosen = rows.index_select(0, masked_positions(frames, rows.device))
            logits.append(self.logits(chosen, book))
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def forward(
        self, codes: Tensor, pass_: Pass, text: TextKeyValues | None, valid: Tensor | None = None
    ) -> Tensor:
        """Logits of the pass's codebooks at all frames: `b k t` -> `b t c`, or `b n t c` for n > 1.

        Arguments as in `trunk`.
        """
        features = self.trunk(codes, pass_, text, valid)
        logits = [self.logits(self.rows(features, book), book) for book in pass_.codebooks]
        return logits[0] if len(logits) == 1 else torch.stack(logits, 1)
