"""Weights are read from a path, the cache or a download; a wrong file is refused."""

import hashlib
import multiprocessing
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers_errors import refusal
from helpers_programs import LONGEST_S

from magnet_train.common.downloads import (
    CLAP_MUSIC,
    Weights,
    WeightsFile,
    find_weights,
    load_network,
    load_tensors,
)

CONTENT = bytes(range(256)) * 3000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT for every URL except those with "absent", and counts requests."""

    requests = 0
    arriving = len(CONTENT)
    """Bytes before the connection breaks off."""
    pause_s = 0.0
    has_ranges = True

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.starts: list[int] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        sleep(self.server.pause_s)
        wanted = self.headers.get("Range", "bytes=0-") if self.server.has_ranges else "bytes=0-"
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        self.server.starts.append(start)
        status = 200 if start == 0 else 206 if start < len(CONTENT) else 416
        self.send_response(404 if "absent" in self.path else status)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : start + self.server.arriving])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the network may be used."""
    monkeypatch.setenv("MAGNET_TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "cache"


def published(server: Server, sha256: str = SHA256, file: str = "tiny.pth") -> Weights:
    url = f"http://127.0.0.1:{server.server_port}/releases/{file}"
    return Weights("Tiny", url, len(CONTENT), "CC0-1.0", sha256)


def files(cache: Path) -> set[str]:
    """Content of the cache except the lock."""
    return {p.name for p in cache.iterdir() if p.suffix != ".lock"} if cache.is_dir() else set()


refused = partial(refusal, find_weights)
"""The message with which weights are refused."""


@pytest.mark.parametrize("known", [SHA256, SHA256[:8], ""], ids=["all", "beginning", "none"])
def test_a_file_is_downloaded_once(server, cache, known):
    for _ in range(2):
        file = find_weights(published(server, known))
        assert file.path == cache / "tiny.pth" and file.path.read_bytes() == CONTENT
        assert (file.sha256, file.hash) == (SHA256, SHA256[:16])
    assert server.requests == 1
    assert files(cache) == {"tiny.pth", "tiny.pth.sha256"}
    assert (cache / "tiny.pth.sha256").read_text() == f"{SHA256}  tiny.pth\n"


def test_a_failed_download_leaves_nothing(server, cache):
    assert "404" in refused(published(server, file="absent.pth"))
    assert "12345678" in refused(published(server, "12345678"))
    assert "received" in refused(replace(published(server, ""), size=len(CONTENT) - 1))
    assert "more than" in refused(replace(published(server), size=1000))
    nobody = replace(published(server), url="http://127.0.0.1:9/tiny.pth")
    assert "download http://127.0.0.1:9/tiny.pth" in refused(nobody)
    assert files(cache) <= {"tiny.pth.part"}


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_download_that_broke_off_is_resumed(server, cache, has_ranges):
    server.has_ranges, server.arriving = has_ranges, len(CONTENT) // 2
    for known in (SHA256, ""):
        assert f"{server.arriving} of" in refused(published(server, known))
        assert files(cache) - {"tiny.pth.sha256"} == {"tiny.pth.part"}
        server.arriving = len(CONTENT)
        assert find_weights(published(server, known)).sha256 == SHA256
        half = len(CONTENT) // 2
        assert server.starts[-2:] == [0, half if has_ranges else 0]
        (cache / "tiny.pth").unlink()
        server.arriving = half


def test_a_download_that_never_ends_is_given_up(server, cache, monkeypatch):
    monkeypatch.setattr("magnet_train.common.downloads.SLOW_AFTER_S", 0.0)
    monkeypatch.setattr("magnet_train.common.downloads.MIN_BYTES_PER_S", 10**15)
    assert "slower than" in refused(published(server))


def test_all_of_a_file_may_be_there_and_unverified(server, cache):
    cache.mkdir()
    (cache / "tiny.pth.part").write_bytes(CONTENT)
    assert find_weights(published(server)).sha256 == SHA256 and server.starts == [len(CONTENT)]
    (cache / "tiny.pth").rename(cache / "tiny.pth.part")
    (cache / "tiny.pth.part").write_bytes(b"x" * len(CONTENT))
    assert SHA256 in refused(published(server))  # and is gone
    assert find_weights(published(server)).sha256 == SHA256


def _find(weights: Weights, results: "multiprocessing.Queue[str]") -> None:
    results.put(find_weights(weights).sha256)


def test_two_processes_at_once_download_once(server, cache):
    server.pause_s = 0.5
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_find, args=(published(server), results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=LONGEST_S) for _ in processes] == [SHA256] * 2
    for process in processes:
        process.join()
    assert server.requests == 1


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_without_network_the_message_says_what_to_download(server, cache, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    weights = published(server)
    message = refused(weights)
    for word in (variable, weights.url, SHA256, str(cache / "tiny.pth")):
        assert word in message
    assert server.requests == 0


def test_a_changed_file_is_refused(server, cache, tmp_path):
    for known in (SHA256, ""):
        find_weights(published(server, known))
        (cache / "tiny.pth").write_bytes(CONTENT[:-1])
        assert "delete it to download it again" in refused(published(server, known))
        (cache / "tiny.pth").unlink()
    (cache / "tiny.pth.sha256").write_text(f"{'0' * 64}  tiny.pth\n")
    assert "0" * 64 in refused(published(server, ""))  # it changed at its publisher
    assert files(cache) == {"tiny.pth.sha256"}


def test_a_given_path_wins_and_must_be_the_published_file(server, cache, tmp_path):
    given = tmp_path / "mine.pth"
    assert "no such file; download http" in refused(published(server), given)
    given.write_bytes(CONTENT)
    assert find_weights(published(server), given) == WeightsFile(given, SHA256)
    given.write_bytes(b"something else")
    assert "mine.pth: SHA-256 is" in refused(published(server), given)
    assert server.requests == 0 and files(cache) == set()


def test_clap_comes_through_the_hub(cache, tmp_path, monkeypatch):
    asked = []

    def download(repo_id: str, file: str) -> str:
        asked.append((repo_id, file))
        if len(asked) == 1:
            raise ConnectionError("no route")
        (tmp_path / file).write_bytes(CONTENT)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo_id, file: None)
    assert "no route" in refused(CLAP_MUSIC)
    assert f"not {CLAP_MUSIC.sha256} as published" in refused(CLAP_MUSIC)
    assert find_weights(replace(CLAP_MUSIC, sha256=SHA256)).sha256 == SHA256
    assert set(asked) == {("lukewys/laion_clap", "music_audioset_epoch_15_esc_90.14.pt")}


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_legacy", [False, True], ids=["zip", "before 2020"])
def test_tensors_of_both_formats_are_read(tmp_path, is_legacy):
    path = tmp_path / "x.pth"
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    torch.save(tensors, path, _use_new_zipfile_serialization=not is_legacy)
    loaded = load_tensors(WeightsFile(path, ""))
    assert loaded.keys() == tensors.keys()
    torch.testing.assert_close(loaded["a"], tensors["a"])


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numbers_of_either_numpy_are_read(tmp_path, module):
    path = tmp_path / "x.pt"
    content = {"epoch": 15, "loss": np.float64(0.25), "best": np.int64(7)}
    torch.save(content | {"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    for name in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        path.write_bytes(path.read_bytes().replace(name, module.encode()))
    assert module.encode() in path.read_bytes()
    loaded = load_tensors(WeightsFile(path, ""))
    assert (loaded["loss"], loaded["best"]) == (0.25, 7)


class Trap:
    """Content of a hostile file."""

    def __reduce__(self):
        return Path.touch, (Path("executed.tmp"),)


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Trap()}, "x.pth")
    assert "could run code" in refusal(load_tensors, WeightsFile(tmp_path / "x.pth", ""))
    assert not Path("executed.tmp").exists()


@pytest.mark.parametrize("content", [b"", b"<html>moved</html>", CONTENT])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    assert "x.pth: damaged or truncated" in refusal(load_tensors, WeightsFile(path, ""))


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    network = torch.nn.Linear(2, 3)
    load_network(network, WeightsFile(path, ""))
    assert not network.training and not network.weight.requires_grad
    text = refusal(load_network, torch.nn.Linear(2, 4), WeightsFile(path, ""))
    assert "weights of another network: " in text and "size mismatch" in text
    torch.save([torch.ones(2)], path)
    assert "a list, not named tensors" in refusal(load_tensors, WeightsFile(path, ""))
