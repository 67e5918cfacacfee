"""What a running Prometheus says, by its HTTP API."""

import json
import urllib.parse
import urllib.request


def ask(url, what, **query):
    """The data of one answer; an error of the server's raises."""
    with urllib.request.urlopen(f"{url}/api/v1/{what}?{urllib.parse.urlencode(query)}", timeout=10) as response:
        answer = json.load(response)
    assert answer["status"] == "success", answer
    return answer["data"]
