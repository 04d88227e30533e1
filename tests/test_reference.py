"""Decoding equals the reference token by token with `reference_compat`."""

import json
import re

import pytest
import torch
from helpers_audiocraft import FIXTURES, as_the_reference_sees, reference_model
from safetensors.torch import load_file

from magnet_train.decoding.audiocraft_compat import least_probable_spans
from magnet_train.decoding.decode import DecodingConfig, Networks, decode, item_noise
from magnet_train.model import Magnet

SCRIPTED = json.loads((FIXTURES / "decode_only" / "scripted.json").read_text())
DECODES = json.loads((FIXTURES / "lm_tiny" / "decode.json").read_text())


def settings(case: dict, **changes) -> DecodingConfig:
    given = case["params"]
    ours = {
        name: given[name]
        for name in ("top_k", "top_p", "max_cfg_coef", "min_cfg_coef", "decoding_steps")
    }
    ours |= {name: given[name] for name in ("span_scoring", "span_arrangement")}
    ours |= {"temperature": given["temp"], "anneal_temperature": given["anneal_temp"]}
    ours |= {
        "greedy": not given["use_sampling"],
        "span_len": case["span_len"],
        "reference_compat": True,
    }
    return DecodingConfig.from_dict(ours | changes)


def run(network, unconditional, case: dict, data: dict, batch: int, num_frames: int, size: int):
    """Codes, and the network's input of the stage at every step."""
    config, rows = settings(case), []
    codes = torch.zeros(batch, 4, num_frames, dtype=torch.long)
    fixed = torch.zeros(batch, num_frames, dtype=torch.bool)
    if case["prompt_len"]:
        codes[..., : case["prompt_len"]] = data[f"{case['name']}.prompt"]
        fixed[:, : case["prompt_len"]] = True

    def watched(codes, stage):
        rows.append(codes[:, stage].clone())
        return network(codes, stage)

    noise = item_noise(
        0, [str(i) for i in range(batch)], sum(config.per_stage("decoding_steps", 4)), num_frames
    )
    return decode(Networks(watched, unconditional), codes, fixed, size, config, noise), rows


def assert_rows(rows, data, name):
    wanted = data[f"{name}.step_inputs_at_stage"]
    assert len(rows) == len(wanted)
    for i, (row, want) in enumerate(zip(rows, wanted, strict=True)):
        assert torch.equal(row, want.to(row)), f"step {i}"


@pytest.mark.parametrize("case", SCRIPTED, ids=lambda case: case["name"])
def test_scripted_decoding_takes_the_same_steps(case, parity):
    data = load_file(FIXTURES / "decode_only" / "scripted.safetensors")
    table, batch, calls = data[f"{case['name']}.logits"], case["B"], []

    def network(codes, stage):
        calls.append(stage)
        return table[len(calls) - 1][:batch]

    def unconditional(codes, stage):
        return table[len(calls) - 1][batch:]

    codes, rows = run(network, unconditional, case, data, batch, case["T"], case["card"])
    assert_rows(rows, data, case["name"])
    assert torch.equal(codes, data[f"{case['name']}.tokens"])
    parity(
        f"decode, scripted: {case['name']}",
        f"{codes.numel()} codes, {len(rows)} steps",
        "the same",
        "0",
    )


@pytest.fixture(scope="module")
def reference() -> Magnet:
    return reference_model()


@torch.no_grad()
@pytest.mark.parametrize(
    "case", [c for c in DECODES if not c["params"]["use_sampling"]], ids=lambda case: case["name"]
)
def test_greedy_decoding_gives_the_same_codes(case, reference, parity):
    data, states = (
        load_file(FIXTURES / "lm_tiny" / f"{n}.safetensors")
        for n in ("decode", "decode_conditions")
    )
    batch = len(case["texts"])
    which = {1: "one", 2: "two", 3: "three_null"}[batch]
    text = as_the_reference_sees(
        reference, states[f"{which}.t5_hidden"][:batch], states[f"{which}.mask"][:batch]
    )
    config = reference.config
    try:
        object.__setattr__(config, "context", case["subcodes_context"])
        codes, rows = run(
            lambda c, s: reference(c, reference.config.stage(s), text),
            lambda c, s: reference(c, reference.config.stage(s), None),
            case,
            data,
            batch,
            case["max_gen_len"],
            config.codebook_size,
        )
    finally:
        object.__setattr__(config, "context", 5)
    wanted = data[f"{case['name']}.tokens"]
    assert codes.shape == wanted.shape
    if case["agreement_under_logit_noise"]["1e-5"] < 1:  # the reference has ties here
        agree = (codes == wanted).float().mean().item()
        parity(
            f"decode, greedy, on ties: {case['name']}",
            f"{codes.numel()} codes",
            f"{agree:.2%} the same",
            f"{1 - agree:.2%}",
        )
        assert agree >= 0.99
        return
    assert_rows(rows, data, case["name"])
    assert torch.equal(codes, wanted)
    parity(
        f"decode, greedy: {case['name']}",
        f"{codes.numel()} codes, {len(rows)} steps",
        "the same",
        "0",
    )


def test_the_search_for_sliding_spans_ends_where_the_reference_ends(parity):
    folder = FIXTURES / "decode_only"
    data = load_file(folder / "stride1_masks.safetensors")
    cases = json.loads((folder / "stride1_masks.json").read_text())
    for case in cases:
        scores = data[f"L{case['span_len']}.T{case['T']}.scores"]
        mask = least_probable_spans(scores, case["target"], case["span_len"])
        assert torch.equal(mask, data[f"{case['name']}.mask"].bool()), case["name"]
    parity("stride1 masks", f"{len(cases)} masks", "the same", "0")


def test_as_many_frames_are_masked_at_every_step(parity):
    table = json.loads((FIXTURES / "decode_only" / "masked_tokens_per_step.json").read_text())
    for name, wanted in table.items():
        num_frames, span_len, steps = map(int, re.findall(r"\d+", name))
        counts: list[int] = []
        config = DecodingConfig(decoding_steps=(steps,), span_len=span_len, reference_compat=True)
        decode(
            Networks(lambda codes, stage: torch.randn(1, codes.shape[2], 8)),
            torch.zeros(1, 1, num_frames, dtype=torch.long),
            torch.zeros(1, num_frames, dtype=torch.bool),
            8,
            config,
            item_noise(0, ["a"], steps, num_frames),
            lambda step, counts=counts: counts.append(int(step.masked.sum())),
        )
        assert counts == wanted, name
    parity("masked frames at each step", f"{len(table)} settings", "the same", "0")
