"""The report and a study's page in a browser, wide and narrow, light and dark: nothing goes wrong, nothing is cut off."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.paths import ROOT
from support.reported_run import Made

from swirl_fast.report import write_report
from swirl_fast.report.experiment import write_experiment_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# What sticks out of the window, and what holds more than it shows. A table of all metrics is meant to be moved sideways, a question's
# one line is there again below it, and closed details are not looked at.
CUT_OFF = """() => {
  const width = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > width) found.push(`the page is ${document.documentElement.scrollWidth} wide`);
  for (const element of document.querySelectorAll("body *")) {
    if (element.closest(".skip, .numbers .wide, .q, svg *, details:not([open]) > :not(summary)")) continue;
    const box = element.getBoundingClientRect(), name = `${element.tagName}.${element.className}: ${element.textContent.slice(0, 40)}`;
    if (box.width && (box.left < -1 || box.right > width + 1)) found.push(`${name}: ${box.left} to ${box.right}`);
    if (getComputedStyle(element).overflowX !== "visible" && element.scrollWidth > element.clientWidth + 1) found.push(`${name}: hidden`);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(run: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    (run.folder / "hardware.json").write_text(
        json.dumps({"processor": "AMD EPYC 9B14 96-Core Processor", "cores": 192, "ranks": 8, "nodes": 1})
    )
    name = "study_reference_judge"
    summary = json.loads((ROOT / "docs" / f"{name}.json").read_text(encoding="utf-8"))
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "docs" / name / "cells").glob("*.json")]
    file = ROOT / "configs" / "experiments" / f"{name}.yaml"
    written = yaml.safe_load(file.read_text(encoding="utf-8"))["arms"]
    arms = {arm: ["trained", *(f"{key}: {value}" for key, value in said.items())] for arm, said in written.items()}
    results = {(cell["arm"], cell["seed"]): cell for cell in cells}
    folder = tmp_path_factory.mktemp("study")
    command = f"swirl-fast experiment {file}"
    return {
        "run": write_report(run.folder),
        "study": write_experiment_report(folder, name, summary, results, arms, command),
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("name", ["run", "study"])
def test_nothing_is_cut_off_and_nothing_goes_wrong(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str, tmp_path: Path
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(pages[name].as_uri())
    assert page.evaluate(CUT_OFF) == []
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    page.evaluate('document.querySelectorAll("details").forEach(one => one.open = true)')
    assert page.evaluate(CUT_OFF) == []
    if name == "run":  # the script runs: the search shows fewer questions, and a chart says another step
        page.fill("input[name=search]", "no such words")
        assert page.inner_text(".found").startswith("0 of ")
        page.focus(".plot")
        page.keyboard.press("Home")
        assert page.inner_text("figure .at") == "step 1"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor").removeprefix("rgb(").split(",")[0]
    assert (int(background) > 128) == (scheme == "light")
    assert said == [] and (tmp_path / "page.png").stat().st_size > 10_000
    context.close()
