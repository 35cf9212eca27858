"""The page in a headless Chromium: no errors, clicks and keys work, and it fits a phone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import gguf
from pyggml.cli import main
from pyggml.models.model import Model
from tests.page.browser import Browser, executable

CHROMIUM = executable()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium (chromium or google-chrome on the path)"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    one = Browser(CHROMIUM)
    yield one
    one.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model on two devices, one with a budget and times, and DeepSeek-V3 for a GPU."""
    folder = tmp_path_factory.mktemp("pages")
    tiny, v3 = str(folder / "tiny.gguf"), str(folder / "v3.gguf")
    assert main(["synth", tiny, "--preset", "tiny", "--layers", "6"]) == 0
    assert main(["synth", v3, "--preset", "deepseek-v3", "--header-only"]) == 0
    names = {name: folder / f"{name}.html" for name in ("two", "timed", "v3")}
    common = ["-c", "512", "-ub", "64"]
    two = ["--backend", "null,numpy", "-ot", "exps=numpy"]
    timed = ["--backend", "numpy", "-fa", "off", "-amb", "1", "--profile"]
    large = ["--device", "cuda:80GiB", "--device", "host:512GiB", "-ot", "exps=numpy"]
    assert main(["page", "-m", tiny, "-o", str(names["two"]), *common, *two]) == 0
    assert main(["page", "-m", tiny, "-o", str(names["timed"]), *common, *timed]) == 0
    quick = ["--what-if", "off"]
    assert main(["page", "-m", v3, "-o", str(names["v3"]), "-c", "16384", *large, *quick]) == 0
    return names


@pytest.fixture(autouse=True)
def no_problems(browser: Browser) -> Iterator[None]:
    browser.problems.clear()
    yield
    assert browser.problems == []


def text(browser: Browser, selector: str) -> str:
    value: str = browser.run(f"document.querySelector({json.dumps(selector)}).textContent")
    return value


