"""The text at the end of `fit`."""

import pytest

from magnet_train.cli.summary import closing_block, what_to_listen_for


@pytest.mark.parametrize(
    ("value", "verdict"), [(6.5, "not yet"), (5.0, "partly"), (1.9, "heard"), (1.0, "heard")]
)
def test_a_music_measure_is_put_into_words_between_random_codes_and_real_clips(value, verdict):
    name = "val/music/key_rank"
    after = {name: value, f"{name}/baseline_codec": 1.2, f"{name}/baseline_unigram": 6.5}
    metrics = {key: {"before": None, "after": number} for key, number in after.items()}
    *_, line = what_to_listen_for(metrics)
    assert line.startswith("the caption's key") and f" {verdict} " in line
    assert f"{value:.2f} (real clips 1.20, random codes 6.50)" in line
    assert what_to_listen_for(metrics | {"val/ce": {"before": 1.0, "after": 1.0}})[-1] == line


def test_without_music_measures_or_baselines_nothing_is_printed():
    assert what_to_listen_for({"val/music/beat": {"before": None, "after": 0.3}}) == []


def test_the_last_lines_are_what_to_open_and_to_run(tmp_path):
    assert "report" not in closing_block(tmp_path, {})
    (tmp_path / "report.html").touch()
    lines = closing_block(tmp_path, {"W&B": "https://wandb/run"}).splitlines()
    assert [line.split()[0] for line in lines] == ["report", "W&B", "next"]
    assert f"open {tmp_path / 'report.html'}" in lines[0] and str(tmp_path) in lines[2]
    assert lines[1] == "W&B         https://wandb/run"
