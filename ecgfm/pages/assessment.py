"""The sections of the report about an assessment: averages, decisions, calibration, tests, parts, few shots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jinja2
import numpy as np
from markupsafe import Markup

from ecgfm.drawing import Panel, Series
from ecgfm.pages.parts import counted, shortened
from ecgfm.pages.pictures import panel_pictures
from ecgfm.pages.template import MACROS
from ecgfm.scores.assessment import Assessment
from ecgfm.scores.baselines import Shot
from ecgfm.scores.calibration import Calibration
from ecgfm.scores.significance import ALPHA

SECTIONS = (
    MACROS
    + """\
{%- macro to_all(estimate) -%}
{%- if estimate %}<small>{{ estimate.value | signed }} against all<br>{{ estimate | interval(true) }}</small>
{%- endif -%}
{%- endmacro -%}
<section>
<h2>Over all findings</h2>
<div class="wide"><table>
<thead><tr><th>{{ of_model }}</th><th>macro</th><th>weighted</th><th>micro</th><th>findings</th></tr></thead>
<tbody>
{%- for name, average in a.averages.items() %}
<tr><td>{{ measures[name] }}</td><td>{{ number(average.macro) }}</td><td>{{ number(average.weighted) }}</td>
<td>{{ number(average.micro) }}</td><td>{{ average.labels }}</td></tr>
{%- endfor %}
{%- if a.classes %}
<tr class="stays"><td>Accuracy<small>the most probable is right; {{ a.classes.n | counted("record") }}</small></td>
<td></td><td></td><td>{{ number(a.classes.accuracy) }}</td><td></td></tr>
<tr class="stays"><td>Balanced accuracy<small>mean over the findings of the share that is right</small></td>
<td>{{ number(a.classes.balanced_accuracy) }}</td><td></td><td></td><td></td></tr>
{%- endif %}
{%- if a.challenge %}
<tr class="stays"><td>Challenge 2021 score<small>{{ a.challenge.n_records | counted("record") }}{%
if a.challenge.missing %}, without
{{ a.challenge.missing | length }} of its classes{% endif %}</small></td><td>{{ number(a.challenge.score) }}</td>
<td></td><td></td><td></td></tr>
{%- endif %}
</tbody></table></div>
<p class="note">Macro: each finding counts the same. Weighted: by its positives. Micro: all pairs of record and finding
together.{% if a.challenge and a.challenge.missing %} The Challenge's score is that of a smaller task and not to be
compared with published ones.{% endif %}</p>
</section>

<section>
<h2>Decisions</h2>
<div class="wide"><table>
<thead><tr><th>finding</th><th>records</th><th>present</th><th>threshold</th><th>sensitivity</th><th>specificity</th>
<th>PPV</th><th>NPV</th><th>F1</th></tr></thead>
<tbody>
{%- for d in a.decisions %}
<tr><td>{{ d.label }}</td><td>{{ d.n | count }}</td><td>{{ d.positives | count }}</td>
<td>{{ d.point.threshold | decimals }}</td><td>{{ number(d.sensitivity) }}</td><td>{{ number(d.specificity) }}</td>
<td>{{ number(d.ppv) }}</td><td>{{ number(d.npv) }}</td><td>{{ number(d.f1) }}</td></tr>
{%- endfor %}
</tbody></table></div>
<p class="note">{% if a.classes %}The findings exclude each other: the most probable one is called.{% else
%}At the thresholds that the checkpoint holds, fitted on the valid split.{% endif %} PPV and NPV depend on how common
a finding is among these records.</p>
</section>

<section>
<h2>Calibration</h2>
<figure>{{ reliability }}
<figcaption>How often a finding is there, by the probability that the model gave it; bins of
equally many records. On the grey line a probability means what it says.</figcaption></figure>
<div class="wide"><table>
<thead><tr><th>finding</th><th>records</th><th>present</th><th>Brier score</th><th>expected calibration error</th></tr>
</thead><tbody>
{%- for c in a.calibration %}
<tr><td>{{ c.label }}</td><td>{{ c.n | count }}</td><td>{{ c.positives | count }}</td><td>{{ number(c.brier) }}</td>
<td>{{ number(c.ece) }}</td></tr>
{%- endfor %}
</tbody></table></div>
</section>

{%- if a.tests %}
<section>
<h2>Between models</h2>
<div class="wide"><table>
<thead><tr><th>first less second</th><th>measure</th><th>macro difference</th><th>p</th><th>p, corrected</th>
<th>findings that differ</th></tr></thead>
<tbody>
{%- for t in tests %}
<tr><td>{{ t.pair }}</td><td>{{ t.measure }}</td><td>{{ number(t.difference, true) }}</td><td>{{ t.p }}</td>
<td>{{ t.p_holm }}</td><td>{{ t.differ }}</td></tr>
{%- endfor %}
</tbody></table></div>
<p class="note">Paired bootstrap by patient, two-sided; corrected by Holm's method, the macro means as one family and
the findings as another. A finding differs where its corrected p is below {{ alpha }}.</p>
</section>
{%- endif %}

