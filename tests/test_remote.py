"""Shards by pattern and from remote stores: names, number of downloads, and store failures.
A local web server and a local S3 server replace the stores; gcsfs was tested manually with an
emulator.
"""

import csv
import errno
import json
import multiprocessing
import os
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from helpers_data import keys, load, make_data_codec, write_shards
from helpers_errors import command_error, refusal
from helpers_programs import LONGEST_S
from helpers_resume import arguments, differences, ledger, outcome
from helpers_server import FaultyServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magnet_train.__main__ import main
from magnet_train.common.errors import UserError
from magnet_train.data import pipeline
from magnet_train.data import remote as places
from magnet_train.data.datamodule import MagnetDataModule
from magnet_train.data.pipeline import (
    EvaluationDataset,
    TrainingStream,
    training_order,
)
from magnet_train.data.remote import find_folders
from magnet_train.data.shards import ShardSet
from magnet_train.resume import shards_hash

COUNTS = (4, 3, 5, 4)
CODEC = {"id": "x", "hash": "x", "num_codebooks": 1, "codebook_size": 2, "frame_rate": 50.0}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Pauses of about 10 ms, and a separate cache."""
    for name, value in {
        "FIRST_PAUSE_S": 0.01,
        "SHARD_PATIENCE_S": 0.6,
        "INDEX_PATIENCE_S": 0.6,
        "STALL_S": 2.0,
        "MIN_FREE_BYTES": 0,
    }.items():
        monkeypatch.setattr(places, name, value)
    monkeypatch.setenv("MAGNET_TRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
    places._warn_once.cache_clear()


@pytest.fixture(scope="session")
def folder(codec: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only."""
    return write_shards(tmp_path_factory.mktemp("root") / "train", codec, COUNTS)


@pytest.fixture
def server(folder: Path) -> Iterator[FaultyServer]:
    """Serves that folder as ADDRESS/train."""
    server = FaultyServer(folder.parent)
    yield server
    server.stop()


def all_keys(number: int = sum(COUNTS)) -> list[str]:
    return [f"item{n:04d}" for n in range(number)]


def shard(number: int) -> str:
    return f"train/shard-{number:06d}.tar"


def cached() -> list[str]:
    """Names of the shards in the cache, which may contain no other files."""
    root = places._cache()
    files = (
        [p for p in root.rglob("*") if p.is_file() and "index" not in p.parts]
        if root.exists()
        else []
    )
    assert all(p.suffix == ".tar" and len(p.stem) == 64 for p in files)
    return [p.stem for p in files]


def split(folder: Path, parts: list[list[int]], out: Path) -> list[str]:
    """Distribute the folder's shards over new folders; returns these."""
    index = json.loads((folder / "index.json").read_text())
    for number, part in enumerate(parts):
        own = out / f"part{number}"
        own.mkdir(parents=True)
        entries = [index["shards"][i] for i in part]
        for entry in entries:
            (own / entry["name"]).hardlink_to(folder / entry["name"])
        (own / "index.json").write_text(json.dumps(index | {"shards": entries}))
    return [str(out / f"part{number}") for number in range(len(parts))]


# --- what people write ----------------------------------------------------------------------------


