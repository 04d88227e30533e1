"""CLAP: mapping of LAION's names to ClapModel, equal embeddings, crops, and refused files."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_networks import TOKENS, named_weights, wave
from make_components import make_roberta_tokenizer
from torch import Tensor

from magnet_train.common.downloads import CLAP_MUSIC, Weights, WeightsFile
from magnet_train.common.errors import UserError
from magnet_train.metrics.networks import clap as clap_module
from magnet_train.metrics.networks.clap import (
    CONFIG,
    FEATURES,
    WINDOW,
    Clap,
    check_captions,
    load_clap,
    make_clap,
    ten_seconds,
    to_transformers,
)

FIXTURES = Path(__file__).parent / "fixtures" / "metrics"
FRONTENDS = json.loads((FIXTURES / "frontends.json").read_text())
GOLD = json.loads((FIXTURES / "networks.json").read_text())
TINY: dict[str, Any] = {
    "text_config": CONFIG["text_config"]
    | {
        "vocab_size": 300,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 48,
        "max_position_embeddings": 100,
    },
    "audio_config": CONFIG["audio_config"]
    | {
        "depths": [2, 2, 2, 2],
        "num_attention_heads": [1, 2, 2, 4],
        "patch_embeds_hidden_size": 8,
        "hidden_size": 64,
    },
    "projection_dim": 16,
}
UNUSED = {
    "audio_branch.spectrogram_extractor.stft.conv_real.weight": (3, 1, 4),
    "audio_branch.logmel_extractor.melW": (3, 4),
    "audio_branch.tscam_conv.weight": (5, 64, 2, 3),
    "audio_branch.head.weight": (5, 5),
    "audio_branch.layers.0.blocks.1.attn_mask": (64, 64, 64),
    "audio_branch.layers.0.blocks.1.attn.relative_position_index": (64, 64),
    "audio_transform.sequential.0.weight": (16, 16),
    "text_transform.sequential.3.bias": (16,),
    "text_branch.embeddings.position_ids": (1, 100),
}


def laion_name(name: str) -> str:
    """The inverse of the name mapping, from the list of names in LAION's sources."""
    if name.startswith("text_model."):
        return name.replace("text_model.", "text_branch.", 1)
    if "_projection." in name:
        return name.replace("linear1", "0").replace("linear2", "2")
    name = name.replace("audio_model.audio_encoder.", "audio_branch.").replace("batch_norm", "bn0")
    for theirs, ours in {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.output.dense": "attn.proj",
        "attention.self": "attn",
        "intermediate.dense": "mlp.fc1",
    }.items():
        name = name.replace(theirs, ours)
    return name.replace("output.dense", "mlp.fc2")


def tiny_model() -> Any:
    from transformers import ClapConfig, ClapModel

    return ClapModel(ClapConfig(**TINY))


