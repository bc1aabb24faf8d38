"""How the report looks: one HTML page without scripts, fonts or pictures from elsewhere. Its one script sorts tables.

A module and not a data file, so that a change of it is a change of the code that the evaluation's key is made of.
`findings.render` fills it in.
"""

from __future__ import annotations

import base64

from markupsafe import Markup, escape

STYLE = """
:root { --ink: #16202a; --quiet: #5b6773; --line: #dde2e7; --soft: #f6f8f9; --accent: #0072b2; --warm: #d55e00; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  Helvetica, Arial, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 28px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; font-weight: 650; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 48px 0 10px; padding-top: 14px; border-top: 1px solid var(--line); font-weight: 650; }
h3 { font-size: 16px; margin: 26px 0 6px; font-weight: 650; }
p, li { max-width: 76ch; }
p { margin: 8px 0; }
.quiet, figcaption, .note { color: var(--quiet); }
.note { font-size: 14px; }
.lead { font-size: 17px; margin-top: 18px; }
.wide { overflow-x: auto; margin: 14px 0; background: linear-gradient(to left, #fff 30%, #fff0) 100% 0 / 40px 100%
  no-repeat local, linear-gradient(to left, #00000026, #0000) 100% 0 / 14px 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: 14px; line-height: 1.4; }
th, td { padding: 6px 18px 6px 0; text-align: right; vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
td.words, th.words { text-align: left; white-space: normal; }
td.text, th.text { text-align: left; }
thead th { color: var(--quiet); font-weight: 500; border-bottom: 1px solid var(--ink); vertical-align: bottom;
  white-space: normal; }
tbody tr + tr td { border-top: 1px solid var(--line); }
tbody tr.macro td { border-top: 1px solid var(--ink); font-weight: 600; }
thead tr.groups th { border-bottom: 0; text-align: left; color: var(--ink); font-weight: 600; }
th button { all: unset; cursor: pointer; }
th button::after { content: "\\a0\\2195"; opacity: .35; }
th[aria-sort="ascending"] button::after { content: "\\a0\\2191"; opacity: 1; }
th[aria-sort="descending"] button::after { content: "\\a0\\2193"; opacity: 1; }
th button:hover { color: var(--ink); }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.again { visibility: hidden; }
.sorted .again { visibility: visible; }
td small { display: block; color: var(--quiet); font-size: 12px; font-weight: 400; }
.scale { display: flex; justify-content: space-between; }
.scale, .bar { width: 140px; }
.bar { position: relative; height: 14px; margin-top: 3px; border-left: 1px solid var(--line);
  border-right: 1px solid var(--line); background: linear-gradient(var(--line), var(--line)) 50% 0 / 1px 100%
no-repeat; }
.bar i { position: absolute; top: 6px; height: 2px; background: var(--accent); opacity: .55; }
.bar b { position: absolute; top: 3px; width: 8px; height: 8px; margin-left: -4px; border-radius: 50%;
  background: var(--accent); }
.panels { display: flex; flex-wrap: wrap; gap: 4px 0; }
.panels img { width: 50%; }
.panels .half { width: 25%; }
.panels .half img { width: 100%; }
.panels.clouds img { width: min(50%, 500px); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 22px; font-size: 13px; margin-bottom: 6px; }
.legend svg { width: 30px; height: 8px; margin-right: 7px; }
.matrix td, .matrix thead th { text-align: center; padding: 5px 9px; }
.matrix td:first-child, .matrix thead th:first-child { text-align: left; padding-left: 0; }
details { margin: 12px 0; }
summary { cursor: pointer; font-weight: 600; }
details pre { background: var(--soft); border: 1px solid var(--line); padding: 12px 14px; font-size: 12px;
  line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 14px 0 22px; }
figure img { display: block; max-width: 100%; height: auto; }
figure.ecg img { width: 100%; border: 1px solid var(--line); }
figcaption { font-size: 14px; margin-top: 6px; max-width: 90ch; }
dl.config { columns: 3 270px; column-gap: 40px; font-size: 13px; margin: 8px 0; line-height: 1.45; }
dl.config div { display: flex; justify-content: space-between; gap: 12px; break-inside: avoid;
  border-bottom: 1px solid var(--line); padding: 2px 0; }
dl.config dt { color: var(--quiet); overflow-wrap: anywhere; }
dl.config dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
.sign { display: inline-block; width: 1em; height: 1em; vertical-align: -.15em; border: 1px solid #bbb; }
.sign.for { background: #0072b270; }
.sign.against { background: #d55e0070; }
.leak { border: 2px solid #b00020; color: #b00020; padding: 10px 16px; margin: 16px 0; }
.caution { border-left: 3px solid var(--warm); padding: 4px 0 4px 16px; margin: 16px 0; }
@media screen and (max-width: 760px) {
  main { padding: 24px 18px 48px; }
  .lead { font-size: 16px; }
  .panels img, .panels.clouds img { width: 100%; }
  .panels .half { width: 50%; }
  figure.ecg { overflow-x: auto; }
  figure.ecg img { width: 860px; max-width: none; }
  table { font-size: 13px; }
  td small { font-size: 11px; }
  th, td { padding-right: 10px; }
  th:first-child, td:first-child { min-width: 96px; }
  td.words { min-width: 84px; }
  .scale, .bar { width: 70px; }
}
@media print {
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  h2 { margin-top: 28px; }
  h2, h3 { break-after: avoid; }
  .panels img, figure.ecg, tr { break-inside: avoid; }
  .legend { break-after: avoid; }
  th button::after { content: none; }
  .wide { overflow: visible; background: none; }
  table { font-size: 9pt; }
  th, td { padding-right: 9px; }
  th:first-child, td:first-child { min-width: 96px; }
  td.words { min-width: 84px; }
  .scale, .bar { width: 64px; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  @page { margin: 15mm; }
}
"""

