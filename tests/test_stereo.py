"""Stereo with a mono codec: interleaved codebooks, models started from mono, and the verbs."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from magnet_train.__main__ import main
from magnet_train.adapters import LoraConfig
from magnet_train.audiocraft.write import codec_package
from magnet_train.cli.inherited import settings_of_release
from magnet_train.codec.base import load_codec
from magnet_train.common.errors import UserError
from magnet_train.model import Magnet, MagnetConfig, stereo_weights
from magnet_train.module import MagnetModule
from magnet_train.release import SavedModel


@pytest.fixture(scope="module")
def codec():
    return load_codec("demo@stereo")


def noise(seed: int, samples: int = 16_000) -> torch.Tensor:
    return 0.3 * torch.randn(2, 1, samples, generator=torch.Generator().manual_seed(seed))


def test_codebooks_of_the_channels_alternate(codec):
    mono, left, right = load_codec("demo"), noise(0), noise(1)
    codes = codec.encode(torch.cat([left, right], 1))
    assert torch.equal(codes[:, ::2], mono.encode(left))
    assert torch.equal(codes[:, 1::2], mono.encode(right))
    wav = codec.decode(codes)
    assert torch.equal(wav[:, :1], mono.decode(codes[:, ::2]))
    assert torch.equal(wav[:, 1:], mono.decode(codes[:, 1::2]))
    coarse = codec.decode(codes[:, :1])  # the right channel has no code yet
    assert torch.equal(coarse[:, 0], coarse[:, 1])
    assert torch.equal(codec.codebooks[2:4], mono.codebooks[[1, 1]])


def test_facts_and_names(codec):
    mono = load_codec("demo").facts
    assert asdict(codec.facts) | {"id": 0, "hash": 0} == asdict(mono) | {
        "id": 0,
        "hash": 0,
        "channels": 2,
        "num_codebooks": 2 * mono.num_codebooks,
    }
    assert codec.facts.id == "demo@stereo" and codec.facts.hash != mono.hash
    assert load_codec("demo@2@stereo").facts.num_codebooks == 4
    with pytest.raises(UserError, match="is stereo already"):
        load_codec("demo@stereo@stereo")


def test_a_stereo_network_starts_as_the_mono_one():
    config = MagnetConfig(dim=32, num_heads=2, num_layers=2, codebook_size=16, text_dim=8)
    stereo = replace(config, num_codebooks=8, context=(-1, -1, 5))
    torch.manual_seed(0)
    one, two = Magnet(config).eval(), Magnet(stereo).eval()
    two.load_state_dict(stereo_weights(dict(one.state_dict())))
    codes = torch.randint(16, (2, 4, 30))
    for stage in range(4):
        codes[:, stage:] = config.mask_id
        both = codes.repeat_interleave(2, 1)
        with torch.no_grad():
            expected = one(codes, config.stage(stage), None)
            for channel in range(2):
                found = two(both, stereo.stage(2 * stage + channel), None)
                assert torch.allclose(found, expected, atol=1e-5)


def test_context_and_steps_of_the_mono_model_are_inherited():
    mono, stereo = settings_of_release("demo"), settings_of_release("demo", codec="demo@stereo")
    context = [*mono["model"]["network"]["context"]]
    context += context[-1:] * (5 - len(context))
    assert stereo["model"]["network"]["context"] == [c for c in context for _ in range(2)]
    for name in ("decoding_steps", "top_p"):
        numbers = stereo["generation"]["decoding"][name]
        assert len(numbers) == 10 and numbers[::2] == numbers[1::2]
    shared_noise = [
        settings["generation"]["decoding"]["shared_noise"] for settings in (mono, stereo)
    ]
    assert shared_noise == [1, 1]  # one number for all stages stays one


def test_what_has_no_stereo_is_refused():
    with pytest.raises(UserError, match="audiocraft has no stereo MAGNeT"):
        codec_package("facebook/encodec_32khz@stereo")
    network = replace(SavedModel.open("demo").network, num_codebooks=10)
    settings = {"network": network, "codec": "demo@stereo", "init_from": "demo"}
    with pytest.raises(UserError, match="adapters cannot make a mono model stereo"):
        MagnetModule(**settings, lora=LoraConfig(rank=2))
    with pytest.raises(UserError, match="the same codec to distil"):
        MagnetModule(**settings, distil_guidance=True)


@pytest.mark.slow
def test_from_stereo_audio_to_stereo_audio(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("clips").mkdir()
    for i in range(2):
        both = 0.1 * np.random.default_rng(i).standard_normal((16_000, 2))
        soundfile.write(f"clips/{i}.wav", both, 16_000)
        Path(f"clips/{i}.txt").write_text("noise")
    assert main("tokenize clips --out shards --codec demo@stereo --crop_s 1".split()) == 0
    fit = (
        "fit --data.train shards --data.validation shards --model.init_from demo --model.crop_s 1"
        " --model.codec demo@stereo --data.batch_size 2 --data.num_workers 0 --trainer.max_steps 1"
        " --generation.num_prompts 0 --trainer.val_check_interval 1 --trainer.logger false"
        " --trainer.default_root_dir run"
    )
    assert main(fit.split()) == 0
    assert main("convert run --out release".split()) == 0
    generate = "generate --checkpoint release -p noise --out out --decoding.decoding_steps [1]"
    assert main([*generate.split(), "--duration_s", "1"]) == 0
    wav, rate = soundfile.read(next(Path("out").glob("*.wav")))
    assert rate == 16_000 and wav.shape == (16_000, 2) and (wav[:, 0] != wav[:, 1]).any()
