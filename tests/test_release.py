"""Releases and checkpoints are read as written; damaged or invalid ones give one-line errors."""

import json
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_errors import refusal
from make_components import make_t5
from safetensors.torch import load_file, save_file

from magnet_train.common.errors import UserError
from magnet_train.common.tensor_files import file_sha256
from magnet_train.decoding.decode import DecodingConfig
from magnet_train.model import Magnet, MagnetConfig
from magnet_train.release import SavedModel, read_checkpoint, write_release

NETWORK = MagnetConfig(dim=16, num_heads=2, num_layers=2, codebook_size=1024, text_dim=384)


def saved_model(**changes: Any) -> SavedModel:
    settings = {"network": NETWORK, "codec": {"id": "demo"}, "text_encoder": "demo", "crop_s": 2.0}
    settings |= {"decoding": DecodingConfig(decoding_steps=(2,)), "provenance": {"licence": "MIT"}}
    return SavedModel(**({"file": Path("x")} | settings | changes))


def write(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    weights = Magnet(NETWORK).to(dtype).state_dict()
    write_release(folder, saved_model(**changes), {k: lambda v=v: v for k, v in weights.items()})
    return folder


def checkpoint(
    file: Path, change: Callable[[dict[str, Any]], object] = lambda content: None
) -> Path:
    """The parts of a Lightning checkpoint that are read."""
    state = {f"network.{k}": v for k, v in Magnet(NETWORK).state_dict().items()}
    settings = {
        "network": NETWORK.to_dict(),
        "codec": "demo",
        "text_encoder": "demo",
        "crop_s": 2.0,
    }
    settings |= {"span_len": 3, "guidance_dropout": 0.3}
    content = {"state_dict": state, "hyper_parameters": settings, "global_step": 7, "callbacks": {}}
    change(content)
    torch.save(content, file)
    return file


def refused(path: Path) -> str:
    """The one-line error of reading and using a model."""
    return refusal(lambda: SavedModel.open(path).build())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_read_again(dtype, tmp_path):
    folder = write(tmp_path / "release", dtype)
    saved = SavedModel.open(folder)
    assert saved == saved_model(file=folder / "model.safetensors", sha256=saved.sha256)
    assert saved.sha256 == file_sha256(saved.file)
    assert {v.dtype for v in saved.weights().values()} == {dtype}
    assert {v.dtype for v in saved.build().state_dict().values()} == {torch.float32}
    assert "license: MIT" in (folder / "README.md").read_text()


def test_a_text_encoder_from_a_folder_becomes_part_of_the_release(tmp_path):
    make_t5(tmp_path / "t5", dim=384)
    (tmp_path / "t5" / "run.py").write_text("print()")
    folder = write(tmp_path / "release", text_encoder=str(tmp_path / "t5"))
    shutil.rmtree(tmp_path / "t5")
    folder = folder.rename(tmp_path / "moved")
    assert SavedModel.open(folder).text_encoder == str(folder / "text_encoder")
    assert not (folder / "text_encoder" / "run.py").exists()
    file = folder / "text_encoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert f"{file}: SHA-256" in refused(folder)
    file.unlink()
    assert f"{file}: cannot be read" in refused(folder)


def test_a_checkpoint_carries_the_decoding_of_its_last_validation(tmp_path):
    decoding = {"Anything": {"decoding": {"temperature": 2.5}}, "Other": {"steps": 3}}
    saved = SavedModel.open(checkpoint(tmp_path / "a.ckpt", lambda c: c.update(callbacks=decoding)))
    assert saved.decoding == DecodingConfig(temperature=2.5, span_len=3)
    assert saved.provenance == {"checkpoint": "a.ckpt", "step": 7}


CODEC_VALUES: dict[str, tuple[Any, ...]] = {
    "hash": (),
    "sample_rate": (0, 1, 10**9, 32_000.5),
    "frame_rate": (0, -1, 10**6, math.nan),
    "channels": (0, 3),
    "pad_mode": (1,),
}
"""Impossible values of a codec's facts."""
CODEC = dict(zip(CODEC_VALUES, ("0" * 16, 32_000, 50.0, 1, "constant"), strict=True))
CODEC |= {"id": "demo", "num_codebooks": NETWORK.num_codebooks, "codebook_size": 1024}
SETTINGS = {
    "crop_s": [math.nan, 1e12, -1, None, "x", True],
    "guidance_dropout": [2, math.nan],
    "format": [2],
    "sha256": ["0" * 64, None, 3],
    "component_sha256": [[], {"../x.safetensors": "0"}, {"codec/x.safetensors": "0"}],
    "provenance": [[]],
    "text_encoder": [
        None,
        {"id": None, "dim": 384},
        {"id": "/etc", "dim": 384},
        {"id": "demo", "dim": 5},
    ],
    "codec": [{"id": x} for x in (None, "/etc", "./../x", "../x", "./codec/../../x", "a/b/c")]
    + [{"id": "demo", "num_codebooks": 10**8}]
    + [
        CODEC | {name: value}
        for name, values in CODEC_VALUES.items()
        for value in (*values, None, 5 if name in ("hash", "pad_mode") else "x")
    ],
    "network": [
        NETWORK.to_dict() | {name: value}
        for name in NETWORK.to_dict()
        for value in (10**8, 10**18, -2, 1.5, "x", None, [], ["x"], True)
        if (name, value) not in (("context", 10**8), ("context", 10**18))  # as good as all frames
    ],
}


@pytest.mark.parametrize(
    ("name", "value"), [(k, v) for k, values in SETTINGS.items() for v in values]
)
def test_impossible_settings_are_refused_before_anything_is_allocated(name, value, tmp_path):
    file = write(tmp_path / "release") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    assert str(file.parent) in refused(file.parent)


@pytest.mark.parametrize("text", ["", "[", "[]", "{}", "[" * 100_000, "\udcff", " " * 2_000_000])
def test_a_damaged_configuration_is_refused(text, tmp_path):
    file = write(tmp_path / "release") / "config.json"
    file.write_text(text, errors="surrogateescape")
    assert "not a release of magnet_train" in refused(file.parent)


def test_each_flipped_bit_of_a_releases_weights_is_detected(tmp_path):
    folder = write(tmp_path / "release")
    good = (folder / "model.safetensors").read_bytes()
    for place in (0, 20, len(good) // 2, len(good) - 1):
        bad = bytearray(good)
        bad[place] ^= 1
        (folder / "model.safetensors").write_bytes(bad)
        assert "model.safetensors" in refused(folder)
    (folder / "model.safetensors").write_bytes(good[:1000])
    assert "copy or download the release again" in refused(folder)
    (folder / "model.safetensors").unlink()
    assert "copy or download the release again" in refused(folder)
    os.mkfifo(folder / "model.safetensors")  # which would block its reader
    assert "copy or download the release again" in refused(folder)


def bad_tensors() -> dict[str, Callable[[dict[str, torch.Tensor]], object]]:
    name = "out_norm.bias"
    return {
        "lacks": lambda w: w.pop(name),
        "unknown extra": lambda w: w.update(extra=torch.zeros(1)),
        "expected": lambda w: w.update({name: torch.zeros(3)}),
        "floating-point": lambda w: w.update({name: torch.zeros(16, dtype=torch.int64)}),
        "NaN": lambda w: w[name].fill_(math.nan),
        "infinite": lambda w: w[name].fill_(math.inf),
    }


@pytest.mark.parametrize("message", bad_tensors())
def test_wrong_tensors_are_refused_in_releases_and_checkpoints(message, tmp_path):
    change = bad_tensors()[message]
    folder = write(tmp_path / "release")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["sha256"] = file_sha256(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    assert message in refused(folder)

    def changed(content: dict[str, Any]) -> None:
        state = {k.removeprefix("network."): v for k, v in content["state_dict"].items()}
        change(state)
        content["state_dict"] = {f"network.{k}": v for k, v in state.items()}

    assert message in refused(checkpoint(tmp_path / "last.ckpt", changed))


def test_flipped_bits_in_a_checkpoint_are_detected_or_harmless(tmp_path):
    good = checkpoint(tmp_path / "good.ckpt").read_bytes()
    expected = read_checkpoint(tmp_path / "good.ckpt")["state_dict"]
    bad = tmp_path / "bad.ckpt"
    found = 0
    for place in range(5, len(good), len(good) // 100):
        damaged = bytearray(good)
        damaged[place] ^= 16
        bad.write_bytes(damaged)
        try:
            state = read_checkpoint(bad)["state_dict"]
        except UserError as error:
            assert "bad.ckpt: damaged or truncated" in str(error)
            found += 1
        else:
            assert all(torch.equal(state[k], v) for k, v in expected.items()), place
    assert found > 50


def test_what_is_no_checkpoint_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    file = tmp_path / "x.ckpt"
    assert "no such file or folder" in refused(file)
    for content in (b"", b"PK\x03\x04 cut off", pickle.dumps(Trap()), pickle.dumps([1])):
        file.write_bytes(content)
        assert "x.ckpt: damaged or truncated" in refused(file)
    for value in ({"state_dict": Trap()}, [1, 2], {"state_dict": {}}, {"hyper_parameters": {}}):
        torch.save(value, file)
        assert "x.ckpt" in refused(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    assert "compressed entries" in refused(file)
    assert "state_dict" in refused(checkpoint(file, lambda content: content.pop("state_dict")))
    assert "crop_s" in refused(
        checkpoint(file, lambda c: c["hyper_parameters"].update(crop_s=math.nan))
    )
    meta = {"network.out_norm.bias": torch.zeros(16, device="meta")}
    assert "out_norm.bias" in refused(checkpoint(file, lambda c: c["state_dict"].update(meta)))
    for lora in ({"rank": 2}, {"rank": 2, "base_hash": "x"}, {"rank": "x"}, {"rank": 2, "x": 1}):
        assert "x.ckpt" in refused(
            checkpoint(file, lambda c, lora=lora: c["hyper_parameters"].update(lora=lora))
        )
    assert "crop_s" in refused(
        checkpoint(file, lambda c: c["hyper_parameters"].update(lora=[1], crop_s=None))
    )
    assert not (tmp_path / "sprung").exists()
