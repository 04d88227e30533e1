"""Losses, gradients, optimizer steps and averages equal the reference's, with its masks."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers_audiocraft import FIXTURES, as_the_reference_sees, reference_model
from safetensors.torch import load_file

from magnet_train.audiocraft.names import correspondence, to_theirs
from magnet_train.callbacks.averaging import WeightEMA
from magnet_train.loss import masked_cross_entropy
from magnet_train.masking import span_mask
from magnet_train.model import Magnet
from magnet_train.module import MagnetModule
from magnet_train.optimizer import DAdaptAdam, OptimizerConfig, cosine_factor

STEPS = json.loads((FIXTURES / "train" / "step.json").read_text())
PAIRS = correspondence(2, 4)


def loss_of(model: Magnet, case: str) -> torch.Tensor:
    """Loss for the reference's tokens and masks. The reference attends to padded frames, unlike
    `MagnetModule.stage_loss`.
    """
    data = load_file(FIXTURES / "train" / "step.safetensors")
    stage, codes = int(case.removeprefix("stage")[0]), data[f"{case}.tokens"].long()
    masked, valid = data[f"{case}.stage_mask"].bool(), data[f"{case}.padding_mask"].bool()
    asked = codes.clone()
    asked[:, stage] = asked[:, stage].masked_fill(masked, model.config.mask_id)
    asked[:, stage + 1 :] = model.config.mask_id
    text = as_the_reference_sees(model, data["cond.t5_hidden"], data["cond.mask"])
    counted = masked & valid
    return masked_cross_entropy(
        model.logits(model.trunk(asked, model.config.stage(stage), text)[counted], stage),
        codes[:, stage],
        counted,
    ).mean()


def gradients(model: Magnet) -> dict[str, torch.Tensor]:
    """Gradients by the reference's names; fails for parameters without a gradient."""
    return to_theirs({k: p.grad for k, p in model.named_parameters() if p.grad is not None}, PAIRS)


@pytest.mark.parametrize("case", STEPS)
def test_loss_and_gradients(case, parity):
    model, want = reference_model(), STEPS[case]
    loss = loss_of(model, case)
    loss.backward()
    own = gradients(model)
    assert own.keys() == want["grad_norms"].keys()
    worst = 0.0
    for name, norm in want["grad_norms"].items():
        if norm == 0:
            assert own[name].count_nonzero() == 0, name  # unused heads: zeros, not None
        else:
            worst = max(worst, abs(own[name].norm().item() / norm - 1))
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    assert total == pytest.approx(want["total_grad_norm"], rel=1e-5)
    parity(
        f"loss, {case}",
        f"CE {want['ce']:.6f}",
        f"CE {loss.item():.6f}",
        f"{abs(loss.item() - want['ce']):.1e}",
    )
    parity(f"gradient norms, {case}", f"{len(own)} tensors", "relative", f"{worst:.1e}")
    assert loss.item() == pytest.approx(want["ce"], abs=1e-5) and worst < 1e-4


def test_gradients_entry_by_entry(parity):
    model = reference_model()
    loss_of(model, "stage1").backward()
    data, own, worst = load_file(FIXTURES / "train" / "step.safetensors"), gradients(model), 0.0
    for name, tensor in own.items():
        want = data[f"stage1.grad.{name}"]
        worst = max(worst, ((tensor - want).norm() / want.norm().clamp(min=1e-12)).item())
        assert torch.allclose(tensor, want, rtol=1e-4, atol=1e-4 * want.abs().max().item()), name
    parity("gradients, stage 1, entry by entry", f"{len(own)} tensors", "relative", f"{worst:.1e}")


