"""``letta-gateway check``: do the settings hold, does Letta answer, which agents does it have."""

from collections.abc import Callable

from gateway.errors import GatewayError
from gateway.letta.catalog import models_of
from gateway.letta.embedded import is_installed
from gateway.metrics import Metrics
from gateway.server.app import build_backend
from gateway.server.local_letta import local_config
from gateway.settings import SettingError, Settings, check_reachable
from gateway.tasks import TaskSet
from middleware.chain import build_chain


async def run_check(settings: Settings, say: Callable[[str], None]) -> bool:
    """Say what is found and return whether the gateway would serve."""
    try:
        check_reachable(settings)
        chain = build_chain(settings)
    except SettingError as error:
        say(f"settings   FAILED  {error}")
        return False
    say(f"settings   ok      {len(chain)} middleware")
    if not settings.letta_base_url:
        return _local(settings, say)
    backend = build_backend(settings, Metrics(), TaskSet())
    try:
        await backend.ping()
        say(f"letta      ok      {settings.letta_base_url}")
        models = models_of(await backend.agents())
    except GatewayError as error:
        say(f"letta      FAILED  {settings.letta_base_url}: {error.message}")
        return False
    finally:
        await backend.close()
    say(f"agents     ok      {len(models.by_model)} found")
    for model, agent in list(models.by_model.items())[:20]:
        say(f"                   {model}  ({agent.id})")
    return True


def _local(settings: Settings, say: Callable[[str], None]) -> bool:
    provider = local_config(settings).provider
    if not is_installed():
        say("letta      FAILED  none is configured or installed: set LETTA_BASE_URL, or add the extra 'embedded'")
        return False
    say(f"letta      local   'serve' starts one; {provider.name if provider else 'a scripted model'} answers")
    return True