SORT_SCRIPT = """
document.querySelectorAll("table").forEach(function (table) {
  var body = table.tBodies[0], head = table.tHead;
  if (!head || !body) return;
  var rows = Array.from(body.rows), stay = rows.filter(function (row) { return row.matches(".macro, .stays"); });
  var free = rows.filter(function (row) { return stay.indexOf(row) < 0; });
  if (free.length < 4) return;
  function shown(row, column) {  // without the small type: the interval, the share
    var cell = row.cells[column];
    return cell.dataset.sort || Array.from(cell.childNodes).filter(function (node) {
      return node.nodeName !== "SMALL"; }).map(function (node) { return node.textContent; }).join("").trim();
  }
  function missing(text) { return text === "" || text === "\\u2013"; }
  function number(text) {
    var plain = text.replace(/[\\s,%<]/g, "").replace("\\u2212", "-");
    return plain === "" ? NaN : Number(plain);
  }
  function sort(column, reverse) {
    var values = new Map(free.map(function (row) { return [row, shown(row, column)]; }));
    var there = free.filter(function (row) { return !missing(values.get(row)); });
    var numeric = there.every(function (row) { return !isNaN(number(values.get(row))); });
    there.sort(function (a, b) {
      var first = values.get(reverse ? b : a), second = values.get(reverse ? a : b);
      return numeric ? number(first) - number(second) : first.localeCompare(second, "en", {numeric: true});
    });
    there.concat(free.filter(function (row) { return missing(values.get(row)); }), stay).forEach(function (row) {
      body.appendChild(row); });
    table.classList.add("sorted");
  }
  var heads = Array.from(head.rows[head.rows.length - 1].cells);
  heads.forEach(function (th, column) {
    if (!th.textContent.trim() || th.querySelector(".scale")) return;
    var button = document.createElement("button");
    button.type = "button";
    while (th.firstChild) button.appendChild(th.firstChild);
    th.appendChild(button);
    th.setAttribute("aria-sort", "none");
    button.addEventListener("click", function () {
      var reverse = th.getAttribute("aria-sort") === "ascending";
      heads.forEach(function (other) { if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none"); });
      th.setAttribute("aria-sort", reverse ? "descending" : "ascending");
      sort(column, reverse);
    });
  });
});
"""
"""Makes the head of every table with more than three rows a button that sorts by its column: numbers as numbers, what
is missing last, a second click the other way. Rows of class `macro` or `stays` stay at the bottom; a cell's
`data-sort` stands for its text. Without it the page says the same."""

COST_MARK = "<!-- what it cost -->"
"""Where a run puts what its stages cost (cost.py): a stage's own output holds no seconds."""

