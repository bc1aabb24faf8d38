"""How fast it is, beside something else on the same machine: what `ecgfm bench` runs."""
