"""The hybrid: one network and layout with two attention masks, tested with gradients."""

import dataclasses
from typing import Any

import pytest
import torch

from magnet_train.common.errors import UserError
from magnet_train.decoding.autoregressive import (
    CausalForward,
    autoregressive_noise,
    decode_autoregressively,
)
from magnet_train.decoding.decode import DecodingConfig, Networks, decode, item_noise
from magnet_train.decoding.rescoring import HybridRescorer
from magnet_train.dense import dense_delayed_logits
from magnet_train.generator import Generator
from magnet_train.layout import delayed, prompt_frames, undelayed
from magnet_train.masking import span_mask, span_mask_behind
from magnet_train.model import Magnet, MagnetConfig, Pass
from magnet_train.module import MagnetModule

SIZE, T, K = 16, 40, 4
BASE = MagnetConfig(
    dim=32, num_heads=2, num_layers=2, codebook_size=SIZE, text_dim=8, context=5, order="hybrid"
)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"context": (-1, 9, 2, 0), "positions": "rotary", "convolution": 5},
]


@pytest.fixture(params=OPTIONS, ids=["published", "embedded"])
def model(request) -> Magnet:
    return Magnet(dataclasses.replace(BASE, **request.param)).eval()


def text(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.arange(5)[None] < torch.tensor([5, 2, 0][:batch])[:, None]
    return torch.randn(batch, 5, 8) * tokens[..., None], tokens


# --- the layout -----------------------------------------------------------------------------------


def test_a_code_is_one_column_after_the_row_that_predicts_it():
    codes = torch.arange(K * T).view(1, K, T)
    columns = delayed(codes, -1)
    for book in range(K):
        for frame in (0, 7, T - 1):
            assert columns[0, book, 1 + frame + book] == codes[0, book, frame]
    assert (columns[:, :, 0] == -1).all() and (columns == -1).sum() == K * K
    assert torch.equal(undelayed(columns), codes)


@pytest.mark.parametrize("step", [0, 2, 17, T, T + K])
def test_rows_before_a_prompt_step_predict_its_codes(step):
    prompt = prompt_frames(torch.tensor([step]), K, T)[0]
    assert prompt.sum(1).tolist() == [min(T, max(0, step - book)) for book in range(K)]
    for book in range(K):
        assert prompt[book, : max(0, step - book)].all()


def columns_seen(model: Magnet, pass_: Pass, row: int, valid: Any = None) -> list[int]:
    """Columns whose block input changes the features of a row, from gradients."""
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any) -> None:
        seen.append(args[0])
        args[0].retain_grad()

    handle = model.blocks[0].register_forward_pre_hook(keep)
    features = model.trunk(torch.randint(SIZE, (1, K, T)), pass_, None, valid)[0, row]
    (features * torch.randn(32)).sum().backward()
    handle.remove()
    return seen[0].grad[0].abs().sum(1).nonzero()[:, 0].tolist()  # type: ignore[index]


@pytest.mark.parametrize("stage", range(K))
def test_what_a_row_sees(stage):
    model = Magnet(dataclasses.replace(BASE, num_layers=1))
    pass_ = model.config.stage(stage)
    for frame in (0, 20, T - 1):
        near = range(T) if stage == 0 else range(max(0, frame - 5), min(T, frame + 6))
        own = {stage + frame} | {1 + stage + other for other in near}
        assert columns_seen(model, pass_, stage + frame) == sorted(own)
        behind = pass_._replace(causal=12)
        wanted = list(range(stage + frame + 1)) if stage + frame < 12 else sorted(own)
        assert columns_seen(model, behind, stage + frame) == wanted
        causal = list(range(stage + frame + 1))
        assert columns_seen(model, model.config.reading, stage + frame) == causal
    assert columns_seen(model, pass_, stage + T) == list(range(T + K)), "rows of no frame see all"


