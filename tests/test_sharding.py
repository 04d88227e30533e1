"""FSDP2 on two gloo ranks equals DDP, up to the rounding of one sum."""

import copy
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from helpers_data import write_shards
from helpers_ranks import fit_on_ranks
from helpers_resume import arguments, differences, ledger, make_data, outcome

import magnet_train
from magnet_train.common.errors import UserError
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.model import Magnet, MagnetConfig
from magnet_train.optimizer import DAdaptAdam
from magnet_train.sharding import (
    full_tensor,
    gather_to_rank0,
    is_sharded,
    local_shard,
    shard,
    unsharded_copy,
)

STEPS = (3, 2, 1, 1)
OPTIONS = (
    "--trainer.val_check_interval=8",
    "--checkpoint.save_top_k=-1",
    "--generation.num_prompts=3",
    "--generation.batch_size=2",
    "--generation.num_media=3",
    "--generation.metrics=[]",
    "--generation.baselines=false",
    f"--generation.decoding.decoding_steps={list(STEPS)}",
    "--trainer.log_every_n_steps=1",
)
# Both sum the same gradients of two ranks. Only the norm for clipping is summed in another
# order, and its rounding (6e-8) propagates through 8 steps of AdamW at a rate of 0.01.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


# --- the network alone ----------------------------------------------------------------------------


def on_rank(
    rank: int,
    size: int,
    folder: str,
    precision: torch.dtype,
    compiled: bool,
    options: dict[str, Any],
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size
    )
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_heads": 2, "num_layers": 2, "codebook_size": 64, "text_dim": 16}
    network = Magnet(MagnetConfig(**sizes, **options))
    plain = copy.deepcopy(network)
    names = list(network.state_dict())
    if compiled:
        network.compile_blocks(backend="aot_eager")
    shard(network, "cpu")
    assert is_sharded(network) and not is_sharded(plain) and list(network.state_dict()) == names
    held = sum(local_shard(p.detach()).numel() for p in network.parameters())
    assert held == sum(p.numel() for p in plain.parameters()) // size
    generators = [torch.Generator().manual_seed(r) for r in range(size)]
    for stage in range(1 if compiled else 4):
        of_ranks = []
        for generator in generators:
            codes, states = (
                torch.randint(65, (2, 4, 45), generator=generator),
                torch.randn(2, 6, 16, generator=generator),
            )
            tokens, masked = (
                torch.tensor([[True] * 6, [False] * 6]),
                torch.rand(2, 45, generator=generator) < 0.5,
            )
            of_ranks.append((codes, plain.config.stage(stage), (states, tokens), masked))
        for model in (plain, network):  # not after a pass, where `network` has its weights whole
            model.zero_grad()
        losses = []
        for model, given in [*((plain, given) for given in of_ranks), (network, of_ranks[rank])]:
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                losses.append(model.masked_logits(*given).float().square().mean())
        loss = losses.pop()
        assert torch.allclose(loss, losses[rank], rtol=1e-5)
        torch.stack(losses).mean().backward()
        loss.backward()
        for (name, one), two in zip(plain.named_parameters(), network.parameters(), strict=True):
            assert two.grad is not None and one.grad is not None, name
            assert torch.allclose(full_tensor(two.grad), one.grad, rtol=1e-4, atol=1e-7), (
                name,
                stage,
            )
    one, two = (DAdaptAdam([*model.parameters()], d0=1e-3) for model in (plain, network))
    for _ in range(2):  # with the last gradients
        one.step()
        two.step()
    sizes = [float(optimizer.param_groups[0]["d"]) for optimizer in (one, two)]
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-5)
    for name, weight in plain.named_parameters():
        sharded = full_tensor(dict(network.named_parameters())[name])
        assert torch.allclose(sharded, weight, rtol=1e-4, atol=1e-6), name
        weight.data.copy_(sharded)
    gathered = gather_to_rank0(dict(network.named_parameters()))
    assert list(gathered) == (list(dict(plain.named_parameters())) if rank == 0 else [])
    for model in (unsharded_copy(network), unsharded_copy(plain)):
        assert not is_sharded(model)
        for name, weight in plain.state_dict().items():
            assert torch.equal(model.state_dict()[name], weight)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("ranks", "precision", "compiled", "options"),
    [
        (2, torch.float32, False, {}),
        (2, torch.bfloat16, False, {}),
        (2, torch.float32, True, {}),
        (8, torch.float32, False, {}),
        (2, torch.float32, False, {"positions": "both", "convolution": 3, "context": (-1, 9, 5)}),
        (2, torch.float32, False, {"order": "hybrid"}),
    ],
)
def test_shards_give_the_logits_and_gradients_of_whole_weights(
    ranks, precision, compiled, options, tmp_path: Path
):
    """Also on more ranks than stages; all ranks have equal shards."""
    arguments = (ranks, str(tmp_path), precision, compiled, options)
    mp.start_processes(on_rank, arguments, nprocs=ranks, start_method="fork")


