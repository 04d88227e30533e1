"""Shards to batches: every item once per epoch, reproducible, and exact resume."""

import io
import json
import os
import tarfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_data import FRAME_RATE, keys, load, make_data_codec, write_shards
from helpers_errors import refusal

from magnet_train.common.errors import UserError
from magnet_train.data.pipeline import (
    Batch,
    EvaluationDataset,
    TrainingStream,
    training_order,
)
from magnet_train.data.shards import ShardSet, decode_info, read_shard

COUNTS = (5, 3, 4, 5, 3, 4)  # 24 items in six shards


@pytest.fixture(scope="session")
def folder(codec: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only."""
    return write_shards(tmp_path_factory.mktemp("shards"), codec, COUNTS)


@pytest.fixture
def shards(folder: Path) -> ShardSet:
    return ShardSet.open(folder)


def all_keys(number: int = sum(COUNTS)) -> list[str]:
    return [f"item{n:04d}" for n in range(number)]


# --- validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_item_once_over_ranks_and_workers(ranks: int, workers: int, shards: ShardSet):
    each = [
        list(load(EvaluationDataset(shards, 50, 3, rank, ranks), workers)) for rank in range(ranks)
    ]
    assert sorted(k for batches in each for k in keys(batches)) == all_keys()
    sizes = [len(keys(batches)) for batches in each]
    assert max(sizes) - min(sizes) <= 1
    for batches in each:
        assert all(len(b["keys"]) == 3 for b in batches[:-1])  # only the last may be short
        for batch in batches:
            assert [f"item{i:04d}" for i in batch["indices"]] == batch["keys"]
    if workers:  # the order does not depend on them
        alone = [
            keys(load(EvaluationDataset(shards, 50, 3, rank, ranks), 0)) for rank in range(ranks)
        ]
        assert [keys(batches) for batches in each] == alone


@pytest.mark.parametrize(
    ("counts", "ranks", "batch_size"),
    [((1,), 3, 4), ((2, 1), 2, 1), ((7,), 2, 16), ((1,) * 9, 4, 2)],
)
def test_few_items_and_few_shards(
    counts: tuple[int, ...], ranks: int, batch_size: int, codec: str, tmp_path: Path
):
    """Each item once, also with more ranks than items or one shard for all."""
    found = ShardSet.open(write_shards(tmp_path, codec, counts))
    for workers in (0, 3):
        sets = [EvaluationDataset(found, 50, batch_size, rank, ranks) for rank in range(ranks)]
        assert sorted(keys(b for s in sets for b in load(s, workers))) == all_keys(sum(counts))


def test_validation_takes_the_first_frames_and_the_references(shards: ShardSet):
    for batch in EvaluationDataset(shards, 60, 5):
        assert batch["codes"].shape == (len(batch["keys"]), 4, 60)
        assert batch["codes"].dtype == torch.int64
        assert batch["valid"].all() and batch["valid"].dtype == torch.bool
        for i, index in enumerate(batch["indices"]):
            assert (batch["codes"][i, 0] == index).all()
            assert batch["codes"][i, 1].tolist() == list(range(60))
            assert batch["captions"][i] == f"caption {index}"
            assert batch["infos"][i]["key"] == batch["keys"][i]
            assert (
                torch.as_tensor(batch["references"][i]["embeddings"]).tolist()
                == [[index] * 200] * 2
            )


def test_an_unreadable_shard_ends_a_validation(codec: str, tmp_path: Path):
    """A metric over fewer items would not be comparable."""
    found = ShardSet.open(write_shards(tmp_path, codec, (3, 3)))
    path = found.paths[1]
    whole = path.read_bytes()
    for cut in (0, 300, 512, 1500, len(whole) // 2):
        path.write_bytes(whole[:cut])
        assert str(path) in refusal(list, EvaluationDataset(found, 50, 2))
    path.unlink()
    assert str(path) in refusal(list, EvaluationDataset(found, 50, 2))


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (3, 2)])
def test_an_epoch_is_every_item_once(ranks: int, workers: int, codec: str, tmp_path: Path):
    """With equal shares, all readers together read each item once in each epoch."""
    found = ShardSet.open(write_shards(tmp_path, codec, [4] * 12))
    batches = 48 // 4 // ranks  # of four items, per rank and epoch
    streams = [load(TrainingStream(found, 50, 4, 7, rank, ranks), workers) for rank in range(ranks)]
    drawn = [list(islice(stream, 2 * batches)) for stream in streams]
    first = [k for batches_of_rank in drawn for k in keys(batches_of_rank[:batches])]
    second = [k for batches_of_rank in drawn for k in keys(batches_of_rank[batches:])]
    assert sorted(first) == sorted(second) == all_keys(48)
    assert first != second
    assert first != all_keys(48)


def same(one: list[Batch], two: list[Batch]) -> bool:
    return len(one) == len(two) and all(
        a["keys"] == b["keys"]
        and torch.equal(a["codes"], b["codes"])
        and torch.equal(a["valid"], b["valid"])
        for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_order_and_crops_are_a_function_of_the_seed(workers: int, shards: ShardSet):
    def draw(seed: int, rank: int = 0, number: int = 8) -> list[Batch]:
        return list(islice(load(TrainingStream(shards, 30, 3, seed, rank, 2), workers), number))

    torch.manual_seed(1)
    np.random.seed(1)
    one = draw(5)
    torch.manual_seed(2)
    np.random.seed(2)
    assert same(one, draw(5))
    assert keys(one) != keys(draw(6)) and keys(one) != keys(draw(5, rank=1))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("start", [1, 5, 40])
def test_a_resumed_stream_goes_on_exactly(workers: int, start: int, shards: ShardSet):
    """Mid-epoch, at any worker's turn, and epochs later."""
    whole = list(islice(load(TrainingStream(shards, 30, 3, 5, 1, 2), workers), start + 6))
    rest = list(islice(load(TrainingStream(shards, 30, 3, 5, 1, 2, start), workers), 6))
    assert same(whole[start:], rest)


@pytest.mark.parametrize(("workers", "start"), [(0, 5), (2, 5), (2, 40)])
def test_a_stream_that_skipped_a_shard_resumes_exactly(
    workers: int, start: int, codec: str, tmp_path: Path
):
    """If the same shards are unreadable; other items replace theirs."""
    found = ShardSet.open(write_shards(tmp_path, codec, COUNTS))
    found.paths[1].write_bytes(found.paths[1].read_bytes()[:1000])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = list(islice(load(TrainingStream(found, 30, 3, 5), workers), start + 6))
        rest = list(islice(load(TrainingStream(found, 30, 3, 5, start_batch=start), workers), 6))
    assert same(whole[start:], rest)
    assert {key for batch in whole for key in batch["keys"]}.isdisjoint(all_keys(8)[5:])


def test_a_resume_reads_nothing_it_does_not_need(shards: ShardSet, monkeypatch: pytest.MonkeyPatch):
    """The position is computed, so resuming reads no earlier shards."""
    read = []

    def counted(path: Path, *args: Any, **kwargs: Any) -> Any:
        read.append(path)
        return read_shard(path, *args, **kwargs)

    monkeypatch.setattr("magnet_train.data.shards.read_shard", counted)
    next(iter(TrainingStream(shards, 30, 3, 5, start_batch=10_000)))
    assert len(read) <= 8


def test_random_crops_reach_both_ends(codec: str, tmp_path: Path):
    """Items longer than the example: starts from 0 to T - num_frames, consecutive frames, no
    padding.
    """
    found = ShardSet.open(write_shards(tmp_path, codec, (2,), num_frames=35))
    starts = []
    for batch in islice(TrainingStream(found, 30, 2, 0), 100):
        assert batch["valid"].all()
        for row, index in zip(batch["codes"], batch["indices"], strict=True):
            frames = row[1] + 64 * row[2]
            starts.append(int(frames[0]))
            assert (row[0] == index).all()
            assert frames.tolist() == list(range(starts[-1], starts[-1] + 30))
    counts = Counter(starts)
    assert set(counts) == set(range(6)) and min(counts.values()) > 10


def test_short_items_are_padded_and_marked(codec: str, tmp_path: Path):
    """Valid frames contain audio: ceil(duration_s * frame_rate), even if there are more codes."""
    seconds = [1.0, 0.61, 0.6, 0.59]  # 50, 31, 30 and 30 frames
    found = ShardSet.open(write_shards(tmp_path, codec, (4,), num_frames=50, seconds=seconds))
    (batch,) = EvaluationDataset(found, 80, 4)
    assert batch["codes"].shape == (4, 4, 80)
    assert batch["valid"].sum(1).tolist() == [50, 31, 30, 30]
    for row, valid in zip(batch["codes"], batch["valid"], strict=True):
        real = int(valid.sum())
        assert valid[:real].all()
        assert row[1, :real].tolist() == list(range(real))
        assert not row[:, real:].any()
    for batch in islice(TrainingStream(found, 31, 4, 0), 30):
        for row, valid, index in zip(batch["codes"], batch["valid"], batch["indices"], strict=True):
            frames, real = row[1][valid], round(np.ceil(round(seconds[index] * FRAME_RATE, 6)))
            # Crops never contain the codec's padding.
            assert len(frames) == min(31, real) and int(frames.max()) < real
            assert frames.tolist() == list(range(int(frames[0]), int(frames[0]) + len(frames)))


# --- the folder -----------------------------------------------------------------------------------


def rewrite_index(folder: Path, change: Callable[[Any], Any]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "index.json").unlink(), "run tokenize again to finish it"),
        (lambda f: [p.unlink() for p in f.iterdir()], "make it with tokenize"),
        (lambda f: (f / "index.json").write_text("{"), "broken"),
        (lambda f: (f / "index.json").write_text("[]"), "broken"),
        (lambda f: rewrite_index(f, lambda index: index["shards"].clear()), "no shards"),
        (
            lambda f: rewrite_index(f, lambda index: index["shards"].append(index["shards"][0])),
            "twice",
        ),
        (lambda f: rewrite_index(f, lambda index: index["shards"].append("x")), "broken"),
        (lambda f: rewrite_index(f, lambda index: index["codec"].pop("frame_rate")), "frame_rate"),
        (
            lambda f: rewrite_index(f, lambda index: index["codec"].update(num_codebooks=10**8)),
            "num_codebooks",
        ),
        *(
            (
                lambda f, name=name, value=value: rewrite_index(
                    f, lambda i: i["shards"][0].update({name: value})
                ),
                name,
            )
            for name, value in (
                ("num_examples", 10**12),
                ("num_examples", -1),
                ("num_examples", True),
                ("sha256", 5),
            )
        ),
        *(
            (
                lambda f, name=name: rewrite_index(f, lambda i: i["shards"][0].update(name=name)),
                "invalid shard name",
            )
            for name in ("../a.tar", "/a.tar", "a/b.tar", ".a.tar")
        ),
        (
            lambda f: (f / "index.json").write_text(
                '{"shards": [{"name": "a", "num_examples": 1}]}'
            ),
            "broken",
        ),
        (lambda f: (f / "index.json").write_bytes(b"[" * 100_000), "broken"),
    ],
)
def test_wrong_folders(damage: Callable[[Path], Any], says: str, codec: str, tmp_path: Path):
    write_shards(tmp_path, codec, (2,))
    damage(tmp_path)
    text = refusal(ShardSet.open, tmp_path)
    assert says in text and str(tmp_path) in text


