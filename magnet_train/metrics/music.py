"""Music metrics: notes, key and beat of clips, and whether key and tempo match the caption.

They are computed with signal processing, without a network. `measure_clip` measures one clip;
`score_music` computes means with intervals from many measured clips, their captions and real clips.
No metric depends on the level of the audio. None is sufficient alone: a drone fits a scale
perfectly, so read `scale_fit` together with `chroma_change`.

Shapes: t samples, n spectra, m notes.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.metrics.chroma import HOP_S as CHROMA_HOP_S
from magnet_train.metrics.chroma import chroma
from magnet_train.metrics.intervals import bootstrap_interval
from magnet_train.metrics.networks.frontend import mel_filters

VERSION = "1"
"""Version of the measures in records; increased when their values change."""
HOP_S = 0.016
"""Hop of onset strength and pitch in seconds; also the unit of note lengths."""
MIN_DURATION_S = 1.0
"""Length of the shortest clip that can be measured, in seconds."""
MAX_LAG_S = 2.4
"""Longest lag of a clip's stored autocorrelation: two beats at 50 bpm."""
PERIODS_S = (0.2, 1.2)
"""Lags searched for a period, in seconds: 50 to 300 bpm."""
SILENT_PEAK = 1e-6
"""A clip with no sample above this is silent: -120 dBFS."""

MAJOR_SCALE = (0, 2, 4, 5, 7, 9, 11)
"""In semitones above the tonic; that of natural minor is one of its transpositions."""
# Krumhansl and Kessler (1982), Psychological Review 89: how well each pitch class fits a key,
# tonic first.
PROFILES = {
    "major": np.array([6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88]),
    "minor": np.array([6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17]),
}

# --- captions ------------------------------------------------------------------------------------

_NATURALS = {"c": 0, "d": 2, "e": 4, "f": 5, "g": 7, "a": 9, "b": 11}
_ACCIDENTALS = {"flat": -1, "♭": -1, "b": -1, "sharp": 1, "♯": 1, "#": 1}
_KEY = re.compile(
    r"\b(?:in|key(?:\s+of)?:?)\s+(?:the\s+key\s+of\s+)?"
    r"(?!a\s+(?:minor|major)\s+(?:key|mode|scale|chord|third)\b)"
    r"(?P<note>[A-Ga-g])(?:[\s-]*(?P<accidental>flat|sharp|♭|♯|b|#))?"
    r"[\s-]+(?P<mode>[Mm]ajor|[Mm]inor)\b"
)
_TEMPO = re.compile(
    r"\b(?P<first>\d{2,3}(?:\.\d+)?)\s*(?:bpm|beats\s+(?:per|a)\s+minute)\b"
    r"|\bbpm\s*(?:of|:)?\s*(?P<second>\d{2,3}(?:\.\d+)?)\b",
    re.IGNORECASE,
)


def parse_key(caption: str) -> tuple[int, str] | None:
    """Tonic (0 = C … 11 = B) and mode ("major" or "minor") in a caption, or None.

    The key must follow "in" or "key of"; "in a minor key" gives None.

    >>> parse_key("a slow air for flute, in E flat major, 92 bpm")
    (3, 'major')
    >>> parse_key("in a minor key") is None
    True
    """
    found = _KEY.search(caption)
    if found is None:
        return None
    tonic = _NATURALS[found["note"].lower()] + _ACCIDENTALS.get(found["accidental"] or "", 0)
    return tonic % 12, found["mode"].lower()


def parse_tempo(caption: str) -> float | None:
    """Tempo in a caption in bpm, or None. Values below 20 or above 400 are ignored.

    >>> parse_tempo("a slow air, at 92 beats per minute")
    92.0
    """
    found = _TEMPO.search(caption)
    if found is None:
        return None
    bpm = float(found["first"] or found["second"])
    return bpm if 20 <= bpm <= 400 else None


# --- pitch classes -------------------------------------------------------------------------------


def chroma_change(classes: np.ndarray) -> float:
    """1 - mean cosine of chroma half a second apart: about 0.3 for tunes, 0 for a drone and
    silence.

    Args:
        classes: unit vectors of `chroma`, `n 12`, one each 0.064 s; silent frames are ignored.
    """
    distance = round(0.5 / CHROMA_HOP_S)
    before, after = classes[:-distance], classes[distance:]
    sounds = before.any(1) & after.any(1)
    if not sounds.any():
        return 0.0
    return float(1 - (before * after).sum(1)[sounds].mean())