@pytest.mark.parametrize("stage", range(K))
def test_the_fast_form_is_the_slow_one(model, stage):
    codes, (states, tokens) = torch.randint(SIZE + 1, (3, K, T)), text(3)
    steps = torch.tensor([0, 13, T + K])
    pass_ = Pass((stage, *range(K)), model.config.stage(stage).context, steps)
    fast = model(codes, pass_, model.encode_text(states, tokens))[:, 1:]
    slow = torch.cat(
        [
            dense_delayed_logits(model, codes[i, None], stage, states[i, None], tokens[i, None], p)
            for i, p in enumerate(steps.tolist())
        ]
    )
    assert torch.allclose(fast, slow, atol=1e-5)
    gradients = [
        torch.autograd.grad(
            logits.square().mean(), list(model.parameters()), materialize_grads=True
        )
        for logits in (fast, slow)
    ]
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_neighbours_change_nothing(model):
    codes, (states, tokens) = torch.randint(SIZE, (2, K, T)), text(2)
    valid = torch.arange(T)[None] < torch.tensor([[T], [25]])
    steps = torch.tensor([5, 9])
    for stage in range(K):
        pass_ = Pass((stage, *range(K)), model.config.stage(stage).context, steps)
        both = model(codes, pass_, model.encode_text(states, tokens), valid)
        alone = pass_._replace(causal=steps[1:])
        written = model.encode_text(states[1:], tokens[1:])
        one = model(codes[1:], alone, written, valid[1:])
        assert torch.allclose(both[1, :, :20], one[0, :, :20], atol=1e-5)


def test_padding_is_not_seen():
    model = Magnet(dataclasses.replace(BASE, num_layers=1))
    valid = torch.arange(T)[None] < 25
    for stage in range(K):
        near = range(25) if stage == 0 else range(17, 25)
        own = {stage + 22} | {1 + stage + other for other in near}
        assert columns_seen(model, model.config.stage(stage), stage + 22, valid) == sorted(own)


# --- training -------------------------------------------------------------------------------------


def test_spans_lie_behind_the_beginning():
    starts, rates = torch.tensor([0, 10, T - 1, T]), torch.full((4,), 0.5)
    masked = span_mask_behind(starts, rates, T, 3, torch.Generator().manual_seed(0))
    assert not (masked & (torch.arange(T) < starts[:, None])).any()
    assert masked[:3].any(1).all() and not masked[3].any()
    alone = span_mask(rates[:1], T, 3, torch.Generator().manual_seed(0))
    assert torch.equal(masked[:1], alone)


@pytest.fixture(scope="module")
def module() -> MagnetModule:
    sizes = {"dim": 32, "num_heads": 2, "num_layers": 1, "text_dim": 384}
    config = MagnetConfig(num_codebooks=5, codebook_size=256, order="hybrid", **sizes)
    module = MagnetModule(config, crop_s=1.0)
    module.setup("fit")
    return module


def batch(valid_frames: int = 25) -> Any:
    valid = torch.ones(2, 25, dtype=torch.bool)
    valid[1, valid_frames:] = False
    return {"codes": torch.randint(256, (2, 5, 25)), "valid": valid}


def test_loss_without_a_beginning_is_magnets_and_with_only_a_beginning_musicgens(module):
    given, masked = batch(), torch.rand(2, 25) < 0.5
    stage, prompt = module.hybrid_loss(given, ["a", ""], 1, masked, torch.tensor([0, 0]))
    plain = module.stage_loss(given, ["a", ""], 1, masked)
    assert torch.allclose(stage.ce, plain.ce) and not prompt.count.any()
    none = torch.zeros_like(masked)
    stage, prompt = module.hybrid_loss(given, ["a", ""], 1, none, torch.tensor([30, 30]))
    reading = module.reading_loss(given, ["a", ""])
    assert torch.allclose(prompt.ce, reading.ce) and not stage.count.any()


def test_the_loss_is_over_masked_frames_and_the_beginning_without_padding(module):
    masked = torch.zeros(2, 25, dtype=torch.bool)
    masked[:, 15:] = True
    steps = torch.tensor([4, 12])
    stage, prompt = module.hybrid_loss(batch(valid_frames=20), ["a", "b"], 2, masked, steps)
    assert stage.count.tolist() == [10, 5]
    assert prompt.count.view(5, 2).tolist() == [[4, 12], [3, 11], [2, 10], [1, 9], [0, 8]]
    assert prompt.ce.isfinite().all() and stage.ce.isfinite().all()


