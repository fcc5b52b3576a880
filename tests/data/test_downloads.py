"""Web datasets from a server of this process: what is asked for, transfers that break off, and what is not there."""

import contextlib
import http.server
import re
import socket
import threading
from types import SimpleNamespace

import pytest

from jaxmm.data.base import DataError
from jaxmm.data.sources import downloads
from jaxmm.data.sources.downloads import DownloadError, download, read_text
from jaxmm.data.sources.registry import open_source
from tests.data.test_web_datasets import web_dataset


class Files(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; `server.faults` has for each request, by its number, what goes wrong."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append((self.path, asked))
        fault = server.faults.get(len(server.asked) - 1, server.fault)
        self.close_connection = True
        content = server.files.get(self.path)
        if content is None or isinstance(fault, int):
            return self.reply(fault if isinstance(fault, int) else 404, b"", {"Content-Length": "0"})
        headers, start = {"ETag": server.tag} if server.tag else {}, 0
        if asked and self.headers.get("If-Range") == server.tag:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if fault != "no length":
            headers["Content-Length"] = str(len(content) - start)
        rest = content[start:]
        self.reply(206 if start else 200, rest[:len(rest) // 2] if fault == "cut" else rest, headers)

    def reply(self, status, content, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "WAITS", (0, 0, 0))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.files, server.asked, server.faults, server.fault, server.tag = {}, [], {}, None, '"1"'
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def dataset(server, tmp_path):
    """A data set of two shards in a folder, and the same at an address."""
    folder = web_dataset(tmp_path / "wds_cats", [[("cls", b"0"), ("cls", b"2")], [("cls", b"1")]])
    server.files = {f"/wds_cats/{path.relative_to(folder)}": path.read_bytes()
                    for path in folder.rglob("*") if path.is_file()}
    return SimpleNamespace(folder=open_source(f"wds:{folder}"), spec=f"wds:{server.address}/wds_cats:test")


def paths(server):
    return [path.removeprefix("/wds_cats/") for path, _ in server.asked]


def test_a_data_set_at_an_address_is_that_of_the_folder_and_downloaded_once(server, dataset):
    for spec in (dataset.spec, dataset.spec.removesuffix(":test")):
        source = open_source(spec)
        assert [source[row] for row in range(3)] == [dataset.folder[row] for row in range(3)]
        assert (source.classes, source.templates, source.name) == (
            dataset.folder.classes, dataset.folder.templates, spec)
    assert paths(server) == ["test/nshards.txt", "classnames.txt", "zeroshot_classification_templates.txt",
                             "dataset_type.txt", "test/0.tar", "test/1.tar"]


def test_a_transfer_that_breaks_off_goes_on_from_there(server, dataset):
    size = len(server.files["/wds_cats/test/0.tar"])
    server.faults = {4: "cut", 5: 503, 6: "cut"}
    assert open_source(dataset.spec)[1] == dataset.folder[1]
    assert [asked for path, asked in server.asked if path.endswith("/0.tar")] == [
        None, f"bytes={size // 2}-", f"bytes={size // 2}-", f"bytes={size // 2 + (size - size // 2) // 2}-"]


@pytest.mark.parametrize("tag", [None, "new"])
def test_a_transfer_begins_again_if_the_file_may_be_another(tag, server, tmp_path):
    """Without a version there is no range to ask for; another version is sent from its start."""
    server.files["/a"] = b"first content"
    server.faults, server.tag = {0: "cut"}, tag and '"old"'
    answer = Files.reply

    def changed(self, status, content, headers):
        answer(self, status, content, headers)
        server.files["/a"], server.tag = b"second, longer content", tag and '"new"'

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Files, "reply", changed)
        download(f"{server.address}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"second, longer content"
    assert [asked for _, asked in server.asked] == [None, tag and "bytes=6-"]


def test_a_part_is_never_taken_for_the_whole_file(server, dataset, tmp_path):
    server.tag = None
    server.faults = dict.fromkeys(range(5, 10), "cut")
    with pytest.raises(DataError, match=r"source 'wds:.*': .*/wds_cats/test/1\.tar cannot be downloaded: it ended "
                                        r"after 5,120 of 10,240 bytes"):
        open_source(dataset.spec)
    assert len(server.asked) == 9
    [folder] = (tmp_path / "cache" / "jaxmm" / "web-datasets").iterdir()
    assert {path.name for path in (folder / "test").iterdir()} == {"0.tar"}
    server.faults = {}
    assert len(open_source(dataset.spec)) == 3
    assert "test/0.tar" not in paths(server)[9:] and paths(server)[-1] == "test/1.tar"


def test_what_is_not_there_or_not_allowed(server, dataset):
    with pytest.raises(DataError, match=r"/train/nshards\.txt is not there \(404 Not Found\); expected CLIP_ben"):
        open_source(dataset.spec.replace(":test", ":train"))
    server.fault = 403
    with pytest.raises(DataError, match="cannot be downloaded: 403 Forbidden"):
        open_source(dataset.spec)
    assert len(server.asked) == 2                                         # neither is asked for again
    server.fault = 503
    with pytest.raises(DataError, match="cannot be downloaded: 503 Service Unavailable"):
        open_source(dataset.spec)
    assert len(server.asked) == 6
    server.fault, server.files["/wds_cats/test/nshards.txt"] = None, b"<html>"
    with pytest.raises(DataError, match=r"nshards\.txt is '<html>'; expected the number of shards"):
        open_source(dataset.spec)
    with pytest.raises(DataError, match=r"the split is '\.\.'; expected a name"):
        open_source(f"{dataset.spec.removesuffix('test')}..")
    with contextlib.closing(socket.socket()) as unused:                   # a port that nobody listens on
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(DataError, match=r"cannot be downloaded: .*Connection refused"):
            open_source(f"wds:http://127.0.0.1:{unused.getsockname()[1]}")


def test_texts_have_a_limit_and_a_length(server, monkeypatch):
    server.files["/a"] = b"x" * 101
    monkeypatch.setattr(downloads, "LARGEST_TEXT", 100)
    with pytest.raises(DownloadError, match="is larger than 100 bytes"):
        read_text(f"{server.address}/a")
    server.fault = "no length"
    with pytest.raises(DownloadError, match="the server does not say how large it is"):
        read_text(f"{server.address}/a")
    with pytest.raises(DownloadError, match="is no address"):
        read_text("http://[half/a")
