"""The routes and their Structs -> the description of the whole API, OpenAPI 3.1."""

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final, TypeAlias

import msgspec

from gateway import keys
from gateway.errors import ErrorEnvelope
from gateway.server.api_table import SHAPES, Kind, Shape
from gateway.server.routes import ROUTES, Route

Node: TypeAlias = dict[str, Any]
"""A piece of the document, which is JSON without a type of its own."""

VERSION: Final = "1"
"""Of the API: what changes in a way that clients see gets a new number and new paths."""
JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
REFERENCE: Final = "#/components/schemas/{name}"

SECURITY: Final[dict[keys.Access, list[Node]]] = {
    "open": [],
    "api": [{"api_key": []}, {"api_key_header": []}, {}],
    "user": [{"access_token": []}],
    "admin": [{"operator_key": []}],
    "operator": [{"operator_key": []}, {}],
    "page": [],
}
"""What a caller shows; nothing, where the gateway has no API keys, or trusts the network that the caller is in."""

SCHEMES: Final[Node] = {
    "access_token": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "A user's access token, by POST /api/v1/auth/login.",
    },
    "api_key": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key of the operator's, or a user's own, by POST /api/v1/user/keys.",
    },
    "api_key_header": {"type": "apiKey", "in": "header", "name": "X-Api-Key", "description": "The same."},
    "operator_key": {"type": "http", "scheme": "bearer", "description": "The key of LETTA_GATEWAY_OPERATOR_KEY."},
}

_PARAMETER: Final = re.compile(r"\{(\w+)(:[^}]*)?\}")


def api_document() -> bytes:
    """Return the description, the same bytes for the same routes."""
    schemas = _Schemas(_kinds())
    paths: Node = {}
    for route in ROUTES:
        path = path_of(route)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, SHAPES[route.method, path], schemas)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Letta Gateway",
            "version": VERSION,
            "description": "Letta agents behind the OpenAI API, and a platform of users with agents of their own.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": paths,
        "components": {"schemas": schemas.components, "securitySchemes": SCHEMES},
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def path_of(route: Route) -> str:
    """Return a route's path as OpenAPI writes it."""
    return _PARAMETER.sub(r"{\1}", route.path)


class _Schemas:
    """The schemas of all Structs, and how they are referred to."""

    def __init__(self, kinds: Iterable[Kind]) -> None:
        ordered = sorted(set(kinds), key=lambda kind: kind.__name__)
        schemas, components = msgspec.json.schema_components(ordered, ref_template=REFERENCE)
        self._by_kind: dict[Kind, Node] = dict(zip(ordered, schemas, strict=True))
        self.components = {name: _described(components[name]) for name in sorted(components)}

    def of(self, kind: Kind) -> Node:
        """Return what stands for a Struct where one is meant."""
        return self._by_kind[kind]

    def fields(self, kind: Kind) -> Iterator[tuple[str, Node, bool]]:
        """Yield a Struct's fields: name, schema, and whether one has to be there."""
        schema = self.components[kind.__name__]
        for name, field in schema["properties"].items():
            yield name, field, name in schema.get("required", ())


def _kinds() -> Iterator[Kind]:
    yield ErrorEnvelope
    for shape in SHAPES.values():
        yield from (
            kind
            for kind in (shape.takes, shape.query, *shape.gives.values(), *shape.events.values())
            if kind is not None
        )


def _described(schema: Node) -> Node:
    """Return a schema with the descriptions of docstrings in Markdown's notation."""
    if isinstance(schema.get("description"), str):
        return {**schema, "description": _prose(schema["description"])}
    return schema


def _prose(docstring: str) -> str:
    """Return a docstring as Markdown, each paragraph one line."""
    paragraphs = inspect.cleandoc(docstring).replace("``", "`").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _operation(route: Route, shape: Shape, schemas: _Schemas) -> Node:
    summary, _, description = _prose(route.handler.__doc__ or "").partition("\n\n")
    module, name = route.handler.__module__.rpartition(".")[2], getattr(route.handler, "__name__", "")
    operation: Node = {
        "operationId": f"{module.removeprefix('platform_')}_{name}",
        "tags": [module.removeprefix("platform_")],
        "summary": summary,
        "security": SECURITY[route.access],
        "responses": _responses(shape, schemas),
    }
    if description:
        operation["description"] = description
    parameters = [*_path_parameters(route), *_query_parameters(shape, schemas), *_header_parameters(shape)]
    if parameters:
        operation["parameters"] = parameters
    if shape.takes is not None:
        content = {JSON: {"schema": schemas.of(shape.takes)}}
        operation["requestBody"] = {"required": shape.is_body_needed, "content": content}
    return operation


def _path_parameters(route: Route) -> Iterator[Node]:
    for name, _ in _PARAMETER.findall(route.path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _query_parameters(shape: Shape, schemas: _Schemas) -> Iterator[Node]:
    if shape.query is None:
        return
    for name, schema, is_required in schemas.fields(shape.query):
        yield {"name": name, "in": "query", "required": is_required, "schema": schema}


def _header_parameters(shape: Shape) -> Iterator[Node]:
    for name, description in shape.headers.items():
        schema = {"type": "string", "maxLength": 255} if name == "Idempotency-Key" else {"type": "string"}
        yield {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


def _responses(shape: Shape, schemas: _Schemas) -> Node:
    answers: Node = {str(status): _answer(shape, kind, schemas) for status, kind in shape.gives.items()}
    failure = {"schema": schemas.of(ErrorEnvelope)}
    answers["4XX"] = {
        "description": "The request is at fault: the message says what to do.",
        "content": {JSON: failure},
    }
    answers["5XX"] = {"description": "The gateway or a server behind it is at fault.", "content": {JSON: failure}}
    return answers


def _events(shape: Shape, schemas: _Schemas) -> Node:
    """Return what stands for a stream: as in OpenAPI 3.2, what each of its events is."""
    if not shape.events:
        return {}
    kinds = [
        {
            "type": "object",
            "properties": {
                "event": {"const": name},
                "data": {"type": "string", "contentMediaType": JSON, "contentSchema": schemas.of(kind)},
            },
            "required": ["event", "data"],
        }
        for name, kind in shape.events.items()
    ]
    return {"schema": {"description": "Each of the server-sent events.", "oneOf": kinds}}


def _answer(shape: Shape, kind: Kind | None, schemas: _Schemas) -> Node:
    if kind is None:
        text = {shape.media: {"schema": {"type": "string"}}}
        return {"description": "Done."} if shape.media == JSON else {"description": "Text.", "content": text}
    content: Node = {shape.media: {"schema": schemas.of(kind)}}
    if shape.streams:
        content[EVENTS] = _events(shape, schemas)
    return {"description": schemas.components[kind.__name__].get("description", kind.__name__), "content": content}
