"""Private parts of other packages used by `common/private_api.py` exist."""

import copy
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.flop_counter import FlopCounterMode

from magnet_train.cli.output import OutputOptions
from magnet_train.common import private_api


def test_torchmetrics_without_what_its_other_metrics_need():
    script = (
        "import sys\n"
        "from magnet_train.common import private_api\n"
        "private_api.import_torchmetrics_alone()\n"
        "import torchmetrics\n"
        "mean = torchmetrics.MeanMetric()\n"
        "mean.update(2.0)\n"
        "print(float(mean.compute()), {'transformers', 'scipy.signal'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "2.0 set()", done.stderr


class Probe(L.Callback):
    """Calls functions that need a running fit."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert private_api.attached_trainer(pl_module) is trainer
        assert private_api.cluster_environment(trainer) is not None
        assert not private_api.waits_for_results(trainer)
        assert not private_api.saves_distributed_checkpoints(trainer)
        private_api.kill_launched_ranks(trainer)
        assert hasattr(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor")
        private_api.omit_sigterm_broadcast(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        private_api.forget_logged(trainer)
        if trainer.global_step != 1:
            pl_module.log("seldom", float(trainer.global_step))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        row = private_api.unwritten_row(trainer)
        self.rows.append(row and (row["step"], "seldom" in row["values"]))

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        progress = private_api.Progress(copy.deepcopy(checkpoint))
        assert progress.num_batches == 4 and not progress.is_at_batch_end()
        progress.move_to_batch_end(3)
        assert progress.num_batches == 3 and progress.is_at_batch_end()
        progress.complete_batch()
        progress.set_validation(1)
        progress.take_back_logged_step()
        assert not progress.is_at_batch_end()
        private_api.keep_signal_handlers(trainer)


def test_lightnings_trainer(tmp_path):
    probe = Probe()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=4,
        limit_val_batches=0,
        callbacks=[probe],
        logger=False,
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    module = BoringModel()
    assert private_api.attached_trainer(module) is None
    trainer.fit(module)
    assert probe.rows == [
        None,
        (1, False),
        None,
        (3, True),
    ]  # what was not logged at a step is not in its row
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    sharded: Any = SimpleNamespace(strategy=ModelParallelStrategy(save_distributed_checkpoint=True))
    assert private_api.saves_distributed_checkpoints(sharded)


@pytest.mark.parametrize("part", ["loops", "optimizer_states"])
def test_an_error_while_a_checkpoint_is_restored_is_recognised(part: str, tmp_path):
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"limit_train_batches": 1, "limit_val_batches": 0, "accelerator": "cpu"}
    settings |= {"enable_checkpointing": False, "default_root_dir": tmp_path}
    trainer = L.Trainer(max_steps=1, **settings)
    trainer.fit(BoringModel())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    torch.save(saved | {part: {"x": {}} if part == "loops" else [{}]}, tmp_path / "a.ckpt")
    with pytest.raises(Exception) as caught:  # of any type
        L.Trainer(max_steps=2, **settings).fit(BoringModel(), ckpt_path=tmp_path / "a.ckpt")
    assert private_api.failed_while_restoring(caught.value)
    assert not private_api.failed_while_restoring(ValueError())


def test_lightnings_command_line():
    base = private_api.lightning_cli()
    for name in ("_run_subcommand", "_parse_ckpt_path"):
        assert any(name in vars(parent) for parent in base.__mro__[1:])
    assert "_subcommand_parsers" in base.__mro__[1].setup_parser.__code__.co_names + (
        base.__mro__[1]._add_subcommands.__code__.co_names
    )


def test_torch():
    scores = torch.randn(2, 5, requires_grad=True)
    weights = scores.softmax(-1)
    grad = torch.randn(2, 5)
    (expected,) = torch.autograd.grad(weights, scores, grad)
    assert torch.allclose(private_api.softmax_backward(grad, weights.detach()), expected, atol=1e-7)

    limit = torch._dynamo.config.recompile_limit
    private_api.allow_recompiles(limit + 1)
    assert torch._dynamo.config.recompile_limit == limit + 1
    torch._dynamo.config.recompile_limit = limit

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    private_api.set_last_lr(schedule, 0.25)
    assert schedule.get_last_lr() == [0.25]

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        torch.ones(1000)
    changes = private_api.memory_changes(profile)
    assert max(changes) >= 4000 and min(changes) <= -4000

    q, k, v = torch.randn(3, 1, 2, 8, 4)
    with FlopCounterMode(display=False, custom_mapping=private_api.cpu_attention_flop()) as counter:
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert counter.get_total_flops() == 2 * 2 * 2 * 8 * 8 * 4


def test_wandb(monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb.sdk.wandb_settings.Settings, "_args", wandb.Settings._args)
    monkeypatch.setattr(sys, "argv", ["fit", "--data.train=SECRET"])
    assert wandb.Settings()._args == ["--data.train=SECRET"]
    private_api.record_arguments_through(lambda argument: argument.replace("SECRET", "***"))
    assert wandb.Settings()._args == ["--data.train=***"]
    table = wandb.Table(columns=["a"], log_mode="INCREMENTAL")
    for name in ("_increment_num", "_previous_increments_paths"):
        assert hasattr(table, name)
    private_api.continue_table(table, 2, ["a", "b"])
    settings = wandb.Settings()
    for name, value in private_api.quick_requests(10).items():
        setattr(settings, name, value)


def test_wandb_workspaces():
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    first, second = (workspaces.Workspace(entity="e", project="p", name=name) for name in "ab")
    assert {"_internal_name", "_internal_id"} <= set(dir(first))
    private_api.name_workspace(first, "nw-x-v")
    private_api.replace_workspace(first, second)
    assert first._internal_name == "nw-x-v" and first._internal_id == second._internal_id


def test_options_are_parsed_without_defaults():
    parser = ArgumentParser()
    parser.add_argument("--given", type=int, default=1)
    parser.add_argument("--left", type=int, default=2)
    found = private_api.parse_without_defaults(parser, ["--given", "3"])
    assert found.given == 3 and "left" not in found


def test_options_that_need_a_value_are_recognised_by_their_type():
    parser = ArgumentParser()
    parser.add_argument("--number", type=int, default=1)
    parser.add_argument("--optional", type=int | None, default=1)
    parser.add_argument("--absent", type=int)
    parser.add_argument("--anything", type=Any, default=1)
    within = ArgumentParser()
    within.add_argument("--rate", type=float | int, default=0.5)
    parser.add_subcommands().add_subcommand("verb", within)
    found = list(private_api.options_that_need_a_value(parser))
    assert found == ["number", "verb.rate"]


def test_groups_of_options_are_known():
    parser, within = ArgumentParser(), ArgumentParser()
    within.add_class_arguments(OutputOptions, "output", skip={"lora"})
    within.add_argument("--number", type=int, default=1)
    parser.add_subcommands().add_subcommand("verb", within)
    assert list(private_api.option_groups(parser)) == ["verb.output"]
    within.parse_object({"output": 5})  # what it accepts


def test_lists_among_options_have_the_text_of_their_field():
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    ((name, (item, default, text)),) = private_api.list_options(OutputOptions).items()
    assert (name, item, default) == ("lora", str, [])
    assert text.startswith("LoRA adapters on the model")


def test_boolean_options_are_known_by_their_type():
    parser, within = ArgumentParser(), ArgumentParser()
    parser.add_argument("--flag", type=bool, default=False)
    parser.add_argument("--either", type=bool | str, default=False)
    parser.add_argument("--list", type=list[bool], default=[])
    within.add_argument("--optional", type=bool | None)
    parser.add_subcommands().add_subcommand("verb", within)
    assert sorted(private_api.boolean_options(parser)) == ["--flag", "--optional"]


def test_the_progress_bar_counts_steps_of_the_run():
    bar: Any = RichProgressBar()
    for name in ("_get_train_description", "total_train_batches", "on_train_batch_end"):
        assert hasattr(RichProgressBar, name)
    trainer: Any = SimpleNamespace(
        progress_bar_callback=bar,
        progress_bar_metrics={"loss": 1.0},
        loggers=[SimpleNamespace(version=3)],
        max_steps=20,
        global_step=7,
    )
    private_api.count_steps_in_bar(trainer)
    bar._trainer, shown = trainer, []
    bar._update = lambda bar_id, current: shown.append(current)
    bar.disable()
    bar.on_train_batch_end(trainer, None, {}, {}, 31)  # the fourth of 4 accumulated batches
    assert (shown, bar.total_train_batches) == ([7], 20)
    assert bar._get_train_description(0).strip() == "Training"
    assert bar.get_metrics(trainer, None) == {"loss": 1.0}


def test_wandb_is_given_no_unset_anonymous(tmp_path):
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    assert "anonymous" in logger._wandb_init
    private_api.omit_anonymous(logger)
    assert "anonymous" not in logger._wandb_init
