"""Pictures of a running server's live page, light and dark: what the README shows.

    python tests/bench/page_screenshots.py --url http://127.0.0.1:8000 FOLDER

Owns: opening the page, choosing a session, saying one thing. Knows nothing of how the server was filled.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--say", default="And in one sentence?")
    parsed = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme=scheme)
            page.goto(f"{parsed.url}/ui")
            page.locator("#table tbody tr").first.click()
            page.locator(".said").first.wait_for()
            page.locator("#message").fill(parsed.say)
            page.keyboard.press("Enter")
            page.wait_for_selector('#messages[aria-busy="false"]')
            page.wait_for_timeout(5_000)
            page.screenshot(path=parsed.folder / f"page-{scheme}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