def scale_fit(classes: np.ndarray) -> float:
    """Share of chroma energy in the best of the scale's 12 transpositions, minus their mean (7/12).

    0 for noise and silence, 5/12 where every note is in one scale. `classes` are of `chroma`.
    """
    energy = np.square(classes).sum(0)
    if not energy.any():
        return 0.0
    inside = np.zeros(12)
    inside[list(MAJOR_SCALE)] = 1
    shares = [energy @ np.roll(inside, tonic) / energy.sum() for tonic in range(12)]
    return float(max(shares) - np.mean(shares))


def key_rank(classes: np.ndarray, tonic: int, mode: str) -> float:
    """Rank of a tonic among the 12 of its mode, by correlation with Krumhansl's profiles.

    1 is best, 6.5 is chance. Equal correlations share their mean rank, so that silence has 6.5.

    Args:
        classes: chroma, `n 12`, or its sum over time, `12`.
        tonic: 0 = C … 11 = B.
        mode: "major" or "minor".

    Raises:
        KeyError: for another mode.
    """
    total = classes.reshape(-1, 12).sum(0)
    spread = total - total.mean()
    profile = PROFILES[mode] - PROFILES[mode].mean()
    fits = np.array([spread @ np.roll(profile, t) for t in range(12)])
    fits = np.round(fits / max(np.linalg.norm(spread) * np.linalg.norm(profile), 1e-12), 9)
    from scipy.stats import rankdata  # takes a tenth of the start of `fit`

    return float(rankdata(-fits)[tonic])


# --- rhythm --------------------------------------------------------------------------------------


