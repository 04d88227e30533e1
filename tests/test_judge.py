"""Best of n: the judge's choice is kept, clipped and silent candidates are refused."""

from pathlib import Path

import pytest
import soundfile
import torch

from magnet_train.data.audio import read_audio
from magnet_train.evaluation.judge import best_of, load_judge
from magnet_train.evaluation.scorer import AudioClip

RATE = 16_000
CLIP = Path(__file__).parents[1] / "data/demo/clips/joplin_maple-leaf-rag_piano.mp3"


def clip(wav) -> AudioClip:
    return AudioClip("a", wav[None], RATE)


def tone(hz: float, level: float = 0.1) -> torch.Tensor:
    return level * torch.sin(2 * torch.pi * hz * torch.arange(5 * RATE) / RATE)


def test_the_highest_score_wins_unless_it_is_clipped_or_silent():
    candidates = [clip(tone(200)), clip(tone(300, 2.0)), clip(torch.zeros(5 * RATE))]
    scores = iter([1.0, 3.0, 2.0] * 2)
    assert best_of(candidates, "", lambda clip, caption: next(scores)) == (0, 1.0)
    assert best_of(candidates[1:], "", lambda clip, caption: next(scores))[1] == 3.0


@pytest.mark.parametrize("judge", ["music/scale_fit", "music/periodicity", "text/musicnn"])
def test_a_judge_prefers_music_that_fits_its_caption_to_noise(judge):
    wav = torch.from_numpy(read_audio(CLIP, RATE, 1))[0, : 6 * RATE]
    noise = 0.1 * torch.randn(6 * RATE)
    caption = CLIP.with_suffix(".txt").read_text()
    assert best_of([clip(noise), clip(wav)], caption, load_judge(judge, None, "cpu"))[0] == 1


def test_a_fad_judge_takes_a_folder_of_real_audio(tmp_path):
    wav = read_audio(CLIP, RATE, 1)[0]
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", wav[i * 4 * RATE :][: 6 * RATE], RATE)
    judge = load_judge("fad/musicnn", str(tmp_path), "cpu")
    candidates = [clip(0.1 * torch.randn(6 * RATE)), clip(torch.from_numpy(wav[: 6 * RATE]))]
    assert best_of(candidates, "", judge)[0] == 1
