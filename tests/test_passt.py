"""PaSST: front end and segments compared with independent values, the network with hear21passt."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_errors import refusal
from helpers_networks import named_weights, wave
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.metrics.networks.frontend import mel_filters
from magnet_train.metrics.networks.passt import Passt, load_passt

FIXTURES = Path(__file__).parent / "fixtures" / "metrics"
GOLD = json.loads((FIXTURES / "networks.json").read_text())
SEGMENTS = json.loads((FIXTURES / "frontends.json").read_text())["passt"]["examples"]


def small(segment_s: int = 20) -> Passt:
    """A narrow network with weights seeded by name."""
    network = Passt(segment_s, width=24, layers=2, heads=3)
    network.load_state_dict(
        named_weights({name: x.shape for name, x in network.state_dict().items()})
    )
    return network.eval().requires_grad_(False)


# --- front end ------------------------------------------------------------------------------------


def test_log_mel_is_the_fixtures():
    with np.load(FIXTURES / "passt_frontend.npz") as file:
        wav, expected = (torch.from_numpy(file[key]) for key in ("waveform_32k", "mel"))
    found = small().log_mel(wav)
    assert found.shape == (128, 100)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=2e-4)


def test_mel_filters_are_kaldis():
    """Triangles with a maximum of one; neighbouring filters overlap and sum to one."""
    filters = mel_filters(32_000, 1024, 128, "htk", highest=15_000)
    assert filters.shape == (128, 513)
    assert filters[:, 0].sum() == 0 and filters[:, 481:].sum() == 0  # 0 Hz, above 15 kHz
    torch.testing.assert_close(filters[:, 1:460].sum(0), torch.ones(459))


@pytest.mark.parametrize("case", SEGMENTS, ids=lambda c: f"{c['clip_s']} s by {c['seg_s']} s")
def test_segments_of_a_clip(case: dict):
    segments = small(case["seg_s"]).segments(torch.zeros(round(case["clip_s"] * 32_000)))
    assert [len(s) / 32_000 for s in segments] == case["segments"]


def test_the_shortest_segment_is_longer_than_150_ms():
    network = small()
    assert [len(s) for s in network.segments(torch.zeros(640_000 + 4801))] == [640_000, 4801]
    assert [len(s) for s in network.segments(torch.zeros(640_000 + 4800))] == [640_000]
    assert network(wave(4801, 32_000)).logits.shape == (1, 527)
    assert "0.150 s is too short for passt-20s" in refusal(network, wave(4800, 32_000))


# --- network --------------------------------------------------------------------------------------


@pytest.mark.parametrize("segment_s, parameters", [(10, 86_153_758), (20, 86_231_326)])
def test_parameters_and_names_are_the_packages(segment_s: int, parameters: int):
    with torch.device("meta"):
        network = Passt(segment_s)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network.state_dict().keys() >= {
        "cls_token",
        "dist_token",
        "patch_embed.proj.weight",
        "head.1.weight",
    }
    assert network.state_dict()["blocks.11.attn.qkv.weight"].shape == (2304, 768)
    assert network.state_dict()["freq_new_pos_embed"].shape == (1, 768, 12, 1)
    assert network.state_dict()["time_new_pos_embed"].shape == (
        1,
        768,
        1,
        {10: 99, 20: 200}[segment_s],
    )


@pytest.mark.parametrize("segment_s", [10, 20])
def test_the_network_is_hear21passts(segment_s: int):
    """Reference values are from hear21passt's classes with the same weights and front end."""
    found, gold = small(segment_s)(wave(segment_s * 32_000, 32_000)), GOLD[f"passt_{segment_s}s"]
    assert found.logits.shape == (1, 527) and found.features.shape == (1, 24)
    torch.testing.assert_close(
        found.logits[0, :64], torch.tensor(gold["logits"]), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(found.features[0], torch.tensor(gold["features"]), rtol=0, atol=1e-4)


def test_each_segment_is_classified_alone():
    network, wav = small(10), wave(12 * 32_000, 32_000)
    whole = network(wav)
    assert whole.logits.shape == (2, 527) and not whole.logits.requires_grad
    torch.testing.assert_close(whole.logits[1:], network(wav[320_000:]).logits)
    torch.testing.assert_close(whole.features[:1], network(wav[:320_000]).features)


def test_silence_is_heard():
    assert torch.isfinite(small()(torch.zeros(32_000)).logits).all()


@pytest.mark.parametrize(
    "wav, message",
    [
        (torch.zeros(0), "at least 0.150 s"),
        (torch.zeros(2, 32_000), r"shape \(2, 32000\)"),
        (torch.full((32_000,), float("nan")), "NaN or infinite"),
    ],
)
def test_bad_clips_are_named(wav: Tensor, message: str):
    with pytest.raises(UserError, match=message):
        small()(wav)


def test_weights_load_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The 20 s file has no published hash, so any file is accepted; the 10 s file has one."""
    monkeypatch.setattr(
        "magnet_train.metrics.networks.passt.Passt", lambda segment_s: Passt(segment_s, 24, 2, 3)
    )
    path = tmp_path / "passt.pt"
    torch.save(small(20).state_dict(), path)
    network = load_passt(str(path))
    assert len(network.hash) == 16 and not network.training
    wav = wave(32_000, 32_000)
    torch.testing.assert_close(network(wav).logits, small(20)(wav).logits)
    assert "passt.pt: SHA-256 is" in refusal(load_passt, str(path), 10)
