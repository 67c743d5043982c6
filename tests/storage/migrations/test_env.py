from types import ModuleType

import pytest
from alembic.script import Script

from gateway.storage import schema

SCRIPTS = list(schema._scripts(schema._config(None)).walk_revisions())


def test_one_line_of_revisions() -> None:
    assert [script.revision for script in SCRIPTS] == sorted((script.revision for script in SCRIPTS), reverse=True)
    assert [script.down_revision for script in SCRIPTS] == [script.revision for script in SCRIPTS[1:]] + [None]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.revision)
def test_revision_goes_forward_only(script: Script) -> None:
    module: ModuleType = script.module
    assert callable(module.upgrade)
    assert not hasattr(module, "downgrade")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.revision)
def test_revision_does_not_follow_the_tables(script: Script) -> None:
    """What was released once stays as it was, whatever becomes of ``tables.py``."""
    assert not any(
        getattr(value, "__module__", "") == "gateway.storage.tables" for value in vars(script.module).values()
    )
    assert "metadata" not in vars(script.module)
