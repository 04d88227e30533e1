"""Write a sentence about an arrangement. Every statement is true, and the wording varies.

The lead is named always, the key in nine captions of ten, the tempo as a word or in beats per
minute in nearly as many, the accompaniment mostly, drums wherever they play: what a caption seldom
names, a model does not learn. Facts come in several orders and each has several phrasings, so that
a model cannot learn one template.
"""

from typing import Any

import numpy as np

KEY_SHARE, BPM_SHARE, TEMPO_WORD_SHARE, STYLE_SHARE = 0.92, 0.7, 0.65, 0.85
ACCOMPANIMENT_SHARE, METRE_SHARE, COMPOSER_SHARE = 0.85, 0.15, 0.5
SHARPS = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
TEMPO_PHRASES = {
    "very slow": ("very slow", "solemn and very slow", "unhurried"),
    "slow": ("slow", "calm", "gentle and slow"),
    "moderate": ("moderate", "walking-pace", "medium-tempo"),
    "lively": ("lively", "brisk", "cheerful"),
    "fast": ("fast", "quick", "energetic"),
    "very fast": ("very fast", "rapid", "breathless"),
}


def key_name(tonic: int, mode: str) -> str:
    """Name a key as musicians write it.

    >>> key_name(10, "major")
    'B flat major'
    """
    return f"{SHARPS[tonic]} {mode}"


def article(words: str) -> str:
    """Return "a" or "an"."""
    return "an" if words[0].lower() in "aeiou" else "a"


def listed(names: list[str]) -> str:
    """Join names as in a sentence.

    >>> listed(["piano", "double bass", "drums"])
    'piano, double bass and drums'
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


class _Draw:
    """Random choices of a caption."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def maybe(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def one(self, *options: str) -> str:
        return str(self.rng.choice(options))


def _who(facts: dict[str, Any], draw: _Draw) -> tuple[str, str]:
    """Name the players: behind "for" or "on" after a piece, and as a subject before one."""
    lead = facts["lead"]
    if facts["form"] == "parts":
        if facts["lead"].endswith("quartet"):
            return draw.one(f"for {lead}", f"played by a {lead}", f"in four parts for {lead}"), lead
        return draw.one(
            f"for {lead}", f"played by {lead}", f"on {lead}", f"in parts for {lead}"
        ), lead
    if facts["form"] == "solo":
        return draw.one(
            f"for solo {lead}", f"for {lead} alone", f"on {lead}", f"played on {lead}"
        ), f"solo {lead}"
    drums = ["drums"] if facts["drums"] else []
    others = facts["accompaniment"] if draw.maybe(ACCOMPANIMENT_SHARE) else []
    band = listed([*(others or ["accompaniment"]), *drums])
    together = listed([lead, *others, *drums]) if others else f"{lead} with {band}"
    after = draw.one(f"for {lead} with {band}", f"for {together}", f"played on {lead} with {band}")
    led = f"{lead} accompanied by {band}" if others else f"{lead} with {band}"
    subject = draw.one(f"{lead} with {band}", led, f"{lead} over {band}")
    return after, subject


def caption(facts: dict[str, Any], rng: np.random.Generator) -> str:
    """Write one sentence.

    Args:
        facts: lead, accompaniment (names), drums, form, style, key, tempo (a word), tempo_bpm,
            metre and composer.
        rng: decides what is said and how.
    """
    draw = _Draw(rng)
    style = facts["style"] if facts["style"] != "tune" and draw.maybe(STYLE_SHARE) else ""
    style = style or draw.one("tune", "piece", "melody", "piece of music")
    if facts["form"] == "parts" and style in ("tune", "melody"):
        style = "piece"
    tempo = draw.one(*TEMPO_PHRASES[facts["tempo"]]) if draw.maybe(TEMPO_WORD_SHARE) else ""
    what = f"{tempo} {style}".strip()
    a_what = f"{article(what)} {what}"
    who, subject = _who(facts, draw)
    bpm = (
        f"{round(facts['tempo_bpm'])} {draw.one('bpm', 'bpm', 'beats per minute')}"
        if draw.maybe(BPM_SHARE)
        else ""
    )
    key = facts["key"] if draw.maybe(KEY_SHARE) else ""
    in_key = draw.one(f"in {key}", f"in {key}", f"in the key of {key}") if key else ""
    metre = f"in {facts['metre']} time" if draw.maybe(METRE_SHARE) else ""
    by = ""
    if facts["composer"] != "traditional" and draw.maybe(COMPOSER_SHARE):
        by = draw.one(f"by {facts['composer']}", f"by {facts['composer'].split()[-1]}")
    at_bpm = f"at {bpm}" if bpm else ""
    text = (
        lambda: _commas(_words(a_what, in_key, who), bpm, metre, by),
        lambda: _commas(_words(a_what, who, in_key, at_bpm), metre, by),
        lambda: _commas(subject, what, key, bpm or metre, by),
        lambda: _sentences(
            _words(what, who),
            f"Key of {key}" if key else "",
            f"Tempo {bpm}" if bpm else "",
            metre,
            by,
        ),
        lambda: _commas(_words(f"{subject} playing {a_what}", in_key, at_bpm), metre, by),
        lambda: _commas(key, bpm, _words(a_what, who), metre, by),
        lambda: _commas(_words(a_what, in_key, at_bpm), _words(who, metre), by),
    )[int(rng.integers(7))]()
    return text[0].upper() + text[1:] if draw.maybe(0.6) else text


def _words(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _commas(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _sentences(*parts: str) -> str:
    return ". ".join(part[0].upper() + part[1:] for part in parts if part) + "."
