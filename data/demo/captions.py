"""Facts of an arrangement become a sentence; every fact stated is true, and the wording varies.

The parts of a caption (what, who, key, tempo, metre, by whom) are optional but for the instruments, come in several
orders, and each has several phrasings, so that a model cannot learn one template.
"""

from typing import Any

import numpy as np

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
    """As musicians write it.

    >>> key_name(10, "major")
    'B flat major'
    """
    return f"{SHARPS[tonic]} {mode}"


def article(words: str) -> str:
    """ "a" or "an"."""
    return "an" if words[0].lower() in "aeiou" else "a"


def caption(facts: dict[str, Any], rng: np.random.Generator) -> str:
    """One sentence about `facts`: style, ensemble, form, drums, key, tempo, tempo_bpm, metre, composer."""

    def maybe(share: float) -> bool:
        return bool(rng.random() < share)

    def one(*options: str) -> str:
        return str(rng.choice(options))

    tempo = one(*TEMPO_PHRASES[facts["tempo"]])
    style = facts["style"] if facts["style"] != "tune" else one("tune", "folk tune", "piece", "melody")
    ensemble = facts["ensemble"]
    if facts["drums"]:
        ensemble = one(f"{ensemble} with drums", f"{ensemble}, with drums", f"{ensemble} and percussion")
    if facts["form"] == "solo" and not facts["drums"]:
        who = one(
            f"for {ensemble}", f"for solo {ensemble}", f"on {ensemble}", f"played on {ensemble}", f"{ensemble} solo"
        )
    elif facts["form"] == "parts":
        who = one(f"for {ensemble}", f"played by {article(ensemble)} {ensemble}", f"in four parts for {ensemble}")
    else:
        who = one(f"for {ensemble}", f"played on {ensemble}", f"with {ensemble}")
    key = one(f"in {facts['key']}", f"in the key of {facts['key']}") if maybe(0.6) else ""
    by = facts["composer"]
    if by == "traditional":
        by = one("traditional", "from an old tune book", "folk music") if maybe(0.25) else ""
    elif maybe(0.5):
        last = by.split()[-1]
        by = one(f"by {by}", f"by {last}", f"composed by {by}")
    else:
        by = ""
    pace = one(f"{facts['tempo_bpm']} bpm", f"at {facts['tempo_bpm']} beats per minute") if maybe(0.3) else ""
    metre = f"in {facts['metre']} time" if maybe(0.2) else ""
    says_tempo = maybe(0.75)
    described = f"{tempo} {style}" if says_tempo else style
    form = int(rng.integers(5))
    if form == 0:
        text = " ".join(x for x in (f"{article(described)} {described}", who, key) if x)
        text = ", ".join(x for x in (text, pace, metre, by) if x)
    elif form == 1:
        text = ", ".join(x for x in (f"{ensemble}", described, key, pace or metre, by) if x)
    elif form == 2:
        text = " ".join(x for x in (described, who) if x)
        text = ". ".join(x[0].upper() + x[1:] for x in (text, key, by, pace) if x) + "."
    elif form == 3:
        text = " ".join(x for x in (f"{article(style)} {style}", who, key, metre) if x)
        text += f"; {tempo}" if says_tempo else ""
        text += f", {pace}" if pace else ""
    else:
        text = f"{ensemble} playing {article(described)} {described}" + (f" {key}" if key else "")
        text += f", {by}" if by else ""
    return text[0].upper() + text[1:] if maybe(0.5) else text
