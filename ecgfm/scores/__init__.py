"""How good predictions are: what is counted, with its uncertainty. Numbers in, numbers out; no torch."""
