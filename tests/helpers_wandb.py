"""What an offline W&B run holds, read back from its file; and a W&B server that answers as it is told."""

import http.server
import json
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def records(run: Path) -> list[Any]:
    """All records of the offline sessions of a run folder, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in _frames(file.read_bytes()):
            found.append(Record())
            found[-1].ParseFromString(data)
    return found


def _frames(content: bytes) -> Iterator[bytes]:
    """LevelDB's log format: blocks of 32 KiB of parts, each with checksum, length and whether it begins or ends."""
    assert content[:4] == b":W&B"
    at, frame = 7, b""
    while at + 7 <= len(content):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        frame += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield frame
            frame = b""


def history(found: list[Any]) -> list[dict[str, Any]]:
    """Logged rows: key to value."""
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


@contextmanager
def server(answer: Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]) -> Iterator[str]:
    """Address of a server that answers as `answer` says, with a status and JSON, to GraphQL, streamed rows and, as {},
    all else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            request = json.loads(body) if self.path.endswith(("/graphql", "/file_stream")) and body else {}
            status, content = answer(request)
            reply = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_GET = do_PUT = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_address[1]}"
        http_server.shutdown()
