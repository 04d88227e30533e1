"""Reuse between decoding steps: the same logits and codes as full passes, from fewer frames."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from magnet_train.decoding.decode import DecodingConfig, Networks, decode, item_noise
from magnet_train.decoding.frame_cache import CachedForward
from magnet_train.model import Magnet, MagnetConfig, TextKeyValues

B, T, SIZE = 2, 90, 24
CONFIG = MagnetConfig(
    dim=16, num_heads=2, num_layers=6, num_codebooks=3, codebook_size=SIZE, text_dim=8, context=2
)
VARIANTS: dict[str, dict[str, Any]] = {
    "6 layers": {},
    "24 layers": {"num_layers": 24, "context": 1},
    "rotary": {"positions": "rotary"},
    "convolution": {"positions": "both", "convolution": 5, "num_layers": 3},
    "several windows": {"context": (3, 0, 40), "num_layers": 2},
    "hybrid": {"order": "hybrid", "num_layers": 2},
}


def network(**changes: Any) -> tuple[Magnet, TextKeyValues]:
    torch.manual_seed(0)
    model = Magnet(replace(CONFIG, **changes)).eval()
    tokens = torch.tensor([[True] * 5, [True, True, False, False, False]])
    return model, model.encode_text(torch.randn(B, 5, 8), tokens)


def full(model: Magnet, text: TextKeyValues | None) -> Callable[[Tensor, int], Tensor]:
    return lambda codes, stage: model(codes, model.config.stage(stage), text)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("with_text", [True, False])
def test_logits_at_masked_frames_are_those_of_a_full_pass(changes, with_text):
    """Also if what is masked, changed and asked for is arbitrary."""
    model, text = network(**changes)
    memory = text if with_text else None
    cached, codes = CachedForward(model, memory), torch.full((B, 3, T), SIZE)
    generator = torch.Generator().manual_seed(1)
    for step, stage in enumerate([1, 1, 1, 2, 2, 0, 1]):
        codes = codes.clone()
        begin = int(torch.randint(T - 20, (), generator=generator))
        length = 3 if step % 2 else 20
        codes[step % B, : stage + 1, begin : begin + length] = torch.randint(
            SIZE, (stage + 1, length), generator=generator
        )
        codes[:, stage, (begin + 30) % T] = SIZE
        masked = codes[:, stage] == SIZE
        expected = full(model, memory)(codes, stage)
        assert torch.allclose(cached(codes, stage)[masked], expected[masked], atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize(
    "decoding",
    [{}, {"span_arrangement": "stride1"}, {"second_lap": 0.5, "shared_noise": 4}],
    ids=["spans", "stride1", "second lap"],
)
def test_decoding_gives_the_same_codes(changes, decoding):
    """With a prompt, given regions and guidance."""
    model, text = network(**changes)
    config = DecodingConfig(decoding_steps=(4, 5, 3), max_cfg_coef=3.0, **decoding)
    codes = torch.randint(SIZE, (B, 3, T), generator=torch.Generator().manual_seed(2))
    given = torch.zeros(B, 3, T, dtype=torch.bool)
    given[..., :10] = given[1, :, 40:60] = given[0, 1, 70:80] = True
    noise = item_noise(0, ["a", "b"], config.num_steps(3), T)
    made = [
        decode(
            Networks(passes(model, text), passes(model, None)), codes, given, SIZE, config, noise
        )
        for passes in (full, CachedForward)
    ]
    assert torch.equal(made[0], made[1])


def test_only_what_changed_and_is_needed_is_computed():
    """At a context of 2, the input of layer l differs at most 2 l frames from a change."""
    model, text = network()
    cached, codes = CachedForward(model, text), torch.full((B, 3, T), SIZE)
    cached(codes, 1)
    assert cached.num_computed == [B * T] * 6
    codes = codes.clone()
    codes[0, 1, :30] = codes[1, 1, 60:] = 1
    cached(codes, 1)
    # Frames up to 2 (l + 1) beyond the change, and as far inside as later layers look.
    assert cached.num_computed == [B * (2 * (i + 1) + 2 * (5 - i)) for i in range(6)]


def test_generation_reuses_and_gives_the_same_codes(tiny, monkeypatch):
    asked = {"prompts": ["a waltz", "two flutes"], "seed": 3}
    computed = []
    original = CachedForward.__call__

    def counted(self, codes, stage):
        logits = original(self, codes, stage)
        computed.append(sum(self.num_computed))
        return logits

    monkeypatch.setattr(CachedForward, "__call__", counted)
    reused = tiny.generate(**asked).codes
    assert {0, 100} < set(computed)  # stage 0, a first pass, and what remains of others
    monkeypatch.setattr("magnet_train.generator.CachedForward", full)
    assert torch.equal(tiny.generate(**asked).codes, reused)
