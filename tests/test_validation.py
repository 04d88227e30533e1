"""When a run validates, and which checkpoints it saves."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_resume import arguments, outcome

from magnet_train.__main__ import main
from magnet_train.callbacks.validation import check_epoch, check_validation
from magnet_train.common.errors import UserError
from magnet_train.data.datamodule import MagnetDataModule


def steps(run: Path) -> dict[str, int]:
    """Optimizer steps of each checkpoint."""
    files = (run / "checkpoints").glob("*.ckpt")
    return {file.name: torch.load(file, weights_only=True)["global_step"] for file in files}


def validated_steps(run: Path) -> list[int]:
    return [int(line.split()[0]) for line in (run / "ledger.validations").read_text().splitlines()]


WORSE_EACH_TIME = (
    "--checkpoint.monitor=val/ce",
    "--checkpoint.mode=max",
    "--model.optimizer.schedule=constant",
)
"""val/ce falls, so that under mode=max only the first validation is a new best."""


def test_a_run_validates_at_its_interval_and_at_its_end_and_saves_what_it_scored(
    data: Path, tmp_path: Path
):
    run = tmp_path / "run"
    options = (*WORSE_EACH_TIME, "--checkpoint.every_n_train_steps=null", "--trainer.max_steps=5")
    options = (*options, "--trainer.val_check_interval=2", "--trainer.accumulate_grad_batches=2")
    assert main(arguments(data, run, *options)) == 0
    assert validated_steps(run) == [2, 4, 5]
    assert steps(run) == {"step=0000002.ckpt": 2, "last.ckpt": 5}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["checkpoint"] == str(run / "checkpoints" / "last.ckpt")
    last = (run / "ledger.validations").read_text().splitlines()[-1].split()
    assert summary["metrics"]["val/ce"]["after"] == float.fromhex(last[1])

    moved = shutil.move(run, tmp_path / "moved")
    assert main(arguments(data, Path(moved), *options, "--trainer.max_steps=7")) == 0
    assert validated_steps(Path(moved)) == [2, 4, 5, 6, 7]
    assert steps(Path(moved)) == {"step=0000002.ckpt": 2, "last.ckpt": 7}  # still the best


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--trainer.limit_val_batches=0", "--checkpoint.every_n_train_steps=null"],
            {"last.ckpt": 3},
        ),
        (
            ["--trainer.max_steps=-1", "--trainer.limit_train_batches=2", "--trainer.max_epochs=2"],
            {"last.ckpt": 4, "step=0000004.ckpt": 4},
        ),
    ],
)
def test_the_end_is_saved_without_a_validation_and_where_epochs_end(
    options: list[str], expected: dict[str, int], data: Path, tmp_path: Path
):
    run = tmp_path / "run"
    assert main(arguments(data, run, "--trainer.max_steps=3", *options)) == 0
    assert steps(run) == expected
    assert (run / "ledger.validations").exists() == ("--trainer.limit_val_batches=0" not in options)


def test_averaged_weights_are_those_of_the_step_that_is_saved(data: Path, tmp_path: Path):
    """For any callback: in a validation, where the module has them, and at the end of a batch."""
    runs = []
    for name, every in (("a", "1"), ("b", "null")):
        every = f"--checkpoint.every_n_train_steps={every}"
        assert main(arguments(data, tmp_path / name, every, "--trainer.max_steps=4")) == 0
        runs.append(outcome(tmp_path / name))
    for name in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, runs[1][name][key]) for key, value in runs[0][name].items())
    assert runs[0]["averaging_state"]["latest_update_step"] == 4
    assert any(
        not torch.equal(v, runs[0]["state_dict"][k])
        for k, v in runs[0]["current_model_state"].items()
    )


def test_a_run_that_validates_less_than_possible_says_so(data: Path, tmp_path: Path):
    args = arguments(data, tmp_path / "run", "--trainer.max_steps=2", "--ckpt_path=null")
    without_shards = [a for a in args if not a.startswith("--data.validation")]
    with pytest.warns(UserWarning, match=r"does not validate: trainer\.limit_val_batches=0"):
        assert main([*without_shards, "--trainer.limit_val_batches=0"]) == 0
    with pytest.warns(UserWarning, match="each validation uses 1 of 2 items"):
        assert main([*args, "--trainer.limit_val_batches=1", "--data.batch_size=1"]) == 0
    with pytest.raises(UserError, match=r"--data\.validation"):
        MagnetDataModule(train=str(data / "train"), codec=str(data / "codec")).setup("fit")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ((0, None, None), "val_check_interval=0: training data has no end"),
        ((0.5, None, None), r"val_check_interval=0\.5: "),
        ((True, None, None), "val_check_interval=True: "),
        (("00:00:30:00", None, None), "val_check_interval=00:00:30:00: "),
        ((10, 1, None), "check_val_every_n_epoch=1: training data has no epochs"),
        ((10, None, 0.5), r"limit_val_batches=0\.5: give a whole number of batches"),
    ],
)
def test_any_other_schedule_is_refused(settings: tuple[Any, Any, Any], named: str):
    with pytest.raises(UserError, match=named):
        check_validation(*settings)
    check_validation(1, None, 0)
    check_validation(1, None, 1.0)


def test_an_epoch_ends_with_a_step():
    check_epoch(6, 3)
    check_epoch(1.0, 3)
    with pytest.raises(
        UserError, match="limit_train_batches=5: must be a multiple of the 2 batches"
    ):
        check_epoch(5, 2)
    for share in (0, -1, 0.5):
        with pytest.raises(UserError, match=f"limit_train_batches={share}: training data has no"):
            check_epoch(share, 1)
