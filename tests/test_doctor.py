"""`doctor` says what is missing, with all that is needed to get it, and ends with status 2 if anything is."""

import pytest

from magnet_train.__main__ import main
from magnet_train.doctor import DoctorOptions, doctor
from magnet_train.errors import UserError


def test_the_embedded_default_needs_nothing(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.startswith("ok ") for line in lines)
    assert lines[2].startswith("ok       metrics of musicnn: ships (")


def test_what_is_missing_is_named_with_its_source(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MAGNET_TRAIN_CACHE", str(tmp_path))
    config = tmp_path / "c.yaml"
    config.write_text("model: {codec: facebook/encodec_32khz}\ngeneration: {metrics: [fad/vggish, kl/passt]}\n")
    assert main(["doctor", "--configs", str(config)]) == 2
    printed = capsys.readouterr()
    missing = [line for line in printed.out.splitlines() if line.startswith("missing")]
    assert "codec facebook/encodec_32khz" in missing[0] and "metrics of passt" in missing[2]
    assert "vggish-10086976.pth (289 MB, licence Apache-2.0)" in missing[1]
    assert printed.err.startswith("error: 3 of 4 are missing: codec facebook/encodec_32khz, metrics of vggish")
    # With prefetch too it is one line each, where there is no network.
    found = doctor(DoctorOptions(metrics=["fad/vggish"], prefetch=True))
    assert [f.is_here for f in found] == [True, True, True, False] and "HF_HUB_OFFLINE is set" in found[3].detail


def test_an_unreadable_configuration_is_named(tmp_path):
    (tmp_path / "c.yaml").write_text("model: [")
    with pytest.raises(UserError, match=r"c\.yaml: unreadable configuration"):
        doctor(DoctorOptions([tmp_path / "c.yaml"]))
