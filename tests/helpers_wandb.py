"""Reader of offline W&B runs, and a fake W&B server with configurable responses."""

import http.server
import json
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    """LevelDB's log format: blocks of 32 KiB of parts, each with checksum, length and whether it
    begins or ends.
    """
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
            rows.append(
                {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in items
                }
            )
    return rows


@contextmanager
def server(answer: Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]) -> Iterator[str]:
    """Address of a server that responds with status and JSON of `answer` to GraphQL and streamed
    rows, and with {} to all other requests.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            request = (
                json.loads(body)
                if self.path.endswith(("/graphql", "/file_stream")) and body
                else {}
            )
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


VIEWER = {
    "id": "u",
    "entity": "e",
    "username": "e",
    "email": "",
    "flags": "{}",
    "teams": {"edges": []},
}
"""Whose key it is."""


@dataclass
class Recorder:
    """What a W&B server received of a run."""

    url: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Of each portion of rows."""
    is_down: bool = False
    """Set it, and every answer is 503."""


@contextmanager
def recorder() -> Iterator[Recorder]:
    """A server that knows a user, takes any run, and keeps its rows."""
    got = Recorder()
    bucket = {"id": "b", "displayName": "x", "summaryMetrics": "{}", "logLineCount": 0}
    bucket |= {
        "eventsLineCount": 0,
        "eventsTail": "[]",
        "config": "{}",
        "tags": [],
        "wandbConfig": '{"t": 1}',
    }
    project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}

    def answer(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if got.is_down:
            return 503, {}
        content = request.get("files", {}).get("wandb-history.jsonl")
        if content is not None:
            got.offsets.append(content["offset"])
            got.rows.extend(map(json.loads, content["content"]))
        tail = json.dumps([json.dumps(got.rows[-1])] if got.rows else [])
        kind, more = request.get("operationName"), request.get("variables", {})
        known = bucket | {
            "historyLineCount": len(got.rows),
            "historyTail": tail,
            "project": project,
        }
        known["name"] = more.get("name") or more.get("run")
        if kind == "UpsertBucket":
            return 200, {"data": {"upsertBucket": {"bucket": known, "inserted": not got.rows}}}
        if kind == "RunResumeStatus":
            return 200, {"data": {"model": project | {"bucket": known if got.rows else None}}}
        if kind == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{got.url}/{name}"} for name in more["files"]]
            return 200, {
                "data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
            }
        return 200, {"data": {"viewer": VIEWER} if "viewer" in request.get("query", "") else {}}

    with server(answer) as got.url:
        yield got
