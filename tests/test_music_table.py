"""The table of music metrics, on codes of a tiny codec."""

import sys
from pathlib import Path

import torch
from helpers_data import codes_of, make_data_codec, write_shards

from magnet_train.codec.base import load_codec
from magnet_train.metrics.baselines import CountTables

sys.path.insert(0, str(Path(__file__).parents[1] / "data/demo"))  # the script is in no package
from music_table import baseline_clips, measure_systems, music_table, read_codes


def test_a_table_has_a_row_for_each_system_and_compares_the_reference_with_itself(tmp_path):
    codec = make_data_codec(tmp_path / "codec")
    write_shards(tmp_path / "shards", codec, (3, 2), num_frames=100)
    codes, captions = read_codes(str(tmp_path / "shards"), num_clips=4, num_frames=60)
    assert list(codes) == ["item0000", "item0001", "item0002", "item0003"]
    assert torch.equal(codes["item0002"], torch.from_numpy(codes_of(2, 60).astype("int64")))
    assert captions["item0002"] == "caption 2"
    assert read_codes(str(tmp_path / "shards"), num_frames=101) == ({}, {})

    tables = CountTables.count(codes.values(), 64)
    clips = baseline_clips(codes, load_codec(codec), tables)
    figures = measure_systems(clips, {key: "in C major" for key in codes}, "codec")
    assert list(figures) == ["codec", "unigram", "bigram"]
    assert figures["codec"]["key_rank"].num_clips == 4
    assert figures["codec"]["chroma_change"].num_clips == 4
    lines = music_table(figures).splitlines()
    assert len(lines) == 5
    value = figures["bigram"]["scale_fit"].value
    assert f"{value:.3f}" in lines[-1]
