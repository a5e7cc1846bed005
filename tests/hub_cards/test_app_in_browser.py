# SPDX-License-Identifier: Apache-2.0
"""
The app as a person uses it: words typed, examples clicked, pictures dropped, in headless Chromium.

With `COCOA_SCREENSHOT=docs/images/app.png` a picture of the page is written there, of the whole emoji set instead of a
few, and where `COCOA_REBUILD_MODEL` names one, with that checkpoint of the bridge stage instead of a few steps' worth.
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

from tests.hub_cards.app_server import CALLED_OUT, RunningApp, running_app, train_bridge, write_pictures
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
def pictures(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder of emoji with their names, and one whose text looks like HTML."""
    folder = tmp_path_factory.mktemp("pictures") / "emoji"
    return folder, write_pictures(folder, 48, more=[("marked_up.png", MARKED_UP)])


@pytest.fixture(scope="module")
def app(pictures, tmp_path_factory) -> Iterator[RunningApp]:
    """The app on these pictures, with a model that rebuilds."""
    rebuild_model = SCREENSHOT and os.environ.get("COCOA_REBUILD_MODEL")
    rebuild_model = rebuild_model or train_bridge(tmp_path_factory.mktemp("bridge")).args.output_dir
    folder = None if SCREENSHOT else str(pictures[0])
    code = f"from hub_cards.space.app import serve\nserve(rebuild_model={rebuild_model!r}, pictures={folder!r})"
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

    def captions(self, gallery: str = "pictures") -> list[str]:
        """Of the pictures that have been loaded."""
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
    """The cosine under a picture."""
    return float(re.search(r"\n(-?\d\.\d{3})$", caption).group(1))


def test_words_find_pictures_and_texts(browser):
    browser.ask("a cat with heart eyes")
    captions = browser.wait(lambda: len(browser.captions()) == 12 and browser.captions())
    assert "cat" in captions[0].split("\n")[0].split()
    scores = [score_of(caption) for caption in captions]
    assert scores == sorted(scores, reverse=True) and 0.3 < scores[0] <= 1
    rows = browser.wait(lambda: len(browser.rows()) == 8 and browser.rows())
    assert "cat" in rows[0][0].split() and rows[0][1] >= rows[-1][1]


@pytest.mark.skipif(bool(SCREENSHOT), reason="the picture is of another set")
class TestOnAFolder:
    """What can be told of a set whose pictures are known."""

    def test_an_example_is_asked_by_a_click(self, browser, pictures):
        example = browser.wait(lambda: browser.all(".examples .gallery-item")[0])
        words = example.text
        assert words in pictures[1]
        example.click()
        rows = browser.wait(lambda: browser.rows())
        assert rows[0] == [words, "1.000"] and browser.box.get_attribute("value") == words

    def test_an_uploaded_picture_finds_itself(self, browser, pictures):
        folder, names = pictures
        browser.upload(folder / "007.png")
        browser.box.send_keys(Keys.ENTER)
        captions = browser.wait(lambda: len(browser.captions()) == 12 and browser.captions())
        assert captions[0] == f"{names[7]}\n1.000"

    def test_what_is_typed_is_never_html(self, browser):
        browser.ask(MARKED_UP)
        browser.wait(lambda: browser.rows()[0] == [MARKED_UP, "1.000"])
        browser.first("#rebuild").click()
        browser.wait(lambda: any(MARKED_UP in row for row in browser.rows("rebuilt-texts")))
        assert not browser.all("#injected")

    def test_what_is_found_is_never_html(self, browser, pictures):
        browser.upload(pictures[0] / "marked_up.png")
        browser.box.send_keys(Keys.ENTER)
        browser.wait(lambda: browser.captions()[0] == f"{MARKED_UP}\n1.000")
        browser.all("#pictures .thumbnail-item")[0].click()
        browser.wait(lambda: browser.box.get_attribute("value") == MARKED_UP)
        assert not browser.all("#injected")

    def test_a_second_click_in_the_same_place_asks_again(self, browser):
        asked = []
        for words in ("a cat", "a train"):
            browser.box.clear()
            browser.ask(words)
            name = browser.wait(lambda: browser.captions() not in asked and browser.captions())[0].split("\n")[0]
            browser.all("#pictures .thumbnail-item")[0].click()
            browser.wait(lambda name=name: browser.box.get_attribute("value") == name and browser.all("#query img"))
            asked.append(browser.captions())

    def test_what_cannot_be_read_is_said_in_a_line(self, browser, tmp_path):
        file = tmp_path / "no_picture.png"
        file.write_text("<b id='injected'>no picture</b>")
        browser.upload(file)
        browser.box.send_keys(Keys.ENTER)
        said = browser.wait(lambda: browser.first(".toast-body").text)
        assert "no_picture.png cannot be read as an image" in said
        assert "Traceback" not in said and "/" not in said and not browser.all("#injected")

    def test_nothing_to_look_for_is_said(self, browser):
        browser.box.send_keys(Keys.ENTER)
        assert "type words, or drop a picture" in browser.wait(lambda: browser.first(".toast-body").text)


def test_a_picture_that_was_found_is_rebuilt_from_its_eos(browser, tmp_path):
    browser.ask("a cat with heart eyes")
    name = browser.wait(lambda: len(browser.captions()) == 12 and browser.captions()[0].split("\n")[0])
    browser.all("#pictures .thumbnail-item")[0].click()
    browser.wait(lambda: browser.box.get_attribute("value") == name and browser.all("#query img"))
    about = browser.first("#about-rebuilding").text
    assert "from that one token alone" in about and re.search(r"\d\d% are hidden", about)
    browser.first("#rebuild").click()
    sources = ["the picture", "the words"]
    if "an image is hidden completely" in about:  # a model that rebuilds images too
        sources.append("both")
        captions = browser.wait(
            lambda: len(browser.captions("rebuilt-pictures")) == 5 and browser.captions("rebuilt-pictures")
        )
        assert captions[:2] == ["as it is", "what is hidden: all of it"]
        assert captions[2:] == ["rebuilt from the words", "rebuilt from the picture", "rebuilt from both"]
    rows = browser.wait(lambda: len(browser.rows("rebuilt-texts")) == len(sources) and browser.rows("rebuilt-texts"))
    assert [row[0] for row in rows] == sources
    assert all(row[1] == name and "_" in row[2] and "_" not in row[3] for row in rows)
    picture = tmp_path / "page.png" if SCREENSHOT is None else Path(SCREENSHOT)
    take_picture(browser, picture)
    assert Image.open(picture).width == 1200


def take_picture(browser: Browser, file: Path) -> None:
    """The whole page, in no more colours than it needs."""
    browser.driver.execute_script("document.activeElement.blur()")
    end = "return document.querySelector('#rebuilt-texts').getBoundingClientRect().bottom + window.scrollY"
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