def test_patterns_name_folders_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train_b", "train_a", "other", "odd{1,2}"):
        Path(name).mkdir()
    Path("train_notes").write_text("")
    assert find_folders("train_*") == [("train_a", "*"), ("train_b", "*")]
    assert find_folders("train_{b,a}") == [("train_b", "*"), ("train_a", "*")]
    assert find_folders("{other,train_?}") == [("other", "*"), ("train_a", "*"), ("train_b", "*")]
    assert find_folders("odd{1,2}") == [("odd{1,2}", "*")]  # it exists
    assert find_folders("x/part-{08..11}") == [
        (f"x/part-{n}", "*") for n in ("08", "09", "10", "11")
    ]
    assert find_folders("x/shard-{2..3}.tar") == [("x", "shard-2.tar"), ("x", "shard-3.tar")]
    assert find_folders("shard-*.tar") == [(".", "shard-*.tar")]
    assert find_folders("train_*/s-[01].tar") == [
        ("train_a", "s-[01].tar"),
        ("train_b", "s-[01].tar"),
    ]
    assert find_folders("s3://music/{a,b}") == [("s3://music/a", "*"), ("s3://music/b", "*")]
    assert find_folders("https://host/train/s-*.tar") == [("https://host/train", "s-*.tar")]
    assert "no folder matches" in refusal(find_folders, "valid_*")
    assert "unbalanced braces" in refusal(find_folders, "part-{00..07")
    for endless in ("part-{0..1000000000}", "{a,b}" * 40, "{a,{b,c}}" * 40):
        assert "more than 100,000 names" in refusal(find_folders, endless)
    assert "does not list" in refusal(find_folders, "https://host/train_*")


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_joined_sets_are_one_set_of_the_same_shards(
    data: st.DataObject, codec: str, folder: Path, tmp_path_factory: pytest.TempPathFactory
):
    """Counts, shards_hash and the order of training and validation do not depend on the
    distribution.
    """
    cuts = sorted(data.draw(st.sets(st.integers(1, len(COUNTS) - 1))))
    borders = [0, *cuts, len(COUNTS)]
    parts = [list(range(a, b)) for a, b in pairwise(borders)]
    names = split(folder, parts, tmp_path_factory.mktemp("split"))
    whole = ShardSet.open(folder)
    root = Path(names[0]).parent
    for joined in (
        ShardSet.open(names),
        ShardSet.open(f"{root}/part*"),
        ShardSet.open(f"{root}/*/shard-*.tar"),
    ):
        assert joined.counts == whole.counts
        assert shards_hash(joined.index) == shards_hash(whole.index)
        for rank in range(2):
            streams = [islice(TrainingStream(s, 50, 3, 1, rank, 2), 8) for s in (whole, joined)]
            assert keys(streams[0]) == keys(streams[1])
        assert keys(EvaluationDataset(joined, 50, 3)) == all_keys()
    if len(parts) > 1:
        assert shards_hash(ShardSet.open(names[::-1]).index) != shards_hash(whole.index)


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(any),
    ranks=st.integers(1, 4),
    workers=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_an_epoch_of_all_readers_is_every_item_once(
    counts: list[int], ranks: int, workers: int, seed: int
):
    """For any number of shards, ranks and data workers, and uneven shards."""
    heard: Counter[tuple[int, int, int]] = Counter()
    parts = ranks * workers
    for part in range(parts):
        order = training_order(counts, seed, part, parts)
        if parts > len(counts):
            with pytest.raises(ValueError, match="readers for"):
                next(order)
            return
        for group, _ in order:
            if group[0].epoch >= 2:
                break
            heard.update(group)
    assert heard == Counter(
        (e, s, i) for e in range(2) for s, n in enumerate(counts) for i in range(n)
    )


def test_picked_shards(folder: Path):
    index = ShardSet.open(folder).index
    for text, numbers in (
        ("shard-{000001..000002}.tar", [1, 2]),
        ("shard-00000{3,0}.tar", [3, 0]),
        ("*.tar", [0, 1, 2, 3]),
        ("shard-00000[13].tar", [1, 3]),
    ):
        picked = ShardSet.open(f"{folder}/{text}")
        assert picked.counts == [COUNTS[n] for n in numbers]
        assert picked.paths == [folder / index["shards"][n]["name"] for n in numbers]
        assert [len(picked.read(n)) for n in range(len(numbers))] == picked.counts
        assert (shards_hash(picked.index) == shards_hash(index)) == (numbers == [0, 1, 2, 3])
    text = refusal(ShardSet.open, f"{folder}/shard-{{000003..000004}}.tar")
    assert "shard-000004.tar" in text and "shard-000000.tar … shard-000003.tar" in text
    assert "named twice" in refusal(ShardSet.open, [str(folder), f"{folder}/shard-000001.tar"])
    assert "no folder given" in refusal(ShardSet.open, [])


def test_thousands_of_listed_shards_open_quickly(tmp_path: Path):
    entries = [{"name": f"s-{n:05d}.tar", "num_examples": 1} for n in range(10_000)]
    (tmp_path / "index.json").write_text(json.dumps({"codec": CODEC, "shards": entries}))
    begin = time.process_time()
    assert len(ShardSet.open(f"{tmp_path}/s-{{00000..09999}}.tar").paths) == 10_000
    assert time.process_time() - begin < 3


