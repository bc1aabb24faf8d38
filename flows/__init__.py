"""Prefect flows and the command line. The only code that imports prefect."""

from __future__ import annotations

import os

# Read by prefect when it is imported. What the user has set stays.
SETTINGS = {
    "DO_NOT_TRACK": "1",  # the SDK's telemetry
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",  # the server's
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "ecgfm",  # the library's log is in the run's log
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # the library logs outside of runs too
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds, its least: a run whose process died is told within 90
    # leases in memory are lost with a server restart, and their concurrency slots with them
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
}
for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)
