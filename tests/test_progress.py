"""Each phase leaves one line, with its expected or its own time."""

import pytest

from magnet_train.common.progress import PhaseBar


@pytest.mark.parametrize(
    ("times", "settings", "line"),
    [
        ([0.5, 1, 2], {}, "encoding    3 crops; 2.0 s"),  # short: the time it took
        ([2, 4, 90], {}, "encoding    3 crops; about 2.0 s left"),
        ([8, 8, 16], {"batch_size": 2}, "encoding    3 crops; about 4.0 s left"),
        ([10, 20], {"initial": 1}, "encoding    3 crops; about 10 s left"),
        ([1], {"initial": 2}, "encoding    3 crops; 1.0 s"),
    ],
)
def test_one_line_for_a_phase(monkeypatch, capsys, times, settings, line):
    clock = [0.0]
    with PhaseBar("encoding", 3, "crop", **settings) as bar:
        monkeypatch.setattr(bar, "_time", lambda: bar.start_t + clock[0])
        for clock[0] in times:
            bar.update()
    assert capsys.readouterr().out == f"{line}\n"


def test_nothing_is_shown_if_quiet_or_interrupted(capsys):
    with PhaseBar("encoding", 1, "crop", quiet=True) as bar:
        bar.update()
    with PhaseBar("encoding", 2, "crop") as bar:
        bar.update()
    assert capsys.readouterr().out == ""
