"""A real browser drives the real page, on a tiny random model.

It needs Chromium (`apt-get install chromium`, or the path of one in `NEVA_CHROMIUM`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page needs neva-hf[space]")
pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")

from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from space_pages import VALUES, Brake, page_engine, served
from space_tools import base_model, idle
from tiny import random_map

from neva_hf.space import maps
from neva_hf.space.engine import Engine
from neva_hf.values import Value, ValueSystem

CHROMIUM = next(
    (
        path
        for path in (os.environ.get("NEVA_CHROMIUM"), "/usr/lib/chromium/chromium", shutil.which("chromium"))
        if path and Path(path).exists()
    ),
    None,
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")

QUESTION = "What now?"
WIDE = 556  # of the circle's picture, in its own units
PATIENCE = int(
    os.environ.get("NEVA_PATIENCE", "60000")
)  # milliseconds, for a machine that is busy with something else
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return page_engine()


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with served(engine) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Visitor:
    """A window with the page in it, and what its console complained about."""

    def __init__(self, browser: Browser, address: str, query: str = "", **options: Any) -> None:
        self.context: BrowserContext = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        self.context.set_default_timeout(PATIENCE)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(f"{address}/{query}")
        expect(self.page.locator("body[data-neva=ready] #dial svg")).to_be_visible()

    def dials(self) -> dict[str, float]:
        """How the sliders stand, without those at 0."""
        found = self.page.eval_on_selector_all("#dial input", "all => all.map(one => [one.id, Number(one.value)])")
        return {name.removeprefix("nv-slider-"): strength for name, strength in found if strength}

    def slider(self, value: str) -> Any:
        return self.page.locator(f"#nv-slider-{value}")

    def turn(self, value: str, strength: float) -> None:
        self.slider(value).fill(str(strength))
        self.slider(value).dispatch_event("change")

    def ask(self, question: str = QUESTION) -> tuple[str, str]:
        """Asks, and reads both answers when they are complete."""
        self.page.fill("#question textarea", question)
        self.page.click("#ask")
        return self.answers()

    def answers(self) -> tuple[str, str]:
        expect(self.page.locator("#status")).to_contain_text("Done")
        last = self.page.locator("#answers .nv-turn").last
        base, edited = last.locator(".nv-text").all_text_contents()
        return base, edited

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Any]:
    opened: list[Visitor] = []

    def arrive(query: str = "", where: str = address, **options: Any) -> Visitor:
        opened.append(Visitor(browser, where, query, **options))
        return opened[-1]

    yield arrive
    for one in opened:
        one.context.close()


def axe(page: Page) -> list[str]:
    """What axe-core finds that is serious or worse, with what it is about."""
    axe_playwright = pytest.importorskip("axe_playwright_python.sync_playwright", reason="it brings axe-core")
    found = axe_playwright.Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {[node['html'][:160] for node in one['nodes']][:4]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def test_the_page_loads_without_a_complaint_in_the_console(visit: Any) -> None:
    visitor = visit()
    expect(visitor.page.locator("h1")).to_have_text("Dial the values of a language model")
    assert visitor.page.locator("#dial .nv-row").count() == 10
    assert visitor.complaints == []


def test_a_preset_turns_the_dials_and_reset_turns_them_back(visit: Any) -> None:
    visitor = visit()
    visitor.page.get_by_role("button", name="A careful planner").click()
    assert visitor.dials() == {"security": 1.3, "conformity": 0.4, "stimulation": -0.5}
    expect(visitor.page.get_by_role("button", name="A careful planner")).to_have_attribute("aria-pressed", "true")
    visitor.page.get_by_role("button", name="Reset: all dials to 0").click()
    assert visitor.dials() == {}


def test_a_dial_changes_the_edited_answer_and_not_the_base_one(visit: Any, engine: Engine) -> None:
    visitor = visit()
    visitor.page.get_by_role("button", name="Reset: all dials to 0").click()
    base, edited = visitor.ask()
    assert base == edited
    visitor.turn("power", 2.0)
    visitor.page.click("#again")
    expect(visitor.page.locator(".nv-edited header p")).to_have_text("Power +2")
    base_then, edited_then = visitor.answers()
    assert base_then == base
    assert edited_then != edited
    *_, alone = engine.stream([], QUESTION, {"power": 2.0}, max_new_tokens=96)
    assert visitor.page.locator(".nv-turn").count() == 1
    # (HTML has no way to write some of the control signs that a random model emits)
    assert [_plain(base_then), _plain(edited_then)] == [_plain(alone.base), _plain(alone.edited)]


def _plain(text: str) -> str:
    return re.sub(r"[\s\x00-\x1f�]+", "", text)


def test_where_the_answers_begin_to_differ_is_marked(visit: Any) -> None:
    visitor = visit()
    base, edited = visitor.ask()
    assert base != edited
    assert visitor.page.locator(".nv-text mark").count() == 2


def test_a_conversation_goes_on_and_is_cleared(visit: Any) -> None:
    visitor = visit()
    visitor.ask("One?")
    visitor.page.fill("#question textarea", "Two?")
    visitor.page.press("#question textarea", "Enter")
    expect(visitor.page.locator(".nv-turn")).to_have_count(2)
    expect(visitor.page.locator(".nv-asked").last).to_contain_text("Two?")
    visitor.answers()
    visitor.page.click("#clear")
    expect(visitor.page.locator(".nv-turn")).to_have_count(0)


def test_stop_ends_the_model_and_keeps_what_there_is(visit: Any, engine: Engine) -> None:
    visitor = visit()
    brake = Brake(engine, after=6)
    try:
        visitor.page.fill("#question textarea", QUESTION)
        visitor.page.click("#ask")
        assert brake.reached.wait(60)
        expect(visitor.page.locator("#status")).to_contain_text("Writing")
        visitor.page.click("#stop")
        expect(visitor.page.locator("#status")).to_contain_text("Stopped")
    finally:
        brake.release()
    idle(engine)
    expect(visitor.page.locator(".nv-end")).to_contain_text("Stopped before the end.")
    expect(visitor.page.locator("#ask")).to_be_enabled()
    assert len(visitor.page.locator("#answers .nv-text").first.text_content() or "") < 40


def test_circle_and_sliders_are_one_control(visit: Any) -> None:
    visitor = visit()
    visitor.page.get_by_role("button", name="Reset: all dials to 0").click()
    box = visitor.page.locator("#dial svg").bounding_box()
    assert box is not None
    scale = box["width"] / WIDE
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    # Self-direction is at the top: a press 120 units above the middle is outside the ring of 0, one at 50 inside.
    visitor.page.mouse.click(middle[0], middle[1] - 120 * scale)
    assert 1.0 < visitor.dials()["self_direction"] < 2.5
    # Security is at the bottom, and is dragged inward from its handle.
    visitor.page.mouse.move(middle[0], middle[1] + 82 * scale)
    visitor.page.mouse.down()
    visitor.page.mouse.move(middle[0], middle[1] + 60 * scale, steps=4)
    visitor.page.mouse.up()
    assert -2.0 < visitor.dials()["security"] < -0.5
    visitor.turn("hedonism", 1.5)
    expect(visitor.page.locator("#dial svg")).to_have_attribute("aria-label", re.compile(r"Hedonism \+1\.5"))
    assert visitor.page.locator('.nv-filled[data-value="hedonism"]').get_attribute("d") != ""


def test_beyond_the_fluent_range_is_warned_about(visit: Any) -> None:
    visitor = visit()
    visitor.turn("power", 2.5)
    expect(visitor.page.locator(".nv-warning")).to_be_empty()
    visitor.turn("power", 2.6)
    expect(visitor.page.locator(".nv-warning")).to_contain_text("Power at +2.6 (fluent from −2.5 to +2.5)")
    expect(visitor.slider("power")).to_have_attribute("aria-valuetext", "plus 2.6, beyond the fluent range")


def test_what_dials_cost_and_leak_follows_them(visit: Any) -> None:
    visitor = visit()
    visitor.page.get_by_role("button", name="Reset: all dials to 0").click()
    expect(visitor.page.locator("#cost")).to_contain_text("Dose: none")
    visitor.turn("power", 2.0)
    expect(visitor.page.locator("#cost")).to_contain_text("KL 0.200 nats per token, what one dial at 2.0 costs")
    expect(visitor.page.locator("#cost")).to_contain_text("Power +0.6 nats per token")
    expect(visitor.page.locator("#cost")).to_contain_text("Leakage 2%")
    expect(visitor.page.locator("#dial svg")).to_have_class(re.compile("nv-moved"))
    visitor.slider("power").focus()
    expect(visitor.page.locator(".nv-note")).to_contain_text("Expected to move by +0.6")
    assert visitor.dials() == {"power": 2.0}


def test_a_link_brings_back_dials_question_and_seed(visit: Any) -> None:
    first = visit()
    first.turn("power", -1.5)
    first.page.get_by_role("button", name="Sampling").click()
    seed = first.page.get_by_label("Seed")
    # Gradio sets a field anew in the frames after it appears, faster than any visitor types.
    seed.evaluate("() => new Promise(go => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(go))))")
    while seed.input_value() != "7":
        seed.fill("7")
        seed.press("Tab")
    first.page.fill("#question textarea", "Why <b>not</b>?")
    first.page.click("#link")
    expect(first.page).to_have_url(re.compile("q=Why"))
    link = first.page.url
    assert "seed=7" in link
    assert first.page.evaluate("navigator.clipboard.readText()") == link
    second = visit("?" + link.partition("?")[2])
    expect(second.page.locator("#question textarea")).to_have_value("Why <b>not</b>?")
    assert (
        second.dials() == first.dials() == {"self_direction": 0.7, "stimulation": 1.2, "power": -1.5, "security": -0.4}
    )
    second.page.get_by_role("button", name="Sampling").click()
    expect(second.page.get_by_label("Seed")).to_have_value("7")
    assert second.complaints == []


def test_a_broken_link_says_so_and_the_page_works(visit: Any) -> None:
    visitor = visit("?dials=courage:2,power:x,security:1&seed=-4&q=Hm")
    expect(visitor.page.locator("#error [role=alert]")).to_contain_text("none of this map's")
    expect(visitor.page.locator("#question textarea")).to_have_value("Hm")
    assert visitor.dials() == {"security": 1.0}


def test_the_keyboard_alone_can_do_it_all(visit: Any) -> None:
    visitor = visit()
    keys, here = visitor.page.keyboard, visitor.page.evaluate

    def until(selector: str, key: str = "Tab", most: int = 60) -> None:
        for _ in range(most):
            if here("wanted => document.activeElement.matches(wanted)", selector):
                return
            keys.press(key)
        raise AssertionError(f"{selector} is not reached by {key}")

    until(".nv-reset")
    keys.press("Enter")
    assert visitor.dials() == {}
    until("#nv-slider-hedonism")
    for _ in range(5):
        keys.press("ArrowRight")
    assert visitor.dials() == {"hedonism": 0.5}
    until("[role=tab]")
    until("#question textarea")
    keys.press("ControlOrMeta+a")
    keys.type(QUESTION)
    keys.press("Enter")
    visitor.answers()
    expect(visitor.page.locator(".nv-edited header p")).to_have_text("Hedonism +0.5")
    # (backwards: the last tab comes first, and the second is the neuron map)
    until("[role=tab]:nth-of-type(2)", "Shift+Tab")
    keys.press("Enter")
    until(".nv-neuron")
    keys.press("ArrowRight")
    named = here("() => document.activeElement.dataset.index")
    keys.press("Enter")
    expect(visitor.page.locator("#facts h2")).to_have_text(f"Layer 0, neuron {named}")


def test_the_neuron_map_tells_what_a_neuron_says(visit: Any) -> None:
    visitor = visit()
    visitor.tab("Neuron map")
    expect(visitor.page.locator("#neurons figcaption")).to_contain_text("Stimulation: 12 neurons in 2 layers")
    visitor.page.locator("#neurons .nv-neuron").nth(7).click()
    expect(visitor.page.locator("#facts h2")).to_contain_text("Layer 1, neuron")
    assert visitor.page.locator("#facts tbody tr").count() == 10
    assert visitor.page.locator("#facts .nv-tokens li").count() == 20
    assert visitor.page.locator("#overlap tbody tr").count() == 10
    assert visitor.complaints == []


def test_a_sweep_answers_at_five_strengths(visit: Any, engine: Engine) -> None:
    visitor = visit()
    visitor.tab("Sweep")
    visitor.page.click("#sweep-run")
    cards = visitor.page.locator("#sweep .nv-card")
    expect(cards).to_have_count(5)
    expect(visitor.page.locator("#sweep .nv-cursor")).to_have_count(0)
    assert cards.locator("h2").all_text_contents() == ["−2.5", "−1.25", "0", "+1.25", "+2.5"]


def test_a_blind_test_hides_and_then_tells_which_is_which(visit: Any) -> None:
    visitor = visit()
    visitor.tab("Blind test")
    visitor.page.click("#blind-deal")
    expect(visitor.page.locator("#guess-a")).to_be_enabled()
    assert visitor.page.locator("#blind .nv-edited").count() == 0
    visitor.page.click("#guess-a")
    expect(visitor.page.locator(".nv-verdict")).to_contain_text(re.compile(r"(Right|Wrong)\. [01] of 1 so far"))
    first_is_edited = "nv-edited" in (visitor.page.locator("#blind .nv-card").first.get_attribute("class") or "")
    assert first_is_edited == visitor.page.locator(".nv-verdict").text_content().startswith("Right")
    expect(visitor.page.locator("#guess-a")).to_be_disabled()


def test_what_is_taken_home_is_for_the_current_dials(visit: Any) -> None:
    visitor = visit()
    visitor.tab("Take it home")
    expect(visitor.page.locator("#take code").first).to_contain_text("'stimulation': 1.2")
    visitor.turn("power", 2.2)
    expect(visitor.page.locator("#take code").first).to_contain_text("'power': 2.2")
    assert visitor.page.locator("#take details").count() == 5
    visitor.page.locator("#take .nv-copy").first.click()
    expect(visitor.page.locator("#take .nv-copy").first).to_have_text("Copied")
    assert (
        visitor.page.evaluate("navigator.clipboard.readText()")
        == visitor.page.locator("#take code").first.text_content()
    )


def test_a_bad_map_gives_a_sentence(visit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    visitor = visit()
    other = random_map(base_model(hidden_size=48), values=VALUES)
    monkeypatch.setattr("neva_hf.space.engine.map_of_visitor", lambda repo_id, limits: other)
    visitor.page.get_by_role("button", name="Another neuron map").click()
    field = visitor.page.get_by_label("A map on the Hugging Face Hub")
    for name, told in (("no repository", "Write it as user/name"), ("someone/other", "does not fit")):
        field.fill(name)
        field.press("Enter")
        visitor.page.click("#map-load")
        expect(visitor.page.locator("#error [role=alert]")).to_contain_text(told)
    base, edited = visitor.ask()
    assert base != edited
    assert visitor.complaints == []


def test_a_strangers_map_is_shown_and_its_markup_is_not(visit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nasty = '<img src=x onerror="window.hurt = 1">'
    values = (Value("courage", nasty, f"{nasty} ${{window.hurt = 1}}"), Value("thrift", "Thrift", "`${hurt = 1}`"))
    system = ValueSystem("traits", nasty, nasty, values)
    stranger = random_map(base_model(), values=["courage", "thrift"], value_system=system.to_dict())
    monkeypatch.setattr("neva_hf.space.engine.map_of_visitor", lambda repo_id, limits: stranger)
    assert maps.system_of(stranger)["courage"].label.startswith("<img")
    visitor = visit("?map=someone/else&dials=courage:1.5&q=<img src=x onerror='hurt=1'>")
    expect(visitor.page.locator("#dial .nv-row")).to_have_count(2)
    assert visitor.dials() == {"courage": 1.5}
    visitor.slider("courage").focus()
    expect(visitor.page.locator(".nv-note")).to_contain_text("<img src=x")
    visitor.page.click("#ask")
    visitor.answers()
    for name in ("Neuron map", "Sweep", "Take it home", "Talk"):
        visitor.tab(name)
    assert visitor.page.locator("#left img, #right img").count() == 0
    assert visitor.page.evaluate("window.hurt") is None
    assert visitor.complaints == []


def test_visitors_do_not_see_each_others_dials(visit: Any) -> None:
    first, second = visit(), visit()
    first.turn("power", 2.0)
    second.turn("security", -2.0)
    answers = first.ask(), second.ask()
    assert first.dials()["power"] == 2.0
    assert "power" not in second.dials()
    assert answers[0][0] == answers[1][0]
    assert answers[0][1] != answers[1][1]


@pytest.mark.parametrize("width", [360, 390])
def test_a_phone_shows_one_column_without_sideways_scrolling(visit: Any, width: int) -> None:
    visitor = visit(viewport={"width": width, "height": 800}, has_touch=True, is_mobile=True)
    visitor.ask("A rather long question with averyveryveryveryveryveryverylongwordthatdoesnotfitanywhere in it?")
    for name in (None, "Neuron map"):
        if name:
            visitor.tab(name)
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width
    visitor.tab("Talk")
    left, right = (visitor.page.locator(f".nv-turn .nv-{side}").bounding_box() for side in ("base", "edited"))
    assert left is not None
    assert right is not None
    assert left["x"] == right["x"]
    assert right["y"] >= left["y"] + left["height"]
    control, answers = (visitor.page.locator(name).bounding_box() for name in ("#dial", "#answers"))
    assert control is not None
    assert answers is not None
    assert control["y"] + control["height"] <= answers["y"]


def test_a_finger_on_the_circle_sets_a_value(visit: Any) -> None:
    visitor = visit(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    visitor.page.get_by_role("button", name="Reset: all dials to 0").click()
    box = visitor.page.locator("#dial svg").bounding_box()
    assert box is not None
    visitor.page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2 - box["width"] / WIDE * 120)
    assert 1.0 < visitor.dials()["self_direction"] < 2.5


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_axe_finds_no_serious_fault(visit: Any, mode: str) -> None:
    visitor = visit(f"?__theme={mode}", color_scheme=mode, reduced_motion="reduce")
    is_dark = visitor.page.evaluate("document.body.classList.contains('dark')")
    assert is_dark == (mode == "dark")
    visitor.turn("power", 3.0)
    expect(visitor.page.locator(".nv-warning")).not_to_be_empty()
    found = {"arrival": axe(visitor.page)}
    visitor.ask()
    found["answers"] = axe(visitor.page)
    for name in ("Sampling", "Another neuron map"):
        visitor.page.get_by_role("button", name=name).click()
    visitor.page.fill("#question textarea", " ")
    visitor.page.click("#ask")
    expect(visitor.page.locator("#error [role=alert]")).to_be_visible()
    found["options"] = axe(visitor.page)
    visitor.tab("Neuron map")
    visitor.page.locator("#neurons .nv-neuron").first.click()
    expect(visitor.page.locator("#facts table")).to_be_visible()
    found["neurons"] = axe(visitor.page)
    visitor.tab("Sweep")
    visitor.page.click("#sweep-run")
    expect(visitor.page.locator("#sweep .nv-card")).to_have_count(5)
    expect(visitor.page.locator("#sweep .nv-cursor")).to_have_count(0)
    found["sweep"] = axe(visitor.page)
    visitor.tab("Blind test")
    visitor.page.click("#blind-deal")
    expect(visitor.page.locator("#guess-b")).to_be_enabled()
    found["blind"] = axe(visitor.page)
    visitor.tab("Take it home")
    expect(visitor.page.locator("#take code").first).to_be_visible()
    found["home"] = axe(visitor.page)
    assert {where: faults for where, faults in found.items() if faults} == {}
