"""Records contain their protocol; values with different protocols are not compared by default."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_errors import refusal

import magnet_train
from magnet_train.common.errors import UserError
from magnet_train.metrics.published import PUBLISHED
from magnet_train.metrics.record import Record, compare, markdown_table, read_records, write_records

FAD = Record(
    system="ours",
    metric="fad/vggish",
    value=4.5,
    embedder="vggish",
    embedder_hash="0123",
    resampler="julius 32000 to 16000 Hz",
    windowing="1 s every 0.5 s",
    num_clips=5469,
    num_windows=103_911,
    level="generated -14 LUFS",
    reference_hash="abcd",
    decoding={"decoding_steps": (20, 10, 10, 10)},
    seed=0,
    interval=(4.4, 4.6),
    baseline_real=0.2,
    baseline_codec=1.2,
    published_protocol="audiocraft/MusicCaps",
)
KL = replace(
    FAD,
    metric="kl/passt",
    value=1.25,
    embedder="passt-20s",
    convention="audiocraft",
    interval=(1.2, 1.3),
    baseline_real=None,
    baseline_codec=0.5,
)


def test_records_survive_json(tmp_path: Path):
    records = [FAD, replace(KL, interval=None, decoding=None, seed=None)]
    write_records(tmp_path / "new" / "records.json", records)
    assert read_records(tmp_path / "new" / "records.json") == records
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["records.json"]
    row = json.loads((tmp_path / "new" / "records.json").read_text())[0]
    assert (row["version"], row["interval"]) == (magnet_train.__version__, [4.4, 4.6])
    assert len(row["date"]) == 10


PROTOCOL = (
    "metric",
    "convention",
    "embedder",
    "embedder_hash",
    "resampler",
    "windowing",
    "level",
    "reference_hash",
)


@pytest.mark.parametrize("name", [*PROTOCOL, "num_clips"])
def test_each_part_of_the_protocol_must_agree(name: str):
    changed = replace(FAD, system="theirs", **{name: 7 if name == "num_clips" else "fad/other"})
    with pytest.raises(UserError) as error:
        compare([FAD, FAD, changed])
    line = str(error.value)
    assert "\n" not in line
    for part in ("ours and theirs", name, repr(getattr(FAD, name)), repr(getattr(changed, name))):
        assert part in line
    assert len(compare([FAD, changed], force=True)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"value": 1.0},
        {"seed": 1},
        {"decoding": None},
        {"date": "2020-01-01"},
        {"version": "9"},
        {"num_windows": 5},
    ],
)
def test_what_a_system_brings_may_differ(change: dict):
    assert compare([FAD, replace(FAD, **change)]) == []


def test_only_fad_asks_for_equal_numbers_of_clips():
    assert compare([KL, replace(KL, num_clips=10)]) == []
    assert compare([KL]) == compare([]) == []


@pytest.mark.parametrize(
    "change",
    [
        {"value": math.nan},
        {"value": math.inf},
        {"interval": (math.nan, 5.0)},
        {"baseline_real": math.nan},
        {"num_clips": 0},
        {"num_windows": 0},
    ],
)
def test_what_is_no_figure_makes_no_record(change: dict):
    with pytest.raises(UserError, match=r"^fad/vggish of ours: "):
        replace(FAD, **change)


def test_broken_files_of_records_are_named(tmp_path: Path):
    path = tmp_path / "records.json"
    for content in (None, "[", "[" * 10**5, "{}x", '{"a": 1}', "[1]", '[{"system": "a"}]', "3"):
        if content is not None:
            path.write_text(content)
        assert "records.json: missing or not a list of records" in refusal(read_records, path)
    write_records(path, [FAD])
    row = json.loads(path.read_text())[0]
    path.write_text(json.dumps([row | {"colour": 1}]))
    assert "records.json: unknown field colour" in refusal(read_records, path)
    path.write_text(json.dumps([row | {"value": "4.5"}]))
    assert "not a list of records" in refusal(read_records, path)


def cells(table: str) -> list[list[str]]:
    return [
        [c.strip() for c in line.strip("|").split(" | ")]
        for line in table.splitlines()
        if line.startswith("| ")
    ]


def test_table_of_systems_and_metrics():
    table = markdown_table(
        [FAD, KL, replace(FAD, system="a|b", value=5.25, interval=None, num_clips=5469)]
    )
    assert cells(table) == [
        ["system", "clips", "fad/vggish", "kl/passt"],
        ["ours", "5,469", "4.500 [4.400, 4.600]", "1.250 [1.200, 1.300]"],
        [r"a\|b", "5,469", "5.250", ""],
        ["real clips", "", "0.200", ""],
        ["codec reconstruction (ceiling)", "", "1.200", "0.500"],
    ]
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned, and nothing to warn of
    assert set(lines[1]) == set("|-:")


def test_a_small_set_is_warned_of():
    assert "Warning: ours: 249 clips" in markdown_table([replace(FAD, num_clips=249)])
    assert "Warning: ours: 12 clips" in markdown_table([replace(KL, num_clips=12), FAD])
    assert "Warning" not in markdown_table([replace(FAD, num_clips=250)])


def test_a_table_of_different_protocols():
    records = [FAD, replace(FAD, system="theirs", windowing="0.96 s", baseline_codec=1.3)]
    assert "ours and theirs: fad/vggish differs in windowing" in refusal(markdown_table, records)
    table = markdown_table(records, force=True)
    assert "Not comparable: ours and theirs: fad/vggish differs in windowing, '1 s" in table
    assert "' and '0.96 s'." in table
    assert "1.200 to 1.300" in table
    assert "ours has two records of fad/vggish" in refusal(markdown_table, [FAD, FAD])


def test_published_metrics_are_shown_only_for_the_same_protocol_and_set():
    table = markdown_table([FAD, KL], published=PUBLISHED)
    assert ["magnet-small-10secs (published)", "", "4.22", "1.11"] in cells(table)
    assert ["magnet-medium-30secs (published)", "", "4.63", "1.20"] in cells(table)
    assert sum("(published)" in line for line in table.splitlines()) == 8
    assert "audio-magnet" not in table
    assert "Published: audiocraft, model_cards/MAGNET_MODEL_CARD.md." in table
    own = replace(KL, published_protocol=None)
    assert ["magnet-small-10secs (published)", "", "4.22", ""] in cells(
        markdown_table([FAD, own], published=PUBLISHED)
    )
    assert "published" not in markdown_table([own], published=PUBLISHED)
    mixed = [FAD, replace(FAD, system="theirs", published_protocol=None)]
    assert "published" not in markdown_table(mixed, published=PUBLISHED)
