"""MusicGen in our network: logits equal to transformers, from both of its formats."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from helpers_audiocraft import model_settings, write_audiocraft
from helpers_data import write_shards
from helpers_rescoring import count_readings
from make_components import make_musicgen, make_t5

from magnet_train.__main__ import main
from magnet_train.audiocraft.convert import ConvertOptions, convert
from magnet_train.common.errors import UserError
from magnet_train.decoding.load_rescorer import load_rescorer
from magnet_train.decoding.rescoring import MusicGenRescorer
from magnet_train.generator import load
from magnet_train.layout import delayed
from magnet_train.release import SavedModel

SIZES = ("dim", "num_heads", "num_layers")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("musicgen")
    return folder, make_musicgen(folder)


@pytest.fixture(scope="module")
def release(theirs, tmp_path_factory) -> Path:
    return convert(str(theirs[0]), ConvertOptions(tmp_path_factory.mktemp("ours") / "release"))


@torch.no_grad()
def test_logits_are_those_of_transformers(theirs, release, parity):
    ours = load(release)
    assert ours.network.config.order == "autoregressive"
    model, codes = theirs[1], torch.randint(2048, (2, 4, 30))
    prompts = ["a slow waltz on the piano", "flute"]
    tokens = ours.text_encoder._tokenizer(prompts, padding=True, return_tensors="pt")
    columns = delayed(codes, 2048).flatten(0, 1)
    logits = model(**tokens, decoder_input_ids=columns).logits.unflatten(0, (2, 4))
    wanted = torch.stack([logits[:, book, book : book + 30] for book in range(4)], 1)
    text = ours.network.encode_text(*ours.text_encoder(prompts))
    found = ours.network(codes, ours.network.config.reading, text)
    worst = (found - wanted).abs().max().item()
    parity("MusicGen: logits", "transformers, 2 x 4 x 30 codes", "the same", f"{worst:.1e}")
    assert worst < 2e-5


def test_it_generates_with_its_codec_and_text_encoder(release):
    ours = load(release)
    assert ours.codec.facts.codebook_size == 2048 and ours.text_encoder.dim == 32
    result = ours.generate(["harp"], duration_s=0.2)
    assert result.codes.shape == (1, 4, 10) and (result.order == 0).all()


@torch.no_grad()
def test_it_rescores_as_transformers_model_does(theirs, release):
    readings = [
        load_rescorer(name, load(release).codec.facts, load(release).text_encoder)
        for name in (str(theirs[0]), str(release))
    ]
    one, other = (rescorer.reading(["a slow waltz", ""]) for rescorer in readings)
    codes, masked = torch.randint(2048, (2, 4, 30)), torch.ones(2, 30, dtype=torch.bool)
    codes[:, 3] = 2048  # above the stage
    for stage in range(3):
        assert torch.allclose(one(codes, masked, stage), other(codes, masked, stage), atol=2e-5)


@pytest.fixture(scope="module")
def run(release, tmp_path_factory) -> Path:
    """A run of two steps of conf/hybrid_small_30s.yaml that starts from it."""
    folder, saved = tmp_path_factory.mktemp("fit"), SavedModel.open(release)
    shards = write_shards(folder / "shards", saved.codec["id"], [4], num_frames=160)
    options = {
        "config": Path(__file__).parents[1] / "conf/hybrid_small_30s.yaml",
        "model.init_from": release,
        "model.codec": saved.codec["id"],
        "model.text_encoder": saved.text_encoder,
        "model.crop_s": 3.2,
        **{f"model.network.{n}": getattr(saved.network, n) for n in SIZES},
        "model.optimizer": '{"name": "adamw", "lr": 1e-4, "warmup_steps": 0}',
        "data": f'{{"train": "{shards}", "validation": "{shards}", "num_workers": 0}}',
        "data.batch_size": 2,
        "data.global_batch_size": 2,
        "generation.num_prompts": 0,
        "generation.decoding.autoregressive_s": 1.0,
        "averaging.every_n_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.logger": "false",
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.default_root_dir": folder / "run",
    }
    assert main(["fit", *(f"--{name}={value}" for name, value in options.items())]) == 0
    return folder / "run"


def test_a_hybrid_starts_from_it(release, run):
    before, after = SavedModel.open(release), SavedModel.open(run)
    assert after.network == dataclasses.replace(before.network, order="hybrid")
    assert after.provenance["step"] == 2 and after.provenance["licence"] == "cc-by-nc-4.0"
    first = before.weights()
    moved = max((first[name] - w).abs().max().item() for name, w in after.weights().items())
    assert 0 < moved < 1e-3


def test_it_rescores_a_hybrid_in_generate_edit_and_evaluate(theirs, run, tmp_path, monkeypatch):
    read = count_readings(monkeypatch, MusicGenRescorer)
    soundfile.write(tmp_path / "a.wav", torch.rand(32_000).numpy() - 0.5, 16_000)
    (tmp_path / "prompts.txt").write_text("a slow waltz\nflute\n")
    for number, verb, options in (
        (1, "generate", "--prompt harp --duration_s 1.2 --plots false --out made"),
        (1, "edit a.wav", "--prompt harp --regenerate 0:1.5 --plots false --out edited"),
        (2, "evaluate --batch_size 2", "--prompts prompts.txt --generated_to scored"),
    ):
        read.clear()
        args = f"{verb} --checkpoint {run} {options} --decoding.decoding_steps [1]"
        args += " --metrics vendi/musicnn" * (number == 2)
        monkeypatch.chdir(tmp_path)
        assert main([*args.split(), "--decoding.rescorer", str(theirs[0])]) == 0
        assert read == [number]
    for folder, kind in (("made", "*.wav"), ("edited", "*.wav"), ("scored", "*/*.wav")):
        files = list((tmp_path / folder).glob(kind))
        assert files
        for file in files:
            assert str(theirs[0]) in file.with_suffix(".json").read_text()


def changed(**changes: Any) -> dict[str, Any]:
    """Settings of audiocraft's tiny model, with some replaced."""
    settings = model_settings()
    delay = {"delays": [0, 1, 2, 3], "flatten_first": 0, "empty_initial": 0}
    settings["codebooks_pattern"] = {"modeling": "delay", "delay": delay}
    for name, value in changes.items():
        settings[name] = settings[name] | value if isinstance(value, dict) else value
    return settings


