"""The text at the end of `fit`."""

import pytest

from magnet_train.cli.summary import closing_block, metric_lines, what_to_listen_for


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


def test_the_metrics_have_ceiling_and_baseline_beside_them_and_codebooks_count_from_1():
    after = {
        "val/accuracy/stage1": 0.25,
        "val/accuracy/stage1/baseline_copying": 0.125,
        "val/ce/stage0/rate0.5": 9.0,
        "val/fad/musicnn": 40.0,
        "val/fad/musicnn/baseline_bigram": 70.0,
        "val/fad/musicnn/baseline_codec": 20.0,
        "val/fad/musicnn/baseline_unigram": 80.0,
        "val/fad/musicnn_ci95": 3.0,
    }
    metrics = {name: {"before": 60.0, "after": value} for name, value in after.items()}
    metrics["val/accuracy/stage1"]["before"] = None
    head, accuracy, fad, note = metric_lines(metrics)
    assert head.split() == ["metric", "before", "after", "ceiling", "baseline"]
    assert accuracy.split() == ["accuracy,", "codebook", "2", "↑", "0.25", "0.125"]
    assert fad.split() == ["FAD", "(musicnn)", "↓", "60", "40", "20", "80"]
    assert len(accuracy) == len(fad) == len(head) and note.startswith("ceiling = real clips")