@pytest.fixture(scope="module")
def laion_state() -> dict[str, Tensor]:
    """A tiny checkpoint with LAION's names, fused query, key and value; weights seeded by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, x in tiny_model().state_dict().items():
        if name.endswith(
            ("position_ids", "token_type_ids", "relative_position_index", "num_batches_tracked")
        ):
            continue
        name, shape = laion_name(name), tuple(x.shape)
        if name.startswith("audio_branch") and ".attn.query." in name:
            name, shape = name.replace("query", "qkv"), (3 * shape[0], *shape[1:])
        if not (
            name.startswith("audio_branch") and (".attn.key." in name or ".attn.value." in name)
        ):
            shapes[name] = shape
    return named_weights(shapes | UNUSED) | {
        "audio_branch.bn0.num_batches_tracked": torch.tensor(9)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clap")
    assert make_roberta_tokenizer(folder / "tokenizer", 300) == 300
    return folder


def saved(path: Path, state: dict[str, Tensor], **others: object) -> WeightsFile:
    """A checkpoint in the format of LAION's multi-GPU training."""
    torch.save(
        {"epoch": 15, "state_dict": {f"module.{name}": x for name, x in state.items()}} | others,
        path,
    )
    return WeightsFile(path, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture(scope="module")
def clap(folder: Path, laion_state: dict[str, Tensor]) -> Clap:
    return make_clap(saved(folder / "clap.pt", laion_state), TINY, str(folder / "tokenizer"))


# --- LAION's checkpoint ---------------------------------------------------------------------------


def test_the_names_are_laions(laion_state: dict[str, Tensor]):
    """As in LAION's classes, except for buffers and the enclosing classes' parameters."""
    theirs = {
        name for name in GOLD["clap_names"] if not name.endswith(("attn_mask", "index", "_ids"))
    }
    theirs -= {name for name in theirs if ".tscam_conv." in name or ".head." in name}
    assert theirs == laion_state.keys() - UNUSED.keys()


def test_every_tensor_arrives_and_no_unused_one(clap: Clap, laion_state: dict[str, Tensor]):
    ours = clap.model.state_dict()
    needed = {name for name in ours if not name.endswith(clap_module._COMPUTED)}
    renamed = to_transformers(laion_state, needed)
    assert renamed.keys() == needed
    for name, x in renamed.items():
        torch.testing.assert_close(ours[name], x, rtol=0, atol=0)
    qkv = laion_state["audio_branch.layers.1.blocks.0.attn.qkv.bias"]
    layer = "audio_model.audio_encoder.layers.1.blocks.0.attention.self."
    torch.testing.assert_close(
        torch.cat([ours[f"{layer}{part}.bias"] for part in ("query", "key", "value")]), qkv
    )
    assert not clap.model.training and not any(p.requires_grad for p in clap.model.parameters())


def test_audio_is_laions(clap: Clap):
    """Reference values are from LAION's classes with the same weights and mel bands."""
    found = clap.embed_audio(wave(150_000, 48_000))
    torch.testing.assert_close(found, torch.tensor(GOLD["clap"]["audio"]), rtol=0, atol=1e-5)


def test_text_is_laions(clap: Clap):
    """Reference values are from RobertaModel; ClapTextConfig's default epsilon changes the fourth
    digit.
    """
    ids = torch.tensor([TOKENS + [1] * (77 - len(TOKENS))])
    found = clap.model.get_text_features(ids, (ids != 1).long()).pooler_output[0]
    torch.testing.assert_close(found, torch.tensor(GOLD["clap"]["text"]), rtol=0, atol=1e-6)


def test_the_real_configuration_is_of_200_million_parameters():
    from transformers import ClapConfig, ClapModel

    with torch.device("meta"):
        model = ClapModel(ClapConfig(**CONFIG))
    # LAION's package has 199.6 million, including 5.7 million unused parameters of a classifier,
    # two transforms and mel filters.
    assert sum(p.numel() for p in model.parameters()) == 193_913_882
    assert model.config.audio_config.hidden_size == 1024
    assert model.config.text_config.layer_norm_eps == 1e-5


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"audio_branch.norm.weight": None},
            r"missing tensors: 1, such as audio_model\.audio_encoder\.norm\.weight",
        ),
        (
            {"text_projection.0.weight": torch.zeros(2, 2)},
            "not CLAP of the expected kind: .*size mismatch",
        ),
        ({"text_projection.0.weight": "a word"}, "has more than named tensors"),
    ],
)
def test_another_checkpoint_is_named(
    folder: Path, laion_state: dict[str, Tensor], changes: dict[str, Any], message: str
):
    state = {name: x for name, x in (laion_state | changes).items() if x is not None}
    with pytest.raises(UserError, match=message) as error:
        make_clap(saved(folder / "other.pt", state), TINY, str(folder / "tokenizer"))
    assert "other.pt" in str(error.value) and "\n" not in str(error.value)


def test_the_published_one_loads_by_its_hash(
    folder: Path, laion_state: dict[str, Tensor], clap: Clap, monkeypatch: pytest.MonkeyPatch
):
    """The public loader with a tiny model. With random weights all captions have similar
    embeddings, which the check reports.
    """
    file = saved(folder / "published.pt", laion_state)
    monkeypatch.setattr(clap_module, "CONFIG", TINY)
    tokenizer = str(folder / "tokenizer")
    with pytest.raises(UserError, match=r"published\.pt: SHA-256 is .*, not fae3e9c0"):
        load_clap(str(file.path), tokenizer)
    tiny = Weights("CLAP", CLAP_MUSIC.url, 1, "CC0-1.0", file.sha256)
    monkeypatch.setattr(clap_module, "CLAP_MUSIC", tiny)
    with pytest.raises(UserError, match=r"two unrelated captions have cosine 0\.9"):
        load_clap(str(file.path), tokenizer)
    monkeypatch.setattr(clap_module, "check_captions", lambda clap: None)
    loaded = load_clap(str(file.path), tokenizer)
    assert loaded.hash == file.sha256[:16]
    torch.testing.assert_close(loaded.embed_text(["a waltz"]), clap.embed_text(["a waltz"]))


