import inspect

import pytest

from gateway.accounts.identity.local import LocalIdentity
from gateway.accounts.identity.protocol import IdentityProvider, Tokens
from gateway.accounts.identity.supabase import SupabaseIdentity

ASKED = [name for name, value in vars(IdentityProvider).items() if inspect.isfunction(value) and name[0] != "_"]


@pytest.mark.parametrize("provider", [LocalIdentity, SupabaseIdentity])
@pytest.mark.parametrize("name", ASKED)
def test_provider_takes_what_it_is_asked_with(provider: type, name: str) -> None:
    asked, taken = (inspect.signature(getattr(kind, name)).parameters for kind in (IdentityProvider, provider))
    assert list(taken) == list(asked)
    assert [str(one.annotation) for one in taken.values()] == [str(one.annotation) for one in asked.values()]


def test_tracebacks_show_no_token() -> None:
    tokens = Tokens("secret access", "secret refresh", 900, "user-1", "ada@example.com")
    assert repr(tokens) == "Tokens(user_id='user-1')"
