"""The gallery, opened from disk in Chromium: everything a visitor does, and that nothing in a prompt can act or call out."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tu_diffuse.batch.run
import typer
from picture_folders import picture_folder
from tu_diffuse.batch.gallery import write_gallery
from tu_diffuse.batch.items import Item
from tu_diffuse.batch.lines import Problem
from tu_diffuse.batch.outcomes import generate_commands, shared_arguments
from tu_diffuse.cli.generate import _numbers, _pair
from tu_diffuse.cli.main import app, run
from tu_diffuse.pipeline.model.folder import EMBEDDED, ModelFolder
from tu_diffuse.pipeline.resolve import resolve

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")
HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    '<img src="https://example.com/x.png" onerror="window.hacked = 1">',
    '"><svg onload="window.hacked = 1">',
    "javascript:window.hacked=1 {{data}} {{policy}}",
    "<!--<script> & &lt; \u2028 \u202e",
    "$(touch hacked) `touch hacked` '; touch hacked #",
    "a % # ? & file \\ name / ../.. * name",
    "-",
    "--help",
    "two\nlines\tand 'quotes' \"both\" 赤い星 ⭐",
)
Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: "Browser", tmp_path: Path, ensemble: ModelFolder) -> Iterator[Open]:
    """Write the gallery of a folder and open it; at the end, nothing but files was asked for and nothing was complained about."""
    context = browser.new_context(viewport={"width": 1100, "height": 800}, permissions=["clipboard-read", "clipboard-write"])
    told: list[str] = []
    asked: list[str] = []

    def open_(items: list[Item], problems: tuple[Problem, ...] = (), **entries: Any) -> "Page":
        plan = picture_folder(tmp_path, items, **entries)
        path = write_gallery(ensemble, plan, tmp_path, problems=problems, shared=["--dtype", "bfloat16"])
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_
    context.close()
    assert told == []
    assert asked
    assert all(url.startswith(f"file://{tmp_path}/") for url in asked)


def captions(page: "Page") -> list[str]:
    return page.locator("#grid figcaption").all_inner_texts()


def prompts(page: "Page") -> list[str]:
    return page.locator("#grid .prompt").all_text_contents()


@needs_chromium
def test_pictures_load_and_can_be_filtered_and_sorted(visit: Open, items: Any):
    made = items("a red star", "a blue moon", "a Red house", sweep={"guidance": [30.0, 3.0]}, width=32, height=32)
    page = visit(made, score={0: 0.25, 2: 0.75, 3: 0.5})
    assert prompts(page) == ["a red star"] * 2 + ["a blue moon"] * 2 + ["a Red house"] * 2
    page.wait_for_function("[...document.querySelectorAll('#grid img')].every((image) => image.complete && image.naturalWidth === 32)")
    assert page.inner_text("#counts") == "6 pictures"

    page.fill("#filter", "RED ho")
    assert prompts(page) == ["a Red house"] * 2
    assert page.inner_text("#counts") == "2 of 6 pictures"
    page.fill("#filter", "guidance=3 star")
    assert ["guidance 3" in text and "30" not in text for text in captions(page)] == [True]
    page.fill("#filter", "no such word")
    assert page.is_visible("#nothing")
    page.fill("#filter", "")
    assert not page.is_visible("#nothing")

    guidance = "[...document.querySelectorAll('#grid figcaption')].map((caption) => Number(/guidance (\\d+)/.exec(caption.textContent)[1]))"
    page.select_option("#sort", "guidance")
    assert page.evaluate(guidance) == [3, 3, 3, 30, 30, 30]
    page.click("#direction")
    assert page.evaluate(guidance) == [30, 30, 30, 3, 3, 3]
    page.select_option("#sort", "score")  # best first, those without one last
    scores = [text.partition("score ")[2][:4] for text in captions(page)]
    assert scores == ["0.75", "0.5", "0.25", "", "", ""]
    page.select_option("#sort", "prompt")
    assert prompts(page) == ["a blue moon"] * 2 + ["a Red house"] * 2 + ["a red star"] * 2


@needs_chromium
def test_enlarging_and_keys(visit: Open, items: Any):
    page = visit(items("one", "two", "three", width=32, height=32), truncated={1: {"clip": "lost words"}})
    page.locator("#grid .thumb").nth(1).click()
    assert page.inner_text("#words") == "two"
    assert page.inner_text("#place") == "2 of 3"
    assert "lost words" in page.inner_text("#settings")
    page.wait_for_function("document.getElementById('large').naturalWidth === 32")
    shown = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "Home", "ArrowLeft", "End"):
        page.keyboard.press(key)
        shown.append(page.inner_text("#words"))
    assert shown == ["three", "three", "two", "one", "one", "three"]
    assert page.is_disabled("#next")
    page.click("#back")
    assert page.inner_text("#words") == "two"
    page.keyboard.press("Escape")
    assert not page.is_visible("#viewer")
    page.keyboard.press("/")
    page.keyboard.type("three")
    assert prompts(page) == ["three"]
    for _ in range(20):  # from the filter on, with the keyboard alone
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "thumb":
            break
    page.keyboard.press("Enter")
    assert page.inner_text("#place") == "1 of 1"


@needs_chromium
def test_comparing_over_a_sweep(visit: Open, items: Any):
    made = items("a star", "a moon", sweep={"guidance": [5.0, 1.0, 3.0], "steps": [2, 4]}, count=2, width=32, height=32)
    lost = next(i for i, item in enumerate(made) if (item.line, item.request.guidance, item.request.steps) == (1, 3.0, 2))
    page = visit(made, failed={lost: "no memory"}, left={lost + 1: True})
    page.click("#compare")
    assert page.locator("#over option").all_inner_texts() == ["steps", "guidance", "seed"]
    page.select_option("#over", "guidance")
    rows = page.locator("#rows .row")
    assert rows.count() == 8  # 2 prompts, 2 seeds, 2 step counts
    assert all(row.locator("figcaption").all_inner_texts() == ["guidance 1", "guidance 3", "guidance 5"] for row in rows.all())
    assert rows.first.locator("h2").inner_text() == "a star"
    assert "steps 2" in rows.first.inner_text()
    assert page.locator("#rows .hole").all_inner_texts() == ["no memory", "not drawn yet"]
    assert page.locator("#rows img").count() == 24 - 2
    page.select_option("#over", "seed")
    assert (rows.count(), rows.first.locator("figure").count()) == (12, 2)
    page.fill("#filter", "moon steps=4")
    assert rows.count() == 3
    page.locator("#rows .thumb").first.click()
    assert page.inner_text("#place") == "1 of 6"


@needs_chromium
def test_the_command_is_copied(visit: Open, items: Any, ensemble: ModelFolder):
    made = items({"prompt": 'it\'s a "star"', "seed": 4, "guidance": 2.5, "format": "webp"}, width=32, height=32)
    page = visit(made)
    page.locator("#grid .thumb").click()
    page.click("#copy")
    page.get_by_role("button", name="Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == generate_commands(ensemble, made, ["--dtype", "bfloat16"])[0] == page.inner_text("#command")
    assert read_back(ensemble, shlex.split(copied), None) == made[0].request


@needs_chromium
def test_what_failed_is_listed_with_its_reason(visit: Open, items: Any):
    made = items({"prompt": "good", "count": 1}, "bad <b>one</b>", {"prompt": "worse", "count": 2})
    page = visit(made, failed={1: "<i>not finite</i>", 2: "no memory", 3: "no memory"}, problems=(Problem(4, 7, "steps 'x' cannot be used"),))
    assert page.inner_text("#counts") == "1 picture · 3 failed"
    page.click("#failures summary")
    assert page.inner_text("#failures summary") == "3 pictures failed, 1 problem in the prompt file"
    told = [entry.locator("p").all_text_contents() for entry in page.locator("#failures li").all()]
    assert told == [
        ["<i>not finite</i>", "line 2: bad <b>one</b>"],
        ["no memory", "line 3, 2 pictures: worse"],
        ["column 7: steps 'x' cannot be used", "line 4"],
    ]


@needs_chromium
def test_prompts_cannot_act(visit: Open, items: Any):
    page = visit(items(*({"prompt": text, "negative": text} for text in HOSTILE), {"prompt": "x"}, width=32, height=32), failed={10: HOSTILE[0]})
    assert prompts(page) == list(HOSTILE)
    page.wait_for_function("[...document.querySelectorAll('#grid img')].every((image) => image.complete && image.naturalWidth === 32)")
    for text in HOSTILE:
        page.locator("#grid .thumb").nth(HOSTILE.index(text)).click()
        assert page.text_content("#words") == text
        page.keyboard.press("Escape")
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.evaluate("[document.scripts.length, document.querySelectorAll('svg, b, i').length, document.images.length]") == [2, 0, 11]


@needs_chromium
def test_the_policy_stops_what_would_get_in(browser: "Browser", tmp_path: Path, ensemble: ModelFolder, items: Any):
    path = write_gallery(ensemble, picture_folder(tmp_path, items("a")), tmp_path, problems=(), shared=[])
    page, asked = browser.new_page(), list[str]()
    page.on("requestfinished", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.hacked = 1' }))")
    page.evaluate("document.body.append(Object.assign(document.createElement('img'), { src: 'http://127.0.0.1:9/x.png' }))")
    blocked = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'blocked')")
    assert (blocked, page.evaluate("typeof window.hacked")) == ("blocked", "undefined")
    assert not [url for url in asked if url.startswith("http")]
    page.close()


@needs_chromium
def test_many_pictures_are_shown_as_one_scrolls(visit: Open, items: Any):
    page = visit(items({"prompt": "many", "seed": 0, "count": 400}, width=32, height=32))
    cards = page.locator("#grid figure")
    assert cards.count() < 400
    for _ in range(20):
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        page.wait_for_timeout(50)
        if cards.count() == 400:
            break
    assert [f"seed {i}" for i in range(400)] == [text.splitlines()[-1].split(" · ")[0] for text in captions(page)]


@needs_chromium
def test_phones_and_both_colour_schemes(visit: Open, items: Any):
    page = visit(items("a star", "a " + "verylongword" * 12, sweep={"guidance": [1.0, 2.0, 3.0, 4.0]}, width=32, height=32))
    page.set_viewport_size({"width": 390, "height": 844})
    for view in ("#compare", "#all"):
        page.click(view)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
    papers = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours = page.evaluate("['body', '#counts'].map((at) => getComputedStyle(document.querySelector(at)).color)")
        papers.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert all(contrast(colour, papers[-1]) >= 4.5 for colour in colours)  # WCAG 2.2, 1.4.3
    assert papers[0] != papers[1]
    page.locator("#grid .thumb").first.click()
    page.evaluate("document.querySelector('#viewer').scrollTo(0, 1e6)")
    assert page.locator("#copy").is_visible()
    page.click("#close")
    assert not page.is_visible("#viewer")


def contrast(one: str, other: str) -> float:
    """Of two colours as browsers write them: WCAG's ratio."""

    def luminance(colour: str) -> float:
        shares = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def read_back(folder: ModelFolder, words: list[str], stdin: str | None) -> Any:
    """What `generate` makes of its arguments: its own parser, then the request as cli/generate.py resolves it."""
    command = typer.main.get_command(app).commands["generate"]  # type: ignore[attr-defined]
    given = command.make_context("generate", words[2:], resilient_parsing=False).params
    assert words[:2] == ["tu-diffuse", "generate"]
    (prompt,) = given["prompts"]
    options = {name: given[name] for name in RESOLVED}
    options["sigmas"] = None if given["sigmas"] is None else _numbers("sigmas", given["sigmas"])
    options["guidance_interval"] = None if given["guidance_interval"] is None else _pair("guidance-interval", given["guidance_interval"])
    text = str(stdin).rstrip("\n") if prompt == "-" else prompt
    return resolve(folder, text, range(given["seed"], given["seed"] + given["count"]), **options)


