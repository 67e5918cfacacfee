"""The metrics of SGLang's server, fetched each time that those of its worker are read. Knows the server's address."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

_PREFIX = "sglang:"

# Prometheus gives up after ten; the worker's own metrics should arrive all the same.
_LIMIT_S = 2.0


def fetch(url: str) -> Iterator[Metric]:
    """Yield the server's own metrics; none where it does not answer in time."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=_LIMIT_S) as response:
            text = response.read().decode(errors="replace")
    except OSError:
        return
    for family in text_string_to_metric_families(text):
        if family.name.startswith(_PREFIX):
            yield family
