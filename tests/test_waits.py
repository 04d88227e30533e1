"""No batch between two logged steps waits for the device."""

import json
import sys
from pathlib import Path
from traceback import extract_stack
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from helpers_ranks import fit_on_ranks
from helpers_resume import arguments
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils._python_dispatch import TorchDispatchMode

import magnet_train.module
from magnet_train.__main__ import main
from magnet_train.callbacks.agreement import EVERY_N_BATCHES
from magnet_train.conditioning import TextEncoder, load_text_encoder

META = torch.device("meta")


def given(data: Path, run: Path, callback: str, *options: str) -> list[str]:
    """Arguments of a fit with this callback instead of the ledger, which reads every loss."""
    only = f'--trainer.callbacks=[{{"class_path": "test_waits.{callback}"}}]'
    seldom = "--averaging.every_n_steps=100", "--checkpoint.every_n_train_steps=100"
    return [*arguments(data, run), *seldom, only, *options]


@pytest.fixture(autouse=True)
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions are already encoded: only new ones are waited for."""

    def load(name: str) -> TextEncoder:
        encoder = load_text_encoder(name)
        encoder([f"caption {number}" for number in range(24)])
        return encoder

    monkeypatch.setattr(magnet_train.module, "load_text_encoder", load)


class Enough(Exception):
    """Ends a run before it is saved."""


class OnMeta(SingleDeviceStrategy):
    """A device whose tensors have no values: reading one raises."""

    def __init__(self) -> None:
        super().__init__(META)

    def setup_environment(self) -> None:
        """There is nothing to set up."""

    def teardown(self) -> None:
        """There is nothing to copy back."""


class BlockingCopies(TorchDispatchMode):
    """Collects copies from the host for which it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function._schema.name
        if name == "aten::_to_copy":
            source, waits = args[0], not kwargs.get("non_blocking", False)
        elif name == "aten::copy_":
            source, waits = args[1], not (len(args) > 2 and args[2])
        else:
            return out
        if waits and out.device == META and source.device.type == "cpu" and source.dim():
            self.found.append(f"{name} {tuple(source.shape)}")
        return out


class SixBatches(Callback):
    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, number: int):
        if number == 1:  # the optimizer has its state
            self.mode = BlockingCopies()
            self.mode.__enter__()
        if number == 6:
            self.mode.__exit__(None, None, None)
            raise Enough(self.mode.found)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--model.stage_sampling=example", "--model.optimizer.name=dadapt_adam"),
        ("--model.network.order=hybrid", "--trainer.precision=bf16-mixed"),
    ],
)
def test_a_batch_reads_nothing_from_the_device_and_copies_without_waiting(
    options: tuple[str, ...], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda kind, *a, **k: autocast("cpu", *a, **k))
    supported = "_get_fused_kernels_supported_devices"
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], supported, lambda: ["cpu", "meta"])
    options = (*options, "--trainer.strategy.class_path=test_waits.OnMeta", "--model.crop_s=2.0")
    with pytest.raises(Enough) as end:
        main(given(data, tmp_path / "run", "SixBatches", *options))
    assert end.value.args == ([],)


# --- several ranks, on the CPU --------------------------------------------------------------------


class Reads(Callback, TorchDispatchMode):
    """Writes which batches read a number of a tensor, as each exchange of flags does."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, list[str]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function._schema.name in ("aten::_local_scalar_dense", "aten::equal"):
            lines = [f"{Path(f.filename).name}:{f.lineno}" for f in extract_stack()[-7:-1]]
            batch = self.trainer.fit_loop.epoch_loop.total_batch_idx
            self.found.setdefault(batch, []).append(" ".join(lines))
        return function(*args, **(kwargs or {}))

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, number: int):
        if number == 0:
            self.trainer = trainer
            self.__enter__()
        if number == 6:
            self.__exit__(None, None, None)
            file = Path(trainer.default_root_dir) / f"reads{trainer.global_rank}.json"
            file.write_text(json.dumps(self.found))


def test_ranks_wait_only_in_logged_steps_and_to_agree(data: Path, tmp_path: Path):
    options = (
        "--trainer.strategy=ddp",
        "--trainer.log_every_n_steps=3",
        "--trainer.max_steps=7",
        "--trainer.enable_progress_bar=true",
        "--trainer.logger=CSVLogger",
        f"--trainer.logger.save_dir={tmp_path}",
        "--model.network.order=hybrid",
    )
    told = given(data, tmp_path / "run", "Reads", *options)
    statuses, text = fit_on_ranks(2, told, tmp_path / "log")
    assert statuses == [0, 0], text[-3000:]
    for rank in range(2):
        found = json.loads((tmp_path / "run" / f"reads{rank}.json").read_text())
        due = {"2", str(EVERY_N_BATCHES - 1), "5"}
        assert {batch: found[batch] for batch in found.keys() - due} == {}
        assert due <= found.keys()
