"""The command line: ``letta-gateway serve``, ``check``, ``db``, ``users`` and ``keys``."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from gateway import settings_text
from gateway.settings import Loaded, SettingError, Settings, load_with_origins

if TYPE_CHECKING:
    from gateway.server.user_commands import Command


@click.group()
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="A TOML file of settings.")
@click.pass_context
def main(context: click.Context, config: Path | None) -> None:
    """Letta agents behind the OpenAI API."""
    context.obj = config


@main.command()
@click.pass_obj
def serve(config: Path | None) -> None:
    """Serve until a signal ends it."""
    from gateway.server.serve import StartFailed, run  # noqa: PLC0415 - what checks settings only need not load it

    loaded = _loaded(config)
    try:
        run(loaded.settings, lambda text: click.echo(text, err=True), loaded.origins)
    except (SettingError, StartFailed) as error:
        _stop(str(error))


@main.command()
@click.option("--settings", "show", flag_value="settings", help="List every setting and stop.")
@click.option("--env-example", "show", flag_value="env-example", help="Write an example environment file and stop.")
@click.option("--openapi", "show", flag_value="openapi", help="Write the API's description (OpenAPI 3.1) and stop.")
@click.pass_obj
def check(config: Path | None, show: str | None) -> None:
    """Check the settings, that Letta answers, and which agents it has; the exit status tells."""
    if show == "openapi":
        from gateway.server.api_document import api_document  # noqa: PLC0415 - as above

        click.echo(api_document(), nl=False)
        return
    if show is not None:
        click.echo(settings_text.listing() if show == "settings" else settings_text.env_example(), nl=False)
        return
    from gateway.server.check import run_check  # noqa: PLC0415 - as above

    settings = _settings(config)
    _say_where(settings)
    if not asyncio.run(run_check(settings, click.echo)):
        sys.exit(1)


@main.group()
def db() -> None:
    """Look after the gateway's own database, while no gateway uses it if it is a file."""


@db.command()
@click.pass_obj
def upgrade(config: Path | None) -> None:
    """Bring the schema up to date, as 'serve' does when it starts."""
    from gateway.storage.maintenance import upgraded  # noqa: PLC0415 - as above

    settings = _settings(config)
    click.echo(_database(upgraded, settings))


@db.command()
@click.pass_obj
def current(config: Path | None) -> None:
    """Tell which schema the database has, and which one this gateway brings."""
    from gateway.storage.maintenance import described  # noqa: PLC0415 - as above

    settings = _settings(config)
    click.echo(_database(described, settings))


@main.group()
def users() -> None:
    """Look after users, by id or e-mail; while a gateway has the file open, use /api/v1/admin instead."""


@users.command("list")
@click.option("--search", help="Part of an e-mail or a name.")
@click.pass_obj
def list_users(config: Path | None, search: str | None) -> None:
    """List users, oldest first."""
    from gateway.server import user_commands  # noqa: PLC0415 - as above

    _on_users(config, user_commands.list_users(search))


@users.command()
@click.argument("user")
@click.pass_obj
def block(config: Path | None, user: str) -> None:
    """Keep a user out: sessions end, and neither password nor key lets them in."""
    from gateway.server import user_commands  # noqa: PLC0415 - as above

    _on_users(config, user_commands.set_blocked(user, is_blocked=True))


@users.command()
@click.argument("user")
@click.pass_obj
def unblock(config: Path | None, user: str) -> None:
    """Let a user in again."""
    from gateway.server import user_commands  # noqa: PLC0415 - as above

    _on_users(config, user_commands.set_blocked(user, is_blocked=False))


@users.command("set-password")
@click.argument("user")
@click.password_option(help="The new password; asked for unless given.")
@click.pass_obj
def set_password(config: Path | None, user: str, password: str) -> None:
    """Give a user a new password, and end their sessions."""
    from gateway.server import user_commands  # noqa: PLC0415 - as above

    _on_users(config, user_commands.set_password(user, password))


@users.command("delete")
@click.argument("user")
@click.confirmation_option(prompt="Delete the user with agent, history and usage?")
@click.pass_obj
def delete_user(config: Path | None, user: str) -> None:
    """Delete a user and all that is theirs."""
    from gateway.server import user_commands  # noqa: PLC0415 - as above

    _on_users(config, user_commands.delete_user(user))


@main.group()
def keys() -> None:
    """Look after a user's personal API keys; while a gateway has the file open, use /api/v1/user/keys instead."""


@keys.command("list")
@click.argument("user")
@click.pass_obj
def list_keys(config: Path | None, user: str) -> None:
    """List a user's keys, newest first."""
    from gateway.server import user_commands  # noqa: PLC0415 - as above

    _on_users(config, user_commands.list_keys(user))


@keys.command()
@click.argument("user")
@click.argument("name")
@click.pass_obj
def make(config: Path | None, user: str, name: str) -> None:
    """Make a key for a user: it is shown once."""
    from gateway.server import user_commands  # noqa: PLC0415 - as above

    _on_users(config, user_commands.make_key(user, name))


@keys.command("delete")
@click.argument("user")
@click.argument("key")
@click.pass_obj
def delete_key(config: Path | None, user: str, key: str) -> None:
    """Delete a user's key."""
    from gateway.server import user_commands  # noqa: PLC0415 - as above

    _on_users(config, user_commands.delete_key(user, key))


def _on_users(config: Path | None, command: "Command") -> None:
    from gateway.server.user_commands import CommandFailed, run  # noqa: PLC0415 - as above

    settings = _settings(config)
    _say_where(settings)
    try:
        lines = run(settings, command)
    except CommandFailed as error:
        _stop(str(error))
    for line in lines:
        click.echo(line)


def _say_where(settings: Settings) -> None:
    """Tell on standard error what the command works on: it may be no other gateway's than this shell's."""
    from gateway.server.installation import described  # noqa: PLC0415 - as above
    from gateway.storage.failures import StorageFailed  # noqa: PLC0415 - as above

    try:
        click.echo(f"letta-gateway: {described(settings)}", err=True)
    except StorageFailed as error:
        _stop(str(error))


def _database(work: Callable[[str, Path], Coroutine[Any, Any, str]], settings: Settings) -> str:
    from gateway.storage.failures import StorageFailed  # noqa: PLC0415 - as above

    try:
        return asyncio.run(work(settings.database_url, Path(settings.home)))
    except StorageFailed as error:
        _stop(str(error))


def _settings(config: Path | None) -> Settings:
    return _loaded(config).settings


def _loaded(config: Path | None) -> Loaded:
    try:
        return load_with_origins(config_file=config)
    except SettingError as error:
        _stop(str(error))


def _stop(reason: str) -> NoReturn:
    click.echo(f"letta-gateway: {reason}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
