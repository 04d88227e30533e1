"""Arrange a score: choose players, key, tempo and accompaniment, and write out every note.

The music is made to be learnt by a small model. Few instruments, the melody on top and well above
its accompaniment in level, chords and drums on the bar lines, and a beat that lasts a whole number
of codec frames, so that one rhythm is one pattern of frames.
"""

from dataclasses import dataclass

import numpy as np

FRAME_S = 0.04
"""A beat lasts a whole number of these: one frame of a codec at 25 Hz."""
MUSIC_S = 30.0
"""Length of one arrangement, in seconds."""

# General MIDI program; lowest and highest pitch; level in dB of a scale at velocity 100, measured.
INSTRUMENTS = {
    "piano": (0, 36, 96, -35.8),
    "harpsichord": (6, 36, 86, -35.1),
    "vibraphone": (11, 53, 89, -27.3),
    "church organ": (19, 36, 91, -33.1),
    "accordion": (21, 53, 89, -31.0),
    "guitar": (24, 40, 81, -30.7),
    "double bass": (32, 28, 55, -30.1),
    "violin": (40, 55, 96, -28.5),
    "viola": (41, 48, 84, -28.6),
    "cello": (42, 36, 74, -26.5),
    "harp": (46, 36, 93, -26.9),
    "strings": (48, 36, 91, -30.9),
    "choir": (52, 40, 84, -31.9),
    "trumpet": (56, 55, 84, -32.4),
    "oboe": (68, 58, 89, -29.8),
    "bassoon": (70, 34, 72, -31.4),
    "clarinet": (71, 50, 89, -29.9),
    "flute": (73, 60, 96, -27.4),
}
LEADS = (
    "piano",
    "harpsichord",
    "vibraphone",
    "accordion",
    "guitar",
    "violin",
    "harp",
    "trumpet",
    "oboe",
    "clarinet",
    "flute",
)
CHORDS = ("piano", "guitar", "strings", "church organ")
BASS = "double bass"
QUARTETS = {
    "string quartet": ("violin", "violin", "viola", "cello"),
    "woodwind quartet": ("flute", "oboe", "clarinet", "bassoon"),
}
PART_PLAYERS = ("church organ", "choir", "strings", "piano")
"""Instruments that play all four parts of a chorale."""
LOWEST_LEAD = 57
"""Melodies stay above this pitch; chords start at CHORD_BASE, so that the two seldom cross."""
CHORD_BASE, BASS_BASE = 50, 31
LEVELS_DB = {"lead": -33.0, "part": -36.0, "chords": -43.5, "bass": -39.0}
"""Level of a single note by the player's role; a chord of three notes is about 5 dB louder."""
DRUM_VOLUME = 88

COMPOUND = ("6/8", "9/8", "12/8", "3/8")
SLOW_STYLES = ("air", "minuet", "waltz", "gavotte", "lilt")
DRUM_SHARE = {"chorale": 0.0, "air": 0.4, "minuet": 0.2, "gavotte": 0.2, "tune": 0.6}
"""Share of accompanied pieces with drums, by style; DANCE_DRUM_SHARE for the others, all dances."""
DANCE_DRUM_SHARE = 0.85
TEMPO_WORDS = (
    (66, "very slow"),
    (84, "slow"),
    (108, "moderate"),
    (136, "lively"),
    (168, "fast"),
    (999, "very fast"),
)

Note = tuple[float, float, int, int]
"""Onset and duration in seconds, MIDI pitch, velocity."""
Line = list[list[float]]
"""Notes as [onset, duration, pitch], in quarter notes from the first bar line."""


@dataclass(frozen=True)
class Voice:
    """One player and what it plays."""

    instrument: str
    role: str
    """lead, chords, bass, or part (of a chorale)."""
    notes: list[Note]


@dataclass(frozen=True)
class Arrangement:
    """What is played, and the facts that a caption may state."""

    voices: list[Voice]
    drums: list[Note]
    """Notes of the drum channel."""
    ensemble: str
    """The lead's name, or the name of the ensemble that plays a chorale."""
    form: str
    """solo, melody with accompaniment, or parts."""
    tonic: int
    """Pitch class of the key as it sounds, 0 = C."""
    frames_per_beat: int
    """Length of a beat (a quarter, or a dotted quarter in compound time), in frames of FRAME_S."""
    first_bar_s: float
    """Time of the first bar line, after the upbeat."""
    bar_s: float
    """Length of a bar, in seconds."""

    @property
    def beat_s(self) -> float:
        """Length of a beat, in seconds."""
        return self.frames_per_beat * FRAME_S

    @property
    def tempo_bpm(self) -> float:
        """Beats per minute."""
        return 60 / self.beat_s


