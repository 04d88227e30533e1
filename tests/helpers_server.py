"""A local web server that serves a folder, with injected faults."""

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FaultyServer:
    """Serves `folder`; `faults` are the faults of a path, one per request, and `always` those of
    every request.

    A fault is a status ("503"), "cut" (half of the body is sent), "reset" (the connection breaks),
    "hang" (no response for some seconds), "other" (the same number of other bytes), "endless" (a
    body of zeros without end), or "drip" (a byte every 50 ms).
    """

    def __init__(self, folder: Path):
        self.faults: dict[str, list[str]] = {}
        self.always: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        lock, own = threading.Lock(), self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, directory=str(folder), **kwargs)

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                path = self.path.lstrip("/")
                with lock:
                    own.requests[path] += 1
                    queue = own.faults.get(path)
                    fault = queue.pop(0) if queue else own.always.get(path)
                if fault is None:
                    super().do_GET()
                elif fault.isdigit():
                    self.send_error(int(fault))
                elif fault == "hang":
                    time.sleep(3)
                elif fault == "reset":
                    self.connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                    self.connection.close()
                elif fault in ("endless", "drip"):
                    self.send_response(200)  # without a length: the body ends with the connection
                    self.end_headers()
                    for _ in range(10_000):
                        self.wfile.write(bytes(10_000 if fault == "endless" else 1))
                        time.sleep(0.05 if fault == "drip" else 0)
                else:
                    content = (folder / path).read_bytes()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    half = content[: len(content) // 2]
                    self.wfile.write(
                        half if fault == "cut" else half + bytes(len(content) - len(half))
                    )

            def handle(self) -> None:
                with suppress(OSError):
                    super().handle()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *args: None  # type: ignore  # its client went away
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def during(self, call: Callable[[], Any]) -> Counter[str]:
        """Requests received during a call."""
        before = self.requests.copy()
        call()
        return self.requests - before
