"""Components by folder or hub id: errors name invalid files, and no model code is run."""

import builtins
import json
import os
import resource

import pytest
from helpers_errors import refusal
from make_components import make_codec, make_t5

from magnet_train.codec.base import load_codec
from magnet_train.common.errors import UserError
from magnet_train.common.pretrained import absolute_path, load_pretrained, one_line
from magnet_train.conditioning import load_text_encoder


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_is_refused_without_asking(file, tmp_path, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question was asked"))
    folder = tmp_path / "t5"
    make_t5(folder, dim=32)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((folder / file).read_text())
    config["auto_map"] = {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.C", None]}
    (folder / file).write_text(json.dumps(config))
    assert "never run" in refusal(load_text_encoder, str(folder))
    (folder / file).write_text("[" * 100_000)
    assert f"{file} is damaged" in refusal(load_text_encoder, str(folder))
    assert not (tmp_path / "ran").exists()


def test_names_that_lead_nowhere_are_named(tmp_path):
    for name in ("", "./nowhere", "/nowhere", "a/b/c", "~/nowhere"):
        assert "no such folder" in refusal(load_text_encoder, name)
    (tmp_path / "empty").mkdir()
    assert "no config.json there" in refusal(load_text_encoder, str(tmp_path / "empty"))
    assert "HF_HUB_OFFLINE is set" in refusal(load_text_encoder, "nobody/nothing")


def test_a_truncated_file_of_weights_is_named(tmp_path):
    make_t5(tmp_path, dim=32)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors is damaged or truncated" in refusal(load_text_encoder, str(tmp_path))
    weights.unlink()
    os.mkfifo(weights)  # which would block its reader
    assert "model.safetensors is not a regular file" in refusal(load_text_encoder, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_filters", 10**6),
        ("hidden_size", 10**12),
        ("codebook_size", 10**9),
        ("target_bandwidths", [1e9]),
        ("num_lstm_layers", 10**8),
        ("num_residual_layers", 10**8),
        ("upsampling_ratios", [2] * 10**4),
        ("upsampling_ratios", [2] * 60),
        ("sampling_rate", -1),
        ("kernel_size", "seven"),
        ("num_filters", None),
    ],
)
def test_impossible_sizes_are_refused_before_anything_is_allocated(name, value, tmp_path):
    make_codec(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="codec") as caught:
        load_codec(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t5-base").mkdir()
    (tmp_path / "t5-base" / "config.json").write_text("{}")
    assert load_pretrained("model", "t5-base", lambda *given: given) == ("t5-base", True)
    assert absolute_path("t5-base") == str(tmp_path / "t5-base")
    assert absolute_path("t5-large") == "t5-large"
    assert one_line(ValueError("\n a \n b")) == "a" and one_line(ValueError()) == "ValueError"
