"""Properties of decoding, tested with scripted networks; the filters are compared with the
reference.
"""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from magnet_train.common.errors import UserError
from magnet_train.decoding.decode import (
    DecodingConfig,
    DecodingStep,
    Networks,
    circular,
    decode,
    guided_logits,
    item_noise,
)
from magnet_train.decoding.sampling import exponential, sample, top_k_filter, top_p_filter

FILTERS = Path(__file__).parent / "fixtures" / "reference" / "decode_only" / "filters.safetensors"
SIZE = 8


def scripted(seed: int):
    """A network whose logits depend only on frame and stage."""
    table = torch.randn(4, 64, SIZE, generator=torch.Generator().manual_seed(seed)) * 3
    return lambda codes, stage: table[stage, : codes.shape[2]].expand(len(codes), -1, -1)


def run(num_frames=30, prompt=0, items=("a", "b"), config=None, on_step=None, seed=0):
    config = config or DecodingConfig(decoding_steps=(4, 3, 2, 1), max_cfg_coef=3.0)
    codes = torch.arange(num_frames).remainder(SIZE).expand(len(items), 4, -1).clone()
    fixed = torch.zeros(len(items), num_frames, dtype=torch.bool)
    fixed[:, :prompt] = True
    noise = item_noise(seed, items, sum(config.per_stage("decoding_steps", 4)), num_frames)
    return codes, decode(
        Networks(scripted(1), scripted(2)), codes, fixed, SIZE, config, noise, on_step
    )


configs = st.builds(
    DecodingConfig,
    decoding_steps=st.tuples(*[st.integers(1, 6)] * 4),
    temperature=st.sampled_from([0.5, 3.0]),
    anneal_temperature=st.booleans(),
    top_p=st.sampled_from([0.0, 0.5, 0.9]),
    top_k=st.sampled_from([0, 3]),
    greedy=st.booleans(),
    span_len=st.integers(1, 5),
    span_arrangement=st.sampled_from(["nonoverlap", "stride1"]),
    span_scoring=st.sampled_from(["max", "prod", "random"]),
    order_temperature=st.sampled_from([0.0, 2.0]),
    shared_noise=st.sampled_from([1, 3, 25, (1, 25)]),
)


@given(configs, st.integers(1, 40), st.integers(0, 40), st.integers(0, 5))
@settings(max_examples=80)
def test_nothing_stays_masked_and_the_prompt_survives(config, num_frames, prompt, seed):
    prompt = min(prompt, num_frames)
    given_codes, out = run(num_frames, prompt, config=config, seed=seed)
    assert out.shape == (2, 4, num_frames)
    assert ((out >= 0) & (out < SIZE)).all()
    assert torch.equal(out[:, :, :prompt], given_codes[:, :, :prompt])


@given(configs, st.integers(6, 40))
@settings(max_examples=40)
def test_each_step_masks_less_and_only_what_the_last_one_filled(config, num_frames):
    steps: list[DecodingStep] = []
    run(num_frames, prompt=2, config=config, on_step=steps.append)
    assert len(steps) == sum(config.decoding_steps)
    for before, after in itertools.pairwise(steps):
        if after.stage == before.stage:
            assert (after.masked <= before.masked).all()
        assert after.masked.any(1).all()
    hidden = [s.codes[:, s.stage + 1 :, 2:] for s in steps if s.stage < 3]
    assert all((h == SIZE).all() for h in hidden), "codebooks above the stage must not be known yet"


def test_an_item_gets_the_same_codes_alone_and_in_a_batch():
    for arrangement in ("nonoverlap", "stride1"):
        config = DecodingConfig(decoding_steps=(5,), span_arrangement=arrangement)
        _, together = run(items=("a", "b", "c"), config=config)
        for i, item in enumerate("abc"):
            assert torch.equal(run(items=(item,), config=config)[1][0], together[i])


