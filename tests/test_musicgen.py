"""MusicGen in our network: logits equal to transformers, from both of its formats."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_audiocraft import model_settings, write_audiocraft
from make_components import make_musicgen, make_t5

from magnet_train.audiocraft.convert import ConvertOptions, convert
from magnet_train.common.errors import UserError
from magnet_train.generator import load
from magnet_train.layout import delayed
from magnet_train.module import MagnetModule
from magnet_train.release import SavedModel


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


def test_a_hybrid_starts_from_it(release):
    saved = SavedModel.open(release)
    network = dataclasses.replace(saved.network, order="hybrid")
    module = MagnetModule(
        network, codec=saved.codec["id"], text_encoder=saved.text_encoder, init_from=str(release)
    )
    assert module.network.config.order == "hybrid"
    assert torch.equal(module.network.embedding, saved.weights()["embedding"])


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
