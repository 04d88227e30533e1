"""The reference's logits, positions and initial weights."""

import json

import pytest
import torch
from helpers_audiocraft import FIXTURES, as_the_reference_sees, reference_model
from safetensors.torch import load_file

from magnet_train.audiocraft.names import correspondence, to_theirs
from magnet_train.model import Magnet, MagnetConfig, sinusoidal_positions

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def data() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "lm_tiny" / "forward.safetensors")


def difference(model: Magnet, data: dict[str, torch.Tensor], case: str, stage: int) -> float:
    """Largest difference over all frames and conditions; of the four rows, two are null conditions
    and others are padded.
    """
    text = as_the_reference_sees(model, data["cond.t5_hidden"], data["cond.mask"])
    return (
        (model(data[f"{case}.tokens"], model.config.stage(stage), text) - data[f"{case}.logits"])
        .abs()
        .max()
        .item()
    )


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [37, 48, 50])
@pytest.mark.parametrize("stage", range(4))
def test_logits_of_every_stage(num_frames, stage, data, parity):
    worst = difference(reference_model(), data, f"T{num_frames}.stage{stage}", stage)
    parity(
        f"logits, T {num_frames}, stage {stage}",
        "4 rows, 2 of them null",
        "all frames",
        f"{worst:.1e}",
    )
    assert worst < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("context", [-1, 0, 2, 20])
def test_logits_at_every_context(context, data, parity):
    worst = difference(reference_model(context), data, f"ctx{context}.stage1", 1)
    parity(
        f"logits, context {context}, stage 1",
        "4 rows, 2 of them null",
        "all frames",
        f"{worst:.1e}",
    )
    assert worst < TOLERANCE


@torch.no_grad()
def test_the_heads_of_all_codebooks(data, parity):
    model, worst = reference_model(), 0.0
    text = as_the_reference_sees(model, data["cond.t5_hidden"], data["cond.mask"])
    for stage in range(4):
        features = model.trunk(data[f"T37.stage{stage}.tokens"], model.config.stage(stage), text)
        for k in range(4):
            wanted = data[f"T37.stage{stage}.logits_all_codebooks"][:, k]
            worst = max(worst, (model.logits(features, k) - wanted).abs().max().item())
    parity("logits of all heads, T 37", "16 heads", "all frames", f"{worst:.1e}")
    assert worst < TOLERANCE


@torch.no_grad()
def test_each_caption_gets_what_the_reference_gives_it_alone(data, parity):
    """In the reference a longer caption in the batch changes the result; here it does not."""
    model, tokens = reference_model(), data["pad.tokens"]

    def logits(projected: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        from magnet_train.model import TextKeyValues

        pairs = [block.cross_attention.keys_values(projected) for block in model.blocks]
        return model(
            tokens,
            model.config.stage(0),
            TextKeyValues([k for k, _ in pairs], [v for _, v in pairs], allowed),
        )

    alone, beside = data["pad.cond_alone"], data["pad.cond_beside"]
    count, everything = alone.shape[1], torch.ones(1, beside.shape[1], dtype=torch.bool)
    own = torch.arange(beside.shape[1])[None] < count
    as_alone = (logits(beside, own) - data["pad.logits_alone"]).abs().max().item()
    as_there = (logits(beside, everything) - data["pad.logits_beside_longer"]).abs().max().item()
    moved = (data["pad.logits_beside_longer"] - data["pad.logits_alone"]).abs().max().item()
    parity(
        "a caption beside a longer one",
        f"moves its logits by {moved:.2f}",
        "moves nothing",
        f"{as_alone:.1e}",
    )
    parity("the same with padding attended to", "its logits", "the same", f"{as_there:.1e}")
    assert as_alone < TOLERANCE and as_there < TOLERANCE and moved > 0.1


@torch.no_grad()
def test_the_fault_of_the_references_torch_backend_is_not_here(data):
    assert difference(reference_model(), data, "torch_backend_bug.stage1", 1) > 0.1


def test_positions(data, parity):
    worst = (sinusoidal_positions(60, 64) - data["pos_emb"]).abs().max().item()
    parity("positions", "60 frames", "the same", f"{worst:.1e}")
    assert worst < 1e-6


def test_initial_weights_have_the_references_statistics(parity):
    """Standard deviation and maximum of every tensor, within their sampling error.

    At full width; the scale of a block depends on its place only, so six of 24 blocks are made.
    """
    expected = json.loads((FIXTURES / "full_size" / "magnet_small_init_stats.json").read_text())
    with torch.no_grad():
        model = Magnet(MagnetConfig(num_layers=6))
    theirs, worst = to_theirs(model.state_dict(), correspondence(6, 4)), 0.0
    assert len(theirs) > 50
    for name, tensor in theirs.items():
        want = expected[name]
        if "norm" in name:
            assert tensor.unique().numel() == 1 and tensor.mean().item() == want["mean"]
            continue
        spread = 6 / (2 * tensor.numel()) ** 0.5  # six standard errors of a deviation
        relative = abs(tensor.std().item() / want["std"] - 1)
        worst = max(worst, relative / spread)
        assert relative < spread, f"{name}: deviation {tensor.std():.5f}, there {want['std']:.5f}"
        assert abs(tensor.mean().item() - want["mean"]) < 9 * want["std"] / tensor.numel() ** 0.5, (
            name
        )
        # Truncated at the same value.
        assert abs(tensor.abs().max().item() / want["absmax"] - 1) < 0.1, name
    parity(
        "initial weights of magnet-small",
        f"{len(theirs)} tensors",
        "deviations",
        f"{6 * worst:.1f} std errors",
    )
