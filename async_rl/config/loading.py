"""From YAML files and dotted overrides to the tree of ``schema``, and back. Owns how faults are explained to the user.

Knows ``schema`` and YAML; nothing of what a setting does.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import override

from async_rl.config.schema import RunConfig
from async_rl.errors import ConfigError


def load(paths: Path | Sequence[Path], overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read YAML files, apply dotted overrides ({"async_training.max_staleness": 2}), validate.

    Of several files, each is laid over those before it, setting by setting. Raises ConfigError whose message has one
    line per fault: the key, the value, and the nearest valid ones.
    """
    tree: dict[str, Any] = {}
    for path in [paths] if isinstance(paths, Path) else paths:
        try:
            tree = _laid_over(tree, _read_file(path))
        except RecursionError:
            raise ConfigError(f"config file {path}: it is nested too deeply to be laid over another") from None
    for key, value in (overrides or {}).items():
        _set(tree, key, value)
    return validate(tree)


def validate(tree: Mapping[str, Any]) -> RunConfig:
    """Build the tree from nested mappings. Raises ConfigError as ``load`` does."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault) for fault in error.errors())) from None


def with_settings(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """Return the tree with other values, by dotted key as for ``load``. Raises ConfigError as ``load`` does."""
    tree = config.model_dump(mode="json")
    for key, value in overrides.items():
        _set(tree, key, value)
    return validate(tree)


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse ``--a.b value`` and ``--a.b=value`` to {"a.b": value}; values are YAML, names and paths stay text.

    Raises ConfigError for a stray word, a flag without a value, or a key that does not exist.
    """
    overrides: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"unexpected argument {_short(word)}; write settings as --section.key value")
        key, equals, text = word[2:].partition("=")
        if _field(key) is None:
            raise ConfigError(_unknown(key))
        if not equals:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise ConfigError(f"--{key} has no value; write --{key} VALUE")
            text = value
        try:
            overrides[key] = text if _is_text(key, text) and text != "null" else _read_yaml(text)
        except yaml.YAMLError:
            overrides[key] = text
    return overrides


def to_yaml(config: RunConfig) -> str:
    """Return the resolved tree as YAML, in the order of its declaration."""
    text: str = yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)
    return text


def leaves(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, its sentence) for every setting."""
    for name, info in section.model_fields.items():
        inner = info.annotation
        if is_section(inner):
            yield from leaves(cast(type[BaseModel], inner), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info.description or ""


def default_of(key: str) -> str:
    """Return the default of a setting as YAML; "required" if it has none."""
    info = _field(key)
    if info is None:
        raise ConfigError(_unknown(key))
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 200


class _Loader(yaml.SafeLoader):
    """YAML 1.2 in the points that matter (PyYAML reads 1.1): 1e-6 is a number, off a word, and keys are unique."""

    @override
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$", re.I), list("tTfF"))


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes the words which _Loader, or a reader of YAML 1.1, would read as another type."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def _read_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        # PyYAML lets these through for malformed dates, numbers, escapes and tags.
        raise yaml.YAMLError(f"a value cannot be read: {error}") from None
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        tree = _read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path}: expected a mapping of keys, got {type(tree).__name__}")
    return tree


def _laid_over(tree: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return ``tree`` with the values of ``other``: sections are merged, anything else is replaced.

    Changes neither: by YAML references, a section may stand in several places.
    """
    merged = {
        key: _laid_over(tree[key], value) if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
        for key, value in other.items()
    }
    return tree | merged


def _field(key: str) -> FieldInfo | None:
    """Return the setting of a dotted name; None for a section or an unknown name."""
    section: Any = RunConfig
    *sections, leaf = key.split(".")
    for part in sections:
        if get_origin(section) is dict:  # of sections, by names that the user chooses
            section = get_args(section)[1]
            continue
        info = section.model_fields.get(part)
        section = None if info is None else _section_in(info.annotation)
        if section is None:
            return None
    if get_origin(section) is dict:
        return None
    info = section.model_fields.get(leaf)
    return None if info is None or is_section(info.annotation) else info


def is_section(annotation: Any) -> bool:
    """Return whether a field of the tree is a section of further settings."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _section_in(annotation: Any) -> Any:
    """Return the section that a field is or may be, or the type of a dict of sections; None if it cannot be one."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is dict:
        return annotation if is_section(get_args(annotation)[1]) else None
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    found = (_section_in(option) for option in options)
    return annotation if is_section(annotation) else next((section for section in found if section), None)


def _is_text(key: str, text: str) -> bool:
    """Return whether a setting is a string or a path, so that --name 7 means the name "7".

    One that may also be a list is a string unless ``text`` begins like a list.
    """
    info = _field(key)
    if info is not None and get_origin(info.annotation) is list:
        return False
    options = get_args(info.annotation) if info is not None and get_args(info.annotation) else ()
    kinds = [kind for kind in (options or (info.annotation if info else None,)) if kind is not type(None)]
    kinds = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds]
    kinds = [kind for kind in kinds if text.startswith("[") or get_origin(kind) is not list]
    return bool(kinds) and all(kind in (str, Path) or isinstance(kind, str) for kind in kinds)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for depth, section in enumerate(sections, start=1):
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict) and _field(".".join(sections[:depth])) is not None:
            inner = tree[section] = {}  # a setting that is a value in the file, and may be a section
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {section} is {_short(inner)} in the file, not a section")
        tree = inner
    tree[leaf] = value


def _unknown(key: str) -> str:
    known = [leaf for leaf, _ in leaves()]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    near += [leaf for leaf in known if leaf.rpartition(".")[2] == key.rpartition(".")[2] and leaf not in near]
    near += [leaf for leaf in known if leaf.startswith(f"{key}.") and leaf not in near]
    return f"{_shown(key)}: no such setting" + (f"; did you mean {', '.join(near[:3])}?" if near else "")


def _explain(fault: Any) -> str:
    key = _key_of([str(part) for part in fault["loc"]])
    shown = _shown(key)
    if fault["type"] == "extra_forbidden":
        return _unknown(key)
    if fault["type"] == "missing":
        return f"{shown}: required, but missing"
    message: str = fault["msg"].removeprefix("Value error, ")
    if not key:
        return message
    message = message[0].lower() + message[1:]
    choices = _choices(key)
    if fault["type"] == "literal_error" and choices:
        near = difflib.get_close_matches(_short(fault["input"]).strip("'"), choices, n=1)
        message = f"must be one of {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else "")
    return f"{shown}: {_short(fault['input'])} is not valid: {message}"


def _key_of(parts: Sequence[str]) -> str:
    """Return the key of a fault. Of a setting that takes several types, pydantic names one of them after the key."""
    for number in range(1, len(parts)):
        setting = _field(".".join(parts[:number]))
        if setting is not None:
            if get_origin(_section_in(setting.annotation)) is dict:
                break
            within = _section_in(setting.annotation) is not None
            return ".".join([*parts[:number], *(parts[number + 1 :] if within else ())])
    return ".".join(parts)


def _short(value: Any) -> str:
    """Return a value shortened for a message: by YAML references, a file of a few lines can describe a gigabyte."""
    try:
        return _REPR.repr(value)
    except ValueError:
        return "an integer too long to print"


def _shown(key: str) -> str:
    """Return a key for a message, on one line and shortened."""
    return key if key.isprintable() and len(key) <= _REPR.maxstring else _REPR.repr(key)


def _choices(key: str) -> list[str]:
    info = _field(key)
    return [option for option in get_args(info.annotation) if isinstance(option, str)] if info else []
