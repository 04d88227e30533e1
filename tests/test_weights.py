"""Weights from a path, the cache or one download, from a server on this machine."""

import hashlib
import multiprocessing
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep

import numpy as np
import pytest
import torch
from helpers_programs import LONGEST_S

from magnet_train.common import downloads as weights_module
from magnet_train.common.downloads import PUBLISHED, Weights, WeightsFile, find_weights, load_network, load_tensors
from magnet_train.common.errors import UserError

CONTENT = bytes(range(256)) * 3000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT whatever is asked for; counts requests."""

    requests = 0
    arriving = len(CONTENT)
    """Bytes before the connection breaks off."""
    pause_s = 0.0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        sleep(self.server.pause_s)
        self.send_response(404 if "absent" in self.path else 200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: self.server.arriving])

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
    """An empty cache, with leave to use the network: this machine's own."""
    monkeypatch.setenv("MAGNET_TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(switch, raising=False)
    return tmp_path / "cache"


def published(server: Server, sha256: str = SHA256) -> Weights:
    url = f"http://127.0.0.1:{server.server_port}/releases/tiny.pth"
    return Weights("Tiny", url, len(CONTENT), "CC0-1.0", sha256, "tests")


def left(cache: Path) -> set[str]:
    """What is in the cache, less the lock."""
    return {p.name for p in cache.iterdir() if not p.name.endswith(".lock")} if cache.is_dir() else set()


@pytest.mark.parametrize("known", [SHA256, SHA256[:8], ""], ids=["whole hash", "its beginning", "none"])
def test_a_file_is_downloaded_once(server: Server, cache: Path, known: str):
    for _ in range(2):
        file = find_weights(published(server, known))
        assert file.path == cache / "tiny.pth" and file.path.read_bytes() == CONTENT
        assert (file.sha256, file.hash) == (SHA256, SHA256[:16])
    assert server.requests == 1
    assert left(cache) == {"tiny.pth", "tiny.pth.sha256"}
    assert (cache / "tiny.pth.sha256").read_text() == f"{SHA256}  tiny.pth\n"


def test_the_cache_is_in_the_home_folder_if_not_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MAGNET_TRAIN_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/somewhere")
    assert weights_module.cache_dir() == Path("/somewhere/.cache/magnet_train")


def test_a_wrong_file_is_refused_and_nothing_is_kept(server: Server, cache: Path):
    with pytest.raises(UserError, match=f"SHA-256 is {SHA256}, not 12345678… as published; nothing is kept") as error:
        find_weights(published(server, "12345678"))
    assert "\n" not in str(error.value)
    assert left(cache) == set()


def test_a_broken_connection_leaves_nothing(server: Server, cache: Path):
    server.arriving = len(CONTENT) // 2
    with pytest.raises(UserError, match=f"{server.arriving} of {len(CONTENT)} bytes arrived"):
        find_weights(published(server, ""))  # with no hash to tell
    assert left(cache) == set()
    server.arriving = len(CONTENT)
    assert find_weights(published(server, "")).sha256 == SHA256


def test_a_download_stopped_by_hand_leaves_nothing(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(weights: Weights, file: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights_module, "_fetch", stop)
    with pytest.raises(KeyboardInterrupt):
        find_weights(published(server))
    assert left(cache) == set()


def test_a_file_that_the_server_lacks(server: Server, cache: Path):
    absent = replace(published(server), url=f"http://127.0.0.1:{server.server_port}/absent.pth")
    with pytest.raises(UserError, match=r"download fails \(HTTP Error 404"):
        find_weights(absent)
    assert left(cache) == set()


def _find(weights: Weights, results: "multiprocessing.Queue[str]") -> None:
    results.put(find_weights(weights).sha256)


def test_two_processes_at_once_download_once(server: Server, cache: Path):
    server.pause_s = 0.5
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    ranks = [context.Process(target=_find, args=(published(server), results)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    assert [results.get(timeout=LONGEST_S) for _ in ranks] == [SHA256] * 2
    for rank in ranks:
        rank.join()
    assert server.requests == 1


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_and_missing_says_all_that_is_needed(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, switch: str
):
    monkeypatch.setenv(switch, "1")
    weights = published(server)
    with pytest.raises(UserError) as error:
        find_weights(weights)
    message = str(error.value)
    assert all(word in message for word in (switch, weights.url, SHA256, str(cache / "tiny.pth")))
    assert "\n" not in message
    assert server.requests == 0


def test_no_network_says_so_too(server: Server, cache: Path):
    nobody = replace(published(server), url="http://127.0.0.1:9/tiny.pth")
    with pytest.raises(UserError, match=r"download fails .*refused.*fetch http://127.0.0.1:9/tiny.pth"):
        find_weights(nobody)


def test_a_damaged_file_in_the_cache_is_named(server: Server, cache: Path):
    find_weights(published(server))
    (cache / "tiny.pth").write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"tiny\.pth: SHA-256 is .* as published; delete it"):
        find_weights(published(server))


def test_a_file_without_a_published_hash_is_held_to_its_first(server: Server, cache: Path):
    find_weights(published(server, ""))
    (cache / "tiny.pth").write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=f"not {SHA256} as .*tiny.pth.sha256 has recorded; delete it"):
        find_weights(published(server, ""))
    (cache / "tiny.pth").unlink()
    assert find_weights(published(server, "")).sha256 == SHA256


def test_a_file_that_changed_at_its_publisher_is_refused(server: Server, cache: Path):
    find_weights(published(server, ""))
    (cache / "tiny.pth").unlink()
    (cache / "tiny.pth.sha256").write_text(f"{'0' * 64}  tiny.pth\n")
    with pytest.raises(UserError, match=f"not {'0' * 64} as .* has recorded; nothing is kept"):
        find_weights(published(server, ""))
    assert left(cache) == {"tiny.pth.sha256"}


def test_an_explicit_path_wins(server: Server, cache: Path, tmp_path: Path):
    mine = tmp_path / "mine.pth"
    mine.write_bytes(CONTENT)
    assert find_weights(published(server), mine) == WeightsFile(mine, SHA256)
    assert server.requests == 0 and left(cache) == set()


def test_an_explicit_path_with_another_file_is_named(server: Server, cache: Path, tmp_path: Path):
    mine = tmp_path / "mine.pth"
    mine.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"mine\.pth: SHA-256 is .*, not .* as published; give the published file"):
        find_weights(published(server), mine)
    with pytest.raises(UserError, match=r"nowhere\.pth': no such file; fetch http"):
        find_weights(published(server), tmp_path / "nowhere.pth")
    assert mine.read_bytes() == b"something else"


def test_what_is_published_can_be_listed():
    assert len({w.file for w in PUBLISHED}) == len(PUBLISHED) == 4
    for w in PUBLISHED:
        assert w.url.startswith("https://") and w.file.endswith((".pt", ".pth"))
        assert w.size > 10**8 and w.name and w.licence and w.used_for
        assert len(w.sha256) in (0, 8, 64) and int("0" + w.sha256, 16) >= 0
        if len(w.sha256) == 8:
            assert w.sha256 in w.file


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 2020"])
def test_tensors_of_both_formats_are_read(tmp_path: Path, legacy: bool):
    path = tmp_path / "x.pth"
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    loaded = load_tensors(WeightsFile(path, ""))
    assert loaded.keys() == tensors.keys()
    torch.testing.assert_close(loaded["a"], tensors["a"])


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numbers_of_either_numpy_are_read(tmp_path: Path, module: str):
    """LAION's checkpoint keeps its training's state, some of it as numpy's numbers."""
    path = tmp_path / "x.pt"
    torch.save({"epoch": 15, "loss": np.float64(0.25), "best": np.int64(7), "state_dict": {"a": torch.ones(2)}}, path,
               _use_new_zipfile_serialization=False)  # fmt: skip
    found = b"numpy._core.multiarray" if b"numpy._core.multiarray" in path.read_bytes() else b"numpy.core.multiarray"
    path.write_bytes(path.read_bytes().replace(found, module.encode()))
    assert module.encode() in path.read_bytes()
    loaded = load_tensors(WeightsFile(path, ""))
    assert (loaded["loss"], loaded["best"]) == (0.25, 7)


class Stranger:
    """What a hostile file could hold."""

    def __reduce__(self):
        return Path.touch, (Path("executed.tmp"),)


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Stranger()}, "x.pth")
    with pytest.raises(UserError, match="not a file of weights"):
        load_tensors(WeightsFile(tmp_path / "x.pth", ""))
    assert not Path("executed.tmp").exists()


@pytest.mark.parametrize("content", [b"", b"<html>moved</html>", CONTENT])
def test_what_is_no_file_of_weights_is_named(tmp_path: Path, content: bytes):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pth: not a file of weights"):
        load_tensors(WeightsFile(path, ""))


def test_weights_of_another_network_are_named(tmp_path: Path):
    path = tmp_path / "x.pth"
    torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    network = torch.nn.Linear(2, 3)
    load_network(network, WeightsFile(path, ""))
    assert not network.training and not network.weight.requires_grad
    with pytest.raises(UserError, match=r"x\.pth: weights of another network: .*size mismatch") as error:
        load_network(torch.nn.Linear(2, 4), WeightsFile(path, ""))
    assert "\n" not in str(error.value)
    torch.save([torch.ones(2)], path)
    with pytest.raises(UserError, match="a list, not named tensors"):
        load_tensors(WeightsFile(path, ""))