def onset_strength(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Onset strength (spectral flux): `t` -> `n`, one value each HOP_S; all zero for silence.

    Increases of the log level in 40 mel bands from 30 Hz to 8 kHz, summed over bands. Levels are
    clipped 60 dB below the clip's highest. Windows of 0.064 s.
    """
    magnitude, size = _spectra(wav, sample_rate, 0.064)
    bands = magnitude @ _mel_filters(sample_rate, size)
    highest = bands.max(initial=0)
    if highest <= 0:
        return np.zeros(len(bands))
    level = np.log(np.maximum(bands / highest, 1e-3))
    rise = np.maximum(np.diff(level, axis=0, prepend=level[:1]), 0)
    return rise.sum(1).astype(np.float64)


def autocorrelation(strength: np.ndarray, most: int = round(MAX_LAG_S / HOP_S)) -> np.ndarray:
    """Normalised autocorrelation of onset strength at lags 0 … most; all zero for a constant.

    Each lag is normalised by the energies of the two overlapping parts, so long lags are not
    underestimated. The mean of the whole sequence is subtracted first.

    Args:
        strength: `n`.
        most: longest lag, in hops. Lags above half the clip are 0.
    """
    n = len(strength)
    centred = strength - strength.mean()
    result = np.zeros(most + 1)
    energy = np.concatenate([[0.0], np.cumsum(centred**2)])
    if energy[-1] <= 1e-12 * n:
        return result
    size = fast_length(2 * n)
    products = np.fft.irfft(np.abs(np.fft.rfft(centred, size)) ** 2, size)
    lags = np.arange(min(most, n // 2) + 1)
    heads, tails = energy[n - lags], energy[n] - energy[lags]
    result[lags] = products[lags] / np.sqrt(np.maximum(heads * tails, 1e-24))
    return result


def periodicity(correlation: np.ndarray) -> float:
    """Highest `autocorrelation` of onset strength at lags of 0.2 to 1.2 s.

    1 for a metronome, about 0.1 for noise.
    """
    return float(_periods(correlation).max())


def beat_strength(correlation: np.ndarray, bpm: float) -> float:
    """Highest autocorrelation at one beat, half a beat and two beats, minus the upper quartile.

    The quartile is over lags of 0.2 to 1.2 s. About 0.5 for music at that tempo, 0 for music at
    another tempo and for noise.

    Args:
        correlation: of `autocorrelation`.
        bpm: beats per minute, of `parse_tempo`; lags that `correlation` lacks are ignored.
    """
    lags = np.array([0.5, 1, 2]) * 60 / bpm / HOP_S
    lags = lags[lags <= len(correlation) - 1]
    at_beat = np.interp(lags, np.arange(len(correlation)), correlation).max()
    return float(at_beat - np.quantile(_periods(correlation), 0.75))


def _periods(correlation: np.ndarray) -> np.ndarray:
    first, last = (round(s / HOP_S) for s in PERIODS_S)
    return correlation[first : last + 1]


# --- notes ---------------------------------------------------------------------------------------

LOWEST_NOTE, HIGHEST_NOTE = 45, 96
"""Range of the salient pitch as MIDI numbers: A2, 110 Hz, to C7, 2.1 kHz."""
_HARMONICS = 6
_SHORTEST_NOTE = 3
"""In hops: 48 ms."""


def notes(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Notes of the most salient voice: mono `t` -> onset (s), length (s) and MIDI number, `m 3`.

    The salient pitch of each hop is the semitone whose harmonics have the most energy (harmonic
    summation; Hermes, 1988). A note is a run of one pitch, divided at repeated onsets. Hops 40 dB
    below the loudest are rests; runs under 48 ms are merged into their longer neighbour. With
    several voices the loudest at each hop determines the notes, so compare with real clips of the
    same kind and not with a score.
    """
    magnitude, size = _spectra(wav, sample_rate, 0.096)
    salience = np.sqrt(magnitude) @ _harmonic_sums(sample_rate, size)
    level = salience.max(1, initial=0)
    sounds = level > 0.1 * level.max(initial=0)  # of roots: 0.1 is -40 dB
    pitch = np.where(sounds, salience.argmax(1), -1)
    pitch = _without_short_runs(pitch)
    own = np.take_along_axis(salience, np.maximum(pitch, 0)[:, None], 1)[:, 0]
    return _cut(pitch, _struck(own))


def _without_short_runs(pitch: np.ndarray) -> np.ndarray:
    """Merge runs under the shortest note into the longer of their neighbours."""
    pitch = pitch.copy()
    while True:
        edges = np.flatnonzero(np.diff(pitch)) + 1
        starts = np.concatenate([[0], edges])
        lengths = np.diff(np.concatenate([starts, [len(pitch)]]))
        if len(starts) == 1 or lengths.min() >= _SHORTEST_NOTE:
            return pitch
        i = int(lengths.argmin())
        before = lengths[i - 1] if i > 0 else -1
        after = lengths[i + 1] if i + 1 < len(starts) else -1
        value = pitch[starts[i] - 1] if before >= after else pitch[starts[i] + lengths[i]]
        pitch[starts[i] : starts[i] + lengths[i]] = value


def _struck(own: np.ndarray) -> np.ndarray:
    """Repeated onsets of a pitch, in hops: its salience rises by a third within 3 hops."""
    rise = np.zeros(len(own))
    rise[3:] = own[3:] / np.maximum(own[:-3], 1e-9 + 1e-3 * own.max(initial=0))
    around = np.lib.stride_tricks.sliding_window_view(np.pad(rise, 4), 9).max(1)
    # Because of the window's width the increase is greatest 2 hops after the onset.
    return np.flatnonzero((rise > 4 / 3) & (rise == around)) - 2


def _cut(pitch: np.ndarray, struck: np.ndarray) -> np.ndarray:
    """Runs of a pitch as notes, `m 3`; repeated onsets near the ends of a run are ignored."""
    edges = [0, *(np.flatnonzero(np.diff(pitch)) + 1), len(pitch)]
    found = []
    for start, end in pairwise(edges):
        if end == start or pitch[start] < 0:
            continue
        inner = struck[(struck >= start + 2 * _SHORTEST_NOTE) & (struck <= end - _SHORTEST_NOTE)]
        bounds = [start, *inner, end]
        for first, last in pairwise(bounds):
            found.append((first * HOP_S, (last - first) * HOP_S, LOWEST_NOTE + int(pitch[start])))
    return np.array(found, dtype=np.float64).reshape(-1, 3)


# --- clips ---------------------------------------------------------------------------------------

MEASURES = {
    "chroma_change": "1 - cosine of pitch classes half a second apart: 0 for a drone",
    "scale_fit": "chroma energy in the best of 12 transpositions of the scale, minus their mean",
    "key_rank": "rank of the caption's tonic among 12 by Krumhansl's profiles; 6.5 is chance",
    "beat": "autocorrelation of onsets at the caption's beat, minus the upper quartile of all lags",
    "periodicity": "highest autocorrelation of onsets at lags of 0.2 to 1.2 s",
    "note_lengths": "distance of note lengths to those of real clips: Wasserstein-1 in log seconds",
    "note_intervals": "the same distance for the times between note onsets",
}
"""Results of `score_music` and their meanings."""
REFERENCE_MEASURES = ("note_lengths", "note_intervals")


@dataclass(frozen=True)
class ClipMusic:
    """Measurements of one clip, independent of its caption."""

    chroma_change: float
    scale_fit: float
    classes: np.ndarray
    """Chroma summed over time, `12`; all zero for silence."""
    correlation: np.ndarray
    """Autocorrelation of onset strength at lags 0 … MAX_LAG_S, in hops."""
    notes: np.ndarray
    """Onset (s), length (s) and MIDI number, `m 3`."""

    def packed(self) -> tuple[Tensor, Tensor]:
        """As float64 tensors: everything except notes as `1 d`, and notes `m 3`."""
        row = [[self.chroma_change, self.scale_fit], self.classes, self.correlation]
        return torch.from_numpy(np.concatenate(row))[None], torch.from_numpy(self.notes)

    @classmethod
    def unpacked(cls, row: Tensor, notes: Tensor) -> "ClipMusic":
        """Inverse of `packed`."""
        values = row[0].double().numpy()
        return cls(
            float(values[0]), float(values[1]), values[2:14], values[14:], notes.double().numpy()
        )

    def lengths(self) -> np.ndarray:
        """Note lengths in seconds, without the first and last notes, which the clip cuts off."""
        return self.notes[1:-1, 1]

    def intervals(self) -> np.ndarray:
        """Seconds between onsets of consecutive notes, without the first note, which is cut off."""
        return np.diff(self.notes[1:, 0])


def measure_clip(wav: np.ndarray | Tensor, sample_rate: int) -> ClipMusic:
    """Measures one clip; 10 s at 16 kHz take about 30 ms on one core.

    Args:
        wav: mono `t` or `channels t`, which are averaged.
        sample_rate: in Hz.

    Raises:
        UserError: if the clip is shorter than MIN_DURATION_S, or has NaN or infinite samples.
    """
    mono = torch.as_tensor(wav).detach().cpu().float().numpy()
    if mono.ndim == 2:
        mono = mono.mean(0)
    if mono.ndim != 1 or len(mono) < MIN_DURATION_S * sample_rate:
        raise UserError(
            f"a clip of shape {mono.shape} at {sample_rate} Hz: give {MIN_DURATION_S} s or more"
        )
    if not np.isfinite(mono).all():
        raise UserError("a clip has NaN or infinite samples")
    peak = float(np.abs(mono).max())
    # Makes all metrics independent of the level.
    mono = mono / peak if peak > SILENT_PEAK else np.zeros_like(mono)
    classes = chroma(mono, sample_rate)
    return ClipMusic(
        chroma_change=chroma_change(classes),
        scale_fit=scale_fit(classes),
        classes=classes.sum(0),
        correlation=autocorrelation(onset_strength(mono, sample_rate)),
        notes=notes(mono, sample_rate),
    )


@dataclass(frozen=True)
class MusicFigure:
    """One metric of a set of clips."""

    value: float
    interval: tuple[float, float] | None
    """95 % over clips (bootstrap); None for a single clip."""
    num_clips: int
    """Clips included."""
    num_skipped: int = 0
    """Clips excluded because their caption has no key or tempo, or because they have no notes."""


def score_music(
    clips: Mapping[str, ClipMusic],
    captions: Mapping[str, str] | None = None,
    reference: Mapping[str, ClipMusic] | None = None,
) -> dict[str, MusicFigure]:
    """Means over clips with intervals, and distances of note lengths and intervals to real clips.

    A silent clip has chroma change, scale fit, periodicity and beat 0, and a key rank at chance.

    Args:
        clips: by id.
        captions: by id; clips whose caption has no key (no tempo) are excluded from "key_rank"
            ("beat").
        reference: real clips, with any ids.

    Returns:
        The MEASURES that can be computed. Measures that need a key, a tempo, notes or a reference
        are absent if no clip has them.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for key, clip in clips.items():
        for name, value in _measures_of(clip, (captions or {}).get(key, "")):
            values[name].append(value)
    figures: dict[str, MusicFigure | None] = {
        name: _mean_figure(some, len(clips)) for name, some in values.items()
    }
    for name in REFERENCE_MEASURES:
        durations = [_durations(clip, name) for clip in clips.values()]
        real = [_durations(clip, name) for clip in (reference or {}).values()]
        figures[name] = _distance_figure(durations, real)
    return {name: figure for name in MEASURES if (figure := figures.get(name)) is not None}


def _measures_of(clip: ClipMusic, caption: str) -> Iterator[tuple[str, float]]:
    """Measures of one clip, by name; those of the key and tempo that its caption names."""
    yield "chroma_change", clip.chroma_change
    yield "scale_fit", clip.scale_fit
    key = parse_key(caption)
    if key:
        yield "key_rank", key_rank(clip.classes, *key)
    bpm = parse_tempo(caption)
    if bpm:
        yield "beat", beat_strength(clip.correlation, bpm)
    yield "periodicity", periodicity(clip.correlation)


def _mean_figure(values: list[float], num_clips: int) -> MusicFigure:
    """Mean over the clips that have a value, out of `num_clips`."""
    interval = bootstrap_interval(torch.tensor(values).double()) if len(values) > 1 else None
    return MusicFigure(float(np.mean(values)), interval, len(values), num_clips - len(values))


def _durations(clip: ClipMusic, name: str) -> np.ndarray:
    return clip.lengths() if name == "note_lengths" else clip.intervals()


def duration_distance(some: np.ndarray, others: np.ndarray) -> float:
    """Wasserstein-1 distance between the logarithms of two sets of durations (s).

    Doubling all durations gives ln 2.

    Raises:
        ValueError: if a set is empty.
    """
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(np.log(some), np.log(others)))


def _distance_figure(clips: Sequence[np.ndarray], real: Sequence[np.ndarray]) -> MusicFigure | None:
    """Distance of all clips' durations to the real ones, with a bootstrap interval over clips.

    A resample is on average further from the real durations than the whole set, so the interval is
    biased upwards.
    """
    some = [x for x in clips if len(x)]
    others = np.concatenate([np.zeros(0), *real])
    if not some or not len(others):
        return None
    joined = np.concatenate(some)
    value = duration_distance(joined, others)
    num_skipped = len(clips) - len(some)
    if len(some) < 2:
        return MusicFigure(value, None, len(some), num_skipped)
    # Durations are multiples of a hop, so counts of each value are sufficient.
    hops = np.round(np.concatenate([joined, others]) / HOP_S)
    grid, places = np.unique(hops, return_inverse=True)
    owner = np.repeat(np.arange(len(some)), [len(x) for x in some])
    counts = np.zeros((len(some), len(grid)))
    np.add.at(counts, (owner, places[: len(joined)]), 1)
    shares = np.full(len(some), 1 / len(some))
    picks = np.random.default_rng(0).multinomial(len(some), shares, size=1000)
    drawn = np.cumsum(picks @ counts, axis=1)
    theirs = np.cumsum(np.bincount(places[len(joined) :], minlength=len(grid))) / len(others)
    apart = np.abs(drawn / drawn[:, -1:] - theirs)[:, :-1] @ np.diff(np.log(grid))
    low, high = np.quantile(apart, [0.025, 0.975])
    return MusicFigure(value, (float(low), float(high)), len(some), num_skipped)


# --- spectra -------------------------------------------------------------------------------------


def fast_length(least: int) -> int:
    """The length from `least` on whose Fourier transform is fastest."""
    from scipy.fft import next_fast_len  # half a tenth of the start of `fit --help`

    return int(next_fast_len(least, real=True) or least)


def _spectra(wav: np.ndarray, sample_rate: int, window_s: float) -> tuple[np.ndarray, int]:
    """Magnitudes centred at each multiple of HOP_S, float32 `n bins`, and the FFT size."""
    width = round(window_s * sample_rate)
    size = fast_length(width)
    padded = torch.from_numpy(np.pad(wav.astype(np.float32), (width // 2, width)))
    centres = np.round(np.arange(0, len(wav) / sample_rate, HOP_S) * sample_rate).astype(int)
    frames = padded.unfold(0, width, 1)[torch.from_numpy(centres)] * torch.hann_window(width)
    return torch.fft.rfft(frames, size).abs().numpy(), size


@lru_cache(maxsize=8)
def _mel_filters(sample_rate: int, size: int) -> np.ndarray:
    """`bins 40`."""
    highest = min(8000.0, sample_rate / 2)
    return mel_filters(sample_rate, size, 40, "htk", 30.0, highest).numpy().T.copy()


@lru_cache(maxsize=8)
def _harmonic_sums(sample_rate: int, size: int) -> np.ndarray:
    """Weights of bins in each semitone's salience, `bins p`: 0.84^h about its h-th harmonic."""
    midi = np.arange(LOWEST_NOTE, HIGHEST_NOTE + 1)
    weights = np.zeros((size // 2 + 1, len(midi)), dtype=np.float32)
    for harmonic in range(_HARMONICS):
        place = 440 * 2 ** ((midi - 69) / 12) * (harmonic + 1) * size / sample_rate
        low = place.astype(int)
        inside = low + 1 < len(weights)
        columns, low, share = np.flatnonzero(inside), low[inside], (place - low)[inside]
        weights[low, columns] += 0.84**harmonic * (1 - share)
        weights[low + 1, columns] += 0.84**harmonic * share
    return weights