def write_tar(
    path: Path, members: list[tuple[str, bytes]], change: Any = None, **kind: Any
) -> Path:
    """A tar with these members; `change` may modify the first header."""
    with tarfile.open(path, **({"mode": "w"} | kind)) as tar:
        for number, (name, content) in enumerate(members):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if change is not None and number == 0:
                change(member)
            tar.addfile(member, io.BytesIO(content))
    return path


def members(key: str = "a", array: Any = None, info: Any = None) -> list[tuple[str, bytes]]:
    codes = io.BytesIO()
    np.save(codes, np.ones((4, 10), np.uint16) if array is None else array)
    if info is None:
        info = {"key": key, "caption": "x", "duration_s": 0.2}
    about = info if isinstance(info, bytes) else json.dumps(info).encode()
    return [(f"{key}.codes.npy", codes.getvalue()), (f"{key}.json", about)]


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("key", ["a", "c" * 150])
def test_tars_of_every_format_are_read(kind: int, key: str, tmp_path: Path):
    if len(key) > 100 and kind == tarfile.USTAR_FORMAT:
        return  # which has no such names
    path = write_tar(
        tmp_path / "a.tar", members(key), lambda m: setattr(m, "mtime", 1.5), format=kind
    )
    (item,) = read_shard(path)
    assert item["info"]["key"] == key and item["codes"].tolist() == [[1] * 10] * 4


