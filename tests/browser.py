"""A headless Chromium, and what tests ask of a page in it."""

import json
import os
import shutil
import time

import pytest

HOW = "install Chromium and its driver: apt-get install chromium chromium-driver"


class Browser:
    """A page in a headless Chromium.

    Attributes:
      downloads: folder of what it saves.
    """

    def __init__(self, folder):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = _found("chromium", "chromium-browser", "google-chrome")
        for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(_found("chromedriver")))
        self.driver.set_script_timeout(20)
        self.downloads = folder / "downloads"
        self._folder, self._pages = folder, 0
        self._command(
            "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads)
        )

    def _command(self, name, **values):
        self.driver.execute_cdp_cmd(name, values)

    def open(self, page, *, wide=1280, high=900, dark=False, keep=False):
        """Shows a page, its HTML or its path, and waits until its contents are there.

        Args:
          keep: what pages stored in the browser before.
        """
        if isinstance(page, str):
            self._pages += 1
            path = self._folder / f"{self._pages}.html"
            path.write_text(page, encoding="utf-8")
            page = path
        self._command(
            "Emulation.setDeviceMetricsOverride",
            **{"width": wide, "height": high, "deviceScaleFactor": 1, "mobile": wide < 500},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._command("Emulation.setEmulatedMedia", features=[scheme])
        if not keep:
            self.driver.get(page.as_uri())
            self.run("localStorage.clear()")
        self.driver.get_log("browser")
        self.driver.get(page.as_uri())
        self.wait("document.readyState === 'complete'")
        if self.run("document.getElementById('contents') !== null"):
            self.wait("performance.getEntriesByName('contents').length > 0")
        return self

    def run(self, expression, *values):
        """The value of an expression of JavaScript; `arguments` are the values."""
        return self.driver.execute_script(f"return ({expression})", *values)

    def wait(self, condition, *values):
        until = time.monotonic() + 20
        while not self.run(condition, *values):
            assert time.monotonic() < until, f"{condition} did not come; {self.log()}"
            time.sleep(0.02)

    def log(self):
        """What went wrong in the page."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def press(self, *keys):
        """Presses keys, one after the other, wherever the focus is."""
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.keys import Keys

        chain = ActionChains(self.driver, duration=0)
        for key in keys:
            chain.send_keys(key if len(key) == 1 else getattr(Keys, key.upper()))
        chain.perform()

    def click(self, selector, x=None, y=None):
        """Clicks an element, or a place in it by shares of its width and height."""
        from selenium.webdriver import ActionChains

        element = self.run("document.querySelector(arguments[0])", selector)
        assert element, f"no {selector}"
        self.driver.execute_script(
            "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element
        )
        if x is None:
            element.click()
            return
        box = self.run("arguments[0].getBoundingClientRect().toJSON()", element)
        at = round((x - 0.5) * box["width"]), round((y - 0.5) * box["height"])
        chain = ActionChains(self.driver, duration=0)
        chain.move_to_element_with_offset(element, *at).click().perform()

    def choose(self, selector, text):
        """Chooses the option of a select whose text begins so."""
        options = self.run(
            "[...document.querySelector(arguments[0]).options].map(o => o.text)", selector
        )
        (index,) = [i for i, one in enumerate(options) if one.split(" (")[0] == text]
        self.driver.execute_script(
            "const s = document.querySelector(arguments[0]); s.selectedIndex = arguments[1];"
            "s.dispatchEvent(new Event('input')); s.dispatchEvent(new Event('change'))",
            *(selector, index),
        )

    def text(self, selector):
        return self.run("document.querySelector(arguments[0]).innerText", selector)

    def texts(self, selector):
        return self.run(
            "[...document.querySelectorAll(arguments[0])].map(e => e.innerText)", selector
        )

    def saved(self):
        """The content of the one file that was saved, which is removed."""
        until = time.monotonic() + 20
        while not (found := [p for p in self.downloads.glob("*") if p.suffix != ".crdownload"]):
            assert time.monotonic() < until, "nothing was saved"
            time.sleep(0.02)
        (path,) = found
        return path

    def stored(self):
        return {
            k: json.loads(v) for k, v in self.run("Object.entries(localStorage)") if v[0] == "{"
        }


def _found(*names):
    for name in names:
        if path := shutil.which(name):
            return path
    message = f"there is no {names[0]}: {HOW}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
