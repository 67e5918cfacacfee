"""The docs name things that exist: paths, symbols, settings, metrics and links, each resolved without importing its
module. The tour stays short, and a module that calls itself pure is."""

import ast
import functools
import re
import textwrap
from pathlib import Path

import pytest

from async_rl.config.loading import leaves, load
from async_rl.metrics.declared import METRICS
from async_rl.runtime import runfolder

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "async_rl"
TOUR = ROOT / "docs" / "concepts" / "tour.md"
MAX_TOUR_FILES, MAX_TOUR_LINES = 8, 2100

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
)
GENERATED = ("docs/reference/settings.md", "docs/reference/metrics.md")  # compared with their source elsewhere

# Names in backticks that are not ours.
EXTERNAL = {"AsyncLLM", "CompletionOutput", "RouterReplay", "SamplingParams", "XPENDING"}
RUN_FOLDER = {value for value in vars(runfolder).values() if isinstance(value, str)}

SOURCES = ("async_rl", "tests", "dashboards", "docs/examples")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMANDS = re.compile(r"-m ((?:async_rl|tests)(?:\.[a-z_]\w*)+)\b")
FILES = re.compile(r"\b(?:async_rl|configs|dashboards|docs|launch|tests)/[\w/.-]+\.(?:py|ya?ml|sh|json|md)\b")
TARGETS = re.compile(r"(?:^    |`)make ([a-z][\w-]*)", re.M)
FILE = re.compile(
    r"^((?:[\w.-]+/)*[\w.-]+\.(?:py|md|ya?ml|toml|sh|txt|svg|png|json|Dockerfile))(?::([A-Za-z_][\w.]*))?$"
)
FOLDER = re.compile(r"^((?:[\w.-]+/)+)$")
MODULE = re.compile(r"^((?:async_rl|tests)(?:\.[a-z_]\w*)+)(?::(\w+))?(?:\(.*\))?$")
METHOD = re.compile(r"^([A-Z]\w+)((?:\.\w+)+)(?:\(.*\))?$")
CLASS = re.compile(r"^[A-Z][a-z0-9]+(?:[A-Z][a-z0-9]*)+$")
DOTTED = re.compile(r"^([a-z_]+)((?:\.[a-z_0-9]+)+)(?:[ :=].*)?$")
SERIES = re.compile(r"^([a-z_]+)\{")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def python_files() -> tuple[Path, ...]:
    return tuple(path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py")))


@functools.cache
def words_in_the_code() -> frozenset[str]:
    """Every identifier and every word of a string or comment."""
    files = (path for path in python_files() if path != Path(__file__).resolve())
    return frozenset(word for path in files for word in re.findall(r"\w+", path.read_text()))


def names_in(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What a module or class defines: name -> statement. Looks into ``if`` and ``try``."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {
                name.id: node for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)
            }
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
        elif isinstance(node, ast.If | ast.Try):
            found |= names_in(node.body)
    return found


@functools.cache
def attributes_of(node: ast.ClassDef) -> set[str]:
    """Methods, fields and what is assigned to self; also those of its bases, as far as they are ours."""
    found = set(names_in(node.body))
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and isinstance(inner.value, ast.Name):
            found |= {inner.attr} if inner.value.id == "self" else set()
    for base in node.bases:
        if isinstance(base, ast.Name):
            for parent in classes().get(base.id, []):
                found |= attributes_of(parent)
    return found


@functools.cache
def classes() -> dict[str, list[ast.ClassDef]]:
    found: dict[str, list[ast.ClassDef]] = {}
    for path in python_files():
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


def defines(path: Path, symbol: str) -> bool:
    """Whether the module has ``symbol``: a name at its top, ``Class.member``, or a method named alone."""
    first, _, member = symbol.partition(".")
    top = names_in(tree(path).body)
    if member:
        node = top.get(first)
        return isinstance(node, ast.ClassDef) and member in attributes_of(node)
    methods = {name for node in top.values() if isinstance(node, ast.ClassDef) for name in attributes_of(node)}
    return first in top or first in methods


def find(name: str, document: Path) -> Path | None:
    """A file or folder as a document names it: from the root, in the package, beside the document; a bare name of a
    Python file is looked for everywhere."""
    for base in (ROOT, PACKAGE, document.parent):
        if (base / name).exists():
            return base / name
    if "/" not in name and name.endswith(".py"):
        return next((path for path in python_files() if path.name == name), None)
    return None


