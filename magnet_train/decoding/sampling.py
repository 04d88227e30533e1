"""Sampling of codes: top-p and top-k filters, and the exponential-race (Gumbel-max) trick.

Shapes: `...` any leading axes, c entries of a codebook.
"""

import torch
from torch import Tensor


def top_p_filter(probs: Tensor, top_p: float) -> Tensor:
    """Nucleus filter: zeroes the entries of `… c` beyond a cumulative probability of `top_p`."""
    ordered, index = probs.sort(-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered > top_p, 0)
    return torch.zeros_like(probs).scatter(-1, index, ordered)


def top_k_filter(probs: Tensor, top_k: int) -> Tensor:
    """Zeroes all but the `top_k` largest probabilities of `… c`."""
    if top_k >= probs.shape[-1]:
        return probs
    return probs.masked_fill(probs < probs.topk(top_k, dim=-1).values[..., -1:], 0)


def sample(probs: Tensor, top_p: float, top_k: int, noise: Tensor) -> Tensor:
    """Sample one entry per distribution: probabilities `… c`, noise `…` in [0, 1) -> `…`.

    Uses the exponential-race (Gumbel-max) trick. Inverting the cumulative sum is simpler, but with
    a thousand entries rounding changes one draw in ten thousand, so that results would depend on
    the batch.
    """
    if top_p > 0 and probs.device.type == "cpu":
        return _race_in_nucleus(probs, top_p, noise)
    if top_p > 0:
        probs = top_p_filter(probs, top_p)
    elif top_k > 0:
        probs = top_k_filter(probs, top_k)
    return (probs / exponential(noise, probs.shape[-1])).argmax(-1)


def _race_in_nucleus(probs: Tensor, top_p: float, noise: Tensor) -> Tensor:
    """Sample from the nucleus without sorting, with the same result as after `top_p_filter`.

    A sample is in the nucleus if the total probability of likelier entries is below `top_p`. If it
    is not, it is removed with all less likely entries, and the sample is drawn again with the same
    noise, which one draw in ten needs. Sorting takes five times as long on a CPU; on a GPU it is
    faster than waiting for the result.
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
    """Exponential noise per entry, hashed from uniform numbers: `…` in [0, 1) -> `… size`.

    A hash (Wellons' "lowbias32") gives the same noise on every device, without drawing or copying
    `size` times as many random numbers.
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
    """Share noise within groups of neighbouring frames: `b t` in [0, 1) -> `b t`.

    With independent noise, neighbours with equal distributions draw different codes; with shared
    noise they draw the same, as in held notes.

    Args:
        noise: one number per frame.
        num_frames: length of a group, in frames; 1 = independent noise.
        offset: `b` in [0, 1), shifts the groups by this share of their length.
    """
    if num_frames == 1:
        return noise
    frame = torch.arange(noise.shape[1], device=noise.device)
    group = (frame + (offset * num_frames).floor().long()[:, None]) // num_frames
    return noise.gather(1, group)
