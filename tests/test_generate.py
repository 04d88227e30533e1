"""`generate`: its files, and errors before a model is loaded."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from magnet_train.cli.generate import GenerateOptions, all_prompts, generate, list_jobs
from magnet_train.common.audio_files import slug
from magnet_train.common.errors import UserError

NOTHING: dict[str, object] = {}
QUICK = {"decoding_steps": (4, 1, 1, 1)}


@given(st.lists(st.text(min_size=1, max_size=3)), st.integers(0, 99), st.integers(1, 3))
def test_every_prompt_and_variation_has_its_own_file(prompts, seed, variations):
    jobs = list_jobs(prompts, seed, variations)
    assert len(set(jobs)) == len(jobs) == len(prompts) * variations
    assert [job.prompt for job in jobs] == [p for p in prompts for _ in range(variations)]
    assert len({slug(job.prompt, job.seed) for job in jobs}) == len(jobs)


def test_thousands_of_prompts_without_latin_letters_have_different_names():
    assert len({slug(f"海{chr(0x4E00 + i)}", 0) for i in range(20_000)}) == 20_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "\ufeffa piano\n\n a violin \r\n"),
        ("p.jsonl", '{"caption": "a piano"}\n{"caption": "a violin", "path": "b.wav"}\n'),
        ("p.csv", "path,caption\na.wav,a piano\nb.wav,a violin\n"),
    ],
)
def test_prompts_come_from_text_and_from_manifests(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    options = GenerateOptions(prompt=["an organ"], prompts_file=tmp_path / name, unconditional=True)
    assert all_prompts(options) == ["an organ", "a piano", "a violin", ""]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prompt": []}, "no prompt"),
        ({"prompt": [" "]}, "empty prompt"),
        ({"prompt": ["caf\udce9"]}, "UTF-8"),
        ({"prompts_file": Path("none.txt")}, "none.txt"),
        ({"duration_s": float("nan")}, "duration_s"),
        ({"duration_s": float("inf")}, "duration_s"),
        ({"duration_s": 1e9}, "duration_s"),
        ({"continue_s": 0.0}, "continue_s"),
        ({"continue_s": -1.0}, "continue_s"),
        ({"continue_from": Path("none.wav")}, "none.wav"),
        ({"variations": 0}, "variations"),
        ({"batch_size": 0}, "batch_size"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 2, "judge": "fad/musicnn"}, "--reference"),
        ({"best_of": 2, "judge": "fad/ears"}, "fad/ears"),
        ({"best_of": 2, "judge": "kl/musicnn"}, "kl/musicnn"),
        ({"best_of": 2, "judge": "music/key_rank"}, "names no key"),
        ({"best_of": 2, "judge": "music/beat"}, "names no tempo"),
        ({"best_of": 2, "judge": "music/joy"}, "music/joy"),
        ({"best_of": 2, "unconditional": True}, "needs a prompt"),
        ({"loop": True, "continue_from": Path("c.wav")}, "edit --loop"),
        ({"seed": -1}, "seed"),
        ({"seed": 10**20}, "seed"),
        ({"format": "mp3"}, "format"),
        ({"device": "gpu"}, "device"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"checkpoint": "none/here"}, "none/here"),
    ],
    ids=str,
)
def test_what_is_refused_writes_nothing(settings, says, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        generate(GenerateOptions(**({"prompt": ["a"]} | settings)), NOTHING)
    assert not list(tmp_path.rglob("*.wav"))


def test_a_repeated_prompt_gives_two_reproducible_clips(tmp_path):
    options = {"duration_s": 0.2, "plots": False, "batch_size": 2}
    paths = generate(GenerateOptions(prompt=["a", "a"], out=tmp_path, seed=7, **options), QUICK)
    notes = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
    assert [note["seed"] for note in notes] == [7, 8]
    first, second = (path.read_bytes() for path in paths)
    assert first != second
    again = GenerateOptions(prompt=["a"], out=tmp_path / "again", seed=8, **options)
    assert generate(again, QUICK)[0].read_bytes() == second


def test_an_audio_prompt_is_the_end_of_its_file_and_the_json_has_its_length(tmp_path):
    soundfile.write(tmp_path / "c.wav", np.sin(np.arange(16_000) / 20), 16_000)
    options = GenerateOptions(
        prompt=["a"], out=tmp_path, duration_s=1.5, plots=False, continue_from=tmp_path / "c.wav"
    )
    (path,) = generate(options, QUICK)
    assert json.loads(path.with_suffix(".json").read_text())["options"]["continue_s"] == 1.0
    with pytest.raises(UserError, match=r"--continue_s 3: 1 s .* --duration_s 0\.5"):
        generate(replace(options, duration_s=0.5), QUICK)
