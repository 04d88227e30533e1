"""Folders of clips by id, their captions, prompts, and names of systems."""

import json

import numpy as np
import pytest
import soundfile
from helpers_errors import refusal

from magnet_train.common.errors import UserError
from magnet_train.evaluation.clips import list_clips, load_captions, load_prompts, parse_systems


def test_clips_have_ids_and_equal_ones_are_named(tmp_path):
    wav = np.zeros(100)
    for name in ("a/x.wav", "b/x.wav", "y.flac"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, wav, 16_000)
    assert list(list_clips(tmp_path)) == ["a/x", "b/x", "y"]
    soundfile.write(tmp_path / "y.wav", wav, 16_000)
    with pytest.raises(UserError, match=r"y\.flac and .*y\.wav: two clips named y"):
        list_clips(tmp_path)
    assert "no such folder" in refusal(list_clips, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty: no audio files" in refusal(list_clips, tmp_path / "empty")
    assert "a second system named x; write NAME=" in refusal(parse_systems, ["one/x", "two/x"])


def test_captions_of_a_manifest_must_be_those_of_the_clips(tmp_path):
    soundfile.write(tmp_path / "one.wav", np.zeros(100), 16_000)
    soundfile.write(tmp_path / "two.wav", np.zeros(100), 16_000)
    manifest = tmp_path / "captions.jsonl"
    for rows, message in (
        (
            '{"path": "one.wav", "caption": "a"}\n{"path": "three.wav", "caption": "b"}',
            "2 captions for 2 clips; two has none",
        ),
        (
            '{"path": "one.wav", "caption": "a"}\n{"path": "two", "caption": "b"}\n'
            '{"path": "x", "caption": "c"}',
            "x is not a clip",
        ),
        (
            '{"path": "one.wav", "caption": "a"}\n{"path": "one.flac", "caption": "b"}',
            "two clips named one",
        ),
        ('{"path": "../one.wav", "caption": "a"}', r"\.\./one\.wav is outside of the folder"),
        ('{"path": "/one.wav", "caption": "a"}', r"/one\.wav is outside of the folder"),
        ('{"path": "one.wav", "caption": "a"}\n{"path": "two.wav"}', r"two\.wav has no caption"),
    ):
        manifest.write_text(f"{rows}\n")
        with pytest.raises(UserError, match=message):
            load_captions(manifest, list_clips(tmp_path))
    manifest.write_text(
        '{"path": "one.wav", "caption": "a"}\n{"path": "two.wav", "caption": "b"}\n'
    )
    assert load_captions(manifest, list_clips(tmp_path)) == {"one": "a", "two": "b"}
    (tmp_path / "one.json").write_text(json.dumps({"prompt": "from generate"}))
    assert load_captions(None, list_clips(tmp_path)) == {"one": "from generate"}
    (tmp_path / "twice.txt").write_text("a waltz\na waltz\n")
    assert "a line is repeated" in refusal(load_prompts, tmp_path / "twice.txt")


def test_hundreds_of_similar_prompts_get_different_names(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(
        "\n".join(
            f"a very slow and very long beginning that is the same for all of them, {i}"
            for i in range(2000)
        )
    )
    assert len(load_prompts(file)) == 2000


def test_only_a_plain_name_before_the_first_equals_sign_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "context=5").mkdir()
    cases = {
        "runs/x/span_len=3": ("span_len=3", "runs/x/span_len=3"),
        "ours=runs/x/span_len=3": ("ours", "runs/x/span_len=3"),
        "ours=a=b=c": ("ours", "a=b=c"),
        "context=5": ("context=5", "context=5"),
        "context=6": ("context", "6"),
        "=x": ("=x", "=x"),
    }
    for entry, (name, folder) in cases.items():
        ((found, path),) = parse_systems([entry]).items()
        assert (found, str(path)) == (name, folder), entry