@pytest.mark.parametrize("name", ["two", "timed", "v3"])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_a_screen(
    name: str, dark: bool, browser: Browser, pages: dict[str, Path]
) -> None:
    for width in (375, 1280):
        browser.open(pages[name], width, 800, dark=dark)
        browser.run("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        browser.run("plans[0].steps.node.slice(0, 40).forEach((_, s) => openStep(s))")
        assert browser.run("document.documentElement.scrollWidth") == width
        ground = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(20, 23, 26)") == dark


def test_deepseek_v3_is_small_and_opens_at_once(browser: Browser, pages: dict[str, Path]) -> None:
    assert pages["v3"].stat().st_size < 2_000_000
    times = []
    for _ in range(3):
        start = time.perf_counter()
        browser.open(pages["v3"])
        times.append(time.perf_counter() - start)
    assert min(times) < 1
    folds = browser.run("plans[0].sections.map((s) => s.layers.length)")
    assert sum(folds) == 61 and max(folds) > 50


def test_a_click_opens_layers_and_steps(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["two"])
    section = browser.run("plans[0].sections.findIndex((s) => s.layers.length > 1)")
    assert not browser.run(f"document.querySelector('#section-{section} .step')")
    assert " times" in text(browser, f"#section-{section} summary")
    browser.click(f"#section-{section} summary")
    browser.run("new Promise((done) => setTimeout(done, 50))")
    first = browser.run(f"plans[0].sections[{section}].steps[0][1]")
    browser.click(f"#step-{first}")
    assert browser.run(f"byId('step-{first}').getAttribute('aria-expanded')") == "true"
    details = text(browser, f"#row-{first} .more")
    assert "pyggml/models/" in details and "numpy." in details and "of the arena" in details
    browser.click(f"#step-{first}")
    assert not browser.run(f"document.querySelector('#row-{first} .more')")


def test_another_layer_of_a_fold_has_its_own_steps(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["timed"])
    section = browser.run("plans[0].sections.findIndex((s) => s.layers.length > 1)")
    browser.click(f"#section-{section} summary")
    browser.run("new Promise((done) => setTimeout(done, 50))")
    browser.run(
        f"(() => {{ const s = document.querySelector('#section-{section} select');"
        "s.value = '1'; s.dispatchEvent(new Event('change')); })()"
    )
    step = browser.run(f"plans[0].sections[{section}].steps[1][0]")
    layer = browser.run(f"plans[0].sections[{section}].layers[1]")
    assert f"layer {layer}" in browser.run(f"plans[0].where({step})")
    assert browser.run(f"byId('step-{step}') !== null")


def test_keys_move_through_the_steps_and_open_them(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["timed"])
    peak = browser.run("plans[0].devices[0].peak_step")
    assert f"Step {peak}" in text(browser, "#arena-readout")
    browser.run("byId('arena-step').focus()")
    browser.press("ArrowRight", 39)
    assert f"Step {peak + 1} " in text(browser, "#arena-readout")
    assert f"at step {peak + 1}:" in text(browser, "#arena-owners")
    label = browser.run("byId('arena-step').getAttribute('aria-valuetext')")
    assert label.startswith(f"step {peak + 1}, ")
    browser.press("Tab", 9)  # to "Show it in the graph"
    assert browser.run("document.activeElement.textContent") == "Show it in the graph"
    browser.press("Enter", 13, "\r")
    assert browser.run("document.activeElement.id") == f"step-{peak + 1}"
    assert browser.run(f"document.querySelector('#row-{peak + 1} .more') !== null")
    browser.press("Enter", 13, "\r")
    assert browser.run(f"document.querySelector('#row-{peak + 1} .more') === null")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A product of many rows of f32 weights on a GPU, which has no kernel on tensor cores."""
    w = gg.constant(np.ones((320, 256), np.float32), name="w")
    y = gg.relu(gg.mul_mat(w, gg.input("x", ne=(256, 200))))
    plan = gg.compile({"y": y}, backends=["cuda:0:24GiB"])
    return plan.page(tmp_path_factory.mktemp("slow") / "page.html")


def test_the_reason_of_a_slow_path_is_shown(
    slow: Path, browser: Browser, pages: dict[str, Path]
) -> None:
    why = "f32 weights are multiplied in f32, without tensor cores"
    browser.open(slow)
    [step] = browser.run("plans[0].steps.why.flatMap((w, s) => (w ? [s] : []))")
    assert why in text(browser, "#cost") and "mul_mat" in text(browser, "#cost")
    assert "slow path" in text(browser, f"#row-{step} .kernel")
    assert browser.run("document.querySelectorAll('.kernel .slow').length") == 1
    browser.click(f"#step-{step}")
    assert f"Why not a faster one{why}" in text(browser, f"#row-{step} .more")
    browser.run("find('tensor cores')")
    assert browser.run("document.querySelectorAll('#found button').length") == 1
    browser.open(pages["timed"])
    assert "Every step takes the fastest kernel" in text(browser, "#cost")


def test_find_lists_steps_and_goes_to_one(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["two"])
    browser.run("byId('find').focus()")
    for letter in "ffn_moe_down":
        browser.press(letter, ord(letter.upper()), letter)
    found = browser.run("[...document.querySelectorAll('#found button')].map((b) => b.textContent)")
    assert found and all("ffn_moe_down" in item or "mul_multi_add" in item or "copy of" in item
                         for item in found)  # fmt: skip
    browser.click("#found button")
    assert browser.run("document.activeElement.id").startswith("step-")


def test_the_plan_and_the_device_can_be_chosen(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["two"])
    before = text(browser, "#arena p")
    browser.click("#plans input[value='1']")
    assert text(browser, "#arena p") != before
    assert browser.run("state.plan === plans[1]")
    browser.run(
        "(() => { const s = byId('arena-device'); s.value = s.options[1].value;"
        "s.dispatchEvent(new Event('change')); })()"
    )
    assert "The arena of numpy" in text(browser, "#arena p")


def test_the_page_says_what_the_plan_says(browser: Browser, pages: dict[str, Path]) -> None:
    """The numbers on the screen, computed again from a plan made here."""
    browser.open(pages["two"])
    with gguf.open(pages["two"].parent / "tiny.gguf") as file:
        model = Model(file, backends=("null:0", "numpy"), pins={"exps": "numpy"})
        session = model.session(n_ctx=512, n_batch=64)
        memory, (plan, *_) = session.memory(), session.plans.largest()
        for i, row in enumerate(memory.devices):
            cells = browser.run(
                f"[...document.querySelectorAll('#memory tbody tr')[{i}].children]"
                ".map((cell) => cell.textContent)"
            )
            assert cells == row.row()
        for device, arena in plan._work.placed.arenas.items():
            live: list[Any] = browser.run(f"plans[0].live({json.dumps(device)})")
            assert tuple(live) == arena.live
        layers = browser.run("plans[0].sections.flatMap((s) => s.layers).sort((a, b) => a - b)")
        assert layers == list(range(model.arch.n_layer))
        copies = browser.run("sum(copyGroups(plans[0]).map((g) => g.bytes * g.steps.length))")
        assert copies == sum(s.nbytes for split in plan.splits for s in split.copies)
        traffic = browser.run("sum(plans[0].steps.traffic)")
        from pyggml.operation import cost_of

        assert traffic == np.sum([cost_of(n).nbytes for s in plan.steps for n in s.nodes])


def test_everything_that_can_be_clicked_has_a_name(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["timed"])
    browser.run("openStep(5)")
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "link", "slider", "combobox", "radio", "searchbox", "DisclosureTriangle"}
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node.get("ignored") and node.get("role", {}).get("value") in roles
    ]
    assert {role for role, _ in named} >= {"button", "slider", "combobox", "radio", "searchbox"}
    assert all(name.strip() for _, name in named), named


RAILS = """
(() => {
  const wrong = [];
  for (const plan of plans) {
    for (const section of plan.sections) {
      const steps = section.steps.at(-1);
      const { rows, lanes } = rails(plan, steps);
      if (lanes >= RAIL.most) continue;  // then several values share the last lane
      const row = new Map(steps.map((s, i) => [s, i]));
      steps.forEach((s, i) => {
        const used = [...rows[i].through, ...rows[i].ends];
        if (new Set(used).size !== used.length) wrong.push(`two values in a lane at ${s}`);
        for (const node of plan.steps.reads[s]) {
          const made = row.get(plan.maker.get(plan.base(node)));
          if (made === undefined || made >= i) continue;
          const joins = rows[made].starts.some((lane) => rows[i].reads.includes(lane) &&
            rows.slice(made + 1, i).every((r) => r.through.includes(lane)));
          if (!joins) wrong.push(`no line from ${steps[made]} to ${s}`);
        }
      });
    }
  }
  return wrong;
})()
"""


@pytest.mark.parametrize("name", ["two", "timed", "v3"])
def test_a_line_leads_from_each_step_to_its_readers(
    name: str, browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages[name])
    assert browser.run(RAILS) == []


def test_a_graph_of_a_user_has_a_page(browser: Browser, tmp_path: Path) -> None:
    k, v = (gg.state(name, "f16", ne=(64, 1024, 8)) for name in ("cache_k", "cache_v"))
    kq = gg.label(gg.mul_mat(k, gg.input("q", ne=(64, 256, 8))), "kq")
    out = gg.mul_mat(gg.transpose(v), gg.soft_max_ext(kq, scale=0.125))
    plan = gg.compile({"out": out})
    path = plan.page(tmp_path / "page.html", profile=plan.profile(q=np.ones((8, 256, 64))))
    browser.open(path)
    assert text(browser, "#title") == "out"
    assert browser.run("document.querySelectorAll('#graph .step').length") == len(plan.steps) + 1
    assert "-amb" in text(browser, "#variants")
    browser.run("openStep(0)")
    assert Path(__file__).name in text(browser, "#row-0 .more")
