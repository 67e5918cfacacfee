"""Sort letters in two halves that are merged: a program that only knows how OpenAI's clients are configured.

Reads one row as JSON from standard input, and writes its reward as the last line of standard output.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from heapq import merge
from urllib.request import Request, urlopen


def complete(prompt: str) -> str:
    """Return what the model continues a text with."""
    request = Request(
        f"{os.environ['OPENAI_BASE_URL']}/completions",
        json.dumps({"model": os.environ["OPENAI_MODEL"], "prompt": prompt}).encode(),
        {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"},
    )
    with urlopen(request) as response:
        text: str = json.load(response)["choices"][0]["text"]
    return text.strip()


def main() -> None:
    row = json.load(sys.stdin)
    letters, answer = row["prompt"].removesuffix(">"), row["answer"]
    middle = (len(letters) + 1) // 2
    with ThreadPoolExecutor() as both:
        halves = list(both.map(complete, (f"{letters[:middle]}>", f"{letters[middle:]}>")))
    merged = "".join(merge(*halves))
    right = sum(a == b for a, b in zip(answer, merged, strict=False)) / max(len(answer), len(merged))
    json.dump({"reward": right, "metrics": {"surplus": len(merged) - len(answer)}}, sys.stdout)


if __name__ == "__main__":
    main()
