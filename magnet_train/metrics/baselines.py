"""Baselines: unigram and bigram tables, and copying the nearest visible code.

Codec codes often repeat. So a cross-entropy below the unigram baseline shows little, but one below
the bigram baseline shows that the model has learnt more than repetition. Copying the nearest
visible code is the corresponding baseline of accuracy.

Shapes: b examples, k codebooks, t frames, c entries of a codebook.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from magnet_train.common.errors import UserError

MAX_FRAMES = 2_000_000
"""Default number of frames to count: 11 hours at 50 Hz."""
STRENGTHS = tuple(2.0**i for i in range(-3, 13))
"""Candidates for the weight of the unigram prior in the bigram, in counts."""


@dataclass(frozen=True)
class CountTables:
    """Unigram and bigram counts of each codebook.

    P(c) = (n(c) + 1) / (N + C), and P(c | a) = (n(a, c) + s P(c)) / (n(a) + s), a Dirichlet prior.
    The strength s of each codebook is the one of STRENGTHS with the lowest leave-one-out
    cross-entropy, so that no held-out data is needed.
    """

    unigram: Tensor
    """n(c), int64 `k c`."""
    bigram: Tensor
    """n(a, c), code c after code a, int32 `k c c`: 67 MB for 4 codebooks of 2,048."""

    @classmethod
    def count(
        cls, items: Iterable[Tensor], codebook_size: int, max_frames: int | None = MAX_FRAMES
    ) -> "CountTables":
        """Count the codes `k t` of each item; pairs do not cross items.

        Args:
            items: codes of any integer type, with the same number of codebooks.
            codebook_size: c.
            max_frames: stop counting after this many frames; None = all.

        Raises:
            UserError: if there are no frames.
        """
        unigram = bigram = torch.zeros(0)
        num_frames = 0
        for item in items:
            codes = item.long()
            if not num_frames:
                size = (len(codes), codebook_size)
                unigram = torch.zeros(size, dtype=torch.int64)
                bigram = torch.zeros((*size, codebook_size), dtype=torch.int32)
            for k, row in enumerate(codes):
                unigram[k] += torch.bincount(row, minlength=codebook_size)
                pairs = row[:-1] * codebook_size + row[1:]
                ones = torch.ones(len(pairs), dtype=torch.int32)
                bigram[k].view(-1).index_add_(0, pairs, ones)
            num_frames += codes.shape[1]
            if max_frames is not None and num_frames >= max_frames:
                break
        if not num_frames:
            raise UserError("no codes to count: give at least one item with frames")
        return cls(unigram, bigram)

    @cached_property
    def frequencies(self) -> Tensor:
        """P(c), float64 `k c`."""
        smoothed = self.unigram.double() + 1
        return smoothed / smoothed.sum(1, keepdim=True)

    @cached_property
    def followed(self) -> Tensor:
        """n(a), the number of times each code is followed by another, float64 `k c`."""
        return self.bigram.sum(2, dtype=torch.float64)

    @cached_property
    def strengths(self) -> Tensor:
        """s of each codebook, in counts, float64 `k`."""
        return torch.tensor([self._best_strength(k) for k in range(len(self.unigram))]).double()

    def _best_strength(self, k: int) -> float:
        before, after = self.bigram[k].nonzero(as_tuple=True)
        if not len(before):
            return STRENGTHS[-1]
        counts = self.bigram[k][before, after].double()
        prior, followed = self.frequencies[k][after], self.followed[k][before]
        left_out = [
            (counts * ((counts - 1 + s * prior) / (followed - 1 + s)).log()).sum().item()
            for s in STRENGTHS
        ]
        return max(zip(left_out, STRENGTHS, strict=True))[1]

    def unigram_losses(self, codes: Tensor) -> Tensor:
        """-log P of each code, in nats: `b k t` -> float64 `b k t`, on the CPU."""
        codes = codes.cpu().long()
        loss = -self.frequencies.log()
        return torch.stack([loss[k][codes[:, k]] for k in range(codes.shape[1])], dim=1)

    def bigram_losses(self, codes: Tensor) -> Tensor:
        """-log P of each code given the previous one, in nats: `b k t` -> float64 `b k t`."""
        codes = codes.cpu().long()
        losses = self.unigram_losses(codes)
        for k, s in enumerate(self.strengths.tolist()):
            before, after = codes[:, k, :-1], codes[:, k, 1:]
            counts = self.bigram[k][before, after].double() + s * self.frequencies[k][after]
            losses[:, k, 1:] = -(counts / (self.followed[k][before] + s)).log()
        return losses


def sample_unigram(frequencies: Tensor, num_frames: int, generator: torch.Generator) -> Tensor:
    """Codes drawn independently by their frequencies `k c`: int64 `k t`."""
    return torch.multinomial(frequencies.cpu(), num_frames, True, generator=generator)


def sample_bigram(tables: CountTables, num_frames: int, generator: torch.Generator) -> Tensor:
    """Codes drawn as Markov chains, independently for each codebook: int64 `k t`.

    The first code of each chain is drawn by its frequency.
    """
    codes = [torch.multinomial(tables.frequencies, 1, generator=generator)[:, 0]]
    books = torch.arange(len(tables.unigram))
    prior = tables.strengths[:, None] * tables.frequencies
    for _ in range(num_frames - 1):
        weights = tables.bigram[books, codes[-1]] + prior  # k c
        codes.append(torch.multinomial(weights, 1, generator=generator)[:, 0])
    return torch.stack(codes, dim=1)


def copy_nearest(codes: Tensor, masked: Tensor) -> Tensor:
    """The nearest visible code for every masked frame, or the earlier of two: `b t`.

    Args:
        codes: `b t`.
        masked: bool `b t`, True = to be predicted; visible frames are not changed.

    Returns:
        Codes `b t`; -1 if an example has no visible frame.
    """
    num_frames = codes.shape[1]
    places = torch.arange(num_frames, device=codes.device).expand_as(codes)
    far = 2 * num_frames
    before = places.masked_fill(masked, -far).cummax(1).values
    after = places.masked_fill(masked, far).flip(1).cummin(1).values.flip(1)
    nearest = torch.where(places - before <= after - places, before, after)
    copied = codes.gather(1, nearest.clamp(0, num_frames - 1))
    return copied.masked_fill(masked.all(1, keepdim=True), -1)