def test_the_optimizer_moves_every_parameter_as_adamw_does():
    """Weight decay applies to all parameters, including norms and unused heads. Second update of a
    warm-up, because the first has a learning rate of 0.
    """
    config = OptimizerConfig(lr=1e-2, warmup_steps=10, schedule="cosine")
    model = reference_model()
    module = MagnetModule(model.config, config)
    module.network = model
    module._trainer = SimpleNamespace(
        estimated_stepping_batches=1000, fast_dev_run=False, precision=32, gradient_clip_val=None
    )  # type: ignore[assignment]
    made = module.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    moments = {k: (torch.zeros_like(p), torch.zeros_like(p)) for k, p in before.items()}
    for update in range(3):
        optimizer.zero_grad()
        loss_of(model, "stage1").backward()
        rate = 1e-2 * cosine_factor(update, 10, 1000)
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            assert gradient is not None
            first = 0.9 * moments[name][0] + 0.1 * gradient
            second = 0.95 * moments[name][1] + 0.05 * gradient**2
            moments[name] = (first, second)
            unbiased = first / (1 - 0.9 ** (update + 1)), second / (1 - 0.95 ** (update + 1))
            before[name] = before[name] * (1 - rate * 0.1) - rate * unbiased[0] / (
                unbiased[1].sqrt() + 1e-8
            )
        optimizer.step()
        scheduler.step()
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter, before[name], rtol=1e-5, atol=1e-7), (update, name)
    assert not torch.equal(model.head[0], reference_model().head[0])  # weight decay


def test_d_adaptation_is_the_references():
    """audiocraft's `optim/dadam.py` in float64 with whole vectors: 8 updates at 0.1 to 0.8 of the
    rate; the first only fills the running means."""
    model, d0 = reference_model(), 1e-3
    optimizer = DAdaptAdam([*model.parameters()], 0.0, (0.9, 0.95), 1e-8, 0.1, d0)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    s = mean = square = torch.zeros_like(weights)
    d, weighted = d0, 0.0
    for update in range(8):
        optimizer.zero_grad()
        loss_of(model, "stage1").backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
        optimizer.param_groups[0]["lr"] = rate = update / 10
        optimizer.step()
        if update:
            step = d * rate
            mean = 0.9 * mean + 0.1 * step * gradient
            square = 0.95 * square + 0.05 * gradient**2
            s = 0.95 * s + 0.05 * step * gradient
            root = square.sqrt() + 1e-8
            weighted = 0.95 * weighted + 0.05 * step**2 * (gradient**2 / root).sum().item()
            d = max(d, (((s**2 / root).sum() / 0.05 - weighted) / s.abs().sum()).item())
            weights = weights * (1 - 0.1 * step) - mean / root
        own = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
        assert float(optimizer.param_groups[0]["d"]) == pytest.approx(d, rel=1e-5), update
        assert torch.allclose(own, weights, rtol=1e-5, atol=2e-7), update
    assert d > 2 * d0 and weighted > 0


def test_the_average_is_the_references():
    """audiocraft's `optim/ema.py`: count = count * d + 1 and weight 1 / count, every 10 updates."""
    callback = WeightEMA(decay=0.99, every_n_steps=10)
    assert [n for n in range(1, 41) if callback.is_due(n)] == [10, 20, 30, 40]
    weights, ours, theirs, count = (
        torch.randn(40, 7, dtype=torch.float64),
        torch.full((7,), 9.0).double(),
        0.0,
        0.0,
    )
    for n, current in enumerate(weights):
        count = count * 0.99 + 1
        theirs = theirs + (current - theirs) / count
        ours = callback.updated(ours, current, n)
        # After the first update, the initial 9 has no effect.
        assert torch.allclose(ours, theirs, rtol=1e-12)


def test_frames_at_the_edge_are_masked_as_seldom_as_there():
    expected = json.loads((FIXTURES / "train" / "mask_rates.json").read_text())[
        "per_position_at_0_5"
    ]
    generator = torch.Generator().manual_seed(0)
    for name, positions in expected.items():
        num_frames, span_len = (int(part.lstrip("Tspan")) for part in name.split("."))
        masked = (
            span_mask(torch.full((2000,), 0.5), num_frames, span_len, generator).float().mean(0)
        )
        spread = 5 * (0.25 / 2000 + 0.25 / 1000) ** 0.5  # theirs are shares of 1000 draws
        for ends, own in (("first12", masked[:12]), ("last12", masked[-12:])):
            assert (own - torch.tensor(positions[ends])).abs().max() < spread, (name, ends)
