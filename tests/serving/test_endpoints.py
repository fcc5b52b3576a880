"""The endpoints answer what `Model` answers; what they refuse they refuse in one sentence, without a path."""

import asyncio
import re

import numpy as np
import pytest
from starlette.testclient import TestClient

from jaxmm.inference.class_prompts import TEMPLATES
from jaxmm.inference.model import Model
from jaxmm.inference.search import build_index, open_index
from jaxmm.serving.app import make_app
from jaxmm.serving.limits import Limits
from jaxmm.serving.request_guard import RequestGuard
from jaxmm.serving.server_metrics import ServerMetrics
from jaxmm.validation import ConfigError
from tests.pretrained import tiny
from tests.serving.common import DECODING, bomb, png, service

PICTURE = tiny.pictures(1)[0]


@pytest.fixture
def client(request):
    """A function from a model and options of `service` and `make_app` to a client."""
    opened = []

    def make(model, *, token=None, hosts=None, raises=True, **options):
        app = make_app(service(model, **options), token=token, hosts=hosts)
        opened.append(TestClient(app, raise_server_exceptions=raises).__enter__())
        return opened[-1]

    yield make
    for client in opened:
        client.__exit__(None, None, None)


UPLOAD = png(PICTURE)


def post(client, path, image=UPLOAD, **fields):
    files = {} if image is None else {"image": ("me.png", image)}
    return client.post(path, files=files, data=fields)


def texts(answer):
    assert answer.status_code == 200, answer.text
    return [(row["text"], pytest.approx(row.get("probability", row.get("score")), abs=1e-4)) for row in answer.json()]


