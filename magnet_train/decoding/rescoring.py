"""Rescoring (MAGNeT, Eq. 5 and Fig. 4): a second model takes part in scoring spans.

After each step the rescorer computes its own probabilities of the sampled codes, and a mixture of
both models' probabilities scores the spans. The sampled codes do not change. The paper is
inconsistent: its equation samples from the mixture while its figure scores with it (as here), and
the weight belongs to MAGNeT in the equation and to the rescorer in the figure (as here).

The rescorer runs once per step, without guidance: one forward pass besides MAGNeT's two.

Shapes: b examples, k codebooks, t frames, c entries, s text tokens, e width of text states.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from magnet_train.common.pretrained import load_complete, load_pretrained
from magnet_train.conditioning import TextEncoder, check_tokenizer
from magnet_train.layout import delayed
from magnet_train.model import Magnet, Pass, TextKeyValues

Reading = Callable[[Tensor, Tensor, int], Tensor]
"""Codes `b k t` after a step, the frames sampled in it (`b t` bool) and its stage -> logits of the
stage's codebook, `b t c`. Codebooks above the stage contain the mask id, c.
"""


class Rescorer(Protocol):
    """A model that scores codes."""

    def reading(self, prompts: Sequence[str]) -> Reading:
        """A function for these captions that computes logits; "" means no text."""
        ...


def mixed_certainty(
    certainty: Tensor, logits: Tensor, chosen: Tensor, weight: float, temperature: float
) -> Tensor:
    """Probability of each chosen code under the mixture of both models: `b t` -> `b t`.

    Args:
        certainty: `b t`, probability of the chosen code under MAGNeT.
        logits: `b t c`, the rescorer's logits.
        chosen: `b t`, the codes.
        weight: weight of the rescorer, 0 to 1.
        temperature: softmax temperature of the rescorer, above 0.
    """
    theirs = torch.softmax(logits.float() / temperature, dim=-1)
    theirs = theirs.gather(2, chosen[..., None])[..., 0]
    return (1 - weight) * certainty + weight * theirs


class MagnetRescorer:
    """Another MAGNeT, which predicts the frames of the step from all others, as in training."""

    def __init__(self, network: Magnet, text_encoder: TextEncoder):
        self.network, self.text_encoder = network, text_encoder

    def _text(self, prompts: Sequence[str]) -> TextKeyValues | None:
        if not any(prompt.strip() for prompt in prompts):
            return None
        states, allowed = self.text_encoder(prompts)
        return self.network.encode_text(states.to(self.network.head.dtype), allowed)

    @torch.no_grad()
    def reading(self, prompts: Sequence[str]) -> Reading:
        network, text = self.network, self._text(prompts)

        def read(codes: Tensor, masked: Tensor, stage: int) -> Tensor:
            shown = codes.clone()
            shown[:, stage].masked_fill_(masked, network.config.mask_id)
            return network(shown, network.config.stage(stage), text)

        return read


class HybridRescorer(MagnetRescorer):
    """A hybrid MAGNeT, or a MusicGen as one of our models: the probability of each code after all
    that come before it in the delay layout.

    A hybrid has learnt this from beginnings with all their codebooks. In stages below the last the
    upper ones are hidden here, as in `MusicGenRescorer`.
    """

    @torch.no_grad()
    def reading(self, prompts: Sequence[str]) -> Reading:
        network, text = self.network, self._text(prompts)

        def read(codes: Tensor, masked: Tensor, stage: int) -> Tensor:
            return network(codes, Pass((stage,), causal=-1), text)

        return read


class MusicGenRescorer:
    """MusicGen from transformers: the probability of each code given all previous ones.

    In its delay pattern the code of codebook k and frame t is in column 1 + t + k, after a column
    of special ids, and is predicted in the column before. The pattern has T + K columns, so that
    the last frames of the upper codebooks are predicted too.
    """

    def __init__(self, model: Any, text_encoder: TextEncoder):
        """`model` is transformers' `MusicgenForConditionalGeneration`, with its text encoder."""
        self.model, self.text_encoder = model, text_encoder

    @torch.no_grad()
    def reading(self, prompts: Sequence[str]) -> Reading:
        states, allowed = self.text_encoder(prompts)
        if hasattr(self.model, "enc_to_dec_proj"):
            states = self.model.enc_to_dec_proj(states.to(self.model.dtype))
        states = states * allowed[..., None]
        # A row without text attends to zero states, because an empty softmax is NaN.
        allowed = allowed | ~allowed.any(1, keepdim=True)

        @torch.no_grad()
        def read(codes: Tensor, masked: Tensor, stage: int) -> Tensor:
            columns = delayed(codes, self.model.config.decoder.pad_token_id)
            logits = self.model.decoder(
                input_ids=columns.flatten(0, 1),
                encoder_hidden_states=states,
                encoder_attention_mask=allowed.long(),
                use_cache=False,
            ).logits.unflatten(0, codes.shape[:2])
            return logits[:, stage, stage : stage + codes.shape[2]]

        return read


def load_musicgen(name: str) -> tuple[Any, TextEncoder]:
    """transformers' MusicGen in float32, and its text encoder, from a folder or hub id.

    Raises:
        UserError: if it cannot be loaded, or its weights are not complete.
    """

    def load(source: str, local_files_only: bool) -> tuple[Any, Any]:
        kind = "MusicgenForConditionalGeneration"
        model = load_complete(kind, source, local_files_only, f"MusicGen {name!r}")
        from transformers import AutoTokenizer  # after torchaudio

        return model, AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)

    model, tokenizer = load_pretrained("MusicGen", name, load)
    check_tokenizer(tokenizer, model.config.text_encoder.vocab_size, name)
    model.requires_grad_(False).eval()
    return model, TextEncoder(model.text_encoder, tokenizer, name)