MUSICGEN = {
    "lm_model": "transformer_lm",
    "transformer_lm": {"causal": True},
    "generate": {"lm": {"use_sampling": True, "temp": 1.0, "top_k": 250, "top_p": 0.0}},
}


@pytest.mark.parametrize(("order", "changes"), [("hybrid", {}), ("autoregressive", MUSICGEN)])
def test_audiocraft_files_are_recognised_by_their_configuration(order, changes, tmp_path):
    make_t5(tmp_path / "t5", dim=768)
    settings = changed(**changes)
    if order == "autoregressive":
        del settings["masking"], settings["transformer_lm"]["subcodes_context"]
    source = write_audiocraft(tmp_path / "theirs", settings=settings)
    options = ConvertOptions(tmp_path / "release", text_encoder=str(tmp_path / "t5"))
    saved = SavedModel.open(convert(str(source), options))
    assert saved.network.order == order and saved.decoding.autoregressive_cfg_coef == 3.0
    assert saved.decoding.autoregressive_top_k == 250
    again = ConvertOptions(tmp_path / "back", to="audiocraft")
    with pytest.raises(UserError, match="options that audiocraft lacks: order"):
        convert(str(tmp_path / "release"), again)


def test_a_text_encoder_of_another_width_is_refused(theirs, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"d_model": 9999}')
    options = ConvertOptions(tmp_path / "release", text_encoder=str(tmp_path / "other"))
    with pytest.raises(UserError, match="9999; give the model's text encoder"):
        convert(str(theirs[0]), options)
    assert not (tmp_path / "release").exists()


def test_other_delays_are_refused(tmp_path):
    settings = changed()
    settings["codebooks_pattern"]["delay"]["delays"] = [0, 0, 1, 1]
    source = write_audiocraft(tmp_path / "theirs", settings=settings)
    with pytest.raises(UserError, match=r"delays=\[0, 0, 1, 1\]"):
        convert(str(source), ConvertOptions(tmp_path / "release"))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model_type": "musicgen_melody"}, "melody"), ({"audio_channels": 2}, "stereo")],
)
def test_stereo_and_melody_are_refused_by_name(theirs, change, message, tmp_path):
    config = json.loads((theirs[0] / "config.json").read_text())
    (config if "model_type" in change else config["decoder"]).update(change)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        convert(str(tmp_path / "theirs"), ConvertOptions(tmp_path / "release"))
