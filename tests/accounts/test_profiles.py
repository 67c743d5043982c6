import asyncio

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.accounts.profiles import MAX_EMAIL, MAX_METADATA, Budget, Profile, Profiles, canonical
from gateway.errors import InvalidRequest
from gateway.storage.address import Address
from gateway.storage.engine import Database
from tests.storage.databases import opened
from tests.storage.texts import HOSTILE, UNSTORABLE

ADA = Profile(id="user-1", email="ada@example.com", name="Ada", created_at=100.5, updated_at=100.5)
BOB = Profile(
    id="user-2",
    email="bob@example.com",
    name="Bob",
    metadata=b'{"theme": "dark", "nul": "\\u0000"}',
    letta_agent_id="agent-2",
    litellm_key="encrypted",
    is_blocked=True,
    budget=Budget(5_000_000, "month"),
    created_at=200.25,
    updated_at=300.0,
)


@pytest.fixture
def profiles(database: Database) -> Profiles:
    return Profiles(database, lambda: 1_000.0)


# Addresses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("email", "kept"),
    [
        ("ada@example.com", "ada@example.com"),
        ("  Ada@Example.COM\n", "ada@example.com"),
        ("\uff41da@example.com", "ada@example.com"),
        ("STRASSE@example.com", "strasse@example.com"),
        ("stra\u00dfe@example.com", "strasse@example.com"),
        ("Zoe\u0308@example.com", "zo\u00eb@example.com"),
        ("a+b_%'\"@[203.0.113.7]", "a+b_%'\"@[203.0.113.7]"),
        ("@".join(("x" * (MAX_EMAIL - 2), "y")), "x" * (MAX_EMAIL - 2) + "@y"),
    ],
)
def test_address_is_the_same_however_it_is_written(email: str, kept: str) -> None:
    assert canonical(email) == kept
    assert canonical(kept) == kept