@pytest.mark.parametrize("key", ["../a", "/a", "a/b", "a b", "é", "a" * 201])
def test_keys_that_lead_elsewhere_are_refused(key: str, tmp_path: Path):
    assert "a key has letters" in refusal(read_shard, write_tar(tmp_path / "a.tar", members(key)))


INFO = {"key": "a", "caption": "x", "duration_s": 0.2}


@pytest.mark.parametrize(
    "info",
    [
        *(
            {**INFO, "duration_s": value}
            for value in (None, "1", -1, 0, 1e308, float("nan"), float("inf"), True, [1])
        ),
        *({**INFO, "duration_s": value} for value in (1e-300, 10**400)),
        *({**INFO, "caption": value} for value in (5, None, ["x"], {})),
        {**INFO, "key": "b"},
        {**INFO, "key": 5},
        *({k: v for k, v in INFO.items() if k != name} for name in ("key", "duration_s")),
        b"[1]",
        b"{",
        b"\xff",
        b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b" " * (1 << 20) + b"{}",
        b"5",
    ],
)
def test_a_json_of_strangers_is_checked(info: Any, tmp_path: Path):
    assert "a.json" in refusal(read_shard, write_tar(tmp_path / "a.tar", members(info=info)))


def test_a_missing_value_and_one_of_another_type_are_told_apart(tmp_path: Path):
    for info, says in (
        ({**INFO, "caption": 5}, "a.json: caption has the wrong type, int"),
        ({"key": "a"}, "a.json: duration_s is missing)"),
    ):
        assert says in refusal(read_shard, write_tar(tmp_path / "a.tar", members(info=info)))


