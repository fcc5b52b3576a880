"""The page in Chromium, as a person uses it: a real server, a real browser."""

import os
import shutil
import socket
import threading
from pathlib import Path

import pytest
import uvicorn

from jaxmm.inference.search import build_index, open_index
from jaxmm.serving.app import make_app
from tests.pretrained import tiny
from tests.serving.common import DECODING, bomb, png, service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
PICTURE = tiny.pictures(1)[0]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    root = hasattr(os, "getuid") and os.getuid() == 0      # who may not use the sandbox
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if root else [])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """A function from a model to the page that its server shows; at the end nothing may have failed in it."""
    opened, failures = [], []

    def run(model, *, width=1100, **options):
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(make_app(service(model, **options), hosts={"127.0.0.1"}),
                                               log_level="error", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        page = browser.new_page(viewport={"width": width, "height": 900})
        opened.append((page, server, thread))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("requestfailed", lambda request: failures.append(request.url))
        page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        return page

    yield run
    for page, server, thread in opened:
        page.close()
        server.should_exit = True
        thread.join()
    assert failures == []


def upload(page, content, name="me.png"):
    page.set_input_files("#image", {"name": name, "mimeType": "image/png", "buffer": content})


def answer(page, endpoint, button=0):
    """Press a button of an endpoint's form and return the text that appears."""
    form = page.locator(f"form[data-path={endpoint}]")
    form.locator("button").nth(button).click()
    output = form.locator("output:not(:empty):not(.soft)")
    output.wait_for()
    return output.inner_text()


def test_an_image_gets_a_caption_with_its_attention(open_page):
    captioner = tiny.captioner()
    page = open_page(captioner)
    assert answer(page, "caption") == "Choose an image first."
    upload(page, png(PICTURE))
    [(caption, _)] = captioner.caption(PICTURE, decoding=DECODING)[0]
    assert caption in answer(page, "caption")
    assert page.locator("#preview").evaluate("image => image.naturalWidth") == PICTURE.shape[1]
    page.fill("form[data-path=attention] input", "red circle")
    assert answer(page, "attention").split() == ["red", "circle", "red", "circle"]
    canvas = page.locator("form[data-path=attention] canvas").first
    corners = canvas.evaluate("canvas => [...canvas.getContext('2d').getImageData(9, 9, 1, 1).data]")
    assert corners[3] == 255 and sum(corners[:3]) > 0


def test_what_is_no_image_gets_a_message(open_page):
    page = open_page(tiny.captioner())
    for content, words in ((png(PICTURE)[:200], "The upload is truncated"), (bomb(), "The image is too large"),
                           (b"dear sir", "The upload is not an image")):
        upload(page, content)
        assert words in answer(page, "caption")
    upload(page, png(PICTURE))
    assert "The" not in answer(page, "caption")


def test_labels_are_typed_and_a_folder_is_searched(open_page, tmp_path):
    """On a phone, where nothing may be wider than the screen."""
    clip, files = tiny.clip(), tiny.picture_files(tmp_path / "photos", 4)
    build_index(lambda paths, on_error: clip.encode_image(paths), "clip", files, tmp_path / "index",
                on_error=lambda *_: None)
    page = open_page(clip, width=390, index=open_index(tmp_path / "index"))
    upload(page, Path(files[2]).read_bytes())
    page.fill("form[data-path=classify] input", "a circle, a star,")
    lines = answer(page, "classify").splitlines()
    assert lines[::2] == [label for label, _ in clip.classify(files[2], ["a circle", "a star"])[0]]
    assert lines[1::2] == [f"{share:.1%}".replace("%", " %") for _, share in clip.classify(
        files[2], ["a circle", "a star"])[0]]
    for button, embedding in ((0, clip.encode_text("stars")), (1, clip.encode_image(files[2]))):
        page.fill("form[data-path=search] input", "stars")
        shown = answer(page, "search", button).split()
        assert shown[::2] == [Path(image.path).name for image in open_index(tmp_path / "index").search(embedding[0])]
    page.wait_for_function("[...document.querySelectorAll('.results img')].every(image => image.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
