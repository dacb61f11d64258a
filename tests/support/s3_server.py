"""A real S3 server on loopback, and a door in front of it that fails as networks do."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

__all__ = ["KEY", "SECRET", "FaultyDoor", "put_folder", "s3_server"]

KEY, SECRET = "AKIAEXAMPLEEXAMPLE77", "very/secret+value"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Runs moto's server in a process of its own; gives its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, "the server ended"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def put_folder(endpoint: str, folder: Path, bucket: str, prefix: str) -> None:
    """Copies a folder into a bucket, which is made if it is not there."""
    import boto3

    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )  # fmt: skip
    client.create_bucket(Bucket=bucket)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = f"{prefix}/{path.relative_to(folder).as_posix()}"
            client.put_object(Bucket=bucket, Key=name, Body=path.read_bytes())
    client.close()


class FaultyDoor:
    """An HTTP proxy on loopback that fails a share of the requests: 503, or nothing at all.

    Args:
        target: URL of the server behind it.
        share: Of the requests, from 0 to 1, that fail; which ones, `seed` decides.
        hang_seconds: How long a request that gets no answer is kept waiting.
    """

    def __init__(
        self, target: str, *, share: float, seed: int = 0, hang_seconds: float = 0.0
    ) -> None:
        host = target.removeprefix("http://")
        draw, lock = random.Random(seed), threading.Lock()
        door = self
        self.requests = self.failed = 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                """Keeps the test's output clean."""

            def pass_on(self) -> None:
                with lock:
                    door.requests += 1
                    fate = draw.random() / share if share else 1.0
                    door.failed += fate < 1
                if fate < 0.7:
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if fate < 1:
                    # No answer comes, and the connection breaks in the end.
                    time.sleep(hang_seconds)
                    self.close_connection = True
                    return
                behind = http.client.HTTPConnection(host, timeout=30)
                headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
                length = int(self.headers.get("Content-Length") or 0)
                behind.request(self.command, self.path, self.rfile.read(length), headers)
                answer = behind.getresponse()
                content = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                size = answer.getheader("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", size or str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)
                behind.close()

            do_GET = do_HEAD = do_PUT = do_POST = pass_on  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultyDoor:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
