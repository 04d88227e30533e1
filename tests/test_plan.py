"""Errors of `fit` before it starts, and its plan, from options alone."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from jsonargparse import Namespace

from magnet_train.checks.plan import (
    SETTINGS_CHECKS,
    Devices,
    Plan,
    check_monitor,
    check_network_size,
    check_seed,
    check_settings,
    parse_devices,
    settings_errors,
)
from magnet_train.common.errors import UserError
from magnet_train.data.datamodule import MagnetDataModule
from magnet_train.model import MagnetConfig

TRAINER = {
    "accelerator": "cpu",
    "devices": "auto",
    "num_nodes": 1,
    "strategy": "auto",
    "precision": None,
    "fast_dev_run": False,
    "max_steps": 100,
    "max_epochs": None,
    "overfit_batches": 0.0,
    "limit_train_batches": None,
    "limit_val_batches": None,
    "val_check_interval": 10,
    "check_val_every_n_epoch": None,
    "accumulate_grad_batches": 1,
    "log_every_n_steps": None,
    "num_sanity_val_steps": None,
    "gradient_clip_val": None,
    "default_root_dir": None,
    "callbacks": None,
    "logger": True,
}


MODEL_PARALLEL = Namespace(
    class_path="lightning.pytorch.strategies.ModelParallelStrategy",
    init_args=Namespace(save_distributed_checkpoint=True),
)


def config(**changes: Any) -> Namespace:
    """Options of `fit` by dotted name, with two underscores for a dot."""
    made = Namespace(
        seed_everything=1,
        trainer=Namespace(**TRAINER),
        checkpoint=Namespace(monitor=None, dirpath=None),
        generation=Namespace(num_prompts=2, metrics=["fad/codec"], at_start=True),
        data=Namespace(crop_schedule=None),
        model=Namespace(
            codec="demo",
            crop_s=10.0,
            span_len=3,
            more_span_lens=(),
            lora=Namespace(rank=0),
            init_from=None,
            distil_guidance=False,
            network=Namespace(**MagnetConfig().to_dict()),
            optimizer=Namespace(name="adamw", schedule="constant"),
        ),
    )
    for name, value in changes.items():
        made[name.replace("__", ".")] = value
    return made


def test_settings_that_work_are_accepted():
    check_settings(config())
    check_settings(
        config(trainer__precision="bf16-mixed", trainer__limit_val_batches=0, trainer__max_steps=-1)
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed_everything": -1}, "seed_everything=-1"),
        ({"seed_everything": 10**20}, "seed_everything=1000"),
        ({"trainer__precision": "bf16-true"}, "precision=bf16-true: weights stay in float32"),
        ({"trainer__precision": "64-true"}, "precision=64-true"),
        ({"trainer__overfit_batches": 1}, "overfit_batches=1"),
        ({"trainer__max_steps": -5}, "max_steps=-5"),
        ({"trainer__accumulate_grad_batches": 0}, "accumulate_grad_batches=0"),
        ({"trainer__limit_val_batches": -1}, "limit_val_batches=-1"),
        ({"trainer__gradient_clip_val": math.nan}, "gradient_clip_val=nan"),
        ({"trainer__val_check_interval": "00:00:30:00"}, "val_check_interval=00:00:30:00"),
        ({"trainer__val_check_interval": 0}, "val_check_interval=0"),
        (
            {"trainer__limit_train_batches": 5, "trainer__accumulate_grad_batches": 2},
            "limit_train_batches=5",
        ),
        ({"trainer__devices": 0}, "devices=0"),
        ({"trainer__devices": 10**20}, "devices=1000"),
        ({"trainer__num_nodes": 10**20}, "num_nodes=1000"),
        ({"trainer__devices": "two"}, "devices=two"),
        ({"trainer__accelerator": "gpu", "trainer__devices": 99}, "99 GPUs per node requested"),
        ({"checkpoint__monitor": "val/nothing"}, "monitor=val/nothing"),
        ({"model__network__dim": 65536, "model__network__num_layers": 1000}, "its weights take"),
        (
            {"model__optimizer__schedule": "cosine", "trainer__max_steps": -1},
            "schedule=cosine: the run has no end",
        ),
        (
            {"model__optimizer__schedule": "constant", "trainer__max_steps": -1}
            | {"trainer__max_epochs": 3},
            r"trainer\.max_epochs=3: training data has no end; set --trainer\.max_steps",
        ),
        ({"trainer__strategy": MODEL_PARALLEL}, "save_distributed_checkpoint=true writes folders"),
        ({"trainer__strategy": "fsdp2", "trainer__precision": "16-mixed"}, "precision=16-mixed"),
        ({"model__span_len": 10**9}, "span_len=1000000000: longer than an example"),
        ({"model__lora": Namespace(rank=4)}, "--lora.rank 4: needs --model.init_from"),
        ({"data__crop_schedule": [(5.0, 9), (1e-3, 9)]}, "crop_s=0.001 s are 0 frames.*schedule"),
    ],
)
def test_each_setting_that_cannot_work_is_named(changes: dict[str, Any], named: str):
    with pytest.raises(UserError, match=named) as error:
        check_settings(config(**changes))
    assert "\n" not in str(error.value)
    assert [str(e) for e in settings_errors(config(**changes))] == [str(error.value)]


def test_all_that_is_wrong_is_found():
    wrong = config(
        seed_everything=-1, trainer__precision="16-true", checkpoint__monitor="val/nothing"
    )
    assert len(settings_errors(wrong)) == 3 < len(SETTINGS_CHECKS)
    check_seed(config(seed_everything=True))  # Lightning draws one
    check_network_size(config())


def test_a_monitor_must_be_logged():
    good = (None, "val/ce", "val/ce/stage3", "val/fad/codec", "train/loss", "val/num_clips")
    for monitor in good:
        check_monitor(config(checkpoint__monitor=monitor))
    misspelt = ("train/los", "val/cex", "val/ce/stage4", "val/fad/codec_ci", "val/accuracy/")
    for monitor, prompts in (
        *((name, 2) for name in misspelt),
        ("val/kl/codec", 2),
        ("val/fad/codec", 0),
        ("val/num_clips", 0),
    ):
        with pytest.raises(
            UserError, match=f"checkpoint.monitor={monitor}: nothing of that name is logged"
        ) as error:
            check_monitor(config(checkpoint__monitor=monitor, generation__num_prompts=prompts))
        assert ("or set --generation.num_prompts above 0" in str(error.value)) == (not prompts)
    stops = Namespace(class_path="a.EarlyStopping", init_args=Namespace(monitor="val/ce"))
    no_monitor = Namespace(class_path="a.TQDMProgressBar", init_args=Namespace())
    check_monitor(config(trainer__callbacks=[stops, no_monitor]))
    stops.init_args.monitor = "val/nothing"
    with pytest.raises(UserError, match=r"EarlyStopping\.monitor=val/nothing: nothing"):
        check_monitor(config(trainer__callbacks=stops))
    of_rates = Namespace(class_path="a.LearningRateMonitor", init_args=Namespace())
    check_monitor(config(trainer__callbacks=of_rates))
    with pytest.raises(UserError, match="LearningRateMonitor needs a logger"):
        check_monitor(config(trainer__callbacks=of_rates, trainer__logger=False))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Devices("cpu", 1, 1)),
        ({"devices": 3, "num_nodes": 2}, Devices("cpu", 3, 2)),
        ({"accelerator": "gpu", "devices": "8"}, Devices("gpu", 8, 1)),
        ({"accelerator": "cuda", "devices": "0,3"}, Devices("gpu", 2, 1)),
        ({"devices": [1, 2, 5]}, Devices("cpu", 3, 1)),
    ],
)
def test_devices_are_counted_as_lightning_counts_them(given: dict[str, Any], expected: Devices):
    assert parse_devices(SimpleNamespace(**(TRAINER | given))) == expected
    assert expected.ranks == expected.per_node * expected.nodes


def plan(global_batch_size: int | None = None, **changes: Any) -> Plan:
    data = MagnetDataModule(batch_size=4, global_batch_size=global_batch_size)
    return Plan(config(**changes), data, None)  # type: ignore[arg-type]


def test_steps_and_validations_are_counted():
    assert plan(trainer__max_steps=-1).num_steps == math.inf
    assert plan(trainer__max_steps=-1, trainer__fast_dev_run=True).num_steps == 1
    epochs = {
        "trainer__limit_train_batches": 10,
        "trainer__max_epochs": 6,
        "trainer__accumulate_grad_batches": 2,
    }
    assert plan(trainer__max_steps=-1, **epochs).num_steps == 30
    assert plan(**epochs).num_steps == 30
    assert plan().num_validations == 11  # before training, and after each ten steps
    assert plan(trainer__max_steps=101).num_validations == 12  # and at the end
    assert plan(trainer__limit_val_batches=0).num_validations == 0


def test_the_global_batch_is_divided():
    assert plan().batch == (4, 1)
    assert plan(24, trainer__devices=2).batch == (4, 3)
    with pytest.raises(UserError, match="give only one of them; the other follows"):
        plan(24, trainer__accumulate_grad_batches=2).batch  # noqa: B018


def test_sharded_strategies_are_known_by_name_and_class():
    model_parallel = Namespace(class_path="lightning.pytorch.strategies.ModelParallelStrategy")
    assert plan(trainer__strategy="fsdp2").is_sharded
    assert plan(trainer__strategy=model_parallel).is_sharded
    assert not plan(trainer__strategy="ddp").is_sharded
