"""A page about one recording and what a model made of it: self-contained HTML, light and printable."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jinja2

if TYPE_CHECKING:
    from ecgfm.checkpoints import Meta
    from ecgfm.inference import Saliency

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ found.record_id }}: {{ found.label or "attention" }}</title>
<style>
:root { color-scheme: light; }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #111; background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
p { max-width: 46rem; margin: .4rem 0; }
.quiet { color: #555; }
.answer { font-size: 1.15rem; }
img { width: 100%; height: auto; display: block; border: 1px solid #ddd; }
figure { margin: 0; break-inside: avoid; }
.sign { display: inline-block; width: 1em; height: 1em; vertical-align: -.15em; border: 1px solid #bbb; }
@media print { body { margin: 0; max-width: none; } }
</style>
</head>
<body>
<h1>{{ found.record_id }}</h1>
{% if found.label is not none -%}
<p class="answer"><b>{{ found.label }}</b>: {{ found.answer }}
{%- if threshold is not none %}, {{ "present" if found.probability >= threshold else "absent" }} at the model's
threshold of {{ "%.3f"|format(threshold) }}{% endif %}.
{%- if n > 1 %} The {{ "highest" if aggregation == "max" else "mean" }} of {{ n }} segments of
{{ "%g"|format(seconds) }} s{% if calibrated %}, calibrated{% endif %}.{% endif %}</p>
{%- endif %}
{% for remark in found.remarks -%}
<p class="quiet">{{ remark }}.</p>
{% endfor -%}
<h2>How to read it</h2>
{% if found.method == "gradient" -%}
<p><span class="sign" style="background: #0072b270"></span>
{{ "speaks for" if found.value is none else "raises" }} {{ found.label }},
<span class="sign" style="background: #d55e0070"></span>
{{ "against it" if found.value is none else "lowers it" }}; the darker, the more. Each lead has its own
shading: integrated gradients of {{ "the label's logit" if found.value is none else "the number" }}, from a baseline of
nothing but each lead's mean, averaged over
{{ "%g"|format(display_ms) }} ms. One scale for all leads and segments; its strongest hundredth is cut.</p>
<p>Before averaging and cutting, a segment's values add up to its {{ what }} less the baseline's
({{ "%.3f"|format(found.baseline_logit) }}), here to within {{ "%.2g"|format(100 * found.completeness_error) }} %.</p>
<p>It says what this model's number depends on, not what is wrong with the heart, nor whether the model is right.</p>
{%- else -%}
<p><span class="sign" style="background: #0072b270"></span> is where the model's last layer looks most, from 0 to 1 in
each segment. A frame of the model is made of all leads together, so the shading is alike in all of them, and it belongs
to no label.</p>
<p>Attention is no explanation: it shows where information was mixed, not what made the answer (Jain and Wallace 2019,
arXiv 1902.10186). The method <i>gradient</i> is of one label and lead by lead.</p>
{%- endif %}
{% for segment in segments -%}
<h2>From {{ "%g"|format(segment.start) }} to {{ "%g"|format(segment.start + seconds) }} s
{%- if segment.probability is not none %}: probability {{ "%.3f"|format(segment.probability) }}{% endif %}
{%- if segment.logit is not none %}{{ ", " if segment.probability is not none else ": " }}{{ what }}
{{ "%.3f"|format(segment.logit) }}{% endif %}</h2>
<figure>
<img alt="The ECG from {{ "%g"|format(segment.start) }} s, shaded" src="data:image/png;base64,{{ segment.png }}">
</figure>
{% endfor -%}
</body>
</html>
"""


def page(found: Saliency, meta: Meta, pictures: Sequence[tuple[int, bytes]]) -> str:
    """The page. pictures: (segment, PNG) of each segment to show"""
    seconds = found.signal_mv.shape[2] / found.sampling_rate_hz
    segments = [
        {
            "start": index * seconds,
            "probability": float(found.probabilities[index]) if found.probability is not None else None,
            "logit": float(found.logits[index]) if found.method == "gradient" else None,
            "png": base64.b64encode(png).decode(),
        }
        for index, png in pictures
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_TEMPLATE).render(
        found=found,
        what="logit" if found.value is None else "number",
        n=len(found.signal_mv),
        seconds=seconds,
        segments=segments,
        display_ms=1000 * found.display_s,
        threshold=meta.thresholds.get(found.label) if found.label is not None else None,
        calibrated=found.label in meta.temperature or found.label in meta.shift,
        aggregation=meta.aggregation.get(found.label, "mean") if found.label is not None else "mean",
    )