RESOLVED = (
    *("negative", "width", "height", "steps", "sampler", "schedule", "eta", "guidance", "guidance_rescale", "apg", "dynamic_threshold", "strict"),
)


def test_commands_say_all_that_is_not_the_default(ensemble: ModelFolder, items: Any, tmp_path: Path):
    """Through a shell and back through the parser of `generate`."""
    made = items(
        *({"prompt": text, "negative": text} for text in HOSTILE),
        {"prompt": "plain"},
        {"prompt": "all", "seed": 4294967295, "width": 64, "height": 32, "steps": 7, "sampler": "ddim", "schedule": "leading", "eta": 0.1 + 0.2},
        {"prompt": "guided", "guidance": 1e-05, "guidance_rescale": 0.7, "guidance_interval": (0.28, 5.42), "apg": True, "dynamic_threshold": 0.995},
        {"prompt": "levels", "sigmas": (14.6, 1 / 3, 0.1), "strict": True},
        {"prompt": "said", "guidance": ensemble.defaults.guidance},
        {"prompt": "other", "sampler": "lcm", "format": "jpeg"},
    )
    shared = shared_arguments(ensemble, dtype="bfloat16", device="auto")
    assert shared == ["--model", ensemble.name, "--dtype", "bfloat16"]
    commands = generate_commands(ensemble, made, shared)
    stub = tmp_path / "tu-diffuse"
    code = "import json, sys; print(json.dumps([['tu-diffuse', *sys.argv[1:]], sys.stdin.read() if '-' in sys.argv else None]))"
    stub.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S -c {shlex.quote(code)} "$@"\n')
    stub.chmod(0o755)
    script = "\n".join(commands)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["sh"], input=script, cwd=tmp_path, env=os.environ | {"PATH": path}, text=True, capture_output=True, check=True)
    received = [json.loads(line) for line in done.stdout.splitlines()]
    assert [read_back(ensemble, words, stdin) for words, stdin in received] == [item.request for item in made]
    assert not (tmp_path / "hacked").exists()
    plain = commands[len(HOSTILE)]
    assert plain == f"tu-diffuse generate plain --seed {made[len(HOSTILE)].seed} --model {ensemble.name} --dtype bfloat16"
    assert commands[-1].split()[-6:] == ["--format", "jpeg", *shared]


