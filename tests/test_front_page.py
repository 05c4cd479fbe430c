"""The page of a front: what it says, that text stays text, and how it behaves in a browser."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

import align.fronts.page
from align.fronts.evaluation import Evaluated, Evaluations
from align.fronts.page import SHORTEST, write_page
from tests.browser import Tab, chromium
from tests.page import Page
from tests.test_front_compute import candidates, make

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)><!--<script>",
    "]]>&lt;&amp;\"'`{{ front }}{% raw %}${x}\\u003c",
    "NUL \x00, bell \x07, return \n\t, line \u2028 paragraph \u2029",
    "right \u202eto left\u202c \u2067isolate\u2069 \ufeff\U0001f600 \ufffd\uffff",
    "",
)
PLAIN = ("7+5=12;#12",)
NAMES = ["accuracy", "brevity", "clarity"]


def made_up(texts: tuple[str, ...] = PLAIN, runs: int = 2, steps: int = 3, methods: int = 3) -> dict:
    """A front whose policies get better with every step, of methods that prefer one objective or the other."""
    some = candidates(runs, steps, methods)
    rng = np.random.default_rng(0)
    parts, examples = {}, [{"prompt": text, "text": text, "values": dict.fromkeys(NAMES, 0.5)} for text in texts]
    for c in some:
        share, t = (int(c.id.partition("-")[0]) + 0.5) / methods, (c.step + 1) / steps
        mean_K = np.array([share * t, 10 * (1 - (1 - share) * t), 0.5 + 0.1 * c.seed])
        values_PK = np.clip(mean_K + np.array([0.1, 1.0, 0.1]) * rng.normal(size=(40, 3)), 0, (1, 10, 1))
        none = {part: [0.0, 0.1, 0.0] for part in ("validation", "test")}
        parts[c.path] = Evaluated(values_PK[:20], values_PK[20:], none, examples)
    return make(some, Evaluations(parts, prompts={"validation": 20, "test": 20}))[0]


def write(path: Path, front: dict) -> Page:
    write_page(path, front)
    return Page(path)


@pytest.fixture(scope="module")
def front() -> dict:
    return made_up()


@pytest.fixture(scope="module")
def hostile(front) -> dict:
    """The same front with names and texts that try to be more than text."""
    points = [dict(p) for p in made_up(HOSTILE)["points"]]
    for i, point in enumerate(points):
        point |= {"id": f"{i}{HOSTILE[i % 3]}", "path": HOSTILE[i % 5], "run": HOSTILE[1]}
        if point["method"] == points[-1]["method"]:  # as merged models are
            point |= {"weights": {f"runs/a{HOSTILE[0]}": 0.25, "runs/b": 0.75}}
    return {**front, "points": points, "notes": list(HOSTILE)}


def test_the_page_says_what_front_json_says(front, tmp_path):
    page = write(tmp_path / "front.html", front)
    assert page.text.startswith("Front of 18 policies · Paretune")
    chosen = sum(point["on_front"] for point in front["points"])
    assert f" policies 18 on the front {chosen} methods 3 prompts to choose on 20 " in page.text
    for point in front["points"]:
        value, error = (point["test"][key]["accuracy"] for key in ("values", "standard_errors"))
        assert f"{value:.3f} ± {error:.3f}" in page.text
    for method in front["methods"]:
        volume = method["hypervolume"]
        assert f"{volume['mean']:.3f} [{volume['low']:.3f}, {volume['high']:.3f}]" in page.text
    assert "brevity 10 %" in page.text
    shown = page.islands["front"]
    assert set(shown["shown"]) == {"accuracy", "brevity"}  # the two that conflict
    assert shown["z"] == pytest.approx(1.959964)
    assert shown["points"][4]["test"] == front["points"][4]["test"]


def test_stairs_go_through_policies_of_the_front_alone(front, tmp_path):
    stairs = write(tmp_path / "front.html", front).islands["front"]["stairs"]
    for part in ("validation", "test"):
        xs, ys = stairs[part]["accuracy"]["clarity"]
        chosen = [p[part]["values"] for p in front["points"] if p["on_front"]]
        assert set(xs) <= {v["accuracy"] for v in chosen}
        assert set(ys) <= {v["clarity"] for v in chosen}
        assert xs == sorted(xs)
        assert ys == sorted(ys, reverse=True)


def test_hostile_text_changes_no_element_and_survives_exactly(front, hostile, tmp_path):
    page = write(tmp_path / "hostile.html", hostile)
    innocent = [{**p, "id": str(i), "path": "p", "run": "r"} for i, p in enumerate(hostile["points"])]
    assert page.tags == write(tmp_path / "front.html", {**hostile, "points": innocent, "notes": ["x"] * len(HOSTILE)}).tags
    examples = page.islands["front"]["points"][0]["examples"]
    assert [example["text"] for example in examples] == list(HOSTILE)
    names, values = zip(*page.attributes, strict=True)
    assert not [name for name in names if name in ("src", "href", "action", "srcset") or name.startswith("on")]
    assert ["http" in value for value in values if value.startswith("default-src 'none'; ")] == [False]


def test_half_a_surrogate_pair_and_long_texts(front, tmp_path, monkeypatch):
    monkeypatch.setattr(align.fronts.page, "MAX_CHARACTERS", 0)
    example = {"prompt": "\ud800", "text": "x" * (SHORTEST + 1234), "values": {}}
    points = [{**p, "examples": [example]} for p in front["points"]]
    (kept,) = write(tmp_path / "front.html", {**front, "points": points}).islands["front"]["points"][0]["examples"]
    assert kept["prompt"] == "\ud800"
    assert kept["text"] == "x" * SHORTEST + "\n[1,234 more characters are in front.json]"


def test_the_script_writes_text_only():
    folder = Path(align.fronts.page.__file__).parents[1] / "templates"
    script = "".join((folder / name).read_text() for name in ("common.js", "front.js"))
    assert script.count("textContent") > 5
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|DOMParser|ContextualFragment", script)


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def opened(browser, hostile, tmp_path_factory) -> Tab:
    """A tab with the hostile page; opening it takes a second, most of it plotly's."""
    path = tmp_path_factory.mktemp("page") / "front.html"
    write_page(path, hostile)
    return Tab(browser, path)