{%- if a.parts %}
<section>
<h2>Parts of the test split</h2>
<div class="wide"><table>
<thead><tr><th>by</th><th class="words">part</th>
<th>records</th><th>patients</th><th>macro AUROC</th><th></th><th>macro AUPRC</th>
<th>findings</th></tr></thead>
<tbody>
{%- for p in a.parts %}
<tr><td>
{%- if loop.first or p.by != loop.previtem.by %}{{ p.by }}{% else %}<span class="again">{{ p.by }}</span>{% endif -%}
</td><td class="words">{{ p.name }}</td>
<td>{{ p.scores.n_records | count }}</td><td>{{ p.scores.n_patients | count }}</td>
<td>{{ number(p.scores.macro_auroc) }}{{ to_all(p.difference and p.difference.macro_auroc) }}</td>
<td>{{ bar(p.scores.macro_auroc) }}</td>
<td>{{ number(p.scores.macro_auprc) }}{{ to_all(p.difference and p.difference.macro_auprc) }}</td>
<td>{{ (p.scores.labels | length) - (p.scores.left_out | length) }}</td></tr>
{%- endfor %}
</tbody></table></div>
<p class="note">A macro mean is over the findings that have records with and without them in the part; where their
number differs, so does the task. Parts are not corrected for being many.
{%- if a.parts | selectattr("difference") | list %} Leads: the same model and records, the other leads zero, as a
missing one is; below, the paired difference from all leads.{% endif %}</p>
</section>
{%- endif %}

{%- if shots %}
<section>
<h2>From few examples</h2>
<figure>{{ shots }}<figcaption>Macro AUROC on the test split of a linear probe that has seen so many records with each
finding, and their share of those without: mean of five draws. Each mean is over the findings that have so many
positives: {{ shot_labels }}. Where their number changes, so does the task.</figcaption></figure>
</section>
{%- endif %}
"""
)

MEASURES = {"auroc": "AUROC", "auprc": "AUPRC", "f1": "F1 of the decisions"}


def sections(
    environment: jinja2.Environment,
    assessment: Assessment,
    shots: Mapping[str, Sequence[Shot]],
    models: Mapping[str, str],
) -> Markup:
    """The sections. environment: with the report's filters; shots: by encoder; models: by name, in words."""
    return Markup(
        environment.from_string(SECTIONS).render(
            a=assessment,
            of_model=models[assessment.of_model],
            measures=MEASURES,
            reliability=panel_pictures(reliability_panels(assessment.calibration), "Reliability"),
            tests=_tests(assessment, models),
            alpha=ALPHA,
            shots=panel_pictures(_shot_panels(shots, models), "Curves of few examples", (5.0, 2.8), 1) if shots else "",
            shot_labels=_shot_labels(shots),
        )
    )


def reliability_panels(calibrations: Sequence[Calibration]) -> list[Panel]:
    """A panel for each finding: how often it is there, over the mean probability of a bin."""
    panels = []
    for one in calibrations:
        if one.positives:
            x, y = (np.array([getattr(b, name) for b in one.bins]) for name in ("mean_probability", "share_present"))
            series = (Series("share present", x, y),)
            title = f"{shortened(one.label)}\n{one.positives:,} of {one.n:,}"
            panels.append(Panel(title, "probability", "share present", series, unit_square=True, diagonal=True))
    return panels


def _tests(assessment: Assessment, models: Mapping[str, str]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for test in assessment.tests:
        if test.label is None:
            of_labels = [
                other
                for other in assessment.tests
                if other.label is not None
                and (other.first, other.second, other.measure) == (test.first, test.second, test.measure)
                and other.p_holm is not None
            ]
            differ = sum(other.p_holm is not None and other.p_holm < ALPHA for other in of_labels)
            rows.append(
                {
                    "pair": f"{models[test.first]} less {models[test.second][0].lower()}{models[test.second][1:]}",
                    "measure": MEASURES[test.measure],
                    "difference": test.difference,
                    "p": shown_p(test.p),
                    "p_holm": shown_p(test.p_holm),
                    "differ": f"{differ} of {len(of_labels)}",
                }
            )
    return rows


def shown_p(value: float | None) -> str:
    """A p value in a table or a sentence."""
    return "\N{EN DASH}" if value is None else f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _shot_panels(shots: Mapping[str, Sequence[Shot]], models: Mapping[str, str]) -> list[Panel]:
    series = []
    for encoder, curve in shots.items():
        scored = [(place, shot.macro_auroc[0]) for place, shot in enumerate(curve) if shot.macro_auroc]
        x, y = np.array([p for p, _ in scored], dtype=float), np.array([value for _, value in scored])
        series.append(Series(f"{encoder} encoder", x, y))
    some = next(iter(shots.values()))
    names = tuple("all" if shot.positives is None else str(shot.positives) for shot in some)
    axes = ("positives per finding", "macro AUROC")
    return [Panel("Linear probe", *axes, tuple(series), level=0.5, x_names=names)]


def _shot_labels(shots: Mapping[str, Sequence[Shot]]) -> str:
    some = next(iter(shots.values()), ())
    findings: dict[int, list[str]] = {}
    for shot in some:
        findings.setdefault(shot.labels, []).append("all" if shot.positives is None else str(shot.positives))
    return "; ".join(f"{counted(n, 'finding')} at {', '.join(at)}" for n, at in findings.items())