@pytest.mark.parametrize("cosine, is_good", [(0.2, True), (0.95, False), (float("nan"), False)])
def test_the_check_of_captions(
    clap: Clap, monkeypatch: pytest.MonkeyPatch, cosine: float, is_good: bool
):
    vectors = torch.tensor([[1.0, 0.0], [cosine, 0.0]])
    monkeypatch.setattr(clap, "embed_text", lambda captions: vectors)
    if is_good:
        check_captions(clap)
    else:
        with pytest.raises(UserError, match=r"far below 0\.9"):
            check_captions(clap)


# --- captions -------------------------------------------------------------------------------------


def test_a_caption_is_embedded_as_it_would_be_alone(clap: Clap):
    captions = [
        "a slow waltz",
        "",
        "a fast reel on the flute with guitar at 120 beats per minute " * 9,
    ]
    together = clap.embed_text(captions)
    assert together.shape == (3, 16)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    alone = torch.cat([clap.embed_text([caption]) for caption in captions])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    cut = clap.embed_text([captions[2] + " and more"])  # behind the 77 tokens that are read
    torch.testing.assert_close(cut, together[2:])


def test_another_tokenizer_is_named(folder: Path, laion_state: dict[str, Tensor], tmp_path: Path):
    file = saved(folder / "clap.pt", laion_state)
    make_roberta_tokenizer(tmp_path / "small", 280)
    with pytest.raises(UserError, match="280 tokens instead of 300"):
        make_clap(file, TINY, str(tmp_path / "small"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"CLAP tokenizer .*no config\.json or tokenizer_config\.json"
    ):
        make_clap(file, TINY, str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"CLAP tokenizer 'roberta-base': .*HF_HUB_OFFLINE"):
        make_clap(file, TINY, "roberta-base")


# --- clips ----------------------------------------------------------------------------------------


def test_the_feature_extractor_is_set_as_laion_computes():
    required = FRONTENDS["hf_feature_extractor"]["required"]
    assert required == FEATURES


@pytest.mark.parametrize(
    "case", FRONTENDS["clap_repeatpad"]["cases"], ids=lambda c: str(c["samples"])
)
def test_ten_seconds_of_a_clip(case: dict):
    wav = 1 + torch.arange(case["samples"], dtype=torch.float64)  # no zeros of its own
    heard = ten_seconds(wav, "clip")
    assert len(heard) == WINDOW
    if case["random_crop"]:
        assert (heard.diff() == 1).all()
    else:
        assert (heard == 0).sum() == case["zeros"]
        assert (heard == 1).sum() == case["n_repeat"]
        torch.testing.assert_close(heard[: len(wav)], wav)


def test_a_crop_is_a_function_of_the_name():
    wav = torch.arange(30 * 48_000)
    starts = {key: int(ten_seconds(wav, key)[0]) for key in "abcdefgh"}
    assert len(set(starts.values())) == len(starts)
    assert all(int(ten_seconds(wav, key)[0]) == start for key, start in starts.items())
    assert starts["a"] == int.from_bytes(hashlib.sha256(b"0/a").digest()[:8], "little") % 960_001


def test_a_long_clip_is_heard_by_its_crop(clap: Clap):
    wav = torch.cat([wave(WINDOW, 48_000), torch.zeros(WINDOW)])
    first = clap.embed_audio(wav, "a")
    assert first.shape == (16,) and first.norm().item() == pytest.approx(1)
    torch.testing.assert_close(first, clap.embed_audio(ten_seconds(wav, "a"), "other"))
    assert (first - clap.embed_audio(wav, "b")).abs().max() > 1e-4


def test_silence_is_heard(clap: Clap):
    assert torch.isfinite(clap.embed_audio(torch.zeros(48_000))).all()


@pytest.mark.parametrize(
    "wav, message",
    [
        (torch.zeros(0), "an empty clip"),
        (torch.zeros(2, 48_000), r"shape \(2, 48000\)"),
        (torch.full((48_000,), float("nan")), "NaN or infinite"),
    ],
)
def test_bad_clips_are_named(clap: Clap, wav: Tensor, message: str):
    with pytest.raises(UserError, match=message):
        clap.embed_audio(wav)


def test_a_missing_laion_clap_is_one_line(
    folder: Path, laion_state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
):
    file = saved(folder / "clap.pt", laion_state)
    monkeypatch.setitem(sys.modules, "laion_clap", None)
    monkeypatch.setattr(
        clap_module, "CLAP_MUSIC", Weights("CLAP", CLAP_MUSIC.url, 1, "CC0-1.0", "")
    )
    with pytest.raises(UserError, match=r"pip install -e '\.\[laion-clap\]'") as error:
        load_clap(str(file.path), package=True)
    assert "\n" not in str(error.value)