def begins_apart(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.manual_seed(rank)
    with pytest.raises(UserError, match="the ranks start with different weights"):
        shard(
            Magnet(MagnetConfig(dim=32, num_heads=2, num_layers=1, codebook_size=64, text_dim=16)),
            "cpu",
        )
    dist.destroy_process_group()


def test_weights_that_differ_are_not_mixed(tmp_path: Path):
    mp.start_processes(begins_apart, (str(tmp_path),), nprocs=2, start_method="fork")


# --- fit ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With 5 validation items: two batches for the first rank, one for the second."""
    folder = make_data(tmp_path_factory.mktemp("data"))
    write_shards(folder / "uneven", str(folder / "codec"), (3, 2))
    return folder


def fit(strategy: str, data: Path, run: Path, *options: str, **disturbed: Any) -> str:
    """Run two ranks; returns their output."""
    options = (
        f"--trainer.strategy={strategy}",
        f"--data.validation={data / 'uneven'}",
        *OPTIONS,
        *options,
    )
    statuses, text = fit_on_ranks(
        2, arguments(data, run, *options, **disturbed), run.with_suffix(".log")
    )
    assert statuses == [0, 0], text[-3000:]
    return text


@pytest.fixture(scope="module")
def ddp(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("ddp") / "run"
    fit("ddp", data, run)
    return run


@pytest.fixture(scope="module")
def fsdp2(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("fsdp2") / "run"
    fit("fsdp2", data, run)
    return run


def near(one: Any, two: Any) -> bool:
    """Equal names, and equal numbers up to rounding."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(near(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(near(a, b) for a, b in zip(one, two, strict=True))
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.allclose(one, two, **ROUNDING)
    if isinstance(one, float):  # such as the best values so far
        return one == pytest.approx(two, rel=1e-5)
    return one == two


def alike(one: Path, two: Path, done: int = 0) -> bool:
    """Compare losses from batch `done` on, validations and final states, up to rounding."""
    a, b = ({k: v for k, v in ledger(run).items() if k[0] >= done} for run in (one, two))
    assert a.keys() == b.keys() and len(a) == 2 * (8 - done)
    for place, line in a.items():
        losses = [float.fromhex(x.pop("loss")) for x in (line, b[place])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5) and line == b[place]
    values = [
        float.fromhex((run / "ledger.validations").read_text().split()[-1]) for run in (one, two)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    ends = [outcome(run) for run in (one, two)]
    for end in ends:
        del end["logged"]
    assert near(*ends)
    return True


def test_shards_train_as_ddp_does(ddp: Path, fsdp2: Path):
    assert alike(ddp, fsdp2)
    end = outcome(fsdp2)
    raw, averaged = end["current_model_state"], end["state_dict"]
    assert any(not torch.allclose(raw[name], averaged[name], **ROUNDING) for name in raw)


@pytest.mark.parametrize("run", ["ddp", "fsdp2"])
def test_each_item_is_validated_once(run: str, request: pytest.FixtureRequest):
    lines = (request.getfixturevalue(run) / "ledger.validated").read_text().splitlines()
    assert sorted(line.split()[2] for line in lines) == [f"item{n:04d}" for n in range(5)]
    assert sorted(line.split()[1] for line in lines) == ["0", "0", "0", "1", "1"]


def test_what_it_decoded_is_what_its_checkpoint_decodes_in_one_process(fsdp2: Path):
    generator = magnet_train.load(fsdp2)
    config = DecodingConfig(decoding_steps=STEPS)
    kept = sorted((fsdp2 / "validation" / "step_0000008").glob("*.npz"))
    assert len(kept) == 3
    for file in kept:
        about = json.loads(file.with_suffix(".json").read_text())
        prompts, names = [about["prompt"], ""], [about["item"], "padding"]  # batches of two
        result = generator.generate(prompts, 0, names, decoding=config)
        assert np.array_equal(np.load(file)["codes"], result.codes[0].numpy())


def test_its_checkpoint_is_validated_in_shards(fsdp2: Path, data: Path, tmp_path: Path):
    run = tmp_path / "run"
    own = (f"--data.validation={data / 'uneven'}", "--trainer.strategy=fsdp2")
    given = [a for a in arguments(data, run, *own)[1:] if not a.startswith("--ckpt_path")]
    last = f"--ckpt_path={fsdp2 / 'checkpoints' / 'last.ckpt'}"
    statuses, text = fit_on_ranks(2, ["validate", *given, last], tmp_path / "log")
    assert statuses == [0, 0], text[-3000:]
    one, two = ((folder / "ledger.validations").read_text().split() for folder in (fsdp2, run))
    assert float.fromhex(one[1]) == pytest.approx(float.fromhex(two[1]), rel=1e-6)


def test_shards_are_gathered_outside_of_inference_mode(fsdp2: Path):
    """Lightning enables inference mode with NCCL only, and gathering would fail in it."""
    assert yaml.safe_load((fsdp2 / "config.yaml").read_text())["trainer"]["inference_mode"] is False


def begun(run: Path, twin: Path) -> Path:
    """A run folder with only the uninterrupted run's checkpoint of step 4."""
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(twin / "checkpoints" / "step=0000004.ckpt", run / "checkpoints")
    return run


def test_a_resumed_run_equals_an_uninterrupted_one(fsdp2: Path, data: Path, tmp_path: Path):
    run = begun(tmp_path / "run", fsdp2)
    fit("fsdp2", data, run)
    found = differences(outcome(fsdp2), outcome(run))
    assert [
        d
        for d in found
        if d != "/optimizer_states/0/param_groups/0/betas: (0.9, 0.95) and [0.9, 0.95]"
    ] == []
    lines = ledger(run)
    assert min(lines) == (4, 0)
    assert all(ledger(fsdp2)[place] == line for place, line in lines.items())
    assert (run / "ledger.validations").read_text() == (fsdp2 / "ledger.validations").read_text()


def test_ddp_resumes_from_the_checkpoint_of_shards(fsdp2: Path, data: Path, tmp_path: Path):
    run = begun(tmp_path / "run", fsdp2)
    fit("ddp", data, run)
    assert alike(fsdp2, run, done=4)


def test_bad_gradients_of_one_rank_and_a_signal_to_the_other(data: Path, tmp_path: Path):
    """In bfloat16, where Lightning itself refuses clipping with a fused optimizer."""
    told = {"bad_gradients": (2,), "signal_at": 4, "signal": int(signal.SIGUSR1)}
    text = fit("fsdp2", data, tmp_path / "run", "--trainer.precision=bf16-mixed", **told)
    assert text.count("stopped at step 5 by a signal to another rank: saved") == 1
    end = outcome(tmp_path / "run")
    assert end["step"] == 5 and end["callbacks"]["NanGuard"]["skipped"] == 1
    assert all(x.isfinite().all() for x in end["current_model_state"].values())


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--trainer.precision=bf16-true"], "bf16-mixed"),
        (
            ["--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy"],
            "save_distributed_checkpoint=true",
        ),
    ],
)
def test_what_shards_cannot_do_is_refused_in_a_line(
    option: list[str], says: str, data: Path, tmp_path: Path
):
    given = arguments(data, tmp_path / "run", "--trainer.strategy=fsdp2", *option)
    statuses, text = fit_on_ranks(1, given, tmp_path / "log")
    (line,) = [x for x in text.splitlines() if x.startswith("error:")]
    assert statuses == [2] and says in line


def test_lightnings_own_name_and_sizes_do_too(data: Path, tmp_path: Path):
    """Its default sizes request tensor parallelism within a node; weights are still sharded over
    all ranks."""
    own = "--trainer.strategy.save_distributed_checkpoint=false"
    given = (
        "--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy",
        "--trainer.max_steps=2",
    )
    statuses, text = fit_on_ranks(
        2, arguments(data, tmp_path / "run", *given, own), tmp_path / "log"
    )
    assert statuses == [0, 0], text[-3000:]
    assert len(ledger(tmp_path / "run")) == 4
