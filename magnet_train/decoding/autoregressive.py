"""Codes one after the other, as MusicGen decodes them: a hybrid's beginning, or all of a result.

In the delay layout (layout.py) one step fills one column: a code of each codebook, of K
neighbouring frames. The networks are callables that take the columns in turn, so a scripted one
tests the loop; `CausalForward` is Magnet's, and computes each column once.

Shapes: b examples, k codebooks, t frames, s columns, c entries, h heads, d width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from magnet_train.attention import text_attention
from magnet_train.common.errors import UserError
from magnet_train.common.randomness import generator_for
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.decoding.sampling import sample
from magnet_train.layout import delayed, rotate, undelayed
from magnet_train.model import Magnet, MagnetConfig, TextKeyValues, rotary_angles

NextColumn = Callable[[Tensor], Tensor]
"""The codes of a column, `b k` -> logits of the next one, `b k c`. Called column after column."""


def check_autoregressive(
    network: MagnetConfig, decoding: DecodingConfig, duration_s: float
) -> None:
    """Checks that a network can decode a result of this length with these settings.

    Raises:
        UserError: if the beginning is longer than the result, or the network has none.
    """
    wanted = decoding.autoregressive_s
    if network.order == "parallel":
        if wanted:
            raise UserError(
                f"autoregressive_s={wanted}: this model decodes in parallel only; leave it at 0, "
                "or choose a hybrid"
            )
        return
    for name in ("cache_frames", "reference_compat"):
        if getattr(decoding, name):
            raise UserError(f"{name}=true: only for models with order=parallel; set it to false")
    if wanted > duration_s:
        raise UserError(
            f"autoregressive_s={wanted} is longer than the result of {duration_s:g} s; shorten it, "
            "or generate more"
        )


def autoregressive_frames(
    network: MagnetConfig, decoding: DecodingConfig, num_frames: int, frame_rate: float
) -> int:
    """How many of a result's frames are decoded one after the other.

    Raises:
        UserError: as `check_autoregressive`.
    """
    wanted = round(decoding.autoregressive_s * frame_rate)
    rounded_s = max(num_frames / frame_rate, decoding.autoregressive_s * (wanted <= num_frames))
    check_autoregressive(network, decoding, rounded_s)
    return num_frames if network.order == "autoregressive" else wanted


def autoregressive_noise(
    seed: int, items: Sequence[str], num_codebooks: int, num_columns: int
) -> Tensor:
    """Uniform numbers in [0, 1) for each code, which belong to the items: `b k s`."""
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
    """Fills all codes that are not given: `b k t` -> `b k t`.

    Args:
        conditional: with text.
        null: without, for guidance; None = no guidance.
        codes: the codes to keep where `given`; anything elsewhere.
        given: `b k t`, True = kept as it is.
        codebook_size: c; the mask id is c.
        config: see there.
        noise: from `autoregressive_noise`, of t + k columns or more.
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
    """`decode_autoregressively` by a network, all frames of `codes`, `b k t`.

    Args:
        network: of order hybrid or autoregressive.
        texts: of the captions, and of what guidance leads away from; None = without text. There is
            no guidance if both are None.
        codes: as there.
        given: as there.
        config: see there.
        noise: as there.
    """
    b, k, t = codes.shape
    conditional, null = (CausalForward(network, text, b, t + k) for text in texts)
    size = network.config.codebook_size
    guide = None if texts[0] is texts[1] else null
    return decode_autoregressively(conditional, guide, codes, given, size, config, noise)


class CausalForward:
    """The causal reading of a network, column after column: keys and values are kept, and each
    column is computed once.
    """

    def __init__(self, model: Magnet, text: TextKeyValues | None, batch_size: int, columns: int):
        """Room for that many columns; a pass with text and one without need an object each."""
        self.model, self.text, self.place = model, text, 0
        config, head = model.config, model.head
        shape = (batch_size, config.num_heads, columns, config.dim // config.num_heads)
        self.keys = [head.new_empty(shape) for _ in model.blocks]
        self.values = [head.new_empty(shape) for _ in model.blocks]
        side = config.convolution // 2
        self.inputs = [head.new_zeros(batch_size, side, config.dim) for _ in model.blocks]
        """The last inputs of each block's convolution, oldest first."""
        self.rotation: tuple[Tensor, Tensor] | None = None
        if config.positions == "rotary":
            angles = rotary_angles(columns, config.dim // config.num_heads, head.device)
            self.rotation = angles.cos(), angles.sin()

    @torch.no_grad()
    def __call__(self, codes: Tensor) -> Tensor:
        """Logits `b k c` of the column after this one, whose codes are `b k`."""
        model = self.model
        x = model.embedded_columns(codes[..., None], self.place)  # b 1 d
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
        """Self-attention of the column to itself and those before: `b 1 d` -> `b 1 d`."""
        block, s = self.model.blocks[i], self.place
        attention = block.self_attention
        qkv = attention.qkv(block.self_norm(x)).unflatten(2, (3, attention.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each b h 1 d
        if self.rotation is not None:
            cos, sin = (angles[s : s + 1] for angles in self.rotation)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        self.keys[i][:, :, s], self.values[i][:, :, s] = k[:, :, 0], v[:, :, 0]
        keys, values = self.keys[i][:, :, : s + 1], self.values[i][:, :, : s + 1]
        y = F.scaled_dot_product_attention(q, keys, values)
        return attention.out(y.transpose(1, 2).flatten(2))

    def _convolve(self, i: int, x: Tensor, weight: Tensor) -> Tensor:
        """The part of the convolution that lies before the next column: `b 1 d` -> `b 1 d`."""
        kept = torch.cat([self.inputs[i], x], 1)[:, 1:]
        self.inputs[i] = kept
        return (kept * weight[: kept.shape[1]]).sum(1, keepdim=True)
