"""A blind listening test: an HTML page for raters and a key file for the analysis (`ratings`).

For each caption, systems are rated side by side on two questions from 1 to 100, with a hidden
reference and anchors, similar to MUSHRA (ITU-R BS.1534). The study in the paper asked the same two
questions. All clips of a screen have the same loudness, at most -14 LUFS.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from magnet_train.common.audio_files import listening_loudness, normalize_for_listening
from magnet_train.common.errors import UserError
from magnet_train.common.folders import written
from magnet_train.data.manifest import Clip
from magnet_train.evaluation.page import audio_uri, read_sound, text, write_page

QUESTIONS = {
    "quality": ("How good does it sound, regardless of the text?", "bad", "excellent"),
    "relevance": ("How well does it match the text?", "not at all", "perfectly"),
}
LOWPASS = "anchor: low-pass 3.5 kHz"
MISMATCH = "anchor: other caption"
PLAYED_SHARE = 0.95
"""Share of a clip that must have been played before its ratings count."""

Sound = tuple[np.ndarray, int]
"""Samples `t channels`, and their rate in Hz."""


@dataclass(frozen=True)
class ListeningTest:
    """Files and sizes of an exported listening test."""

    page: Path
    """The HTML page for raters."""
    key: Path
    """JSON with the system of each id; not for raters."""
    size: int
    """Size of the page, in bytes."""
    num_trials: int
    """Number of captions, one screen each."""
    num_clips: int
    """Number of clips on all screens, including anchors."""


def export_listening_test(
    systems: Mapping[str, Mapping[str, Clip]],
    captions: Mapping[str, Mapping[str, str]],
    out: str | Path,
    reference: str | None = "reference",
    title: str = "Listening test",
) -> ListeningTest:
    """Write a listening test as one HTML file, and its key next to it as `NAME_key.json`.

    Each screen has the clips of all systems for one caption, truncated to equal length, with the
    hidden reference and two anchors made from it: low-passed at 3.5 kHz, to find raters who hear no
    difference in quality, and the real clip of another caption, to find raters who do not read. Ids
    are random, audio has no tags, and the page has no names of systems or files.

    Args:
        systems: clips of each system, by id.
        captions: captions of each system's clips, by id; clips with the same caption belong
            together.
        out: the HTML file.
        reference: name of the system with the real clips; None = no reference and anchors.
        title: heading of the page.

    Raises:
        UserError: if a system lacks a caption or has one twice, audio is unreadable, there are too
            few captions for the anchors, or a file cannot be written.
    """
    files = {
        name: group_by_caption(name, clips, captions.get(name, {}))
        for name, clips in systems.items()
    }
    check_systems(files, reference)
    shared = sorted(set().union(*files.values()))
    others = mismatched(shared) if reference is not None else {}
    clips: dict[str, dict[str, Any]] = {}
    trials: list[str] = []
    for number, caption in enumerate(shared, 1):
        sounds = {name: read_sound(paths[caption]) for name, paths in files.items()}
        if reference is not None:
            wav, sample_rate = sounds[reference]
            sounds[LOWPASS] = low_passed(wav, sample_rate), sample_rate
            sounds[MISMATCH] = read_sound(files[reference][others[caption]])
        blinded: dict[str, str] = {}
        for name, (wav, sample_rate) in aligned(sounds).items():
            blinded_id = secrets.token_hex(5)
            seconds = round(len(wav) / sample_rate, 3)
            clips[blinded_id] = {
                "trial": number,
                "system": name,
                "caption": caption,
                "seconds": seconds,
            }
            blinded[blinded_id] = audio_uri(wav, sample_rate, lossless=True)
        trials.append(_trial(number, caption, blinded))
    test_id = hashlib.sha256("".join(sorted(clips)).encode()).hexdigest()[:10]
    page = Path(out)
    key = page.with_name(f"{page.stem}_key.json")
    about = {
        "study": test_id,
        "title": title,
        "questions": {name: question for name, (question, _, _) in QUESTIONS.items()},
        "reference": reference,
        "systems": list(dict.fromkeys(clip["system"] for clip in clips.values())),
        "clips": clips,
    }
    body = _body(title, test_id, trials, len(clips), reference is not None)
    size = write_page(page, title, body, "study.js")
    with written(key) as temporary:
        temporary.write_text(json.dumps(about, indent=2) + "\n")
    return ListeningTest(page, key, size, len(shared), len(clips))


def group_by_caption(
    system: str, clips: Mapping[str, Clip], captions: Mapping[str, str]
) -> dict[str, Path]:
    """Files of a system by caption.

    Raises:
        UserError: if a clip has no caption, or two have the same.
    """
    files: dict[str, Path] = {}
    for key, clip in clips.items():
        caption = captions.get(key)
        if not caption:
            raise UserError(
                f"{clip.path}: no caption; put it into {clip.path.with_suffix('.txt').name}"
            )
        if caption in files:
            raise UserError(
                f"{clip.path}: has the caption of {files[caption].name}, {caption!r}, in system "
                f"{system}; a listening test has one clip for each caption: keep one of them"
            )
        files[caption] = clip.path
    return files


def check_systems(files: Mapping[str, Mapping[str, Path]], reference: str | None) -> None:
    """Check names, that every system has every caption, and the number of captions.

    Args:
        files: files by system and caption.
        reference: the system with the real clips, if any.

    Raises:
        UserError: if a check fails.
    """
    if not set(files) - {reference}:
        raise UserError(
            "a listening test needs a system besides the reference; give generated clips"
        )
    captions = sorted(set().union(*files.values()))
    for name, found in files.items():
        if name in (LOWPASS, MISMATCH):
            raise UserError(f"system {name!r}: this name is used for an anchor; choose another")
        if missing := [caption for caption in captions if caption not in found]:
            raise UserError(
                f"system {name}: no clip for {len(missing)} of {len(captions)} captions, such as "
                f"{missing[0]!r}; generate it, or remove it from the other systems"
            )
    if reference is not None and len(captions) < 2:
        raise UserError(
            "a listening test with one caption; the anchor of another caption needs two or more"
        )


def aligned(sounds: Mapping[str, Sound]) -> dict[str, Sound]:
    """Clips truncated to the shortest, faded out, and normalised to equal loudness without
    clipping."""
    seconds = min(len(wav) / sample_rate for wav, sample_rate in sounds.values())
    cut = {name: (wav[: round(seconds * rate)], rate) for name, (wav, rate) in sounds.items()}
    loudness = min(listening_loudness(wav, rate) for wav, rate in cut.values())
    return {
        name: (_faded(normalize_for_listening(wav, rate, loudness), rate), rate)
        for name, (wav, rate) in cut.items()
    }


def low_passed(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Low-pass `t channels` at 3.5 kHz without delay.

    The low anchor of ITU-R BS.1534-3: 0.1 dB up to 3.5 kHz, at least -25 dB from 4 kHz.

    Raises:
        UserError: if the sample rate is too low.
    """
    from scipy.signal import fftconvolve, firwin, kaiserord

    if sample_rate <= 8000:
        raise UserError(
            f"sample_rate={sample_rate}: the anchor low-passed at 3.5 kHz needs clips above 8 kHz"
        )
    taps, _ = kaiserord(60, 500 / (sample_rate / 2))
    kernel = np.asarray(firwin(taps | 1, 3750, width=500, fs=sample_rate))
    return fftconvolve(wav, kernel[:, None], mode="full", axes=0)[len(kernel) // 2 :][
        : len(wav)
    ].astype(np.float32)