def tempo_word(bpm: float) -> str:
    """Return the word for a tempo in beats per minute."""
    return next(word for limit, word in TEMPO_WORDS if bpm < limit)


def fit(pitch: int, low: int, high: int) -> int:
    """Move a pitch by octaves into [low, high], which must span an octave."""
    while pitch < low:
        pitch += 12
    while pitch > high:
        pitch -= 12
    return pitch


def fit_line(line: Line, low: int, high: int) -> Line:
    """Move a line by octaves so that most of it is in [low, high], then each note left outside."""
    pitches = [int(p) for _, _, p in line]
    shift = max(
        range(-36, 37, 12), key=lambda s: (sum(low <= p + s <= high for p in pitches), -abs(s))
    )
    return [[t, d, fit(int(p) + shift, low, high)] for t, d, p in line]


def diatonic_triads(tonic: int, mode: str) -> list[tuple[int, ...]]:
    """Return pitch classes of six triads of the key, the tonic's first; in minor, V is major."""
    if mode == "minor":
        degrees = ((0, 3, 7), (5, 8, 0), (7, 11, 2), (8, 0, 3), (3, 7, 10), (10, 2, 5))
    else:
        degrees = ((0, 4, 7), (5, 9, 0), (7, 11, 2), (9, 0, 4), (2, 5, 9), (4, 7, 11))
    return [tuple((tonic + p) % 12 for p in triad) for triad in degrees]


