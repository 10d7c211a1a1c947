"""Pictures of the page for the README: `docs/images/space_*.png`.

    python benchmarks/screenshots.py

It starts the page on the embedded default model, asks a question, and takes a picture for a desktop in light and dark
mode, for a phone, and of the neuron map. It needs playwright and a Chromium (`NEVA_CHROMIUM`, or Debian's).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from urllib.parse import quote

from playwright.sync_api import Browser, Page, expect, sync_playwright

from neva_hf.space import page as space
from neva_hf.space.engine import Engine

CHROMIUM = os.environ.get("NEVA_CHROMIUM", "/usr/lib/chromium/chromium")
IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
PATIENCE = 300_000  # milliseconds: a small machine writes some ten words a second


def opened(browser: Browser, address: str, width: int, height: int, mode: str, scale: float, query: str) -> Page:
    """The page in a window of that size."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        device_scale_factor=scale,
        color_scheme="dark" if mode == "dark" else "light",
        reduced_motion="reduce",
        has_touch=width < 600,
        is_mobile=width < 600,
    )
    page = context.new_page()
    page.goto(f"{address}/?__theme={mode}{query}")
    expect(page.locator("body[data-neva=ready] #dial svg")).to_be_visible()
    return page


def answered(page: Page) -> None:
    """Asks what is in the box, and waits for both answers."""
    page.click("#ask")
    expect(page.locator("#status")).to_contain_text("Done")
    page.mouse.move(0, 0)


def taken(engine: Engine, folder: Path, query: str, neuron: int) -> None:
    """Takes all pictures.

    Args:
        engine ([`Engine`]): The page's model.
        folder (`Path`): Where they go.
        query (`str`): Dials and question, as in a link.
        neuron (`int`): Which neuron of the map is looked at, counted from the last one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    demo = space.build(engine)
    _, address, _ = space.launch(demo, quiet=True, prevent_thread_lock=True, ssr_mode=False)
    address = address.rstrip("/")
    expect.set_options(timeout=PATIENCE)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            for mode, name in (("light", "space_desktop"), ("dark", "space_dark")):
                page = opened(browser, address, 1440, 860, mode, 1.5, query)
                answered(page)
                page.screenshot(path=folder / f"{name}.png")
                if mode == "light":
                    page.get_by_role("tab", name="Neuron map", exact=True).click()
                    dots = page.locator("#neurons .nv-neuron")
                    dots.nth(dots.count() - 1 - neuron).click()
                    expect(page.locator("#facts table")).to_be_visible()
                    page.mouse.move(0, 0)
                    page.set_viewport_size({"width": 1440, "height": 1150})
                    page.screenshot(path=folder / "space_neurons.png")
                page.context.close()
            page = opened(browser, address, 390, 1640, "light", 1.5, query)
            answered(page)
            page.screenshot(path=folder / "space_phone.png")
            browser.close()
    finally:
        demo.close(verbose=False)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--map", help="A map other than the published one.")
    parser.add_argument("--folder", type=Path, default=IMAGES)
    parser.add_argument("--dials", default="stimulation:1.2,self_direction:0.7,security:-0.4", help="As in a link.")
    parser.add_argument("--question", default="I have a free weekend. What should I do with it?")
    parser.add_argument("--neuron", type=int, default=20, help="Which neuron is looked at, counted from the last.")
    given = parser.parse_args()
    query = f"&dials={given.dials}&q={quote(given.question)}"
    taken(Engine.load(given.map), given.folder, query, given.neuron)
    for path in sorted(given.folder.glob("space_*.png")):
        print(path)


if __name__ == "__main__":
    main()
