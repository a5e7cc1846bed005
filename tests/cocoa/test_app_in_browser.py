# SPDX-License-Identifier: Apache-2.0
"""
The app as a person uses it: texts typed, examples clicked, images dropped, in headless Chromium.

With `COCOA_SCREENSHOT=docs/images/app.png` a screenshot of the page is written there, with the whole emoji set, and
with the checkpoint that `COCOA_REBUILD_MODEL` names, if there is one, instead of one trained for a few steps.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.cocoa.app_server import CALLED_OUT, RunningApp, running_app, train_bridge, write_images
from tests.trainers.conftest import ROOT

INSTALL = "needs a browser: apt install chromium chromium-driver, and pip install selenium"
webdriver = pytest.importorskip("selenium.webdriver", reason=INSTALL)
pytest.importorskip("gradio", reason="needs gradio: pip install 'cocoa-embed[app]'")

from selenium.common.exceptions import TimeoutException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=INSTALL)

SCREENSHOT = os.environ.get("COCOA_SCREENSHOT")
MARKED_UP = '<b id="injected">bold</b> **cat**'
SECONDS = 60


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder of emoji with their names, and one whose text looks like HTML."""
    folder = tmp_path_factory.mktemp("images") / "emoji"
    return folder, write_images(folder, 48, more=[("marked_up.png", MARKED_UP)])


