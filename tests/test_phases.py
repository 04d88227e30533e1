"""The lines about phases of `fit`, and their expected times."""

from types import SimpleNamespace
from typing import Any

from magnet_train.callbacks import phases
from magnet_train.callbacks.phases import Phases


def test_a_line_for_each_phase(monkeypatch, capsys):
    clock = 0.0
    monkeypatch.setattr(phases.time, "monotonic", lambda: clock)
    trainer: Any = SimpleNamespace(
        global_step=0,
        estimated_stepping_batches=120,
        datamodule=SimpleNamespace(crop_schedule=[(5.0, 60)], crop_s=10.0),
        state=SimpleNamespace(fn="validate"),
        sanity_checking=False,
        is_global_zero=True,
    )
    callback, module = Phases(), Any
    callback.on_validation_start(trainer, module)
    clock += 30
    callback.on_validation_end(trainer, module)
    trainer.state.fn = "fit"
    callback.on_train_start(trainer, module)
    for step in range(1, 41):  # two seconds for a step with crops of 5 seconds
        clock += 100 if step == 1 else 2
        trainer.global_step = step
        callback.on_train_batch_end(trainer, module)
        if step == 5:  # interrupts the measurement
            callback.on_validation_start(trainer, module)
            clock += 50
            callback.on_validation_end(trainer, module)
    trainer.state.fn = "validate"
    callback.on_validation_start(trainer, module)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "validation  before training",
        "validation  step 5; about 30 s",
        # 44 steps of 2 s, 60 of 4 s
        "training    step 16 of 120, 2 s each; about 5 min without validations",
        "validation  step 40; about 50 s",
    ]
