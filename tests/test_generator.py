"""The generator: results independent of the batch, saving and loading, and clear errors."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
import torch

from magnet_train.common.errors import UserError
from magnet_train.decoding.decode import circular, guided_logits
from magnet_train.decoding.keep import Edit, Hints
from magnet_train.generator import Generated, Generator, load
from magnet_train.model import Magnet, MagnetConfig

PROMPTS = ["a slow chorale for string quartet in G minor", "banjo", ""]


def test_each_prompt_gets_what_it_gets_alone(tiny):
    together = tiny.generate(PROMPTS, seed=3).codes
    ties = 0
    for i, prompt in enumerate(PROMPTS):
        alone = tiny.generate([prompt], seed=3).codes[0]
        ties += int((alone != together[i]).sum())
    print(f"codes that differ by ties in floating point: {ties} of {together.numel()}")
    assert ties <= 0.005 * together.numel()


@pytest.mark.parametrize("negative", ["", "drums"])
def test_text_and_null_condition_in_one_pass_as_on_a_gpu(tiny, negative, monkeypatch):
    config = replace(tiny.decoding, negative_prompt=negative)
    size = tiny.network.config.codebook_size
    codes = torch.randint(size, (3, tiny.network.config.num_codebooks, 25))
    codes[:, 1:] = size

    def logits(stage: int, is_loop: bool) -> torch.Tensor:
        networks = tiny._networks(PROMPTS, config)
        assert (networks.joint is None) != Generator._joins_passes(tiny, config)
        networks = circular(networks, 25, 6) if is_loop else networks
        return guided_logits(networks, codes, stage, config, 0.7)

    cases = [(stage, is_loop) for stage in (1, 2) for is_loop in (False, True)]
    apart = [logits(*case) for case in cases]
    monkeypatch.setattr(Generator, "_joins_passes", lambda self, config: True)
    for case, one in zip(cases, apart, strict=True):
        assert torch.allclose(one, logits(*case), atol=1e-4), case


def test_audio_has_the_length_asked_for_and_the_prompt_survives(tiny):
    first = tiny.generate(["flute"], seed=1, duration_s=0.4)
    assert first.wav.shape == (1, 1, 6400) and first.sample_rate == 16_000
    more = tiny.generate(["flute"], seed=2, duration_s=1.0, prompt_codes=first.codes)
    assert torch.equal(more.codes[:, :, :10], first.codes)
    assert (more.order[:, :, :10] == -1).all() and (more.order[:, :, 10:] >= 0).all()


def test_equal_prompts_give_different_audio_and_a_text_is_one_prompt(tiny):
    made = tiny.generate(["flute"] * 3, duration_s=0.4).codes
    assert len({tuple(codes.flatten().tolist()) for codes in made}) == 3
    assert torch.equal(tiny.generate("flute", duration_s=0.4).codes, made[:1])


@pytest.mark.parametrize("seconds", [None, 0.12, 0.46, 1.3])
def test_the_references_decoding_takes_every_length(tiny, seconds):
    config = replace(tiny.decoding, reference_compat=True)
    made = tiny.generate(["flute"], duration_s=seconds, decoding=config)
    num_frames = round((seconds or tiny.crop_s) * 25)
    assert made.codes.shape[2] <= num_frames < made.codes.shape[2] + config.span_len
    with pytest.raises(UserError, match="2 frames are shorter than a span of 3"):
        tiny.generate(["flute"], duration_s=0.08, decoding=config)


def test_results_are_saved_and_played_levelled(tmp_path, monkeypatch):
    shape = torch.zeros(2, 1, 4)
    noise = torch.randn(2, 1, 16_000, generator=torch.Generator().manual_seed(0))
    made = Generated(shape.long(), 3 * noise, 16_000, shape)
    paths = made.save(tmp_path / "a.flac")
    assert [path.name for path in paths] == ["a-0.flac", "a-1.flac"]
    wav, rate = soundfile.read(paths[1])
    assert len(wav) == rate == 16_000 and 0.1 < abs(wav).max() < 0.9
    assert replace(made, wav=noise[:1]).save(tmp_path / "b.wav") == [tmp_path / "b.wav"]
    with pytest.raises(UserError, match=r"b\.txt: cannot be written"):
        made.save(tmp_path / "b.txt")
    shown: list[Any] = []
    display = SimpleNamespace(Audio=lambda wav, **_: wav.shape, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    made.play()
    assert shown == [(1, 16_000)] * 2
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(UserError, match="save"):
        made.play()


def test_a_release_comes_back_as_it_was(tiny, tmp_path):
    tiny.save(tmp_path / "release", "# card\n")
    again = load(tmp_path / "release")
    assert torch.equal(
        again.generate(["harp"], seed=5).codes, tiny.generate(["harp"], seed=5).codes
    )
    assert again.decoding == tiny.decoding and again.crop_s == tiny.crop_s


def test_another_codec_is_refused(tiny):
    other = Magnet(MagnetConfig(dim=32, num_heads=2, num_layers=1, codebook_size=64, text_dim=384))
    with pytest.raises(UserError, match="codebooks of 256 entries"):
        Generator(other, tiny.codec, tiny.text_encoder, tiny.decoding, 1.0)


def music(seconds, rate=44_100, channels=2):
    time = torch.arange(round(seconds * rate)) / rate
    notes = torch.sin(2 * torch.pi * 220 * time * 2 ** (time.long() % 5 / 12).float())
    return 0.1 * torch.stack([notes, 0.8 * notes][:channels])


def test_a_region_changes_and_all_samples_outside_are_those_of_the_recording(tiny):
    wav = music(2.2)
    first, second = tiny.edit(wav, 44_100, Edit(((0.4, 0.8), (1.2, 1.6))), "flute", variations=2)
    out, inside = first.wav, torch.zeros(wav.shape[1], dtype=torch.bool)
    for start, end in ((0.4, 0.8), (1.2, 1.6)):
        inside[round(start * 44_100) : round(end * 44_100)] = True
    assert out.shape == wav.shape and torch.equal(out[:, ~inside], wav[:, ~inside])
    assert (out[:, inside] - wav[:, inside]).abs().mean() > 1e-3
    assert torch.equal(first.codes[first.given], second.codes[first.given])
    assert not torch.equal(first.codes, second.codes)
    assert first.given.sum() == 5 * (55 - 20) and (first.unmask_step[first.given] == -1).all()
    again = tiny.edit(wav, 44_100, Edit(((0.4, 0.8), (1.2, 1.6))), "flute", seed=1)[0]
    assert torch.equal(again.codes, second.codes)


def test_a_continuation_has_the_length_asked_for_and_the_memory_of_one_window(tiny):
    wav, longest = music(1.5, 16_000, 1), 0
    encode = tiny.network.embedded

    def watched(codes):
        nonlocal longest
        longest = max(longest, codes.shape[2])
        return encode(codes)

    tiny.network.embedded = watched
    try:
        (made,) = tiny.edit(wav, 16_000, Edit(to_s=6.3))
    finally:
        del tiny.network.embedded
    blocks = list(made.blocks())
    assert longest == 25 and sum(b.shape[1] for b in blocks) == round(6.3 * 16_000)
    kept = int(made.given.all(0).sum()) * 640
    assert kept == 37 * 640 and torch.equal(made.wav[:, :kept], wav[:, :kept])
    long = tiny.generate(["flute"], duration_s=2.0)
    assert torch.equal(long.codes[:, :, :25], tiny.generate(["flute"], duration_s=1.0).codes)


def test_prompts_change_where_the_timeline_says(tiny):
    asked = []
    text = tiny._text

    def watched(prompts, config):
        asked.append(prompts[0])
        return text(prompts, config)

    tiny._text = watched
    try:
        cues = [(0.0, "flute"), (1.5, "organ"), (2.0, "")]
        (made,) = tiny.edit(music(1.0, 16_000, 1), 16_000, Edit(to_s=3.0), cues)
    finally:
        del tiny._text
    assert [x for x in dict.fromkeys(asked) if x] == ["flute", "organ"] and asked[-2] == ""
    assert (made.unmask_step[:, 25:] >= 0).all()


@pytest.mark.parametrize("seconds", [0.8, 0.75])
def test_a_loop_is_exact_to_the_sample_and_keeps_what_it_should(tiny, seconds):
    wav = music(2.0, 44_100, 1)
    edit = Edit(loop_s=seconds, loop_start_s=0.5, seam_s=0.16)
    out = tiny.edit(wav, 44_100, edit)[0].wav
    size, start = round(seconds * 44_100), 22_050
    assert out.shape == (1, size)
    middle = slice(round(0.25 * size), round(0.75 * size))
    assert torch.equal(out[:, middle], wav[:, start : start + size][:, middle])
    assert tiny.generate(["flute"], duration_s=seconds, loop=True).wav.shape[2] == 16_000 * seconds
    with pytest.raises(UserError, match="must be between"):
        tiny.generate(["flute"], duration_s=1.5, loop=True)


def test_hints_stay_and_the_audio_of_the_region_is_decoded(tiny):
    wav = music(1.0, 16_000, 1)
    hints = Hints(hint_period_s=0.2, hint_codebooks=2, keep_fine=1)
    (made,) = tiny.edit(wav, 16_000, Edit(hints=hints))
    assert made.given[4].all() and made.given[:2].any(1).all() and not made.given[2:4].any()
    assert not torch.equal(made.wav, wav)


def test_a_negative_prompt_takes_the_place_of_the_null_condition(tiny):
    decoding = replace(tiny.decoding, max_cfg_coef=5.0, negative_prompt="drums")
    away = tiny.generate(["flute"], decoding=decoding).codes
    null = replace(decoding, negative_prompt="")
    assert not torch.equal(away, tiny.generate(["flute"], decoding=null).codes)
    same = replace(decoding, negative_prompt="flute")
    assert torch.equal(
        tiny.generate(["flute"], decoding=same).codes,
        tiny.generate(
            ["flute"], decoding=replace(same, max_cfg_coef=1.0, negative_prompt="")
        ).codes,
    )
