"""The codec compared with transformers, edge cases, and invalid files."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_errors import refusal
from make_components import make_codec

from magnet_train.codec.base import CodecFacts, load_codec
from magnet_train.codec.encodec import EncodecCodec
from magnet_train.common.assets import demo_path

HOP = 640


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encodec")
    make_codec(folder)
    return folder


@pytest.fixture(scope="module")
def codec(folder: Path) -> EncodecCodec:
    return load_codec(str(folder))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clone_with(folder: Path, target: Path, **changes: object) -> Path:
    """A copy of a component with some config fields changed."""
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def message(name: object) -> str:
    return refusal(load_codec, str(name))


def test_facts_of_the_32_khz_configuration(codec: EncodecCodec, folder: Path):
    facts = codec.facts
    assert (facts.sample_rate, facts.frame_rate, facts.hop_samples) == (32_000, 50.0, HOP)
    assert (facts.num_codebooks, facts.codebook_size, facts.channels, facts.pad_mode) == (
        4,
        2048,
        1,
        "reflect",
    )
    assert facts.id == str(folder.resolve()) and len(facts.hash) == 16
    assert (
        CodecFacts.from_dict(json.loads(json.dumps(facts.to_dict())) | {"added_later": 1}) == facts
    )
    with pytest.raises(ValueError, match="hash"):
        CodecFacts.from_dict({k: v for k, v in facts.to_dict().items() if k != "hash"})


def test_codes_and_audio_are_those_of_transformers(codec: EncodecCodec, folder: Path):
    from transformers import EncodecModel

    theirs: Any = EncodecModel.from_pretrained(folder, dtype=torch.float32).eval()
    wav = noise(2, 1, 40 * HOP)
    with torch.no_grad():
        expected = theirs.encode(wav, bandwidth=2.2).audio_codes
        codes = codec.encode(wav)
        assert expected.shape == (1, 2, 4, 40)  # theirs leads with an axis of chunks
        assert torch.equal(codes, expected[0]) and codes.dtype == torch.int64
        assert torch.equal(codec.decode(codes), theirs.decode(expected, [None]).audio_values)
    assert all(len(codes[:, k].unique()) > 20 for k in range(4))


@pytest.mark.parametrize("samples", [1, HOP - 1, HOP, HOP + 1, 7 * HOP, 7 * HOP + 1, 11 * HOP - 1])
@pytest.mark.parametrize("pad_mode", ["reflect", "constant"])
def test_a_begun_frame_counts(
    codec: EncodecCodec, folder: Path, tmp_path: Path, samples: int, pad_mode: str
):
    if pad_mode != "reflect":
        codec = load_codec(str(clone_with(folder, tmp_path, pad_mode=pad_mode)))
    codes = codec.encode(noise(1, 1, samples))
    assert codes.shape == (1, 4, math.ceil(samples / HOP))
    assert codec.decode(codes).shape == (1, 1, codes.shape[-1] * HOP)


def test_padding_mode_comes_from_the_config(codec: EncodecCodec, folder: Path, tmp_path: Path):
    other = load_codec(str(clone_with(folder, tmp_path, pad_mode="constant")))
    wav = noise(1, 1, 20 * HOP)
    assert other.facts.pad_mode == "constant" and other.facts.hash != codec.facts.hash
    assert not torch.equal(other.encode(wav), codec.encode(wav))


def test_hash_is_of_what_decides_the_codes(folder: Path, codec: EncodecCodec, tmp_path: Path):
    from transformers import EncodecModel

    def saved(change: str) -> str:
        model = EncodecModel.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            dict(model.named_parameters(), **dict(model.named_buffers()))[change].flatten()[0] += (
                1.0
            )
        model.save_pretrained(tmp_path / change)
        return load_codec(str(tmp_path / change)).facts.hash

    assert load_codec(str(folder)).facts.hash == codec.facts.hash
    assert saved("decoder.layers.0.conv.bias") == codec.facts.hash
    assert saved("quantizer.layers.1.codebook.cluster_size") == codec.facts.hash
    assert saved("encoder.layers.0.conv.bias") != codec.facts.hash
    assert saved("quantizer.layers.3.codebook.embed") != codec.facts.hash


def test_half_precision_files_run_in_float32(folder: Path, tmp_path: Path):
    from transformers import EncodecModel

    model: Any = EncodecModel.from_pretrained(folder, dtype=torch.float16)
    model.save_pretrained(tmp_path)
    codec = load_codec(str(tmp_path))
    assert all(t.dtype == torch.float32 for t in codec.model.parameters())
    wav = noise(1, 1, 20 * HOP)
    with torch.no_grad():
        assert torch.equal(codec.encode(wav), model.float().eval().encode(wav).audio_codes[0])


def test_autocast_and_train_mode_change_nothing(codec: EncodecCodec):
    wav = noise(1, 1, 20 * HOP)
    codes = codec.encode(wav)
    decoded = codec.decode(codes)
    torch.nn.ModuleList([codec]).train()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(codec.encode(wav), codes)
            assert torch.equal(codec.decode(codes), decoded)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not codec.training and not decoded.requires_grad
    assert not any(p.requires_grad for p in codec.parameters())


def test_channels_are_fitted(codec: EncodecCodec, tmp_path: Path):
    wav = noise(1, 2, 10 * HOP)
    assert torch.equal(codec.encode(wav), codec.encode(wav.mean(1, keepdim=True)))
    make_codec(tmp_path, audio_channels=2, codebook_size=64, target_bandwidths=[0.6])
    stereo = load_codec(str(tmp_path))
    assert stereo.facts.channels == 2 and stereo.facts.num_codebooks == 2
    assert torch.equal(stereo.encode(wav[:, :1]), stereo.encode(wav[:, :1].expand(-1, 2, -1)))
    assert stereo.decode(stereo.encode(wav)).shape == wav.shape


def test_a_batch_gives_what_each_gives_alone(codec: EncodecCodec):
    wav = noise(3, 1, 20 * HOP)
    together, alone = codec.encode(wav), torch.cat([codec.encode(w[None]) for w in wav])
    assert (together != alone).float().mean() < 0.01  # ties in floating point
    # Padding would change a clip, so only those of equal length share a batch.
    clips = [wav[0], wav[1, :, : 5 * HOP + 3], wav[2]]
    for clip, codes in zip(clips, codec.encode_clips(clips), strict=True):
        assert (codes != codec.encode(clip[None])[0]).float().mean() < 0.01
    padded = torch.nn.functional.pad(clips[1], (0, 15 * HOP - 3))
    assert not torch.equal(codec.encode(padded[None])[0, :, :6], codec.encode(clips[1][None])[0])
    assert torch.allclose(
        codec.decode(alone), torch.cat([codec.decode(c[None]) for c in alone]), atol=1e-5
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_audio_that_is_not_finite_is_refused(codec: EncodecCodec, value: float):
    wav = noise(1, 1, 4 * HOP)
    wav[0, 0, 100] = value
    assert "NaN or infinite" in refusal(codec.encode, wav)


@pytest.mark.parametrize(
    "wav",
    [
        torch.zeros(1, 4 * HOP),
        torch.zeros(1, 3, HOP),
        torch.zeros(1, 1, 0),
        torch.zeros(1, 1, HOP).short(),
    ],
)
def test_audio_of_the_wrong_shape_or_kind_is_refused(codec: EncodecCodec, wav: torch.Tensor):
    with pytest.raises(ValueError, match="wav must be float"):
        codec.encode(wav)


def test_values_that_are_no_codes_are_named(codec: EncodecCodec):
    codes = torch.zeros(1, 4, 10, dtype=torch.long)
    codes[0, 2, 3:5] = 2048
    text = refusal(codec.decode, codes)
    assert "2 codes are outside 0 .. 2047" in text and "mask id" in text
    codes[0, 2, 3:5] = -1
    assert "another codec" in refusal(codec.decode, codes)
    for wrong in (codes[0], torch.zeros(1, 5, 10, dtype=torch.long), torch.zeros(1, 4, 10)):
        with pytest.raises(ValueError, match="codes must be"):
            codec.decode(wrong)


def test_the_first_codebooks_decode_alone(codec: EncodecCodec):
    codes = codec.encode(noise(1, 1, 10 * HOP))
    coarse = codec.decode(codes[:, :1])
    assert coarse.shape == (1, 1, 10 * HOP) and not torch.equal(coarse, codec.decode(codes))


def test_an_untrained_model_is_refused(tmp_path: Path):
    from transformers import EncodecConfig, EncodecModel

    EncodecModel(EncodecConfig(num_filters=4, target_bandwidths=[1.5])).save_pretrained(tmp_path)
    assert "codebook.embed is all zero" in message(tmp_path)


@pytest.mark.parametrize(
    "settings", [{"pad_mode": ""}, {"chunk_length_s": -1}, {"chunk_length_s": 1e-9}]
)
def test_settings_that_no_codec_has_are_named(settings: dict, folder: Path, tmp_path: Path):
    clone_with(folder, tmp_path, **settings)
    (name,) = settings
    assert f"{name}={settings[name]!r} must be" in message(tmp_path)


def test_the_first_codebooks_are_a_separate_codec(folder: Path, codec: EncodecCodec):
    two = load_codec(f"{folder}@2")
    assert two.facts.num_codebooks == 2
    assert two.facts.id.endswith("@2")
    assert two.facts.hash != codec.facts.hash
    wav = noise(1, 1, 20 * HOP)
    assert torch.equal(two.encode(wav), codec.encode(wav)[:, :2])
    assert "codebooks" in message(f"{folder}@9")


def test_broken_weights_are_named(folder: Path, tmp_path: Path):
    weights = clone_with(folder, tmp_path) / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        weights.write_bytes(content)
        assert str(weights) in message(tmp_path)
    weights.unlink()
    assert "model.safetensors" in message(tmp_path)


def test_a_type_that_is_no_text_is_refused(folder: Path, tmp_path: Path):
    assert "cannot be loaded" in message(clone_with(folder, tmp_path, model_type=["encodec"]))


def test_missing_tensors_are_not_replaced_by_random_ones(folder: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    weights = clone_with(folder, tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    del tensors["encoder.layers.0.conv.bias"]
    save_file(tensors, weights, {"format": "pt"})
    assert "encoder.layers.0.conv.bias" in message(tmp_path)
    good = tensors | {"encoder.layers.0.conv.bias": torch.zeros(4)}
    for key in ("encoder.layers.0.conv.bias", "decoder.layers.0.conv.bias"):
        damaged = good | {key: torch.full_like(good[key], math.nan)}
        save_file(damaged, weights, {"format": "pt"})
        assert f"{key} has NaN" in message(tmp_path)
    tensors["encoder.layers.0.conv.bias"] = torch.zeros(5)
    save_file(tensors, weights, {"format": "pt"})
    assert str(tmp_path) in message(tmp_path)


def test_a_pickle_with_code_in_it_is_not_run(folder: Path, tmp_path: Path):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harmed",))

    (clone_with(folder, tmp_path) / "model.safetensors").unlink()
    torch.save({"weight": Harm()}, tmp_path / "pytorch_model.bin")
    assert str(tmp_path) in message(tmp_path)
    assert not (tmp_path / "harmed").exists()


def test_folders_and_ids_that_are_not_codecs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert "config.json" in message(tmp_path)
    assert "no such folder" in message(tmp_path / "absent")
    assert "config.json" in message(folder / "config.json")
    text = message("facebook/encodec_no_such_model")
    assert "facebook/encodec_no_such_model" in text
    assert "HF_HUB_OFFLINE" in text
    assert "local folder" in text
    (tmp_path / "config.json").write_text("{")
    assert str(tmp_path) in message(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert "'t5'" in message(tmp_path)


def test_a_hub_out_of_reach_is_asked_once(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import HfApi

    def unreachable(self: HfApi, name: str, timeout: float) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    text = message("facebook/encodec_no_such_model")
    assert "no internet access (Name or service not known)" in text


def test_embedded_codec():
    codec = load_codec()
    facts = codec.facts
    assert (facts.id, facts.sample_rate, facts.frame_rate) == ("demo", 16_000, 25)
    assert (facts.num_codebooks, facts.codebook_size) == (5, 256)
    assert demo_path("codec/model.safetensors").stat().st_size < 12e6
    codes = codec.encode(noise(1, 1, 48_000))
    assert codes.shape == (1, 5, 75) and codec.decode(codes).isfinite().all()


def test_random_codes_of_the_embedded_codec_give_neither_dc_nor_clipping():
    generator = torch.Generator().manual_seed(0)
    wav = load_codec().decode(torch.randint(256, (4, 5, 100), generator=generator))
    assert wav.mean(2).abs().max() < 1e-5 and wav.abs().max() < 0.99
