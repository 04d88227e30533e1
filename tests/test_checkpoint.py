"""Which checkpoints a run keeps, and which it can resume from."""

import errno
import os
import random
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_ranks import fit_on_ranks
from helpers_resume import arguments, make_data

from magnet_train.callbacks.checkpoint import RunCheckpoint
from magnet_train.callbacks.checkpoint_io import AtomicCheckpointIO
from magnet_train.cli.inherited import settings_of_checkpoint
from magnet_train.common.errors import UserError
from magnet_train.resume import newest_intact_checkpoint, read_training_checkpoint, requeue_count


class Run:
    """A trainer that writes empty checkpoints."""

    fast_dev_run = False
    sanity_checking = False
    is_global_zero = True
    world_size = 1
    state = SimpleNamespace(fn="fit")

    def __init__(self) -> None:
        self.global_step = 0
        self.callback_metrics: dict[str, torch.Tensor] = {}
        self.strategy = SimpleNamespace(
            broadcast=lambda value: value,
            reduce_boolean_decision=lambda value, all=True: value,
            remove_checkpoint=lambda path: path.unlink(),
        )

    def save_checkpoint(self, path: Path, weights_only: bool) -> None:
        path.write_text(str(self.global_step))

    def validate(self, callback: RunCheckpoint, step: int, **metrics: float) -> None:
        self.global_step = step
        self.callback_metrics = {
            f"val/{name}": torch.tensor(value) for name, value in metrics.items()
        }
        callback.on_validation_end(self, None)  # type: ignore[arg-type]


def kept(folder: Path) -> dict[str, int]:
    return {
        path.stem.removeprefix("step="): int(path.read_text()) for path in sorted(folder.iterdir())
    }


@pytest.mark.parametrize(
    ("options", "best", "others"),
    [
        ({"monitor": "val/ce"}, "0000003", []),
        ({"monitor": "val/ce", "mode": "max"}, "0000001", []),
        ({"monitor": "val/ce", "save_top_k": 2}, "0000003", ["0000004"]),
        ({"monitor": "val/ce", "save_top_k": -1}, "0000003", ["0000001", "0000002", "0000004"]),
        ({"monitor": "val/ce", "save_top_k": 0}, None, []),
        ({}, "0000004", []),
        ({"save_top_k": 2}, "0000004", ["0000003"]),
    ],
)
def test_the_best_and_the_last_are_kept(
    options: dict[str, Any], best: str | None, others: list[str], tmp_path: Path
):
    callback = RunCheckpoint(str(tmp_path), **options)
    run = Run()
    for step, ce in enumerate((4.0, float("nan"), 2.0, 3.0), 1):
        run.validate(callback, step, ce=ce)
    names = {name: int(name) for name in [*others, *([best] if best else [])]}
    assert kept(tmp_path) == names | {"last": 4}
    assert callback.best_model_path == (str(tmp_path / f"step={best}.ckpt") if best else "")
    assert callback.last_model_path == str(tmp_path / "last.ckpt")

    (tmp_path / "moved").mkdir()
    if best:
        (tmp_path / f"step={best}.ckpt").rename(tmp_path / "moved" / f"step={best}.ckpt")
    resumed = RunCheckpoint(str(tmp_path / "moved"), **options)
    scores = callback.state_dict()["scores"] | {"../last.ckpt": -9.0}  # would be removed later
    resumed.load_state_dict({"scores": scores})
    assert resumed.best_model_path == (
        str(tmp_path / "moved" / f"step={best}.ckpt") if best else ""
    )


def test_a_metric_that_is_missing_costs_no_checkpoint(tmp_path: Path):
    callback = RunCheckpoint(str(tmp_path), monitor="val/fad/vggish")
    with pytest.warns(UserWarning, match="val/fad/vggish was not logged"):
        Run().validate(callback, 3, ce=1.0)
    assert kept(tmp_path) == {"last": 3}


def test_a_full_disk_is_one_line_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(
        self: AtomicCheckpointIO, checkpoint: Any, path: Path, storage_options: Any = None
    ) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", fail)
    data = make_data(tmp_path / "data")
    statuses, text = fit_on_ranks(
        2, arguments(data, tmp_path / "run", "--trainer.strategy=ddp"), tmp_path / "log"
    )
    assert statuses == [2, 2], text[-3000:]
    assert (
        text.count(".ckpt: the disk is full; free some space and resume with --ckpt_path auto") == 2
    )
    assert "Traceback" not in text