MACROS = """\
{%- macro number(estimate, sign=false) -%}
{%- if estimate is none -%}&ndash;{%- else -%}
{{ (estimate.value | signed) if sign else (estimate.value | decimals) }}<small>{{ estimate | interval(sign) }}</small>
{%- endif -%}
{%- endmacro -%}
{%- macro bar(estimate) -%}
{%- if estimate is not none -%}
<div class="bar" role="presentation">
{%- if estimate.low is not none -%}
<i style="left:{{ estimate.low | percent }};width:{{ (estimate.high - estimate.low) | percent }}"></i>
{%- endif -%}
<b style="left:{{ estimate.value | percent }}"></b></div>
{%- endif -%}
{%- endmacro -%}
{%- macro cards(files) -%}
{%- if files %}
<section>
<h2>Cards</h2>
<p class="note">Made from the facts of this evaluation and of its inputs; they lie beside this page.</p>
{%- for name, (title, content) in files.items() %}
<details><summary>{{ title }} ({{ name }})</summary>
<pre>{{ content }}</pre></details>
{%- endfor %}
</section>
{%- endif %}
{%- endmacro -%}
{%- macro reasons(counts) -%}
{% for why, n in counts.items() %}{{ n | count }} {{ why | words }}{{ ", " if not loop.last }}{% endfor %}
{%- endmacro -%}
"""

OPENING = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>ECG model evaluation: {{ r.cohort.listed.keys() | join(", ") }}</title>
<link rel="icon" href="data:,">
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<h1>ECG foundation model: evaluation</h1>
<div class="quiet">{{ r.cohort.listed.keys() | join(", ") }} · {{ subject }} ·
{{ finetuned.n_records | counted("test record") }}</div>
</header>

<section>
{%- if r.leak %}
<p class="leak"><strong>The model knows the test split:</strong> {{ r.leak }}. These numbers are better than on
recordings that it does not know.</p>
{%- endif %}
{%- if not r.training_is_known %}
<p class="caution">What the encoder was trained on is not known: whether it has seen these records cannot be
checked.</p>
{%- endif %}
<p class="lead">{{ summary }}</p>
"""
"""Up to the headline. Filled in: r, style, subject (what is predicted, in words), finetuned, summary."""

SPLITS = """\
<div class="wide"><table>
<thead><tr><th>Split</th><th>records</th><th>patients</th><th>segments</th><th>pairs for pretraining</th>
<th>labelled records</th><th>labelled segments</th></tr></thead>
<tbody>
{%- for split, c in r.cohort.splits.items() %}
<tr><td>{{ split }}</td><td>{{ c.records | count }}</td>
<td>{{ (c.known_patients | count) if c.known_patients else "unknown" }}</td>
<td>{{ c.segments | count }}</td><td>{{ "none" if c.pairs is none else c.pairs | count }}</td>
<td>{{ c.labelled_records | count }}</td><td>{{ c.labelled_segments | count }}</td></tr>
{%- endfor %}
</tbody></table></div>
"""

CURVES = """\
<section>
<h2>Training</h2>
{%- for training in trainings %}
<h3>{{ training.name }}</h3>
<figure>{{ training.figure }}<figcaption>{{ training.caption }}</figcaption></figure>
{%- endfor %}
</section>

"""

TRAINED = """\
<section>
<h2>What was trained</h2>
{%- for training in trainings %}
<h3>{{ training.name }}</h3>
<div class="wide"><table><tbody>
{%- for name, value in training.facts %}<tr><td class="quiet">{{ name }}</td><td class="words">{{ value
}}</td></tr>{% endfor %}
</tbody></table></div>
<dl class="config">
{%- for name, value in training.config %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}
</dl>
{%- endfor %}
"""
"""Left open, for what is said of baselines."""

LIMITS = """\
<section>
<h2>How to read this, and its limits</h2>
<ul>
<li><strong>Not a medical device.</strong> This page describes a model under development. Nothing here may guide the
care of a patient.</li>
{%- if "synthetic" in r.cohort.listed %}
<li><strong>Synthetic ECGs</strong> are drawn by a formula. How well they are told apart shows that the pipeline works,
and says nothing about patients.</li>
{%- endif %}
"""
"""A list, left open."""

CLOSING = """\
</ul>
</section>
</main>
<script>{{ script }}</script>
</body>
</html>
"""

TEMPLATE = (
    MACROS
    + OPENING
    + """\
