"""The tools of an environment: schemas of methods, and what is wrong with a call that the policy made. Pure.

The schemas are those of transformers' ``get_json_schema``, which would import torch. Imports the standard library
alone, for environments that run under another interpreter.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

Tool = dict[str, Any]

CallFault = Literal["unknown_tool", "bad_arguments"]

_SIMPLE = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
    list: "array",
    tuple: "array",
    dict: "object",
}
_OF_JSON: dict[str, Any] = {
    "integer": int,
    "number": (int, float),
    "string": str,
    "boolean": bool,
    "null": type(None),
    "array": list,
    "object": dict,
}
_SECTION = re.compile(r"^[ \t]*(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?):[ \t]*$", re.MULTILINE)
_ARGUMENT = re.compile(r"^([ \t]*)\*{0,2}(\w+)[ \t]*(?:\([^)]*\))?:[ \t]*(.*)$")


class NoSchema(Exception):
    """A method cannot be described to the policy; the message says why."""


class BadCall(Exception):
    """A call that cannot be made; the message is for the policy."""

    def __init__(self, fault: CallFault, why: str) -> None:
        super().__init__(why)
        self.fault = fault


@dataclass(frozen=True)
class ToolCall:
    """A call as the policy made it, checked."""

    name: str
    arguments: dict[str, Any]


def tools_of(thing: Any, reserved: Collection[str]) -> dict[str, Callable[..., Any]]:
    """Return the tools of an object by name: its public methods with docstrings that are not ``reserved``."""
    found = {}
    for name in dir(type(thing)):
        if name.startswith("_") or name in reserved:
            continue
        raw = inspect.getattr_static(type(thing), name)
        if isinstance(raw, (property, type)) or not callable(method := getattr(thing, name, None)):
            continue
        if inspect.getdoc(method):
            found[name] = method
    return found


def schema_of(name: str, method: Callable[..., Any]) -> Tool:
    """Return the JSON schema of a method, from its type hints and the Args of its docstring. Raises NoSchema."""
    try:
        hints = typing.get_type_hints(method)
        signature = inspect.signature(method)
    except Exception as error:  # noqa: BLE001 - a hint may be anything
        raise NoSchema(f"its type hints cannot be read ({type(error).__name__}: {error})") from None
    description, described = _docstring(inspect.getdoc(method) or "")
    properties: dict[str, Any] = {}
    required = []
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise NoSchema(f"its parameter {parameter.name!r} cannot be given by name")
        if parameter.name not in hints:
            raise NoSchema(f"its parameter {parameter.name!r} has no type hint")
        if parameter.name not in described:
            raise NoSchema(f"its docstring says nothing of {parameter.name!r} under Args")
        try:
            properties[parameter.name] = {**_type(hints[parameter.name]), "description": described[parameter.name]}
        except NoSchema as error:
            raise NoSchema(f"its parameter {parameter.name!r} {error}") from None
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def checked_call(call: Any, tools: Sequence[Tool]) -> ToolCall:
    """Return a call of an assistant's message, {"function": {"name", "arguments"}}, if it can be made.

    The arguments are an object, or one as JSON. Raises BadCall, which names the fault as the policy is to read it.
    """
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    function = function if isinstance(function, Mapping) else {}
    known = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    name = function.get("name")
    if not isinstance(name, str) or name not in known:
        named = ", ".join(known) or "none"
        raise BadCall("unknown_tool", f"there is no tool {str(name)[:80]!r}; the tools are {named}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise BadCall("bad_arguments", f"the arguments of {name} are not JSON: {error}") from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise BadCall("bad_arguments", f"the arguments of {name} must be an object with a value for each parameter")
    if isinstance(parameters := known[name], Mapping):
        _check(name, arguments, parameters)
    return ToolCall(name, dict(arguments))


def _check(name: str, arguments: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    properties = parameters.get("properties") or {}
    missing = [each for each in parameters.get("required") or () if each not in arguments]
    if missing:
        raise BadCall("bad_arguments", f"{name} needs the argument {', '.join(missing)}")
    # Arguments that no one lists are refused; a schema in other words than properties is for the tool to judge.
    others = "properties" not in parameters or "patternProperties" in parameters
    if parameters.get("additionalProperties", others) is False:
        unknown = [str(each)[:80] for each in arguments if each not in properties]
        if unknown:
            takes = ", ".join(properties) or "none"
            raise BadCall("bad_arguments", f"{name} has no argument {', '.join(unknown[:5])}; it takes {takes}")
    for each, value in arguments.items():
        schema = properties.get(each)
        if isinstance(schema, Mapping) and not _fits(value, schema):
            shown = json.dumps({key: item for key, item in schema.items() if key != "description"})
            raise BadCall(
                "bad_arguments", f"the argument {each} of {name} is {str(value)[:80]!r}, which does not fit {shown}"
            )


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Return whether a value is of the type that a schema names, as far as ``schema_of`` writes schemas."""
    if value is None and schema.get("nullable"):
        return True
    if "enum" in schema:
        return any(value == each and type(value) is type(each) for each in schema["enum"])
    if isinstance(schema.get("anyOf"), list):
        return any(_fits(value, each) for each in schema["anyOf"])
    names = schema.get("type")
    if names is not None:
        names = names if isinstance(names, list) else [names]
        if not any(_is_of(value, name) for name in names):
            return False
    if isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        return all(_fits(item, schema["items"]) for item in value)
    if isinstance(value, list) and isinstance(schema.get("prefixItems"), list):
        kinds = schema["prefixItems"]
        return len(value) == len(kinds) and all(_fits(*pair) for pair in zip(value, kinds, strict=True))
    if isinstance(value, dict) and isinstance(schema.get("additionalProperties"), Mapping):
        return all(_fits(item, schema["additionalProperties"]) for item in value.values())
    return True


