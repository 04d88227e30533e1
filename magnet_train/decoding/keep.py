"""Which codes are given, and in which windows the others are decoded.

An `Edit` describes in seconds what to regenerate; its `plan` checks it and converts it to frames.
Inside the regions some codes may be kept as hints (hints.py).

Shapes: k codebooks, t frames. Bool: `given`, True = the code is kept; `to_decode`, True = the frame
is regenerated.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.decoding.hints import Hints

OVERLAP = 0.4
"""Share of a window that overlaps with the previous one; MusicGen uses 12 of 30 s."""
SEAM_S = 0.02
"""Length of the cross-fades between recorded and decoded audio, in seconds."""

Region = tuple[float, float]
"""Start and end, in seconds."""


@dataclass(frozen=True)
class Edit:
    """What to regenerate of a recording, in seconds; everything else is kept."""

    regenerate: tuple[Region, ...] = ()
    """Regions to regenerate."""
    keep: tuple[Region, ...] = ()
    """Regions to keep; everything else is regenerated."""
    from_s: float | None = None
    """Start of a continuation (default: the end of the recording)."""
    to_s: float | None = None
    """Total length with a continuation; None = no continuation."""
    loop_s: float | None = None
    """Length of the loop taken from the recording; None = no loop."""
    loop_start_s: float = 0.0
    """Start of the loop in the recording."""
    seam_s: float = 1.0
    """Length to regenerate on each side of a loop's seam, if no region is given."""
    hints: Hints = Hints()

    def plan(
        self,
        num_samples: int,
        sample_rate: int,
        frame_rate: float,
        num_codebooks: int,
        crop_s: float,
    ) -> "Plan":
        """Check the edit, and convert it to frames and samples.

        Args:
            num_samples: length of the recording.
            sample_rate: sample rate of the recording, in Hz.
            frame_rate: frame rate of the codec, in Hz.
            num_codebooks: number of codebooks of the codec.
            crop_s: length of the model's training crops, in seconds.

        Raises:
            UserError: if a region, loop or continuation does not match the recording or the model,
                or there is nothing to decode.
        """
        if self.regenerate and self.keep:
            raise UserError("give --regenerate or --keep, not both")
        if self.hints.hint_codebooks > num_codebooks:
            raise UserError(
                f"--hint_codebooks {self.hints.hint_codebooks}: the codec has {num_codebooks}; "
                "give fewer, or 0 for all"
            )
        if self.loop_s is not None:
            plan = self._loop(num_samples, sample_rate, frame_rate, crop_s)
        else:
            plan = self._linear(num_samples, sample_rate, frame_rate)
        self.given(plan, num_codebooks, frame_rate)
        return plan

    def given(
        self,
        plan: "Plan",
        num_codebooks: int,
        frame_rate: float,
        onsets: Tensor | None = None,
        place: str = "0",
    ) -> Tensor:
        """The codes to keep, bool `k t`: those outside of the regions, and hints in the recording.

        Args:
            plan: the edit in frames.
            num_codebooks: k.
            frame_rate: frame rate in Hz.
            onsets: frames with an onset, bool `t`; needed for `hint_onsets_s`.
            place: key of the random numbers, such as "seed/item".

        Raises:
            UserError: if there is nothing to decode.
        """
        given = self.hints.given(plan.to_decode, num_codebooks, frame_rate, onsets, place)
        given[:, plan.num_recorded :] = False
        if given.all():
            raise UserError(
                "nothing left to decode: give --regenerate, --keep, --to_s, --loop, or hints that "
                f"leave some of the {num_codebooks} codebooks and of the frames open"
            )
        return given

    def _linear(self, num_samples: int, sample_rate: int, frame_rate: float) -> "Plan":
        recorded_s = num_samples / sample_rate
        kept_s = recorded_s if self.from_s is None else self.from_s
        if not 0 <= kept_s <= recorded_s:
            raise UserError(
                f"--from_s {kept_s}: outside the recording, which has {recorded_s:.3f} s"
            )
        if self.from_s is not None and self.to_s is None:
            raise UserError(f"--from_s {self.from_s}: give --to_s too, the length of the result")
        total_s = recorded_s if self.to_s is None else self.to_s
        num_recorded = num_frames = math.ceil(round(total_s * frame_rate, 6))
        to_decode = self._regions(num_frames, frame_rate, recorded_s)
        if self.to_s is not None:
            if not kept_s + 1 / frame_rate <= self.to_s <= 24 * 3600:
                raise UserError(
                    f"--to_s {self.to_s}: must be at least a frame ({1 / frame_rate:.3g} s) beyond "
                    f"the {kept_s:.3f} s that are kept, and at most a day"
                )
            # The cross-fade needs recorded audio after the last kept frame.
            num_recorded = max(0, math.floor((kept_s - SEAM_S) * frame_rate))
            to_decode[num_recorded:] = True
        return Plan(to_decode, num_recorded, 0, round(total_s * sample_rate), is_loop=False)

    def _loop(self, num_samples: int, sample_rate: int, frame_rate: float, crop_s: float) -> "Plan":
        assert self.loop_s is not None
        if self.to_s is not None or self.from_s is not None:
            raise UserError("--loop: give it without --to_s and --from_s")
        check_loop(self.loop_s, sample_rate, frame_rate, crop_s)
        start = round(self.loop_start_s * sample_rate)
        if not 0 <= start < num_samples:
            raise UserError(f"--loop_start_s {self.loop_start_s}: outside the recording")
        available = (num_samples - start) / sample_rate
        num_recorded = num_frames = round(self.loop_s * frame_rate)
        to_decode = self._regions(num_frames, frame_rate, self.loop_s)
        if not (self.regenerate or self.keep or self.hints.keep_any):
            width = max(1, round(self.seam_s * frame_rate))
            to_decode[:width] = to_decode[-width:] = True
        if available < self.loop_s:
            num_recorded = math.floor(max(0.0, available - SEAM_S) * frame_rate)
            to_decode[num_recorded:] = True
        return Plan(to_decode, num_recorded, start, round(self.loop_s * sample_rate), is_loop=True)

    def _regions(self, num_frames: int, frame_rate: float, length_s: float) -> Tensor:
        """Frames in the regions, bool `t`."""
        name = "regenerate" if self.regenerate else "keep"
        inside = torch.zeros(num_frames, dtype=torch.bool)
        for start, end in check_regions(name, self.regenerate or self.keep, length_s, frame_rate):
            last = num_frames if end >= length_s else round(end * frame_rate)
            inside[round(start * frame_rate) : last] = True
        if self.keep:
            return ~inside
        if self.hints.keep_any and not self.regenerate and self.to_s is None:
            return torch.ones_like(inside)
        return inside