def test_the_embedded_model_is_not_named(ensemble: ModelFolder):
    assert shared_arguments(replace(ensemble, path=EMBEDDED), dtype="auto", device="cpu") == ["--device", "cpu"]


def data_of(out: Path) -> list[dict[str, Any]]:
    text = (out / "gallery.html").read_text()
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])["items"]


def test_batch_writes_both_after_parts_and_the_page_after_an_interruption(tmp_path: Path, ensemble_folder: Path, monkeypatch: pytest.MonkeyPatch):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("one\ntwo\nthree\nfour\n")
    command = ["batch", str(prompts), "--out", str(out), "--model", str(ensemble_folder), "--steps", "1", "--batch-size", "1"]
    drawing = tu_diffuse.batch.run.draw_missing

    def interrupted(*arguments: Any, kept: Any, **options: Any) -> None:
        def stop(entry: Any) -> None:
            kept(entry)
            raise KeyboardInterrupt

        drawing(*arguments, kept=stop, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tu_diffuse.batch.run, "draw_missing", interrupted)
        assert run([*command, "--part", "1/2"]) == 130
    assert 1 <= sum(item["file"] is not None for item in data_of(out)) < 4
    assert not (out / "contact-sheet.png").exists()
    for part in ("1/2", "2/2"):
        assert run([*command, "--part", part]) == 0
    assert [item["prompt"] for item in data_of(out) if (out / item["file"]).is_file()] == ["one", "two", "three", "four"]
    assert (out / "contact-sheet.png").exists()
