"""LoRA: merged equals unmerged, PEFT's files, and runs that train and save only adapters."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from magnet_train.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LoraConfig,
    adapt,
    adapter_tensors,
    merged,
    read_adapter,
    weights_hash,
    write_adapter,
)
from magnet_train.callbacks.averaging import WeightEMA
from magnet_train.common.errors import UserError
from magnet_train.common.torchaudio_import import ensure_torchaudio_imports
from magnet_train.model import Magnet, MagnetConfig
from magnet_train.module import MagnetModule
from magnet_train.release import SavedModel, check_checkpoint_weights

CONFIG = MagnetConfig(dim=32, num_heads=2, num_layers=2, codebook_size=16, text_dim=8, context=2)
LORA = LoraConfig(rank=4, alpha=6.0)


def network(seed: int = 0) -> Magnet:
    torch.manual_seed(seed)
    return Magnet(CONFIG).eval()


def trained(base: Magnet, seed: int, lora: LoraConfig = LORA) -> tuple[Magnet, dict[str, Any]]:
    """The network with random adapters, and their tensors."""
    draw = torch.Generator().manual_seed(seed)
    adapted = Magnet(CONFIG).eval()
    adapted.load_state_dict(base.state_dict())
    adapt(adapted, lora, draw)
    tensors = adapter_tensors(adapted.state_dict())
    for value in tensors.values():  # views of the parameters
        value.copy_(torch.randn(value.shape, generator=draw) * 0.1)
    return adapted, tensors


def logits(model: Magnet) -> torch.Tensor:
    draw = torch.Generator().manual_seed(9)
    codes = torch.randint(16, (2, 4, 24), generator=draw)
    states = torch.randn(2, 3, 8, generator=draw)
    text, masked = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 24, dtype=torch.bool)
    with torch.no_grad():
        return model.masked_logits(codes, CONFIG.stage(1), (states, text), masked)


def write(folder: Path, base: Magnet, tensors: dict[str, Any], lora: LoraConfig = LORA) -> str:
    write_adapter(folder, tensors, lora, "base", weights_hash(base.state_dict()))
    return str(folder)


@pytest.mark.parametrize("lora", [LORA, LoraConfig(4, include=("attention",), exclude=("cross",))])
def test_merged_weights_compute_what_adapters_compute(lora, tmp_path):
    base = network()
    adapted, tensors = trained(base, 1, lora)
    adapter = read_adapter(write(tmp_path / "a", base, tensors, lora))
    plain = network()
    plain.load_state_dict(merged(dict(base.state_dict()), [adapter]))
    assert (logits(plain) - logits(adapted)).abs().max() < 1e-5
    assert (logits(plain) - logits(base)).abs().max() > 1e-2
    training = {name for name, value in adapted.named_parameters() if value.requires_grad}
    assert training == tensors.keys()
    assert all(lora.selects(name) for name in training)


def test_strengths_add_up_and_zero_is_the_model_itself(tmp_path):
    base = network()
    weights = dict(base.state_dict())
    a, b = (write(tmp_path / str(i), base, trained(base, i)[1]) for i in (1, 2))
    both = merged(weights, [read_adapter(f"{a}:0.8"), read_adapter(f"{b}:-0.4")])
    for name, value in weights.items():
        parts = [merged(weights, [read_adapter(text)])[name] - value for text in (a, b)]
        assert torch.allclose(both[name], value + 0.8 * parts[0] - 0.4 * parts[1], atol=1e-5)
    none = merged(weights, [read_adapter(f"{a}:0")])
    assert all(torch.equal(none[name], value) for name, value in weights.items())


def test_wrong_adapters_are_refused(tmp_path):
    base = network()
    folder = write(tmp_path / "a", base, trained(base, 1)[1])
    with pytest.raises(UserError, match="trained on another model"):
        merged(dict(network(seed=1).state_dict()), [read_adapter(folder)])
    config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    for change, says in (
        ({"r": 8}, "its rank is not 8"),
        ({"r": "x"}, "r and lora_alpha must be above 0"),
        ({"lora_alpha": 10**400}, "r and lora_alpha must be above 0"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"peft_type": "IA3"}, "not a LoRA"),
    ):
        (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=says):
            read_adapter(folder)
    (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps(config))
    weights = tmp_path / "a" / WEIGHTS_FILE
    content = re.sub(rb"\[(\d+), ", rb"[-\1,", weights.read_bytes(), count=1)
    for make in (
        lambda: weights.write_bytes(content),  # a negative shape
        lambda: os.mkfifo(weights),  # which would block its reader
        lambda: (tmp_path / "a" / CONFIG_FILE).unlink() or os.mkfifo(tmp_path / "a" / CONFIG_FILE),
    ):
        weights.unlink()
        make()
        with pytest.raises(UserError, match=str(tmp_path / "a")):
            read_adapter(folder)
    with pytest.raises(UserError, match=r"--lora .*gone: no adapter"):
        read_adapter(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="no layer is selected"):
        adapt(network(), replace(LORA, include=("nothing",)), torch.Generator())


@pytest.mark.parametrize("lora", [LORA, LoraConfig(4, include=("attention",), exclude=("cross",))])
def test_peft_reads_the_adapter(lora, tmp_path):
    ensure_torchaudio_imports()  # peft imports transformers, which imports torchaudio
    peft = pytest.importorskip("peft")
    base = network()
    adapted, tensors = trained(base, 1, lora)
    folder = write(tmp_path / "a", base, tensors, lora)
    loaded = peft.PeftModel.from_pretrained(base, folder)
    ours = logits(adapted)
    assert (logits(loaded.base_model.model) - ours).abs().max() < 1e-5
    assert (logits(loaded.merge_and_unload()) - ours).abs().max() < 1e-5


def test_a_run_trains_averages_and_saves_only_adapters(tiny, tmp_path):
    tiny.save(tmp_path / "release", "# card\n")
    base = SavedModel.open(tmp_path / "release")
    lora = LoraConfig(rank=2, dropout=0.5)

    def fit(folder: Path, checkpoint: Path | None = None) -> MagnetModule:
        """Four steps, with checkpoints after two and four."""
        release = str(tmp_path / "release")
        module = MagnetModule(base.network, init_from=release, lora=lora, crop_s=0.4)
        draw = torch.Generator().manual_seed(0)
        shape, size = (2, tiny.codec.facts.num_codebooks, 10), tiny.codec.facts.codebook_size
        codes, valid = torch.randint(size, shape, generator=draw), torch.ones(2, 10) > 0
        batch = {"codes": codes, "valid": valid, "captions": ["a", ""]}
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
        quiet = ("logger", "enable_progress_bar", "enable_model_summary")
        settings: dict[str, Any] = dict.fromkeys(quiet, False)
        trainer = L.Trainer(
            max_steps=4, accelerator="cpu", callbacks=[WeightEMA(0.5, 1), saving], **settings
        )
        trainer.fit(module, DataLoader([batch] * 9, batch_size=None), ckpt_path=checkpoint)
        return module

    module = fit(tmp_path / "run")
    two, four = (tmp_path / f"run/step={step}.ckpt" for step in (2, 4))
    saved = torch.load(four, weights_only=True)
    check_checkpoint_weights(saved, four)
    assert all(".lora_" in name for name in saved["state_dict"] | saved["current_model_state"])
    assert len(saved["optimizer_states"][0]["state"]) == len(saved["state_dict"])
    frozen = {n: v for n, v in module.network.state_dict().items() if ".lora_" not in n}
    assert weights_hash(frozen) == saved["hyper_parameters"]["lora"]["base_hash"]
    # A checkpoint, and the adapter's folder on the release, are the same model.
    module.write_adapter(tmp_path / "adapter")
    one, other = SavedModel.open(four), base.with_adapters([str(tmp_path / "adapter")])
    weights, before, again = one.weights(), base.weights(), other.weights()
    assert all(torch.allclose(value, weights[name], atol=1e-6) for name, value in again.items())
    assert {n for n, v in before.items() if not torch.equal(v, weights[n])} == {
        name.removeprefix("network.").removesuffix(".lora_A") + ".weight"
        for name in saved["state_dict"]
        if name.endswith("A")
    }
    own = tmp_path / "of_itself.ckpt"
    settings = saved["hyper_parameters"] | {"init_from": str(own)}
    torch.save(saved | {"hyper_parameters": settings}, own)
    with pytest.raises(UserError, match=r"of_itself\.ckpt: "):
        SavedModel.open(own)
    # A resumed run is as if it had not been interrupted.
    fit(tmp_path / "resumed", two)
    resumed = torch.load(tmp_path / "resumed/step=4.ckpt", weights_only=True)
    for part in ("state_dict", "current_model_state"):
        for name, value in saved[part].items():
            assert torch.equal(value, resumed[part][name]), name
