"""How the report on numbers looks. A module for the same reason as template.py; `numbers.render` fills it
in."""

from ecgfm.pages.template import CLOSING, CURVES, LIMITS, MACROS, OPENING, SPLITS, TRAINED

TEMPLATE = (
    MACROS
    + OPENING
    + """\
{%- for table in tables %}
<div class="wide"><table>
<thead><tr><th style="min-width: 15em">{{ table.name }}, {{ table.n | counted("record") }}</th>
<th>mean absolute<br>error</th><th>root mean<br>squared error</th><th>R²</th><th>Pearson r</th><th>mean error</th>
<th>limits of agreement</th></tr></thead>
<tbody>
{%- for name, s in table.models %}
<tr><td>{{ name }}</td><td>{{ number(s.mean_absolute_error) }}</td><td>{{ number(s.root_mean_squared_error) }}</td>
<td>{{ number(s.r2) }}</td><td>{{ number(s.pearson_r) }}</td><td>{{ number(s.mean_error, true) }}</td>
<td data-sort="{{ "" if s.lower_limit is none else s.upper_limit.value - s.lower_limit.value }}">
{%- if s.lower_limit is none %}&ndash;{% else %}{{ s.lower_limit.value | signed }} to {{ s.upper_limit.value | signed }}
<small>{{ s.lower_limit | interval(true) }};<br>{{ s.upper_limit | interval(true) }}</small>{% endif %}</td></tr>
{%- endfor %}
{%- for name, d in table.differences %}
<tr class="stays"><td>{{ name }}<small>paired difference; p {{ d.p | p }}, corrected {{ d.p_holm | p }}</small></td>
<td>{{ number(d.mean_absolute_error, true) }}</td><td></td><td>{{ number(d.r2, true) }}</td><td></td><td></td>
<td></td></tr>
{%- endfor %}
</tbody></table></div>
{%- endfor %}
{%- for sentence in comparison %}
<p>{{ sentence }}</p>
{%- endfor %}
<p class="note">In small type: {{ confidence }} intervals, the middle of {{ r.n_replicates | count }} draws of the test
split's patients with replacement, the same ones for all models. p is two-sided, of the mean absolute errors, by the
same
draws; corrected (Holm) over all differences.</p>
{%- if small %}
<p class="caution">{{ small }}</p>
{%- endif %}
</section>

<section>
<h2>Predicted and true</h2>
{%- for pictures in agreement %}
<figure>{{ pictures }}</figure>
{%- endfor %}
<p class="note">The finetuned model on the test split, a point a record.{{ drawn }} On the right the error over the
mean of both (Bland and Altman 1986), with the mean error and the limits within which 95 % of errors lie where they are
normal and alike at all sizes. A slope there says that extremes are pulled towards the mean.</p>
</section>

{%- if r.parts %}
<section>
<h2>In parts of the test split</h2>
{%- for table in tables %}
<div class="wide"><table>
<thead><tr><th>{{ table.name }}</th><th class="words">part</th><th>records</th><th>patients</th>
<th>mean absolute error</th><th>mean error</th><th>R²</th></tr></thead>
<tbody>
{%- for by, part, s, n_patients in table.parts %}
<tr><td>{% if loop.first or by != loop.previtem[0] %}{{ by }}{% else %}<span class="again">{{ by }}</span>
{%- endif %}</td><td class="words">{{ part }}</td><td>{{ s.n | count }}</td><td>{{ n_patients | count }}</td>
<td>{{ number(s.mean_absolute_error) }}</td><td>{{ number(s.mean_error, true) }}</td><td>{{ number(s.r2) }}</td></tr>
{%- endfor %}
</tbody></table></div>
{%- endfor %}
<p class="note">The finetuned model. A part in which the truth varies little has a low R² however small its errors:
compare parts by their errors.</p>
</section>
{%- endif %}

<section>
<h2>Records in and out</h2>
<figure class="cohort">{{ diagram }}</figure>
"""
    + SPLITS
    + """\
<p class="note">{{ n_listed | count }} listed = {{ n_prepared | count }} prepared + {{ n_rejected | count }} rejected
{%- if n_rejected %} ({{ reasons(r.cohort.rejected) }}){% endif %};
{{ n_prepared | count }} prepared = {{ n_split | count }} in a split + {{ n_excluded | count }} left out
{%- if n_excluded %} ({{ reasons(r.cohort.excluded) }}){% endif %}.</p>
<div class="wide"><table>
<thead><tr><th>label</th><th class="words">split</th><th>known records</th><th>mean</th><th>standard deviation</th></tr>
</thead><tbody>
{%- for table in tables %}{% for split, n, mean, deviation in table.splits %}
<tr><td>{{ table.name }}</td><td class="words">{{ split }}</td><td>{{ n | count }}</td><td>{{ mean }}</td>
<td>{{ deviation }}</td></tr>
{%- endfor %}{% endfor %}
</tbody></table></div>
{%- if r.dropped %}
<p>Left out before training:
{% for name, why in r.dropped.items() %}{{ name }} ({{ why }}){{ "; " if not loop.last }}{% endfor %}.</p>
{%- endif %}
</section>

"""
    + CURVES
    + TRAINED
    + """\
<h3>Baselines</h3>
<p>{{ baselines }}</p>
</section>

{{ cost_mark }}

{{ cards(files) }}

"""
    + LIMITS
    + """\
<li><strong>The mean absolute error</strong> is in the label's own unit: how far off a prediction is on average. The
root
mean squared error counts large errors more.</li>
<li><strong>R²</strong> is the share of the variance among these records that is explained: 0 is no better than knowing
their mean, below 0 is worse. It depends on how much they vary: compare it only on the same records.</li>
<li><strong>Pearson's r</strong> is blind to a constant or proportional error; the mean error and the limits of
agreement
show it.</li>
<li><strong>The intervals</strong> cover the chance of having these patients rather than others from the same source;
they
do not cover another training run, another hospital, or errors in the labels.</li>
<li><strong>A record's number</strong> is the mean over its segments.</li>
"""
    + CLOSING
)