class Plan(NamedTuple):
    """An edit in frames and samples."""

    to_decode: Tensor
    """bool `t`, frames to regenerate."""
    num_recorded: int
    """Frames of the recording that are used; hints keep nothing behind them."""
    start: int
    """First used sample of the recording."""
    num_samples: int
    """Length of the result, at the recording's sample rate."""
    is_loop: bool


def check_regions(
    option: str, regions: Sequence[Region], length_s: float, frame_rate: float
) -> list[Region]:
    """Check and sort regions.

    Raises:
        UserError: if a region is outside the recording, empty, shorter than a frame, or overlaps
            another.
    """
    ordered = sorted((start, length_s if math.isinf(end) else end) for start, end in regions)
    for start, end in ordered:
        text = f"--{option} {start:g}:{end:g}"
        if not (0 <= start < length_s and end <= length_s + 1e-6):  # NaN is outside too
            raise UserError(f"{text}: outside the recording, which has {length_s:.3f} s")
        if end <= start:
            raise UserError(f"{text}: is empty; give START:END in seconds")
        if round(min(end, length_s) * frame_rate) - round(start * frame_rate) < 1:
            raise UserError(f"{text}: shorter than a frame of {1 / frame_rate:.3g} s")
    for (_, end), (start, other) in pairwise(ordered):
        if start < end:
            raise UserError(f"--{option} {start:g}:{other:g}: overlaps the region before it")
    return ordered


def check_loop(loop_s: float, sample_rate: int, frame_rate: float, crop_s: float) -> None:
    """Check that an exact loop of this length is possible.

    Raises:
        UserError: if it is shorter than a frame, longer than the trained length, or not a whole
            number of samples.
    """
    if not 1 / frame_rate <= loop_s <= crop_s + 1e-6:
        raise UserError(
            f"a loop of {loop_s:g} s: must be between {1 / frame_rate:g} s, one frame, and "
            f"{crop_s:g} s, the length that the model was trained on"
        )
    samples = loop_s * sample_rate
    if abs(samples - round(samples)) > 1e-4:
        nearest = round(samples) / sample_rate
        raise UserError(
            f"a loop of {loop_s:.6f} s is {samples:.2f} samples at {sample_rate} Hz, no whole "
            f"number: choose another tempo, or a length of {nearest!r} s"
        )


# --- windows --------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Frames that are decoded together."""

    start: int
    end: int
    first: int
    """First frame to decode."""
    stop: int
    """Frames from here on are decoded in a later window."""


def windows(
    to_decode: Tensor, size: int, overlap: int, cuts: Sequence[int] = ()
) -> Iterator[Window]:
    """Windows of at most `size` frames that decode all frames `to_decode`, from left to right.

    A gap that fits is in the middle of its window. For a longer gap, each window overlaps the
    previous one by `overlap` frames. A gap that would be split at the end of a window is decoded in
    the next one.

    Args:
        to_decode: frames to decode, bool `t`.
        size: length of a window, in frames.
        overlap: overlap in frames, below `size`.
        cuts: frames at which a window stops because the prompt changes.
    """
    to_decode = to_decode.clone()
    t = len(to_decode)
    while to_decode.any():
        first = int(to_decode.nonzero()[0])
        cut = min((c for c in cuts if c > first), default=t)
        closed = (~to_decode[first:cut]).nonzero()
        length = int(closed[0]) if len(closed) else cut - first
        before = max((size - length) // 2, overlap)
        start = max(0, min(first - before, t - size))
        end = min(start + size, t)
        stop = min(end, cut)
        if stop == end < t and to_decode[stop]:
            kept = (~to_decode[first:stop]).nonzero()
            stop = first + int(kept[-1]) + 1 if len(kept) else stop
        yield Window(start, end, first, stop)
        to_decode[:stop] = False


def onset_frames(wav: Tensor, hop_samples: int, num_frames: int) -> Tensor:
    """Frames with an onset: `t` samples -> bool `num_frames`.

    Peaks of the spectral flux (rise of log magnitudes) above its mean plus one standard deviation.
    """
    size = 2 * hop_samples
    padded = torch.nn.functional.pad(wav, (size // 2, size))
    spectra = padded.unfold(0, size, hop_samples)[:num_frames] * torch.hann_window(size)
    level = (torch.fft.rfft(spectra).abs() + 1e-3).log()
    flux = torch.nn.functional.pad(level.diff(dim=0).clamp(min=0).sum(1), (1, 0))
    peaks = flux == torch.nn.functional.max_pool1d(flux[None], 3, stride=1, padding=1)[0]
    found = peaks & (flux > flux.mean() + flux.std())
    return torch.nn.functional.pad(found, (0, num_frames - len(found)))