def _is_of(value: Any, name: Any) -> bool:
    kind = _OF_JSON.get(name)
    if kind is None:
        return True  # A type of another dialect, which the tool itself has to judge.
    if isinstance(value, bool):
        return bool(name == "boolean")
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, kind)


def _type(hint: Any) -> dict[str, Any]:
    """Return a type hint as a JSON schema. Raises NoSchema."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enum([member.value for member in hint])
    if origin is None and hint in _SIMPLE:
        return {"type": _SIMPLE[hint]}
    if origin is Literal:
        return _enum(list(arguments))
    if origin is Union or origin is getattr(types, "UnionType", Union):
        return _union(arguments)
    if origin is list:
        return {"type": "array", "items": _type(arguments[0])}
    if origin is tuple and ... not in arguments:
        return {"type": "array", "prefixItems": [_type(each) for each in arguments]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(arguments[1])}
    raise NoSchema(f"has the type {hint}, which is none of JSON's")


def _union(arguments: Sequence[Any]) -> dict[str, Any]:
    kinds = [_type(each) for each in arguments if each is not type(None)]
    if len(kinds) == 1:
        found = kinds[0]
    elif all(kind.keys() == {"type"} and isinstance(kind["type"], str) for kind in kinds):
        names = sorted({kind["type"] for kind in kinds})
        found = {"type": names[0] if len(names) == 1 else names}
    else:
        found = {"anyOf": kinds}
    return {**found, "nullable": True} if type(None) in arguments else found


def _enum(values: list[Any]) -> dict[str, Any]:
    if not values or any(type(value) not in (int, float, str, bool, type(None)) for value in values):
        raise NoSchema(f"may be one of {values}, which are not all values of JSON")
    names = list(dict.fromkeys(_SIMPLE[type(value)] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the description of a docstring in Google's style, and that of each argument."""
    heads = list(_SECTION.finditer(text))
    description = text[: heads[0].start() if heads else len(text)].strip()
    for at, head in enumerate(heads):
        if head[1] in ("Args", "Arguments", "Parameters"):
            return description, _arguments(text[head.end() : heads[at + 1].start() if at + 1 < len(heads) else None])
    return description, {}


def _arguments(section: str) -> dict[str, str]:
    found: dict[str, str] = {}
    last, indent = None, None
    for line in section.splitlines():
        head = _ARGUMENT.match(line)
        if head is not None and (indent is None or len(head[1]) <= indent):
            indent, last = len(head[1]), head[2]
            found[last] = head[3].strip()
        elif last is not None and line.strip():
            found[last] = f"{found[last]} {line.strip()}".strip()
    return found
