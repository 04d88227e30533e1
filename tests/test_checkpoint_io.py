"""A checkpoint is complete or absent."""

import os
import resource
import signal
import stat
from pathlib import Path

import pytest
import torch

from magnet_train.callbacks.checkpoint_io import AtomicCheckpointIO


@pytest.fixture
def no_room():
    """Limits files of this process to 100 kB, like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [30_000, 300_000, 3_000_000])
def test_without_room_the_previous_checkpoint_stays(size, tmp_path: Path, no_room):
    path = tmp_path / "checkpoints" / "last.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"step": 1}, path)
    with pytest.raises(OSError) as error:
        writer.save_checkpoint({"step": 2, "weights": torch.ones(size)}, path)
    assert error.value.filename == str(path) and error.value.errno
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_name_and_content_survive_a_loss_of_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Content is synced to disk before the rename, and then the rename is."""
    events = []

    def synced(handle: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        events.append(
            ("sync", "folder" if is_folder else "file", (tmp_path / "last.ckpt").exists())
        )

    monkeypatch.setattr(os, "fsync", synced)
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    assert events == [("sync", "file", False), ("sync", "folder", True)]


def test_what_a_kill_left_half_written_goes(tmp_path: Path):
    (tmp_path / ".step=0000002.ckpt.0a1b2c3d.part").write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint({"step": 4}, tmp_path / "step=0000004.ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["step=0000004.ckpt"]
