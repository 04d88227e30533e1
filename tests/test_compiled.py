"""GPU features, tested on a CPU: compiled blocks and passes, bfloat16, and decoding without device
synchronisation.
"""

import copy
from functools import partial

import pytest
import torch

from magnet_train.decoding.decode import DecodingConfig, ItemNoise, Networks, decode
from magnet_train.generator import Generator
from magnet_train.model import Magnet, MagnetConfig
from magnet_train.module import MagnetModule

T, SIZE = 45, 64


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


OPTIONS = {
    "published": {},
    "modern": {"positions": "both", "convolution": 3, "context": (-1, 9, 5)},
    "hybrid": {"order": "hybrid", "positions": "rotary"},
}


def network(options: str = "published") -> Magnet:
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_heads": 2, "num_layers": 2, "codebook_size": SIZE, "text_dim": 16}
    return Magnet(MagnetConfig(**sizes, **OPTIONS[options]))


def outputs(model: Magnet, stage: int, valid: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Logits, and the gradient of every parameter."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(SIZE + 1, (2, 4, T), generator=generator)
    tokens = torch.tensor([[True] * 6, [False] * 6])
    text = model.encode_text(torch.randn(2, 6, 16, generator=generator), tokens)
    features = model.trunk(codes, model.config.stage(stage), text, valid)
    logits = model.logits(model.rows(features, stage), stage)
    return logits, *torch.autograd.grad(
        logits.square().mean(), list(model.parameters()), materialize_grads=True
    )


@pytest.mark.parametrize(
    ("options", "stage", "padded"),
    [
        ("published", 0, False),
        ("published", 0, True),
        ("published", 2, False),
        ("published", 2, True),
        ("modern", 1, True),
        ("hybrid", 2, True),
    ],
)
def test_compiled_blocks_give_the_same_logits_and_gradients(options, stage, padded):
    valid = torch.arange(T)[None] < torch.tensor([[T], [20]]) if padded else None
    model = network(options)
    twin = copy.deepcopy(model)
    model.compile_blocks(backend="aot_eager", fullgraph=True)
    assert list(model.state_dict()) == list(twin.state_dict())
    for one, two in zip(outputs(model, stage, valid), outputs(twin, stage, valid), strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)


def test_the_option_compiles_with_the_real_compiler_and_copies_stay_plain():
    """One block of the module as `fit` builds it, through inductor."""
    config = MagnetConfig(dim=32, num_heads=2, num_layers=1, codebook_size=SIZE, text_dim=16)
    module, plain = MagnetModule(config, compiled=True), MagnetModule(config)
    block = module.network.blocks[0]
    assert block._compiled_call_impl is not None
    assert copy.deepcopy(block)._compiled_call_impl is None
    assert "compiled" not in module.hparams
    for one, two in zip(
        outputs(module.network, 1, None), outputs(plain.network, 1, None), strict=True
    ):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)


def test_a_compiled_generator_gives_the_same_codes(tiny, monkeypatch):
    asked: dict[str, object] = {}

    def compile_(function, **options):
        asked.update(options)
        return torch._dynamo.optimize("aot_eager", nopython=options["fullgraph"])(function)

    expected = tiny.generate(["a slow waltz", ""]).codes
    monkeypatch.setattr(torch, "compile", compile_)
    parts = tiny.network, tiny.codec, tiny.text_encoder, tiny.decoding, tiny.crop_s
    assert torch.equal(
        Generator(*parts, compiled=True).generate(["a slow waltz", ""]).codes, expected
    )
    assert asked == {"mode": "reduce-overhead", "fullgraph": True}


def test_the_compiler_never_gives_up_over_what_a_fit_asks_of_it(monkeypatch):
    """Training, validation and generation with captions of all lengths need no more variants than
    the compiler caches.
    """
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    model = network()
    model.compile_blocks(backend="eager", fullgraph=True)

    def step(stage: int, tokens: int, padded: bool, has_text: bool = True) -> torch.Tensor:
        codes = torch.randint(SIZE + 1, (2, 4, T))
        valid = torch.arange(T)[None] < torch.tensor([[T], [20]]) if padded else None
        allowed = torch.ones(2, tokens, dtype=torch.bool)
        text = model.encode_text(torch.randn(2, tokens, 16), allowed) if has_text else None
        return model.trunk(codes, model.config.stage(stage), text, valid).sum()

    for _ in range(2):
        with torch.no_grad():
            for stage in range(4):
                for tokens in (5, 9, 70):
                    step(stage, tokens, False)
                    step(stage, tokens, True)
                step(stage, 5, False, has_text=False)
        for stage in range(4):
            step(stage, 7, False).backward()
            step(stage, 70, True).backward()


@pytest.mark.parametrize("arrangement", ["nonoverlap", "stride1"])
@pytest.mark.parametrize(
    "sampling", [{"top_p": 0.9}, {"top_p": 0.0, "top_k": 10}, {"greedy": True}]
)
def test_decoding_never_waits_for_the_device(arrangement, sampling):
    """Uses meta tensors: reading a value would raise."""
    config = DecodingConfig(decoding_steps=(4, 2, 2, 2), span_arrangement=arrangement, **sampling)
    on = partial(torch.empty, device="meta")
    pass_of = lambda codes, stage: on(codes.shape[0], codes.shape[2], SIZE)  # noqa: E731
    fixed = on(2, T, dtype=torch.bool)
    codes = decode(
        Networks(pass_of, pass_of),
        on(2, 4, T, dtype=torch.long),
        fixed,
        SIZE,
        config,
        ItemNoise(on(2, 10, T), on(2, 10, T)),
    )
    assert codes.shape == (2, 4, T) and codes.device.type == "meta"


def test_bfloat16_generates_and_stays_near_float32():
    model, half = network(), network().to(torch.bfloat16)
    codes = torch.randint(SIZE + 1, (2, 4, T))
    for stage in range(4):
        exact, rounded = (
            model(codes, model.config.stage(stage), None),
            half(codes, half.config.stage(stage), None),
        )
        assert rounded.dtype == torch.bfloat16
        assert (exact - rounded).abs().max() < 0.1 * exact.abs().max()
