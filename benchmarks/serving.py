"""Load on `jaxmm serve`: captions of BLIP at random weights, batches against one request at a time.

    python -m benchmarks.serving [--only tiny] [--clients 64] [--seconds 60] [--malformed 10000] [--json FILE] [--force]

tiny is the size of the recipe blip_scenes, base is Salesforce's at 384 x 384 pixels. Each client sends a JPEG of 320 x
240 pixels, waits for its caption and sends the next. The server with `--limits.batch 1` computes one request at a time;
both are warmed up first. `ratio` is the quotient of their requests per second. A request is lost if it gets no answer,
or another one than the same image got when it was alone. Then the server is disturbed while one client goes on asking:
clients that are killed in the middle of a request, clients that send a byte per second, and malformed requests.
`cpu_ms` is the server's time on all cores per request, which other programs disturb less. `memory` is its resident
memory in MiB: after the warm-up, over the load (first and last tenth), and at the end.
"""

import argparse
import contextlib
import http.client
import io
import itertools
import json
import os
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.measure import is_busy, machine

MODELS, IMAGES, KILLED, SLOW = ("tiny", "base"), 16, 500, 200
BOUNDARY = "benchmark"
CORPUS = ["a large red circle above a small blue square", "two green stars left of a heart"] * 3


def prepare(name: str, folder: Path) -> None:
    """Write a captioner at random weights, so large that captions depend on the image."""
    import jax

    from jaxmm.config import ImageConfig, TokenizerConfig
    from jaxmm.data.tokenizers import make_tokenizer
    from jaxmm.inference.model import Model
    from jaxmm.models.blip import blip
    from jaxmm.recipes import load_recipe
    from jaxmm.tasks.image_captioning import Captioning
    tokenizer = make_tokenizer(TokenizerConfig(vocab_size=512, context_length=30), CORPUS)
    if name == "tiny":
        recipe = load_recipe("blip_scenes")
        model = recipe.task.bind(image_size=recipe.data.image.size, classes=None, tokenizer=tokenizer).model
        model = replace(model, embed_dim=None, matching=False, temperature=None,
                        text=replace(model.text, encoder=False))
    else:
        model = blip("base", image_size=384, embed_dim=None, matching=False, temperature=None)
        model = replace(model, text=replace(
            model.text, encoder=False, vocab_size=tokenizer.vocab_size + 2, decode_id=tokenizer.vocab_size,
            encode_id=tokenizer.vocab_size + 1, end_id=tokenizer.eos_id))
    task = Captioning(model=model)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 3 * leaf if path[-1].key == "kernel" else leaf, jax.jit(task.init)(jax.random.key(0)))
    image = ImageConfig(size=model.vision.image_size, eval_crop="squash")
    Model(task=task, params=params, preprocessing=image, tokenizer=tokenizer).save(folder)


def form(image: bytes) -> bytes:
    """Return the body of a request with an image."""
    return (f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'.encode() + image
            + f"\r\n--{BOUNDARY}--\r\n".encode())


def bodies() -> list[bytes]:
    """Return requests with different images."""
    rng, made = np.random.default_rng(0), []
    for _ in range(IMAGES):
        coarse = rng.integers(0, 256, (6, 8, 3), np.uint8).repeat(40, axis=0).repeat(40, axis=1)
        out = io.BytesIO()
        Image.fromarray(coarse).save(out, "JPEG")
        made.append(form(out.getvalue()))
    return made


def bomb() -> bytes:
    """Return a PNG whose header says 20,000 x 10,000 pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0), b"IEND"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)


class Server:
    """A `jaxmm serve` process."""

    def __init__(self, folder: Path, *args: str):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxmm.cli", "serve", str(folder), "--port", "0", "--warm-up", *args],
            stdout=subprocess.PIPE, stderr=self.log, text=True)
        ready = re.search(r"http://127\.0\.0\.1:(\d+)", self.process.stdout.readline())
        if ready is None:
            self.log.seek(0)
            sys.exit(f"the server did not start:\n{self.log.read()[-4000:]}")
        self.port = int(ready[1])

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)

    def memory(self) -> int:
        """Return the resident memory in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024

    def cpu(self) -> float:
        """Return the seconds of CPU that the process has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def mean_batch(self) -> float:
        """Return the mean number of captions that were computed together."""
        text = get(self.connect(), "/metrics")[1].decode()
        total, count = (float(re.search(rf'jaxmm_batch_size_{part}{{function="caption"}} (\S+)', text)[1])
                        for part in ("sum", "count"))
        return total / count

    def close(self) -> int:
        """Stop the server by SIGTERM and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        self.log.close()
        return status


