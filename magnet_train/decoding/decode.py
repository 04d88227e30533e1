"""Iterative decoding: from masked frames to codes, stage by stage, a few parallel steps each (MAGNeT, Sec. 3).

One step: mask the least certain spans, ask the network, fill them in, score what was filled in. The network
arrives as a callable, so a lambda tests the loop; nothing here waits for the device between steps.

Shapes: b examples, k codebooks, t frames, c entries, s spans. Masks are bool, True = to be predicted.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from magnet_train.common.errors import UserError
from magnet_train.decoding import audiocraft_compat as reference_compat

Network = Callable[[Tensor, int], Tensor]
"""Codes `b k t` and a stage -> logits `b t c` of that stage's codebook."""


@dataclass(frozen=True)
class DecodingConfig:
    """How codes are decoded. The defaults are those of the published 10-second music models."""

    decoding_steps: tuple[int, ...] = (20, 10, 10, 10)
    """Passes through the network for each stage; as many numbers as codebooks, or one for all."""
    temperature: float = 3.0
    """Softmax temperature at the beginning of a stage; falls to zero at its last step unless told otherwise."""
    anneal_temperature: bool = True
    """Whether the temperature falls linearly over the steps of a stage."""
    top_p: float = 0.9
    """Share of probability mass that is sampled from, in (0, 1]; 0 = all. Wins over top_k."""
    top_k: int = 0
    """Number of most likely entries that are sampled from; 0 = all."""
    greedy: bool = False
    """Whether the most likely entry is taken instead of a sample."""
    max_cfg_coef: float = 10.0
    """Guidance coefficient when all frames are masked; 1 = no guidance."""
    min_cfg_coef: float = 1.0
    """Guidance coefficient when no frame is masked any more; 1 = no guidance."""
    span_len: int = 3
    """Length of the spans that are masked together, in frames; best as in training."""
    span_arrangement: Literal["nonoverlap", "stride1"] = "nonoverlap"
    """Whether spans lie on a fixed grid, or may begin at every frame (always scored by prod)."""
    span_scoring: Literal["max", "prod"] = "max"
    """Whether a span is as certain as its most likely code, or as the product over its codes."""
    reuse: bool = False
    """Whether a step computes only the frames that it predicts and those just decided: faster, not exact (reuse.py)."""
    reference_compat: bool = False
    """Whether audiocraft's faults are reproduced too, for comparisons: see reference_compat.py."""

    def __post_init__(self) -> None:
        for name, ok, want in (
            (
                "decoding_steps",
                len(self.decoding_steps) > 0 and min(self.decoding_steps) >= 1,
                "at least 1 step per stage",
            ),
            ("temperature", self.temperature > 0, "a number above 0"),
            ("top_p", 0 <= self.top_p <= 1, "a share from 0 to 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("max_cfg_coef", self.max_cfg_coef >= 0, "0 or more"),
            ("min_cfg_coef", self.min_cfg_coef >= 0, "0 or more"),
            ("span_len", self.span_len >= 1, "at least 1 frame"),
            ("span_arrangement", self.span_arrangement in ("nonoverlap", "stride1"), "nonoverlap or stride1"),
            ("span_scoring", self.span_scoring in ("max", "prod"), "max or prod"),
        ):
            if not ok:
                raise UserError(f"{name}={getattr(self, name)}: give {want}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DecodingConfig":
        """From JSON or YAML, where tuples are lists."""
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**settings)

    def steps_of(self, num_codebooks: int) -> tuple[int, ...]:
        """`decoding_steps`, one for each of `num_codebooks` stages.

        Raises:
            UserError: if there are several numbers but not as many as stages; a stage without steps would
                leave its codes masked.
        """
        if len(self.decoding_steps) == 1:
            return self.decoding_steps * num_codebooks
        if len(self.decoding_steps) != num_codebooks:
            raise UserError(
                f"decoding_steps={list(self.decoding_steps)} has {len(self.decoding_steps)} numbers "
                f"for {num_codebooks} codebooks: give one for each, or one for all"
            )
        return self.decoding_steps


@dataclass(frozen=True)
class Step:
    """What `on_step` is told after every pass: the stage, the step in it, what was masked and what it became."""

    stage: int
    step: int
    masked: Tensor
    """`b t`, frames that this step predicted."""
    codes: Tensor
    """`b k t`, after the step."""


def item_noise(seed: int, items: Sequence[str], num_steps: int, num_frames: int) -> Tensor:
    """Uniform numbers in [0, 1) that belong to the item: `b n t`, n passes in all.

    Each item's are drawn from a generator seeded by (seed, item) alone, so that its result is the same in
    any batch, on any rank, on any number of GPUs.
    """
    rows = []
    for item in items:
        digest = hashlib.sha256(f"{seed}/{item}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows.append(torch.rand(num_steps, num_frames, generator=generator))
    return torch.stack(rows)


@torch.no_grad()
def decode(
    network: Network,
    unconditional: Network | None,
    codes: Tensor,
    fixed: Tensor,
    codebook_size: int,
    config: DecodingConfig,
    noise: Tensor,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """All stages, lowest codebook first: `b k t` -> `b k t` without a mask id.

    Args:
        network: the conditional pass.
        unconditional: the pass of the null condition, for guidance; None = no guidance whatever the coefficients.
        codes: the prompt where `fixed`, anything elsewhere.
        fixed: `b t`, frames of the prompt; they keep their codes in every codebook.
        codebook_size: c; the mask id is c.
        config: see there.
        noise: from `item_noise`, `b n t` with n the sum of all stages' steps.
        on_step: told of every pass.

    Raises:
        UserError: if the steps do not fit the codebooks.
    """
    steps = config.steps_of(codes.shape[1])
    if config.reference_compat and config.span_arrangement == "nonoverlap":
        whole = codes.shape[2] // config.span_len * config.span_len
        codes, fixed, noise = codes[..., :whole], fixed[:, :whole], noise[..., :whole]
    codes = torch.where(fixed[:, None], codes, codebook_size)
    done = 0
    for stage, num_steps in enumerate(steps):
        stage_noise = noise[:, done : done + num_steps]
        codes = _decode_stage(network, unconditional, codes, fixed, codebook_size, stage, config, stage_noise, on_step)
        done += num_steps
    return codes


def _decode_stage(
    network: Network,
    unconditional: Network | None,
    codes: Tensor,
    fixed: Tensor,
    mask_id: int,
    stage: int,
    config: DecodingConfig,
    noise: Tensor,
    on_step: Callable[[Step], None] | None,
) -> Tensor:
    """Fills codebook `stage` where not `fixed`; one step for each of `noise` (`b n t`)."""
    num_steps = noise.shape[1]
    masked, certainty = ~fixed, torch.empty(())
    # Rounded as in the reference: the number of spans is this share of them, rounded down.
    shares = torch.cos(torch.linspace(0, 1, num_steps) * math.pi * 0.5)
    if not config.reference_compat:
        shares = shares.clamp(min=0)  # the last is -4e-8, and would keep guidance from ending at exactly its minimum
    for step, share in enumerate(shares):
        if step > 0:
            masked = _remask(certainty, masked, fixed, share, config)
        row = codes[:, stage]
        asked = codes.clone()
        asked[:, stage] = torch.where(masked, mask_id, row)
        logits = _guided(network, unconditional, asked, stage, config, float(share)).float()
        temperature = config.temperature * ((num_steps - step - 1) / num_steps if config.anneal_temperature else 1.0)
        probs = torch.softmax(logits / max(temperature, 1e-2), dim=-1)
        chosen = logits.argmax(-1) if config.greedy else sample(probs, config.top_p, config.top_k, noise[:, step])
        certainty = probs.gather(2, chosen[..., None])[..., 0]
        codes = asked.clone()
        codes[:, stage] = torch.where(masked, chosen, row)
        if on_step is not None:
            on_step(Step(stage, step, masked, codes))
    return codes


def _guided(
    network: Network, unconditional: Network | None, codes: Tensor, stage: int, config: DecodingConfig, share: float
) -> Tensor:
    """Logits under classifier-free guidance whose coefficient follows the share still masked (MAGNeT, Sec. 3.4)."""
    coef = share * config.max_cfg_coef + (1 - share) * config.min_cfg_coef
    logits = network(codes, stage)
    if unconditional is None or coef == 1:
        return logits
    base = unconditional(codes, stage)
    return base + (logits - base) * coef


def top_p_filter(probs: Tensor, top_p: float) -> Tensor:
    """Probabilities `… c` with all entries set to zero before which more than `top_p` is already covered."""
    ordered, index = probs.sort(-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered > top_p, 0)
    return torch.zeros_like(probs).scatter(-1, index, ordered)


def top_k_filter(probs: Tensor, top_k: int) -> Tensor:
    """Probabilities `… c` with all but the `top_k` largest set to zero."""
    if top_k >= probs.shape[-1]:
        return probs
    return probs.masked_fill(probs < probs.topk(top_k, dim=-1).values[..., -1:], 0)


def sample(probs: Tensor, top_p: float, top_k: int, noise: Tensor) -> Tensor:
    """One entry per distribution, the winner of a race of exponentials: `… c`, `…` in [0, 1) -> `…`.

    Inverting the cumulative sum would be simpler, but where it has a thousand steps a rounding in the seventh digit
    tips one draw in ten thousand, and an item would not get in a batch what it gets alone.
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

    All entries race; whether a winner is kept shows in the mass of the likelier ones. If it is not, it and all that
    are no likelier leave, and the rest race again with the same noise: the winner among the kept is the same, and one
    draw in ten needs a second race. A sort takes five times as long on a CPU; on a GPU it costs less than waiting for
    the answer would.
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
    """Exponential noise for every entry, hashed from one uniform number per distribution: `…` in [0, 1) -> `… size`.

    A hash (Wellons' "lowbias32") gives every device the same without drawing, or moving, `size` times as many numbers.
    """
    seeds = ((noise.double() - 0.5) * 2**32).to(torch.int32)[..., None]
    entries = torch.arange(size, dtype=torch.int32, device=noise.device)
    x = seeds * -0x61C88647 + entries * -0x7A143589  # int32 wraps, and its constants are signed
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -0x7B935975
    x = x ^ (x >> 16 & 0xFFFF)
    uniform = ((x >> 9 & 0x7FFFFF) + 0.5) / 2**23  # 23 bits, so that float32 reaches neither 0 nor 1
    return uniform.log_().neg_()


def _remask(certainty: Tensor, masked: Tensor, fixed: Tensor, share: Tensor, config: DecodingConfig) -> Tensor:
    """Which frames to predict again: `certainty` and `masked` of the last step, `b t` -> bool `b t`."""
    on_grid = config.span_arrangement == "nonoverlap"
    if not config.reference_compat:
        return (_remask_grid if on_grid else _remask_sliding)(certainty, masked, fixed, share, config)
    if on_grid:
        return reference_compat.remask_grid(certainty, masked, fixed, share, config.span_len, config.span_scoring)
    return reference_compat.remask_sliding(certainty, masked, fixed, share, config.span_len)


def _count(share: Tensor, units: Tensor) -> Tensor:
    """How many of `units` (`b`) to mask: the share rounded down, but at least one."""
    return (float(share) * units).floor().clamp(min=1)  # a share on the CPU: no wait for the device


def _remask_grid(certainty: Tensor, masked: Tensor, fixed: Tensor, share: Tensor, config: DecodingConfig) -> Tensor:
    """The least certain spans of a fixed grid, among those just predicted: `b t` -> bool `b t`.

    The last span of a sequence that is no multiple of the span is shorter; its score is a mean like the
    others', so it competes on equal terms.
    """
    t, length = certainty.shape[1], config.span_len
    tail = -t % length

    def spans(x: Tensor) -> Tensor:  # b t -> b s length, nothing behind the end
        return F.pad(x, (0, tail)).unflatten(1, (-1, length))

    open_frames = spans(masked)
    if config.span_scoring == "max":
        score = 1 - spans(certainty).masked_fill(~open_frames, 0).amax(-1)
    else:
        surprise = -spans(certainty.clamp(min=1e-30).log()).masked_fill(~open_frames, 0)
        score = surprise.sum(-1) / open_frames.sum(-1).clamp(min=1)
    score = score.masked_fill(~open_frames.any(-1), -math.inf)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen = rank < _count(share, spans(~fixed).any(-1).sum(1))[:, None]
    return chosen.repeat_interleave(length, 1)[:, :t] & masked


def _remask_sliding(certainty: Tensor, masked: Tensor, fixed: Tensor, share: Tensor, config: DecodingConfig) -> Tensor:
    """The least certain spans that may begin at every frame, as many as come closest to the share: `b t` -> bool `b t`.

    Spans are taken in the order of their summed surprise. A frame is covered once the first span over it is
    taken, so the number of frames that n spans cover is known for all n at once, without a search.
    """
    t, length = certainty.shape[1], min(config.span_len, certainty.shape[1])
    surprise = -certainty.clamp(min=1e-30).log()
    # Frames that stay as they are count as certain beyond doubt, so spans over them come last.
    surprise = surprise.masked_fill(~masked, -1e4)
    score = surprise.unfold(1, length, 1).sum(-1)  # b s
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    never = t + 1
    over = F.pad(rank, (length - 1, length - 1), value=never).unfold(1, length, 1)  # b t length, spans over a frame
    first = over.amin(-1).masked_fill(~masked, never)
    covered = torch.zeros(len(first), t + 2, device=first.device).scatter_add_(1, first, masked.float()).cumsum(1)
    target = _count(share, (~fixed).sum(1))[:, None]
    # Entry n of `covered` counts the frames of the first n + 1 spans; of equally close ones take the fewest.
    last = (covered[:, : rank.shape[1]] - target).abs().argmin(1, keepdim=True)
    return (first <= last) & masked
