"""How files name leads: by the code of SCP-ECG, which MDC and DICOM took over, or by a label."""

from __future__ import annotations

import re

from ecgfm.ecg import LEADS

_OTHER_LEADS = {
    9: "V7",
    10: "V2R",
    11: "V3R",
    12: "V4R",
    13: "V5R",
    14: "V6R",
    15: "V7R",
    16: "X",
    17: "Y",
    18: "Z",
    19: "CC5",
    20: "CM5",
    66: "V8",
    67: "V9",
    68: "V8R",
    69: "V9R",
}
_LEAD_OF_CODE = {
    **dict(zip((1, 2, 61, 62, 63, 64, 3, 4, 5, 6, 7, 8), LEADS, strict=True)),
    **_OTHER_LEADS,
}
"""EN 1064, table of lead identification."""

_STANDARD = {lead.lower(): lead for lead in LEADS}
_LABEL = re.compile(r"(?:(?:ecg|ekg|lead)[\s_:.-]*)*([a-z0-9]+)(?:[\s_-]*ref)?(?:\s*\(.*\))?", re.IGNORECASE)


def lead_of_code(code: int) -> str:
    """The lead with that number in SCP-ECG (in MDC: the code of part 2)."""
    return _LEAD_OF_CODE.get(code, f"lead {code}")


def lead_of_label(label: str) -> str:
    """The standard spelling where a label means one of the twelve leads, else the label.

    >>> [lead_of_label(label) for label in ("ECG II", "EKG-AVR", "Lead I (Einthoven)", "v1", "ECG1")]
    ['II', 'aVR', 'I', 'V1', 'ECG1']
    """
    match = _LABEL.fullmatch(label.strip())
    return _STANDARD.get(match[1].lower(), label.strip()) if match else label.strip()