def test_no_target_is_seen(module):
    """Changing predicted codes does not change the stage's logits or those of earlier codes."""
    given, steps = batch(), torch.tensor([8, 8])
    masked = torch.arange(25).expand(2, -1) > 14
    kept: list[torch.Tensor] = []
    changed = {**given, "codes": given["codes"].clone()}
    changed["codes"][:, 2] = torch.where(masked, changed["codes"][:, 2] ^ 1, changed["codes"][:, 2])
    changed["codes"][:, 3:, 8:] ^= 1  # above the stage, after the prompt
    for part in (given, changed):
        handle = module.network.out_norm.register_forward_hook(lambda m, i, o: kept.append(o))
        module.hybrid_loss(part, ["a", ""], 2, masked, steps)
        handle.remove()
    assert torch.equal(*kept)


# --- decoding -------------------------------------------------------------------------------------


def scripted(column_codes: list[torch.Tensor]):
    """The next column's code of codebook k is (7 s + k) mod c, independent of earlier codes."""

    def network(codes: torch.Tensor) -> torch.Tensor:
        s = len(column_codes)
        column_codes.append(codes.clone())
        wanted = (7 * s + torch.arange(K)) % SIZE
        return torch.nn.functional.one_hot(wanted, SIZE).float().expand(len(codes), -1, -1) * 99

    return network


def test_a_scripted_network_decides_every_column_and_given_codes_stay():
    seen: list[torch.Tensor] = []
    codes = torch.randint(SIZE, (2, K, 12))
    given = torch.zeros(2, K, 12, dtype=torch.bool)
    given[:, :, :3] = True
    given[1, 2, 7] = True
    noise = torch.rand(2, K, 12 + K)
    config = DecodingConfig()
    out = decode_autoregressively(scripted(seen), None, codes, given, SIZE, config, noise)
    assert torch.equal(out[given], codes[given])
    wanted = (7 * (torch.arange(12) + torch.arange(K)[:, None]) + torch.arange(K)[:, None]) % SIZE
    assert torch.equal(out[~given], wanted.expand(2, -1, -1)[~given])
    assert len(seen) == 12 + K - 1 and (seen[0] == SIZE).all()
    for s, column in enumerate(seen):
        assert torch.equal(column, delayed(out, SIZE)[:, :, s])


@torch.no_grad()
def test_cached_keys_and_values_give_the_codes_of_full_passes(model):
    states, tokens = text(3)
    written = model.encode_text(states, tokens)
    codes = torch.randint(SIZE, (3, K, 20))
    given = torch.zeros(3, K, 20, dtype=torch.bool)
    given[..., :4] = True
    noise = autoregressive_noise(0, ["a", "b", "c"], K, 20 + K)

    def whole(of_text):
        columns: list[torch.Tensor] = []

        def network(column: torch.Tensor) -> torch.Tensor:
            columns.append(column)
            s = len(columns)
            filled = torch.full((3, K, 20 + K), SIZE)
            filled[:, :, :s] = torch.stack(columns, 2)
            x = model.embedded(filled)
            frames = model.inputs(x, model.config.reading, None)
            for i, block in enumerate(model.blocks):
                pair = of_text and (of_text.keys[i], of_text.values[i], of_text.allowed)
                x = block(x, frames, pair)
            features = model.out_norm(x)[:, s - 1]
            return torch.stack([model.logits(features, k) for k in range(K)], 1)

        return network

    config = DecodingConfig(autoregressive_top_k=8)
    arguments = codes, given, SIZE, config, noise
    cached = [CausalForward(model, t, 3, 20 + K) for t in (written, None)]
    out = decode_autoregressively(*cached, *arguments)
    assert torch.equal(out, decode_autoregressively(whole(written), whole(None), *arguments))
    assert torch.equal(out[..., :4], codes[..., :4]) and out.max() < SIZE


@pytest.fixture(scope="module")
def hybrid(tiny) -> Generator:
    config = dataclasses.replace(tiny.network.config, order="hybrid")
    torch.manual_seed(1)
    return Generator(Magnet(config).eval(), tiny.codec, tiny.text_encoder, tiny.decoding, 1.0)


