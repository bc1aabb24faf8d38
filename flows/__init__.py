"""Prefect flows and the command line. The only code that imports prefect."""
