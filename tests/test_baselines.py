"""Count tables and the copying baseline, compared with simple, slow implementations."""

import math
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from helpers_data import codes_of, make_data_codec, write_shards
from torch import Tensor

from magnet_train.callbacks.baselines import CountBaselines
from magnet_train.common.errors import UserError
from magnet_train.data.datamodule import MagnetDataModule
from magnet_train.loss import MaskedLoss
from magnet_train.masking import span_mask
from magnet_train.metrics.baselines import (
    STRENGTHS,
    CountTables,
    copy_nearest,
    sample_bigram,
    sample_unigram,
)
from magnet_train.metrics.fixed_masks import FixedMaskMetrics

SIZE = 7


def chains(num_items: int = 6, num_frames: int = 80, seed: int = 0) -> list[torch.Tensor]:
    """Codes `2 t`: the first codebook repeats three times in four, the second is independent."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(num_items):
        drawn = torch.randint(SIZE, (2, num_frames), generator=generator)
        stays = torch.rand(num_frames, generator=generator) < 0.75
        for t in range(1, num_frames):
            if stays[t]:
                drawn[0, t] = drawn[0, t - 1]
        items.append(drawn)
    return items


def slow_unigram(items: list[torch.Tensor], k: int, code: int) -> float:
    counts = Counter(c for item in items for c in item[k].tolist())
    return (counts[code] + 1) / (counts.total() + SIZE)


def slow_bigram(items: list[torch.Tensor], k: int, before: int, code: int, s: float) -> float:
    pairs = Counter(p for item in items for p in pairwise(item[k].tolist()))
    followed = sum(n for (a, _), n in pairs.items() if a == before)
    return (pairs[before, code] + s * slow_unigram(items, k, code)) / (followed + s)


def test_counts_are_those_of_a_plain_count():
    items = chains()
    tables = CountTables.count(items, SIZE)
    for k in range(2):
        codes = Counter(c for item in items for c in item[k].tolist())
        pairs = Counter(p for item in items for p in pairwise(item[k].tolist()))
        assert {
            (a, c): n
            for a in range(SIZE)
            for c in range(SIZE)
            if (n := int(tables.bigram[k, a, c]))
        } == pairs
        assert {c: n for c in range(SIZE) if (n := int(tables.unigram[k, c]))} == codes


def test_losses_are_those_of_the_plain_tables():
    items, others = chains(), torch.stack(chains(3, 20, seed=5))
    tables = CountTables.count(items, SIZE)
    unigram, bigram = tables.unigram_losses(others), tables.bigram_losses(others)
    for b in range(3):
        for k in range(2):
            row, s = others[b, k].tolist(), tables.strengths[k].item()
            for t, code in enumerate(row):
                single = -math.log(slow_unigram(items, k, code))
                assert unigram[b, k, t].item() == pytest.approx(single)
                given = -math.log(slow_bigram(items, k, row[t - 1], code, s)) if t else single
                assert bigram[b, k, t].item() == pytest.approx(given)


def test_the_strength_is_the_best_with_each_pair_left_out():
    items = chains(2, 30)
    tables = CountTables.count(items, SIZE)
    for k in range(2):
        pairs = [p for item in items for p in pairwise(item[k].tolist())]
        losses = {}
        for s in STRENGTHS:
            losses[s] = 0.0
            for i, (a, c) in enumerate(pairs):
                rest = pairs[:i] + pairs[i + 1 :]
                same = sum(p == (a, c) for p in rest)
                followed = sum(p[0] == a for p in rest)
                losses[s] -= math.log((same + s * slow_unigram(items, k, c)) / (followed + s))
        assert tables.strengths[k].item() == min(losses, key=lambda s: losses[s])


def test_bigram_loss_of_a_markov_chain_is_its_entropy_and_of_noise_the_unigram_loss():
    """A code repeats with probability 3/4 + 1/28; each other code has 1/28."""
    train, held_out = chains(40, 500), torch.stack(chains(20, 500, seed=1))
    tables = CountTables.count(train, SIZE)
    bigram = tables.bigram_losses(held_out)[:, :, 1:].mean((0, 2))
    stays, goes = 0.75 + 0.25 / SIZE, 0.25 / SIZE
    entropy = -stays * math.log(stays) - (SIZE - 1) * goes * math.log(goes)
    assert bigram[0].item() == pytest.approx(entropy, abs=0.02)
    assert bigram[1].item() == pytest.approx(math.log(SIZE), abs=0.01)
    assert tables.strengths[1] == STRENGTHS[-1]  # the code before tells nothing
    assert tables.unigram_losses(held_out).mean((0, 2))[0].item() == pytest.approx(
        math.log(SIZE), abs=0.01
    )


def test_the_count_ends_after_the_item_that_reaches_max_frames():
    items = chains(6, 80)
    some, two = CountTables.count(items, SIZE, 100), CountTables.count(items[:2], SIZE, None)
    assert torch.equal(some.unigram, two.unigram)
    assert torch.equal(some.bigram, two.bigram)
    with pytest.raises(UserError, match="no codes"):
        CountTables.count([], SIZE)


def test_chains_that_are_drawn_have_the_tables_frequencies():
    tables = CountTables.count(chains(40, 500), SIZE)
    drawn = sample_bigram(tables, 20_000, torch.Generator().manual_seed(3))
    again = CountTables.count([drawn], SIZE)
    rows = again.bigram / again.followed[:, :, None]
    wanted = tables.bigram + tables.strengths[:, None, None] * tables.frequencies[:, None]
    wanted /= wanted.sum(2, keepdim=True)
    torch.testing.assert_close(rows, wanted, atol=0.03, rtol=0)
    assert drawn.shape == (2, 20_000)
    assert torch.equal(drawn, sample_bigram(tables, 20_000, torch.Generator().manual_seed(3)))
    single = sample_unigram(tables.frequencies, 20_000, torch.Generator().manual_seed(3))
    shares = torch.stack([row.bincount(minlength=SIZE) for row in single]) / 20_000
    torch.testing.assert_close(shares.double(), tables.frequencies, atol=0.015, rtol=0)
    assert (single[0, 1:] == single[0, :-1]).double().mean().item() == pytest.approx(
        1 / SIZE, abs=0.02
    )


def slow_copy(codes: list[int], masked: list[bool]) -> list[int]:
    visible = [t for t, hidden in enumerate(masked) if not hidden]
    copied = []
    for t in range(len(codes)):
        nearest = min(visible, key=lambda v: (abs(v - t), v), default=None)
        copied.append(-1 if nearest is None else codes[nearest])
    return copied


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("span_len", [1, 3])
def test_copying_is_the_slow_search(rate, span_len):
    generator = torch.Generator().manual_seed(int(10 * rate) + span_len)
    codes = torch.randint(50, (20, 60), generator=generator)
    masked = span_mask(torch.full((20,), rate), 60, span_len, generator)
    masked[0] = True
    found = copy_nearest(codes, masked)
    for b in range(20):
        assert found[b].tolist() == slow_copy(codes[b].tolist(), masked[b].tolist())
    assert torch.equal(found[~masked], codes[~masked])


def test_a_validation_counts_copies_among_its_masked_frames():
    """Two items of 4 and 2 masked frames at two rates; copying is correct for 3 and 0 of them."""
    metric = FixedMaskMetrics(num_codebooks=2)
    loss = MaskedLoss(torch.tensor([4.0, 2.0]), torch.tensor([1, 1]), torch.tensor([4, 2]))
    metric.update(1, torch.tensor([0, 4]), loss, torch.tensor([3, 0]))
    values = metric.compute()
    assert values["val/accuracy/stage1"] == pytest.approx(2 / 6)
    assert values["val/accuracy/stage1/baseline_copying"] == pytest.approx(3 / 6)
    assert values["val/accuracy/stage1/rate0.1"] == pytest.approx(1 / 4)
    assert values["val/accuracy/stage1/baseline_copying/rate0.1"] == pytest.approx(3 / 4)
    assert values["val/accuracy/stage1/baseline_copying/rate0.9"] == 0
    assert not any("stage0" in name for name in values)


def validations(data: MagnetDataModule, codes: Tensor, valid: Tensor) -> list[dict[str, float]]:
    """Logged values of two validations of the same batch."""
    logged: list[dict[str, float]] = []
    module = SimpleNamespace(log_dict=lambda values, **_: logged.append(values))
    trainer = SimpleNamespace(testing=False, sanity_checking=False, datamodule=data)
    callback = CountBaselines()
    for _ in range(2):
        callback.on_validation_epoch_start(trainer, module)
        callback.on_validation_batch_end(trainer, module, None, {"codes": codes, "valid": valid}, 0)
        callback.on_validation_epoch_end(trainer, module)
    return logged


def test_a_validation_scores_its_items_by_counts_of_the_training_codes(tmp_path):
    """Padding is neither counted nor scored; later validations log the same without recounting."""
    codec = make_data_codec(tmp_path / "codec")
    write_shards(
        tmp_path / "train", codec, (3, 2), num_frames=100, seconds=[2.0, 1.0, 2.0, 2.0, 2.0]
    )
    data = MagnetDataModule(
        str(tmp_path / "train"), str(tmp_path / "train"), codec=codec, crop_s=2.0
    )
    train = [torch.from_numpy(codes_of(i, 50 if i == 1 else 100).astype("int64")) for i in range(5)]
    tables = CountTables.count(train, 64)
    counted = data.count_tables()
    assert torch.equal(counted.unigram, tables.unigram)
    assert torch.equal(counted.bigram, tables.bigram)

    codes, valid = torch.stack([train[0], train[4]]), torch.ones(2, 100, dtype=torch.bool)
    valid[1, 40:] = False
    logged = validations(data, codes, valid)
    assert logged[0] == logged[1]
    for name, losses in (
        ("unigram", tables.unigram_losses(codes)),
        ("bigram", tables.bigram_losses(codes)),
    ):
        wanted = [(losses[0, k].sum() + losses[1, k, :40].sum()).item() / 140 for k in range(4)]
        found = [logged[0][f"val/ce/stage{k}/baseline_{name}"] for k in range(4)]
        assert found == pytest.approx(wanted)
        assert logged[0][f"val/ce/baseline_{name}"] == pytest.approx(sum(wanted) / 4)


def test_without_training_shards_there_is_a_warning_and_no_figure(tmp_path):
    codec = make_data_codec(tmp_path / "codec")
    write_shards(tmp_path / "validation", codec, (2,))
    data = MagnetDataModule(None, str(tmp_path / "validation"), codec=codec, crop_s=2.0)
    codes, valid = torch.zeros(1, 4, 9, dtype=torch.int64), torch.ones(1, 9, dtype=torch.bool)
    with pytest.warns(UserWarning, match=r"no baselines of val/ce: no train shards"):
        assert validations(data, codes, valid) == []
