"""CapFilt with its crawl, its models and its folder in a bucket: killed again and again, it writes the same bytes."""

import hashlib

from jaxmm.paths import user_path
from tests.capfilt.conftest import contents, run
from tests.data.test_bucket_sources import upload


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
    near = contents(finished[0].path)
    far = {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in out.files()}
    assert set(far) == set(near)
    assert [name for name in near if near[name] != far[name]] == ["manifest.json"]      # names what it is made from