@pytest.fixture
def tab(opened) -> Tab:
    """The tab as if it were new."""
    for button in opened.page.locator('#legend [aria-pressed="false"]').all():
        button.click()
    for name, value in {"x": "accuracy", "y": "brevity", "which": "all", "bars": "front"}.items():
        opened.page.select_option(f"#axes [name={name}]", value)
    assert opened.errors == []
    return opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_it_fits_its_window_and_follows_the_scheme(tab, width, scheme):
    tab.page.set_viewport_size({"width": width, "height": 900})
    tab.page.emulate_media(color_scheme=scheme)
    plot = "document.querySelector('#cloud .main-svg').clientWidth === document.getElementById('cloud').clientWidth"
    tab.wait_until(plot)  # it follows after a moment
    assert tab.page.evaluate("document.documentElement.scrollWidth") == width
    for selector in ("#cloud .main-svg", "#forest .main-svg", "#curve .main-svg", "#policy", "#examples", "#axes"):
        box = tab.page.locator(selector).first.bounding_box()
        assert 0 <= box["x"] < box["x"] + box["width"] <= width, selector
    lightness = [
        sum(map(int, re.findall(r"\d+", tab.page.evaluate(script))[:3])) / 765
        for script in ("getComputedStyle(document.body).color", "getComputedStyle(document.body).backgroundColor")
    ]
    assert (lightness[0] < 0.3 < 0.7 < lightness[1]) if scheme == "light" else (lightness[1] < 0.3 < 0.7 < lightness[0])
    ink = tab.page.evaluate("getComputedStyle(document.querySelector('#cloud .xtitle')).fill")
    assert ink == tab.page.evaluate("getComputedStyle(document.body).color")
    assert tab.errors == []
    assert tab.requests == [tab.page.url]


