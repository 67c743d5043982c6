import msgspec

from gateway.accounts.answers import admin_user, key_answer, new_key_answer, session_answer, user_answer
from gateway.accounts.identity.protocol import Tokens
from gateway.accounts.profiles import Budget, Profile
from gateway.accounts.user_keys import UserKey

ADA = Profile(
    id="user-1",
    email="ada@example.com",
    name="Ada",
    metadata=b'{"theme":"dark"}',
    letta_agent_id="agent-1",
    litellm_key="the encrypted key",
    is_blocked=False,
    budget=Budget(1_500_000, "month"),
    created_at=100.5,
    updated_at=200.5,
)
AS_ADA = {
    "id": "user-1",
    "email": "ada@example.com",
    "name": "Ada",
    "metadata": {"theme": "dark"},
    "agent": {"id": "agent-1", "name": "Ada-1"},
    "created_at": 100.5,
}
KEY = UserKey(id="key-1", user_id="user-1", name="Laptop", hint="wxyz", created_at=100.5)


def told(answer: msgspec.Struct) -> object:
    return msgspec.json.decode(msgspec.json.encode(answer))


def test_user_sees_themselves_and_nothing_of_the_gateways_own() -> None:
    assert told(user_answer(ADA, "Ada-1")) == AS_ADA
    assert told(user_answer(ADA, None)) == {**AS_ADA, "agent": {"id": "agent-1", "name": None}}
    new = msgspec.structs.replace(ADA, letta_agent_id=None, metadata=b"{}")
    assert told(user_answer(new, None)) == {**AS_ADA, "agent": None, "metadata": {}}


def test_session_is_told_with_its_tokens() -> None:
    assert told(
        session_answer(user_answer(ADA, "Ada-1"), Tokens("access", "refresh", 900, "user-1", "ada@example.com"))
    ) == {
        "user": AS_ADA,
        "access_token": "access",
        "refresh_token": "refresh",
        "token_type": "bearer",
        "expires_in": 900,
    }


def test_operator_sees_the_budget_and_no_secret() -> None:
    more = {"agent": {"id": "agent-1"}, "is_blocked": False, "updated_at": 200.5}
    assert told(admin_user(ADA)) == {**AS_ADA, **more, "budget": {"amount": "1.500000", "period": "month"}}
    assert told(admin_user(msgspec.structs.replace(ADA, budget=None))) == {**AS_ADA, **more, "budget": None}


def test_key_is_told_once() -> None:
    later = {"id": "key-1", "name": "Laptop", "hint": "wxyz", "created_at": 100.5, "last_used_at": None}
    assert told(key_answer(KEY)) == later
    assert told(new_key_answer(KEY, "sk-lg-secret")) == {**later, "key": "sk-lg-secret"}
