"""The page in a real browser: Playwright drives the system's Chromium."""

from __future__ import annotations

import base64
import io
import shutil
import time

import pytest
import torch
from PIL import Image
from stream_toys import BLUE, Toy

from causvid.data.clips import png
from causvid.data.video import read_mp4

pytest.importorskip("fastapi")
playwright = pytest.importorskip("playwright.sync_api")
from stream_server import server, until  # noqa: E402

CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")]


@pytest.fixture(scope="module")
def address():
    with server({"toy": Toy("toy", size=8)}, viewers=2) as (found, hall):
        yield found
        until(lambda: not hall.viewers)


@pytest.fixture
def page(address):
    """An open page whose stream runs; at the end it must not have complained anywhere."""
    with playwright.sync_playwright() as driver:
        options = [
            "--no-sandbox",
            "--disable-gpu",
            "--use-fake-ui-for-media-stream",
            "--use-fake-device-for-media-stream",
        ]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        trouble = []
        opened.on("console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None)
        opened.on("pageerror", lambda error: trouble.append(str(error)))
        opened.goto(f"http://{address}/")
        opened.wait_for_selector("#facts dd:nth-of-type(5)", timeout=90_000)
        yield opened
        assert trouble == [] and opened.inner_text("#message") == ""
        browser.close()


def shown(page):
    return page.evaluate("document.getElementById('screen').toDataURL()")


def reddest(page):
    """Whether every pixel that is shown is red."""
    content = io.BytesIO(base64.b64decode(shown(page).partition(",")[2]))
    extremes = Image.open(content).convert("RGB").getextrema()
    return extremes[0][0] > 250 and extremes[1][1] < 5 and extremes[2][1] < 5


def wait(page, script, timeout=90):
    """Until a script gives true; the page's policy forbids to evaluate it in the page itself."""
    until(lambda: page.evaluate(script) or time.sleep(0.1), timeout)


def says(words):
    return f"document.getElementById('state').textContent.includes({words!r})"


def test_a_stream_moves_changes_with_its_prompt_and_forks(page, tmp_path):
    first = shown(page)
    until(lambda: shown(page) != first)
    page.fill("#prompt", BLUE)
    page.press("#prompt", "Enter")
    wait(page, says(BLUE))
    page.click("#fork")
    page.wait_for_selector("#branches button:nth-of-type(2)[aria-pressed=true]", timeout=60_000)
    page.click("#branches button:nth-of-type(1)")
    page.wait_for_selector("#branches button:nth-of-type(1)[aria-pressed=true]", timeout=60_000)
    page.click("#pause")
    time.sleep(1)
    still = shown(page)
    time.sleep(1)
    assert shown(page) == still
    page.click("#pause")
    until(lambda: shown(page) != still)
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 900})
        time.sleep(0.5)
        page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_picture_starts_a_stream_and_what_was_made_downloads(page, tmp_path):
    picture = torch.zeros(20, 20, 3, dtype=torch.uint8)
    picture[:, :, 0] = 255
    (tmp_path / "red.png").write_bytes(png(picture.numpy()))
    page.fill("#fps", "1")
    page.set_input_files("#image", tmp_path / "red.png")
    until(lambda: reddest(page))
    page.fill("#fps", "16")
    time.sleep(2)
    for button, name in (("#download", "clip.mp4"), ("#record", "clip.session")):
        with page.expect_download(timeout=60_000) as download:
            page.click(button)
        download.value.save_as(tmp_path / name)
    assert len(read_mp4(tmp_path / "clip.mp4").pixels) > 6
    assert (tmp_path / "clip.session").stat().st_size > 500


def test_a_webcam_is_restyled(page):
    page.click("#camera")
    wait(page, says("restyling"))
    first = shown(page)
    until(lambda: shown(page) != first)
    page.click("#feed-stop")
    wait(page, says("block"))


def test_a_file_that_is_no_picture_is_told(address, tmp_path):
    (tmp_path / "no.png").write_bytes(b"nothing")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(f"http://{address}/")
        page.wait_for_selector("#facts dd:nth-of-type(5)", timeout=90_000)
        page.set_input_files("#image", tmp_path / "no.png")
        wait(page, "document.getElementById('message').textContent.includes('picture')")
        browser.close()