<div class="wide"><table>
<thead><tr><th>On the {{ finetuned.n_records | counted("test record") }}</th><th>macro AUROC</th>
<th><div class="scale"><span>0</span><span>0.5</span><span>1</span></div></th><th>macro AUPRC</th>
<th><div class="scale"><span>0</span><span>0.5</span><span>1</span></div></th></tr></thead>
<tbody>
{%- for key, name in models.items() %}
<tr><td>{{ name }}</td><td>{{ number(r.scores[key].macro_auroc) }}</td><td>{{ bar(r.scores[key].macro_auroc) }}</td>
<td>{{ number(r.scores[key].macro_auprc) }}</td><td>{{ bar(r.scores[key].macro_auprc) }}</td></tr>
{%- endfor %}
{%- for key, name in differences.items() %}{% set d = r.scores[key] %}
<tr class="stays"><td>{{ name }}<small>paired difference</small></td>
<td>{{ number(d.macro_auroc, true) }}</td><td></td><td>{{ number(d.macro_auprc, true) }}</td><td></td></tr>
{%- endfor %}
</tbody></table></div>
<p>{{ comparison }}</p>
<p class="note">{{ meaning }}</p>
{%- if small %}
<p class="caution">{{ small }}</p>
{%- endif %}
</section>

<section>
<h2>Records in and out</h2>
<figure class="cohort">{{ diagrams[0] }}</figure>
{%- if diagrams | length > 1 %}
<details><summary>Source by source</summary>
{%- for one in diagrams[1:] %}<figure class="cohort">{{ one }}</figure>{% endfor %}
</details>
{%- endif %}
"""
    + SPLITS
    + """\
<p class="note">Every listed record is prepared or rejected, and every prepared one is in one split or left out, each
with
its reason: {{ n_listed | count }} = {{ n_prepared | count }} + {{ n_rejected | count }};
{{ n_prepared | count }} = {{ n_split | count }} + {{ n_excluded | count }}.
{% if unlabelled %}{{ unlabelled | counted("record") }} in a split {{ "has" if unlabelled == 1 else "have" }} no
published label: pretraining uses them, finetuning and this evaluation do not. {% endif %}

{% if n_rejected %}Rejected: {{ reasons(r.cohort.rejected) }}. {% endif %}

{% if n_excluded %}Left out: {{ reasons(r.cohort.excluded) }}.{% endif %}</p>
</section>

<section>
<h2>Per finding</h2>
<div class="wide"><table>
<thead>
<tr class="groups"><th></th><th></th><th></th><th colspan="2" class="words">Finetuned model</th>
<th colspan="2" class="words">Linear probe, pretrained</th>
<th colspan="2" class="words">{{ "Most probable" if r.assessment.classes else "At one threshold" }},
finetuned</th></tr>
<tr><th>finding</th><th>records</th><th>present</th><th>AUROC</th><th>AUPRC</th><th>AUROC</th><th>AUPRC</th>
<th>sensitivity</th><th>specificity</th></tr></thead>
<tbody>
{%- for row in findings %}
<tr><td>{{ row.label }}{% if row.aggregation == "max" %}<small>maximum over segments</small>{% endif %}</td>
<td>{{ row.scores.n | count }}</td>
<td>{{ row.scores.positives | count }}<small>{{ row.prevalence }}</small></td>
<td>{{ number(row.scores.auroc) }}</td><td>{{ number(row.scores.auprc) }}</td>
<td>{{ number(row.probe.auroc) }}</td><td>{{ number(row.probe.auprc) }}</td>
<td>{{ row.sensitivity[0] }}<small>{{ row.sensitivity[1] }}</small></td>
<td>{{ row.specificity[0] }}<small>{{ row.specificity[1] }}</small></td></tr>
{%- endfor %}
<tr class="macro"><td>macro mean</td><td></td><td></td>
<td>{{ number(finetuned.macro_auroc) }}</td><td>{{ number(finetuned.macro_auprc) }}</td>
<td>{{ number(r.scores["probe"].macro_auroc) }}</td><td>{{ number(r.scores["probe"].macro_auprc)
}}</td><td></td><td></td></tr>
</tbody></table></div>
<p class="note">In small type: {{ confidence }} intervals. An AUROC of 0.5 is chance; for the AUPRC chance is the
share of
records in which the finding is present, in small type below their number. {% if r.assessment.classes %}The
findings exclude each other: the most probable one of a record is called; sensitivity and specificity are with the
counts behind them.{% else %}The threshold of a finding is the one of the best F1 on the valid split; sensitivity and
specificity are those of the test split at that threshold, with the counts behind them.{% endif %}
{{ unknown_note }} {{ replicate_note }}</p>
{%- if finetuned.left_out %}
<p class="caution">Not scored and not in the macro mean, since the test split has records of one kind only:
{{ finetuned.left_out | join(", ") }}.</p>
{%- endif %}
</section>

