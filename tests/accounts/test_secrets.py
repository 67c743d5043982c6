import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from gateway.accounts.secrets import CHECK, FILE, SecretFailed, Secrets, secrets_of

KEY = "0123456789abcdef0123456789abcdef"


def signing(secrets: Secrets) -> bytes:
    return secrets.signing_key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


# Derivation ----------------------------------------------------------------------------------------------------------


def test_same_secret_gives_the_same_keys() -> None:
    one, other = Secrets.from_key(KEY), Secrets.from_key(KEY)
    assert signing(one) == signing(other)
    assert one.with_check("text") == other.with_check("text")
    assert other.decrypt(one.encrypt("sk-1")) == "sk-1"


def test_other_secret_gives_other_keys() -> None:
    one, other = Secrets.from_key(KEY), Secrets.from_key(KEY[:-1] + "0")
    assert signing(one) != signing(other)
    assert one.with_check("text") != other.with_check("text")
    assert other.decrypt(one.encrypt("sk-1")) is None


def test_derived_keys_stay_what_they_are() -> None:
    """Tokens and stored secrets outlive a release: with another derivation they would all be lost."""
    secrets = Secrets.from_key(KEY)
    assert signing(secrets).hex() == "d6755130950236540c0d630ad979bde39d3397bbf08cb2477a4c389bbb024687"
    assert secrets.with_check("sk-lg-x") == "sk-lg-xjRtw7L9L"
    stored = "gAAAAABrAeonx4uUX7S5DyKDfQxgi0GITDrSHUpztbpj6-B6dQf3X2eh2QfPf7yC38SgnVJ5DqCwLYhw7FTl8Tk1umD_WOfavg=="
    assert secrets.decrypt(stored) == "sk-litellm"


@pytest.mark.parametrize("short", ["", "short", "x" * 31])
def test_short_secret_is_refused(short: str) -> None:
    with pytest.raises(SecretFailed, match="SECRET_KEY is wrong: give it 32 characters"):
        Secrets.from_key(short)


# Stored secrets ------------------------------------------------------------------------------------------------------


def test_stored_secret_does_not_show_what_it_holds() -> None:
    secrets = Secrets.from_key(KEY)
    first, second = secrets.encrypt("sk-litellm"), secrets.encrypt("sk-litellm")
    assert "sk-litellm" not in first
    assert first != second
    assert secrets.decrypt(first) == secrets.decrypt(second) == "sk-litellm"


@pytest.mark.parametrize("damaged", ["", "x", "gAAAAA", "ä", "\0"])
def test_damaged_secret_is_none(damaged: str) -> None:
    assert Secrets.from_key(KEY).decrypt(damaged) is None


# Check parts ---------------------------------------------------------------------------------------------------------


def test_check_part_tells_what_was_given_out() -> None:
    secrets = Secrets.from_key(KEY)
    checked = secrets.with_check("sk-lg-" + "a" * 43)
    assert len(checked) == 6 + 43 + CHECK
    assert secrets.is_ours(checked)


@pytest.mark.parametrize("made_up", ["", "x", "a" * 8, "a" * 57, "sk-lg-" + "a" * 51, "ä" * 60, "\ud800" * 9])
def test_what_was_made_up_is_not_ours(made_up: str) -> None:
    assert not Secrets.from_key(KEY).is_ours(made_up)


def test_every_character_counts() -> None:
    secrets = Secrets.from_key(KEY)
    checked = secrets.with_check("sk-lg-" + "a" * 43)
    for place in range(len(checked)):
        other = "b" if checked[place] != "b" else "c"
        assert not secrets.is_ours(checked[:place] + other + checked[place + 1 :])


# The file ------------------------------------------------------------------------------------------------------------


def test_first_start_makes_the_file_and_later_ones_read_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = Secrets.load_or_make(home)
    file = home / FILE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(file.read_text().strip()) == 64
    assert signing(Secrets.load_or_make(home)) == signing(first)
    assert names(home) == [FILE]


def test_every_gateway_has_its_own(tmp_path: Path) -> None:
    assert signing(Secrets.load_or_make(tmp_path / "a")) != signing(Secrets.load_or_make(tmp_path / "b"))


def test_those_who_start_at_once_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: signing(Secrets.load_or_make(tmp_path)), range(16)))
    assert len(set(made)) == 1
    assert names(tmp_path) == [FILE]


@pytest.mark.parametrize("mode", [0o604, 0o666, 0o602])
def test_file_that_everybody_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    Secrets.load_or_make(tmp_path)
    (tmp_path / FILE).chmod(mode)
    with pytest.raises(SecretFailed, match="by everybody"):
        Secrets.load_or_make(tmp_path)


def test_file_that_its_group_may_read_is_taken(tmp_path: Path) -> None:
    """As Kubernetes makes it for a pod's group."""
    made = Secrets.load_or_make(tmp_path)
    (tmp_path / FILE).chmod(0o660)
    assert signing(Secrets.load_or_make(tmp_path)) == signing(made)


@pytest.mark.parametrize("content", [b"", b"\n", b"short\n", b"\xff" * 64])
def test_file_without_a_secret_is_never_replaced(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / FILE
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(SecretFailed) as caught:
        Secrets.load_or_make(tmp_path)
    assert file.read_bytes() == content
    assert "\n" not in str(caught.value)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(SecretFailed, match="cannot be used"):
        Secrets.load_or_make(tmp_path / "home")


# The choice ----------------------------------------------------------------------------------------------------------


def test_setting_counts_before_the_file(tmp_path: Path) -> None:
    for is_shared in (True, False):
        assert signing(secrets_of(KEY, tmp_path, is_shared=is_shared)) == signing(Secrets.from_key(KEY))
    assert names(tmp_path) == []


def test_database_of_its_own_needs_no_setting(tmp_path: Path) -> None:
    assert signing(secrets_of("", tmp_path, is_shared=False)) == signing(Secrets.load_or_make(tmp_path))


def test_shared_database_without_the_setting_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SecretFailed) as caught:
        secrets_of("", tmp_path, is_shared=True)
    assert str(caught.value).startswith("SECRET_KEY is needed with LETTA_GATEWAY_DATABASE_URL")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []
