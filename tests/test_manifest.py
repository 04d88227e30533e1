"""Reading of folders, sidecar files and manifests, and refused input."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers_errors import refusal

from magnet_train.data.manifest import JAMENDO_COLUMNS, find_clips, read_prompts, read_sidecar


def touch(*paths: Path) -> Path:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths[0]


def captions(source: Path) -> dict[str, str]:
    return {clip.name: clip.caption for clip in find_clips(source)}


# --- captions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("note", "text", "caption"),
    [
        ({"caption": "c", "description": "d", "prompt": "p", "text": "t"}, "txt", "c"),
        ({"description": "d", "prompt": "p", "text": "t"}, "txt", "d"),
        ({"prompt": "p", "text": "t"}, "txt", "p"),
        ({"text": "t"}, "txt", "t"),
        ({"Caption": " two\n words "}, None, "two words"),
        ({"bpm": 90}, "txt", "txt"),
        *(
            ({"caption": empty}, "txt", "txt")
            for empty in (None, "", "  ", "None", "nan", float("nan"))
        ),
        ({"caption": None, "text": "t"}, None, "t"),
        ({"caption": "", "description": "d"}, None, "d"),
        ({"caption": "half a pair \ud800"}, None, "half a pair ?"),
        (None, "\ufeff a\n b ", "a b"),
        (None, "None", ""),
        (None, None, ""),
    ],
)
@pytest.mark.parametrize("upper", [False, True])
def test_the_first_caption_that_is_there(
    note: Any, text: str | None, caption: str, upper: bool, tmp_path: Path
):
    change = str.upper if upper else str.lower
    audio = touch(tmp_path / "x.y.wav")
    if note is not None:
        (tmp_path / f"x.y{change('.json')}").write_text(json.dumps(note))
    if text is not None:
        (tmp_path / f"x.y{change('.txt')}").write_text(text, encoding="utf-8")
    (clip,) = find_clips(tmp_path)
    assert clip.caption == caption == read_sidecar(audio)[0] and not clip.error
    assert not {"caption", "none"} & {str(value).lower() for value in clip.fields}


def test_fields_without_a_value_are_dropped(tmp_path: Path):
    touch(tmp_path / "a.wav")
    about = {
        "caption": "x",
        "key": "G minor",
        "bpm": float("nan"),
        "mood": None,
        "genre": "nan",
        "path": "/x",
    }
    (tmp_path / "a.json").write_text(json.dumps(about | {"tags": ["b", None, "", float("inf")]}))
    assert find_clips(tmp_path)[0].fields == {"music_key": "G minor", "tags": ["b"]}


@pytest.mark.parametrize(
    "content",
    [b"{broken", b"[1, 2]", b'{"caption": ["a"]}', b'{"caption": 5}', b"\xff{}", b" " * (1 << 21)]
    + [b'{"x":' + b"[" * n + b"]" * n + b"}" for n in (30, 100_000)]
    + [b'{"x": ' + b"9" * 5000 + b"}"],
)
def test_a_broken_sidecar_is_an_error_of_its_clip(content: bytes, tmp_path: Path):
    touch(tmp_path / "a.wav", tmp_path / "b.wav")
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.json").write_bytes(content)
    fine, broken = find_clips(tmp_path)
    assert fine.caption == "fine" and "b.json" in broken.error and "\n" not in broken.error


# --- folders --------------------------------------------------------------------------------------


def test_folders_are_searched_to_their_depth_and_hidden_ones_are_not(tmp_path: Path):
    names = ["b/c/d.FLAC", "a.wav", "B.wav", "a/z.ogg"]
    touch(*(tmp_path / name for name in names))
    touch(tmp_path / ".ipynb_checkpoints/a.wav", tmp_path / ".a.wav", tmp_path / "notes.md")
    assert list(captions(tmp_path)) == sorted(names, key=lambda name: Path(name).parts)


def test_links_to_folders_are_followed_and_each_folder_is_listed_once(tmp_path: Path):
    folder = tmp_path / "in"
    touch(tmp_path / "store/r.wav", folder / "own.wav", folder / "z/deep.wav")
    (tmp_path / "store/r.txt").write_text("linked")
    (folder / "linked").symlink_to(tmp_path / "store")
    (folder / "a_again").symlink_to(folder / "z")
    (tmp_path / "store/circle").symlink_to(folder)
    (folder / "itself").symlink_to("itself")
    assert captions(folder) == {"linked/r.wav": "linked", "own.wav": "", "z/deep.wav": ""}


def test_unlistable_folders_and_other_files_have_specific_errors(tmp_path: Path):
    touch(tmp_path / "a.wav")
    os.mkfifo(tmp_path / "a.txt")
    (clip,) = find_clips(tmp_path)
    assert "regular file" in clip.error


def test_names_that_are_no_utf8(tmp_path: Path):
    name = os.fsdecode(b"caf\xe9")
    touch(tmp_path / f"{name}.wav")
    (tmp_path / f"{name}.txt").write_text("coffee")
    assert captions(tmp_path) == {"caf?.wav": "coffee"}


def test_wrong_sources(tmp_path: Path):
    assert "no such" in refusal(find_clips, tmp_path / "gone")
    assert "no audio files" in refusal(find_clips, tmp_path)
    assert ".jsonl" in refusal(find_clips, touch(tmp_path / "a.wav"))


# --- manifests ------------------------------------------------------------------------------------

ROWS = [
    {"path": "sub/ä.wav", "caption": "one, \u2028quoted", "mood": "calm"},
    {"path": "/elsewhere/b.wav", "caption": "two", "mood": ""},
]


def write_manifest(file: Path, rows: list[dict[str, Any]], head: list[str] | None = None) -> Path:
    """Write rows as JSONL or CSV, by the file's suffix; `head` renames the columns."""
    names = list(rows[0])
    renamed = dict(zip(names, head or names, strict=True))
    if file.suffix == ".jsonl":
        lines = [
            json.dumps({renamed[k]: v for k, v in row.items()}, ensure_ascii=False) for row in rows
        ]
    else:
        between = "\t" if file.suffix == ".tsv" else ","
        lines = [between.join(renamed.values())]
        lines += [between.join(f'"{row.get(name, "")}"' for name in names) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return file


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
@pytest.mark.parametrize(
    "head",
    [
        ["path", "caption", "mood"],
        ["audio_filepath", "text", "mood"],
        ["file_name", "description", "mood"],
        ["Path", " Caption", "mood"],
        ["path", "prompt", "mood"],
    ],
)
def test_every_kind_of_manifest(suffix: str, head: list[str], tmp_path: Path):
    one, two = find_clips(write_manifest(tmp_path / f"m.{suffix}", ROWS, head))
    assert (one.path, one.name, one.id) == (tmp_path / "sub/ä.wav", "sub/ä.wav", "sub/ä")
    assert (one.caption, one.fields) == ("one, quoted", {"mood": "calm"})
    assert (str(two.path), two.caption, two.fields) == ("/elsewhere/b.wav", "two", {})
    assert (one.offset_s, one.duration_s, one.error) == (0.0, None, "")


def test_a_caption_that_was_found_stays(tmp_path: Path):
    (tmp_path / "m.jsonl").write_text('{"path": "a.wav", "Caption": "x", "caption": null}')
    assert find_clips(tmp_path / "m.jsonl")[0].caption == "x"


def test_a_row_without_a_caption_takes_that_of_the_sidecar_file(tmp_path: Path):
    touch(tmp_path / "a.wav")
    (tmp_path / "a.json").write_text(json.dumps({"description": "a tone", "bpm": "", "genre": "x"}))
    row = json.dumps({"path": "a.wav", "caption": None, "sample_rate": 8000, "weight": None})
    (tmp_path / "m.jsonl.gz").write_bytes(gzip.compress(row.encode()))
    (clip,) = find_clips(tmp_path / "m.jsonl.gz")
    assert (clip.caption, clip.fields) == ("a tone", {"sample_rate": 8000, "genre": "x"})


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_segments(suffix: str, tmp_path: Path):
    rows: list[dict[str, Any]] = [{"path": "a.wav", "offset": 3.0, "duration": 2.0, "text": "x"}]
    rows += [rows[0] | {"offset": 8.0, "duration": 2.03}, rows[0] | {"offset": 10.0}]
    first, last, beyond = find_clips(write_manifest(tmp_path / f"m.{suffix}", rows))
    assert first.segment(10.0) == (3.0, 2.0) and first.segment(4.0) == (3.0, 1.0)
    assert last.segment(10.0) == (8.0, 2.0)
    assert "beyond" in refusal(beyond.segment, 10.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("offset", -1), ("offset", "x"), ("duration", 0), ("duration", "1e999")),
        *(("offset", True), ("offset", 10**400), ("path", "."), ("path", "/"), ("path", "a\0")),
    ],
    ids=str,
)
def test_a_row_that_cannot_be_is_an_error_of_its_clip(field: str, value: Any, tmp_path: Path):
    row = {"path": "a.wav", "text": "x"} | {field: value}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    (clip,) = find_clips(tmp_path / "m.jsonl")
    assert "line 1" in clip.error and field in clip.error


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("m.jsonl", '{"path": "a.wav"\n', "line 1: not JSON"),
        ("m.jsonl", '\n{"caption": "x"}\n', "line 2: no path"),
        ("m.jsonl", '{"path": "a"}\n[1]\n', "line 2: is a list"),
        ("m.jsonl", "", "no audio"),
        ("m.json", '\n[\n  {"path": "a.wav"}]', "a JSON array; write one object per line"),
        ("m.jsonl", '{"path": "a.wav", "text": "x", "Text": "y"}', "two values for 'Text'"),
        ("m.tsv", "\t".join(JAMENDO_COLUMNS) + "\nt\ta\tb\t\t1\n", "line 2: no path"),
        ("m.csv", "path,caption\na.wav,unquoted, comma\n", "line 2: more columns"),
        ("m.csv", 'path,caption\na.wav,"Sunrise, slow\nb.wav,two\nc.wav,three\n', "line 2"),
        ("m.csv", 'path,caption\na.wav,one\nb.wav,"two\nc.wav,"three"\n', "line 3"),
        ("m.csv", 'path,caption\na.wav,"' + "x" * 200_000, "line 2"),
        ("m.csv", "path,caption,caption\n", "two columns"),
        ("m.csv", "path;caption\na.wav;x\n", "no path"),
        ("m.tsv", "path\tcaption\na.wav\tx\ty\n", "line 2"),
    ],
)
def test_broken_manifests_name_the_line(name: str, content: str, says: str, tmp_path: Path):
    (tmp_path / name).write_text(content)
    assert says in refusal(find_clips, tmp_path / name)


def test_what_no_program_should_read_to_its_end(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "noise.jsonl.gz").write_bytes(b"\x1f\x8b\x08\0\0\0\0\0\0\3" + os.urandom(200))
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(bytes(200_000_000), 9))
    (tmp_path / "latin.csv").write_bytes(b"path,caption\na.wav,caf\xe9\n")
    found = {path.name: refusal(find_clips, path) for path in sorted(tmp_path.iterdir())}
    says = {"pipe": "regular file", "noise": "unreadable", "bomb": "bytes", "latin": "UTF-8"}
    assert all(says[name.partition(".")[0]] in text for name, text in found.items())


def test_prompts(tmp_path: Path):
    (tmp_path / "p.txt").write_text("\ufeffone\n\n two \u2028words\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["one", "two words"]
    (tmp_path / "p.csv").write_text('prompt,x\n"one, two",1\n')
    assert read_prompts(tmp_path / "p.csv") == ["one, two"]
    (tmp_path / "p.jsonl").write_text('{"text": "one"}\n{"caption": null}\n')
    assert "line 2: no caption" in refusal(read_prompts, tmp_path / "p.jsonl")
    assert "no prompt" in refusal(read_prompts, touch(tmp_path / "empty.txt"))
    (tmp_path / "cr.txt").write_text("one\rtwo\r", newline="")
    assert read_prompts(tmp_path / "cr.txt") == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [('{"caption": "one"}\n', "jsonl"), ("Path, Caption\na.wav, one\n", "csv")],
)
def test_a_manifest_that_is_named_as_a_text_is_refused(content: str, kind: str, tmp_path: Path):
    (tmp_path / "p.txt").write_text(content)
    assert f"name it .{kind}" in refusal(read_prompts, tmp_path / "p.txt")
    (tmp_path / "p.txt").write_text("{drums} and bass\n")
    assert read_prompts(tmp_path / "p.txt") == ["{drums} and bass"]


def test_the_metadata_of_mtg_jamendo_is_a_manifest(tmp_path: Path):
    touch(tmp_path / "48/948.mp3", tmp_path / "14/214.low.mp3", tmp_path / "15/215.mp3")
    head = "TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS\n"
    tags = "genre---rock\tmood/theme---calm\tgenre---folk\tinstrument---piano\tother---x"
    rows = [f"track_0000948\ta1\tb1\t48/948.mp3\t212.7\t{tags}"]
    rows += ["track_0000214\ta2\tb2\t14/214.mp3\t124.6\tgenre---punkrock"]
    rows += ["track_0000215\ta2\tb2\t15/215.mp3\t151.4"]
    (tmp_path / "autotagging.tsv").write_text(head + "\n".join(rows))
    first, low, bare = find_clips(tmp_path / "autotagging.tsv")
    assert first.caption == "genre: rock, folk. instrument: piano. moods: calm"
    assert first.fields["genre"] == ["rock", "folk"] and first.fields["artist_id"] == "a1"
    assert first.duration_s is None and not first.error
    assert low.path == tmp_path / "14/214.low.mp3" and low.caption == "genre: punkrock"
    assert bare.caption == ""
