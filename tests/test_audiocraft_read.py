"""Files of audiocraft that cannot be converted: one line names the file and the reason."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_audiocraft import codec_package, model_settings, write_audiocraft
from helpers_errors import refusal

from magnet_train.audiocraft.convert import ConvertOptions, convert
from magnet_train.audiocraft.read import read_config

MODEL = "state_dict.bin"
CODEC = "compression_state_dict.bin"
PROJECTION = "condition_provider.conditioners.description.output_proj.weight"


def refused(source: Path) -> str:
    """The last line that `convert` prints; no files are left."""
    text = refusal(convert, str(source), ConvertOptions(source.parent / "release"))
    assert [path.name for path in source.parent.iterdir()] == [source.name]
    return text


SETTINGS = [
    ("lm_model", "other", "neither a MAGNeT, a hybrid MAGNeT nor a MusicGen (lm_model=other"),
    ("codebooks_pattern.modeling", "other", "codebooks_pattern.modeling=other"),
    ("interleave_stereo_codebooks", {"use": True}, "a stereo model"),
    ("conditioners.self_wav", {"model": "chroma_stem"}, "conditioned on a melody (self_wav)"),
    ("conditioners.description.t5.name", "t5-large", "width 768, but 't5-large' has 1024"),
    ("conditioners.description.model", "lut", "conditioners.description.model='lut'; only t5"),
    ("transformer_lm.card", 128, "emb.0.weight is (65, 64), expected (129, 64)"),
    ("transformer_lm.causal", True, "transformer_lm.causal=True, codebooks_pattern"),
    ("transformer_lm.num_layers", None, "transformer_lm.num_layers=None, not a number"),
    ("transformer_lm.num_layers", 10**8, "num_layers=100000000"),
    ("transformer_lm.n_q", 10**8, "100000000"),
    ("transformer_lm.num_heads", "x", "num_heads='x'"),
    ("transformer_lm.num_heads", 0, "num_heads=0, not a number of at least 1"),
    ("transformer_lm.num_heads", 7, "num_heads=7"),
    ("dataset.segment_duration", -1, "segment_duration=-1"),
    ("dataset.segment_duration", float("nan"), "segment_duration=nan"),
    ("fuser.sum", ["self_wav"], "only one text"),
    ("fuser.cross", [], "only one text"),
    ("masking.span_len", None, "no masking.span_len"),
    ("generate.lm.decoding_steps", [1, 2], "for 4 codebooks"),
]


@pytest.mark.parametrize(("key", "value", "message"), SETTINGS)
def test_unsupported_settings(key, value, message, tmp_path):
    settings = model_settings()
    *parents, last = key.split(".")
    part = settings
    for name in parents:
        part = part[name]
    part[last] = value
    line = refused(write_audiocraft(tmp_path / "theirs", settings=settings))
    assert message in line and MODEL in line


TENSORS: list[tuple[Any, Any, str]] = [
    ("emb.2.weight", None, "lacks emb.2.weight"),
    ("surplus", torch.zeros(1), "unknown surplus"),
    ("out_norm.bias", torch.zeros(3).half(), "out_norm.bias is (3,), expected (64,)"),
    ("out_norm.bias", 3, "out_norm.bias is int, not a dense floating-point tensor"),
    ("out_norm.bias", torch.zeros(64).to(torch.float8_e4m3fn), "not a dense floating-point tensor"),
    ("out_norm.bias", torch.zeros(64).int(), "not a dense floating-point tensor"),
    ("out_norm.bias", torch.full((64,), torch.nan).half(), "out_norm.bias has NaN"),
    ("emb.1.weight", torch.zeros(65, 64), "different precisions"),
    (PROJECTION, torch.zeros(3), "output_proj.weight with two axes"),
    (3, torch.zeros(1), "named 3, which is not a string"),
]


@pytest.mark.parametrize(("name", "value", "message"), TENSORS)
def test_wrong_tensors(name, value, message, tmp_path):
    source = write_audiocraft(tmp_path / "theirs")
    package = torch.load(source / MODEL, weights_only=True)
    package["best_state"].pop(name, None)
    if value is not None:
        package["best_state"][name] = value
    torch.save(package, source / MODEL)
    line = refused(source)
    assert message in line and MODEL in line


ALIASES = "a0: &a0 {x: 1, y: 2}\n" + "\n".join(
    f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(10))}}}" for i in range(1, 12)
)
TEXTS = [
    ("a: [1", "not a YAML configuration"),
    ("nothing", "a str, not a mapping"),
    ("a: 2020-13-45", "not a YAML configuration"),
    ("[" * 3000, "not a YAML configuration"),
    ("&a {b: *a}", "an alias refers to itself"),
    (ALIASES, "its aliases expand to"),
    ("\n".join(f"a{i}: 1" for i in range(10_001)), "more than 10000 keys"),
]


@pytest.mark.parametrize(("text", "message"), TEXTS, ids=range(len(TEXTS)))
def test_texts_that_are_no_configuration(text, message, tmp_path):
    source = write_audiocraft(tmp_path / "theirs")
    torch.save({"best_state": {}, "xp.cfg": text}, source / MODEL)
    assert message in refused(source)


def save(file: str, content: Any) -> Callable[[Path], object]:
    return lambda folder: torch.save(content, folder / file)


def truncate(file: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-5000])


def codec(**seanet: Any) -> Callable[[Path], object]:
    return save(CODEC, codec_package(**seanet))


def codec_without(name: str) -> Callable[[Path], object]:
    package = codec_package()
    del package["best_state"][name]
    return save(CODEC, package)


def codec_of_three_codebooks(folder: Path) -> None:
    package = codec_package()
    package["xp.cfg"] = package["xp.cfg"].replace("n_q: 4", "n_q: 3")
    torch.save(package, folder / CODEC)


FILES: list[tuple[Callable[[Path], object], str]] = [
    (truncate(MODEL), f"{MODEL}: damaged or truncated"),
    (truncate(CODEC), f"{CODEC}: damaged or truncated"),
    (lambda folder: (folder / MODEL).write_bytes(b""), f"{MODEL}: damaged"),
    (lambda folder: (folder / CODEC).unlink(), f"{CODEC}: no such file"),
    (save(MODEL, {"best_state": {}}), "no exported model"),
    (save(MODEL, [1, 2]), "contains a list"),
    (save(CODEC, {"best_state": {}}), "neither an exported codec"),
    (codec_of_three_codebooks, "has the unknown quantizer.layers.3"),
    (codec_without("encoder.model.0.conv.conv.bias"), "lacks encoder.layers.0.conv.bias"),
    (codec(pad_mode="foo"), "pad_mode='foo'"),
    (codec(norm="foo"), "norm='foo'"),
    (codec(dimension=0), CODEC),
    (codec(ratios=[8, 5, 4, 0]), CODEC),
    (save(CODEC, {"pretrained": "/etc"}), "refers to the codec '/etc', which is not a hub id"),
    (save(CODEC, {"pretrained": "../secret"}), "which is not a hub id"),
    (save(CODEC, {"pretrained": None}), "refers to the codec None"),
]


@pytest.mark.parametrize(("damage", "message"), FILES, ids=range(len(FILES)))
def test_damaged_files_and_impossible_codecs(damage, message, tmp_path):
    source = write_audiocraft(tmp_path / "theirs")
    damage(source)
    assert message in refused(source)


class Trap:
    """A pickle that creates a folder when it is loaded unsafely."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("file", [MODEL, CODEC])
def test_code_in_a_pickle_or_a_configuration_is_not_run(file, tmp_path):
    source = write_audiocraft(tmp_path / "theirs")
    trap = tmp_path / "sprung"
    torch.save(Trap(trap), source / file)
    assert "could run code" in refused(source)
    (source / file).write_bytes(pickle.dumps(Trap(trap)))
    assert f"{file}: " in refused(source)
    write_audiocraft(source)
    package = torch.load(source / file, weights_only=True)
    package["xp.cfg"] += f"\ntrap: !!python/object/apply:os.mkdir [{trap}]\n"
    torch.save(package, source / file)
    assert "not a YAML configuration" in refused(source)
    assert not trap.exists()


def test_references_in_a_configuration():
    settings = model_settings()
    settings |= {"device": "${oc.env:HOME}", "loop": "${loop}", "sample": "${sample_rate}"}
    config = read_config(yaml.safe_dump(settings), Path("x"))
    assert config["device"] == "${oc.env:HOME}" and config["loop"] == "${loop}"
    assert config["sample"] == 32_000