# --- which checkpoint a run resumes from ----------------------------------------------------------


def write(path: Path, step: Any, **changes: Any) -> Path:
    content = {
        "global_step": step,
        "state_dict": {"x": torch.arange(500.0)},
        "optimizer_states": [],
        "lr_schedulers": [],
        "loops": {},
        "callbacks": {},
        "hyper_parameters": {"network": {}},
    }
    path.parent.mkdir(exist_ok=True)
    torch.save(
        {name: value for name, value in (content | changes).items() if value is not None}, path
    )
    return path


def test_auto_takes_the_newest_that_is_intact_whatever_the_damage(tmp_path: Path):
    folders = [tmp_path, tmp_path / "a"]
    assert newest_intact_checkpoint(folders) is None
    best = write(tmp_path / "a" / "best.ckpt", 90)
    last = write(tmp_path / "a" / "last.ckpt", 100)
    os.utime(last, (0, 0))  # copied with another time: steps count
    write(tmp_path / "a" / "within" / "last.ckpt", 200)  # another run's
    assert newest_intact_checkpoint(folders) == last
    whole = last.read_bytes()
    assert read_training_checkpoint(last)["global_step"] == 100
    damaged = [b"", b"no zip", whole[:100], whole[: len(whole) // 2], whole[:-1]]
    draw = random.Random(0)
    for _ in range(300):
        at = draw.randrange(len(whole))
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for content in damaged:
            last.write_bytes(content)
            found = newest_intact_checkpoint(folders)
            # A flipped bit in unused bytes is accepted; loaded values equal the saved ones.
            assert found == best or torch.equal(
                torch.load(last, weights_only=True)["state_dict"]["x"], torch.arange(500.0)
            )
    assert any(
        "skipping checkpoint" in str(w.message) and "last.ckpt" in str(w.message) for w in caught
    )


def test_auto_executes_nothing(tmp_path: Path):
    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"global_step": 1, "x": Harm()}, tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="skipping checkpoint .*last.ckpt"):
        assert newest_intact_checkpoint([tmp_path]) is None
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"state_dict": None}, "state_dict is missing"),
        ({"optimizer_states": None}, "optimizer_states is missing"),
        ({"loops": 3}, "loops is missing"),
        ({"global_step": "x"}, "global_step='x'"),
        ({"global_step": -1}, "global_step=-1"),
        ({"hyper_parameters": {}}, "not a checkpoint of magnet_train"),
        ({"run": {}}, "not a checkpoint of magnet_train"),
    ],
)
def test_what_is_no_checkpoint_of_a_run_is_refused_in_a_line(
    changes: dict[str, Any], named: str, tmp_path: Path
):
    path = write(tmp_path / "a.ckpt", 3, **changes)
    with pytest.raises(UserError, match=named) as error:
        read_training_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.warns(UserWarning, match="skipping checkpoint"):
        assert newest_intact_checkpoint([tmp_path]) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("evil", 1),
        ("optimizer", [1]),
        ("optimizer", {"lr": "x"}),
        ("span_len", "x"),
        ("lora", {"rank": 1.5}),
        ("network", {"dim": None}),
    ],
)
def test_settings_of_a_checkpoint_have_their_types(name: str, value: Any, tmp_path: Path):
    good = {"network": {"dim": 16}, "crop_s": 1, "seed": 3, "lora": {"rank": 0, "base_hash": "0"}}
    path = write(tmp_path / "a.ckpt", 3, hyper_parameters=good)
    assert settings_of_checkpoint(path)["model"]["crop_s"] == 1
    write(path, 3, hyper_parameters=good | {name: value})
    with pytest.raises(UserError, match=f"a.ckpt: {name}"):
        settings_of_checkpoint(path)


def test_the_count_of_requeues_is_a_number(monkeypatch: pytest.MonkeyPatch):
    for text, count in (("2", 2), ("0", 0)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", text)
        assert requeue_count() == count
    monkeypatch.setenv("SLURM_RESTART_COUNT", "abc")
    with pytest.raises(UserError, match="SLURM_RESTART_COUNT=abc: must be a whole number"):
        requeue_count()