def claims_to_exist(name: str) -> bool:
    """Whether a path is one of this repository, and not of a run folder, a checkpoint or a user."""
    first, slash, _ = name.partition("/")
    if not slash:
        return name.endswith(".py") and not name.startswith("my_")
    return first not in (".cache", ".venv", "dist", "runs") and any((base / first).is_dir() for base in (ROOT, PACKAGE))


@functools.cache
def settings() -> frozenset[str]:
    return frozenset(key for key, _ in leaves())


def span_fault(text: str, document: Path) -> str | None:
    """What is wrong with a span of code in the prose of a document; None where nothing is, or nothing can be told."""
    if match := FILE.match(text):
        name, symbol = match.groups()
        path = find(name, document)
        if path is None:
            return f"no such file: {text}" if claims_to_exist(name) else None
        return None if not symbol or defines(path, symbol) else f"{name} has no {symbol}"
    if match := FOLDER.match(text):
        return f"no such folder: {text}" if claims_to_exist(text) and find(text, document) is None else None
    if match := MODULE.match(text):
        return module_fault(*match.groups())
    if match := METHOD.match(text):
        name, member = match[1], match[2][1:].partition(".")[0]
        if name in EXTERNAL or name not in classes():
            return None if name in EXTERNAL else f"no such class: {text}"
        return None if any(member in attributes_of(node) for node in classes()[name]) else f"{name} has no {member}"
    if CLASS.match(text):
        return None if text in EXTERNAL | words_in_the_code() else f"no such name in the code: {text}"
    if match := SERIES.match(text):
        return (
            None if match[1] in METRICS or match[1].removeprefix("async_rl_") in METRICS else f"no such metric: {text}"
        )
    if match := DOTTED.match(text):
        key = match[1] + match[2]
        section = any(known.startswith(f"{match[1]}.") for known in settings())
        if section and key not in RUN_FOLDER and not any(k == key or k.startswith(f"{key}.") for k in settings()):
            return f"no such setting: {key}"
    return None


def module_fault(name: str, symbol: str | None) -> str | None:
    """``a.b.c``, where c may be an attribute, or ``a.b:c``."""
    path = ROOT / Path(*name.split("."))
    for module in (path.with_suffix(".py"), path / "__init__.py"):
        if module.exists():
            return None if symbol is None or defines(module, symbol) else f"{name} has no {symbol}"
    if path.is_dir():
        return None
    parent = path.parent.with_suffix(".py") if path.parent.with_suffix(".py").exists() else path.parent / "__init__.py"
    return None if parent.exists() and defines(parent, path.name) else f"no such module: {name}"


def link_fault(target: str, document: Path) -> str | None:
    if re.match(r"[a-z]+:", target):
        return None
    name, _, anchor = target.partition("#")
    path = (document.parent / name).resolve() if name else document
    if not path.exists():
        return f"broken link: {target}"
    if anchor and anchor not in anchors(path):
        return f"no such heading: {target}"
    return None


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@functools.cache
def make_targets() -> frozenset[str]:
    rules = re.findall(r"^([a-z][\w -]*):", (ROOT / "Makefile").read_text(), re.M)
    return frozenset(name for rule in rules for name in rule.split())


def faults(document: Path) -> list[str]:
    text = document.read_text()
    prose = "\n".join(line for line in FENCE.sub("", text).splitlines() if not line.startswith("    "))
    if document.name.startswith("from-"):  # the first column of each table has the names of another system
        prose = re.sub(r"^\|[^|]*\|", "|", prose, flags=re.M)
    found = [link_fault(target, document) for target in LINK.findall(prose)]
    found += [span_fault(span, document) for span in SPAN.findall(prose)]
    found += [module_fault(module, None) for module in COMMANDS.findall(text)]
    found += [f"no such file: {name}" for name in FILES.findall(text) if not ((ROOT / name).exists() or "/my_" in name)]
    found += [f"no such target: make {name}" for name in TARGETS.findall(text) if name not in make_targets()]
    return sorted({fault for fault in found if fault is not None})


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name not in GENERATED])
def test_everything_that_a_document_names_exists(name):
    assert not faults(ROOT / name)


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if "/from-" in name])
def test_the_configuration_in_place_of_another_system_s_is_one(tmp_path, name):
    """The block of settings, which begins with the run's name."""
    block = re.search(r"^    name: .*\n(?:    .*\n)+", (ROOT / name).read_text(), re.M)
    assert block, "no block of settings"
    config = tmp_path / "config.yaml"
    config.write_text(textwrap.dedent(block[0]))
    load(config)


