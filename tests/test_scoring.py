"""The same figures wherever they are computed: on one process, two, three, with an empty rank, with padded shares."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers_ranks import free_port

from magnet_train.common.errors import UserError
from magnet_train.metrics.embedders import HeardClip, Listener, load_listener
from magnet_train.metrics.scoring import KINDS, HeardSet, parse_metric, score, together

METRICS = [f"{kind}/musicnn" for kind in KINDS]
NUM_CLIPS = 13


def words() -> Listener:
    """The shipped network's name and captions' encoder, with clips that need not be heard: these are given."""
    return load_listener("musicnn")


def heard_clips(seed: int, shift: float) -> dict[str, HeardClip]:
    """Made-up embeddings, tags and vectors of clips of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    clips = {}
    for i in range(NUM_CLIPS):
        n = 4 + i % 3
        x = torch.randn(n, 200, generator=generator) + shift
        clips[f"clip{i:02d}"] = HeardClip(
            x, torch.rand(4, 50, generator=generator), torch.randn(128, generator=generator)
        )
    return clips


def figures(own: list[str]) -> dict[str, float]:
    """Every metric, of the clips that this rank has heard."""
    listener, generated = words(), HeardSet(words())
    for key, clip in heard_clips(0, 0.3).items():
        if key in own:
            generated.put(key, clip, 16_000)
    real = HeardSet(listener)
    for key, clip in heard_clips(1, 0.0).items():
        if key in own:
            real.put(key, clip, 16_000)
    generated, reference = generated.gathered(), real.gathered().statistics()
    captions = {f"clip{i:02d}": f"a tune for {i} harps" for i in range(NUM_CLIPS)}
    return {metric: score(metric, generated, reference, captions, system="x").value for metric in METRICS}


def _rank(rank: int, world: int, shares: list[list[str]], folder: str, port: int, fails: bool) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    if fails:
        try:
            with together():
                if rank == 1:
                    raise OSError("its disk is full")
        except UserError as error:
            Path(folder, f"{rank}.txt").write_text(str(error))
    else:
        torch.save(figures(shares[rank]), Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def spread(world: int, shares: list[list[str]], folder: Path, fails: bool = False) -> None:
    folder.mkdir()
    mp.start_processes(_rank, (world, shares, str(folder), free_port(), fails), nprocs=world, start_method="fork")


@pytest.mark.slow
def test_figures_are_the_same_on_any_number_of_ranks(tmp_path):
    keys = [f"clip{i:02d}" for i in range(NUM_CLIPS)]
    alone = figures(keys)
    cases = {
        "2 processes": [keys[0::2], keys[1::2]],
        "3 processes": [keys[0::3], keys[1::3], keys[2::3]],
        "empty rank": [keys[:9], [], keys[9:]],
        "padded sampler": [keys[0::2], [*keys[1::2], keys[0]]],
    }
    table = {"1 process": alone}
    for name, shares in cases.items():
        spread(len(shares), shares, tmp_path / name.replace(" ", ""))
        parts = [torch.load(tmp_path / name.replace(" ", "") / f"{r}.pt") for r in range(len(shares))]
        table[name] = parts[0]
        for part in parts:
            assert part == pytest.approx(alone, rel=1e-6, abs=1e-9), name
    print(" | ".join(["metric", *table]))
    for metric in METRICS:
        print(" | ".join([metric, *(f"{values[metric]:.9g}" for values in table.values())]))


def test_a_failure_on_one_rank_ends_all_of_them_with_its_message(tmp_path):
    spread(3, [], tmp_path / "failing", fails=True)
    for rank in range(3):
        assert (tmp_path / "failing" / f"{rank}.txt").read_text() == "rank 1: OSError('its disk is full')"


def test_a_failure_alone_is_what_it_was():
    with together():
        pass
    with pytest.raises(OSError, match=r"^too bad$"), together():
        raise OSError("too bad")


def test_names_of_metrics():
    assert parse_metric("kl/passt-10s") == ("kl", "passt-10s")
    for name in ("fad", "fad/", "dance/musicnn", "fad/x"):
        with pytest.raises(UserError, match=f"metric '{name}': give KIND/LISTENER"):
            parse_metric(name)


def test_every_metric_says_what_it_lacks():
    empty = HeardSet(words())
    for metric in METRICS:
        with pytest.raises(UserError, match=f"{metric}: no clips"):
            score(metric, empty)
    some = HeardSet(words())
    for key, clip in heard_clips(0, 0.0).items():
        some.put(key, clip, 16_000)
    for kind in ("fad", "kl", "kad", "coverage"):
        with pytest.raises(UserError, match=f"{kind}/musicnn: no reference"):
            score(f"{kind}/musicnn", some)
    without = some.statistics(keep=False)
    with pytest.raises(UserError, match=r"kad/musicnn: the reference file holds no embeddings"):
        score("kad/musicnn", some, without)
    with pytest.raises(UserError, match=r"text/musicnn: clip clip00 has no caption"):
        score("text/musicnn", some, None, {"clip01": "a"})


def test_a_clip_heard_twice_counts_once_and_broken_ones_are_named():
    listener = words()
    heard = HeardSet(listener)
    wav = 0.1 * torch.randn(1, 4 * 16_000)
    heard.add("a", wav, 16_000)
    before = heard.embeddings["a"]
    heard.add("a", 2 * wav, 16_000)
    assert heard.embeddings["a"] is before
    with pytest.raises(UserError, match=r"b: a clip holds NaN.*; remove or replace it"):
        heard.add("b", wav * float("nan"), 16_000)
    with pytest.raises(UserError, match=r"c: a clip of 1\.00 s is too short for musicnn"):
        heard.add("c", wav[:, :16_000], 16_000)
