"""`doctor`'s estimates equal measurements: parameters, training memory, checkpoints, FLOP."""

import pytest
import torch

from magnet_train.checks import cost as estimate
from magnet_train.checks.measure import count_flop, peak_mb, training_pass
from magnet_train.loss import masked_cross_entropy
from magnet_train.model import Magnet, MagnetConfig
from magnet_train.optimizer import DAdaptAdam

SMALL = MagnetConfig(dim=96, num_heads=4, num_layers=3, codebook_size=512, text_dim=64)
WIDE = MagnetConfig(dim=256, num_heads=8, num_layers=2, codebook_size=1024, text_dim=64)


def memory(config, batch_size, num_frames, precision, **settings) -> estimate.Memory:
    activations = estimate.activation_bytes(config, batch_size, num_frames, precision)
    return estimate.memory(config, precision, "adamw", activations, **settings)


@pytest.mark.parametrize(
    "config", [SMALL, WIDE, MagnetConfig(), MagnetConfig(dim=1536, num_heads=24, num_layers=48)]
)
def test_parameters_are_counted_without_the_network(config):
    with torch.device("meta"):
        assert estimate.num_parameters(config) == sum(
            p.numel() for p in Magnet(config).parameters()
        )


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("config", "batch_size", "num_frames"), [(SMALL, 3, 500), (WIDE, 1, 1500)])
def test_activations_are_within_a_fifth_of_what_the_allocator_counts(
    config, batch_size, num_frames, precision, stage
):
    num_predicted = round(estimate.MEAN_MASK_RATE * num_frames)
    half = precision.startswith("bf16")
    step, weights = training_pass(config, batch_size, num_frames, num_predicted, "cpu", half)
    step(stage)
    # Autocast's copies.
    measured = peak_mb(lambda: step(stage), "cpu") - (weights / 2e6 if half else 0)
    calculated = estimate.activation_bytes(config, batch_size, num_frames, precision) / 1e6
    assert 0.8 * measured < calculated < 1.2 * measured


def test_estimated_training_memory_is_within_a_fifth_of_the_allocators():
    """Memory of network, average, AdamW and three steps of 4 examples."""

    def train() -> None:
        network, average = Magnet(WIDE), Magnet(WIDE)
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        codes, masked = (
            torch.randint(1024, (4, 4, 400)),
            torch.rand(4, 400) < estimate.MEAN_MASK_RATE,
        )
        text = (
            torch.randn(4, estimate.NUM_TEXT, 64),
            torch.ones(4, estimate.NUM_TEXT, dtype=torch.bool),
        )
        for stage in (0, 1, 2):
            features = network.trunk(codes, network.config.stage(stage), network.encode_text(*text))
            masked_cross_entropy(
                network.logits(features[masked], stage), codes[:, stage], masked
            ).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(average.blocks) == 2

    measured = peak_mb(train, "cpu")
    calculated = memory(WIDE, 4, 400, "32-true").total / 1e6
    assert 0.8 * measured < calculated < 1.2 * measured


def test_the_state_is_what_an_optimizer_and_an_average_really_take():
    network, average = Magnet(SMALL), Magnet(SMALL)
    optimizer = torch.optim.AdamW(network.parameters())
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    held = [
        *network.parameters(),
        *average.parameters(),
        *(p.grad for p in network.parameters()),
        *moments,
    ]
    given = memory(SMALL, 1, 100, "32-true")
    assert given.state == sum(x.numel() * x.element_size() for x in held)
    assert given.copies == given.frozen == 0


def test_a_checkpoint_is_as_large_as_its_file(tmp_path):
    network = Magnet(SMALL)
    optimizer = torch.optim.AdamW(network.parameters())
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    average = {k: v.clone() for k, v in network.state_dict().items()}
    torch.save([network.state_dict(), average, optimizer.state_dict()], tmp_path / "x.ckpt")
    expected = estimate.checkpoint_bytes(SMALL, "adamw")
    assert expected < (tmp_path / "x.ckpt").stat().st_size < 1.05 * expected


def test_sharding_divides_the_state_and_not_the_activations():
    one = memory(SMALL, 2, 100, "bf16-mixed", ranks=8)
    shared = memory(SMALL, 2, 100, "bf16-mixed", ranks=8, sharded=True)
    for name in ("weights", "gradients", "moments", "average"):
        assert getattr(shared, name) == getattr(one, name) / 8
    assert shared.activations == one.activations
    # Autocast's copies of whole weights under either; DDP's buckets; two blocks at a time under
    # FSDP.
    parameters = estimate.num_parameters(SMALL)
    assert one.copies == parameters * (2 + 4)
    assert shared.copies == parameters * 2 + 2 * 4 * estimate.parameters_of_block(SMALL)


def test_a_validation_in_shards_has_all_weights_once_more():
    """For any number of ranks; this copy may be what does not fit."""
    many = memory(WIDE, 1, 100, "bf16-mixed", ranks=1000, sharded=True, frozen=1e6)
    weights = 4 * estimate.num_parameters(WIDE)
    assert many.validation == pytest.approx(1.5 * weights + 1e6, rel=0.01)
    assert many.total == many.validation
    assert many.total > sum(many.in_training.values()) > 0
    assert estimate.largest_batch(many, 1, many.validation) == 0
    assert estimate.largest_batch(many, 1, 1.2 * many.validation) > 0
    assert memory(WIDE, 1, 100, "bf16-mixed", ranks=1000).validation == 0


def test_dadaptation_keeps_one_tensor_more():
    parameter = torch.nn.Parameter(torch.ones(10))
    optimizer = DAdaptAdam([parameter])
    parameter.grad = torch.ones(10)
    optimizer.step()
    kept = [x for x in optimizer.state[parameter].values() if torch.is_tensor(x) and x.dim()]
    assert len(kept) == estimate.MOMENTS["dadapt_adam"]


def test_the_largest_batch_is_the_last_that_fits():
    given = memory(WIDE, 4, 1500, "32-true")
    capacity = 2e9
    most = estimate.largest_batch(given, 4, capacity)
    totals = [memory(WIDE, n, 1500, "32-true").total for n in (most, most + 1)]
    # Gradients of weights do not grow with the batch, so the difference is at most one example.
    room = capacity * (1 - estimate.RESERVE)
    assert totals[0] <= 1.02 * room and totals[1] > 0.98 * room
    assert estimate.largest_batch(given, 4, 1e6) == 0


def test_operations_are_those_that_are_counted():
    """Stage 0 without windowed attention. torch's counter includes recomputed parts, which have no
    products.
    """
    step, _ = training_pass(SMALL, 2, 500, round(estimate.MEAN_MASK_RATE * 500), "cpu", False)
    counted = count_flop(lambda: step(0))
    assert 2 * estimate.training_flop(SMALL, 500, 0) == pytest.approx(counted, rel=0.15)
    steps = (4, 2, 2, 2)
    twice = tuple(2 * n for n in steps)
    assert estimate.decoding_flop(SMALL, 500, twice) == 2 * estimate.decoding_flop(
        SMALL, 500, steps
    )
