"""Write the rules of deploy/prometheus for the Prometheus operator: `python -m tests.services.prometheus_rule`."""

import textwrap
from pathlib import Path
from typing import Final

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
MANIFEST: Final = DEPLOY / "k8s/monitoring/prometheusrule.yaml"
_HEAD: Final = """\
# Made of deploy/prometheus/rules/{file} by `make prometheus-rules`: change it there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: letta-gateway-{name}
  labels:
    app.kubernetes.io/name: letta-gateway
spec:
"""


def made() -> str:
    """Return the manifests as they have to be: one for each file of rules."""
    files = sorted((DEPLOY / "prometheus/rules").glob("*.yml"))
    return "---\n".join(_manifest(file) for file in files)


def _manifest(file: Path) -> str:
    rules = file.read_text("utf-8")
    head = _HEAD.format(file=file.name, name=file.stem)
    return head + textwrap.indent(rules[rules.index("groups:\n") :], "  ")


if __name__ == "__main__":
    MANIFEST.write_text(made(), "utf-8")
