"""DAC compared with transformers, and used from audio to audio with nine codebooks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from make_components import make_t5, make_tokenizer
from torch.nn import functional as F

from magnet_train.__main__ import main
from magnet_train.codec.base import load_codec
from magnet_train.codec.dac import DacCodec
from magnet_train.common.errors import UserError


def make_dac(folder: Path, **changes: object) -> None:
    """A random DAC with the published strides, sample rate and number of codebooks, but narrow."""
    from transformers import DacConfig, DacModel

    settings: dict = {
        "encoder_hidden_size": 4,
        "decoder_hidden_size": 32,
        "codebook_size": 64,
        "codebook_dim": 4,
        "sampling_rate": 44_100,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        DacModel(DacConfig(**(settings | changes))).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dac")
    make_dac(folder / "codec")
    make_t5(folder / "t5")
    make_tokenizer(folder / "t5")
    return folder


@pytest.fixture(scope="module")
def codec(folder: Path) -> DacCodec:
    loaded = load_codec(str(folder / "codec"))
    assert isinstance(loaded, DacCodec)
    return loaded


@pytest.mark.parametrize("changes", [{"n_codebooks": 0}, {"sampling_rate": 0}])
def test_a_configuration_of_no_codec_is_refused(changes: dict, folder: Path, tmp_path: Path):
    shutil.copytree(folder / "codec", tmp_path / "codec")
    config = json.loads((tmp_path / "codec" / "config.json").read_text()) | changes
    (tmp_path / "codec" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"(num_codebooks|sample_rate)=0 must be"):
        load_codec(str(tmp_path / "codec"))


def test_facts(codec: DacCodec):
    facts = codec.facts
    assert (facts.sample_rate, facts.hop_samples, facts.channels) == (44_100, 512, 1)
    assert (facts.num_codebooks, facts.codebook_size) == (9, 64)
    assert codec.codebooks.shape == (9, 64, 64)


@pytest.mark.parametrize("samples", [1, 511, 512, 5000])
def test_codes_and_audio_are_those_of_transformers(codec: DacCodec, folder: Path, samples: int):
    from transformers import DacModel

    theirs = DacModel.from_pretrained(folder / "codec").eval()
    wav = 0.3 * torch.randn(2, 1, samples, generator=torch.Generator().manual_seed(0))
    codes = codec.encode(wav)
    frames = -(-samples // 512)
    assert codes.shape == (2, 9, frames)
    with torch.no_grad():
        expected = theirs.encode(F.pad(wav, (0, frames * 512 - samples)))
        assert torch.equal(codes, expected.audio_codes)
        audio = theirs.decode(audio_codes=codes).audio_values[:, None]
    assert torch.equal(codec.decode(codes), audio) and audio.shape[2] == frames * 512


def test_entries_add_up_to_the_latent(codec: DacCodec):
    codes = codec.encode(0.3 * torch.randn(1, 1, 2048))
    latent = codec.model.quantizer.from_codes(codes)[0]
    entries = torch.stack([codec.codebooks[k][codes[0, k]] for k in range(9)]).sum(0)
    assert torch.allclose(entries.T, latent[0], atol=1e-5)


def test_the_first_codebooks(codec: DacCodec, folder: Path):
    four = load_codec(f"{folder / 'codec'}@4")
    wav = 0.3 * torch.randn(1, 1, 3000)
    assert torch.equal(four.encode(wav), codec.encode(wav)[:, :4])
    assert four.facts.num_codebooks == 4 and four.facts.hash != codec.facts.hash


def test_odd_strides_give_whole_frames(tmp_path: Path):
    make_dac(tmp_path, downsampling_ratios=[2, 5], upsampling_ratios=[5, 2], n_codebooks=2)
    codec = load_codec(str(tmp_path))
    codes = codec.encode(0.3 * torch.randn(1, 1, 95))
    assert codes.shape == (1, 2, 10) and codec.decode(codes).shape == (1, 1, 100)


def test_what_is_no_dac_is_refused(folder: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mimi"}))
    with pytest.raises(UserError, match="describes 'mimi', not 'encodec' or 'dac'"):
        load_codec(str(tmp_path))


def test_from_audio_to_audio_with_nine_codebooks(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clips = tmp_path / "clips"
    clips.mkdir()
    for i in range(2):
        noise = 0.1 * np.random.default_rng(i).standard_normal(44_100)
        soundfile.write(clips / f"{i}.wav", noise, 44_100)
        (clips / f"{i}.txt").write_text("noise")
    tokenize = f"tokenize {clips} --out shards --codec {folder / 'codec'} --crop_s 1"
    assert main(tokenize.split()) == 0
    fit = (
        "fit --data.train shards --data.validation shards --model.crop_s 1"
        f" --model.codec {folder / 'codec'} --model.text_encoder {folder / 't5'}"
        " --model.network.dim 16 --model.network.num_heads 2 --model.network.num_layers 1"
        " --model.start_from_codec true --data.batch_size 2 --data.num_workers 0"
        " --generation.num_prompts 0 --trainer.max_steps 2 --trainer.val_check_interval 2"
        " --trainer.logger false --trainer.default_root_dir run"
    )
    assert main(fit.split()) == 0
    generate = "generate --checkpoint run --prompt noise --out out --decoding.decoding_steps [2,1]"
    assert main(generate.split()) == 0
    wav, rate = soundfile.read(next(Path("out").glob("*.wav")))
    assert rate == 44_100 and len(wav) == 86 * 512