@pytest.fixture(scope="module")
def app(images, tmp_path_factory) -> Iterator[RunningApp]:
    """The app on these images, with a model that reconstructs."""
    rebuild_model = SCREENSHOT and os.environ.get("COCOA_REBUILD_MODEL")
    rebuild_model = rebuild_model or train_bridge(tmp_path_factory.mktemp("bridge")).args.output_dir
    folder = None if SCREENSHOT else str(images[0])
    code = f"from cocoa.app.app import serve\nserve(rebuild_model={rebuild_model!r}, images={folder!r})"
    with running_app(code, ROOT, tmp_path_factory.mktemp("app") / "stderr") as running:
        yield running


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    """One Chromium for all tests."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("chromium")
    for argument in (
        "--headless=new",
        "--no-sandbox",  # which root cannot have
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--window-size=1200,2000",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Browser:
    """The page, opened anew."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver, self.url = driver, url
        driver.get(url)
        self.box = self.wait(lambda: self.first("#query textarea"))

    def wait(self, condition):
        """What a condition gives once it holds; a page that changes while it is read is read again."""
        wait = WebDriverWait(self.driver, SECONDS, poll_frequency=0.2, ignored_exceptions=(Exception,))
        try:
            return wait.until(lambda driver: condition())
        except TimeoutException as error:
            raise AssertionError(f"It did not come. The page says: {self.first('body').text}") from error

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def first(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def ask(self, words: str) -> None:
        self.box.send_keys(words)
        self.box.send_keys(Keys.ENTER)

    def upload(self, file: Path) -> None:
        self.first("#query input[type=file]").send_keys(str(file))
        self.wait(lambda: self.all("#query .thumbnail-item, #query .thumbnail-image"))

    def captions(self, gallery: str = "images") -> list[str]:
        """The captions of the images, once all are loaded."""
        loaded = "return arguments[0].complete && arguments[0].naturalWidth > 0"
        items = self.all(f"#{gallery} .thumbnail-item")
        assert all(self.driver.execute_script(loaded, item.find_element(By.CSS_SELECTOR, "img")) for item in items), (
            "still loading"
        )
        return [item.find_element(By.CSS_SELECTOR, ".caption-label").text for item in items]

    def rows(self, table: str = "texts") -> list[list[str]]:
        """The cells of a table."""
        found: dict[str, list[str]] = {}
        for cell in self.all(f"#{table} [role=gridcell]"):
            row = cell.find_element(By.XPATH, "./ancestor::*[@role='row']").get_attribute("aria-rowindex")
            found.setdefault(row, []).append(cell.text)
        return list(found.values())


@pytest.fixture
def browser(driver, app) -> Browser:
    """The page, opened anew."""
    return Browser(driver, app.url)


def score_of(caption: str) -> float:
    """The cosine in a caption."""
    return float(re.search(r"\n(-?\d\.\d{3})$", caption).group(1))


def test_words_find_pictures_and_texts(browser):
    browser.ask("a cat with heart eyes")
    captions = browser.wait(lambda: len(browser.captions()) == 12 and browser.captions())
    assert "cat" in captions[0].split("\n")[0].split()
    scores = [score_of(caption) for caption in captions]
    assert scores == sorted(scores, reverse=True) and 0.3 < scores[0] <= 1
    rows = browser.wait(lambda: len(browser.rows()) == 8 and browser.rows())
    assert "cat" in rows[0][0].split() and rows[0][1] >= rows[-1][1]


@pytest.mark.skipif(bool(SCREENSHOT), reason="the screenshot is of another set")
class TestOnAFolder:
    """Searches of a set whose images are known."""

    def test_an_example_is_asked_by_a_click(self, browser, images):
        example = browser.wait(lambda: browser.all(".examples .gallery-item")[0])
        words = example.text
        assert words in images[1]
        example.click()
        rows = browser.wait(lambda: browser.rows())
        assert rows[0] == [words, "1.000"] and browser.box.get_attribute("value") == words

    def test_an_uploaded_image_finds_itself(self, browser, images):
        folder, names = images
        browser.upload(folder / "007.png")
        browser.box.send_keys(Keys.ENTER)
        captions = browser.wait(lambda: len(browser.captions()) == 12 and browser.captions())
        assert captions[0] == f"{names[7]}\n1.000"

    def test_what_is_typed_is_never_html(self, browser):
        browser.ask(MARKED_UP)
        browser.wait(lambda: browser.rows()[0] == [MARKED_UP, "1.000"])
        browser.first("#reconstruct").click()
        browser.wait(lambda: any(MARKED_UP in row for row in browser.rows("reconstructed-texts")))
        assert not browser.all("#injected")

    def test_what_is_found_is_never_html(self, browser, images):
        browser.upload(images[0] / "marked_up.png")
        browser.box.send_keys(Keys.ENTER)
        browser.wait(lambda: browser.captions()[0] == f"{MARKED_UP}\n1.000")
        browser.all("#images .thumbnail-item")[0].click()
        browser.wait(lambda: browser.box.get_attribute("value") == MARKED_UP)
        assert not browser.all("#injected")

    def test_a_second_click_in_the_same_place_asks_again(self, browser):
        asked = []
        for words in ("a cat", "a train"):
            browser.box.clear()
            browser.ask(words)
            name = browser.wait(lambda: browser.captions() not in asked and browser.captions())[0].split("\n")[0]
            browser.all("#images .thumbnail-item")[0].click()
            browser.wait(lambda name=name: browser.box.get_attribute("value") == name and browser.all("#query img"))
            asked.append(browser.captions())

    def test_an_image_that_cannot_be_read_is_an_error_of_one_line(self, browser, tmp_path):
        file = tmp_path / "no_image.png"
        file.write_text("<b id='injected'>no image</b>")
        browser.upload(file)
        browser.box.send_keys(Keys.ENTER)
        message = browser.wait(lambda: browser.first(".toast-body").text)
        assert "no_image.png cannot be read as an image" in message
        assert "Traceback" not in message and "/" not in message and not browser.all("#injected")

    def test_an_empty_query_is_an_error_on_the_page(self, browser):
        browser.box.send_keys(Keys.ENTER)
        assert "enter a text, or drop an image" in browser.wait(lambda: browser.first(".toast-body").text)


def test_a_found_image_is_reconstructed_from_its_eos(browser, tmp_path):
    browser.ask("a cat with heart eyes")
    name = browser.wait(lambda: len(browser.captions()) == 12 and browser.captions()[0].split("\n")[0])
    browser.all("#images .thumbnail-item")[0].click()
    browser.wait(lambda: browser.box.get_attribute("value") == name and browser.all("#query img"))
    about = browser.first("#about-reconstruction").text
    assert "from this one token" in about and re.search(r"\d\d% of a text's tokens are masked", about)
    browser.first("#reconstruct").click()
    sources = ["image", "text"]
    if "an image is masked completely" in about:  # a model that reconstructs images too
        sources.append("image and text")
        captions = browser.wait(
            lambda: len(browser.captions("reconstructed-images")) == 5 and browser.captions("reconstructed-images")
        )
        assert captions[:2] == ["original", "masked: all of it"]
        assert captions[2:] == [f"reconstructed from {source}" for source in ("text", "image", "image and text")]
    rows = browser.wait(
        lambda: len(browser.rows("reconstructed-texts")) == len(sources) and browser.rows("reconstructed-texts")
    )
    assert [row[0] for row in rows] == sources
    assert all(row[1] == name and "_" in row[2] and "_" not in row[3] for row in rows)
    screenshot = tmp_path / "page.png" if SCREENSHOT is None else Path(SCREENSHOT)
    take_screenshot(browser, screenshot)
    assert Image.open(screenshot).width == 1200


def take_screenshot(browser: Browser, file: Path) -> None:
    """The whole page, in no more colours than it needs."""
    browser.driver.execute_script("document.activeElement.blur()")
    end = "return document.querySelector('#reconstructed-texts').getBoundingClientRect().bottom + window.scrollY"
    area = {"x": 0, "y": 0, "width": 1200, "height": browser.driver.execute_script(end) + 24, "scale": 1}
    options = {"format": "png", "captureBeyondViewport": True, "clip": area}
    taken = base64.b64decode(browser.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"])
    Image.open(io.BytesIO(taken)).convert("RGB").quantize(256, kmeans=3).save(file, optimize=True)


def test_nothing_comes_from_elsewhere_and_nothing_goes_there(browser, app):
    browser.ask("train")
    browser.wait(lambda: len(browser.captions()) == 12)
    loaded = browser.driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(loaded) > 20
    assert not [address for address in loaded if not address.startswith((app.url, "data:", "blob:"))]
    assert CALLED_OUT not in app.errors.read_text(encoding="utf-8")
