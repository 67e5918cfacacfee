"""An agent that is a program: two turns of the policy over HTTP, with nothing but Python's own library.

It appends a line to the file that its first argument names, at its start and after each turn. With a second argument
it goes on after a turn once there is a file of that name.
"""

import json
import os
import sys
import time
import urllib.request

TOKENS = 12  # of each turn


def ask(path: str, **body) -> dict:
    """POST to the gateway."""
    address = os.environ["OPENAI_BASE_URL"] + path
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return dict(json.load(answer))


def note(stage: str) -> None:
    """Say how far it is, and where it asks."""
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps([os.getpid(), stage, os.environ["OPENAI_BASE_URL"]]) + "\n")


def main() -> None:
    """Make the turns, and write the reward."""
    row = json.load(sys.stdin)
    note("started")
    said = ask("/tokenize", prompt=row["prompt"])["tokens"]
    for turn in ("first", "second"):
        answer = ask("/completions", prompt=said, max_tokens=TOKENS, return_token_ids=True)["choices"][0]
        said = [*said, *answer["token_ids"]]
        note(turn)
        while sys.argv[2:] and not os.path.exists(sys.argv[2]):
            time.sleep(0.02)
    sys.stdout.write(json.dumps({"reward": float(len(said) % 3), "turns": 2.0}) + "\n")


if __name__ == "__main__":
    main()
