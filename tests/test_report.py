"""The report: one file that needs nothing else, shows what is in the results, and works in a real browser."""

import json
import re
import shutil

import pytest

from neuron_specialization.analysis.report import write_report

from .conftest import make_m2m100, make_masks

ATTACK = "<img src=x onerror=alert(1)>"
ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-quic"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1200,1600"),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    results = directory / "toy-control"
    results.mkdir()
    rows = [{"method": "ours", "loss": 1.23456, "note": ATTACK}, {"method": "fine_tune", "loss": 1.25}]
    (results / "results.json").write_text(json.dumps({"main": rows, "environment": {"torch": "2.13.0"}}))
    (results / "differences.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>')
    masks = make_masks(make_m2m100())
    return write_report(directory / "report.html", f"Neurons {ATTACK}", masks, [results])


def test_values_are_escaped_and_nothing_comes_from_elsewhere(report):
    html = report.read_text()
    assert ATTACK not in html and "&lt;img src=x onerror=alert(1)&gt;" in html
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None and policy[1].startswith("default-src &#39;none&#39;") and "unsafe" not in policy[1]


def test_what_cannot_be_reported_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to report"):
        write_report(tmp_path / "report.html", "Empty")
    with pytest.raises(ValueError, match="holds no results.json"):
        write_report(tmp_path / "report.html", "Empty", results=[tmp_path])
    assert not (tmp_path / "report.html").exists()


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


def test_pairs_are_ordered_by_family(page):
    from selenium.webdriver.support.select import Select

    names = (
        "return [...document.querySelectorAll('#heatmap svg:first-child text[text-anchor]')].map(t => t.textContent)"
    )
    assert page.execute_script(names) == ["en-de", "de-en", "en-fr", "fr-en"]
    Select(page.find_element("id", "order")).select_by_value("family")
    assert page.execute_script(names) == ["en-de", "en-fr", "de-en", "fr-en"]


def test_a_phone_scrolls_down_only(page):
    sizes = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    try:
        width = page.execute_script("return document.documentElement.scrollWidth")
        assert width <= 360
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
    assert page.execute_script("return document.querySelector('figure img').naturalWidth") == 9
    section = page.find_element("id", "results-toy-control")
    assert "1.235" in section.text and "fine_tune" in section.text and ATTACK in section.text
