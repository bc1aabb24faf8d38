"""The command line, a file per kind of command. Heavy imports stand inside the commands that need them."""