def test_a_reason_is_one_line_whatever_the_key(tmp_path: Path):
    path = write_tar(tmp_path / "a.tar", members("a\nb", info=b"\xff"))
    assert "a b.json: not UTF-8 at byte 0" in refusal(read_shard, path)


def test_a_caption_is_text_that_can_be_written(tmp_path: Path):
    (one,) = read_shard(write_tar(tmp_path / "a.tar", members(info={"key": "a", "duration_s": 1})))
    assert one["info"]["caption"] == ""
    broken = {**INFO, "caption": "\ud800", "genre": ["\ud800"]}
    (one,) = read_shard(write_tar(tmp_path / "a.tar", members(info=broken)))
    assert one["info"]["caption"] == "?" and one["info"]["genre"] == ["?"]


@pytest.mark.parametrize(
    "arrays",
    [
        {"embeddings": [[1.0]]},
        {"embeddings": [[1.0]], "tags": [[np.nan]]},
        {"embeddings": [[1.0]], "tags": [[1.0], [1.0]]},
        {"embeddings": [[]], "tags": [[]]},
    ],
)
def test_references_of_strangers_are_checked(arrays: Any, tmp_path: Path):
    file = io.BytesIO()
    np.savez(file, **{name: np.array(value, np.float32) for name, value in arrays.items()})
    path = write_tar(tmp_path / "a.tar", [*members(), ("a.reference.npz", file.getvalue())])
    assert "a.reference.npz" in refusal(read_shard, path, with_references=True)


