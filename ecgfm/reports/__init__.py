"""The report labeler: what a free-text ECG report asserts, with the words that do so."""
