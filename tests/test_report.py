"""The report: one file that needs nothing else, shows what is in the results, and works in a real browser."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest

from neuron_specialization.analysis.overlap import neuron_overlap
from neuron_specialization.analysis.report import write_report

from .conftest import make_m2m100, make_masks

ATTACK = "<img src=x onerror=alert(1)>"
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9" onload="top.document.title=1">'
    "<script>top.document.title = 1</script></svg>"
)
ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-quic"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1200,1600"),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    results = directory / "toy-control"
    results.mkdir()
    ours = {"method": "ours", "loss": 1.23456, "bleu": 96.1, "note": ATTACK}
    rows = [ours, {"method": "fine_tune", "loss": math.nan}]
    by_pair = {"ours": {"en-de": {"difference": 0.5, "p": 0.01}}}
    details = [{"method": "ours", "seed": seed, "knobs": {"k": 0.9}} for seed in range(500)]
    written = {"recipe": "compare_methods", "rows": details, "significance": by_pair, "tables": {"bleu": rows}}
    written |= {"again": rows, "facts": ["Equal budget."], "environment": {"torch": "2.13.0"}}
    (results / "results.json").write_text(json.dumps(written))
    (results / "differences.svg").write_text(SVG)
    (results / "differences.png").write_bytes(b"the same, for those who cannot show the other")
    (results / "figures").mkdir()
    (results / "figures" / "some_curves.svg").write_text(SVG)
    masks = make_masks(make_m2m100())
    return write_report(directory / "report.html", f"Neurons {ATTACK}", masks, [results])


def test_values_are_escaped_and_nothing_comes_from_elsewhere(report):
    html = report.read_text()
    assert ATTACK not in html and "&lt;img src=x onerror=alert(1)&gt;" in html
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None and policy[1].startswith("default-src &#39;none&#39;") and "unsafe" not in policy[1]


def shown_masks(path):
    return json.loads(re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', path.read_text(), re.S)[1])


def test_means_are_over_the_pairs_that_a_stack_tells_apart(tmp_path):
    """Encoders of directions out of one language see the same text, and decoders of those into it."""
    masks = make_masks(make_m2m100(), ("en-de", "en-fr", "en-ru", "de-en", "fr-en", "ru-en"))
    means = {b["name"]: b["mean"] for b in shown_masks(write_report(tmp_path / "r.html", "R", masks))["blocks"]}
    for stack in ("encoder", "decoder"):
        overlap = neuron_overlap(masks, stack, "en")
        assert [means[name] for name in overlap.blocks] == pytest.approx(overlap.depth_curve())


def test_of_many_pairs_those_on_both_sides_of_a_language_are_shown(tmp_path):
    codes = [f"l{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(45)]
    masks = make_masks(make_m2m100(), [pair for code in codes for pair in (f"en-{code}", f"{code}-en")]).factorize()
    shown = shown_masks(write_report(tmp_path / "r.html", "R", masks))
    assert len(shown["pairs"]) == 40 and "Shown are 40 of " in shown["note"]
    assert all(block["mean"] < 1 for block in shown["blocks"]), "rows of one language are not compared with themselves"


def test_numbers_beside_tables_are_shown(tmp_path):
    headroom = {"met": True, "rows": [{"ceiling": "bilingual", "loss": 0.5}]}
    (tmp_path / "results.json").write_text(json.dumps({"kept": {"en-de": 0.75, "de-en": 0.5}, "headroom": headroom}))
    html = write_report(tmp_path / "r.html", "R", results=[tmp_path]).read_text()
    assert "0.75" in html and "met" in html and "bilingual" in html


def test_what_cannot_be_reported_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to report"):
        write_report(tmp_path / "report.html", "Empty")
    with pytest.raises(ValueError, match="holds no results.json"):
        write_report(tmp_path / "report.html", "Empty", results=[tmp_path])
    for content, expected in (
        ([{"loss": 1}], "expected a JSON object"),
        ({"environment": ["torch 2.13"]}, "expected environment to be an object"),
        ({"facts": "Equal budget."}, "expected facts to be a list"),
    ):
        (tmp_path / "results.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"results.json: {expected}"):
            write_report(tmp_path / "report.html", "Wrong", results=[tmp_path])
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="results.json is damaged"):
        write_report(tmp_path / "report.html", "Wrong", results=[tmp_path])
    assert not (tmp_path / "report.html").exists()


def test_every_id_is_one_word_that_is_there_once(tmp_path):
    names = ("x", "x-title", "x-7", "seed 0 (k=0.9)", "seed 0 k 0 9", "Größe", 'a"b')
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text("{}")
    directories = [tmp_path / name for name in (*names, *names)]
    html = write_report(tmp_path / "report.html", "Odd", make_masks(make_m2m100()), directories).read_text()
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(set(ids)) == len(ids) > 24 and all(re.fullmatch(r"[\w-]+", each) for each in ids)
    referred = re.findall(r' (?:aria-labelledby|for|href)="#?([^"]*)"', html)
    assert len(referred) > 24 and set(referred) <= set(ids)


@pytest.fixture(scope="module")
def browser():
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, report):
    browser.get(report.as_uri())
    return browser


def cells(page):
    return [cell.get_attribute("fill") for cell in page.find_elements("css selector", "#heatmap svg:first-child rect")]


def test_the_heatmap_follows_the_slider_by_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    assert not [line for line in page.get_log("browser") if line["level"] == "SEVERE"]
    first, slider = cells(page), page.find_element("id", "layer")
    assert len(first) == 16 and len(set(first)) > 1
    assert "encoder" in page.find_element("id", "layer-name").text
    slider.send_keys(Keys.END)
    assert "decoder" in page.find_element("id", "layer-name").text
    assert cells(page) != first
    assert "decoder" in page.find_element("id", "heatmap").get_attribute("aria-label")
    assert page.find_element("id", "layer-name").text.startswith(slider.get_attribute("aria-valuetext") + ",")
    slider.send_keys(Keys.TAB, Keys.TAB)
    assert page.switch_to.active_element.tag_name == "summary", "not the heatmap, where no key does anything"


def test_the_overlap_of_every_two_pairs_is_in_a_table_that_follows(page):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select

    masks = make_masks(make_m2m100())
    page.find_element("css selector", "#drawn summary").click()
    page.find_element("id", "layer").send_keys(Keys.END)
    Select(page.find_element("id", "order")).select_by_value("family")
    order, block = ["en-de", "en-fr", "de-en", "fr-en"], list(masks.rows)[-1]
    rows = [line.text.split() for line in page.find_elements("css selector", "#matrix tr")]
    assert rows[0] == ["pair", *order] and [row[0] for row in rows[1:]] == order
    shown = [[float(value) for value in row[1:]] for row in rows[1:]]
    assert shown == [pytest.approx(row, abs=6e-4) for row in masks.iou_matrix(block, order).tolist()]
    assert page.find_element("css selector", "#matrix caption").text.endswith(block)


def test_names_of_blocks_are_text_in_the_table(browser, tmp_path):
    masks = make_masks(make_m2m100())
    first, *others = masks.rows
    masks = replace(
        masks,
        rows={ATTACK: masks.rows[first], **{name: masks.rows[name] for name in others}},
        stacks={ATTACK: masks.stacks[first], **{name: masks.stacks[name] for name in others}},
    )
    browser.get(write_report(tmp_path / "report.html", "Names", masks).as_uri())
    assert browser.find_element("css selector", "#matrix caption").get_property("textContent").endswith(ATTACK)
    assert browser.find_element("id", "layer").get_attribute("aria-valuetext") == ATTACK
    assert not browser.find_elements("tag name", "img")


def test_without_javascript_the_page_says_what_it_lacks(page):
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.refresh()
        assert (
            "Without JavaScript this page shows the mean overlap of each block"
            in page.find_element("id", "overlap").text
        )
        assert page.find_element("css selector", "#overlap > details summary").is_displayed()
        assert not page.find_element("id", "layer").is_displayed(), "nothing that does not work"
    finally:
        page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_pairs_are_ordered_by_family(page):
    from selenium.webdriver.support.select import Select

    names = (
        "return [...document.querySelectorAll('#heatmap svg:first-child text[text-anchor]')].map(t => t.textContent)"
    )
    assert page.execute_script(names) == ["en-de", "de-en", "en-fr", "fr-en"]
    Select(page.find_element("id", "order")).select_by_value("family")
    assert page.execute_script(names) == ["en-de", "en-fr", "de-en", "fr-en"]


def test_a_phone_scrolls_down_only(page):
    sizes = {"width": 320, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    page.refresh()
    page.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
    try:
        curve = page.find_element("css selector", "#depth svg")
        assert curve.size["width"] <= 320, "the whole curve is seen"
        width = page.execute_script("return document.documentElement.scrollWidth")
        assert width <= 320
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_dark_mode_is_dark(page):
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    try:
        back, text = (
            [int(n) for n in re.findall(r"\d+", page.execute_script(f"return getComputedStyle(document.body).{name}"))]
            for name in ("backgroundColor", "color")
        )
        assert max(back[:3]) < 60 and min(text[:3]) > 180
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_figures_and_tables_of_results_are_shown(page):
    widths = page.execute_script("return [...document.querySelectorAll('figure img')].map(i => i.naturalWidth)")
    assert widths == [9, 9] and page.title == f"Neurons {ATTACK}", "shown as pictures, whose scripts do not run"
    captions = [caption.text for caption in page.find_elements("tag name", "figcaption")]
    assert captions == ["Test loss of each method minus that of joint fine-tuning; left is better", "some curves"]
    section = page.find_element("id", "results-toy-control")
    assert all(text in section.text for text in ("1.235", "96.10", "fine_tune", ATTACK))
    assert "recipes/compare_methods.py" in section.text and "Equal budget." in section.text
    assert "nan" not in section.text.lower()


def test_summaries_come_first_and_what_they_are_made_from_is_folded(page):
    tables = page.find_elements("css selector", "#results-toy-control details")
    shown = [(each.find_element("tag name", "summary").text, each.get_attribute("open")) for each in tables]
    assert shown == [
        ("tables, bleu (2 rows)", "true"),  # and not the same once more
        ("significance, ours (1 row)", None),
        ("rows (first 400 of 500 rows)", None),
    ]


def test_the_recipe_writes_a_report_of_results_alone(run_here, report, tmp_path):
    results = str(report.parent / "toy-control")
    run_here("analyze.py", "--report", str(tmp_path / "report.html"), "--results", results, results)
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html and len(set(re.findall(r'<section id="([^"]+)"', html))) == 2


def test_pruning_curves_say_what_they_show(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"recipe": "prune"}))
    for end in ("", "-forgetting", "-noise-costs"):
        (tmp_path / f"en-de_en-fr-after-0{end}.svg").write_text(SVG)
    for name in ("forgetting", "noise-costs", "quality"):
        (tmp_path / f"{name}.svg").write_text(SVG)
    captions = re.findall("<figcaption>(.*?)<", write_report(tmp_path / "r.html", "R", results=[tmp_path]).read_text())
    what, values = "against the share of neurons pruned", ("Quality", "Forgetting", "What noise costs")
    of_a_model = [f"{value} {what}: en-de_en-fr-after-0" for value in values]
    assert captions == [*of_a_model, *(f"{value} {what}" for value in ("Forgetting", "What noise costs", "Quality"))]
