"""gs:// and s3:// against a server on this machine that answers as they do: late, or with no."""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator

import pytest

from proteus_jax.errors import InputError
from proteus_jax.runtime import console, remote_fs

LISTED = {
    "gs": json.dumps({"items": [{"name": "x/a.png", "size": "3", "bucket": "bucket"}]}),
    "s3": '<?xml version="1.0"?><ListBucketResult><Name>bucket</Name><Prefix>x/</Prefix>'
    "<KeyCount>1</KeyCount><IsTruncated>false</IsTruncated><Contents><Key>x/a.png</Key>"
    "<Size>3</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
    "</ListBucketResult>",
}
ROOTS = {"gs": "gs://anonymous@bucket/x?scheme=http", "s3": "s3://bucket/x?scheme=http"}


class Answers(http.server.BaseHTTPRequestHandler):
    """One file x/a.png; each answer after a delay, or a refusal."""

    protocol_version = "HTTP/1.1"
    delay, status = 0.0, 200

    def do_GET(self) -> None:
        time.sleep(self.delay)
        body = b"abc"
        if "prefix=" in self.path:
            body = LISTED["s3" if "list-type" in self.path else "gs"].encode()
        self.send_response(self.status)
        kind = "application/xml" if body.startswith(b"<") else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", "3")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def store(kind: str, monkeypatch: pytest.MonkeyPatch, **answers: float) -> Iterator[str]:
    """The address of a folder on a server that answers so."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "unused")
    handler = type("Handler", (Answers,), answers)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        region = "&region=us-east-1" if kind == "s3" else ""
        yield f"{ROOTS[kind]}&endpoint_override=127.0.0.1:{server.server_address[1]}{region}"
        server.shutdown()


@pytest.mark.parametrize("kind", ROOTS)
def test_a_store_that_answers_late_is_waited_for_in_words(
    kind: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "WAITING_INTERVAL", 0.1)
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.2)
    monkeypatch.setattr(remote_fs, "PATIENCE", 0.5)
    with store(kind, monkeypatch, delay=1.0) as root:
        assert list(remote_fs.remote_listing(root)) == [("a.png", 3)]
        assert remote_fs.read(root, "a.png") == b"abc"
    said = capfd.readouterr().out.splitlines()
    assert said[0] == f"listing {root}: 0:00"
    tried = "requests that fail are tried again, up to two minutes"
    assert said[-1].startswith(f"listing {root}: {tried}, 0:0")


@pytest.mark.parametrize("kind", ROOTS)
def test_a_store_that_refuses_is_believed_at_once(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store(kind, monkeypatch, status=403) as root:
        start = time.monotonic()
        words = "Permission|PERMISSION|ACCESS_DENIED"
        with pytest.raises(InputError, match=f"cannot be listed: .*(?:{words})"):
            list(remote_fs.remote_listing(root))
        assert time.monotonic() - start < 20
