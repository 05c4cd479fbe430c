"""The samples of the report: all of them, in chunks that the page loads from beside it, and what a browser makes of them."""

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.report import write_report
from align.report_samples import MAX_ROWS, chunk_script, list_chunks, write_chunks
from align.runlog import RunFiles
from tests.browser import Tab, chromium
from tests.page import samples_beside
from tests.test_report import HOSTILE, OBJECTIVES, MadeUpRun, config_of, make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_every_sample_is_beside_the_page_in_order_of_steps(run):
    make_run(run, steps=25)
    other = MadeUpRun(config_of(OBJECTIVES, 25, 0), RunFiles(run, 1, list(OBJECTIVES)), 4, ("of rank 1",))
    for step in range(1, 26):
        other.train(step)
    other.files.samples.flush()
    path = write_report(run)
    training = samples_beside(path, "training")
    assert training["step"] == [step for step in range(1, 26) for _ in range(64)]
    assert training["text"].count("of rank 1") == 25 * 32
    assert training["prompt"] == [f"{prompt[1:]}+5-3=?" for prompt in training["prompt_id"]]
    held_out = pa.concat_tables([pq.read_table(file) for file in sorted((run / "evaluation").iterdir())])
    assert samples_beside(path, "held_out")["text"] == held_out["text"].to_pylist()
    values = samples_beside(path, "held_out")["value/accuracy"]
    np.testing.assert_allclose(values, held_out["value/accuracy"].to_numpy(), rtol=5e-6)


def test_long_texts_make_chunks_of_few_rows_and_stale_chunks_go(run, monkeypatch):
    """384 rows of 1,000 characters and a prompt of 6: 19 of them are below 20,000 characters."""
    make_run(run, texts=("x" * 1000,))
    monkeypatch.setattr("align.report_samples.MAX_CHARACTERS", 20_000)
    rows = [rows for _, rows, _, _ in write_chunks(run)["training"]]
    assert rows == [19] * 20 + [4]
    monkeypatch.setattr("align.report_samples.MAX_CHARACTERS", 10)
    assert [rows for _, rows, _, _ in list_chunks(run)["training"]] == [1] * 384
    monkeypatch.undo()
    kept = write_chunks(run)
    assert {file.stem for file in (run / "report-samples").iterdir()} == {c[0] for chunks in kept.values() for c in chunks}
    assert len(kept["training"]) == 1


def test_a_script_is_made_alone_as_it_is_beside_the_page(run):
    make_run(run, texts=HOSTILE, steps=25)
    for chunks in write_chunks(run).values():
        for name, *_ in chunks:
            assert chunk_script(run, name) == (run / "report-samples" / f"{name}.js").read_text(encoding="ascii")
    for wrong in ("", "training-0-99", "training-00-0", "../config", "other-1-0", "training-0-0/../training-0-0"):
        assert chunk_script(run, wrong) is None, wrong


# --- in a browser -----------------------------------------------------------------------------------------------------

SAMPLES = 50_000
LARGE_TEXT = "the quick brown fox jumps over the lazy dog "


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """The report of a run of 50,000 samples: numbers grow with the row, and every 500th has no value of clarity."""
    run = tmp_path_factory.mktemp("large") / "run"
    make_run(run, steps=2)
    table = pq.read_table(next((run / "samples").iterdir()))
    for file in (run / "samples").iterdir():
        file.unlink()
    n = np.arange(SAMPLES)
    table = table.take(n % len(table))
    columns = {
        "step": (n // 125 + 1).astype(np.int32),
        "text": [f"{i} " + LARGE_TEXT[i % 40 :] * 5 for i in n],
        "value/accuracy": n / SAMPLES,
        "value/clarity": np.where(n % 500 == 0, None, 0.25),
    }
    for name, values in columns.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(values, type=table.schema.field(name).type))
    for shard in range(20):
        pq.write_table(table.slice(shard * 2500, 2500), run / "samples" / f"shard-{shard:06d}.rank0.parquet")
    return write_report(run)


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def opened(browser, large) -> Tab:
    tab = Tab(browser, large)
    tab.wait_until("document.querySelectorAll('#rows tbody tr').length === 20")
    return tab


@pytest.fixture
def tab(opened) -> Tab:
    """The tab as if it were new."""
    opened.page.locator("#filters").evaluate("form => { form.reset(); form.dispatchEvent(new Event('input')); }")
    said(opened, "1 to 20 of 50,000")
    return opened


def said(tab: Tab, text: str) -> None:
    tab.wait_until(f"document.getElementById('position').textContent === '{text}'", seconds=60)


def texts(tab: Tab) -> list[int]:
    """The numbers that the completions in the list begin with."""
    cells = tab.page.locator("#rows tbody td:nth-child(4)").all_inner_texts()
    return [int(cell.split(" ")[0]) for cell in cells]


def test_fifty_thousand_samples_make_a_small_page_that_opens_with_the_first_of_them(browser, large):
    """What comes first is what costs little: the figures, which are last, are not waited for."""
    beside = sum(file.stat().st_size for file in (large.parent / "report-samples").iterdir())
    assert large.stat().st_size < 6_000_000
    assert large.stat().st_size + beside < 20_000_000
    tab = Tab(browser, "about:blank")
    metrics = tab.context.new_cdp_session(tab.page)
    metrics.send("Performance.enable", {"timeDomain": "threadTicks"})  # of its thread alone, however busy the machine is
    tab.page.goto(large.as_uri())
    tab.wait_until("document.querySelectorAll('#rows tbody tr').length === 20", seconds=60)
    loaded = [url.rpartition("/")[2] for url in tab.requests if url.endswith(".js")]
    assert loaded == ["training-0-0.js"]  # of 60
    tab.wait_until("document.querySelector('.main-svg') !== null", seconds=60)
    work = {row["name"]: row["value"] for row in metrics.send("Performance.getMetrics")["metrics"]}
    assert 0.01 < work["TaskDuration"] < 10  # seconds; one or two, most of it plotly's
    assert tab.errors == []


