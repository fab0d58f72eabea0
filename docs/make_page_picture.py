"""Writes docs/serve.png: the page of a real server with the demo model, asked twice, the receipt opened.

python docs/make_page_picture.py
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

OUT = Path(__file__).with_name("serve.png")
SIZE = {"width": 1280, "height": 800}
QUESTIONS = ("Name three primary colours.", "Why is the sky blue?")
SERVE = ["serve", "demo", "--port", "0", "-c", "1024", "--ram-budget", "60%", "--mode", "big-little"]
SERVE += ["--temp", "0", "--max-tokens", "60"]
# What the picture and the text beside it show, by what the page calls it.
SHOWN = {
    "the model": "#model",
    "the mode": "#mode",
    "the conversations": "#chats a[aria-current]",
    "the question": ".user .text",
    "the answer": ".assistant .text p",
    "the receipt": ".receipt",
    "the receipt in words": ".cost dl dd",
    "another answer": ".again",
    "the map": "#map",
    "what the map's colours mean": "#legend li",
    "the prompt": "#prompt",
}


def compose(page: Any, url: str) -> None:
    """Have a page of the size of the picture look as it does there. Raises SystemExit if it does not."""
    page.set_default_timeout(600_000)
    page.goto(url)
    page.wait_for_selector("#mode option", state="attached")
    for question in QUESTIONS:
        page.keyboard.press("Alt+n")
        page.wait_for_selector("#hello", state="visible")
        page.fill("#prompt", question)
        page.keyboard.press("Enter")
        page.wait_for_selector(".again")
    page.click(".cost summary")
    page.wait_for_function(f"document.querySelectorAll('#chats a').length === {len(QUESTIONS)}")
    page.mouse.move(0, SIZE["height"] - 1)  # over nothing
    missing = [name for name, selector in SHOWN.items() if not _is_in_sight(page, selector)]
    if missing:
        raise SystemExit(f"the page does not show {', '.join(missing)}")


def _is_in_sight(page: Any, selector: str) -> bool:
    """Whether the first of what is called so has a size, and all of it is in the window."""
    found = page.locator(selector)
    box = found.first.bounding_box() if found.count() else None
    if box is None or not (box["width"] and box["height"]):
        return False
    ends = (box["x"] + box["width"], box["y"] + box["height"])
    return min(box["x"], box["y"]) >= 0 and ends[0] <= SIZE["width"] and ends[1] <= SIZE["height"]


def main() -> None:
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        raise SystemExit("no browser here: apt install chromium")
    server = subprocess.Popen(
        [sys.executable, "-m", "mobile_gguf", *SERVE], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        if not url:
            raise SystemExit("the server did not start")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
            page = browser.new_page(viewport=SIZE)
            compose(page, url)
            page.screenshot(path=OUT)
            browser.close()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


if __name__ == "__main__":
    main()
