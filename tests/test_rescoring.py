"""Rescoring: scripted rescorers test the mixture, a tiny MusicGen tests a real one."""

import dataclasses
import json
from pathlib import Path

import pytest
import soundfile
import torch
from make_components import make_musicgen
from test_decoding import SIZE, scripted

from magnet_train.__main__ import main
from magnet_train.common.errors import UserError
from magnet_train.decoding.decode import DecodingConfig, Networks, decode, item_noise
from magnet_train.decoding.load_rescorer import check_rescorer
from magnet_train.decoding.rescoring import (
    MagnetRescorer,
    MusicGenRescorer,
    load_musicgen,
    mixed_certainty,
)
from magnet_train.generator import Generator
from magnet_train.layout import delayed
from magnet_train.model import Magnet
from magnet_train.release import SavedModel

BASE = DecodingConfig(
    decoding_steps=(6, 3, 2, 2), top_p=1.0, span_len=1, max_cfg_coef=1.0, anneal_temperature=False
)


def decoded(rescorer=None, networks=None, on_step=None, **settings) -> torch.Tensor:
    config = dataclasses.replace(BASE, **({"rescorer": "scripted"} if rescorer else {}), **settings)
    codes = torch.zeros(2, 4, 20, dtype=torch.long)
    noise = item_noise(0, ["a", "b"], 13, 20)
    networks = networks or Networks(scripted(1), scripted(2))
    networks = networks._replace(rescorer=rescorer)
    given = torch.zeros(2, 20, dtype=torch.bool)
    return decode(networks, codes, given, SIZE, config, noise, on_step)


def other(codes: torch.Tensor, masked: torch.Tensor, stage: int) -> torch.Tensor:
    return scripted(9)(codes, stage)


def test_at_weight_0_nothing_changes_and_above_it_the_order_does():
    alone = decoded()
    assert torch.equal(decoded(other, rescorer_weight=0.0), alone)
    assert not torch.equal(decoded(other, rescorer_weight=1.0), alone)
    by_stage = decoded(other, rescorer_weight=1.0, rescore_stages=(0,))
    assert not torch.equal(by_stage[:, 0], alone[:, 0])
    later = decoded(other, rescorer_weight=1.0, rescore_stages=(3,))
    assert torch.equal(later[:, :3], alone[:, :3])


def test_one_number_per_step_the_last_for_all_further():
    assert torch.equal(
        decoded(other, rescorer_weight=(0.7, 0.7)), decoded(other, rescorer_weight=0.7)
    )
    at_first = decoded(other, rescorer_weight=(1.0, 0.0))
    assert not torch.equal(at_first, decoded())
    assert not torch.equal(at_first, decoded(other, rescorer_weight=1.0))
    assert torch.equal(
        decoded(other, rescorer_temperature=(2.0,)), decoded(other, rescorer_temperature=2.0)
    )


def test_a_rescorer_that_trusts_the_last_frames_keeps_them():
    """Chosen codes have probability 1 from frame 10 on, and 0 before, which are masked again."""

    def trusts_the_end(codes: torch.Tensor, masked: torch.Tensor, stage: int) -> torch.Tensor:
        logits = torch.zeros(*codes.shape[::2], SIZE).scatter(2, codes[:, stage, :, None], 50.0)
        return torch.where(torch.arange(20)[:, None] < 10, -logits, logits)

    steps = []
    decoded(trusts_the_end, rescorer_weight=1.0, on_step=steps.append)
    half = next(s for s in steps if s.stage == 0 and s.masked.sum(1).max() <= 10)
    assert not half.masked[:, 10:].any()


def test_the_mixture_is_of_probabilities():
    logits, chosen = torch.randn(2, 5, SIZE), torch.randint(SIZE, (2, 5))
    certainty = torch.rand(2, 5)
    theirs = (logits / 2).softmax(-1).gather(2, chosen[..., None])[..., 0]
    found = mixed_certainty(certainty, logits, chosen, weight=0.3, temperature=2.0)
    assert torch.allclose(found, 0.7 * certainty + 0.3 * theirs)


