"""A score becomes an arrangement: who plays, how fast, with what accompaniment. Everything from a seed.

Times in the result are seconds; nothing is drawn that the facts beside it do not say.
"""

from dataclasses import dataclass

import numpy as np

# General MIDI program, lowest and highest pitch that sounds like the instrument.
INSTRUMENTS = {
    "piano": (0, 24, 103), "harpsichord": (6, 36, 84), "celesta": (8, 60, 103), "music box": (10, 60, 96),
    "vibraphone": (11, 53, 89), "marimba": (12, 45, 96), "xylophone": (13, 65, 101), "dulcimer": (15, 50, 86),
    "church organ": (19, 36, 96), "reed organ": (20, 36, 89), "accordion": (21, 48, 89), "harmonica": (22, 60, 89),
    "nylon-string guitar": (24, 40, 79), "steel-string guitar": (25, 40, 79), "double bass": (32, 28, 55),
    "violin": (40, 55, 98), "viola": (41, 48, 86), "cello": (42, 36, 72), "pizzicato strings": (45, 36, 89),
    "harp": (46, 28, 98), "strings": (48, 28, 96), "choir": (52, 40, 81), "trumpet": (56, 54, 82),
    "trombone": (57, 38, 72), "tuba": (58, 28, 58), "French horn": (60, 41, 77), "soprano saxophone": (64, 56, 87),
    "alto saxophone": (65, 49, 80), "tenor saxophone": (66, 44, 75), "baritone saxophone": (67, 37, 68),
    "oboe": (68, 58, 89), "English horn": (69, 52, 81), "bassoon": (70, 34, 70), "clarinet": (71, 50, 89),
    "piccolo": (72, 70, 103), "flute": (73, 60, 96), "recorder": (74, 60, 96), "pan flute": (75, 60, 89),
    "banjo": (105, 48, 84), "kalimba": (108, 55, 89), "fiddle": (110, 55, 96), "sitar": (104, 48, 77),
}  # fmt: skip

MELODY = (
    "piano", "violin", "fiddle", "flute", "piccolo", "recorder", "clarinet", "oboe", "trumpet", "soprano saxophone",
    "alto saxophone", "accordion", "harmonica", "nylon-string guitar", "steel-string guitar", "banjo", "harp",
    "marimba", "vibraphone", "xylophone", "music box", "celesta", "dulcimer", "harpsichord", "church organ",
    "reed organ", "pan flute", "kalimba", "cello", "English horn", "French horn", "sitar",
)  # fmt: skip
CHORDS = (
    "piano", "nylon-string guitar", "steel-string guitar", "harp", "accordion", "strings", "church organ",
    "reed organ", "banjo", "pizzicato strings", "vibraphone", "harpsichord", "choir",
)  # fmt: skip
QUARTETS = {
    "string quartet": ("violin", "violin", "viola", "cello"),
    "brass quartet": ("trumpet", "trumpet", "French horn", "trombone"),
    "woodwind quartet": ("flute", "oboe", "clarinet", "bassoon"),
    "saxophone quartet": ("soprano saxophone", "alto saxophone", "tenor saxophone", "baritone saxophone"),
    "brass ensemble": ("French horn", "trombone", "trombone", "tuba"),
}
ONE_PLAYER_PARTS = (
    "choir", "church organ", "strings", "piano", "harpsichord", "harp", "reed organ", "nylon-string guitar",
    "vibraphone", "marimba", "accordion", "pizzicato strings", "celesta",
)  # fmt: skip
WITH_DRUMS = {
    "reel",
    "jig",
    "polka",
    "march",
    "quickstep",
    "breakdown",
    "walk-around",
    "hornpipe",
    "clog",
    "schottische",
}
TEMPO_WORDS = ((66, "very slow"), (84, "slow"), (108, "moderate"), (136, "lively"), (168, "fast"), (999, "very fast"))

Note = tuple[float, float, int, int]
"""Onset and duration in seconds, MIDI pitch, velocity."""


@dataclass(frozen=True)
class Arrangement:
    """What is played, and the facts that a caption may state."""

    voices: list[tuple[str, list[Note]]]
    """Instrument and notes, one entry a player."""
    drums: list[Note]
    """Channel-10 notes."""
    ensemble: str
    """How the players together are called, e.g. "string quartet"; a single instrument's name for a solo."""
    form: str
    """solo, melody with accompaniment, or parts."""
    tonic: int
    """Pitch class of the key as it sounds, 0 = C."""
    tempo_bpm: int
    """Beats (quarters, or dotted quarters in compound time) per minute."""
    length_s: float
    """Until the last note ends, in seconds."""
    distinct_s: float
    """The same without repetitions."""


def tempo_word(bpm: float) -> str:
    return next(word for limit, word in TEMPO_WORDS if bpm < limit)


def fit(pitch: int, instrument: str) -> int:
    """The pitch moved by octaves into the instrument's range."""
    _, low, high = INSTRUMENTS[instrument]
    while pitch < low:
        pitch += 12
    while pitch > high:
        pitch -= 12
    return pitch