def test_sets_of_two_codecs_are_not_joined(folder: Path, tmp_path: Path):
    other = write_shards(tmp_path / "other", make_data_codec(tmp_path / "codec", seed=1), (2,))
    text = refusal(ShardSet.open, [str(folder), str(other)])
    assert str(folder) in text and str(other) in text and "codec" in text


def test_the_hash_of_shards_is_what_it_was(folder: Path):
    """Otherwise older checkpoints could not be resumed. The hash is from before patterns."""
    index = {
        "codec": {"hash": "c"},
        "shards": [{"name": "a.tar", "num_examples": 2, "sha256": "0"}],
    }
    assert shards_hash(index) == "643c76b11039bfe4"


def test_items_of_one_key_are_no_validation(codec: str, tmp_path: Path):
    """A metric would count only one of them."""
    sets = [str(write_shards(tmp_path / name, codec, (2,))) for name in "ab"]
    text = refusal(list, EvaluationDataset(ShardSet.open(sets), 50, 2))
    assert "item0000" in text and all(name in text for name in sets)
    next(iter(TrainingStream(ShardSet.open(sets), 50, 2, 0)))  # training does not mind


# --- from afar ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_a_web_server_are_those_of_the_folder(
    workers: int, server: FaultyServer, folder: Path
):
    """Also in data workers forked after the first download. Each shard is downloaded once, or twice
    by simultaneous readers.
    """
    near, far = ShardSet.open(folder), ShardSet.open(f"{server.address}/train")
    assert shards_hash(near.index) == shards_hash(far.index)
    streams = [islice(load(TrainingStream(s, 50, 4, 3), workers), 16) for s in (near, far)]
    assert keys(streams[0]) == keys(streams[1])
    assert keys(load(EvaluationDataset(far, 50, 3), workers)) == all_keys()
    assert server.requests.pop("train/index.json") == 1
    assert set(server.requests) == {shard(n) for n in range(4)}
    assert max(server.requests.values()) == 1 or workers
    assert sorted(cached()) == sorted(s["sha256"] for s in far.index["shards"])
    assert not server.during(lambda: keys(EvaluationDataset(far, 50, 3)))
    picked = ShardSet.open(
        [f"{server.address}/train/shard-00000[01].tar", f"{folder}/shard-000003.tar"]
    )
    assert picked.counts == [4, 3, 4]
    assert keys(EvaluationDataset(picked, 50, 9)) == all_keys()[:7] + all_keys()[12:]


def test_other_stores_by_what_stands_for_them(folder: Path):
    """memory:// has folders and listings like s3:// and gs://."""
    memory = fsspec.filesystem("memory")
    for name in ("b", "a"):
        memory.put(str(folder), f"/music/train_{name}", recursive=True)
    assert find_folders("memory://music/train_*") == [
        (f"memory:///music/train_{name}", "*") for name in "ab"
    ]
    found = ShardSet.open("memory://music/train_[a]")
    assert keys(EvaluationDataset(found, 50, 4)) == all_keys() and len(cached()) == 4
    assert "memory://music/c/index.json: not there" in refusal(ShardSet.open, "memory://music/c")
    assert "no folder matches" in refusal(ShardSet.open, "memory://music/c*")


def test_what_a_store_needs_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for name in ("s3://music/train", "s3://music/train_*"):
        text = refusal(ShardSet.open, name)
        assert "pip install -e '.[s3]'" in text and name in text
    assert "nfs://music" in refusal(ShardSet.open, "nfs://music")


@pytest.mark.parametrize(
    "faults", [["503", "503"], ["cut"], ["reset"], ["hang"], ["429", "cut", "500"], ["other"]]
)
def test_what_passes_is_waited_for(
    faults: list[str], server: FaultyServer, monkeypatch: pytest.MonkeyPatch
):
    for name in ("SHARD_PATIENCE_S", "INDEX_PATIENCE_S"):
        monkeypatch.setattr(places, name, 60.0)
    found = ShardSet.open(f"{server.address}/train")
    server.faults[shard(1)] = list(faults)
    seen = server.during(lambda: found.read(1))
    assert seen == {shard(1): len(faults) + 1} and found.read(1)[0]["info"]["key"] == "item0004"
    server.faults["train/index.json"] = [f for f in faults if f != "other"]
    assert ShardSet.open(f"{server.address}/train").counts == list(COUNTS)


