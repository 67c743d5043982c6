import asyncio
import base64
import time

import pytest

from gateway.accounts.secrets import Secrets
from gateway.accounts.user_keys import MOST_KEYS, PREFIX, UserKeys
from gateway.errors import InvalidRequest
from gateway.storage.address import Address
from gateway.storage.engine import Database
from tests.accounts.dumps import dump
from tests.accounts.identities import SECRET_KEY, Clock
from tests.storage.databases import opened
from tests.storage.late import LateDatabase
from tests.storage.texts import UNSTORABLE


@pytest.fixture
def clock() -> Clock:
    return Clock(1_000.0)


@pytest.fixture
def keys(database: Database, clock: Clock) -> UserKeys:
    return UserKeys(database, Secrets.from_key(SECRET_KEY), clock)


async def test_key_is_found_by_its_plain_text(keys: UserKeys) -> None:
    made, plaintext = await keys.make("ada", "  Laptop ")
    assert (made.user_id, made.name, made.hint, made.created_at) == ("ada", "Laptop", plaintext[-4:], 1_000.0)
    assert await keys.find(plaintext) == made
    assert [key.id for key in await keys.list("ada")] == [made.id]


async def test_key_has_256_random_bits(keys: UserKeys) -> None:
    plaintexts = [(await keys.make("ada", "key"))[1] for _ in range(20)]
    assert len(set(plaintexts)) == 20
    for plaintext in plaintexts:
        assert plaintext.startswith(PREFIX)
        assert len(plaintext) == 6 + 43 + 8
        assert len(base64.urlsafe_b64decode(plaintext[6:49] + "=")) == 32


async def test_users_see_their_own(keys: UserKeys, clock: Clock) -> None:
    first, _ = await keys.make("ada", "first")
    clock.now += 1
    second, _ = await keys.make("ada", "second")
    third, plaintext = await keys.make("bob", "third")
    assert await keys.list("ada") == [second, first]
    assert await keys.list("bob") == [third]
    assert await keys.list("carol") == []
    assert not await keys.delete("ada", third.id)
    assert await keys.find(plaintext) is not None


async def test_deleted_key_is_nobodys(keys: UserKeys) -> None:
    made, plaintext = await keys.make("ada", "key")
    assert await keys.delete("ada", made.id)
    assert not await keys.delete("ada", made.id)
    assert await keys.find(plaintext) is None
    assert await keys.list("ada") == []


async def test_use_is_noted_now_and_then(keys: UserKeys, clock: Clock) -> None:
    _, plaintext = await keys.make("ada", "key")
    noted = []
    for seconds in (0, 1, 598, 2, 1_000):
        clock.now += seconds
        await keys.find(plaintext)
        noted.append((await keys.list("ada"))[0].last_used_at)
    assert noted == [1_000.0, 1_000.0, 1_000.0, 1_601.0, 2_601.0]


async def test_use_is_noted_though_the_clock_stepped_back(keys: UserKeys, clock: Clock) -> None:
    _, plaintext = await keys.make("ada", "key")
    await keys.find(plaintext)
    clock.now -= 3_600
    await keys.find(plaintext)
    assert (await keys.list("ada"))[0].last_used_at == clock.now


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a\0b", "x" * 101, "\u202eevil"])
async def test_name_that_is_none(keys: UserKeys, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await keys.make("ada", name)
    assert caught.value.param == "name"
    assert await keys.list("ada") == []


async def test_one_key_too_many(keys: UserKeys) -> None:
    made = [await keys.make("ada", "key") for _ in range(MOST_KEYS)]
    with pytest.raises(InvalidRequest) as caught:
        await keys.make("ada", "key")
    assert caught.value.code == "too_many_keys"
    await keys.make("bob", "key")
    await keys.delete("ada", made[0][0].id)
    await keys.make("ada", "key")


@pytest.mark.parametrize("text", UNSTORABLE)
async def test_text_that_cannot_be_stored(keys: UserKeys, text: str) -> None:
    assert await keys.list(text) == []
    assert not await keys.delete(text, "key")
    assert not await keys.delete("ada", text)
    assert await keys.find(text) is None


async def test_what_was_made_up_never_reaches_the_database() -> None:
    """A database that is closed would refuse every question."""
    database = LateDatabase()
    await database.close()
    keys = UserKeys(database, Secrets.from_key(SECRET_KEY))
    stranger = Secrets.from_key(SECRET_KEY + "!").with_check(PREFIX + "a" * 43)
    for plaintext in ("", PREFIX, PREFIX + "a" * 51, stranger, stranger[:-1], "\ud800" * 57, PREFIX + "ä" * 51):
        assert await keys.find(plaintext) is None
    begun = time.process_time()
    for number in range(5_000):
        assert await keys.find(f"{PREFIX}{number:051}") is None
    assert (time.process_time() - begun) / 5_000 < 0.001


async def test_thousand_keys_leave_no_plain_text_in_the_database(
    address: Address, request: pytest.FixtureRequest
) -> None:
    async with opened(address) as database:
        keys = UserKeys(database, Secrets.from_key(SECRET_KEY))
        plaintexts: list[str] = []
        for number in range(0, 1_000, 20):  # some at a time: PostgreSQL is waited for more than it works
            some = await asyncio.gather(*(keys.make(f"user {one}", "key") for one in range(number, number + 20)))
            plaintexts += [plaintext for _, plaintext in some]
        for plaintext in plaintexts[::100]:
            assert await keys.find(plaintext) is not None
    stolen = dump(address, request)
    assert b"user 999" in stolen
    for plaintext in plaintexts:
        secret = plaintext[len(PREFIX) : -8].encode()
        random_bits = base64.urlsafe_b64decode(secret + b"=")
        for shape in (secret, secret.hex().encode(), random_bits, random_bits.hex().encode()):
            assert shape not in stolen
