"""Metrics are equal on one, two and three processes, with an empty rank and padded shares."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers_errors import refusal
from helpers_ranks import free_port
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.metrics.distributed import all_gather_by_id, all_gather_list, raise_on_all_ranks
from magnet_train.metrics.embedders import ClipFeatures, load_embedder
from magnet_train.metrics.scoring import METRICS, FeatureSet, parse_metric, score

NAMES = [f"{metric}/musicnn" for metric in METRICS]
KEYS = [f"clip{i:02d}" for i in range(13)]
SHARES = {
    "2 processes": [KEYS[0::2], [*KEYS[1::2], KEYS[0]]],  # as a sampler pads
    "3 processes": [KEYS[:9], [], KEYS[9:]],
}


def features(keys: list[str], seed: int, shift: float) -> FeatureSet:
    """Synthetic embeddings, tags and vectors of clips with different numbers of windows."""
    generator = torch.Generator().manual_seed(seed)
    found = FeatureSet(load_embedder("musicnn"))
    for i, key in enumerate(KEYS):
        x = torch.randn(4 + i % 3, 200, generator=generator) + shift
        tags = torch.rand(4, 50, generator=generator)
        vector = torch.randn(128, generator=generator)
        if key in keys:
            found.put(key, ClipFeatures(x, tags, vector), 16_000)
    return found


def values(keys: list[str]) -> dict[str, float]:
    """All metrics of the clips that this rank has embedded."""
    generated = features(keys, 0, 0.3).all_gather()
    reference = features(keys, 1, 0.0).all_gather().statistics()
    captions = {key: f"a tune for {key} harps" for key in KEYS}
    return {name: score(name, generated, reference, captions, system="x").value for name in NAMES}


def gathered_items(rank: int) -> dict[str, Tensor]:
    """Different shapes and types per rank, none on the second, one id on the first and third."""
    items = {
        0: {
            "b": torch.arange(6).view(2, 3),
            "é/9": torch.rand(5)[3:],
            "twice": torch.tensor([1.0]),
        },
        1: {},
        2: {"twice": torch.tensor([2.0]), "a": torch.ones(1, 1).double(), "c": torch.zeros(0, 4)},
    }
    return all_gather_by_id(items[rank])


def failures(rank: int) -> list[str]:
    """What each rank raises if rank 1 has a UserError, then a bug; nothing without errors."""
    with raise_on_all_ranks():
        messages = []
    for error in (UserError("clip x: broken"), OSError("its disk is full")):
        try:
            with raise_on_all_ranks():
                if rank == 1:
                    raise error
        except Exception as raised:
            messages.append(f"{type(raised).__name__} {raised}")
    return messages


def _on_rank(rank: int, shares: list[list[str]], folder: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=len(shares))
    found = {
        "values": values(shares[rank]),
        "items": gathered_items(rank),
        "list": all_gather_list([rank] * rank),
        "failures": failures(rank),
    }
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory) -> dict[str, list[dict]]:
    """Results of every rank, for each distribution of the clips."""
    found = {}
    for name, shares in SHARES.items():
        folder = tmp_path_factory.mktemp("ranks")
        arguments = (shares, str(folder), free_port())
        mp.start_processes(_on_rank, arguments, nprocs=len(shares), start_method="fork")
        found[name] = [torch.load(folder / f"{rank}.pt") for rank in range(len(shares))]
    return found


@pytest.mark.slow
def test_metrics_are_the_same_on_any_number_of_ranks(on_ranks):
    alone = values(KEYS)
    for name, ranks in on_ranks.items():
        for rank in ranks:
            assert rank["values"] == pytest.approx(alone, rel=1e-6, abs=1e-9), name


@pytest.mark.slow
def test_items_are_gathered_by_id_bit_by_bit(on_ranks):
    for ranks in on_ranks.values():
        for rank in ranks:
            items = rank["items"]
            third = ["a"], ["c"]
            before, after = third if len(ranks) == 3 else ([], [])
            assert list(items) == [*before, "b", *after, "twice", "é/9"]
            assert items["twice"].item() == 1  # the lowest rank's
            assert torch.equal(items["b"], torch.arange(6).view(2, 3))
            assert items["é/9"].untyped_storage().nbytes() == 8  # a slice without its source
            assert rank["list"] == [1, 2, 2][: 3 if len(ranks) == 3 else 1]
    assert on_ranks["3 processes"][0]["items"]["a"].dtype == torch.float64
    assert on_ranks["3 processes"][0]["items"]["c"].shape == (0, 4)


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_and_a_bug_keeps_its_traceback(on_ranks):
    for ranks in on_ranks.values():
        for i, rank in enumerate(ranks):
            mistake, bug = rank["failures"]
            if i == 1:
                assert mistake == "UserError clip x: broken"
                assert bug == "OSError its disk is full"
            else:
                assert mistake == "UserError rank 1: clip x: broken"
                assert bug.startswith("RuntimeError rank 1: ")
                assert bug.rstrip().endswith("OSError: its disk is full")


def test_without_ranks_items_are_sorted_copies_and_errors_are_raised():
    x = torch.zeros(2)
    gathered = all_gather_by_id({"b": x, "a": torch.ones(1, requires_grad=True)})
    assert list(gathered) == ["a", "b"]
    assert not gathered["a"].requires_grad
    gathered["b"] += 1
    assert x.sum() == 0
    with raise_on_all_ranks():
        x += 1
    with pytest.raises(OSError, match=r"^too bad$"), raise_on_all_ranks():
        raise OSError("too bad")


def test_names_of_metrics():
    assert parse_metric("kl/passt-10s") == ("kl", "passt-10s")
    for name in ("fad", "fad/", "dance/musicnn", "fad/x"):
        assert f"metric '{name}': give METRIC/EMBEDDER" in refusal(parse_metric, name)


def test_every_metric_says_what_is_missing():
    empty = FeatureSet(load_embedder("musicnn"))
    for name in NAMES:
        assert f"{name}: no clips" in refusal(score, name, empty)
    some = features(KEYS, 0, 0.0)
    for metric in ("fad", "kl", "kad", "coverage"):
        assert f"{metric}/musicnn: no reference" in refusal(score, f"{metric}/musicnn", some)
    with pytest.raises(UserError, match=r"text/musicnn: clip clip00 has no caption"):
        score("text/musicnn", some, None, {"clip01": "a"})
    with pytest.raises(UserError, match=r"kl/musicnn: clip clip01 has no counterpart"):
        score("kl/musicnn", some, some.subset(["clip00", "clip02"]).statistics())


def test_a_clip_counts_once_and_bad_ones_are_named():
    found = FeatureSet(load_embedder("musicnn"))
    wav = 0.1 * torch.randn(1, 4 * 16_000)
    found.add("a", wav, 16_000)
    before = found.embeddings["a"]
    found.add("a", 2 * wav, 16_000)
    assert found.embeddings["a"] is before
    with pytest.raises(UserError, match=r"b: a clip has NaN.*; remove or replace it"):
        found.add("b", wav * float("nan"), 16_000)
    with pytest.raises(UserError, match=r"c: 1\.000 s is too short for musicnn"):
        found.add("c", wav[:, :16_000], 16_000)