def post(connection: http.client.HTTPConnection, body: bytes, path: str = "/caption") -> tuple[int, bytes]:
    """Return status and answer of a request."""
    connection.request("POST", path, body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def get(connection: http.client.HTTPConnection, path: str) -> tuple[int, bytes]:
    """Return status and answer of a request without a body."""
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


class Client(threading.Thread):
    """Sends requests one after the other until it is stopped, and compares each answer with the expected one."""

    def __init__(self, server: Server, number: int, requests: list[tuple[bytes, str]]):
        super().__init__(daemon=True)
        self.server, self.requests = server, itertools.islice(itertools.cycle(requests), number % IMAGES, None)
        self.times: list[float] = []
        self.lost: list[str] = []
        self.stopped = threading.Event()
        self.start()

    def run(self) -> None:
        """Send requests."""
        connection = self.server.connect()
        for body, expected in self.requests:
            if self.stopped.is_set():
                return
            start = time.perf_counter()
            try:
                status, answer = post(connection, body)
                text = json.loads(answer)[0]["text"] if status == 200 else f"status {status}: {answer[:80]!r}"
                if text != expected:
                    self.lost.append(text)
            except (OSError, http.client.HTTPException) as error:
                self.lost.append(repr(error))
                connection = self.server.connect()
            self.times.append(time.perf_counter() - start)


def load(server: Server, requests: list[tuple[bytes, str]], clients: int, seconds: float) -> dict:
    """Run clients at the same time and return what was measured."""
    memory, start, cpu = [], time.perf_counter(), server.cpu()
    running = [Client(server, number, requests) for number in range(clients)]
    while time.perf_counter() - start < seconds:
        memory.append(server.memory())
        time.sleep(min(1.0, seconds / 20))
    for client in running:
        client.stopped.set()
    for client in running:
        client.join()
    took, tenth = time.perf_counter() - start, max(1, len(memory) // 10)
    times = sorted(time for client in running for time in client.times)
    lost = [reason for client in running for reason in client.lost]
    return {"requests": len(times), "rps": round(len(times) / took, 2), "lost": len(lost), "why": lost[:3],
            "cpu_ms": round(1e3 * (server.cpu() - cpu) / len(times), 2),
            "median_s": round(statistics.median(times), 3), "p95_s": round(times[int(0.95 * len(times))], 3),
            "memory": [max(memory[:tenth]), max(memory[-tenth:])], "mean_batch": round(server.mean_batch(), 2)}


def raw(server: Server, content: bytes) -> socket.socket:
    """Return a connection on which bytes were sent."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=600)
    connection.sendall(content)
    return connection


def head(length: int) -> bytes:
    """Return the headers of a request."""
    return (f"POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
            f"Content-Length: {length}\r\n\r\n").encode()


def kill_clients(server: Server, body: bytes) -> dict:
    """Close connections in the middle of a request, or before its answer."""
    for number in range(KILLED):
        raw(server, (head(len(body)) + body)[:None if number % 2 else len(body) // 2]).close()
    return {"killed": KILLED}


def slow_clients(server: Server, body: bytes) -> dict:
    """Send a byte per second of headers, and of bodies, for five seconds."""
    parts = itertools.cycle((head(len(body))[:20], head(len(body))))
    connections = [raw(server, next(parts)) for _ in range(SLOW)]
    for _ in range(5):
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(b"a")
        time.sleep(1)
    for connection in connections:
        connection.close()
    return {"slow": SLOW}


def malformed(server: Server, count: int) -> dict:
    """Send requests that cannot be answered; return how many got which status."""
    def garbage() -> Iterator[Callable[[http.client.HTTPConnection], int]]:
        yield lambda connection: post(connection, form(b"no image"))[0]
        yield lambda connection: post(connection, form(bomb()))[0]
        yield lambda connection: post(connection, form(b"\xff\xd8\xff\xe0" + b"\0" * 500))[0]
        yield lambda connection: post(connection, b"no form")[0]
        yield lambda connection: post(connection, form(b""), "/nothing")[0]
        yield lambda connection: get(connection, "/caption")[0]

    statuses: dict[str, int] = {}
    kinds, connection = itertools.cycle(garbage()), server.connect()
    for number in range(count):
        if number % 10 == 9:  # no HTTP at all
            broken = raw(server, os.urandom(40) + b"\r\n\r\n")
            status = broken.recv(100).split(b" ")[1:2]
            broken.close()
            status = int(status[0]) if status else 0
        else:
            status = next(kinds)(connection)
        statuses[str(status)] = statuses.get(str(status), 0) + 1
    return {"malformed": count, "statuses": statuses}


def disturb(server: Server, requests: list[tuple[bytes, str]], count: int) -> dict:
    """Run the three disturbances while one client goes on asking."""
    asking, start = Client(server, 0, requests), time.perf_counter()
    row = kill_clients(server, requests[0][0]) | slow_clients(server, requests[0][0]) | malformed(server, count)
    asking.stopped.set()
    asking.join()
    return row | {"seconds": round(time.perf_counter() - start, 1), "answered": len(asking.times),
                  "lost": len(asking.lost), "slowest_s": round(max(asking.times), 2)}


def measure(name: str, folder: Path, args) -> dict:
    """Return the row of a model."""
    row = {"name": f"BLIP {name}", "clients": args.clients, "seconds": args.seconds}
    expected: list[tuple[bytes, str]] = []
    for arm, batch in (("one_by_one", ("--limits.batch", "1")), ("batched", ())):
        server = Server(folder, *batch)
        start = server.memory()
        if not expected:
            connection = server.connect()
            expected = [(body, json.loads(post(connection, body)[1])[0]["text"]) for body in bodies()]
        row[arm] = load(server, expected, args.clients, args.seconds)
        row[arm]["memory"].insert(0, start)
        if arm == "batched":
            row["disturbed"] = disturb(server, expected, args.malformed) | {"memory": server.memory()}
        row[arm]["exit_status"] = server.close()
    return row | {"captions": len({text for _, text in expected}),
                  "ratio": round(row["batched"]["rps"] / row["one_by_one"]["rps"], 2)}


def main():
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--force", action="store_true", help="record on a busy machine too (the record says so)")
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of the load")
    parser.add_argument("--malformed", type=int, default=10_000, help="number of malformed requests")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    busy, rows = is_busy(args.force), []
    with tempfile.TemporaryDirectory() as temporary:
        for name in [args.only] if args.only else MODELS:
            prepare(name, Path(temporary) / name)
            rows.append(measure(name, Path(temporary) / name, args) | {"busy": busy, "machine": machine()})
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    table = Table(title=f"{args.clients} clients for {args.seconds:g} s")
    for column in ("", "requests/s", "one by one", "ratio", "cpu ms", "mean batch", "lost", "median s", "memory MiB"):
        table.add_column(column)
    for row in rows:
        one, many = row["one_by_one"], row["batched"]
        table.add_row(row["name"] + (" (busy)" if busy else ""), f"{many['rps']:.2f}", f"{one['rps']:.2f}",
                      f"{row['ratio']:.2f}", f"{many['cpu_ms']:.1f} {one['cpu_ms']:.1f}", f"{many['mean_batch']:.1f}",
                      str(one["lost"] + many["lost"]), f"{many['median_s']:.2f}", " ".join(map(str, many["memory"])))
    console = Console(width=120)
    console.print(table)
    for row in rows:
        console.print(f"{row['name']} disturbed: {row['disturbed']}")


if __name__ == "__main__":
    main()