def test_what_is_first_does_not_wait_for_plotly(browser, large):
    tab = Tab(browser, "about:blank")
    tab.page.add_init_script("""
      window.order = [];
      new MutationObserver(() => {
        for (const [name, selector] of [["samples", "#rows tbody tr"], ["figures", ".main-svg"]])
          if (!order.includes(name) && document.querySelector(selector)) order.push(name);
      }).observe(document, {childList: true, subtree: true});
    """)
    tab.page.goto(large.as_uri())
    tab.wait_until("window.order.length === 2", seconds=60)
    assert tab.page.evaluate("window.order") == ["samples", "figures"]
    assert tab.page.evaluate("document.querySelectorAll('.main-svg').length") < tab.page.evaluate(
        "2 * document.querySelectorAll('[data-figure]').length"  # each has two; far ones wait until they are near
    )


def test_any_sample_is_reached_by_steps_limits_text_and_order(tab):
    field = tab.page.locator
    assert texts(tab) == list(range(20))
    tab.page.locator("#next").click()
    said(tab, "21 to 40 of 50,000")
    assert texts(tab) == list(range(20, 40))
    field("[name=from]").fill("200")
    field("[name=to]").fill("201")
    said(tab, "1 to 20 of 250")  # rows 24,875 to 25,124
    assert texts(tab) == list(range(24_875, 24_895))
    field("[data-objective=clarity] [name=there]").select_option("no")
    said(tab, "1 to 1 of 1")
    assert texts(tab) == [25_000]
    assert tab.page.locator("#values .missing").count() == 1
    field("[name=from]").fill("")
    field("[name=to]").fill("")
    said(tab, "1 to 20 of 100")
    field("[data-objective=accuracy] [name=least]").fill("0.9")
    field("[data-objective=accuracy] [name=most]").fill("0.93")
    said(tab, "1 to 4 of 4")
    assert texts(tab) == [45_000, 45_500, 46_000, 46_500]
    field("#filters").evaluate("form => form.reset()")
    field("[name=text]").fill("49999 ")
    said(tab, "1 to 1 of 1")
    assert texts(tab) == [49_999]
    field("[name=text]").fill("")
    field("[name=order]").select_option("-value/accuracy")
    said(tab, "1 to 20 of 50,000")
    assert texts(tab) == list(range(49_999, 49_979, -1))
    field("[name=text]").fill("is nowhere")
    said(tab, "no sample matches")
    assert tab.page.locator("#sample").is_hidden()
    assert tab.page.locator("#rows tbody tr").count() == 0
    assert tab.errors == []


def test_the_list_is_gone_through_by_keys(tab):
    tab.page.locator("#rows button").first.focus()
    tab.page.keyboard.press("ArrowDown")
    tab.page.keyboard.press("ArrowDown")
    assert tab.focused() == "3"
    assert tab.text("#completion").startswith("2 ")
    tab.page.keyboard.press("End")
    assert tab.text("#completion").startswith("19 ")
    assert tab.page.locator('#rows button[tabindex="0"]').count() == 1  # Tab leaves the list at once
    assert tab.page.locator("#rows tbody tr").count() == 20


def test_hostile_samples_are_shown_and_not_run(browser, run):
    make_run(run, texts=HOSTILE)
    tab = Tab(browser, write_report(run))
    tab.wait_until("document.querySelectorAll('#rows tbody tr').length === 20")
    scripts = tab.page.locator("script").count()
    seen = set()
    for _ in range(8):
        tab.page.keyboard.press("ArrowDown") if seen else tab.page.locator("#rows button").first.click()
        seen.add(tab.text("#completion"))
    assert seen == set(HOSTILE)
    assert (tab.page.locator("img").count(), tab.page.locator("script").count()) == (0, scripts)
    assert tab.errors == []


def test_without_the_folder_the_page_says_what_it_lacks(browser, run, tmp_path):
    make_run(run)
    alone = tmp_path / "alone.html"
    alone.write_bytes(write_report(run).read_bytes())
    tab = Tab(browser, alone)
    tab.wait_until("document.getElementById('position').textContent.includes('report-samples/training-0-0.js is not there')")
    tab.wait_until("document.querySelector('.main-svg') !== null", seconds=60)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_the_report_fits_its_window(tab, width, scheme):
    tab.page.set_viewport_size({"width": width, "height": 900})
    tab.page.emulate_media(color_scheme=scheme)
    tab.page.locator("#sample").scroll_into_view_if_needed()
    assert tab.page.evaluate("document.documentElement.scrollWidth") == width
    for selector in ("#filters", "#filters fieldset", "#completion", "#values"):
        box = tab.page.locator(selector).first.bounding_box()
        assert 0 <= box["x"] < box["x"] + box["width"] <= width, selector
    assert tab.errors == []


def test_writing_the_page_of_many_samples_is_quick(run):
    make_run(run, steps=200, every=20, prompts=16)
    start = time.process_time()
    path = write_report(run)
    assert time.process_time() - start < 6
    assert path.stat().st_size < 6_000_000
    assert len(samples_beside(path, "training")["step"]) == 200 * 128
    assert MAX_ROWS == 1000
