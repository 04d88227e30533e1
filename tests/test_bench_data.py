"""The data benchmarks, on less data."""

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_data import make_data_codec
from helpers_programs import program

from magnet_train.checks import bench_data
from magnet_train.checks.measure import BenchOptions, row
from magnet_train.data.shards import ShardSet

OPTIONS = BenchOptions(repeats=1)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    for name, value in {
        "PER_SHARD": 8,
        "NUM_BATCHES": 16,
        "MANY": 60,
        "FEW": 6,
        "CROP_S": 2.0,
    }.items():
        monkeypatch.setattr(bench_data, name, value)


def test_loading():
    speed, first, memory = bench_data.loading(OPTIONS, 1.0)
    assert speed.settings["examples"] == 256 and speed.baseline_median_s is not None
    assert speed.settings["examples_per_s"] == pytest.approx(256 / speed.median_s)
    assert speed.ratio == pytest.approx(speed.baseline_median_s / speed.median_s)
    assert "60 shards" in first.name and first.median_s > 0 and first.baseline_median_s is None
    assert memory.peak_mb is not None and memory.baseline_peak_mb is not None
    assert 0 < memory.peak_mb < 2 * memory.baseline_peak_mb
    assert memory.ratio == memory.peak_mb / memory.baseline_peak_mb
    assert all(row(m) for m in (speed, first, memory))


def test_webdataset_yields_what_we_yield(tmp_path: Path):
    """Otherwise the comparison would be unfair."""
    folder = bench_data._write_shards(tmp_path / "shards", 4)
    ours, theirs = (
        list(islice(b, 4)) for b in (bench_data._ours(folder), bench_data._webdataset(folder))
    )
    captions = {caption for batch in ours for caption in batch["captions"]}
    for one, two in zip(ours, theirs, strict=True):
        for name in ("codes", "valid"):
            assert one[name].shape == two[name].shape and one[name].dtype == two[name].dtype
        assert two["codes"].dtype == torch.int64 and len(two["infos"]) == bench_data.BATCH_SIZE
        assert set(two["captions"]) <= captions and one["infos"][0].keys() == two["infos"][0].keys()


def test_linked_shards_are_a_set(tmp_path: Path):
    folder = bench_data._linked(
        bench_data._write_shards(tmp_path / "shards", 2), tmp_path / "linked", 5
    )
    found = ShardSet.open(folder)
    assert found.counts == [8] * 5 and [len(found.read(i)) for i in range(5)] == [8] * 5


def test_tokenizing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    codec = make_data_codec(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(bench_data, "_encodec", lambda folder: codec)
    both: list[Any] = list(bench_data.tokenizing(OPTIONS, 1.0))
    assert ["EnCodec" in m.name for m in both] == [True, False] and "demo" in both[1].name
    for m in both:
        assert m.ratio == pytest.approx(m.baseline_median_s / m.median_s)
        assert m.settings["times_real_time"] == pytest.approx(m.settings["crops"] * 2 / m.median_s)
    assert not "".join(capsys.readouterr())  # nothing among the lines of the table


def test_the_model_is_the_published_one_at_half_its_width(tmp_path: Path):
    codec = bench_data.load_codec(bench_data._encodec(tmp_path))
    facts = codec.facts
    assert (facts.sample_rate, facts.frame_rate, facts.num_codebooks, facts.codebook_size) == (
        32_000,
        50.0,
        4,
        2048,
    )
    assert 10e6 < sum(t.numel() for t in codec.state_dict().values()) < 20e6  # of 57e6


def test_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a program that only notes its arguments."""
    program(tmp_path / "python", f'echo "$@" >> {tmp_path / "called"}')
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    plain, fit = bench_data.start(OPTIONS, 1.0)
    assert (plain.name, fit.name) == ("start, --help", "start, fit --help")
    assert min(plain.median_s, fit.median_s) > 0
    assert {*(tmp_path / "called").read_text().splitlines()} == {
        "-m magnet_train --help",
        "-m magnet_train fit --help",
    }
