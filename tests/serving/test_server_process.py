"""`jaxmm serve` as a process: real connections, clients that misbehave, SIGTERM; and what the command refuses."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys

import pytest

from jaxmm import cli
from jaxmm.serving.http_server import is_loopback
from tests.pretrained import tiny
from tests.serving.common import DECODING, bomb, uploads

HEAD = "POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"


def form(image):
    return b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + image + b"\r\n--x--\r\n"


@pytest.fixture
def server(tmp_path, user_cache):
    """A process that captions, and its port."""
    tiny.captioner().save(tmp_path / "model")
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxmm.cli", "serve", tmp_path / "model", "--port", "0", "--decoding.max-length", "9",
         "--decoding.min-length", "3"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    port = re.fullmatch(r"model at http://127\.0\.0\.1:(\d+) \(caption, attention\); Ctrl-C stops it\n", line)
    yield process, int(port[1])
    process.kill()
    process.communicate()


def connect(port, content):
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(content)
    return connection


def test_it_keeps_answering_until_it_is_stopped(server):
    process, port = server
    images, expected = uploads(3), tiny.captioner().caption(tiny.pictures(3), decoding=DECODING)
    head = f"{HEAD}Content-Length: {len(form(images[0]))}\r\n\r\n".encode()
    slow = [connect(port, HEAD[:30].encode()), connect(port, head), connect(port, head + form(images[0])[:99])]
    connect(port, head + form(images[0])).close()
    garbage = connect(port, b"\x16\x03\x01 no HTTP\r\n\r\n")
    assert garbage.recv(99).startswith(b"HTTP/1.1 400")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for image, status in ((bomb(), 413), (b"?", 422), (images[0], 200), (images[1], 200)):
        connection.request("POST", "/caption", form(image), {"Content-Type": "multipart/form-data; boundary=x"})
        answer = connection.getresponse()
        content = json.loads(answer.read())
        assert answer.status == status
    assert [row["text"] for row in content] == [expected[1][0][0]]
    slow[2].sendall(form(images[0])[99:])
    assert slow[2].recv(99).startswith(b"HTTP/1.1 200")
    last = connect(port, head + form(images[0]))
    assert last.recv(99).startswith(b"HTTP/1.1 200")
    for own in (*slow, garbage, last):
        own.close()
    connection.close()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "stopped\n") and "Traceback" not in err


@pytest.fixture
def jaxmm(user_cache, capsys, monkeypatch):
    monkeypatch.setattr("jaxmm.training.runtime.keep_memory", lambda: None)      # this process is the tests'

    def run(*args):
        return cli.main(["serve", *map(str, args)]), capsys.readouterr().err

    return run


def test_what_the_command_refuses(jaxmm, tmp_path):
    tiny.clip().save(tmp_path / "clip")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "index.json").write_text('{"model": "another", "size": 20}')
    (tmp_path / "index" / "pictures.jsonl").write_text('{"path": "/p/a.png"}\n')
    (tmp_path / "index" / "embeddings.f32").write_bytes(bytes(80))
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        assert jaxmm(tmp_path / "clip", "--port", port) == (
            2, f"error: port is {port}, which another program uses; expected a free one, or 0\n")
    for args, words in ((("--host", "203.0.113.1"), "host is '203.0.113.1', port 0, which cannot be listened at"),
                        (("--index", tmp_path / "index"), "index is 'an index of another'; expected one of the model"),
                        (("--index", tmp_path / "clip"), "is no index that `jaxmm search index` made"),
                        (("--port", 99999), "port is 99999; expected 0 to 65535")):
        status, err = jaxmm(tmp_path / "clip", "--port", 0, *args)
        assert status in (1, 2) and err.startswith("error: ") and words in err and err.count("\n") == 1


def test_a_missing_extra_is_named(jaxmm, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmm.optional._missing", lambda extra: ["fastapi"])
    assert jaxmm(tmp_path) == (
        1, "error: jaxmm serve needs fastapi; install the extra: pip install 'jaxmm[serve]'\n")


@pytest.mark.parametrize("host, local", [
    ("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False),
    ("10.0.0.1", False), ("example.org", False)])
def test_hosts_of_this_computer(host, local):
    assert is_loopback(host) == local