def test_seeds_and_items_differ():
    assert not torch.equal(run(seed=0)[1], run(seed=1)[1])
    codes = run()[1]
    assert not torch.equal(codes[0], codes[1])


def markov_chain(repeat: float = 0.76, size: int = SIZE) -> torch.Tensor:
    """Transition probabilities `c c` of codes that usually repeat, or change to one of a few
    neighbours.
    """
    generator = torch.Generator().manual_seed(7)
    moves = (3 * torch.randn(size, size, generator=generator)).softmax(1).fill_diagonal_(0)
    return repeat * torch.eye(size) + (1 - repeat) * moves / moves.sum(1, keepdim=True)


def conditionals(codes: torch.Tensor, chain: torch.Tensor) -> torch.Tensor:
    """Exact log probabilities `b t c` of every frame given all visible codes (forward-backward)."""
    b, t = codes.shape
    size = len(chain)
    visible = torch.nn.functional.one_hot(codes.clamp(max=size - 1), size).float()
    seen = torch.where((codes < size)[..., None], visible, torch.ones(()))
    before = torch.full((b, t, size), 1 / size)
    after = torch.ones(b, t, size)
    for i in range(1, t):
        message = (before[:, i - 1] * seen[:, i - 1]) @ chain
        before[:, i] = message / message.sum(1, keepdim=True)
    for i in reversed(range(t - 1)):
        message = (after[:, i + 1] * seen[:, i + 1]) @ chain.T
        after[:, i] = message / message.sum(1, keepdim=True)
    return (before * after).clamp(min=1e-30).log()


def chain_statistics(config: DecodingConfig, chain: torch.Tensor) -> tuple[float, float]:
    """Mean log probability of transitions and share of repeats, decoded with exact conditionals."""
    codes = torch.zeros(8, 1, 250, dtype=torch.long)
    given = torch.zeros(8, 250, dtype=torch.bool)
    noise = item_noise(0, [str(i) for i in range(8)], config.decoding_steps[0], 250)
    networks = Networks(lambda codes, stage: conditionals(codes[:, 0], chain))
    out = decode(networks, codes, given, len(chain), config, noise)[:, 0]
    log_p = chain[out[:, :-1], out[:, 1:]].clamp(min=1e-30).log().mean()
    return log_p.item(), (out[:, 1:] == out[:, :-1]).float().mean().item()


@pytest.mark.parametrize(
    "repeat, shared_noise, top_p",
    [(0.76, 25, 1.0), (0.46, 1, 1.0), (0.46, 1, 0.95), (0.65, 1, 0.9)],
)
def test_random_order_decodes_a_chain_as_it_is_and_the_published_order_does_not(
    repeat, shared_noise, top_p
):
    """The reason for these options: confidence order prefers repeated codes, so decoded clips drone
    or break up. Codes that are held need shared noise or a narrower nucleus. The last two cases are
    the bundled model's attacks and pitches.
    """
    chain = markov_chain(repeat)
    own_log_p = (chain * chain.clamp(min=1e-30).log()).sum(1).mean().item()
    modern = DecodingConfig(
        decoding_steps=(20,),
        temperature=1.0,
        anneal_temperature=False,
        top_p=top_p,
        span_len=1,
        span_scoring="random",
        shared_noise=shared_noise,
    )
    log_p, repeats = chain_statistics(modern, chain)
    assert log_p == pytest.approx(own_log_p, abs=0.15)
    assert repeats == pytest.approx(repeat, abs=0.05)
    log_p, repeats = chain_statistics(DecodingConfig(decoding_steps=(20,)), chain)
    print(f"published: log P {log_p:.2f}, repeats {repeats:.2f}; the chain: {own_log_p:.2f}")
    assert abs(log_p - own_log_p) > 0.15 or abs(repeats - repeat) > 0.05


