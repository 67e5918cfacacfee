"""A lint for plain prose: private words in docstrings, error and log messages, and documents.

    python -m tests.support.prose

Prints ``file:line: word: use ...`` for each finding, and exits with 1 if there is one. It reads the package, the tests'
support files and the Markdown documents.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CODE = ("async_rl", "tests/support")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs")

SUGGESTIONS = {
    r"mend(s|ed|ing)?": "fix",
    r"anew": "again",
    r"told": "notified, or the call that passes the value",
    r"whoever": "the process or the caller, by its name",
    r"nobody|somebody|everybody|anybody": "no process, a process, every process, by its name",
    r"(go|goes|going|gone|went) on with": "resume or continue",
    r"for ever": "forever or indefinitely",
    r"(stand|stands|stood|standing) still": "stall",
    r"(hand|hands|handed|handing) in": "publish or submit",
    r"(take|takes|took|taken|taking) up": "adopt, restore or resume",
    r"(take|takes|took|taken|taking) back": "rewind",
    r"(tend|tends|tended|tending)": "supervise",
    r"besides": "in addition to",
    r"is the \w+'s to say": "the one that decides",
    r"what \w+ is at": "the phase",
}
PATTERN = re.compile("|".join(rf"(?P<w{i}>\b(?:{word})\b)" for i, word in enumerate(SUGGESTIONS)), re.IGNORECASE)
# (file, line's text) where a word has its ordinary meaning.
LITERAL: set[tuple[str, str]] = set()


class Finding(NamedTuple):
    file: str
    line: int
    word: str
    use: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.word!r}: use {self.use}"


def findings(file: str, first_line: int, text: str) -> Iterator[Finding]:
    """Yield the private words of a text that begins at this line of a file."""
    for number, line in enumerate(text.splitlines(), first_line):
        if (file, line.strip()) in LITERAL:
            continue
        for match in PATTERN.finditer(line):
            yield Finding(file, number, match[0], list(SUGGESTIONS.values())[int(str(match.lastgroup)[1:])])


def in_code(file: str, source: str) -> Iterator[Finding]:
    """Yield the findings in docstrings, and in the strings of raise statements and log calls."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and ast.get_docstring(node):
                yield from findings(file, first.lineno, str(first.value.value))
                if str(first.value.value).startswith("Of "):
                    yield Finding(file, first.lineno, "Of ...", "a full sentence in the imperative")
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and _logs(node.func)):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield from findings(file, part.lineno, part.value)


def _logs(function: ast.expr) -> bool:
    if not isinstance(function, ast.Attribute):
        return False
    owner = getattr(function.value, "id", getattr(function.value, "attr", ""))
    return owner.lstrip("_") in ("log", "logger") or function.attr == "event"


def in_document(file: str, text: str) -> Iterator[Finding]:
    """Yield the findings in a Markdown document; code in backticks is not prose."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        fenced ^= line.startswith("```")
        if not fenced and not line.startswith("    "):
            yield from findings(file, number, re.sub(r"`[^`]*`", "``", line))


def main() -> int:
    found: list[Finding] = []
    for path in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        if path != Path(__file__).resolve():
            found += in_code(path.relative_to(ROOT).as_posix(), path.read_text())
    for top in (ROOT / name for name in DOCUMENTS):
        for path in sorted(top.rglob("*.md")) if top.is_dir() else [top] * top.exists():
            found += in_document(path.relative_to(ROOT).as_posix(), path.read_text())
    for finding in sorted(set(found)):
        print(finding)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