@pytest.mark.parametrize(
    ("fault", "says", "tries"),
    [
        ("404", "not there", 1),
        ("403", "access denied", 1),
        ("401", "access denied", 1),
        ("other", "its SHA-256", 2),
        ("503", "cannot be reached (503", None),
        ("reset", "cannot be reached", None),
        ("cut", "cannot be reached", None),
        ("hang", "cannot be reached (no answer", None),
        ("endless", "contains more than 50,000 bytes", 1),
        ("drip", "cannot be reached (no answer in time: only ", None),
    ],
)
def test_what_does_not_pass_is_named(
    fault: str, says: str, tries: int | None, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
):
    """Retries are limited by time, so their number varies. Training continues without the shard,
    validation fails.
    """
    if fault in ("hang", "drip"):
        monkeypatch.setattr(places, "STALL_S", 0.5)
    monkeypatch.setattr(places, "MAX_SHARD_BYTES", 50_000)
    found = ShardSet.open(f"{server.address}/train")
    server.always[shard(1)] = fault
    begin = time.monotonic()
    text = refusal(list, EvaluationDataset(found, 50, 4))
    assert f"{server.address}/{shard(1)}" in text
    assert says in text
    assert time.monotonic() - begin < 300
    requests = server.requests[shard(1)]
    # At most six pauses fit into 0.6 s, and aiohttp itself retries broken connections once.
    assert requests == tries or (tries is None and 2 <= requests <= 7 * 2)
    with pytest.warns(UserWarning, match=r"skipping shard .*shard-000001"):
        assert set(keys(islice(TrainingStream(found, 50, 4, 0), 8))) == set(all_keys()) - set(
            all_keys(7)[4:]
        )
    assert len(cached()) == 3
    del server.always[shard(1)]
    assert keys(EvaluationDataset(found, 50, 4)) == all_keys()  # it came back


def test_a_damaged_file_of_the_cache_is_fetched_again(server: FaultyServer):
    found = ShardSet.open(f"{server.address}/train")
    whole = found.read(2)
    (path,) = places._cache().rglob("*.tar")
    content = path.read_bytes()
    for damaged in (content[:1000], b"", content[:700] + b"x" + content[701:]):
        path.write_bytes(damaged)
        assert server.during(lambda: found.read(2)) == {shard(2): 1}
        assert path.read_bytes() == content and len(found.read(2)) == len(whole)


def test_an_index_is_read_again_and_cached_for_outages(
    server: FaultyServer, codec: str, tmp_path: Path
):
    write_shards(tmp_path / "set", codec, (2,))
    store = FaultyServer(tmp_path)
    assert ShardSet.open(f"{store.address}/set").counts == [2]
    write_shards(tmp_path / "set", codec, (2, 3))
    found = ShardSet.open(f"{store.address}/set")
    assert found.counts == [2, 3] and [len(found.read(n)) for n in (0, 1)] == [2, 3]
    store.always["set/index.json"] = "404"  # a place that was given up is no store that fails
    assert "not there" in refusal(ShardSet.open, f"{store.address}/set")
    (tmp_path / "set" / "index.json").write_text("<html>please log in</html>")
    del store.always["set/index.json"]
    assert "broken" in refusal(ShardSet.open, f"{store.address}/set")
    store.stop()
    with pytest.warns(UserWarning, match="cannot be reached"):
        again = ShardSet.open(f"{store.address}/set")
    # All of it from the cache.
    assert again.counts == [2, 3] and keys(EvaluationDataset(again, 50, 5)) == all_keys(5)
    begin = time.monotonic()
    text = refusal(ShardSet.open, f"{store.address}/elsewhere")
    assert "elsewhere/index.json: cannot be reached" in text and time.monotonic() - begin < 300


