"""Files and folders are written completely or not at all; untrusted names stay in their folder."""

import json
import threading
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from magnet_train.common.errors import UserError
from magnet_train.common.folders import (
    new_folder,
    replacing,
    safe_name,
    writable_folder,
    write_json,
)


@pytest.mark.parametrize("durable", [False, True])
def test_a_failed_write_leaves_the_previous_file_and_nothing_else(durable, tmp_path):
    file = tmp_path / "a.json"
    write_json(file, [1])
    with pytest.raises(ZeroDivisionError), replacing(file, durable) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert json.loads(file.read_text()) == [1] and list(tmp_path.iterdir()) == [file]
    with replacing(file, durable) as temporary:
        assert temporary.suffix == ".part" and temporary.name.startswith(".")
        temporary.write_text("[2]")
        assert json.loads(file.read_text()) == [1]
    assert json.loads(file.read_text()) == [2] and list(tmp_path.iterdir()) == [file]


def test_writers_of_one_file_at_once_do_not_disturb_one_another(tmp_path):
    file = tmp_path / "a.json"
    threads = [threading.Thread(target=write_json, args=(file, [i] * 5000)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(json.loads(file.read_text()))) == 1 and list(tmp_path.iterdir()) == [file]


def test_a_new_folder_appears_when_all_is_written(tmp_path):
    out = tmp_path / "a" / "out"
    with pytest.raises(ZeroDivisionError), new_folder(out) as folder:
        (folder / "x").touch()
        raise ZeroDivisionError
    assert list(out.parent.iterdir()) == []
    with new_folder(out) as folder:
        (folder / "x").touch()
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["x"] and out.stat().st_mode & 0o777 == 0o755
    for taken, message in ((out, "not an empty folder"), (out / "x" / "y", "cannot be created")):
        with pytest.raises(UserError, match=message), new_folder(taken):
            pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    assert writable_folder(tmp_path / "b" / "c", "--out").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .*file/run: cannot be written"):
        writable_folder(tmp_path / "file" / "run", "--out")
    with pytest.raises(UserError, match=r"--out s3:/\*\*\*@b/x: a URL"):
        writable_folder(Path("s3://key:secret@b/x"), "--out")


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=0, max_size=300)


@example("../../x", "x")
@example("..", ".")
@example("a/b", "a-b")
@example("", "unnamed")
@example("絵" * 200, "絵" * 201)
@example("../../x", safe_name("../../x"))
@given(NAMES, NAMES)
def test_names_are_safe_and_distinct(one, two):
    name = safe_name(one)
    assert name not in ("", ".", "..") and not set(name) & set("/\\\0") and name[0] != "."
    assert len(name.encode()) < 200
    assert (name == safe_name(two)) == (one == two)


def test_plain_names_stay_as_they_are():
    for name in ("clip_07.a", "span_len=3,seed=1", "Ünï", "a" * 120):
        assert safe_name(name) == name
