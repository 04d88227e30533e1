"""Distilled guidance: the loss is the divergence from the teacher's guided logits."""

import json
from typing import Any

import pytest
import torch

from magnet_train.__main__ import main
from magnet_train.cli.inherited import settings_of_release
from magnet_train.common.errors import UserError
from magnet_train.decoding.decode import DecodingConfig, Networks, guided_logits
from magnet_train.module import MagnetModule

STAGE = 1


@pytest.fixture
def module(tiny, tmp_path) -> MagnetModule:
    tiny.save(tmp_path / "release", "# card\n")
    start = str(tmp_path / "release")
    module = MagnetModule(tiny.network.config, init_from=start, distil_guidance=True, crop_s=1.0)
    module.setup("fit")
    return module


def batch(module: MagnetModule) -> Any:
    codes = torch.randint(module.config.codebook_size, (2, module.config.num_codebooks, 25))
    return {"codes": codes, "valid": torch.ones(2, 25, dtype=torch.bool)}


def test_the_loss_is_the_divergence_from_what_decoding_would_be_given(module):
    data, masked, rate = batch(module), torch.rand(2, 25) < 0.5, 0.6
    captions = ["a slow waltz", "flute"]
    found = module.distilled_loss(data, captions, STAGE, masked, torch.full((2,), rate))
    shown = data["codes"].clone()
    shown[:, STAGE][masked] = shown[:, STAGE + 1 :] = module.config.mask_id
    text = module.network.encode_text(*module.text_encoder(captions))
    pass_ = module.config.stage(STAGE)
    networks = Networks(
        lambda codes, stage: module.network(codes, pass_, text),
        lambda codes, stage: module.network(codes, pass_, None),
    )
    with torch.no_grad():
        guided = guided_logits(networks, shown, STAGE, DecodingConfig(), rate).log_softmax(-1)
        single = networks.conditional(shown, STAGE).log_softmax(-1)
    kl = (guided.exp() * (guided - single)).sum(-1)
    assert torch.allclose(found.ce, (kl * masked).sum(1), rtol=1e-3, atol=1e-5)
    assert (found.ce > 0).all() and found.count.tolist() == masked.sum(1).tolist()


def test_without_a_caption_there_is_nothing_to_learn_and_the_teacher_stays(module):
    data, masked = batch(module), torch.rand(2, 25) < 0.5
    nothing = module.distilled_loss(data, ["", ""], STAGE, masked, torch.ones(2))
    assert nothing.ce.abs().max() < 1e-3
    assert not any("teacher" in name for name in module.state_dict())
    optimizer = torch.optim.Adam(module.network.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = module.distilled_loss(data, ["harp", "flute"], STAGE, masked, torch.ones(2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_what_is_distilled_is_decoded_without_guidance(tiny, tmp_path):
    tiny.save(tmp_path / "release", "# card\n")
    decoding = settings_of_release(str(tmp_path / "release"), distils=True)["generation"][
        "decoding"
    ]
    assert decoding["max_cfg_coef"] == decoding["min_cfg_coef"] == 1


def test_a_model_without_guidance_is_not_distilled(tiny, tmp_path):
    tiny.save(tmp_path / "release", "# card\n")
    file = tmp_path / "release" / "config.json"
    settings = json.loads(file.read_text())
    settings["decoding"] |= {"max_cfg_coef": [1.0, 1.0], "min_cfg_coef": 1.0}
    file.write_text(json.dumps(settings))
    start = str(tmp_path / "release")
    with pytest.raises(UserError, match="no guidance to distil"):
        MagnetModule(tiny.network.config, init_from=start, distil_guidance=True).setup("fit")


def test_guidance_of_what_is_distilled_is_refused_before_training(tiny, tmp_path, capsys):
    tiny.save(tmp_path / "release", "# card\n")
    options = ["--config", "conf/ablation/decoding.yaml", "--model.distil_guidance", "true"]
    options += ["--model.init_from", str(tmp_path / "release")]
    assert main(["fit", *options, "--trainer.default_root_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--generation.decoding.max_cfg_coef 1.5: with --model.distil_guidance true" in error
    assert not (tmp_path / "run").exists()


def test_the_teacher_of_a_checkpoint_has_an_absolute_path(tiny, tmp_path, monkeypatch):
    tiny.save(tmp_path / "release", "# card\n")
    monkeypatch.chdir(tmp_path)
    module = MagnetModule(tiny.network.config, init_from="release", distil_guidance=True, crop_s=1)
    assert module.hparams["init_from"] == str(tmp_path / "release")


def test_there_must_be_a_model_to_distil():
    with pytest.raises(UserError, match="init_from RELEASE"):
        MagnetModule(distil_guidance=True)
