"""YAML on standard input, as JSON on standard output: `python -m tests.services.manifests [VERSION]...`.

With versions of Kubernetes each document must fit their schemas, which know every field: what does not is told on
standard error, and the exit status is 1. Run by the services' own Python.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import yaml


def main(versions: list[str]) -> None:
    """Read, check and write."""
    documents = [document for document in yaml.safe_load_all(sys.stdin) if document is not None]
    json.dump(documents, sys.stdout)
    problems = [problem for version in versions for document in documents for problem in refused(document, version)]
    if problems:
        sys.exit("\n".join(problems))


def refused(document: dict[str, Any], version: str) -> Iterator[str]:
    """Yield what a version says against a document."""
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        yield f"{version}: {document.get('kind')}: {error}"


if __name__ == "__main__":
    main(sys.argv[1:])
