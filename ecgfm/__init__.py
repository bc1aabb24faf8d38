"""ecgfm: from raw ECG recordings to a pretrained, finetuned and evaluated foundation model."""

__version__ = "0.1.0"
