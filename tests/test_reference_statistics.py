"""Reference statistics are read as written, and refused with another protocol."""

import json
from pathlib import Path

import pytest
import torch
from helpers_errors import refusal
from safetensors.torch import load_file, save_file
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.metrics.reference import ReferenceStatistics, hash_of_ids

HEARD = {
    "embedder": "vggish",
    "embedder_hash": "0123",
    "resampler": "julius 32000 to 16000 Hz",
    "windowing": "1 s",
}


def clips() -> dict[str, Tensor]:
    return {
        f"set/{name}": torch.randn(n, 4) + 3
        for name, n in (("b", 3), ("a", 2), ("ü | c", 4), ("none", 0))
    }


def test_what_is_written_is_read(tmp_path: Path):
    given = clips()
    logits = {key: torch.randn(2, 7) for key in ("set/b", "set/a")}
    written = ReferenceStatistics.of(given, **HEARD, logits=logits)
    written.save(tmp_path / "new" / "reference.safetensors")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["reference.safetensors"]
    read = ReferenceStatistics.load(tmp_path / "new" / "reference.safetensors", **HEARD)
    windows = torch.cat(list(given.values())).double()
    torch.testing.assert_close(read.moments.mean, windows.mean(0))
    torch.testing.assert_close(read.moments.covariance(), torch.cov(windows.T))
    assert (read.moments.count, read.num_clips, read.ids_hash) == (9, 4, hash_of_ids(given))
    assert {name: getattr(read, name) for name in HEARD} == HEARD
    for kept, items in ((read.embeddings, given), (read.logits, logits)):
        assert list(kept) == sorted(items)
        assert all(torch.equal(kept[key], items[key]) for key in items)


def test_classifier_outputs_may_be_left_out(tmp_path: Path):
    ReferenceStatistics.of(clips(), **HEARD).save(tmp_path / "r.safetensors")
    assert ReferenceStatistics.load(tmp_path / "r.safetensors").logits == {}


def test_neither_order_nor_parts_of_the_set_change_its_name():
    given = clips()
    backwards = dict(reversed(given.items()))
    a, b = (ReferenceStatistics.of(x, **HEARD) for x in (given, backwards))
    assert a.ids_hash == b.ids_hash
    assert torch.equal(a.moments.mean, b.moments.mean)
    assert hash_of_ids(["a", "b"]) != hash_of_ids(["a"])


@pytest.mark.parametrize("name", HEARD)
def test_what_was_heard_otherwise_is_refused(name: str, tmp_path: Path):
    path = tmp_path / "r.safetensors"
    ReferenceStatistics.of(clips(), **HEARD).save(path)
    with pytest.raises(
        UserError, match=rf"r\.safetensors: its {name} is '{HEARD[name]}', this run's 'other'"
    ) as error:
        ReferenceStatistics.load(path, **HEARD | {name: "other"})
    assert "\n" not in str(error.value)


def _alter(path: Path, tensors: dict[str, Tensor] | None = None, **about: object) -> None:
    ReferenceStatistics.of(clips(), **HEARD).save(path)
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        known = json.loads(file.metadata()["reference_statistics"])
    metadata = {"reference_statistics": json.dumps(known | about)}
    save_file(load_file(path) | (tensors or {}), path, metadata)


def test_missing_and_broken_files_are_named(tmp_path: Path):
    path = tmp_path / "r.safetensors"
    assert "r.safetensors: missing, broken" in refusal(ReferenceStatistics.load, path)
    path.write_bytes(b"no safetensors")
    assert "r.safetensors: missing, broken" in refusal(ReferenceStatistics.load, path)
    save_file({"mean": torch.zeros(2)}, path)  # another program's
    assert "not reference statistics" in refusal(ReferenceStatistics.load, path)
    for change in (
        {"tensors": {"mean": torch.zeros(3, dtype=torch.float64)}},
        {"tensors": {"mean": torch.zeros(4)}},
        {"tensors": {"mean": torch.full((4,), torch.nan, dtype=torch.float64)}},
        {"tensors": {"embeddings_windows": torch.tensor([1, 1, 1, 1])}},
        {"num_windows": 1},
        {"num_windows": float("inf")},
        {"embeddings": {"a": 1}},
        {"embeddings": ["a"]},
        {"embeddings": []},
    ):
        _alter(path, **change)
        assert "r.safetensors: missing, broken" in refusal(ReferenceStatistics.load, path)
    _alter(path, format=2)
    assert "format 2, this version reads 1" in refusal(ReferenceStatistics.load, path)


def test_a_reference_that_cannot_be_one():
    broken = clips() | {"set/b": torch.full((2, 4), torch.nan)}
    assert "reference clip set/b" in refusal(ReferenceStatistics.of, broken, **HEARD)
    for few in ({}, {"a": torch.zeros(1, 4)}):
        assert "two reference windows" in refusal(ReferenceStatistics.of, few, **HEARD)
