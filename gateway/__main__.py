"""The command line: ``letta-gateway serve``, ``letta-gateway check`` and ``letta-gateway db``."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NoReturn

import click

from gateway import settings_text
from gateway.settings import SettingError, Settings, load


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

    settings = _settings(config)
    try:
        run(settings, lambda text: click.echo(text, err=True))
    except (SettingError, StartFailed) as error:
        _stop(str(error))


@main.command()
@click.option("--settings", "show", flag_value="settings", help="List every setting and stop.")
@click.option("--env-example", "show", flag_value="env-example", help="Write an example environment file and stop.")
@click.pass_obj
def check(config: Path | None, show: str | None) -> None:
    """Check the settings, that Letta answers, and which agents it has; the exit status tells."""
    if show is not None:
        click.echo(settings_text.listing() if show == "settings" else settings_text.env_example(), nl=False)
        return
    from gateway.server.check import run_check  # noqa: PLC0415 - as above

    settings = _settings(config)
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


def _database(work: Callable[[str, Path], Coroutine[Any, Any, str]], settings: Settings) -> str:
    from gateway.storage.failures import StorageFailed  # noqa: PLC0415 - as above

    try:
        return asyncio.run(work(settings.database_url, Path(settings.home)))
    except StorageFailed as error:
        _stop(str(error))


def _settings(config: Path | None) -> Settings:
    try:
        return load(config_file=config)
    except SettingError as error:
        _stop(str(error))


def _stop(reason: str) -> NoReturn:
    click.echo(f"letta-gateway: {reason}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
