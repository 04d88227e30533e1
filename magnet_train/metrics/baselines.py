"""What a model must beat: tables of counts, and copying the nearest visible code.

Codec codes repeat: the code before tells most of what there is to tell about the next one. So a
cross-entropy below that of single frequencies (unigram) shows little, one below that of a table of
counts given the code before (bigram) shows that more than repetition was learnt. Copying the
nearest visible code is the same for accuracy.

Shapes: b examples, k codebooks, t frames, c entries of a codebook.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from magnet_train.common.errors import UserError

MOST_FRAMES = 2_000_000
"""Frames that tables are counted from unless told otherwise: 11 hours at 50 Hz."""
STRENGTHS = tuple(2.0**i for i in range(-3, 13))
"""Weights of single frequencies in a bigram that are tried, in counts."""


@dataclass(frozen=True)
class CountTables:
    """How often each code occurs and follows each code, for every codebook by itself.

    P(c) = (n(c) + 1) / (N + C), and P(c | a) = (n(a, c) + s P(c)) / (n(a) + s): codes that were
    seldom seen after a are drawn as in general (a Dirichlet prior). The strength s of each codebook
    is the one of STRENGTHS with the lowest cross-entropy when each pair is left out of its own
    count, so that no data need be held back.
    """

    unigram: Tensor
    """n(c), int64 `k c`."""
    bigram: Tensor
    """n(a, c), code c after code a, int32 `k c c`: 67 MB for 4 codebooks of 2,048."""

    @classmethod
    def count(
        cls, items: Iterable[Tensor], codebook_size: int, most_frames: int | None = MOST_FRAMES
    ) -> "CountTables":
        """Counts the codes `k t` of each item; pairs do not cross items.

        Args:
            items: codes of any integer type, with the same number of codebooks.
            codebook_size: c.
            most_frames: after which no further item is counted; None = all.

        Raises:
            UserError: if there is no frame.
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
            if most_frames is not None and num_frames >= most_frames:
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
        """n(a), how often each code is followed by another, float64 `k c`."""
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
        """-log P of each code given the one before, the first by itself: `b k t` -> float64 `b k
        t`.
        """
        codes = codes.cpu().long()
        losses = self.unigram_losses(codes)
        for k, s in enumerate(self.strengths.tolist()):
            before, after = codes[:, k, :-1], codes[:, k, 1:]
            counts = self.bigram[k][before, after].double() + s * self.frequencies[k][after]
            losses[:, k, 1:] = -(counts / (self.followed[k][before] + s)).log()
        return losses


def sample_unigram(tables: CountTables, num_frames: int, generator: torch.Generator) -> Tensor:
    """Codes drawn by their frequencies, each by itself: int64 `k t`."""
    return torch.multinomial(tables.frequencies, num_frames, True, generator=generator)


def sample_bigram(tables: CountTables, num_frames: int, generator: torch.Generator) -> Tensor:
    """Codes drawn as chains, each given the code before it in its own codebook: int64 `k t`.

    The codebooks know nothing of each other. The first code of each is drawn by its frequency.
    """
    codes = [torch.multinomial(tables.frequencies, 1, generator=generator)[:, 0]]
    books = torch.arange(len(tables.unigram))
    prior = tables.strengths[:, None] * tables.frequencies
    for _ in range(num_frames - 1):
        weights = tables.bigram[books, codes[-1]] + prior  # k c
        codes.append(torch.multinomial(weights, 1, generator=generator)[:, 0])
    return torch.stack(codes, dim=1)


def copy_nearest(codes: Tensor, masked: Tensor) -> Tensor:
    """The nearest visible code for every masked frame, of two equally near the earlier: `b t`.

    Args:
        codes: `b t`.
        masked: bool `b t`, True = to be predicted; visible frames stay as they are.

    Returns:
        Codes `b t`; -1, which is no code, where an example has no visible frame.
    """
    num_frames = codes.shape[1]
    places = torch.arange(num_frames, device=codes.device).expand_as(codes)
    far = 2 * num_frames
    before = places.masked_fill(masked, -far).cummax(1).values
    after = places.masked_fill(masked, far).flip(1).cummin(1).values.flip(1)
    nearest = torch.where(places - before <= after - places, before, after)
    copied = codes.gather(1, nearest.clamp(0, num_frames - 1))
    return copied.masked_fill(masked.all(1, keepdim=True), -1)