def _faded(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Fade out over 20 ms to avoid a click."""
    length = min(len(wav), round(0.02 * sample_rate))
    ramp = np.ones((len(wav), 1), dtype=wav.dtype)
    ramp[len(wav) - length :, 0] = np.linspace(1, 0, length)
    return wav * ramp


def mismatched(captions: Sequence[str]) -> dict[str, str]:
    """A different caption for each, by the cyclic shift with the fewest shared words."""
    words = [set(caption.lower().split()) for caption in captions]
    n = len(captions)

    def shared(shift: int) -> float:
        pairs = [(words[i], words[(i + shift) % n]) for i in range(n)]
        return sum(len(a & b) / max(1, len(a | b)) for a, b in pairs)

    best = min(range(1, n), key=shared)
    return {caption: captions[(i + best) % n] for i, caption in enumerate(captions)}


# --- The page -------------------------------------------------------------------------------------


def _trial(number: int, caption: str, clips: Mapping[str, str]) -> str:
    """One screen; the page shuffles its clips for each rater."""
    cards = "\n".join(_card(blinded_id, clips[blinded_id]) for blinded_id in sorted(clips))
    return (
        f'<section class="trial" data-trial="{number}" hidden>\n<h2 tabindex="-1"></h2>\n'
        f'<p class="faint">The text:</p>\n<blockquote class="caption">'
        f"{text(caption or '(no text)')}</blockquote>\n"
        f"{cards}\n</section>"
    )


def _card(blinded_id: str, source: str) -> str:
    sliders = "".join(
        f'<div class="question"><label for="{name}-{blinded_id}">{text(question)}</label>'
        f'<output>–</output><input type="range" class="untouched" id="{name}-{blinded_id}" '
        f'data-question="{name}" min="1" max="100" value="50" aria-valuetext="not rated yet">'
        f'<span class="ends"><span>1 {low}</span><span>100 {high}</span></span></div>'
        for name, (question, low, high) in QUESTIONS.items()
    )
    return (
        f'<article class="clip" data-id="{blinded_id}">\n<h3></h3>\n'
        f'<audio controls preload="none" src="{source}"></audio>\n'
        f'{sliders}<p class="state"></p></article>'
    )


def _body(
    title: str, test_id: str, trials: Sequence[str], num_clips: int, has_anchors: bool
) -> str:
    hidden = " Some clips are real music; some were degraded on purpose." if has_anchors else ""
    each = num_clips // len(trials)
    return f"""<main class="study" data-study="{test_id}" data-played="{PLAYED_SHARE}">
<header><h1>{text(title)}</h1></header>
<section id="welcome">
<p>You will hear {num_clips} short clips, {each} at a time for each text. Please rate
every clip from 1 to 100 on two questions, and use the whole scale.{hidden}</p>
<ul>
<li>Wear headphones in a quiet room, and set a comfortable level with the first clip. The clips for
one text are equally loud.</li>
<li>Play every clip to its end; otherwise its rating does not count. You can play clips as often as
you like.</li>
<li>Your ratings are kept in this browser. You can stop at any time and continue later under the
same name.</li>
<li>At the end, save the CSV file and send it to the person who gave you this page. Nothing is sent
automatically.</li>
</ul>
<p><label for="rater">Your name or rater id</label></p>
<div class="steps"><input type="text" id="rater" autocomplete="off" maxlength="80">
<button type="button" class="main" id="begin">Begin</button></div>
</section>
<progress id="progress" max="{len(trials)}" value="0" aria-label="Screens done" hidden></progress>
{chr(10).join(trials)}
<section id="finish" hidden>
<h2 tabindex="-1">Thank you</h2>
<p>All clips are rated. Save the file and send it to the person who gave you this page.</p>
</section>
<p class="message" id="message" role="status"></p>
<div class="steps" id="steps" hidden>
<button type="button" id="back">Back</button>
<button type="button" class="main" id="next">Next</button>
<button type="button" id="save">Save ratings so far (CSV)</button>
</div>
</main>"""
