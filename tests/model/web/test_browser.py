"""The page in a real browser: a picture goes in, words and bars come out, another question moves the bars.

Needs gradio, selenium, and Debian's chromium and chromium-driver; a test that lacks one of them says so. Options:

    IGVA_WEB_CHECKPOINT=FOLDER    that model in place of a tiny one that knows nothing
    IGVA_SCREENSHOT=FILE.png      also take the picture of the documents
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlparse

import pytest

pytest.importorskip("gradio", reason="needs gradio: make test-web")
pytest.importorskip("selenium", reason="needs selenium: make test-web")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("needs a browser: apt-get install chromium chromium-driver", allow_module_level=True)

PATIENCE = 60
"""Seconds after which something that is waited for counts as never coming."""


@pytest.fixture(scope="module")
def browser() -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    # As root in a container there is no sandbox, and little shared memory.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1440,1330"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a person does on the page."""

    def __init__(self, browser: WebDriver, url: str) -> None:
        self.browser = browser
        browser.get_log("performance")
        browser.get(url)
        self.wait(lambda: self.all("#igva-box textarea"), "the page")

    def wait(self, condition: Callable[[], object], what: str) -> None:
        WebDriverWait(self.browser, PATIENCE, 0.1).until(lambda _: condition(), f"{what} did not come")

    def all(self, selector: str) -> list:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def drop(self, picture: str) -> None:
        before = len(self.all("#igva-box img"))
        self.all("#igva-box input[type=file]")[0].send_keys(picture)
        self.wait(lambda: len(self.all("#igva-box img")) > before, "the thumbnail")

    def ask(self, question: str) -> None:
        """Ask, and wait for the whole answer."""
        before = len(self.answers())
        self.type(question)
        self.wait(lambda: self.is_done(before + 1), "the answer")

    def type(self, question: str) -> None:
        self.all("#igva-box textarea")[0].send_keys(question, Keys.ENTER)

    def is_done(self, count: int) -> bool:
        """Whether there are so many answers, and the last one has ended."""
        assert not self.all("#igva-message .igva-message"), self.all("#igva-message")[0].text
        answers = self.answers()
        return len(answers) >= count and not answers[-1].startswith("…") and not self.all(".generating, .pending")

    def read(self, selector: str, value: str) -> list:
        """``value`` of each ``element``, in one call: between two, the page may have drawn itself anew."""
        script = f"return Array.from(document.querySelectorAll({selector!r})).map(element => {value})"
        return self.browser.execute_script(script)

    def answers(self) -> list[str]:
        return self.read("#igva-chat .bot.message", "element.innerText")

    def bars(self) -> list[list[str]]:
        """Names and weights of each chart, newest first."""
        labels = "Array.from(element.querySelectorAll('.igva-bar')).map(bar => bar.getAttribute('aria-label'))"
        return self.read("#igva-weights .igva-answer", labels)

    def widths(self) -> list[float]:
        """Of all bars, in pixels."""
        return self.read("#igva-weights .igva-fill", "element.getBoundingClientRect().width")

    def asked_of_others(self) -> set[str]:
        """Addresses beyond this machine that the page wanted."""
        messages = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        urls = [message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        return {url for url in urls if url.startswith("http") and urlparse(url).hostname not in ("127.0.0.1", "localhost")}


@pytest.fixture
def page(browser, nothing_leaves, serve, talk) -> Iterator[Page]:
    """Neither the browser nor the server may ask for anything beyond this machine."""
    opened = Page(browser, serve(talk).url)
    yield opened
    assert opened.asked_of_others() == set()
    assert nothing_leaves == []


def test_a_picture_is_asked_about_and_the_bars_move(page, red):
    page.drop(red)
    page.ask("Which colour?")
    (first,), widths = page.bars(), page.widths()
    assert len(widths) == 2
    assert [label.partition(":")[0] for label in first] == ["layers 1-2", "layers 3-4"]
    assert all(width > 0 for width in widths)
    page.ask("How many are there?")
    newest, earlier = page.bars()
    assert earlier == first and newest != first
    assert page.all("#igva-weights .igva-before")
    assert len(page.answers()) == 2
    # gradio's own buttons: the one that shares would send the picture away, the bin must empty what is remembered too.
    assert not any(button.is_displayed() for button in page.all("button[aria-label=Share]"))
    page.all("#igva-chat button[aria-label=Clear]")[0].click()
    page.wait(lambda: not page.bars() and not page.answers(), "the empty page")
    page.ask("And now?")
    assert page.bars() == [[]] and "no layers were weighed" in page.all("#igva-weights")[0].text


def test_what_is_typed_and_said_stays_text(page, red):
    page.drop(red)
    page.ask("<b id='bold'>Which</b> ![x](http://127.0.0.1/x.png) colour?")
    assert not page.all("#bold") and not page.all("#igva-chat img[src*='x.png']")
    assert "<b id='bold'>Which</b>" in page.all("#igva-chat .user.message")[-1].text


def test_a_mistake_is_one_line_and_the_next_question_is_answered(page, red, no_picture):
    page.drop(red)
    page.type("word " * 300)
    page.wait(lambda: page.all("#igva-message .igva-message"), "the line")
    assert "shorten the question" in page.all("#igva-message")[0].text
    assert "Traceback" not in page.browser.page_source
    page.all("#igva-clear")[0].click()
    page.wait(lambda: not page.all("#igva-message .igva-message"), "the empty line")
    page.drop(red)
    page.ask("Which colour?")
    assert len(page.bars()) == 1


def test_an_example_is_one_click_away(page):
    page.all(".gallery-item, .gallery button, [data-testid=dataset] button, tr.tr-body")[0].click()
    page.wait(lambda: page.all("#igva-box img"), "the thumbnail of the example")
    page.ask("")
    assert len(page.bars()[0]) == 2


def test_a_tab_that_is_closed_stops_the_model(browser, serve, talk, red, answer_threads, monkeypatch):
    monkeypatch.setattr("model.answering.answer_end_tokens", lambda *_: [10**6])
    steps, has_left = [], threading.Event()

    def step(*_):
        steps.append(1)
        if len(steps) > 2:
            has_left.wait(PATIENCE)

    talk.model.register_forward_hook(step)
    page = Page(browser, serve(talk, max_new_tokens=800).url)
    page.drop(red)
    page.type("Which colour?")
    page.wait(lambda: len(steps) > 2, "the first words")
    browser.get("about:blank")
    has_left.set()
    page.wait(lambda: not answer_threads() and not talk._lock.locked(), "the end of the answer")
    assert len(steps) < 800


def test_questions_become_a_heat_map(page, red):
    page.browser.find_element(By.XPATH, "//button[@role='tab'][contains(., 'Explain')]").click()
    page.wait(lambda: page.all("#igva-explain")[0].is_displayed(), "the second tab")
    page.all("#igva-picture input[type=file]")[0].send_keys(red)
    page.wait(lambda: page.all("#igva-picture img"), "the picture")
    page.all("#igva-explain")[0].click()
    loaded = "return Array.from(document.querySelectorAll('#igva-heat-map img')).some(image => image.naturalWidth > 0)"
    page.wait(lambda: page.browser.execute_script(loaded), "the heat map")
    page.wait(lambda: page.all("#igva-files a[download$='.json'], #igva-files a[href$='.json']"), "the figures")


@pytest.mark.skipif("IGVA_SCREENSHOT" not in os.environ, reason="needs IGVA_SCREENSHOT=FILE.png: the picture of the documents")
def test_the_picture_of_the_documents(browser, serve, talk, tmp_path):
    from model.web.examples import make_examples

    examples = make_examples(tmp_path)
    checkpoint = os.environ.get("IGVA_WEB_CHECKPOINT")
    if checkpoint is not None:
        from model.cli.checkpoint import load_checkpoint
        from model.web.talk import Talk

        loaded = load_checkpoint(checkpoint)
        talk = Talk(loaded.model, loaded.processor)
    page = Page(browser, serve(talk, name="/".join(Path(checkpoint or "tiny").parts[-2:])).url)
    page.drop(str(examples[0].picture))
    page.ask("What color is the background?")
    page.ask("How many objects are there?")
    page.ask("What object is shown?")
    assert len(page.bars()) == 3
    whole = browser.execute_script("return document.documentElement.scrollHeight + window.outerHeight - window.innerHeight")
    browser.set_window_size(1440, whole)
    target = Path(os.environ["IGVA_SCREENSHOT"])
    target.parent.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(target))
    assert target.stat().st_size < 300_000