def sparse(member: tarfile.TarInfo) -> None:
    member.type = tarfile.GNUTYPE_SPARSE


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (sparse, {}),
        (lambda m: setattr(m, "type", tarfile.SYMTYPE), {}),
        (lambda m: m.pax_headers.update({"size": "-1000"}), {"format": tarfile.PAX_FORMAT}),
        (lambda m: m.pax_headers.update({"GNU.sparse.major": "1"}), {"format": tarfile.PAX_FORMAT}),
    ],
)
def test_members_of_other_sizes_than_they_have_are_refused(change: Any, kind: Any, tmp_path: Path):
    path = write_tar(tmp_path / "a.tar", members(), change, **kind)
    assert "the member at byte 0" in refusal(read_shard, path)


def test_a_negative_size_and_a_compressed_tar_are_refused(tmp_path: Path):
    header = bytearray(512)
    header[:12], header[124:130], header[156] = b"a.codes.npy\0", b"-1000\0", 48
    header[148:156] = b"%06o\0 " % (sum(header) + 8 * 32)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    assert "damaged" in refusal(read_shard, tmp_path / "a.tar")
    assert "damaged" in refusal(read_shard, write_tar(tmp_path / "b.tar", members(), mode="w:gz"))


def test_a_shard_that_is_no_file_is_not_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "a.tar")
    assert "regular file" in refusal(read_shard, tmp_path / "a.tar")


def test_arrays_are_not_believed_further_than_their_bytes(tmp_path: Path):
    one, two = members()
    claimed = one[1].replace(b"(4, 10)", b"(4, 1" + b"0" * 12 + b")")
    assert "a.codes.npy" in refusal(
        read_shard, write_tar(tmp_path / "a.tar", [(one[0], claimed), two])
    )


@pytest.mark.parametrize("num_frames", [80, 100, 130])
def test_a_loader_process_changes_nothing(num_frames: int, codec: str, tmp_path: Path):
    """Batches, types, padding and references are equal, although workers compress batches."""
    found = ShardSet.open(
        write_shards(tmp_path, codec, (4, 3), seconds=[2, 1.5, 0.1, 2, 1, 2, 1.99])
    )
    for dataset in (
        TrainingStream(found, num_frames, 3, 0),
        EvaluationDataset(found, num_frames, 3),
    ):
        for one, two in zip(islice(load(dataset, 0), 3), islice(load(dataset, 1), 3), strict=True):
            assert type(one) is type(two) is dict and list(one) == list(two)
            for name in ("codes", "valid"):
                assert one[name].dtype == two[name].dtype and torch.equal(one[name], two[name])
            references = [
                [r and {k: v.tolist() for k, v in r.items()} for r in b.pop("references")]
                for b in (one, two)
            ]
            assert references[0] == references[1]
            rest = [{k: v for k, v in b.items() if k not in ("codes", "valid")} for b in (one, two)]
            assert rest[0] == rest[1]


def test_every_cut_of_a_tar_is_refused(folder: Path, tmp_path: Path):
    """Including a cut between members, which tarfile reads as the end, and damaged headers."""
    whole = (folder / "shard-000001.tar").read_bytes()
    path = tmp_path / "cut.tar"
    end = len(whole.rstrip(b"\0")) + 511 & ~511
    for cut in {*range(0, end, 331), *range(0, end + 1, 512)}:
        path.write_bytes(whole[:cut])
        assert str(path) in refusal(read_shard, path)
    with tarfile.open(folder / "shard-000001.tar") as tar:
        headers = [member.offset for member in tar]
    for at in headers:
        damaged = bytearray(whole)
        damaged[at + 130] ^= 1  # in the length
        path.write_bytes(damaged)
        assert str(path) in refusal(read_shard, path)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 10)), np.zeros(4, np.uint16), np.array([{}], dtype=object)]
)
def test_codes_that_are_no_uint16_arrays(array: np.ndarray, tmp_path: Path):
    path = write_tar(tmp_path / "a.tar", members(array=array))
    assert str(path) in refusal(read_shard, path)


