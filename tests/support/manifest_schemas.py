"""Schemas of other projects' files, cut to what the files in launch/ use, so that a test can hold those against them.

    python -m tests.support.manifest_schemas SCHEMA MANIFEST KIND > tests/unit/launch_schemas/NAME.json

SCHEMA is a Kubernetes custom resource definition (YAML), or a JSON schema, whose ``$ref`` are looked for in a
_definitions.json beside it. MANIFEST is the file of launch/ that shall be checked, KIND the document in it; ``-`` if it
has no kind. Of each object that the manifest has, every field name is kept, so that a wrong one is found; fields that
it does not have lose their schema. Add ``source``, ``version`` and ``licence`` to the result by hand.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

KEPT = ("type", "enum", "required", "pattern", "minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength")
WIDTH = 100
ALTERNATIVES = ("anyOf", "oneOf")


def documents(manifest: Path) -> list[Any]:
    """Return the documents of a YAML file."""
    return [document for document in yaml.safe_load_all(manifest.read_text()) if document is not None]


def trim(schema: Mapping[str, Any], values: Sequence[Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema without descriptions, and without what lies below fields that no value has."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    kept = {key: schema[key] for key in KEPT if key in schema}
    for key in ALTERNATIVES:
        if key in schema:
            kept[key] = [trim(one, values, definitions) for one in schema[key]]
    objects = [value for value in values if isinstance(value, dict)]
    if objects and "properties" in schema:
        fields = {
            name: trim(below, [one[name] for one in objects if name in one], definitions)
            for name, below in schema["properties"].items()
            if any(name in one for one in objects)
        }
        others = sorted(set(schema["properties"]) - set(fields))
        kept |= {"properties": fields, "additionalProperties": False}
        if others:
            kept["patternProperties"] = {f"^({'|'.join(map(re.escape, others))})$": {}}
    elif isinstance(below := schema.get("additionalProperties"), dict):
        inner = [value for one in objects for value in one.values()]
        kept["additionalProperties"] = trim(below, inner, definitions)
    if isinstance(below := schema.get("items"), dict):
        elements = [element for value in values if isinstance(value, list) for element in value]
        kept["items"] = trim(below, elements, definitions)
    return kept


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the schema of a file, and the definitions beside it."""
    if path.suffix == ".yaml":
        versions = yaml.safe_load(path.read_text())["spec"]["versions"]
        return next(one["schema"]["openAPIV3Schema"] for one in versions if one["storage"]), {}
    beside = path.with_name("_definitions.json")
    definitions = json.loads(beside.read_text())["$defs"] if beside.exists() else {}
    return json.loads(path.read_text()), definitions


def pretty(value: Any, indent: int = 0) -> str:
    """Return JSON in which what fits in a line stands in one."""
    line = json.dumps(value)
    if len(line) + indent <= WIDTH or not isinstance(value, dict):
        return line
    inner = [f"{' ' * (indent + 1)}{json.dumps(key)}: {pretty(one, indent + 1)}" for key, one in value.items()]
    return "{\n" + ",\n".join(inner) + f"\n{' ' * indent}}}"


def main(schema: str, manifest: str, kind: str) -> None:
    values = [one for one in documents(Path(manifest)) if kind == "-" or one["kind"] == kind]
    if not values:
        sys.exit(f"{manifest} has no document of kind {kind}")
    root, definitions = read(Path(schema))
    sys.stdout.write(pretty({"source": "", "version": "", "licence": ""} | trim(root, values, definitions)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
