"""ecgfm: from raw ECG recordings to a pretrained, finetuned and evaluated foundation model.

    model = ecgfm.load("ecgfm-data/runs/ptb-xl/latest/finetune")
    model.predict("ecg.dcm").probabilities

`load` and `recording` are those of inference.py; torch is imported when one of them is first asked for.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_API = ("load", "recording")


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(import_module("ecgfm.inference"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