def test_a_hybrid_starts_autoregressively_and_continues_in_parallel(hybrid):
    config = dataclasses.replace(hybrid.decoding, autoregressive_s=0.4)
    together = hybrid.generate(["harp", "flute"], seed=3, decoding=config)
    assert (together.order[:, :, :10] == 0).all()
    alone = hybrid.generate(["flute"], seed=3, decoding=config)
    assert torch.equal(alone.codes[0, :, :10], together.codes[1, :, :10])
    longer = hybrid.generate(["flute"], seed=3, decoding=config, duration_s=2.0)
    assert torch.equal(longer.codes[:, :, :10], alone.codes[:, :, :10])


def test_stages_see_all_codebooks_of_the_beginning_as_in_training(hybrid, monkeypatch):
    seen: list[tuple[int, torch.Tensor]] = []

    def recording(text):
        def run(codes, stage):
            seen.append((stage, codes[0]))
            return hybrid.network(codes, hybrid.network.config.stage(stage), text)

        return run

    monkeypatch.setattr(hybrid, "_networks", lambda *_: Networks(recording(None)))
    config = dataclasses.replace(hybrid.decoding, autoregressive_s=0.4)
    codes = hybrid.generate(["flute"], seed=3, decoding=config).codes[0]
    mask_id = hybrid.network.config.mask_id
    assert {stage for stage, _ in seen} == set(range(5))
    for stage, shown in seen:
        for book in range(stage + 1, 5):  # row p - 1 predicts the last frame, p - 1 - book
            assert torch.equal(shown[book, : 10 - book], codes[book, : 10 - book])
            assert (shown[book, 10 - book :] == mask_id).all()


def test_a_beginning_of_all_frames_is_autoregressive_decoding_and_one_of_none_magnets(hybrid):
    """With the codes of the same weights as a MusicGen, and of the stages' passes alone."""
    network, config = hybrid.network, hybrid.decoding
    whole = hybrid.generate(["flute"], decoding=dataclasses.replace(config, autoregressive_s=1.0))
    reader = Magnet(dataclasses.replace(network.config, order="autoregressive"))
    reader.load_state_dict(network.state_dict())
    musicgen = Generator(reader, hybrid.codec, hybrid.text_encoder, config, 1.0)
    assert torch.equal(whole.codes, musicgen.generate(["flute"]).codes)
    assert (whole.order == 0).all()

    texts = network.encode_text(*hybrid.text_encoder(["flute"])), None
    passes = [lambda codes, k, x=x: network(codes, network.config.stage(k), x) for x in texts]
    noise = item_noise(0, ["flute"], config.num_steps(5), 25)
    empty = torch.zeros(1, 5, 25, dtype=torch.long)
    stages = decode(Networks(*passes), empty, empty.bool(), 256, config, noise)
    assert torch.equal(hybrid.generate(["flute"]).codes, stages)


def test_it_reads_codes_as_a_rescorer(hybrid):
    reading = HybridRescorer(hybrid.network, hybrid.text_encoder).reading(["harp"])
    books, size = hybrid.codec.facts.num_codebooks, hybrid.codec.facts.codebook_size
    codes = torch.randint(size, (1, books, 25))
    logits = reading(codes, torch.ones(1, 25, dtype=torch.bool), 1)
    changed = codes.clone()
    changed[:, 1, 9] = (codes[:, 1, 9] + 1) % size
    moved = (reading(changed, torch.ones(1, 25, dtype=torch.bool), 1) != logits).any(-1)[0]
    assert moved.nonzero()[0].item() == 10 and logits.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"autoregressive_s": 1.5}, "autoregressive_s=1.5 is longer than the result of 1 s"),
        ({"reference_compat": True}, "reference_compat=true"),
    ],
)
def test_what_a_hybrid_cannot_do_is_refused(hybrid, change, message):
    with pytest.raises(UserError, match=message):
        hybrid.generate(["harp"], decoding=dataclasses.replace(hybrid.decoding, **change))


def test_a_model_that_is_not_hybrid_has_no_autoregressive_beginning(tiny):
    with pytest.raises(UserError, match="decodes in parallel only"):
        tiny.generate(["harp"], decoding=dataclasses.replace(tiny.decoding, autoregressive_s=0.5))