def test_a_magnet_reads_the_frames_of_the_step_masked(tiny):
    """Frames predicted in the step are masked; its passes equal those of its own decoding."""
    reading = MagnetRescorer(tiny.network, tiny.text_encoder).reading(["flute", ""])
    size = tiny.codec.facts.codebook_size
    codes = torch.randint(size, (2, tiny.codec.facts.num_codebooks, 25))
    masked = torch.rand(2, 25) < 0.5
    changed = codes.clone()
    changed[:, 1] = torch.where(masked, (codes[:, 1] + 1) % size, codes[:, 1])
    assert torch.equal(reading(codes, masked, 1), reading(changed, masked, 1))
    assert not torch.equal(reading(codes, masked, 1), reading(codes, ~masked, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rescorer_weight": 1.5}, "rescorer_weight=1.5 must be from 0 to 1"),
        ({"rescorer_weight": (0.5, -0.1)}, "from 0 to 1"),
        ({"rescorer_weight": ()}, r"rescorer_weight=\[\] has no number"),
        ({"rescorer_temperature": 0.0}, "above 0"),
        ({"rescore_stages": (-1,)}, "must be at least 0"),
        ({"rescorer": "x", "reference_compat": True}, "reference_compat"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        DecodingConfig(**settings)


# --- the models -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def musicgen(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("musicgen")
    make_musicgen(folder)
    return folder


@torch.no_grad()
def test_musicgen_reads_every_frame_with_finite_numbers_equal_to_transformers(musicgen):
    rescorer = MusicGenRescorer(*load_musicgen(str(musicgen)))
    codes = torch.randint(2048, (2, 4, 30))
    codes[:, 3] = 2048  # stage 2: the codebook above is not known yet
    prompts = ["a slow waltz", ""]
    reading = rescorer.reading(prompts)
    model = rescorer.model
    # transformers' own delay pattern, made for T + K columns, and its own text.
    ids = torch.cat([torch.full((8, 1), 2048), codes.flatten(0, 1)], 1)
    pattern = model.decoder.build_delay_pattern_mask(ids, 2048, max_length=30 + 4)
    columns = pattern[0] if isinstance(pattern, tuple) else pattern
    filled = delayed(codes, 2048).flatten(0, 1)
    assert torch.equal(columns[:, :31][:, 1:31], filled[:, 1:31])
    tokens = rescorer.text_encoder._tokenizer(prompts[:1], return_tensors="pt")
    whole = model(**tokens, decoder_input_ids=filled[:4]).logits.unflatten(0, (1, 4))
    for stage in range(3):
        log_p = reading(codes, torch.ones(2, 30, dtype=torch.bool), stage).log_softmax(-1)
        assert log_p.shape == (2, 30, 2048) and log_p.isfinite().all()
        wanted = whole[0, stage, stage : stage + 30].log_softmax(-1)
        assert torch.allclose(log_p[0], wanted, atol=2e-5)


@torch.no_grad()
def test_musicgen_sees_only_what_comes_before(musicgen):
    rescorer = MusicGenRescorer(*load_musicgen(str(musicgen)))
    codes = torch.randint(2048, (1, 4, 30))
    reading, all_frames = rescorer.reading(["flute"]), torch.ones(1, 30, dtype=torch.bool)
    changed = codes.clone()
    changed[:, 1, 12] = (codes[:, 1, 12] + 1) % 2048  # in column 14
    for stage in range(4):
        moved = reading(codes, all_frames, stage) != reading(changed, all_frames, stage)
        assert moved.any(-1)[0].nonzero()[0].item() == 14 - stage


def test_other_codes_are_refused_before_a_model_is_loaded(musicgen, tiny, tmp_path):
    with pytest.raises(UserError, match=f"rescorer={musicgen}: its codes have num_codebooks=4"):
        check_rescorer(str(musicgen), tiny.codec.facts.to_dict())
    tiny.save(tmp_path / "release", "# card\n")
    known = {"num_codebooks": 5, "codebook_size": 256, "hash": "another"}
    with pytest.raises(UserError, match="hash="):
        check_rescorer(str(tmp_path / "release"), known)
    for change, message in (
        ({"model_type": "musicgen_melody"}, "melody"),
        ({"decoder": {"audio_channels": 2}}, "stereo"),
    ):
        folder = tmp_path / message
        folder.mkdir()
        config = json.loads((musicgen / "config.json").read_text())
        config = {**config, **{k: v for k, v in change.items() if k != "decoder"}}
        config["decoder"] |= change.get("decoder", {})
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=message):
            check_rescorer(str(folder), known)


REFUSED = [
    ("generate -p a --decoding.rescorer_weight .nan", "rescorer_weight nan: not a finite number"),
    ("generate -p a --decoding.rescorer_weight [0.5,1.5]", "must be from 0 to 1"),
    ("generate -p a --decoding.rescore_stages [5]", "the model has stages 0 to 4"),
    ("generate -p a --checkpoint autoregressive --decoding.rescorer demo", "nothing in parallel"),
    *(
        (
            f"{verb} --decoding.rescorer MUSICGEN",
            "rescorer=MUSICGEN: its codes have num_codebooks=4",
        )
        for verb in (
            "generate -p a",
            "edit a.wav --to_s 9",
            "evaluate --prompts p.txt --checkpoint demo",
        )
    ),
    *(
        (f"{verb} --checkpoint hybrid --decoding.autoregressive_s 9.5", "longer than the result")
        for verb in ("generate -p a", "edit a.wav --to_s 9", "evaluate --prompts p.txt")
    ),
    ("fit --generation.decoding.rescorer MUSICGEN", "rescorer=MUSICGEN: its codes have"),
    ("fit --model.distil_guidance true", "give --model.init_from RELEASE"),
    ("fit --model.init_from MUSICGEN", "a MusicGen; convert it first: magnet_train convert"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_bad_input_is_refused_in_one_line_before_weights_are_read(
    line, message, musicgen, tiny, tmp_path, monkeypatch, capsys
):
    for order in ("hybrid", "autoregressive"):
        network = Magnet(dataclasses.replace(tiny.network.config, order=order))
        Generator(network, tiny.codec, tiny.text_encoder, tiny.decoding, 1.0).save(tmp_path / order)
    soundfile.write(tmp_path / "a.wav", torch.zeros(16_000).numpy(), 16_000)
    (tmp_path / "p.txt").write_text("a waltz\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SavedModel, "weights", lambda self: pytest.fail("weights are read"))
    args = line.replace("MUSICGEN", str(musicgen)).split()
    assert main(args) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message.replace("MUSICGEN", str(musicgen)) in last


def test_generate_rescores_by_another_release(tiny, tmp_path):
    tiny.save(tmp_path / "release", "# card\n")
    config = dataclasses.replace(tiny.decoding, rescorer=str(tmp_path / "release"))
    one = tiny.generate(["harp"], seed=5, decoding=config).codes
    zero = dataclasses.replace(config, rescorer_weight=0.0)
    alone = tiny.generate(["harp"], seed=5).codes
    assert torch.equal(tiny.generate(["harp"], seed=5, decoding=zero).codes, alone)
    assert one.shape == (1, tiny.codec.facts.num_codebooks, 25)