@pytest.mark.parametrize(
    "text",
    [
        "Trainer.resume",
        "NoSuchClass",
        "NoSuchClass.method",
        "trainer/nowhere.py",
        "trainer/losses.py:nothing",
        "trainer/losses.py:Tokens.nothing",
        "docs/nowhere/",
        "async_rl.nowhere",
        "async_rl.errors:nothing",
        "trainer.los",
        "rollout.enviroment.function",
        'ppo_kl_of_nothing{staleness="0"}',
    ],
)
def test_a_wrong_name_is_found(text):
    assert span_fault(text, ROOT / "README.md")


@pytest.mark.parametrize(
    "text",
    [
        "Trainer.load",
        "WeightSyncMismatch",
        "trainer/losses.py:Tokens.select",
        "docs/concepts/",
        "async_rl.errors:ConfigError",
        "async_rl.rollout.rewards.code.isolation()",
        "trainer.loss",
        "checkpoint.every N",
        'ppo_kl{staleness="0"}',
        "queue.journal",
        "checkpoints/step-.../",
    ],
)
def test_a_right_name_is_not(text):
    assert span_fault(text, ROOT / "README.md") is None


def test_a_broken_link_is_found():
    assert link_fault("docs/nowhere.md", ROOT / "README.md")
    assert link_fault("docs/index.md#nowhere", ROOT / "README.md")
    assert link_fault("docs/index.md#concepts-how-it-works", ROOT / "README.md") is None


def test_every_document_is_linked_from_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    linked = {(ROOT / "docs" / target.partition("#")[0]).resolve() for target in LINK.findall(index)}
    pages = {path for path in (ROOT / "docs").rglob("*.md") if "examples" not in path.parts}
    missing = pages - linked - {ROOT / "docs" / "index.md"}
    assert not [path.relative_to(ROOT).as_posix() for path in sorted(missing)]


def test_code_and_configs_name_documents_that_exist():
    named = {
        (path.relative_to(ROOT).as_posix(), name)
        for folder in ("async_rl", "tests", "dashboards", "requirements", "configs", "launch")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".yml", ".txt", ".sh", ".json") and path != Path(__file__).resolve()
        for name in re.findall(r"\bdocs/[\w/.-]+?\.(?:md|svg)\b", path.read_text())
    }
    assert not [f"{where}: {name}" for where, name in sorted(named) if not (ROOT / name).exists()]


# -- the tour --


def tour_rows() -> list[tuple[str, list[str]]]:
    """File and symbols of each row of the tour's table."""
    rows = re.findall(r"^\| \d+ \| `([\w/.]+)` \| (.*?) \|", TOUR.read_text(), re.M)
    return [(name, SPAN.findall(symbols)) for name, symbols in rows]


def test_the_tour_is_a_few_files_that_one_can_read_in_an_afternoon():
    rows = tour_rows()
    lines = {name: len((PACKAGE / name).read_text().splitlines()) for name, _ in rows if (PACKAGE / name).exists()}
    assert 5 <= len(rows) <= MAX_TOUR_FILES
    assert sum(lines.values()) <= MAX_TOUR_LINES, lines


def test_the_tour_names_symbols_of_its_files():
    missing = [
        f"{name}: {symbol}"
        for name, symbols in tour_rows()
        for symbol in symbols
        if not (PACKAGE / name).exists() or not defines(PACKAGE / name, symbol)
    ]
    assert not missing


# -- purity --

IMPURE = {"asyncio", "megatron", "psutil", "ray", "socket", "subprocess", "threading", "vllm"}


def test_a_module_that_calls_itself_pure_imports_nothing_that_waits_or_talks():
    pure = {
        path: tree(path)
        for path in PACKAGE.rglob("*.py")
        if re.search(r"\bPure\b|\bpure state machine\b", ast.get_docstring(tree(path)) or "")
    }
    found = {
        f"{path.relative_to(ROOT)}: {module}"
        for path, parsed in pure.items()
        for node in ast.walk(parsed)
        for module in imported(node)
        if module.split(".")[0] in IMPURE
    }
    assert len(pure) > 10
    assert not found


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