def test_the_order_begins_anywhere():
    """Exactly the first items are skipped, within a group and epochs later, in constant time."""
    counts = [5, 3, 4, 5, 3, 4, 1, 1, 9]
    items = [i for group, _ in islice(training_order(counts, 3, 1, 2), 20) for i in group]
    for done in range(100):
        groups = islice(training_order(counts, 3, 1, 2, done), 20)
        rest = [i for group, skipped in groups for i in group[skipped:]]
        assert rest[: len(items) - done] == items[done:]
    begin = time.process_time()
    next(training_order([256] * 10_000, 0, 0, 2, 10**8))
    assert time.process_time() - begin < 5


# --- the data module ------------------------------------------------------------------------------


def data_module(codec: str, train: Path, validation: Path | None, **options: Any) -> Any:
    from magnet_train.data.datamodule import MagnetDataModule

    folders = {"train": str(train), "validation": validation and str(validation)}
    folders |= {"test": folders["validation"]}
    return MagnetDataModule(
        **(folders | {"batch_size": 2, "num_workers": 0, "crop_s": 1.0, "codec": codec} | options)
    )


def fit(data: Any, checkpoint: Path | None = None, **options: Any) -> tuple[list[list[str]], Any]:
    """Keys of each training batch in a Lightning run of a dummy model."""
    import lightning.pytorch as L

    class Embedder(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.heard: list[list[str]] = []

        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            self.heard.append(batch["keys"])
            return (self.weight - 1) ** 2

        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            assert batch["codes"].shape[2] == 50

        def predict_step(self, batch: Batch, batch_idx: int) -> list[str]:
            return batch["keys"]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "enable_checkpointing": False,
        "check_val_every_n_epoch": None,
        "val_check_interval": 1000,
    }
    if "limit_train_batches" in options:
        settings |= {"check_val_every_n_epoch": 1, "val_check_interval": 1.0}
    module = Embedder()
    trainer = L.Trainer(**(settings | options))
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return module.heard, (trainer, module)


def test_what_lightning_gets(codec: str, folder: Path):
    data = data_module(codec, folder, folder, predict_split="validation", batch_size=5)
    _, (trainer, module) = fit(data, max_steps=1)
    assert data.num_items("validation") == 24 and data.num_frames == 50
    assert [k for batch in trainer.predict(module, datamodule=data) for k in batch] == all_keys()
    assert trainer.validate(module, datamodule=data, verbose=False) is not None


def test_shards_of_another_codec(codec: str, folder: Path, tmp_path: Path):
    other = make_data_codec(tmp_path / "codec", seed=1)
    text = refusal(data_module(other, folder, folder).setup, "fit")
    assert str(folder) in text and "codec" in text and other in text
    # The same under another path.
    data_module(make_data_codec(tmp_path / "copy"), folder, folder).setup("fit")


def test_splits_that_are_missing(codec: str, folder: Path, tmp_path: Path):
    from magnet_train.data.datamodule import MagnetDataModule

    assert "--data.validation" in refusal(
        MagnetDataModule(train=str(folder), codec=codec).setup, "fit"
    )
    assert str(tmp_path / "gone") in refusal(
        data_module(codec, tmp_path / "gone", folder).setup, "fit"
    )


def test_validation_split_by_shard(codec: str, tmp_path: Path):
    """Disjoint and complete; more shards move none."""

    def split(num_shards: int) -> tuple[set[str], set[str]]:
        data = data_module(codec, written, None, val_split=0.4, test=None)
        train, validation = (data.shards(name) for name in ("train", "validation"))
        names = tuple({shard["name"] for shard in s.index["shards"]} for s in (train, validation))
        assert sum(train.counts) + sum(validation.counts) == 2 * num_shards
        assert len(names[0]) + len(names[1]) == num_shards
        return names

    written = write_shards(tmp_path / "shards", codec, [2] * 8)
    train, validation = split(8)
    write_shards(written, codec, [2] * 11)
    assert train and validation
    more = split(11)
    assert train < more[0] | more[1] and train <= more[0] and validation <= more[1]
    with pytest.raises(UserError, match=r"val_split 0\.001: holds out none"):
        data_module(codec, written, None, val_split=0.001, test=None).shards("train")
    with pytest.raises(UserError, match="val_split"):
        data_module(codec, written, written, val_split=0.1)


