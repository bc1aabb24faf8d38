"""Tables that sort, in a browser; where there is none, that the page needs no script to be read."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_pages_findings import FILES, Page, report

from ecgfm.pages.findings import render
from ecgfm.pages.template import SORT_SCRIPT

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"

TABLE = f"""<table id="t">
<thead><tr class="groups"><th></th><th colspan="3">of the model</th><th></th></tr>
<tr><th>finding</th><th>records</th><th>AUROC</th><th>share</th><th><div class="scale"><span>0</span></div></th></tr>
</thead><tbody>
<tr><td>b</td><td>1,200</td><td>0.75<small>0.9{DASH}1</small></td><td>5.0 %</td><td>bar</td></tr>
<tr><td>C<small>maximum</small></td><td>90</td><td>{DASH}</td><td>40.0 %</td><td>bar</td></tr>
<tr><td>10 of 12</td><td>300</td><td>{MINUS}0.100<small>0.0{DASH}0.1</small></td><td>&lt; 0.001</td><td>bar</td></tr>
<tr><td>9 of 12</td><td data-sort="7">few</td><td>+0.900<small>0.1</small></td><td>100.0 %</td><td>bar</td></tr>
<tr class="macro"><td>mean</td><td>2</td><td>0.1</td><td>0.0 %</td><td>bar</td></tr>
</tbody></table>
<table id="short"><thead><tr><th>finding</th></tr></thead><tbody>
<tr><td>3</td></tr><tr><td>1</td></tr><tr><td>2</td></tr></tbody></table>"""

PROBE = """
function first(id) { return Array.from(document.querySelectorAll("#" + id + " tbody tr")).map(function (row) {
  return row.cells[0].firstChild.textContent; }); }
function sorts() { return Array.from(document.querySelectorAll("th")).filter(function (th) {
  return th.hasAttribute("aria-sort"); }).map(function (th) { return th.getAttribute("aria-sort"); }); }
var said = [{rows: first("t"), short: first("short"), sorts: sorts()}];
STEPS.forEach(function (step) {
  var button = document.querySelectorAll("#t thead tr:last-child th")[step.column].querySelector("button");
  if (step.key) { button.focus(); }
  (step.key ? document.activeElement : button).click();
  said.push({rows: first("t"), sorts: sorts(), focus: document.activeElement.tagName});
});
var out = document.createElement("pre"); out.id = "said"; out.textContent = JSON.stringify(said);
document.body.appendChild(out);
"""

browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium to run a page's script in")


def seen(tmp_path: Path, page: str) -> str:
    """What a browser makes of a page."""
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    quiet = ("--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    command = [
        str(BROWSER),
        *("--headless", "--no-sandbox", "--no-first-run", "--virtual-time-budget=2000"),
        *quiet,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        f"file://{tmp_path}/page.html",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def clicked(tmp_path: Path, steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the table above before and after each click."""
    probe = PROBE.replace("STEPS", json.dumps(list(steps)))
    dumped = seen(tmp_path, f"<!DOCTYPE html><body>{TABLE}<script>{SORT_SCRIPT}</script><script>{probe}</script>")
    said = re.search(r'<pre id="said">(.*?)</pre>', dumped, re.DOTALL)
    assert said, dumped[-2000:]
    found: list[dict[str, Any]] = json.loads(html.unescape(said.group(1)))
    return found


@browser
def test_a_click_sorts_and_another_turns_it_round(tmp_path: Path) -> None:
    states = clicked(tmp_path, [{"column": column} for column in (1, 1, 2, 2, 3, 0, 0)])
    before, records, records_down, auroc, auroc_down, share, names, names_down = (state["rows"] for state in states)
    assert before == ["b", "C", "10 of 12", "9 of 12", "mean"]
    assert records == ["9 of 12", "C", "10 of 12", "b", "mean"]  # 7 (data-sort), 90, 300, 1,200
    assert records_down == ["b", "10 of 12", "C", "9 of 12", "mean"]
    assert auroc == ["10 of 12", "b", "9 of 12", "C", "mean"]  # by the point and not its interval; what is missing last
    assert auroc_down == ["9 of 12", "b", "10 of 12", "C", "mean"]
    assert share == ["10 of 12", "b", "C", "9 of 12", "mean"]
    assert names == ["9 of 12", "10 of 12", "b", "C", "mean"]
    assert names_down == ["C", "b", "10 of 12", "9 of 12", "mean"]


@browser
def test_the_head_says_how_it_is_sorted_and_can_be_reached_by_key(tmp_path: Path) -> None:
    states = clicked(tmp_path, [{"column": 1, "key": True}, {"column": 1, "key": True}, {"column": 2, "key": True}])
    assert [state["sorts"] for state in states] == [
        ["none"] * 4,  # neither the groups nor the scale, nor the table of three rows
        ["none", "ascending", "none", "none"],
        ["none", "descending", "none", "none"],
        ["none", "none", "ascending", "none"],
    ]
    assert {state["focus"] for state in states[1:]} == {"BUTTON"}
    assert states[0]["short"] == ["3", "1", "2"]


@browser
def test_the_report_itself_sorts_under_its_own_policy(tmp_path: Path) -> None:
    """The page's policy lets its script run, and the rows that belong below stay there."""
    page = render(report(), FILES)
    probe = """<script>document.querySelectorAll("th button").forEach(function (button) {
      button.click(); button.click(); });</script>"""
    dumped = seen(tmp_path, page.replace("</body>", f"{probe}</body>"))
    assert dumped.count('aria-sort="descending"') >= 4
    tables = re.findall(r"<tbody>.*?</tbody>", dumped, re.DOTALL)
    with_macro = [table for table in tables if 'class="macro"' in table]
    assert with_macro
    for table in with_macro:
        assert table.rfind("<tr") == table.index('<tr class="macro"')


def test_without_the_script_every_row_and_head_is_there() -> None:
    page = render(report(), FILES)
    bare = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "<button" not in bare
    assert Page(bare).text == Page(page).text
    assert "macro mean" in Page(bare).text
