"""The sections of the report that look further: what is taken for what, and where the records lie."""

from __future__ import annotations

from collections.abc import Sequence

import jinja2
from markupsafe import Markup

from ecgfm.drawing import Cloud
from ecgfm.pages.pictures import cloud_pictures
from ecgfm.scores.confusion import ConfusedPair, ConfusionMatrix
from ecgfm.scores.embedding_map import NONE, OTHER, EmbeddingMap

MOST_PAIRS = 15

_SHARE = """\
{%- macro share(value) -%}{{ "%.1f" | format(100 * value) }} %{%- endmacro -%}
"""

CONFUSION = (
    _SHARE
    + """\
<section>
<h2>What is taken for what</h2>
{%- if matrix %}
<div class="wide"><table class="matrix">
<thead><tr><th class="words">true class</th>{% for name in matrix.classes %}<th>called {{ name }}</th>{% endfor %}
<th>records</th></tr></thead>
<tbody>
{%- for name in matrix.classes %}{% set row = loop.index0 %}{% set n = matrix.counts[row].sum() %}
<tr><td>{{ name }}</td>
{%- for other in matrix.classes %}{% set count = matrix.counts[row, loop.index0] %}
<td{% if count %} style="background: rgba({{ "0, 114, 178" if loop.index0 == row else "213, 94, 0" }},
{{- "%.2f" | format(0.45 * matrix.shares[row, loop.index0]) }})"{% endif %}>{{ count | count }}
{%- if n %}<small>{{ share(matrix.shares[row, loop.index0]) }}</small>{% endif %}</td>
{%- endfor %}<td>{{ n | count }}</td></tr>
{%- endfor %}
</tbody></table></div>
<p class="note">Test records by true class and by the class that the finetuned model finds most probable. In small type:
the share of the records of the true class.</p>
{%- elif pairs %}
<div class="wide"><table>
<thead><tr><th>there and missed</th><th class="words">called and not there</th><th>records</th>
<th>of records with the missed</th><th>of false calls of the other</th></tr></thead>
<tbody>
{%- for p in pairs[:most] %}
<tr><td>{{ p.missed }}</td><td class="words">{{ p.called }}</td><td>{{ p.n | count }}</td>
<td>{{ share(p.n / p.with_missed) }}<small>{{ p.n | count }}/{{ p.with_missed | count }}</small></td>
<td>{{ share(p.n / p.falsely_called) }}<small>{{ p.n | count }}/{{ p.falsely_called | count }}</small></td></tr>
{%- endfor %}
</tbody></table></div>
<p class="note">Test records in which one finding is there and the finetuned model misses it, while it calls another
that is not there, at the stored thresholds{% if pairs | length > most %}: the {{ most }} most frequent of
{{ pairs | length }} pairs{% endif %}. Where several are missed or called, each pair counts.</p>
{%- else %}
<p>No finding of a test record is missed where another is called in error.</p>
{%- endif %}
</section>
"""
)

MAP = (
    _SHARE
    + """\
<section>
<h2>Where the records lie</h2>
<figure>{{ pictures }}
<figcaption>Embeddings of the pretrained encoder, before any label was used, on the first two principal components of
the {{ n | counted("test record") }}{% if fewer %} ({{ drawn | count }} of them drawn, at random){% endif %}. Each
record has the colour of the finding in it that is rarest among them{{ more }}. What lies together here may still be
apart in other directions: the axes hold {{ share(explained) }} of the variance.</figcaption></figure>
</section>
"""
)


def sections(
    environment: jinja2.Environment,
    confusion: Sequence[ConfusedPair] | ConfusionMatrix,
    embedding_map: EmbeddingMap | None,
) -> Markup:
    """The sections. environment: with the report's filters"""
    matrix, pairs = (confusion, ()) if isinstance(confusion, ConfusionMatrix) else (None, confusion)
    page = environment.from_string(CONFUSION).render(matrix=matrix, pairs=pairs, most=MOST_PAIRS)
    if embedding_map:
        by_finding, by_other = embedding_map.colourings
        page += environment.from_string(MAP).render(
            pictures=cloud_pictures(_clouds(embedding_map)),
            n=embedding_map.n_records,
            drawn=len(by_finding.groups),
            fewer=len(by_finding.groups) < embedding_map.n_records,
            more="; records of the other splits lie on the same axes" if by_other.by == "split" else "",
            explained=sum(embedding_map.explained),
        )
    return Markup(page)


def _clouds(embedding_map: EmbeddingMap) -> list[Cloud]:
    axes = [f"component {n} ({share:.1%} of the variance)" for n, share in enumerate(embedding_map.explained, start=1)]
    return [
        Cloud(
            f"by {one.by}",
            axes[0],
            axes[1],
            one.points,
            one.groups,
            one.order,
            rest=sum(name not in (OTHER, NONE) for name in one.order),
        )
        for one in embedding_map.colourings
    ]
