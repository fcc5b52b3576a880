"""The hub, which here is a server of this process: what is asked for, the cache, revisions, tokens, offline."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from tests.pretrained import tiny

COMMIT = {"main": "a" * 40, "v2": "b" * 40}
LOADER = """
import json, os, sys
from jaxmm.inference.model import load
from jaxmm.pretrained.io.files import FileError
for line in sys.stdin:
    source, revision, env = json.loads(line)
    if os.fork():
        os.wait()
        continue
    os.environ.update(env)
    try:
        model = load(source, revision=revision or None)
        answer = {"parameters": model.num_parameters, "ids": model.tokenize(["a red circle"]).tolist()}
    except FileError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
    os._exit(0)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The three answers of the hub that a download needs."""

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def answer(self, body):
        server, path = self.server, self.path.split("?")[0]
        server.asked.append((self.command, path))
        if server.token and self.headers.get("authorization") != f"Bearer {server.token}":
            return self.reply(401, b"", {"X-Error-Code": "GatedRepo"}, body)
        repository = "some/model"
        for name, commit in COMMIT.items():
            files = server.files[name]
            if path in (f"/api/models/{repository}/revision/{name}", f"/api/models/{repository}/revision/{commit}"):
                result = {"id": repository, "modelId": repository, "sha": commit, "private": False, "tags": [],
                        "siblings": [{"rfilename": file} for file in files]}
                return self.reply(200, json.dumps(result).encode(), {"Content-Type": "application/json"}, body)
            if path in (f"/api/models/{repository}/tree/{name}", f"/api/models/{repository}/tree/{commit}"):
                result = [{"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for file, data in files.items()]
                return self.reply(200, json.dumps(result).encode(), {"Content-Type": "application/json"}, body)
            for file, data in files.items():
                if path in (f"/{repository}/resolve/{commit}/{file}", f"/{repository}/resolve/{name}/{file}"):
                    return self.reply(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"',
                                                  "X-Repo-Commit": commit}, body)
        return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"}, body)

    def reply(self, status, data, headers, body):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.clip().save(folder / "saved", format="transformers")
    data = {path.name: path.read_bytes() for path in (folder / "saved").iterdir()}
    return data | {"pytorch_model.bin": b"not wanted", "flax_model.msgpack": b"not wanted", "README.md": b"# hello"}


@pytest.fixture(scope="module")
def loader():
    """A process that has imported everything; each load is in a fork of it, as `huggingface_hub` reads the environment
    when it is imported."""
    with subprocess.Popen([sys.executable, "-c", LOADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"}) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def hub(files, loader, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.token = [], None
    server.files = {"main": files, "v2": {name: data for name, data in files.items() if name != "model.safetensors"}}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def load(source="some/model", revision="", **env):
        asked = len(server.asked)
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"),
               "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1",
               "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"} | env
        print(json.dumps([source, revision, env]), file=loader.stdin, flush=True)
        return json.loads(loader.stdout.readline()), [path for _, path in server.asked[asked:]]

    load.server = server
    yield load
    server.shutdown()
    server.server_close()


def test_a_repository_is_loaded_cached_and_there_offline(hub):
    result, asked = hub()
    assert result["parameters"] == tiny.clip().num_parameters
    assert result["ids"] == tiny.TOKENIZER(["a red circle"]).tolist()
    assert any("model.safetensors" in path for path in asked)
    assert not any(name in path for path in asked for name in ("resolve/" + COMMIT["main"] + "/pytorch", "msgpack",
                                                               "README"))
    again, asked = hub()
    assert again == result
    offline, asked = hub(HF_HUB_OFFLINE="1")
    assert offline == result and not asked


def test_revisions_tokens_and_what_is_not_there(hub):
    result, _ = hub(revision="v2")
    assert "error" in result      # of its weights only a pickle is left, which here is none
    hub.server.token = "secret"
    result, _ = hub(HF_HUB_DISABLE_IMPLICIT_TOKEN="1")
    assert "some/model cannot be downloaded from the hub" in result["error"]
    assert hub(HF_TOKEN="secret")[0]["parameters"] == tiny.clip().num_parameters
    hub.server.token = None
    assert "other/model cannot be downloaded from the hub" in hub("other/model")[0]["error"]
    assert "some/model2" in hub("some/model2", HF_HUB_OFFLINE="1")[0]["error"]