def harmonise(
    melody: Line, tonic: int, mode: str, window_ql: float, windows: int
) -> list[tuple[int, ...]]:
    """Choose one triad per window that fits the melody best, by dynamic programming.

    A window pays for notes outside its chord by their length, for leaving the main triads, and for
    a change of chord. The first and the last window are drawn to the tonic.
    """
    triads = diatonic_triads(tonic, mode)
    cost = np.tile(np.array([0.0, 0.25, 0.2, 0.6, 0.65, 0.9]), (windows, 1))
    for onset, duration, pitch in melody:
        first, last = int(onset // window_ql), int((onset + duration - 1e-6) // window_ql)
        for w in range(max(first, 0), min(last, windows - 1) + 1):
            overlap = min(onset + duration, (w + 1) * window_ql) - max(onset, w * window_ql)
            accent = 1.6 if abs(onset - w * window_ql) < 1e-3 else 1.0
            for i, triad in enumerate(triads):
                cost[w, i] += 0 if int(pitch) % 12 in triad else accent * overlap / window_ql * 2
    cost[0, 1:] += 0.5
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


def accompany(
    chords: list[tuple[int, ...]], window_ql: float, beat_ql: float, pattern: str
) -> tuple[Line, Line]:
    """Write out chords and bass, one chord per window.

    Args:
        chords: pitch classes, the root first.
        window_ql: length of a window, in quarter notes.
        beat_ql: length of a beat.
        pattern: block (one chord a window), march (bass and chord in turn, on the beats), offbeat
            (bass on the beats, chords between them) or broken (one chord tone after another).
    """
    upper: Line = []
    lower: Line = []
    beats = max(1, round(window_ql / beat_ql))
    half = beat_ql / 2 if beat_ql == 1 else beat_ql * 2 / 3
    for i, chord in enumerate(chords):
        start = i * window_ql
        tones = sorted(CHORD_BASE + (p - CHORD_BASE) % 12 for p in chord)
        root = BASS_BASE + (chord[0] - BASS_BASE) % 12
        if pattern == "block":
            upper += [[start, window_ql, p] for p in tones]
            lower.append([start, window_ql, root])
        elif pattern == "march" and beats > 1:
            period = 3 if beats == 3 else 2
            lower += [[start + b * beat_ql, beat_ql, root] for b in range(0, beats, period)]
            upper += [
                [start + b * beat_ql, beat_ql / 2, p]
                for b in range(beats)
                if b % period
                for p in tones
            ]
        elif pattern == "broken":
            step = beat_ql / 2 if beat_ql == 1 else beat_ql / 3
            upper += [
                [start + j * step, step, tones[(0, 1, 2, 1)[j % 4]]]
                for j in range(round(window_ql / step))
            ]
            lower.append([start, window_ql, root])
        else:
            upper += [
                [start + b * beat_ql + half, beat_ql - half, p] for b in range(beats) for p in tones
            ]
            lower += [[start + b * beat_ql, half, root] for b in range(beats)]
    return upper, lower


def drum_bar(bar_ql: float, beat_ql: float, busy: bool) -> list[tuple[float, int, int]]:
    """Return one bar of bass drum, snare and hi-hat as (onset in quarter notes, drum, velocity).

    Args:
        bar_ql: length of the bar.
        beat_ql: length of a beat.
        busy: hi-hat on all eighths instead of on the beats alone.
    """
    beats = max(1, round(bar_ql / beat_ql))
    hits = []
    for beat in range(beats):
        kick = beat == 0 if beats == 3 else beat % 2 == 0
        hits.append((beat * beat_ql, 36 if kick else 38, 112 if kick else 92))
    eighths = round(bar_ql / 0.5)
    for i in range(eighths):
        on_beat = (i * 0.5) % beat_ql < 1e-6
        if on_beat or busy:
            hits.append((i * 0.5, 42, 80 if on_beat else 56))
    return hits


def choose_tempo(line: Line, style: str, compound: bool, rng: np.random.Generator) -> int:
    """Draw the frames of a beat: eighths last whole frames, and the usual note 0.16 to 0.6 s."""
    steps = range(9, 28, 3) if compound else range(8, 26, 2)
    low, high = (
        (60, 100) if style == "chorale" else (62, 126) if style in SLOW_STYLES else (74, 168)
    )
    beat_ql = 1.5 if compound else 1.0
    usual_ql = float(np.median([d for _, d, _ in line]))

    def fits(frames: int) -> bool:
        return 4 <= usual_ql / beat_ql * frames <= (24 if style == "chorale" else 15)

    in_range = [n for n in steps if low <= 60 / (n * FRAME_S) <= high]
    good = [n for n in in_range if fits(n)] or [n for n in steps if fits(n)] or in_range
    return int(rng.choice(good))


def choose_section(
    parts: list[Line], bar_ql: float, needed_ql: float, rng: np.random.Generator
) -> tuple[int, int]:
    """Draw the first bar of a section that lasts `needed_ql`; return it and the last bar.

    A score that is shorter is played from its beginning, again and again.
    """
    end_ql = max(t + d for part in parts for t, d, _ in part)
    bars = max(1, int(np.ceil(end_ql / bar_ql - 1e-3)))
    starts = [b for b in range(0, bars, 4) if (bars - b) * bar_ql >= needed_ql]
    return (int(rng.choice(starts)) if starts else 0), bars


class _Grid:
    """Where the bars stand in time: what one arrangement's lines are written out on."""

    def __init__(self, lead: Line, bar_ql: float, loop_ql: float, quarter_s: float) -> None:
        upbeat_ql = max(0.0, -min(t for t, _, _ in lead))
        self.first_bar_s = FRAME_S * max(
            0.0, float(np.ceil(upbeat_ql * quarter_s / FRAME_S - 1e-6))
        )
        self.bar_ql, self.loop_ql, self.quarter_s = bar_ql, loop_ql, quarter_s

    def play(self, line: Line, velocity: int, held: float) -> list[Note]:
        """Repeat a line until MUSIC_S; notes sound for a share `held`, in whole frames."""
        notes = []
        turns = int(np.ceil(MUSIC_S / (self.loop_ql * self.quarter_s))) + 1
        end_ql = max((t + d for t, d, _ in line), default=0.0)
        for turn in range(turns):
            for t, d, p in line:
                if t < 0 < turn and t + self.loop_ql < end_ql - 1e-3:
                    continue  # the last bar is full and leaves no room for the upbeat
                onset = self.first_bar_s + (t + turn * self.loop_ql) * self.quarter_s
                if not -1e-6 <= onset < MUSIC_S:
                    continue
                accent = 10 if t % self.bar_ql < 1e-3 else 0
                notes.append(
                    (
                        max(0.0, onset),
                        FRAME_S * max(1, round(held * d * self.quarter_s / FRAME_S)),
                        int(p),
                        velocity + accent,
                    )
                )
        return sorted(notes)


def arrange(score: dict, seed: int) -> Arrangement:
    """Arrange a score as MUSIC_S seconds of music; repeated if shorter, cut if longer."""
    rng = np.random.default_rng(seed)
    bar_ql, style = score["bar_ql"], score["style"]
    compound = score["metre"] in COMPOUND
    beat_ql = 1.5 if compound else 1.0
    tonic = int(rng.integers(12))
    shift = (tonic - score["tonic"] + 5) % 12 - 5
    origin_ql = score["pickup_ql"]
    parts = [[[t - origin_ql, d, p + shift] for t, d, p in part] for part in score["parts"]]
    frames = choose_tempo(parts[0], style, compound, rng)
    quarter_s = frames * FRAME_S / beat_ql
    first, last = choose_section(parts, bar_ql, MUSIC_S / quarter_s, rng)
    begin_ql = first * bar_ql - origin_ql - 1e-6
    parts = [[[t - first * bar_ql, d, p] for t, d, p in part if t >= begin_ql] for part in parts]
    grid = _Grid(min(parts, key=min), bar_ql, (last - first) * bar_ql, quarter_s)
    if len(parts) == 1:
        players, ensemble, form = _accompanied(
            parts[0], score, tonic, beat_ql, (last - first) * bar_ql, rng
        )
    else:
        players, ensemble, form = _in_parts(parts, rng)
    voices = [Voice(name, role, grid.play(line, 96, 0.9)) for name, role, line in players]
    drums: list[Note] = []
    if form == "melody with accompaniment" and rng.random() < DRUM_SHARE.get(
        style, DANCE_DRUM_SHARE
    ):
        hits = drum_bar(bar_ql, beat_ql, busy=bool(rng.random() < 0.6))
        bars = int(np.ceil((MUSIC_S - grid.first_bar_s) / (bar_ql * quarter_s)))
        times = [
            (grid.first_bar_s + (b * bar_ql + t) * quarter_s, p, v)
            for b in range(bars)
            for t, p, v in hits
        ]
        drums = sorted((t, 0.1, p, v) for t, p, v in times if t < MUSIC_S)
    return Arrangement(
        voices, drums, ensemble, form, tonic, frames, grid.first_bar_s, bar_ql * quarter_s
    )


Players = list[tuple[str, str, Line]]


def _accompanied(
    melody: Line,
    score: dict,
    tonic: int,
    beat_ql: float,
    length_ql: float,
    rng: np.random.Generator,
) -> tuple[Players, str, str]:
    """Choose players for a melody: alone, over chords, or over chords and bass.

    Returns players, the lead's name, and the form.
    """
    lead = str(rng.choice(LEADS))
    _, low, high, _ = INSTRUMENTS[lead]
    melody = fit_line(melody, max(low, LOWEST_LEAD), high)
    kind = rng.choice(["solo", "chords", "bass"], p=[0.15, 0.3, 0.55])
    if kind == "solo":
        return [(lead, "lead", melody)], lead, "solo"
    bar_ql = score["bar_ql"]
    window_ql = bar_ql / 2 if bar_ql >= 4 and round(bar_ql / beat_ql) % 2 == 0 else bar_ql
    chords = harmonise(melody, tonic, score["mode"], window_ql, round(length_ql / window_ql))
    pattern = str(rng.choice(["block", "march", "offbeat", "broken"], p=[0.25, 0.3, 0.2, 0.25]))
    upper, lower = accompany(chords, window_ql, beat_ql, pattern)
    other = str(rng.choice([name for name in CHORDS if name != lead]))
    if kind == "bass":
        band = [(other, "chords", upper), (BASS, "bass", lower)]
    else:
        band = [(other, "chords", upper + [[t, d, fit(int(p), 40, 52)] for t, d, p in lower])]
    return [(lead, "lead", melody), *band], lead, "melody with accompaniment"


def _in_parts(parts: list[Line], rng: np.random.Generator) -> tuple[Players, str, str]:
    """Choose players for a score in parts: one instrument or a quartet.

    Returns players, the ensemble's name, and the form.
    """
    names = [*PART_PLAYERS, *(QUARTETS if len(parts) == 4 else ())]
    ensemble = str(rng.choice(names))
    players = []
    for i, part in enumerate(parts):
        name = QUARTETS[ensemble][i] if ensemble in QUARTETS else ensemble
        _, low, high, _ = INSTRUMENTS[name]
        line = fit_line(part, low, high)
        players.append((name, "lead" if i == 0 else "part", line))
    return players, ensemble, "parts"
