"""As much of W&B's HTTP interface as its client needs, on the loopback: runs, history, files, alerts. No artifacts."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANGING = "hang"


class WandbServer:
    """A server at `url`. `fail` makes it fail: an HTTP status, or HANGING; None: it works."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}  # by id: config, files (name: {line number: line}), what ends it
        self.uploads: dict[str, bytes] = {}  # by RUN/NAME
        self.alerts: list[dict[str, Any]] = []
        self.unknown: list[str] = []  # what the client asked for in vain
        self.fail: int | str | None = None
        self.asked = 0  # requests so far
        self._lock, self._closing = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None: ...

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                status, content = outer._answer(self.command, self.path, body)
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_PUT = do_POST = answer

        class Server(ThreadingHTTPServer):
            def handle_error(self, *arguments: object) -> None: ...  # a client that was killed

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def history(self, identity: str) -> list[dict[str, Any]]:
        """The rows of a run in their order."""
        return [json.loads(line) for _, line in sorted(self._file(identity, "wandb-history.jsonl").items())]

    def summary(self, identity: str) -> dict[str, Any]:
        lines = self._file(identity, "wandb-summary.json")
        return json.loads(lines[max(lines)]) if lines else {}

    def _file(self, identity: str, name: str) -> dict[int, str]:
        return self.runs[identity]["files"].get(name, {}) if identity in self.runs else {}

    def _answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        self.asked += 1
        if self.fail == HANGING:
            self._closing.wait()
        if self.fail is not None:
            return (500 if self.fail == HANGING else int(self.fail)), {}
        with self._lock:
            if stream := re.match(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
                self._take(self.runs[stream[1]], json.loads(body))
            elif path.startswith("/upload/"):
                self.uploads[path.removeprefix("/upload/")] = body
            elif path.startswith("/graphql"):
                question = json.loads(body)
                operation = re.search(r"(?:query|mutation)\s+(\w+)", question["query"])[1]
                return 200, {"data": self._graphql(operation, question.get("variables") or {})}
            elif path != "/":
                self.unknown.append(path)
        return 200, {}

    def _take(self, run: dict[str, Any], stream: dict[str, Any]) -> None:
        """Lines of files at their offsets, and in the end exitcode, complete, preempting."""
        run.update({key: value for key, value in stream.items() if key != "files"})
        for name, part in (stream.get("files") or {}).items():
            lines = run["files"].setdefault(name, {})
            lines.update({part["offset"] + i: line for i, line in enumerate(part["content"])})

    def _graphql(self, operation: str, given: dict[str, Any]) -> dict[str, Any] | None:
        if operation == "Viewer":
            viewer = {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": viewer}
        if operation == "UpsertBucket":
            identity = given.get("name") or given["id"].removeprefix("id_")
            new = identity not in self.runs
            run = self.runs.setdefault(identity, {"files": {}, "config": "{}", "asked": {}})
            run["asked"] |= {key: value for key, value in given.items() if value is not None}
            run["config"] = given.get("config") or run["config"]
            return {"upsertBucket": {"bucket": self._bucket(identity, given), "inserted": new}}
        if operation == "RunResumeStatus":
            bucket = self._bucket(given["name"], given) if given["name"] in self.runs else None
            return {
                "model": {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "me"}, "bucket": bucket}
            }
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{given['run']}/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": f"id_{given['run']}", "uploadHeaders": [], "files": files}}
        if operation == "NotifyScriptableRunAlert":
            self.alerts.append(given)
            return {"notifyScriptableRunAlert": {"success": True}}
        known = {
            "OrganizationCoreWeaveOrganizationID": None,  # of the cloud alone
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "RunStoppedStatus": {"project": {"run": {"stopped": False}}},
            "MarkRunFilesUploaded": {"markRunFilesUploaded": {"success": True}},
        }
        if operation not in known:
            self.unknown.append(operation)
        return known.get(operation)

    def _bucket(self, identity: str, given: dict[str, Any]) -> dict[str, Any]:
        lengths = {name: len(self._file(identity, name)) for name in self.runs[identity]["files"]}
        return {
            "id": f"id_{identity}",
            "name": identity,
            "displayName": identity,
            "description": "",
            "config": self.runs[identity]["config"],
            "sweepName": None,
            "tags": [],
            "notes": "",
            "eventsTail": "[]",
            "historyLineCount": lengths.get("wandb-history.jsonl", 0),
            "logLineCount": lengths.get("output.log", 0),
            "eventsLineCount": lengths.get("wandb-events.jsonl", 0),
            "wandbConfig": '{"t": 1}',
            "summaryMetrics": json.dumps(self.summary(identity)),
            "historyTail": json.dumps([json.dumps(row) for row in self.history(identity)[-1:]]),
            "project": {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "me"}},
        }


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    try:
        yield server
    finally:
        server.close()