def test_noise_is_shared_in_the_stages_that_the_setting_names():
    """Frames with equal distributions get equal codes only where they share their noise."""
    uniform = Networks(lambda codes, stage: torch.zeros(len(codes), codes.shape[2], SIZE))
    codes, given = torch.zeros(4, 3, 100, dtype=torch.long), torch.zeros(4, 100, dtype=torch.bool)
    config = DecodingConfig((1,), top_p=0, span_len=1, max_cfg_coef=1.0, shared_noise=(1, 25, 5))
    out = decode(uniform, codes, given, SIZE, config, item_noise(0, "abcd", 3, 100))
    repeats = (out[..., 1:] == out[..., :-1]).float().mean((0, 2))
    for found, group in zip(repeats, (1, 25, 5), strict=True):
        assert found == pytest.approx(1 - (1 - 1 / SIZE) / group, abs=0.07)
    too_many = dataclasses.replace(config, shared_noise=(1, 1, 1, 1))
    with pytest.raises(UserError, match=r"shared_noise=\[1, 1, 1, 1\] has 4 numbers for 3"):
        decode(uniform, codes, given, SIZE, too_many, item_noise(0, "abcd", 3, 100))


def test_each_stage_samples_from_its_own_nucleus():
    """Entry 0 has half of the probability, so a threshold below 0.5 leaves only that."""
    logits = torch.full((4, 100, SIZE), -math.log(2 * (SIZE - 1)))
    logits[..., 0] = -math.log(2)
    networks = Networks(lambda codes, stage: logits)
    codes, given = torch.zeros(4, 3, 100, dtype=torch.long), torch.zeros(4, 100, dtype=torch.bool)
    plain = DecodingConfig(
        (1,), temperature=1.0, anneal_temperature=False, span_len=1, max_cfg_coef=1.0
    )
    config = dataclasses.replace(plain, top_p=(1.0, 0.4))
    out = decode(networks, codes, given, SIZE, config, item_noise(0, "abcd", 3, 100))
    assert (out[:, 0] == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    assert not out[:, 1:].any()
    with pytest.raises(UserError, match=r"reference_compat=True must be false"):
        dataclasses.replace(config, reference_compat=True)


def test_guidance_of_one_stage_equals_guidance_of_that_stage_alone():
    """Other stages take the conditional logits, and the null condition is not asked for them."""
    asked = []

    def null(codes, stage):
        asked.append(stage)
        return scripted(1)(codes, stage)

    config = DecodingConfig((2,), max_cfg_coef=(1.0, 4.0, 1.0), min_cfg_coef=(1.0, 2.0, 1.0))
    codes = torch.zeros(2, 4, 12, dtype=torch.long)
    for share in (1.0, 0.25, 0.0):
        for stage in range(4):
            logits = guided_logits(Networks(scripted(0), null), codes, stage, config, share)
            with_text, without = scripted(0)(codes, stage), scripted(1)(codes, stage)
            coef = share * 4 + (1 - share) * 2 if stage == 1 else 1
            assert torch.allclose(logits, without + coef * (with_text - without), atol=1e-5)
    assert asked == [1, 1, 1]


def test_passes_that_run_as_one_do_so_only_in_guided_stages():
    """On a GPU, both passes are one of twice the batch."""
    joined = []

    def joint(codes, stage):
        joined.append(stage)
        return scripted(0)(codes, stage), scripted(1)(codes, stage)

    config = DecodingConfig((2, 1), max_cfg_coef=(1.0, 4.0, 1.0))
    given = torch.zeros(2, 12, dtype=torch.bool)
    codes, noise = torch.zeros(2, 4, 12, dtype=torch.long), item_noise(0, "ab", 5, 12)
    both = decode(Networks(scripted(0), joint=joint), codes, given, SIZE, config, noise)
    assert joined == [1]
    apart = decode(Networks(scripted(0), scripted(1)), codes, given, SIZE, config, noise)
    assert torch.equal(both, apart)


@pytest.mark.parametrize("num_frames", [24, 25])
def test_stride1_masks_as_near_the_schedule_as_spans_allow(num_frames):
    steps: list[DecodingStep] = []
    config = DecodingConfig(decoding_steps=(6,), span_len=3, span_arrangement="stride1")
    run(num_frames, config=config, on_step=steps.append)
    for step in steps[1:6]:
        share = torch.cos(torch.tensor(step.index / 5 * torch.pi / 2)).item()
        wanted = max(1, int(share * num_frames))
        assert (step.masked.sum(1) - wanted).abs().max() <= config.span_len


def test_a_clip_is_decoded_completely_if_its_length_is_no_multiple_of_the_span():
    steps: list[DecodingStep] = []
    run(32, config=DecodingConfig(decoding_steps=(4,), span_len=5), on_step=steps.append)
    assert steps[0].masked[:, 30:].all()


@pytest.mark.parametrize(
    ("max_cfg_coef", "asked"),
    # A single step begins with everything masked.
    [(1.0, []), (10.0, [0, 0, 1, 2, 3])],
)
def test_the_null_condition_is_not_asked_where_the_guidance_coefficient_is_1(max_cfg_coef, asked):
    """As at the last step of a stage, with guidance from 10 to 1."""
    found = []

    def null(codes, stage):
        found.append(stage)
        return torch.zeros(*codes[:, 0].shape, SIZE)

    codes, fixed = torch.zeros(1, 4, 12, dtype=torch.long), torch.zeros(1, 12, dtype=torch.bool)
    config = DecodingConfig(
        decoding_steps=(3, 2, 1, 1), max_cfg_coef=max_cfg_coef, min_cfg_coef=1.0
    )
    noise = item_noise(0, ["x"], 7, 12)
    decode(Networks(scripted(0), null), codes, fixed, SIZE, config, noise)
    assert found == asked


def test_filters_are_those_of_the_reference():
    data = load_file(FILTERS)
    for name, expected in data.items():
        if name.startswith("top_p"):
            kept = top_p_filter(data["probs"], float(name[5:]))
        elif name.startswith("top_k"):
            kept = top_k_filter(data["probs"], int(name[5:]))
        else:
            continue
        assert torch.allclose(kept / kept.sum(-1, keepdim=True), expected, atol=1e-6), name


def test_sampling_follows_the_probabilities_and_never_takes_what_was_filtered_out():
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2]).expand(40_000, -1)
    noise = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(sample(probs, 0.0, 0, noise), minlength=4) / 40_000
    assert torch.allclose(shares, probs[0], atol=0.01)
    assert set(sample(probs, 0.6, 0, noise).tolist()) == {0, 2}
    assert set(sample(probs, 0.0, 1, noise).tolist()) == {0}
    edges = torch.tensor([0.0, 1e-9, 0.5, 1 - 2**-24])
    assert 1 not in sample(probs[:4], 0.0, 0, edges).tolist()


