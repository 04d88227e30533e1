"""Play arrangements with midirenderer on the soundfont that pretty_midi carries.

`synthesise` gives a whole arrangement to the synthesiser. `mix` adds up notes that were synthesised
once each, which is ten times faster, because 40 hours of music consist of a few thousand different
notes.
"""

import io
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import midirenderer
import numpy as np
import pretty_midi
import soundfile
import soxr
from arrange import DRUM_VOLUME, INSTRUMENTS, LEVELS_DB, Arrangement, Note, Voice

from magnet_train.common.folders import replacing

SYNTH_RATE = 48_000
REVERB = 12
"""Reverberation of every player, 0 to 127."""
TAIL_S = 0.8
"""Time after the end of a note in which `mix` lets it ring, in seconds."""
NOTE_VELOCITY = 100


def _volume(voice: Voice) -> int:
    """Return the MIDI volume that brings an instrument to the level of its role.

    The amplitude goes with the square of the volume; levels were measured at 100, the default.
    """
    gain_db = LEVELS_DB[voice.role] - INSTRUMENTS[voice.instrument][3]
    return min(127, round(100 * 10 ** (gain_db / 40)))


def synthesise(piece: Arrangement) -> np.ndarray:
    """Play an arrangement: 48 kHz stereo `t 2`, as the synthesiser gives it."""
    return _play([_player(*line) for line in _lines(piece)])


def mix(piece: Arrangement, rate: int, length_s: float, bank: Path) -> np.ndarray:
    """Play an arrangement note by note: mono `t` of `length_s`.

    Equal to `synthesise`, mixed down and resampled, but for two things: the synthesiser delays
    notes by up to 1.3 ms, to a block of 64 samples, and ends a note when its pitch is played again.

    Args:
        piece: what is played.
        rate: sample rate, in Hz.
        length_s: length of the result, in seconds.
        bank: folder that keeps the sound of each note, for all processes.
    """
    length = round(length_s * rate)
    wav = np.zeros(length, np.float32)
    for program, notes, volume, is_drum in _lines(piece):
        for onset, duration, pitch, velocity in notes:
            sound = _note(program, is_drum, pitch, round(duration, 3), rate, bank)
            start = round(onset * rate)
            gain = (volume / 127 * velocity / NOTE_VELOCITY) ** 2
            wav[start : start + len(sound)] += gain * sound[: max(0, length - start)]
    return wav


def _lines(piece: Arrangement) -> list[tuple[int, list[Note], int, bool]]:
    """List program, notes and volume of each player, and whether it is the drums."""
    lines = [(INSTRUMENTS[v.instrument][0], v.notes, _volume(v), False) for v in piece.voices]
    return [*lines, (0, piece.drums, DRUM_VOLUME, True)] if piece.drums else lines


@cache
def _note(
    program: int, is_drum: bool, pitch: int, duration_s: float, rate: int, bank: Path
) -> np.ndarray:
    """One note at full volume, mono `t`, until it has died away."""
    kind = "drum" if is_drum else program
    path = bank / f"{kind}_{pitch}_{round(1000 * duration_s)}ms_{rate}.npy"
    if path.exists():
        return np.load(path)
    player = _player(program, [(0.0, duration_s, pitch, NOTE_VELOCITY)], 127, is_drum)
    # The synthesiser stops at the last event: a silent note keeps it going.
    silence = _player(0, [(0.0, duration_s + TAIL_S, 60, 1)], 0)
    wav = soxr.resample(_play([player, silence]).mean(1), SYNTH_RATE, rate)
    fade = round(0.1 * rate)
    wav[-fade:] *= np.linspace(1, 0, fade)
    audible = np.flatnonzero(np.abs(wav) > 1e-3 * np.abs(wav).max())
    wav = wav[: audible[-1] + 1].astype(np.float32)
    bank.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, wav)
    return wav


def _player(
    program: int, notes: list[Note], volume: int, is_drum: bool = False
) -> pretty_midi.Instrument:
    player = pretty_midi.Instrument(program=program, is_drum=is_drum)
    controllers = {7: volume, 91: REVERB}
    player.control_changes = [pretty_midi.ControlChange(c, v, 0) for c, v in controllers.items()]
    player.notes = [
        pretty_midi.Note(velocity, pitch, onset, onset + d) for onset, d, pitch, velocity in notes
    ]
    return player


def _play(players: list[pretty_midi.Instrument]) -> np.ndarray:
    # At 120 beats per minute one tick is one millisecond.
    midi = pretty_midi.PrettyMIDI(resolution=500, initial_tempo=120)
    midi.instruments = players
    file = io.BytesIO()
    midi.write(file)
    wav = bytes(midirenderer.render_wave_from(_soundfont(), file.getvalue()))
    return soundfile.read(io.BytesIO(wav))[0]


@cache
def _soundfont() -> bytes:
    return (Path(find_spec("pretty_midi").origin).parent / "TimGM6mb.sf2").read_bytes()
