"""The settings' table written out: for people, for ``deploy/env.example``, for the README."""

from gateway.settings import Setting, show_value, table


def listing() -> str:
    """Return every setting on a line of its own: name, default, help."""
    return "".join(f"{s.row.env:38} {_default(s):28} {s.row.help}\n" for s in table())


def env_example() -> str:
    """Return an environment file with every setting, commented out at its default."""
    head = (
        "# Letta Gateway: every setting at its default (made by `make env-example`).\n"
        "# Each may also come from letta-gateway.toml, by its field name, or from a file named by NAME_FILE.\n"
    )
    return head + "".join(f"\n# {s.row.help}{_aliases(s)}\n#{s.row.env}={_default(s)}\n" for s in table())


def markdown() -> str:
    """Return the README's table."""
    head = "| setting | TOML | default | what it is |\n| --- | --- | --- | --- |\n"
    return head + "".join(
        f"| `{s.row.env}` | `{s.field}` | {_code(_default(s))} | {s.row.help}{_aliases(s)} |\n" for s in table()
    )


def _default(setting: Setting) -> str:
    return show_value(setting.default)


def _aliases(setting: Setting) -> str:
    return f" Also: {', '.join(setting.row.aliases)}." if setting.row.aliases else ""


def _code(text: str) -> str:
    return f"`{text}`" if text else ""
