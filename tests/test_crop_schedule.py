"""A schedule of crop lengths: batches contain the same amount of audio, and resuming is exact."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers_data import make_data_codec, write_shards
from torch.utils.data import DataLoader

from magnet_train.common.errors import UserError
from magnet_train.data.datamodule import MagnetDataModule
from magnet_train.data.pipeline import CropPhase, TrainingStream, compress_for_worker
from magnet_train.data.shards import ShardSet

PHASES = (CropPhase(3, 10, 12), CropPhase(4, 20, 6))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    folder = tmp_path_factory.mktemp("shards")
    return ShardSet.open(
        write_shards(folder, make_data_codec(folder / "codec"), [7, 5, 6, 9, 4, 8])
    )


def draw(shards: ShardSet, workers: int, number: int, start: int = 0) -> list:
    stream = TrainingStream(shards, 30, 4, seed=5, start_batch=start, shorter=PHASES)
    return list(
        islice(
            DataLoader(
                stream, batch_size=None, num_workers=workers, collate_fn=compress_for_worker
            ),
            number,
        )
    )


def test_shorter_crops_come_first_in_larger_batches(shards):
    shapes = [tuple(batch["codes"].shape) for batch in draw(shards, 0, 9)]
    assert shapes == [(12, 4, 10)] * 3 + [(6, 4, 20)] * 4 + [(4, 4, 30)] * 2


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("start", [1, 3, 5, 8])
def test_a_resumed_stream_goes_on_exactly(shards, workers, start):
    undisturbed = draw(shards, workers, start + 5)[start:]
    for before, after in zip(undisturbed, draw(shards, workers, 5, start), strict=True):
        assert before["keys"] == after["keys"]
        assert torch.equal(before["codes"], after["codes"])


def test_no_item_is_lost_or_doubled_in_an_epoch(shards):
    keys = [key for batch in draw(shards, 0, 4) for key in batch["keys"]][:39]
    assert len(set(keys)) == 39


def test_the_schedule_is_given_in_optimizer_steps(shards, tmp_path: Path):
    data = MagnetDataModule(batch_size=4, crop_s=8.0, crop_schedule=[(2.0, 10), (4.0, 5)])
    frames = data.num_frames
    assert data.crop_phases(accumulated=2) == [
        CropPhase(20, round(frames / 4), 16),
        CropPhase(10, round(frames / 2), 8),
    ]


def test_no_crop_is_longer_than_the_models(shards):
    data = MagnetDataModule(batch_size=4, crop_s=2.0, crop_schedule=[(4.0, 5)])
    assert data.crop_phases(1) == [CropPhase(5, data.num_frames, 4)]


@pytest.mark.parametrize("schedule", [[(0.0, 10)], [(-1.0, 10)], [(2.0, 0)]])
def test_an_impossible_schedule_is_named(schedule):
    with pytest.raises(UserError, match="crop_schedule"):
        MagnetDataModule(crop_s=8.0, crop_schedule=schedule)