{{ published }}

{{ assessment }}
{{ between }}

{{ exploration }}

<section>
<h2>ROC and precision&ndash;recall curves</h2>
<figure>{{ roc }}
<figcaption>ROC, one panel per finding, with the records that have it of all that are known. The grey diagonal is
chance.</figcaption>
</figure>
<figure>{{ pr }}
<figcaption>Precision&ndash;recall. Precision is the positive predictive value, recall the sensitivity. The grey line
is chance:
the share of records with the finding.</figcaption></figure>
</section>

"""
    + CURVES
    + """\
{%- if ecgs %}
<section>
<h2>{{ ecgs | length | counted("ECG") | capitalize_first }} of the test split, with saliency</h2>
<p class="note">Chosen by rule, not by hand. An error is shaded lead by lead by the integrated gradients of the finding
that it is about: <span class="sign for"></span> speaks for the finding, <span class="sign against"></span> against it.
Every other ECG has the attention of the finetuned model's last layer, <span class="sign for"></span>, for all leads and
findings together, scaled within each segment: where it looks, which is no proof of why a finding was called. Each lead
is drawn about its median.</p>
{%- for ecg in ecgs %}
<h3>{{ ecg.why }}</h3>
<figure class="ecg"><img alt="ECG of record {{ ecg.record_id }}" src="{{ ecg.image }}">
<figcaption>{{ ecg.caption }}</figcaption></figure>
<div class="wide"><table>
<thead><tr><th>finding</th><th class="words">in the record</th><th class="words">by the model</th><th>probability</th>
<th>threshold</th></tr></thead>
<tbody>
{%- for row in ecg.rows %}
<tr><td>{{ row.label }}</td><td class="words">{{ row.truth }}</td><td class="words">{{ row.called }}</td>
<td>{{ row.probability | decimals }}</td><td>{{ row.threshold | decimals }}</td></tr>
{%- endfor %}
</tbody></table></div>
{%- endfor %}
</section>
{%- endif %}

"""
    + TRAINED
    + """\
<h3>Linear probes</h3>
<p>Logistic regression per finding on the standardised mean embedding of each record, the encoder frozen; the L2
penalty is
chosen by macro AUPRC on the valid split
({% for name, c in probes %}{{ name }}: C = {{ c }}{{ "; " if not loop.last }}{% endfor %}).</p>
</section>

{{ cost_mark }}

{{ cards(files) }}

<section>
<h2>Findings left out</h2>
{%- if r.dropped %}
<div class="wide"><table><thead><tr><th>finding</th><th class="words">why</th></tr></thead><tbody>
{%- for name, why in r.dropped.items() %}<tr><td>{{ name }}</td><td class="words">{{ why }}</td></tr>{% endfor %}
</tbody></table></div>
{%- else %}
<p>None: every finding of the label scheme has records with and without it in all three splits.</p>
{%- endif %}
</section>

"""
    + LIMITS
    + """\
<li><strong>AUROC</strong> is the chance that a record with the finding gets a higher probability than one without.
<strong>AUPRC</strong> (average precision) is the mean positive predictive value over all sensitivities; it depends
on how
common the finding is, so compare it only between models on the same records.</li>
<li><strong>The macro mean</strong> gives each finding the same weight, the rare and the common.</li>
<li><strong>The intervals</strong> are {{ confidence }} percentile intervals of {{ r.n_replicates | count }}
bootstrap replicates
over the patients of the test split. They cover the chance of having these patients rather than others from the same
source;
they do not cover another training run, another hospital, or errors in the labels.</li>
<li><strong>The labels</strong> are those that the source publishes. Where these are wrong, so is the score.</li>
<li><strong>The probabilities</strong> are calibrated on the valid split, a finding with few records there not at all.
They hold where the finding is as common as there: read them as risks no further than the calibration above allows.</li>
<li><strong>A record's probability</strong> is the mean over its segments, or the maximum where a finding can be in
one
segment alone (marked in the table).</li>
"""
    + CLOSING
)


def svg_image(svg: str, description: str) -> Markup:
    """A picture of its own, so that the names inside one SVG do not meet those of another."""
    data = base64.b64encode(svg.encode()).decode()
    return Markup('<img alt="{}" src="data:image/svg+xml;base64,{}">').format(escape(description), data)
