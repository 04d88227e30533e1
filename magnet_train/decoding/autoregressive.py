"""Autoregressive decoding as in MusicGen: the beginning of a hybrid's result, or all frames.

In the delay layout (layout.py) each step fills one column: one code per codebook, of K neighbouring
frames. The networks are callables that take one column after the other, so that tests can script
them; `CausalForward` is the implementation for Magnet and computes each column once.

Shapes: b examples, k codebooks, t frames, s columns, c entries, h heads, d width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from magnet_train.attention import text_attention
from magnet_train.common.errors import UserError
from magnet_train.common.randomness import generator_for
from magnet_train.decoding.decode import PER_STAGE, DecodingConfig
from magnet_train.decoding.sampling import sample
from magnet_train.layout import delayed, rotate, undelayed
from magnet_train.model import Magnet, MagnetConfig, TextKeyValues

NextColumn = Callable[[Tensor], Tensor]
"""Codes of a column `b k` -> logits of the next one, `b k c`. Called for consecutive columns."""


def check_decoding(network: MagnetConfig, decoding: DecodingConfig, duration_s: float) -> None:
    """Check that a network can decode this length with these settings.

    Raises:
        UserError: if it has fewer stages than a setting has numbers, cannot be rescored, or the
            autoregressive beginning is longer than the result or not supported.
    """
    books, wanted = network.num_codebooks, decoding.autoregressive_s
    for name in PER_STAGE:
        decoding.per_stage(name, books)
    stages = decoding.rescore_stages or ()
    if max(stages, default=0) >= books:
        raise UserError(f"rescore_stages={list(stages)}: the model has stages 0 to {books - 1}")
    if network.order == "autoregressive" and decoding.rescorer is not None:
        raise UserError(
            f"rescorer={decoding.rescorer}: this model decodes nothing in parallel; remove it, or "
            "choose a MAGNeT or hybrid"
        )
    if network.order == "parallel":
        if wanted:
            raise UserError(
                f"autoregressive_s={wanted}: this model decodes in parallel only; set it to 0, "
                "or choose a hybrid"
            )
        return
    if decoding.reference_compat:
        raise UserError(
            "reference_compat=true: only for models with order=parallel; set it to false"
        )
    if wanted > duration_s:
        raise UserError(
            f"autoregressive_s={wanted} is longer than the result of {duration_s:g} s; shorten it, "
            "or generate more"
        )


def autoregressive_frames(
    network: MagnetConfig, decoding: DecodingConfig, num_frames: int, frame_rate: float
) -> int:
    """Number of frames to decode autoregressively.

    Raises:
        UserError: as in `check_decoding`.
    """
    wanted = round(decoding.autoregressive_s * frame_rate)
    rounded_s = max(num_frames / frame_rate, decoding.autoregressive_s * (wanted <= num_frames))
    check_decoding(network, decoding, rounded_s)
    return num_frames if network.order == "autoregressive" else wanted


def autoregressive_noise(
    seed: int, items: Sequence[str], num_codebooks: int, num_columns: int
) -> Tensor:
    """Uniform noise in [0, 1) per item and code: `b k s`."""
    return torch.stack(
        [
            torch.rand(
                num_columns, num_codebooks, generator=generator_for(f"{seed}/{item}/autoregressive")
            ).T
            for item in items
        ]
    )


@torch.no_grad()
def decode_autoregressively(
    conditional: NextColumn,
    null: NextColumn | None,
    codes: Tensor,
    given: Tensor,
    codebook_size: int,
    config: DecodingConfig,
    noise: Tensor,
) -> Tensor:
    """Decode all codes that are not given: `b k t` -> `b k t`.

    Args:
        conditional: pass with text.
        null: pass without text, for guidance; None = no guidance.
        codes: codes to keep where `given`; ignored elsewhere.
        given: `b k t`, True = kept.
        codebook_size: c; the mask id is c.
        config: decoding settings.
        noise: from `autoregressive_noise`, with at least t + k columns.
    """
    coef = config.autoregressive_cfg_coef
    columns = delayed(codes.where(given, codebook_size), codebook_size)
    is_open = delayed((~given).long(), 0).bool()
    for s in range(columns.shape[2] - 1):
        logits = conditional(columns[:, :, s]).float()
        if null is not None and coef != 1:
            without = null(columns[:, :, s]).float()
            logits = without + (logits - without) * coef
        if config.greedy:
            chosen = logits.argmax(-1)
        else:
            probs = torch.softmax(logits / config.autoregressive_temperature, dim=-1)
            chosen = sample(probs, 0.0, config.autoregressive_top_k, noise[:, :, s])
        columns[:, :, s + 1] = torch.where(is_open[:, :, s + 1], chosen, columns[:, :, s + 1])
    return undelayed(columns)


def decode_beginning(
    network: Magnet,
    texts: tuple[TextKeyValues | None, TextKeyValues | None],
    codes: Tensor,
    given: Tensor,
    config: DecodingConfig,
    noise: Tensor,
) -> Tensor:
    """`decode_autoregressively` with a network, for all frames of `codes`, `b k t`.

    Args:
        network: a network of order hybrid or autoregressive.
        texts: the captions, and the texts to guide away from; None = without text. There is no
            guidance if both are None.
        codes: as in `decode_autoregressively`.
        given: as in `decode_autoregressively`.
        config: decoding settings.
        noise: as in `decode_autoregressively`.
    """
    b, k, t = codes.shape
    conditional, null = (CausalForward(network, text, b, t + k) for text in texts)
    size = network.config.codebook_size
    guide = None if texts[0] is texts[1] else null
    return decode_autoregressively(conditional, guide, codes, given, size, config, noise)


class CausalForward:
    """Causal forward pass of a network with a key-value cache, one column at a time."""

    def __init__(self, model: Magnet, text: TextKeyValues | None, batch_size: int, columns: int):
        """Allocate caches for this many columns; passes with and without text need two objects."""
        self.model, self.text, self.place = model, text, 0
        config, head = model.config, model.head
        shape = (batch_size, config.num_heads, columns, config.dim // config.num_heads)
        self.keys = [head.new_empty(shape) for _ in model.blocks]
        self.values = [head.new_empty(shape) for _ in model.blocks]
        side = config.convolution // 2
        self.inputs = [head.new_zeros(batch_size, side, config.dim) for _ in model.blocks]
        """Last inputs of each block's convolution, oldest first."""
        self.rotation = model.rotation(columns)

    @torch.no_grad()
    def __call__(self, codes: Tensor) -> Tensor:
        """Codes `b k` of a column -> logits `b k c` of the next one."""
        model = self.model
        x = model.embedded(codes[..., None], self.place)  # b 1 d
        for i, block in enumerate(model.blocks):
            if block.convolution is not None:
                x = x + self._convolve(i, x, block.convolution.weight)
            x = x + self._attend(i, x)
            if self.text is not None:
                q = block.cross_attention.q(block.cross_norm(x))
                q = q.unflatten(2, (model.config.num_heads, -1)).transpose(1, 2)
                y = text_attention(q, self.text.keys[i], self.text.values[i], self.text.allowed)
                x = x + block.cross_attention.out(y.transpose(1, 2).flatten(2))
            x = x + block.ffn_out(F.gelu(block.ffn_in(block.ffn_norm(x))))
        self.place += 1
        features = model.out_norm(x)[:, 0]
        books = range(model.config.num_codebooks)
        return torch.stack([model.logits(features, book) for book in books], 1)

    def _attend(self, i: int, x: Tensor) -> Tensor:
        """Self-attention of the column to itself and all previous ones: `b 1 d` -> `b 1 d`."""
        block, s = self.model.blocks[i], self.place
        attention = block.self_attention
        qkv = attention.qkv(block.self_norm(x)).unflatten(2, (3, attention.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each b h 1 d
        if self.rotation is not None:
            cos, sin = (angles[s : s + 1] for angles in self.rotation)
            q, k = rotate(q, (cos, sin)), rotate(k, (cos, sin))
        self.keys[i][:, :, s], self.values[i][:, :, s] = k[:, :, 0], v[:, :, 0]
        keys, values = self.keys[i][:, :, : s + 1], self.values[i][:, :, : s + 1]
        y = F.scaled_dot_product_attention(q, keys, values)
        return attention.out(y.transpose(1, 2).flatten(2))

    def _convolve(self, i: int, x: Tensor, weight: Tensor) -> Tensor:
        """Causal part of the convolution around the next column: `b 1 d` -> `b 1 d`."""
        kept = torch.cat([self.inputs[i], x], 1)[:, 1:]
        self.inputs[i] = kept
        return (kept * weight[: kept.shape[1]]).sum(1, keepdim=True)
