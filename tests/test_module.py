"""The training objective of the module."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from helpers_errors import refusal

from magnet_train.data.datamodule import split_global_batch
from magnet_train.model import MagnetConfig
from magnet_train.module import MagnetModule, step_generator
from magnet_train.optimizer import OptimizerConfig

SIZE = 16


class FakeText(torch.nn.Module):
    """Two tokens per caption, from its length; a fast substitute for the real encoder."""

    id, dim = "fake", 8

    def forward(self, captions):
        states = torch.stack([torch.full((2, 8), float(len(c))) for c in captions])
        mask = torch.tensor([[bool(c)] * 2 for c in captions])
        return states * mask[..., None], mask


@pytest.fixture
def module() -> MagnetModule:
    config = MagnetConfig(
        dim=32, num_heads=2, num_layers=2, codebook_size=SIZE, text_dim=8, context=2
    )
    module = MagnetModule(config, seed=1)
    module._frozen = (FakeText(),)
    return module


def batch(num_frames=24, valid=(24, 15)):
    return {
        "codes": torch.randint(SIZE, (len(valid), 4, num_frames)),
        "valid": torch.arange(num_frames)[None] < torch.tensor(valid)[:, None],
        "captions": ["one", "three", "five", "seven", "eleven", "thirteen"][: len(valid)],
        "keys": ["a", "b", "c", "d", "e", "f"][: len(valid)],
    }


def test_the_loss_ignores_padding(module):
    data, masked = batch(), torch.rand(2, 24) < 0.5
    other = dict(data, codes=data["codes"].clone())
    other["codes"][1, :, 15:] = torch.randint(SIZE, (4, 9))
    for stage in range(4):
        a, b = (module.stage_loss(d, d["captions"], stage, masked) for d in (data, other))
        assert torch.allclose(a.ce, b.ce, atol=1e-5)
        assert a.count.tolist() == (masked & data["valid"]).sum(1).tolist()


def test_the_loss_does_not_look_at_what_it_asks_for(module):
    data, masked = batch(valid=(24, 24)), torch.zeros(2, 24, dtype=torch.bool)
    masked[:, 5:9] = True
    seen = []
    trunk = module.network.trunk

    def watched(codes, *args):
        seen.append(codes)
        return trunk(codes, *args)

    module.network.trunk = watched  # type: ignore
    module.stage_loss(data, data["captions"], 1, masked)
    (codes,) = seen
    assert (codes[:, 1][masked] == SIZE).all() and (codes[:, 2:] == SIZE).all()
    assert torch.equal(codes[:, 0], data["codes"][:, 0])
    assert torch.equal(codes[:, 1][~masked], data["codes"][:, 1][~masked])


def test_the_caption_matters_and_its_absence_is_the_null_condition(module):
    data, masked = batch(valid=(24, 24)), torch.rand(2, 24) < 0.5
    with_text = module.stage_loss(data, ["one", "three"], 0, masked).ce
    without = module.stage_loss(data, ["", ""], 0, masked).ce
    assert (with_text - without).abs().min() > 1e-4


def drawn_masks(rate: float, num_batches: int = 40, **options) -> torch.Tensor:
    """Masks of batches of 6 examples of 60 frames: `batch example frame`."""
    network = MagnetConfig(dim=8, num_heads=1, num_layers=1)
    module = MagnetModule(network, **options)
    rates = torch.full((6,), rate)
    return torch.stack(
        [
            module._draw_masks(rates, [(0, list(range(6)))], 60, step_generator(0, i))[0]
            for i in range(num_batches)
        ]
    )


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_examples_shows_its_beginning(share):
    masks = drawn_masks(1.0, span_len=1, beginning_share=share).flatten(0, 1)
    starts = masks.int().argmax(1)
    assert torch.equal(masks, torch.arange(60) >= starts[:, None])  # all frames behind it
    assert abs((starts > 0).float().mean() - share * 59 / 60) < 0.1
    assert share == 0 or (starts.max() > 50 and starts[starts > 0].min() < 10)


def test_each_batch_draws_one_of_the_span_lengths():
    masks = drawn_masks(0.02, span_len=2, more_span_lens=(7,))
    lengths = masks[:, :, :50].sum(2)  # one span; those near the end are cut
    for batch_lengths in lengths:
        whole = batch_lengths[batch_lengths > 1]
        assert whole.max() <= 2 or (whole >= 2).all()
    longest = lengths.amax(1)
    assert set(longest.tolist()) <= {0, 1, 2, 7}
    assert 0.25 < (longest == 7).float().mean() < 0.75


def test_initial_weights_are_a_function_of_the_seed(module):
    torch.rand(100)
    again = MagnetModule(module.config, seed=1)
    other = MagnetModule(module.config, seed=2)
    assert torch.equal(module.network.head, again.network.head)
    assert not torch.equal(module.network.head, other.network.head)


def drawn(module, rank, batch_index, accumulated=1):
    """Stage, masks and captions of a training step at that position of a run."""
    seen = []

    class Seen(Exception):
        pass

    def stop(batch, captions, stage, masked):
        seen.append((stage, masked, captions))
        raise Seen

    epoch, update = SimpleNamespace(total_batch_idx=batch_index), batch_index // accumulated
    module._trainer = SimpleNamespace(
        global_rank=rank, global_step=update, fit_loop=SimpleNamespace(epoch_loop=epoch)
    )
    module.stage_loss = stop
    with pytest.raises(Seen):
        module.training_step(batch(valid=(24, 24)), 0)
    return seen[0]


def test_ranks_share_the_stage_and_nothing_else(module):
    places = [[drawn(module, rank, n) for rank in range(3)] for n in range(20)]
    assert all(len({stage for stage, _, _ in ranks}) == 1 for ranks in places)
    assert {ranks[0][0] for ranks in places} == {0, 1, 2, 3}
    assert not any(torch.equal(a[1], b[1]) for ranks in places for a, b in pairwise(ranks))
    # Captions are dropped independently per example, so some batches lose one of two.
    assert any(0 < sum(not c for c in captions) < 2 for ranks in places for _, _, captions in ranks)


def test_what_is_drawn_does_not_depend_on_what_was_drawn_before(module):
    first = drawn(module, 1, 7)
    torch.rand(100)
    drawn(module, 1, 3)
    again = drawn(module, 1, 7)
    assert first[0] == again[0] and torch.equal(first[1], again[1]) and first[2] == again[2]


def test_accumulated_batches_share_the_stage(module):
    stages = [drawn(module, 0, n, accumulated=4)[0] for n in range(40)]
    assert all(len(set(stages[n : n + 4])) == 1 for n in range(0, 40, 4)) and len(set(stages)) > 1


def test_each_example_may_have_a_stage_of_its_own(module):
    """All ranks have the same groups, so none waits for another."""
    module.stage_sampling = "example"
    module._trainer = SimpleNamespace(global_rank=0)
    groups = [module._drawn_stages(count, size=8) for count in range(40)]
    assert all(sorted(row for _, rows in step for row in rows) == [*range(8)] for step in groups)
    drawn = [stage for step in groups for stage, rows in step for _ in rows]
    # Four standard deviations of a uniform draw.
    assert all(abs(drawn.count(stage) / 320 - 0.25) < 0.1 for stage in range(4))
    module._trainer.global_rank = 1
    assert groups == [module._drawn_stages(count, size=8) for count in range(40)]


def test_stages_per_example_are_trained_as_each_alone(module):
    """The loss is the mean over all masked frames of all stages, and so is its gradient."""
    module.stage_sampling, size = "example", 6
    data = batch(valid=(24, 24, 24, 20, 24, 9))
    module._trainer = SimpleNamespace(
        global_rank=0,
        global_step=0,
        log_every_n_steps=1,
        fast_dev_run=False,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=3)),
    )
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: float(value.detach())})
    parts, stage_loss = [], module.stage_loss

    def seen(part, captions, stage, masked):
        parts.append((part, captions, stage, masked))
        return stage_loss(part, captions, stage, masked)

    module.stage_loss = seen
    loss = module.training_step(data, 0)
    assert len(parts) > 1 and sum(len(captions) for _, captions, *_ in parts) == size
    alone = [
        stage_loss(
            {n: part[n][i : i + 1] for n in ("codes", "valid")},
            [captions[i]],
            stage,
            masked[i : i + 1],
        )
        for part, captions, stage, masked in parts
        for i in range(len(captions))
    ]
    total = sum(one.ce.sum() for one in alone) / sum(one.count.sum() for one in alone)
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-6)
    assert logged["train/loss"] == float(loss.detach())
    assert {n for n in logged if n.startswith("train/ce")} == {
        f"train/ce/stage{stage}" for *_, stage, _ in parts
    }
    own, expected = (torch.autograd.grad(x, [*module.network.parameters()]) for x in (loss, total))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(own, expected, strict=True))


def test_d_adaptation_finds_a_step_size(module):
    """The estimate grows from 1e-6; with lr 1 it is the step size."""
    module.optimizer_config = OptimizerConfig(name="dadapt_adam", lr=1.0, warmup_steps=2)
    module._trainer = SimpleNamespace(
        estimated_stepping_batches=200,
        fast_dev_run=False,
        precision="32-true",
        gradient_clip_val=None,
    )
    made = module.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    data, masked, losses = batch(valid=(24, 24)), torch.rand(2, 24) < 0.5, []
    for _ in range(60):
        optimizer.zero_grad()
        loss = module.stage_loss(data, data["captions"], 0, masked).mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert optimizer.param_groups[0]["d"] > 1e-5 and losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(
    ("given", "expected"),
    [((192, 32, 6), (6, 1)), ((192, 8, 16), (12, 2)), ((192, 1, 7), (6, 32)), ((7, 7, 9), (1, 1))],
)
def test_the_global_batch_is_shared_out(given, expected):
    per_device, accumulated = split_global_batch(*given)
    assert (per_device, accumulated) == expected and per_device * accumulated * given[1] == given[0]


def test_a_global_batch_that_cannot_be_shared_out_is_named():
    text = refusal(split_global_batch, 100, 8, 4)
    assert "global_batch_size=100" in text and "8 devices; give 96 or 104" in text
