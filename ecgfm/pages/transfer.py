"""The section of the report about what is lost from one published dataset to another."""

from __future__ import annotations

import jinja2
from markupsafe import Markup

from ecgfm.pages.template import MACROS
from ecgfm.scores.between_sources import JOINED, BetweenSources

SECTIONS = (
    MACROS
    + """\
<section>
<h2>From one dataset to another</h2>
{%- if joined %}
<p class="note">Datasets that hold the same ECGs count as one, and are named together (=).</p>
{%- endif %}
{%- if b.left_out %}
<h3>A probe that has not seen a dataset</h3>
<div class="wide"><table>
<thead><tr><th>test records of</th><th>records</th><th>findings</th><th class="words">macro</th><th>seen</th>
<th>not seen</th><th>difference</th></tr></thead>
<tbody>
{%- for o in b.left_out %}{% for name, measure in measures.items() %}
<tr><td>{% if loop.first %}{{ o.origin }}{% else %}<span class="again">{{ o.origin }}</span>{% endif %}</td>
<td>{{ o.seen.n_records | count }}{% if loop.first %}<small>{{ o.seen.n_patients | counted("patient") }}</small>{% endif
%}</td>
<td>{{ (o.seen.labels | length) - (o.seen.left_out | length) }}</td><td class="words">{{ name }}</td>
<td>{{ number(o.seen[measure]) }}</td><td>{{ number(o.unseen[measure]) }}</td>
<td>{{ number(o.difference[measure], true) }}</td></tr>
{%- endfor %}{% endfor %}
</tbody></table></div>
<p class="note">The linear probe on the pretrained encoder, fitted with all train and valid records (seen) and without
those of the dataset (not seen: {% for o in b.left_out %}{{ o.n_train | counted("train record") }} fewer without
{{ o.origin }}{{ "; " if not loop.last }}{% endfor %}), both on the dataset's test records. What is held back are
labels: pretraining may have used the recordings.
{%- for o in b.left_out if o.not_learnt %} Not learnt without {{ o.origin }}, and in none of its numbers:
{{ o.not_learnt | join(", ") }}.{% endfor %}</p>
{%- endif %}
{%- if b.transfers %}
<h3>Thresholds of another dataset</h3>
<div class="wide"><table>
<thead><tr><th>macro F1 at thresholds fitted on</th>{% for to in applied %}<th>test records of<br>{{ to }}</th>{% endfor
%}</tr></thead>
<tbody>
{%- for row in rows %}
<tr><td>{{ row.fitted_on }}</td>
{%- for cell in row.cells %}<td>
{%- if cell is none %}&ndash;
{%- elif cell.difference is none %}<strong>{{ cell.macro_f1.value | decimals }}</strong>
<small>{{ cell.macro_f1 | interval(false) }}</small><small>its own, {{ cell.labels | length | counted("finding")
}}</small>
{%- else %}{{ number(cell.macro_f1) }}<small>{{ cell.difference.value | signed }} to its own</small>
<small>{{ cell.difference | interval(true) }}</small><small>{{ cell.labels | length | counted("finding") }}</small>
{%- endif %}</td>
{%- endfor %}</tr>
{%- endfor %}
</tbody></table></div>
<p class="note">The finetuned model's decisions. Thresholds are those of the best F1 on the valid records of one
dataset, applied to the test records of each. In bold a dataset's own; below every other number, how much more or less
that is than the own thresholds give for the same findings on the same records. Sensitivity and specificity of each
finding, with counts, are in metrics.json.</p>
{%- endif %}
{%- for what, untold in (("probe without", b.no_probe), ("thresholds of", b.no_threshold)) if untold %}
<p class="note">No {{ what }}: {% for one in untold %}{{ one.of }} ({{ one.why }}){{ "; " if not loop.last }}{% endfor
%}.</p>
{%- endfor %}
</section>
"""
)


MEASURES = {"AUROC": "macro_auroc", "AUPRC": "macro_auprc"}


def sections(environment: jinja2.Environment, between: BetweenSources | None) -> Markup:
    """The section; nothing where all records are of one dataset. environment: with the report's filters."""
    if between is None:
        return Markup()
    cells = {(one.fitted_on, one.applied_to): one for one in between.transfers}
    applied = [origin for origin in between.origins if any(to == origin for _, to in cells)]
    rows = [
        {"fitted_on": origin, "cells": [cells.get((origin, to)) for to in applied]}
        for origin in between.origins
        if any(fitted_on == origin for fitted_on, _ in cells)
    ]
    joined = any(JOINED in origin for origin in between.origins)
    return Markup(
        environment.from_string(SECTIONS).render(
            b=between, joined=joined, applied=applied, rows=rows, measures=MEASURES
        )
    )