def test_hostile_text_is_shown_and_not_run(tab, hostile):
    for i in (0, 1, 2):
        tab.page.locator(f'tr[data-point="{i}"] button').click()
        assert tab.text("#policy-name") == hostile["points"][i]["id"]
    kept = [tab.text(f"#examples > div:nth-child({i + 1}) pre:last-of-type") for i in range(len(HOSTILE))]
    assert kept == list(HOSTILE)
    tab.page.locator("#cloud .point").last.hover(force=True)
    assert tab.page.locator("img").count() == 0
    assert tab.page.locator("script").count() == 3
    assert tab.errors == []


def test_every_thing_can_be_done_by_keys(tab, hostile):
    points = hostile["points"]
    order = tab.page.evaluate("[...document.querySelectorAll('#policies tbody button')].map(b => b.textContent)")
    tab.page.locator('tr[data-point="4"] button').click()
    tab.page.locator("#policies thead button").last.focus()
    tab.page.keyboard.press("Tab")
    assert tab.focused() == points[4]["id"]  # the one row that Tab reaches
    tab.page.keyboard.press("Home")
    tab.page.keyboard.press("ArrowDown")
    assert tab.focused() == order[1]
    tab.page.keyboard.press("Enter")
    assert tab.focused() == tab.text("#policy-name") == order[1]
    assert tab.page.evaluate("document.activeElement.tagName") == "H3"
    tab.page.keyboard.press("Escape")
    assert tab.focused() == order[1]
    assert tab.page.evaluate("document.activeElement.tagName") == "BUTTON"
    tab.page.locator("#next").focus()
    tab.page.keyboard.press("Enter")
    assert tab.text("#policy-name") == order[2]
    tab.page.locator("#legend button").first.focus()
    tab.page.keyboard.press("Space")
    assert tab.page.locator("#legend button").first.get_attribute("aria-pressed") == "false"
    rows = tab.page.locator("#policies tbody tr:visible")
    assert rows.count() == sum(p["method"] != points[0]["method"] for p in points)
    assert tab.errors == []


def test_axes_sorting_and_clicks(tab, hostile):
    points = hostile["points"]
    tab.page.select_option("#axes [name=y]", "clarity")
    assert tab.text("#cloud .ytitle") == "clarity (larger is better)"
    tab.page.select_option("#axes [name=x]", "samples")
    assert tab.text("#cloud .xtitle") == "training samples"
    tab.page.select_option("#axes [name=which]", "front")
    chosen = [p for p in points if p["on_front"]]
    assert tab.page.locator("#policies tbody tr:visible").count() == len(chosen)
    tab.page.locator("#policies thead button", has_text="accuracy").click()
    best = min(chosen, key=lambda p: p["test"]["values"]["accuracy"])
    assert tab.text("#policies tbody tr:not([hidden]) button") == best["id"]
    tab.page.select_option("#axes [name=which]", "all")
    tab.page.select_option("#axes [name=x]", "accuracy")
    index = tab.page.evaluate("""() => {
      const trace = document.getElementById("cloud").data[2];
      document.getElementById("cloud").emit("plotly_click", {points: [{customdata: trace.customdata[1]}]});
      return trace.customdata[1];
    }""")
    assert tab.text("#policy-name") == points[index]["id"]
    value = points[index]["test"]["values"]["accuracy"]
    error = points[index]["test"]["standard_errors"]["accuracy"]
    assert tab.page.locator("#values tr").first.locator("td").all_inner_texts()[:2] == [
        f"{value:.3f}", f"{value - 1.959964 * error:.3f} to {value + 1.959964 * error:.3f}",
    ]  # fmt: skip
    merged = tab.page.locator("#details dt", has_text="merged").count()
    assert merged == (points[index]["method"] == points[-1]["method"])
    if merged:
        assert f"0.25 of runs/a{HOSTILE[0]} + 0.75 of runs/b" in tab.page.locator("#details").inner_text()
    tab.page.select_option("#curves [name=indicator]", "igd_plus")
    assert tab.text("#curve .ytitle") == "IGD+"
    assert tab.errors == []


