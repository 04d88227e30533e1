"""A run folder is used by one running process, and keeps the checkpoints of earlier runs."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace

from magnet_train.cli import run_folder
from magnet_train.cli.run_folder import (
    RunFolderLock,
    check_run_folder,
    lock_run,
    prepare_run_folder,
)
from magnet_train.common.errors import UserError


def process_with(folder: Path) -> int:
    """Id of a process that has the folder until it is killed."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            lock = RunFolderLock(folder)
            lock.acquire()
            os.write(told, b".")
            time.sleep(600)
        finally:
            os._exit(1)
    os.close(told)
    assert os.read(ready, 1) == b"."
    os.close(ready)
    return child


def test_a_second_process_learns_which_one_uses_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_WAIT_S", 0.1)
    first = process_with(tmp_path)
    try:
        for _ in range(2):  # being refused leaves the owner's note as it is
            with pytest.raises(UserError, match=rf"used by process {first} on .+; wait for it"):
                RunFolderLock(tmp_path).acquire()
        with pytest.raises(UserError, match="used by process"):
            check_run_folder(options(tmp_path))
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    monkeypatch.setattr(run_folder, "LOCK_WAIT_S", 10.0)
    lock = RunFolderLock(tmp_path)
    lock.acquire()  # nothing of a killed process is in the way
    lock.release()
    RunFolderLock(tmp_path).acquire()


def test_two_runs_do_not_write_into_one_folder_of_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_WAIT_S", 0.1)
    (tmp_path / "elsewhere").mkdir()
    first = process_with(tmp_path / "elsewhere")
    config = options(tmp_path / "run", dirpath=str(tmp_path / "elsewhere"), ckpt_path="auto")
    try:
        for check in (lock_run, check_run_folder):
            with pytest.raises(
                UserError, match=rf"process {first} .* another --checkpoint\.dirpath"
            ):
                check(config)
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    monkeypatch.setattr(run_folder, "LOCK_WAIT_S", 10.0)
    assert len(lock_run(config)) == 2
    assert len(lock_run(options(tmp_path / "b", dirpath=str(tmp_path / "b/checkpoints")))) == 1


def options(folder: Path, **given: object) -> Namespace:
    return Namespace(
        trainer=Namespace(default_root_dir=str(folder), fast_dev_run=False),
        checkpoint=Namespace(dirpath=given.get("dirpath")),
        model=Namespace(init_from=given.get("init_from")),
        ckpt_path=given.get("ckpt_path"),
    )


def test_a_new_run_moves_earlier_checkpoints_aside(tmp_path):
    for number in (1, 2):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "last.ckpt").write_text(str(number))
        prepare_run_folder(options(tmp_path), is_fit=True)
        assert (tmp_path / f"checkpoints-{number}" / "last.ckpt").read_text() == str(number)
        assert list((tmp_path / "checkpoints").iterdir()) == []
        (tmp_path / "checkpoints").rmdir()


def test_checkpoints_after_the_one_that_is_resumed_from_are_moved_aside(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name, step in {"step=4.ckpt": 4, "step=8.ckpt": 8, "last.ckpt": 8}.items():
        torch.save({"global_step": step}, folder / name)
    (folder / "damaged.ckpt").write_text("x")
    config = options(tmp_path, ckpt_path=str(folder / "step=4.ckpt"))
    prepare_run_folder(config, is_fit=False)
    assert (folder / "last.ckpt").exists()
    for _ in range(2):
        with pytest.warns(UserWarning, match="skipping checkpoint .*damaged"):
            prepare_run_folder(config, is_fit=True)
        assert sorted(os.listdir(tmp_path / "checkpoints-1")) == ["last.ckpt", "step=8.ckpt"]
        assert sorted(os.listdir(folder)) == ["damaged.ckpt", "step=4.ckpt"]
    assert not (tmp_path / "checkpoints-2").exists()


@pytest.mark.parametrize("setting", ["init_from", "dirpath"])
def test_checkpoints_that_a_new_run_would_overwrite_are_refused(setting, tmp_path):
    folder = tmp_path / ("checkpoints" if setting == "init_from" else "elsewhere")
    folder.mkdir()
    (folder / "last.ckpt").write_text("")
    with pytest.raises(UserError, match=rf"--\w+\.{setting} .*{folder.name}"):
        prepare_run_folder(options(tmp_path, **{setting: str(folder)}), is_fit=True)
    with pytest.raises(UserError, match=rf"--\w+\.{setting} .*{folder.name}"):
        check_run_folder(options(tmp_path, **{setting: str(folder)}))  # of which doctor asks
    assert (folder / "last.ckpt").exists()


def test_auto_is_nothing_where_there_is_no_checkpoint_yet(tmp_path):
    config = options(tmp_path / "new", ckpt_path="auto")
    prepare_run_folder(config, is_fit=True)
    assert config.ckpt_path is None and (tmp_path / "new").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"default_root_dir .*file"):
        prepare_run_folder(options(tmp_path / "file" / "run"), is_fit=True)
    with pytest.raises(UserError, match=r"--checkpoint.dirpath .*file.*cannot be written"):
        prepare_run_folder(options(tmp_path, dirpath=str(tmp_path / "file" / "x")), is_fit=True)


def test_a_url_is_no_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in (options(Path("s3://b/x")), options(tmp_path, dirpath="s3://b/x")):
        for check in (check_run_folder, lambda config: prepare_run_folder(config, is_fit=True)):
            with pytest.raises(UserError, match="a URL; give a folder on this machine"):
                check(given)
    assert not (tmp_path / "s3:").exists()
