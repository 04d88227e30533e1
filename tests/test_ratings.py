"""Results equal the simulated raters' opinions, and invalid files give one-line errors."""

import json
from functools import partial

import numpy as np
import pytest
from helpers_errors import refusal
from helpers_listening import (
    MISMATCH,
    OPINION,
    export,
    ratings,
    shifted,
    write_csv,
    write_ratings,
    write_systems,
)

from magnet_train.evaluation.ratings import analyse_ratings


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return export(write_systems(folder / "systems"), folder / "out" / "study.html")


@pytest.fixture(scope="module")
def key(study) -> dict:
    return json.loads(study.key.read_text())


def test_means_and_intervals_of_raters_who_differ(tmp_path, study, key):
    offsets = (-6, -2, 0, 2, 6)
    files = write_ratings(tmp_path, key, {f"rater {d}": shifted(d / 2) for d in offsets})
    table = analyse_ratings(files, study.key, num_draws=4000)
    assert "Mean of 5 raters" in table.protocol and not table.dropped and len(table.rows) == 10
    rows = {(r.system, r.question): r for r in table.rows}
    assert rows["ours", "quality"].mean == 60 and rows["theirs", "quality"].mean == 40
    assert rows["ours", "quality"].num_ratings == 15
    # Mean of 5 raters drawn from these: the standard error is 2.0 / sqrt(5), within a tenth here.
    low, high = rows["ours", "quality"].interval
    assert abs((high - low) / 2 - 1.96 * np.std([d / 2 for d in offsets]) / np.sqrt(5)) < 0.2
    assert rows["reference", "quality"].interval == (95, 95)


def test_more_clips_of_the_same_rater_do_not_narrow_the_interval(tmp_path, study, key):
    """Raters are resampled because the ratings of one rater are not independent."""
    files = write_ratings(tmp_path, key, {f"r{d}": shifted(d) for d in (-4, 4)})
    (row,) = [
        r
        for r in analyse_ratings(files, study.key).rows
        if (r.system, r.question) == ("ours", "quality")
    ]
    assert row.interval == (56, 64)


def test_the_same_seed_gives_the_same_table(tmp_path, study, key):
    files = [
        write_csv(tmp_path / f"{i}.csv", ratings(key, str(i), OPINION, 3, i)) for i in range(6)
    ]
    first, again, other = (analyse_ratings(files, study.key, seed=seed) for seed in (0, 0, 1))
    assert first == again and first.rows != other.rows
    assert [r.mean for r in first.rows] == [r.mean for r in other.rows]


def test_markdown_names_systems_intervals_and_excluded_raters(tmp_path, study, key):
    files = write_ratings(
        tmp_path, key, {"Ann": OPINION, "Bob": shifted(2), "Cid": OPINION | {"reference": (50, 95)}}
    )
    markdown = analyse_ratings(files, study.key).to_markdown()
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["system", "quality", "relevance", "ratings"]
    assert ["ours", "61.0 [60.0, 62.0]", "71.0 [70.0, 72.0]", "6 + 6"] in rows
    assert "dropped: Cid (rated 3 of 3 hidden references below 85)" in markdown
    assert "2 raters" in markdown and key["study"] in markdown
    assert rows[2][0] == MISMATCH and rows[2][1].startswith("96.0")


def test_raters_are_left_out_with_a_reason(tmp_path, study, key):
    good = ratings(key, "good", OPINION)
    lazy = [row | {"rater": "lazy", "seconds_listened": "0.20"} for row in good]
    short = [row | {"rater": "short"} for row in good[:8]]
    deaf = ratings(key, "deaf", OPINION | {"reference": (84, 95)})
    once = [row | {"rater": "once"} for row in good]
    once[0] = once[0] | {"seconds_listened": "0.5"}
    groups = (good, lazy, short, deaf, once)
    files = [write_csv(tmp_path / f"{rows[0]['rater']}.csv", rows) for rows in groups]
    table = analyse_ratings(files, study.key)
    assert dict(table.dropped) == {
        "lazy": "did not play 30 of 30 rated clips to their end",
        "short": "gave 8 of 30 ratings",
        "deaf": "rated 3 of 3 hidden references below 85",
    }
    assert "Mean of 2 raters" in table.protocol and table.num_unplayed == 1
    assert sum(row.num_ratings for row in table.rows) == 59
    assert "not played to its end: 1." in table.to_markdown()


def test_one_rater_has_no_interval(tmp_path, study, key):
    table = analyse_ratings(write_ratings(tmp_path, key, {"Ann": OPINION}), study.key)
    assert {row.interval for row in table.rows} == {None}
    assert "60.0 (one rater)" in table.to_markdown()


refused = partial(refusal, analyse_ratings)


def test_bad_csv_files_are_named_in_one_line(tmp_path, study, key):
    good = ratings(key, "Ann", OPINION)

    def refused_with(**change: str) -> str:
        return refused([write_csv(tmp_path / "bad.csv", [*good[:3], good[3] | change])], study.key)

    assert "bad.csv line 5: ffff (relevance) is not in this study" in refused_with(
        blinded_id="ffff"
    )
    assert "is not in this study" in refused_with(question="beauty")
    for rating in ("0", "101", "50.5", "", "high", "-3", "²", "1" * 5000):
        assert (
            f"bad.csv line 5: rating={rating!r} must be a whole number from 1 to 100"
            in refused_with(rating=rating)
        )
    assert "seconds_listened='nan'" in refused_with(seconds_listened="nan")
    ann = write_csv(tmp_path / "ann.csv", good)
    again = write_csv(tmp_path / "ann_2.csv", good)
    assert "ann_2.csv: rater 'Ann' is already in" in refused([ann, again], study.key)
    assert "Mean of 1 rater on" in analyse_ratings([ann, ann], study.key).protocol
    twice = write_csv(tmp_path / "twice.csv", [*good, good[0]])
    assert "rated" in refused([twice], study.key)
    assert "2 times" in refused([twice], study.key)
    (tmp_path / "other.csv").write_text("name,score\nAnn,5\n")
    assert "the column 'rater' is missing" in refused([tmp_path / "other.csv"], study.key)
    assert "has no ratings" in refused([write_csv(tmp_path / "empty.csv", [])], study.key)
    assert "gone.csv: no such file" in refused([tmp_path / "gone.csv"], study.key)
    assert "no ratings; give the CSV files" in refused([], study.key)


def test_a_missing_system_or_rater_is_named(tmp_path, study, key):
    good = ratings(key, "Ann", OPINION)
    without = [row for row in good if key["clips"][row["blinded_id"]]["system"] != "theirs"]
    files = [write_csv(tmp_path / "a.csv", without)]
    assert "system 'theirs' has no rating in any file (quality)" in refused(files, study.key)
    deaf = write_csv(tmp_path / "deaf.csv", ratings(key, "Deaf", OPINION | {"reference": (10, 10)}))
    assert "no rater is left: Deaf rated 3 of 3" in refused([deaf], study.key)


def test_a_wrong_key_is_named(tmp_path, study, key):
    ann = write_csv(tmp_path / "ann.csv", ratings(key, "Ann", OPINION))
    (tmp_path / "k.json").write_text("{}")
    assert "k.json: not the key of a listening test" in refused([ann], tmp_path / "k.json")
    assert "ann.csv: not JSON" in refused([ann], ann)
    assert "gone.json: no such file" in refused([ann], tmp_path / "gone.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    assert "nested too deeply" in refused([ann], tmp_path / "deep.json")