def test_what_a_share_of_the_runs_attains_is_drawn_in_the_two_axes(tab, hostile):
    surfaces = "document.getElementById('cloud').data.filter((trace) => trace.mode === 'lines' && trace.hovertext)"
    draw = f"{surfaces}.map((trace) => [trace.x, trace.y])"
    assert tab.page.evaluate(draw) == []
    for wanted, share in (("any", 0.5), ("all", 1.0)):
        tab.page.select_option("#axes [name=attained]", wanted)
        drawn = tab.page.evaluate(draw)
        rows = [row for row in hostile["attainment_planes"] if (row["x"], row["y"], row["share"]) == (*NAMES[:2], share)]
        assert len(drawn) == len(rows) == 3
        for (xs, ys), row in zip(drawn, rows, strict=True):
            assert set(zip(row["xs"], row["ys"], strict=True)) <= set(zip(xs, ys, strict=True))
            assert all(a[0] == b[0] or a[1] == b[1] for a, b in itertools.pairwise(zip(xs, ys, strict=True)))  # steps
    tab.page.select_option("#axes [name=part]", "validation")
    assert tab.page.evaluate(draw) == []  # it is measured on test
    tab.page.select_option("#axes [name=part]", "test")
    tab.page.select_option("#axes [name=y]", "samples")
    assert tab.page.evaluate(draw) == []
    tab.page.select_option("#axes [name=attained]", "")
    assert tab.errors == []


def test_examples_of_all_policies_are_looked_through(tab, hostile):
    tab.page.locator("#finder input").fill("ONERROR=alert")
    kept = len(hostile["points"])  # one of each
    assert tab.text("#found") == f"{kept} found"
    assert tab.page.locator("#examples > div").count() == kept
    assert set(tab.page.locator("#examples > div > p:first-child").all_inner_texts()) >= {hostile["points"][1]["id"]}
    tab.page.locator("#finder input").fill("nowhere")
    assert tab.text("#examples") == "No example has this text."
    tab.page.locator("#finder input").fill("")
    assert tab.page.locator("#examples > div").count() == len(HOSTILE)
    assert tab.page.locator("img").count() == 0
    assert tab.errors == []


def test_fronts_of_one_policy_of_values_that_are_missing_and_of_one_objective(browser, front, tmp_path):
    missing = dict.fromkeys(NAMES), dict.fromkeys(NAMES), dict.fromkeys(NAMES, 1.0)
    nothing = dict(zip(("values", "standard_errors", "missing"), missing, strict=True))
    lost = {**front["points"][0], "validation": nothing, "test": nothing, "on_front": False, "examples": []}
    lost |= {"step": None, "samples": None, "tokens": None, "seconds": None, "seed": None, "weights": {}}
    page = write(tmp_path / "missing.html", {**front, "points": [lost, *front["points"][1:]]})
    assert "missing missing missing" in page.text
    single = {**front, "points": [lost, *front["points"][1:]], "objectives": front["objectives"][:1]}
    assert write(tmp_path / "single.html", single).islands["front"]["shown"] == ["accuracy"]
    page = write(tmp_path / "one.html", made_up(runs=1, steps=1, methods=1))
    assert "Front of 1 policy" in page.text
    assert "dominates a run" not in page.text
    for name in ("one", "single"):
        found = Tab(browser, tmp_path / f"{name}.html")
        found.page.wait_for_selector("#cloud .point", state="attached")
        if name == "single":
            found.page.locator('tr[data-point="0"] button').click()
            values = found.page.locator("#values td").all_inner_texts()
            assert values == ["missing", "–", "–", "–", "100 % of the values are missing"]
        assert found.errors == [], name
