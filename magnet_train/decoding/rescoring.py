"""Rescoring (MAGNeT, Eq. 5 and Fig. 4): another model helps to choose which spans are kept.

After each step the rescorer reads what the step filled in and gives its own probability of every
code. A mixture of the two probabilities then ranks the spans; which codes are sampled does not
change. The paper contradicts itself twice. Its equation samples from the mixture, its figure ranks
by it: this is the figure's form. The weight multiplies MAGNeT in the equation and the rescorer in
the figure: here it is always the rescorer's.

The rescorer is asked once a step, without guidance: one row pass more beside MAGNeT's two.

Shapes: b examples, k codebooks, t frames, c entries, s text tokens, e width of text states.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.common.pretrained import load_pretrained
from magnet_train.common.torchaudio_import import ensure_torchaudio_imports
from magnet_train.conditioning import TextEncoder, check_tokenizer
from magnet_train.layout import delayed
from magnet_train.model import Magnet, Pass, TextKeyValues

Reading = Callable[[Tensor, Tensor, int], Tensor]
"""Codes `b k t` after a step, the frames that it filled in (`b t` bool) and its stage -> logits of
the stage's codebook, `b t c`. Codebooks above the stage hold the mask id, c.
"""


class Rescorer(Protocol):
    """A model that gives probabilities of codes."""

    def reading(self, prompts: Sequence[str]) -> Reading:
        """Its passes for these captions; "" is read without text."""
        ...


def mixed_certainty(
    certainty: Tensor, logits: Tensor, chosen: Tensor, weight: float, temperature: float
) -> Tensor:
    """Probability of each chosen code under the mixture of both models: `b t` -> `b t`.

    Args:
        certainty: `b t`, probability of the chosen code under MAGNeT.
        logits: `b t c`, of the rescorer.
        chosen: `b t`, the codes.
        weight: of the rescorer, 0 to 1.
        temperature: of the rescorer's softmax, above 0.
    """
    theirs = torch.softmax(logits.float() / temperature, dim=-1)
    theirs = theirs.gather(2, chosen[..., None])[..., 0]
    return (1 - weight) * certainty + weight * theirs


class MagnetRescorer:
    """Another MAGNeT: it predicts the frames of the step from the others, as it was trained to."""

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
    """MusicGen, read by transformers: the probability of each code after all that come before it.

    In its delay pattern the code of codebook k and frame t stands in column 1 + t + k, behind a
    column of special ids, and is predicted in the column before. The pattern is made for T + K
    columns, so that the last frames of the upper codebooks are predicted like all others.
    """

    def __init__(self, model: Any, text_encoder: TextEncoder):
        """Takes transformers' `MusicgenForConditionalGeneration`, and its text encoder."""
        self.model, self.text_encoder = model, text_encoder

    @torch.no_grad()
    def reading(self, prompts: Sequence[str]) -> Reading:
        states, allowed = self.text_encoder(prompts)
        if hasattr(self.model, "enc_to_dec_proj"):
            states = self.model.enc_to_dec_proj(states.to(self.model.dtype))
        states = states * allowed[..., None]
        # A row without text attends to states of zero, which give zero; to nothing would be NaN.
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
        from transformers import AutoTokenizer, MusicgenForConditionalGeneration

        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)
        model, report = MusicgenForConditionalGeneration.from_pretrained(
            source,
            local_files_only=local_files_only,
            dtype=torch.float32,
            output_loading_info=True,
        )
        if missing := sorted(report["missing_keys"]):
            raise UserError(
                f"MusicGen {name!r}: its weights lack {missing[0]}; use a complete copy"
            )
        return model, tokenizer

    ensure_torchaudio_imports()
    model, tokenizer = load_pretrained("MusicGen", name, load)
    check_tokenizer(tokenizer, model.config.text_encoder.vocab_size, name)
    model.requires_grad_(False).eval()
    return model, TextEncoder(model.text_encoder, tokenizer, name)
