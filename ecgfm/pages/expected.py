"""Published results beside those of an evaluation: whose, from where, and on how many records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2
from markupsafe import Markup

from ecgfm.config import Published
from ecgfm.pages.template import MACROS
from ecgfm.scores.metrics import Estimate, Scores

MEASURES = {
    "macro_auroc": "macro AUROC",
    "macro_auprc": "macro AUPRC",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "challenge_score": "Challenge 2021 score",
}


@dataclass(frozen=True)
class Beside:
    """A published number and ours.

    ours: None where it was not scored here; n_records: behind ours
    """

    published: Published
    ours: Estimate | None
    n_records: int


def beside(
    published: Sequence[Published], scores: Mapping[str, Scores], challenge: Estimate | None, n_records: int
) -> tuple[Beside, ...]:
    """Each published number with ours, where there is one: a label may have been left out, or a model not asked.

    scores: by model; challenge: the finetuned model's score; None where the labels are not the Challenge's
    n_records: of the test split
    """
    found = []
    for one in published:
        of_model, n = scores.get(one.ours), n_records
        ours: Estimate | None = None
        if one.measure == "challenge_score":
            ours = challenge if one.ours == "finetuned" else None
        elif of_model is not None and one.label is None:
            ours = getattr(of_model, one.measure)
        elif of_model is not None:
            of_label = next((label for label in of_model.labels if label.label == one.label), None)
            ours, n = (getattr(of_label, one.measure), of_label.n) if of_label else (None, 0)
        found.append(Beside(one, ours, n))
    return tuple(found)


SECTION = (
    MACROS
    + """\
<section>
<h2>Published results beside these</h2>
<div class="wide"><table>
<thead><tr><th>published</th><th>measure</th><th>value</th><th>test records</th><th>here</th><th class="words">by</th>
<th>test records</th><th class="words">source</th></tr></thead>
<tbody>
{%- for b in rows %}
<tr><td>{{ b.published.model }}</td>
<td>{{ measures[b.published.measure] }}{% if b.published.label %}<small>{{ b.published.label }}</small>{% endif %}</td>
<td>{{ b.published.value | decimals }}</td>
<td>{% if b.published.test_records %}{{ b.published.test_records | count }}{% else %}not stated{% endif %}</td>
<td>{{ number(b.ours) }}</td><td class="words">{{ models[b.published.ours] | default(b.published.ours) }}</td>
<td>{{ b.n_records | count }}</td>
<td class="words">{{ b.published.source }}{% if b.published.note %}<small>{{ b.published.note }}</small>{% endif %}</td>
</tr>
{%- endfor %}
</tbody></table></div>
<p class="note">What others have published, as they state it; it was not measured here. Two numbers compare only where
training data and test records are the same: see the counts and the source.</p>
</section>
"""
)


def section(environment: jinja2.Environment, rows: Sequence[Beside], models: Mapping[str, str]) -> Markup:
    """The report's section; empty where nothing published is named. environment: with the report's filters."""
    if not rows:
        return Markup("")
    return Markup(environment.from_string(SECTION).render(rows=rows, measures=MEASURES, models=models))
