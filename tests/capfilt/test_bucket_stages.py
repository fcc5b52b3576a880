"""CapFilt with its crawl, its models and its folder in a bucket: killed again and again, it writes the same bytes."""

import hashlib
import signal

import pytest

from jaxmm.paths import user_path
from tests.capfilt.conftest import contents, run
from tests.capfilt.test_stages import process
from tests.data.test_bucket_sources import upload


def assert_same_bytes(out, finished):
    """The manifest names what it is made from, which is in a bucket."""
    near = contents(finished)
    far = {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in out.files()}
    assert set(far) == set(near)
    assert [name for name in near if near[name] != far[name]] == ["manifest.json"]


class Stopped(BaseException):
    """An end that no handler of errors sees."""


def test_stopped_at_uploads_it_goes_on_to_the_same_bytes(finished, data, models, gcs, monkeypatch, bucket_cache):
    upload(data, f"{gcs}/crawl")
    upload(models, f"{gcs}/models")
    out = user_path(f"{gcs}/out")
    plain, calls = type(out).upload, []

    def upload_some(self, file):
        calls.append(self.name)
        if len(calls) in (3, 9, 20, 29):
            raise Stopped
        plain(self, file)

    monkeypatch.setattr(type(out), "upload", upload_some)
    stops = 0
    while True:
        try:
            run(out, user_path(f"{gcs}/crawl"), user_path(f"{gcs}/models"))
            break
        except Stopped:
            stops += 1
    assert stops == 4
    assert_same_bytes(out, finished[0].path)


@pytest.mark.long
def test_killed_it_goes_on_to_the_same_bytes(finished, data, models, gcs, bucket_cache):
    """Processes are killed after their third, ninth and fourteenth upload."""
    upload(data, f"{gcs}/crawl")
    upload(models, f"{gcs}/models")
    folders = f"{gcs}/out", f"{gcs}/crawl", f"{gcs}/models"
    for count in (3, 9, 14):
        killed = process(*folders, KILLED_AT=count)
        output = killed.communicate()[1]
        assert killed.returncode == -signal.SIGKILL, output
    run(*map(user_path, folders))
    assert_same_bytes(user_path(folders[0]), finished[0].path)