def no_room(path: Path, content: bytes) -> int:
    with open(path, "wb") as file:
        file.write(content[:100])
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("how", ["little left", "full", "no folder"])
def test_a_full_disk_costs_a_warning(
    how: str, server: FaultyServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    if how == "little left":
        monkeypatch.setattr(places, "MIN_FREE_BYTES", 10**18)
    elif how == "full":
        monkeypatch.setattr(Path, "write_bytes", no_room)
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MAGNET_TRAIN_CACHE", str(tmp_path / "file"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = ShardSet.open(f"{server.address}/train")
        assert sorted(set(keys(islice(TrainingStream(found, 50, 4, 0), 8)))) == all_keys()
    (text,) = [str(w.message) for w in caught if w.category is UserWarning]
    assert "MAGNET_TRAIN_CACHE" in text and cached() == []


def test_an_index_does_not_choose_where_files_are_written(codec: str, tmp_path: Path):
    write_shards(tmp_path / "set", codec, (2,))
    path = tmp_path / "set" / "index.json"
    store = FaultyServer(tmp_path)
    for sha256 in ("../../../stolen", "", None, "A" * 64):
        index = json.loads(path.read_text())
        index["shards"][0]["sha256"] = sha256
        path.write_text(json.dumps(index))
        found = ShardSet.open(f"{store.address}/set")
        if sha256 is None:
            assert len(found.read(0)) == 2
        else:
            assert "its SHA-256" in refusal(found.read, 0)
    assert cached() == [] and not list(tmp_path.parent.rglob("stolen*"))
    store.stop()


def read_all(address: str, ready: Any, result: Any) -> None:
    found = ShardSet.open(address)
    ready.wait()
    result.put(keys(EvaluationDataset(found, 50, 4)))


def test_processes_share_a_cache(server: FaultyServer):
    context = multiprocessing.get_context("fork")
    ready, result = context.Barrier(3), context.Queue()
    args = (f"{server.address}/train", ready, result)
    processes = [context.Process(target=read_all, args=args) for _ in range(3)]
    for process in processes:
        process.start()
    assert [result.get(timeout=LONGEST_S) for _ in processes] == [all_keys()] * 3
    for process in processes:
        process.join()
    assert len(cached()) == 4  # and nothing else, half a file for one
    assert not server.during(
        lambda: keys(EvaluationDataset(ShardSet.open(args[0]), 50, 4))
    ) - Counter(["train/index.json"])


# --- what is left out -----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_count_what_was_left_out(workers: int, codec: str, tmp_path: Path):
    """Each unavailable shard is counted at each turn, in the next batch."""
    found = ShardSet.open(write_shards(tmp_path, codec, (4, 4, 6, 4)))
    Path(found.paths[2]).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = list(islice(load(TrainingStream(found, 50, 2, 0), workers), 120))
    shards, items = (sum(b[f"{what}_skipped"] for b in batches) for what in ("shards", "items"))
    epochs = len(keys(batches)) / 18  # others stand in for the items of the missing shard
    assert items == 6 * shards
    assert abs(shards - epochs) <= 2
    assert {b["shards_skipped"] for b in batches} == {0, 1}


def test_a_reader_without_any_shard_ends_the_run(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One of two readers lost its disk; otherwise the other would wait forever."""
    found = ShardSet.open(write_shards(tmp_path, codec, (2, 2, 2)))
    for path in found.paths:
        Path(path).unlink()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert "none of the last 100 shards" in refusal(
            next, iter(TrainingStream(found, 50, 2, 0, 1, 2))
        )
    assert len([w for w in caught if w.category is UserWarning]) == 3  # each named once
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(pipeline, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def refuse(*_: Any) -> Any:
        clock.now += pipeline.MAX_UNREADABLE_S / 4
        raise UserError("a shard: cannot be reached")

    monkeypatch.setattr(ShardSet, "read", refuse)
    with pytest.warns(UserWarning):
        text = refusal(next, iter(TrainingStream(found, 50, 2, 0, 1, 2)))
    assert "none of the last 6 shards could be read, in 1125 s; the last: a shard" in text


@pytest.fixture
def bucket(data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The shards in s3://shards on a local server; returns its file system."""
    import s3fs
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    given = {
        "ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "DEFAULT_REGION": "us-east-1",
    }
    for name, value in (given | {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret"}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    store.mkdir("shards")
    for split in ("train", "validation"):
        store.put(str(data / split), f"shards/{split}", recursive=True)
    yield store
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_run_from_a_bucket_is_that_from_a_folder(
    bucket: Any, data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    """With data workers; missing objects are reported."""
    workers = "--data.num_workers=2"
    assert main(arguments(data, tmp_path / "folder", workers)) == 0
    given = [f"--data.{split}=s3://shards/{split[:5]}*" for split in ("train", "validation")]
    assert main(arguments(data, tmp_path / "bucket", workers, *given)) == 0
    assert ledger(tmp_path / "folder") == ledger(tmp_path / "bucket")
    assert len(ledger(tmp_path / "bucket")) == 8
    assert differences(outcome(tmp_path / "folder"), outcome(tmp_path / "bucket")) == []
    for address in ("s3://shards/elsewhere", "s3://no-such-bucket/train"):
        assert main(arguments(data, tmp_path / "none", f"--data.train={address}")) == 2
        assert f"{address}/index.json: not there" in capsys.readouterr().err
    with monkeypatch.context() as nobody:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            nobody.delenv(name)
        for name, value in {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}.items():
            nobody.setenv(name, value)
        type(bucket).clear_instance_cache()
        with pytest.warns(
            UserWarning, match="cannot be reached .Unable to locate credentials.; using"
        ):
            ShardSet.open("s3://shards/train")
        nobody.setenv("MAGNET_TRAIN_CACHE", str(tmp_path / "empty"))
        assert main(arguments(data, tmp_path / "none", "--data.train=s3://shards/train")) == 2
        assert (
            "s3://shards/train/index.json: access denied (Unable to locate cred"
            in capsys.readouterr().err
        )
        type(bucket).clear_instance_cache()
    bucket.rm("shards/train/shard-000001.tar")
    places._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"skipping shard s3://.*shard-000001.tar: not there"):
        found = ShardSet.open("s3://shards/train")
        shutil.rmtree(os.environ["MAGNET_TRAIN_CACHE"])
        # Of 24 items.
        assert len(set(keys(list(islice(load(TrainingStream(found, 50, 2, 0), 0), 24))))) == 21


def test_a_slow_model_is_no_store_that_fails(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Time and consecutive failures are counted from the last requested batch, independent of the
    model's speed.
    """
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(pipeline, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(pipeline, "MAX_UNREADABLE", 12)
    found = ShardSet.open(write_shards(tmp_path, codec, (1, 1)))
    Path(found.paths[0]).unlink()
    with pytest.warns(UserWarning, match="skipping"):
        for _ in islice(TrainingStream(found, 50, 1, 0, 0, 2), 12):
            clock.now += 2 * pipeline.MAX_UNREADABLE_S


@pytest.mark.parametrize("says", [3, 5])
def test_a_shard_with_other_items_than_the_index_says(says: int, codec: str, tmp_path: Path):
    write_shards(tmp_path, codec, (4, 4))
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"][0]["num_examples"] = says
    (tmp_path / "index.json").write_text(json.dumps(index))
    found = ShardSet.open(tmp_path)
    assert f"4 items, its index says {says}" in refusal(list, EvaluationDataset(found, 50, 2))
    with pytest.warns(UserWarning, match=f"its index says {says}"):
        assert set(keys(islice(TrainingStream(found, 50, 2, 0), 8))) == set(all_keys(8)[4:])


# --- by the command -------------------------------------------------------------------------------


def test_an_error_in_a_data_worker_is_one_line(data: Path, tmp_path: Path, capfd: Any):
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data" / "train").glob("*.tar"):
        path.unlink()
    workers = "--data.num_workers=2"
    line = command_error(capfd, *arguments(tmp_path / "data", tmp_path / "run", workers))
    assert "none of the last" in line and "missing; copy it again" in line
    (path,) = (tmp_path / "data" / "validation").glob("*.tar")
    path.write_bytes(path.read_bytes()[:700])
    options = ["--generation.at_start=true", workers, f"--data.train={data / 'train'}"]
    line = command_error(capfd, *arguments(tmp_path / "data", tmp_path / "run2", *options))
    assert line.startswith(f"error: {path}: broken")


def test_two_ranks_train_on_from_a_server_that_misses_a_shard(data: Path, tmp_path: Path):
    """With data workers; one rank has no validation item; skipped items are logged."""
    store = FaultyServer(data)
    store.always["train/shard-000002.tar"] = "503"  # four items
    options = (
        f"--trainer.devices=2 --trainer.strategy=ddp_fork --data.train={store.address}/train "
        f"--data.validation={store.address}/one --data.num_workers=2 "
        "--trainer.val_check_interval=4 --trainer.logger=CSVLogger "
        f"--trainer.logger.save_dir={tmp_path / 'run'} --trainer.max_steps=12 "
        "--trainer.log_every_n_steps=4"
    ).split()
    write_shards(data / "one", str(data / "codec"), (1,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(arguments(data, tmp_path / "run", *options)) == 0
    lines = ledger(tmp_path / "run")
    assert sorted(lines) == [(batch, rank) for batch in range(12) for rank in range(2)]
    lost = {f"item{n:04d}" for n in range(8, 12)}
    assert lost.isdisjoint(key for line in lines.values() for key in line["keys"])
    assert len((tmp_path / "run" / "ledger.validations").read_text().splitlines()) == 3
    (log,) = (tmp_path / "run").rglob("metrics.csv")
    with log.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("data/items_skipped")]
    shards, items = (float(rows[-1][f"data/{what}_skipped"]) for what in ("shards", "items"))
    found = ShardSet.open(f"{store.address}/train")
    with warnings.catch_warnings():  # the same once more, without a model
        warnings.simplefilter("ignore")
        each = [
            islice(load(TrainingStream(found, 50, 2, 2036, rank, 2), 2), 12) for rank in range(2)
        ]
        own = [sum(batch["shards_skipped"] for batch in batches) for batches in each]
    assert len(rows) == 3 and shards == sum(own) > max(own) and items == 4 * shards
    store.stop()


def test_credentials_in_addresses_are_neither_stored_nor_shown(
    data: Path, tmp_path: Path, capfd: Any
):
    store = FaultyServer(data)
    store.always["train/shard-000001.tar"] = "503"  # named in a warning
    address = store.address.replace("//", "//me:S3CRET@")
    options = f"--data.train={address}/train --data.validation={address}/validation"
    logs = f"--tracker=wandb {options}".split()
    with pytest.warns(UserWarning, match="skipping") as caught:
        assert main(arguments(data, tmp_path / "run", *logs)) == 0
    assert main(["doctor", *arguments(data, tmp_path / "run", *logs)[1:]]) == 2  # reads that shard
    store.stop()
    assert main(arguments(data, tmp_path / "run2", f"--data.train={address}/none")) == 2
    shown = "".join([*capfd.readouterr(), *(str(warning.message) for warning in caught)])
    assert "***@127.0.0.1" in shown and "S3CRET" not in shown
    folders = [tmp_path / "run", tmp_path / "run2", places._cache()]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert {"config.yaml", "last.ckpt", "metrics.csv"} <= {file.name for file in files}
    assert any(file.suffix == ".wandb" for file in files)
    assert not [file for file in files if b"S3CRET" in file.read_bytes()]


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--data.train=http://127.0.0.1:9/train", "cannot be reached"),
        ("--data.train=part-{0..3}/{", "braces"),
        ("--data.validation=gs://music/validation", "pip install -e '.[gs]'"),
        ("--data.validation=[validation_*, train]", "no folder matches"),
        ("--trainer.limit_val_batches=0.5", "limit_val_batches=0.5"),
    ],
)
def test_mistakes_by_the_command(
    option: str, says: str, data: Path, tmp_path: Path, capfd: Any, monkeypatch: Any
):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert says in command_error(capfd, *arguments(data, tmp_path / "run", option))


def test_ranks_that_found_different_checkpoints_are_an_error(codec: str, folder: Path):
    """For example, folders of the same name on two nodes; with DDP they would continue as two
    different runs.
    """
    found = MagnetDataModule(str(folder), str(folder), codec=codec, crop_s=1.0)
    found.trainer = SimpleNamespace(
        global_rank=1, strategy=SimpleNamespace(broadcast=lambda x: "run/a.ckpt")
    )  # type: ignore[assignment]
    found.resumes_from = "run/b.ckpt"
    with pytest.raises(
        UserError, match=r"rank 1 resumes from run/b\.ckpt, rank 0 from run/a\.ckpt; the run folder"
    ):
        found.setup("fit")