@pytest.mark.parametrize(
    "email",
    [
        "",
        " ",
        "ada",
        "@example.com",
        "ada@",
        "ada@b@example.com",
        "ada@exam ple.com",
        "ada@example.com\r\nBcc: all@example.com",
        "ada\0@example.com",
        "ada\u202e@example.com",
        "a\u200bda@example.com",
        "ada\u00a0@example.com",
        "\ud800@example.com",
        "x" * (MAX_EMAIL - 1) + "@y",
        "ö" * 130 + "@example.com",
        "a\ufe6bb@example.com",
        "x" * 1_000_000 + "@example.com",
    ],
)
def test_what_is_no_address(email: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        canonical(email)
    assert caught.value.param == "email"
    assert len(caught.value.message) < 200


@given(st.text(max_size=20).map(lambda text: f"a{text}@{text}b"))
def test_address_that_is_kept_stays_what_it_is(email: str) -> None:
    try:
        kept = canonical(email)
    except InvalidRequest:
        return
    assert canonical(kept) == kept == canonical(email.upper()) or kept != canonical(email)


# Profiles ------------------------------------------------------------------------------------------------------------


async def test_profile_is_found_as_it_was_added(profiles: Profiles) -> None:
    for profile in (ADA, BOB):
        assert await profiles.add(profile)
        assert await profiles.find(profile.id) == profile
        assert await profiles.find_by_email(profile.email) == profile


async def test_profile_survives_a_restart(address: Address) -> None:
    async with opened(address) as database:
        await Profiles(database).add(BOB)
    async with opened(address) as database:
        assert await Profiles(database).find(BOB.id) == BOB


async def test_user_who_is_not_known(profiles: Profiles) -> None:
    assert await profiles.find("user-1") is None
    assert await profiles.find_by_email("ada@example.com") is None
    assert await profiles.change("user-1", name="Ada") is None
    await profiles.delete("user-1")


async def test_id_or_address_that_is_there_already(profiles: Profiles) -> None:
    await profiles.add(ADA)
    assert not await profiles.add(msgspec.structs.replace(ADA, email="other@example.com"))
    assert not await profiles.add(msgspec.structs.replace(ADA, id="user-9", name="Mallory"))
    assert await profiles.find("user-9") is None
    assert await profiles.find(ADA.id) == ADA


async def test_same_user_twice_at_once_is_added_once(profiles: Profiles) -> None:
    twins = [msgspec.structs.replace(ADA, id=f"user-{number}") for number in range(8)]
    assert sorted(await asyncio.gather(*map(profiles.add, twins))) == [False] * 7 + [True]
    assert len(await profiles.page(None, 100, None)) == 1


async def test_only_what_is_given_is_changed(profiles: Profiles) -> None:
    await profiles.add(BOB)
    changed = await profiles.change(BOB.id, name="Robert")
    assert changed == msgspec.structs.replace(BOB, name="Robert", updated_at=1_000.0)
    assert await profiles.find(BOB.id) == changed


async def test_everything_can_be_changed(profiles: Profiles) -> None:
    await profiles.add(ADA)
    wanted = msgspec.structs.replace(BOB, id=ADA.id, email=ADA.email, created_at=ADA.created_at, updated_at=1_000.0)
    changed = await profiles.change(
        ADA.id,
        name=wanted.name,
        metadata=wanted.metadata,
        letta_agent_id=wanted.letta_agent_id,
        litellm_key=wanted.litellm_key,
        is_blocked=wanted.is_blocked,
        budget=wanted.budget,
    )
    assert changed == wanted
    emptied = await profiles.change(ADA.id, letta_agent_id=None, litellm_key=None, budget=None, is_blocked=False)
    assert emptied == msgspec.structs.replace(
        wanted, letta_agent_id=None, litellm_key=None, budget=None, is_blocked=False
    )


async def test_deleted_user_is_gone_and_the_address_free(profiles: Profiles) -> None:
    await profiles.add(ADA)
    await profiles.add(BOB)
    await profiles.delete(ADA.id)
    assert await profiles.find(ADA.id) is None
    assert await profiles.find(BOB.id) == BOB
    assert await profiles.add(msgspec.structs.replace(ADA, id="user-3"))


async def test_largest_metadata_and_a_larger_one(profiles: Profiles) -> None:
    largest = b'{"x": "' + b"y" * (MAX_METADATA - 9) + b'"}'
    assert len(largest) == MAX_METADATA
    assert await profiles.add(msgspec.structs.replace(ADA, metadata=largest))
    for larger in (largest + b" ",):
        with pytest.raises(ValueError, match="at most 4096 bytes"):
            await profiles.change(ADA.id, metadata=larger)
        with pytest.raises(ValueError, match="at most 4096 bytes"):
            await profiles.add(msgspec.structs.replace(BOB, metadata=larger))
    found = await profiles.find(ADA.id)
    assert found is not None
    assert found.metadata == largest


@pytest.mark.parametrize("text", UNSTORABLE)
async def test_text_that_cannot_be_stored(profiles: Profiles, text: str) -> None:
    for field in ("id", "email", "name", "letta_agent_id"):
        with pytest.raises(ValueError, match="without NUL"):
            await profiles.add(msgspec.structs.replace(ADA, **{field: text}))
    with pytest.raises(ValueError, match="without NUL"):
        await profiles.change(ADA.id, name=text)
    assert await profiles.find(text) is None
    assert await profiles.find_by_email(text) is None
    assert await profiles.change(text, name="x") is None
    assert await profiles.page(None, 10, text) == []
    await profiles.delete(text)


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_name_is_a_name(profiles: Profiles, name: str) -> None:
    await profiles.add(BOB)
    await profiles.add(msgspec.structs.replace(ADA, name=name))
    found = await profiles.find(ADA.id)
    assert found is not None
    assert found.name == name
    assert await profiles.find(BOB.id) == BOB


def test_logs_show_who_it_is_and_no_more() -> None:
    assert repr(BOB) == "Profile(id='user-2')"


# Pages ---------------------------------------------------------------------------------------------------------------


async def test_pages_come_oldest_first_and_whole(profiles: Profiles) -> None:
    made = [
        msgspec.structs.replace(
            ADA, id=f"user-{number:02}", email=f"{number}@example.com", created_at=float(number // 3)
        )
        for number in range(10)
    ]
    for profile in reversed(made):
        await profiles.add(profile)
    found: list[Profile] = []
    while page := await profiles.page(found[-1].id if found else None, 4, None):
        assert len(page) <= 4
        found += page
    assert found == made


async def test_page_from_behind_nobody(profiles: Profiles) -> None:
    await profiles.add(ADA)
    for cursor in ("nobody", "", "' OR 1=1 --", "\0", "x" * 10_000):
        with pytest.raises(InvalidRequest) as caught:
            await profiles.page(cursor, 10, None)
        assert caught.value.param == "cursor"


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("", ["user-1", "user-2"]),
        ("ada", ["user-1"]),
        ("ADA@", ["user-1"]),
        ("example.com", ["user-1", "user-2"]),
        ("bo", ["user-2"]),
        ("BOB", ["user-2"]),
        ("%", []),
        ("_", []),
        ("a%b", []),
        ("\\", []),
        ("/", []),
        ("' OR '1'='1", []),
        ("nobody", []),
    ],
)
async def test_search(profiles: Profiles, search: str, found: list[str]) -> None:
    await profiles.add(ADA)
    await profiles.add(BOB)
    assert [profile.id for profile in await profiles.page(None, 10, search)] == found


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    metadata=st.dictionaries(st.text(max_size=20), st.text(max_size=50), max_size=5).map(msgspec.json.encode),
    budget=st.none() | st.builds(Budget, st.integers(0, 10**15), st.sampled_from(["day", "month", "total"])),
    created_at=st.floats(0, 4e9),
)
async def test_whatever_is_changed_is_found(
    profiles: Profiles, metadata: bytes, budget: Budget | None, created_at: float
) -> None:
    await profiles.delete(ADA.id)
    await profiles.add(msgspec.structs.replace(ADA, created_at=created_at))
    changed = await profiles.change(ADA.id, metadata=metadata, budget=budget)
    assert changed is not None
    assert (changed.metadata, changed.budget, changed.created_at) == (metadata, budget, created_at)
    assert await profiles.find(ADA.id) == changed