def test_noise_of_the_entries_is_exponential():
    noise = exponential(torch.rand(100_000, generator=torch.Generator().manual_seed(0)), 8)
    assert noise.isfinite().all() and (noise > 0).all()
    assert torch.allclose(noise.mean(0), torch.tensor(1.0), atol=0.02)
    assert torch.allclose(noise.std(0), torch.tensor(1.0), atol=0.03)
    assert torch.corrcoef(noise.T).triu(1).abs().max() < 0.02


def test_the_last_number_of_steps_applies_to_further_stages_and_more_are_refused():
    assert DecodingConfig(decoding_steps=(3, 2)).per_stage("decoding_steps", 4) == (3, 2, 2, 2)
    with pytest.raises(UserError, match="5 numbers for 4 codebooks"):
        run(config=DecodingConfig(decoding_steps=(3, 2, 1, 1, 1)))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 6.0])
def test_the_race_in_the_nucleus_has_the_winner_of_the_sorted_one(top_p, sharpness):
    probs, noise = (sharpness * torch.randn(3, 400, 200)).softmax(-1), torch.rand(3, 400)
    sorted_first = (top_p_filter(probs, top_p) / exponential(noise, 200)).argmax(-1)
    assert (
        sample(probs, top_p, 0, noise) != sorted_first
    ).sum() <= 1  # the mass before an entry is rounded


