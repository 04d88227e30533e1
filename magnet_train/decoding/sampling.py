"""One entry from each distribution: filters, exponential noise, and the race that draws the sample.

Shapes: `...` any leading axes, c entries of a codebook.
"""

import torch
from torch import Tensor


def top_p_filter(probs: Tensor, top_p: float) -> Tensor:
    """Probabilities `… c` with all entries set to zero before which more than `top_p` is already
    covered.
    """
    ordered, index = probs.sort(-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered > top_p, 0)
    return torch.zeros_like(probs).scatter(-1, index, ordered)


def top_k_filter(probs: Tensor, top_k: int) -> Tensor:
    """Probabilities `… c` with all but the `top_k` largest set to zero."""
    if top_k >= probs.shape[-1]:
        return probs
    return probs.masked_fill(probs < probs.topk(top_k, dim=-1).values[..., -1:], 0)


def sample(probs: Tensor, top_p: float, top_k: int, noise: Tensor) -> Tensor:
    """One entry per distribution, the winner of a race of exponentials: `… c`, `…` in [0, 1) ->
    `…`.

    Inverting the cumulative sum would be simpler, but where it has a thousand steps a rounding in
    the seventh digit tips one draw in ten thousand, and an item would not get in a batch what it
    gets alone.
    """
    if top_p > 0 and probs.device.type == "cpu":
        return _race_in_nucleus(probs, top_p, noise)
    if top_p > 0:
        probs = top_p_filter(probs, top_p)
    elif top_k > 0:
        probs = top_k_filter(probs, top_k)
    return (probs / exponential(noise, probs.shape[-1])).argmax(-1)


def _race_in_nucleus(probs: Tensor, top_p: float, noise: Tensor) -> Tensor:
    """The winner among the entries that `top_p_filter` keeps, without sorting them all.

    All entries race; whether a winner is kept shows in the mass of the likelier ones. If it is not,
    it and all that are no likelier leave, and the rest race again with the same noise: the winner
    among the kept is the same, and one draw in ten needs a second race. A sort takes five times as
    long on a CPU; on a GPU it costs less than waiting for the answer would.
    """
    rows, exponentials = probs.flatten(0, -2), exponential(noise, probs.shape[-1]).flatten(0, -2)
    winners = (rows / exponentials).argmax(-1)
    unsure = torch.arange(len(rows))
    candidates = rows
    while len(unsure):
        chance = candidates.gather(1, winners[unsure, None])
        likelier = torch.where(candidates > chance, candidates, 0)
        outside = likelier.sum(1) > top_p
        unsure, candidates = unsure[outside], likelier[outside]
        winners[unsure] = (candidates / exponentials[unsure]).argmax(-1)
    return winners.unflatten(0, probs.shape[:-1])


def exponential(noise: Tensor, size: int) -> Tensor:
    """Exponential noise for every entry, hashed from one uniform number per distribution: `…` in
    [0, 1) -> `… size`.

    A hash (Wellons' "lowbias32") gives every device the same without drawing, or moving, `size`
    times as many numbers.
    """
    seeds = ((noise.double() - 0.5) * 2**32).to(torch.int32)[..., None]
    entries = torch.arange(size, dtype=torch.int32, device=noise.device)
    x = seeds * -0x61C88647 + entries * -0x7A143589  # int32 wraps, and its constants are signed
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -0x7B935975
    x = x ^ (x >> 16 & 0xFFFF)
    uniform = (
        (x >> 9 & 0x7FFFFF) + 0.5
    ) / 2**23  # 23 bits, so that float32 reaches neither 0 nor 1
    return uniform.log_().neg_()


def share_noise(noise: Tensor, num_frames: int, offset: Tensor) -> Tensor:
    """Let groups of neighbouring frames share one number: `b t` in [0, 1) -> `b t`.

    With a number of their own, two neighbours whose distributions agree draw different entries;
    with a shared one they draw the same, as held notes do.

    Args:
        noise: one number per frame.
        num_frames: length of a group, in frames; 1 = every frame keeps its own.
        offset: `b` in [0, 1), moves the borders between the groups by that share of a group.
    """
    if num_frames == 1:
        return noise
    frame = torch.arange(noise.shape[1], device=noise.device)
    group = (frame + (offset * num_frames).floor().long()[:, None]) // num_frames
    return noise.gather(1, group)