class Ranks:
    accumulate_grad_batches = 1
    """As much of a Trainer as the data module asks for."""

    def __init__(self, world_size: int):
        from types import SimpleNamespace as N

        self.world_size, self.global_rank, self.overfit_batches = world_size, 0, 0
        total = N(ready=0, processed=0, completed=0)
        self.fit_loop = N(epoch_loop=N(batch_progress=N(total=total)))


@pytest.mark.parametrize(
    ("shards", "ranks", "workers", "fits"),
    [
        (6, 1, 6, True),
        (6, 1, 7, False),
        (6, 3, 2, True),
        (6, 3, 3, False),
        (1, 1, 0, True),
        (1, 2, 0, False),
        (1, 1, 2, False),
    ],
)
def test_fewer_shards_than_workers(
    shards: int, ranks: int, workers: int, fits: bool, codec: str, tmp_path: Path
):
    train = write_shards(tmp_path / "train", codec, [2] * shards)
    data = data_module(codec, train, train, num_workers=workers)
    data.trainer = Ranks(ranks)
    if fits:
        assert data.train_dataloader().num_workers == workers
        return
    text = refusal(data.train_dataloader)
    assert str(train) in text and f"{shards} shards" in text and "--shard_size" in text
    assert ("num_workers" in text) == (shards >= ranks)
    data = data_module(codec, train, train, num_workers=None)  # as many as there are shards for
    data.trainer = Ranks(ranks)
    if shards >= ranks:
        assert 0 < max(1, data.train_dataloader().num_workers) * ranks <= shards


# --- found wrong once -----------------------------------------------------------------------------


def test_epochs_go_on_where_the_last_one_stopped(codec: str, folder: Path, tmp_path: Path):
    def data() -> Any:
        return data_module(codec, folder, folder, num_workers=2)

    whole, _ = fit(data(), max_steps=12)
    epochs, (trainer, _) = fit(data(), max_steps=6, limit_train_batches=4)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    rest, _ = fit(data(), tmp_path / "a.ckpt", max_steps=12, limit_train_batches=4)
    assert epochs + rest == whole


def test_changed_bytes_are_noticed(codec: str, tmp_path: Path):
    found = ShardSet.open(write_shards(tmp_path, codec, (3, 3)))
    content = bytearray(found.paths[1].read_bytes())
    content[512 + 200] ^= 1  # within the first item's codes
    found.paths[1].write_bytes(content)
    assert str(found.paths[1]) in refusal(list, EvaluationDataset(found, 50, 2))
    with pytest.warns(UserWarning, match="shard-000001"):
        assert set(keys(islice(TrainingStream(found, 50, 3, 0), 10))) == set(all_keys(3))


@pytest.mark.parametrize("codes", [np.full((4, 100), 64), np.zeros((3, 100))])
def test_codes_that_are_none_of_the_codec(
    codes: np.ndarray, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("helpers_data.codes_of", lambda *_: codes.astype(np.uint16))
    found = ShardSet.open(write_shards(tmp_path, codec, (2,)))
    assert "shard-000000" in refusal(list, EvaluationDataset(found, 50, 2))


def test_a_shard_that_comes_back_is_used_again(codec: str, tmp_path: Path):
    found = ShardSet.open(write_shards(tmp_path, codec, (4, 4)))
    content = found.paths[1].read_bytes()
    found.paths[1].unlink()
    stream = iter(TrainingStream(found, 50, 4, 0))
    with pytest.warns(UserWarning, match="shard-000001"):
        next(stream)
    found.paths[1].write_bytes(content)
    assert set(keys(islice(stream, 10))) == set(all_keys(8))


def test_numbers_that_other_programs_lack_are_no_words_of_a_caption():
    info = decode_info(b'{"key": "k", "caption": "x", "duration_s": 1.0, "bpm": NaN}')
    assert info["bpm"] is None
    with pytest.raises(ValueError, match="duration_s"):
        decode_info(b'{"key": "k", "caption": "x", "duration_s": NaN}')