def neighbours(codes: torch.Tensor, stage: int) -> torch.Tensor:
    """Logits from the codes of a frame and its two neighbours, with silence beyond the ends."""
    table = torch.randn(3, 4, SIZE + 1, SIZE, generator=torch.Generator().manual_seed(stage))
    padded = torch.nn.functional.pad(codes, (1, 1), value=SIZE)
    seen = [padded[:, k, i : i + codes.shape[2]] for k in range(4) for i in range(3)]
    pairs = [(k, i) for k in range(4) for i in range(3)]
    return 3 * sum(table[i, k][x] for (k, i), x in zip(pairs, seen, strict=True))


@given(st.integers(2, 20), st.integers(1, 30), st.integers(0, 19))
@settings(max_examples=30)
def test_a_loop_turned_is_the_same_loop(num_frames, context, by):
    """The network sees the end before the beginning, so rotating a loop rotates its result."""
    config = DecodingConfig(decoding_steps=(3, 2), span_len=1, span_scoring="random")
    noise = item_noise(0, ["a"], 9, num_frames)
    codes = torch.randint(0, SIZE, (1, 4, num_frames))
    given = torch.rand(1, 4, num_frames) < 0.3
    networks = circular(Networks(neighbours), num_frames, context)
    out = decode(networks, codes, given, SIZE, config, noise)
    turned = decode(
        networks,
        codes.roll(by, 2),
        given.roll(by, 2),
        SIZE,
        config,
        type(noise)(*(x.roll(by, 2) for x in noise)),
    )
    assert torch.equal(turned, out.roll(by, 2))


@given(st.integers(1, 40), st.sampled_from([0.1, 0.5, 0.9]), st.integers(1, 4))
@settings(max_examples=30)
def test_the_second_lap_decodes_the_least_certain_spans_again(num_frames, share, span_len):
    config = DecodingConfig(
        decoding_steps=(6, 2), span_len=span_len, second_lap=share, anneal_temperature=False
    )
    steps: list[DecodingStep] = []
    codes = torch.zeros(2, 4, num_frames, dtype=torch.long)
    fixed = torch.zeros(2, num_frames, dtype=torch.bool)
    fixed[:, : num_frames // 3] = True
    noise = item_noise(0, ["a", "b"], config.num_steps(4), num_frames)
    networks = Networks(scripted(1), scripted(2))
    out = decode(networks, codes, fixed, SIZE, config, noise, steps.append)
    first, second = steps[:12], steps[12:]
    assert (
        len(steps)
        == config.num_steps(4)
        == 12 + max(1, round(share * 6)) + 3 * max(1, round(share * 2))
    )
    again = second[0].masked
    assert not (again & fixed).any()
    spans = -(-(num_frames) // span_len) - (num_frames // 3) // span_len
    assert (again.sum(1) <= max(1, int(share * spans)) * span_len).all() and again.any(1).all()
    before = first[-1].codes
    kept = ~again[:, None].expand_as(out)
    assert torch.equal(out[kept], before[kept]), "what is certain stays, in all codebooks"
    hidden = second[0].codes[:, 1:]
    assert (hidden == SIZE).all(), "the second lap begins with the stage that the first began with"


def test_codebooks_that_are_given_cost_no_pass():
    asked = []

    def network(codes, stage):
        asked.append(stage)
        return torch.zeros(1, 12, SIZE)

    given = torch.zeros(1, 4, 12, dtype=torch.bool)
    given[:, [0, 3]] = True
    codes = torch.ones(1, 4, 12, dtype=torch.long)
    config = DecodingConfig(decoding_steps=(2, 2, 1, 1))
    out = decode(Networks(network), codes, given, SIZE, config, item_noise(0, ["a"], 6, 12))
    assert asked == [1, 1, 2] and (out[:, [0, 3]] == 1).all()