def shift_to_fit(pitches: list[int], instrument: str) -> int:
    """The octave shift, in semitones, that puts most of a line into the range, so that its shape survives."""
    _, low, high = INSTRUMENTS[instrument]
    return max(range(-36, 37, 12), key=lambda s: (sum(low <= p + s <= high for p in pitches), -abs(s)))


def diatonic_triads(tonic: int, mode: str) -> list[tuple[int, ...]]:
    """Pitch classes of the triads on I, ii … vi (in minor with a major dominant)."""
    if mode == "minor":
        degrees = ((0, 3, 7), (5, 8, 0), (7, 11, 2), (8, 0, 3), (3, 7, 10), (10, 2, 5))
    else:
        degrees = ((0, 4, 7), (5, 9, 0), (7, 11, 2), (9, 0, 4), (2, 5, 9), (4, 7, 11))
    return [tuple((tonic + p) % 12 for p in triad) for triad in degrees]


def harmonise(
    melody: list[list[float]], tonic: int, mode: str, window_ql: float, end_ql: float
) -> list[tuple[int, ...]]:
    """One triad per window that fits the melody best, by dynamic programming.

    A window pays for notes outside its chord by their length, a little for leaving the main triads, and a little
    for repeating the last chord's neighbour; the last window is the tonic.
    """
    triads = diatonic_triads(tonic, mode)
    windows = max(1, round(end_ql / window_ql))
    prior = np.array([0.0, 0.25, 0.2, 0.5, 0.55, 0.8])
    cost = np.tile(prior, (windows, 1))
    for onset, duration, pitch in melody:
        first, last = int(onset // window_ql), int((onset + duration - 1e-6) // window_ql)
        for w in range(first, min(last, windows - 1) + 1):
            overlap = min(onset + duration, (w + 1) * window_ql) - max(onset, w * window_ql)
            accent = 1.6 if abs(onset - w * window_ql) < 1e-3 else 1.0
            for i, triad in enumerate(triads):
                cost[w, i] += 0 if int(pitch) % 12 in triad else accent * overlap / window_ql * 2
    cost[-1, 1:] += 2
    move = 0.15 * (1 - np.eye(len(triads)))
    best, back = cost[0], []
    for w in range(1, windows):
        total = best[:, None] + move
        back.append(total.argmin(0))
        best = total.min(0) + cost[w]
    path = [int(best.argmin())]
    for choice in reversed(back):
        path.append(int(choice[path[-1]]))
    return [triads[i] for i in reversed(path)]


def _accompaniment(
    chords: list[tuple[int, ...]],
    window_ql: float,
    pattern: str,
    instrument: str,
    bass: str | None,
    rng: np.random.Generator,
) -> list[tuple[str, list[list[float]]]]:
    """Chord and bass notes `[onset, duration, pitch]` in quarter notes, by pattern: block, pulse, broken, drone."""
    upper, lower = [], []
    center = int(rng.integers(55, 64))
    for i, chord in enumerate(chords):
        start = i * window_ql
        tones = sorted(center + (p - center) % 12 for p in chord)
        root = fit(36 + chord[0], "double bass")
        if pattern == "block":
            upper += [[start, window_ql * 0.95, p] for p in tones]
        elif pattern == "pulse":  # bass on the beat, chord after it
            half = window_ql / 2
            upper += [[start + half, half * 0.7, p] for p in tones]
        elif pattern == "broken":
            count = 4 if window_ql >= 2 else 3
            order = [0, 1, 2, 1][:count]
            upper += [[start + j * window_ql / count, window_ql / count, tones[k]] for j, k in enumerate(order)]
        else:
            fifth = [root + 12, root + 19]
            upper += [[start, window_ql, p] for p in fifth]
        length = window_ql * (0.5 if pattern == "pulse" else 0.95)
        lower.append([start, length, root])
    voices = [(instrument, upper)]
    if bass is not None and pattern != "drone":
        voices.append((bass, lower))
    elif pattern in ("pulse", "block", "broken"):
        upper += [[t, d, p + 12] for t, d, p in lower]
    return voices


def _drum_pattern(bar_ql: float, compound: bool, bars: int, rng: np.random.Generator) -> list[list[float]]:
    """Bass drum, snare and hi-hat for `bars`, `[onset, duration, pitch]` in quarter notes."""
    beat = 1.5 if compound else 1.0
    step = 0.5
    hits = []
    hat = int(rng.choice([42, 42, 44, 70]))
    for bar in range(bars):
        for i in range(round(bar_ql / step)):
            t = bar * bar_ql + i * step
            on_beat = abs((i * step) % beat) < 1e-6
            if on_beat:
                number = round(i * step / beat)
                hits.append([t, 0.2, 36 if number % 2 == 0 else 38])
            if on_beat or rng.random() < 0.75:
                hits.append([t, 0.1, hat])
    return hits


def arrange(score: dict, seed: int, least_s: float = 26.0, most_s: float = 120.0) -> Arrangement:
    """Choose players and tempo for a score and write it out; a short tune is played again until `least_s`."""
    rng = np.random.default_rng(seed)
    style, bar = score["style"], score["bar_ql"]
    compound = score["metre"] in ("6/8", "9/8", "12/8", "3/8")
    beat_ql = 1.5 if compound else 1.0
    slow = style in ("air", "chorale", "minuet", "gavotte", "waltz")
    low, high = (60, 104) if style == "chorale" else (66, 126) if slow else (84, 176)
    if style == "string quartet movement" or style == "ragtime":
        low, high = 84, 132
    bpm = int(rng.integers(low, high))
    quarter_s = 60 / bpm / beat_ql
    transpose = int(rng.integers(-3, 4)) if len(score["parts"]) == 1 else 0
    parts = [[[t, d, p + transpose] for t, d, p in part] for part in score["parts"]]
    start = min(part[0][0] for part in parts)
    parts = [[[t - start, d, p] for t, d, p in part] for part in parts]
    end_ql = max(t + d for part in parts for t, d, _ in part)
    voices: list[tuple[str, list[list[float]]]] = []
    drums: list[list[float]] = []
    if len(parts) == 1:
        tonic = (score["tonic"] + transpose) % 12
        lead = str(rng.choice(MELODY))
        kind = rng.choice(["solo", "chords", "chords and bass", "duo"], p=[0.22, 0.38, 0.3, 0.1])
        voices = [(lead, parts[0])]
        ensemble, form = lead, "solo"
        if kind != "solo":
            window = bar / 2 if bar >= 3 and not compound else bar
            chords = harmonise(parts[0], tonic, score["mode"], window, end_ql)
            pattern = str(rng.choice(["block", "pulse", "broken", "drone"], p=[0.3, 0.35, 0.28, 0.07]))
            other = str(rng.choice([c for c in CHORDS if c != lead]))
            bass = str(rng.choice(["double bass", "cello", "tuba", "bassoon"], p=[0.6, 0.2, 0.1, 0.1]))
            form = "melody with accompaniment"
            if kind == "duo":
                other = str(rng.choice([m for m in MELODY if m != lead]))
                voices.append((other, _second_voice(parts[0], chords, window)))
            else:
                voices += _accompaniment(
                    chords, window, pattern, other, bass if kind == "chords and bass" else None, rng
                )
            players = list(dict.fromkeys(name for name, _ in voices))
            ensemble = " and ".join(players) if len(players) < 3 else f"{', '.join(players[:-1])} and {players[-1]}"
        if style in WITH_DRUMS and rng.random() < 0.4 and kind != "duo":
            drums = _drum_pattern(bar, compound, max(1, round(end_ql / bar)), rng)
    elif style == "ragtime":
        voices = [("piano", [n for part in parts for n in part])]
        ensemble, form = "piano", "solo"
    elif len(parts) == 4 and (style == "string quartet movement" or rng.random() < 0.55):
        ensemble = "string quartet" if style == "string quartet movement" else str(rng.choice(list(QUARTETS)))
        voices, form = list(zip(QUARTETS[ensemble], parts, strict=True)), "parts"
    else:
        ensemble = str(rng.choice(ONE_PLAYER_PARTS))
        voices, form = [(ensemble, [n for part in parts for n in part])], "solo"
    distinct_s = end_ql * quarter_s
    times = max(1, min(8, int(np.ceil(least_s / distinct_s))))
    loop_ql = np.ceil(end_ql / bar) * bar if bar else end_ql

    def play(notes: list[list[float]], instrument: str | None) -> list[Note]:
        shift = shift_to_fit([int(p) for _, _, p in notes], instrument) if instrument else 0
        loud = int(rng.integers(72, 100))
        played = []
        for turn in range(times):
            for t, d, p in notes:
                onset = (t + turn * loop_ql) * quarter_s + float(rng.normal(0, 0.006))
                if onset < most_s:
                    pitch = fit(int(p) + shift, instrument) if instrument else int(p)
                    accent = 8 if t % bar < 1e-3 else 0
                    velocity = int(np.clip(loud + accent + rng.integers(-6, 7), 30, 120))
                    played.append((max(0.0, onset), max(0.05, d * quarter_s * 0.97), pitch, velocity))
        return played

    written = [(name, play(notes, name)) for name, notes in voices]
    written = [(name, [(t, d, p, max(30, v - 18)) for t, d, p, v in notes] if i and len(parts) == 1 else notes)
               for i, (name, notes) in enumerate(written)]  # fmt: skip
    beaten = play(drums, None) if drums else []
    length = max(t + d for _, notes in written for t, d, _, _ in notes)
    return Arrangement(
        written, beaten, ensemble, form, (score["tonic"] + transpose) % 12, bpm, length, min(distinct_s, length)
    )


def _second_voice(melody: list[list[float]], chords: list[tuple[int, ...]], window_ql: float) -> list[list[float]]:
    """The chord tone next below each melody note."""
    lower = []
    for t, d, p in melody:
        chord = chords[min(int(t // window_ql), len(chords) - 1)]
        below = next((q for q in range(int(p) - 3, int(p) - 13, -1) if q % 12 in chord), int(p) - 12)
        lower.append([t, d, below])
    return lower