def sentence(answer, status):
    """The message of a failed request, which has no path and is no traceback."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    text = answer.json()["error"]
    assert "\n" not in text and not re.search(r"Traceback|File \"|/\w+/", text)
    return text


def test_captions_and_their_attention(client):
    captioner = tiny.captioner()
    page = client(captioner)
    expected = captioner.caption(PICTURE, decoding=DECODING, top=3)[0]
    assert texts(post(page, "/caption")) == expected[:1]
    assert texts(post(page, "/caption", top=2)) == expected[:2]
    answer = post(page, "/attention").json()
    assert answer["text"] == expected[0][0] and answer["image"].startswith("data:image/webp;base64,")
    [words] = captioner.attention_maps(PICTURE, expected[0][0])
    assert [row["word"] for row in answer["words"]] == [word for word, _ in words]
    assert np.asarray(answer["words"][0]["map"]) == pytest.approx(words[0][1], abs=1e-5)
    answer = post(page, "/attention", text="red circle").json()
    assert [row["word"] for row in answer["words"]] == ["red", "circle"]
    assert [len(row) for row in answer["words"][0]["map"]] == [3, 3, 3]
    assert "text has 44 characters; expected at most 40" in sentence(post(page, "/attention", text="x" * 44), 422)


def test_answers(client):
    answerer = tiny.answerer()
    expected = answerer.answer(PICTURE, "what is red?", top=3)[0]
    page = client(answerer)
    assert texts(post(page, "/answer", question=" what is red? ", top=3)) == expected
    assert sentence(post(page, "/answer", question="!!"), 422) == "question has no words"
    assert sentence(post(page, "/answer"), 422) == "question is missing"


def test_matches_and_typed_labels(client):
    matcher, labels = tiny.matcher(), ["a circle", "star", "a heart"]
    page = client(matcher)
    assert texts(post(page, "/match", texts=labels)) == list(
        zip(labels, matcher.match(PICTURE, labels)[0].tolist(), strict=True))
    for model, own in ((matcher, page), (tiny.clip(), client(tiny.clip()))):
        assert texts(post(own, "/classify", labels=labels, top=2)) == model.classify(
            PICTURE, labels, templates=TEMPLATES, top=2)[0]
    assert texts(post(page, "/classify", labels=["star", "star"])) == [("star", 1.0)]


def test_own_classes(client):
    vit = tiny.vit()
    page = client(vit)
    assert texts(post(page, "/classify", top=3)) == vit.classify(PICTURE, top=3)[0]
    assert "this model has classes of its own" in sentence(post(page, "/classify", labels="a cat"), 422)
    assert sentence(post(page, "/caption"), 404) == "Not Found"


@pytest.fixture
def index(tmp_path):
    """An index of six images, and the files."""
    clip, files = tiny.clip(), tiny.picture_files(tmp_path / "private", 6)
    build_index(lambda paths, on_error: clip.encode_image(paths), "clip", files, tmp_path / "index",
                on_error=lambda *_: None)
    return open_index(tmp_path / "index")


def test_search(client, index, tmp_path):
    clip = tiny.clip()
    page = client(clip, index=index)
    for query, embedding in (({"text": "a red circle", "image": None}, clip.encode_text("a red circle")),
                             ({}, clip.encode_image(PICTURE))):
        answer = post(page, "/search", top=4, **query)
        assert [(row["name"], pytest.approx(row["score"], abs=1e-5)) for row in answer.json()] == [
            (found.path.rsplit("/", 1)[1], found.score) for found in index.search(embedding[0], 4)]
        assert [index.paths[row["number"]].endswith(row["name"]) for row in answer.json()] == [True] * 4
        assert str(tmp_path) not in answer.text
    image = page.get("/images/2")
    assert image.headers["content-type"] == "image/webp" and image.content[8:12] == b"WEBP"
    (tmp_path / "private" / "003.png").unlink()
    for number in (3, 6):
        assert sentence(page.get(f"/images/{number}"), 404) == (
            f"image {number} of the index is not there, or cannot be read")
    for number in ("..%2F..%2Fetc%2Fpasswd", "-1", "a"):
        assert page.get(f"/images/{number}").status_code in (404, 422)
    for fields in ({"text": "a"}, {"image": None}):
        assert sentence(post(page, "/search", **fields), 422) == "expected a text or an image, not both"


def test_an_index_must_be_of_the_model(index):
    with pytest.raises(ConfigError, match="index is 'Classification'; expected a model that embeds texts"):
        service(tiny.vit(), index=index)
    with pytest.raises(ConfigError, match="index is '20 numbers per image'; expected 12"):
        service(tiny.matcher(), index=index)


@pytest.mark.parametrize("image, status, words", [
    (b"", 422, "the upload is empty"), (b"dear sir", 422, "the upload is not an image: begins with b'dear sir'"),
    (png(PICTURE)[:200], 422, "the upload is truncated"), (bomb(), 413, "the image is too large; expected at most "),
    (b"GIF89a" + bytes(50), 422, "the upload is"), (None, 422, "image is missing")])
def test_images_that_are_refused(client, image, status, words):
    assert words in sentence(post(client(tiny.vit()), "/classify", image), status)


def test_the_limit_of_pixels_is_exact(client):
    height, width = PICTURE.shape[:2]
    assert post(client(tiny.vit(), pixels=height * width), "/classify").status_code == 200
    assert sentence(post(client(tiny.vit(), pixels=height * width - 1), "/classify"), 413) == (
        f"the image is too large; expected at most {height * width - 1} pixels")


@pytest.mark.parametrize("fields, words", [
    ({}, "labels has 0 entries; expected 1 to 5"), ({"labels": list("abcdef")}, "labels has 6 entries"),
    ({"labels": ["a", "  "]}, "labels is empty; expected words"), ({"labels": "b" * 41}, "labels has 41 characters"),
    ({"labels": "a", "top": 0}, "top cannot be used"), ({"labels": "a", "top": "many"}, "top cannot be used")])
def test_labels_that_are_refused(client, fields, words):
    assert words in sentence(post(client(tiny.clip()), "/classify", **fields), 422)


def test_forms_that_are_none(client):
    page, kind = client(tiny.clip()), "multipart/form-data; boundary=x"
    assert sentence(page.post("/classify", data={"image": "a.png", "labels": "a"}), 422) == (
        "image is a text; expected an uploaded file")
    assert sentence(page.post("/classify", json={"labels": ["a"]}), 422) == "image is missing"
    sentence(page.post("/classify", content=b"--x\r\nno header\r\n\r\n", headers={"content-type": kind}), 400)
    for charset in ("punycode", "utf-7", '"raw_unicode_escape"', "utf-8; CHARSET*=punycode"):
        headers = [("content-type", f"{kind}; charset={charset}"), ("content-type", kind)]
        for order in (headers, headers[::-1]):
            assert "expected UTF-8" in sentence(page.post("/classify", content=b"--x--", headers=order), 415)
    assert sentence(page.post("/classify", content=b"--x--\r\n", headers={
        "content-type": f'{kind}; Charset="UTF-8"'}), 422) == "image is missing"
    assert sentence(page.get("/classify"), 405) == "Method Not Allowed"


def test_bodies_that_are_too_large(client):
    """Whether their length is announced or not."""
    page = client(tiny.vit(), body=3000)
    for content in (bytes(3001), iter([bytes(1000)] * 5)):
        answer = page.post("/classify", content=content, headers={"content-type": "multipart/form-data; boundary=x"})
        assert sentence(answer, 413) == "the request is too large; expected at most 3,000 bytes"


def guarded(messages, limits):
    """Pass messages through the guard to an application that reads a body; return the status, and what it read."""
    sent, read = [], []

    async def app(scope, receive, send):
        while (message := await receive()).get("more_body"):
            read.append(message["body"])
        await send({"type": "http.response.start", "status": 200})

    async def receive():
        if messages:
            return messages.pop(0)
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    guard = RequestGuard(app, limits=limits, metrics=ServerMetrics(lambda: 0), token=None, hosts=None)
    asyncio.run(guard({"type": "http", "path": "/", "headers": []}, receive, send))
    return sent, read


def test_a_body_that_does_not_end_is_not_awaited():
    part = {"type": "http.request", "body": b"a", "more_body": True}
    with pytest.raises(Exception, match=r"the request took longer than 0\.01 s to send") as slow:
        guarded([part] * 3, Limits(seconds=0.01))
    assert slow.value.status_code == 408
    sent, read = guarded([part, {"type": "http.request", "body": b""}], Limits(seconds=60))
    assert sent[0]["status"] == 200 and read == [b"a"]


def test_the_token(client):
    page = client(tiny.vit(), token="s3cret")
    for given in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "s3cret"}, {"Authorization": "Bearer \xe9"}):
        for path, send in (("/classify", page.post), ("/metrics", page.get), ("/images/1", page.get)):
            answer = send(path, headers={name: value.encode("latin-1") for name, value in given.items()})
            assert "the token is missing or wrong" in sentence(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/health", "/docs", "/openapi.json"):
        assert page.get(path).status_code == 200 and "s3cret" not in page.get(path).text
    page.headers["Authorization"] = "Bearer s3cret"
    assert post(page, "/classify").status_code == 200 and page.get("/metrics").status_code == 200


def test_a_web_site_cannot_call_by_its_own_name(client):
    page = client(tiny.vit(), hosts=("127.0.0.1", "localhost", "[::1]"))
    for name in ("127.0.0.1:8000", "localhost", "[::1]:80"):
        assert page.get("/health", headers={"Host": name}).status_code == 200
    for name in ("evil.example", "localhost.evil.example:8000", ""):
        answer = page.get("/health", headers={"Host": name})
        assert "called by another name; expected 127.0.0.1" in sentence(answer, 400)


def test_a_web_site_cannot_send_through_the_browser(client):
    """Only open the page, from a link."""
    page = client(tiny.vit(), hosts=("testserver",))
    for site in ("cross-site", "same-site"):
        page.headers["Sec-Fetch-Site"] = site
        assert "another web site" in sentence(post(page, "/classify"), 403)
        assert page.get("/").status_code == 200
    for site in ("same-origin", "none"):
        page.headers["Sec-Fetch-Site"] = site
        assert post(page, "/classify").status_code == 200


def test_a_client_that_does_not_read_its_answer_keeps_no_place(client):
    inner, taken = client(tiny.vit()).app, []

    async def app(scope, receive, send):
        async def watched(message):
            taken.append(inner.state.service.queue.waiting)
            await send(message)

        await inner(scope, receive, watched)

    assert post(TestClient(app), "/classify").status_code == 200
    assert set(taken) == {0}


def test_a_full_queue_says_when_to_come_back(client):
    page = client(tiny.vit(), waiting=1)
    queue = page.app.state.service.queue
    with queue.place():
        answer = post(page, "/classify")
        assert "1 requests are waiting" in sentence(answer, 503) and answer.headers["retry-after"] == "1"
    assert post(page, "/classify").status_code == 200 and queue.waiting == 0


def test_a_failure_keeps_its_reason_to_itself(client, monkeypatch):
    page = client(tiny.vit(), raises=False)

    def fail(requests):
        raise RuntimeError("no room in /home/me")

    monkeypatch.setitem(page.app.state.service.queue._functions, "classes", fail)
    assert sentence(post(page, "/classify"), 500) == "the server failed to answer this request; its log says why"


def test_requests_that_come_together_are_computed_together():
    """The batch of four does not begin before the fourth."""
    own, pictures = service(tiny.captioner(), collect=3600.0), tiny.pictures(4)

    async def ask():
        images = [own.model.prepare(picture) for picture in pictures]
        return await asyncio.gather(*(own.caption(image, 1) for image in images))

    expected = own.model.caption(pictures, decoding=DECODING)
    assert [[(text, pytest.approx(score, abs=1e-4)) for text, score in row] for row in asyncio.run(ask())] == expected
    assert 'jaxmm_batch_size_sum{function="caption"} 4.0' in own.metrics.text().decode()
    assert 'jaxmm_batch_size_count{function="caption"} 1.0' in own.metrics.text().decode()
    own.close()


def test_health_and_metrics(client):
    page = client(tiny.vit())
    assert page.get("/health").json() == {"status": "ok", "model": "tiny", "endpoints": ["classify"], "waiting": 0}
    for image in (png(PICTURE), b"?", png(PICTURE)):
        post(page, "/classify", image)
    page.get("/no/such/path")
    lines = page.get("/metrics").text.splitlines()
    for line in ('jaxmm_requests_total{endpoint="/classify",status="200"} 2.0', "jaxmm_waiting_requests 0.0",
                 'jaxmm_requests_total{endpoint="/classify",status="422"} 1.0',
                 'jaxmm_requests_total{endpoint="other",status="404"} 1.0',
                 'jaxmm_request_seconds_count{endpoint="/classify"} 3.0',
                 'jaxmm_batch_size_sum{function="classes"} 2.0', 'jaxmm_batch_seconds_count{function="classes"} 2.0'):
        assert line in lines


@pytest.mark.parametrize("model, paths", [
    (tiny.captioner, {"/caption", "/attention"}), (tiny.answerer, {"/answer"}), (tiny.matcher, {"/match", "/classify"}),
    (tiny.clip, {"/classify"}), (tiny.vit, {"/classify"})])
def test_page_and_documentation_show_what_the_model_offers(client, model, paths):
    page = client(model())
    schema = page.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/health", "/metrics", *paths}
    html, docs = page.get("/").text, page.get("/docs").text
    assert {f"/{path}" for path in re.findall(r'data-path="(\w+)"', html)} == paths
    for path in paths:
        assert f"POST {path}" in docs and f"{path}</pre>" in docs
    for text in (html, docs):
        assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    assert "default-src 'none'" in page.get("/").headers["content-security-policy"]


def test_a_model_that_offers_nothing():
    pair = Model(task=tiny.PAIR, params={}, preprocessing=tiny.IMAGE, tokenizer=tiny.TOKENIZER)
    with pytest.raises(ConfigError, match="a PairClassification, which embeds images, judges a text"):
        service(pair)
