"""Metrics of 2 and 3 processes are those of one: uneven shares, a rank without data, items met twice."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers_metrics import arrays, facts, near
from torch import Tensor

from magnet_train.metrics.clap_score import ClapScore
from magnet_train.metrics.distributed import gather_by_id
from magnet_train.metrics.fad import FrechetAudioDistance
from magnet_train.metrics.kl import KLDivergence, TagKL

STREAMING, KL, CLAP = facts("streaming.json"), facts("kl.json"), facts("clap.json")
SHARES = {
    "two": STREAMING["ranks2_no_padding"],
    "padded": [STREAMING["ranks2_no_padding"][0], [*STREAMING["ranks2_no_padding"][1], 1, 3]],
    "empty": STREAMING["rank_with_no_data"],
    "three": STREAMING["ranks3"],
    "empty of three": [STREAMING["ranks2_no_padding"][0], [], STREAMING["ranks2_no_padding"][1]],
}


def tags(windows: Tensor) -> tuple[Tensor, Tensor]:
    return windows.sigmoid(), windows.sigmoid().flip(-1)


def items_of(rank: int) -> dict[str, Tensor]:
    """Other lengths and types on every rank, nothing on the second, and one id on the first and the third."""
    own = {
        0: {"b": torch.arange(6).view(2, 3), "é/9": torch.rand(5)[3:], "twice": torch.tensor([1.0])},
        1: {},
        2: {"twice": torch.tensor([2.0]), "a": torch.tensor([[0.1]], dtype=torch.float64), "c": torch.zeros(0, 4)},
    }
    return own[rank]


def _on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    streaming, logits, clap = (arrays(f"{n}.npz") for n in ("streaming", "kl_logits", "clap_embeddings"))
    for size in (2, 3):
        if rank >= size:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/{size}", rank=rank, world_size=size)
        values: dict[str, dict[str, float]] = {}
        for name, shares in SHARES.items():
            if len(shares) != size:
                continue
            fad, shifted, tag_kl = FrechetAudioDistance(20), FrechetAudioDistance(20), TagKL()
            for clip in shares[rank]:
                windows = streaming["gen"][streaming["gen_clip"] == clip]
                fad.update(windows, key=str(clip))
                shifted.update(windows.double() + 1e4, key=str(clip))
                tag_kl.update(*tags(windows), key=str(clip))
            if rank == 0:  # the references may lie on one rank alone
                fad.update_reference(streaming["ref"])
                shifted.update_reference(streaming["ref"].double() + 1e4)
            metrics = {"fad": fad, "shifted": shifted, "tags": tag_kl}
            values[name] = {key: metric.compute().item() for key, metric in metrics.items()}
        kl, score = KLDivergence("audiocraft"), ClapScore()
        for unequal, add in (
            (KL["rank_split"]["unequal"], lambda i, kl=kl: kl.update(logits["ref"][i], logits["gen"][i], str(i))),
            (CLAP["rank_split"]["unequal"],
             lambda i, score=score: score.update(clap["audio"][[i]], clap["text"][[i]], [str(i)])),
        ):  # fmt: skip
            for i in unequal[rank] if rank < 2 else []:
                add(i)
        values["fixtures"] = {"kl": kl.compute().item(), "clap": score.compute().item()}
        gathered = gather_by_id(items_of(rank))
        dist.destroy_process_group()
        torch.save(gathered, f"{folder}/gathered{size}_{rank}.pt")
        Path(folder, f"values{size}_{rank}.json").write_text(json.dumps(values))


def test_processes_give_what_one_gives(tmp_path: Path):
    torch.manual_seed(0)
    mp.spawn(_on_rank, (str(tmp_path),), nprocs=3)
    given, tag_kl = arrays("streaming.npz"), TagKL()
    for clip in range(13):
        tag_kl.update(*tags(given["gen"][given["gen_clip"] == clip]))
    checked = set()
    for size in (2, 3):
        for rank in range(size):
            values = json.loads((tmp_path / f"values{size}_{rank}.json").read_text())
            assert near(values["fixtures"]["kl"], KL["audiocraft"]["kld"], 1e-9)
            assert near(values.pop("fixtures")["clap"], CLAP["expected_mean"], 1e-9)
            for name, found in values.items():
                checked.add(name)
                assert near(found["fad"], STREAMING["expected_fd"], 1e-9)
                assert near(found["shifted"], STREAMING["expected_fd"], 1e-9)
                assert near(found["tags"], tag_kl.compute().item(), 1e-12)
            items = torch.load(tmp_path / f"gathered{size}_{rank}.pt", weights_only=True)
            assert list(items) == (["a"] * (size == 3) + ["b"] + ["c"] * (size == 3) + ["twice", "é/9"])
            assert items["twice"].item() == 1  # the lowest rank's
            assert torch.equal(items["b"], torch.arange(6).view(2, 3))
            assert items["é/9"].untyped_storage().nbytes() == 8  # a slice travels without what it was cut from
            if size == 3:
                assert items["a"].dtype == torch.float64
                assert items["c"].shape == (0, 4)
    assert checked == set(SHARES)


def test_gathering_on_one_process_sorts_and_copies():
    x = torch.zeros(2)
    gathered = gather_by_id({"b": x, "a": torch.ones(1, requires_grad=True)})
    assert list(gathered) == ["a", "b"]
    assert not gathered["a"].requires_grad
    gathered["b"] += 1
    assert x.sum() == 0
