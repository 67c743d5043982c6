import base64
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import InvalidRequest
from gateway.translation import content
from gateway.translation.agent_turn import ImageData, ImageUrl
from gateway.translation.content import IMAGE_TYPES

PNG = base64.b64encode(b"\x89PNG").decode()
WHERE = "messages[0].content"

# Texts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["Hi", "  spaced \n", "\u202eRTL", "😀", "\x01\x7f", "\ufeff", "a" * 1_000_000])
def test_text_goes_out_as_it_came(value: str) -> None:
    assert content.text(value, WHERE) == value
    assert content.storable(value, WHERE) == value


@pytest.mark.parametrize("value", ["", " ", "\n\t \u2003"])
def test_blank_text_says_nothing_but_can_be_stored(value: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        content.text(value, WHERE)
    assert (raised.value.code, raised.value.param) == ("invalid_value", WHERE)
    assert raised.value.message == f"'{WHERE}' is empty: an agent is not asked nothing."
    assert content.storable(value, WHERE) == value


@pytest.mark.parametrize("take", [content.text, content.storable])
@pytest.mark.parametrize("value", ["\0", "a\0b", "a" * 100_000 + "\0"])
def test_text_with_a_nul_character(take: Callable[[str, str], str], value: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        take(value, WHERE)
    assert (raised.value.code, raised.value.param) == ("invalid_value", WHERE)
    assert raised.value.message == f"'{WHERE}' contains a NUL character, which cannot be stored: remove it."


# Images --------------------------------------------------------------------------------------------------------------


def image(url: str) -> ImageData | ImageUrl:
    return content.image(url, WHERE)


def refused(url: str) -> str | None:
    with pytest.raises(InvalidRequest) as raised:
        image(url)
    assert (raised.value.status, raised.value.param) == (400, WHERE)
    assert raised.value.message.startswith(f"Invalid '{WHERE}': ")
    return raised.value.code


@pytest.mark.parametrize("media_type", sorted(IMAGE_TYPES))
def test_inline_image_of_every_type(media_type: str) -> None:
    assert image(f"data:{media_type};base64,{PNG}") == ImageData(media_type, PNG)


def test_inline_image_whose_type_is_in_capitals() -> None:
    assert image(f"data:IMAGE/PNG;BASE64,{PNG}") == ImageData("image/png", PNG)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        (f"data:image/svg+xml;base64,{PNG}", "invalid_image_format"),
        (f"data:text/html;base64,{PNG}", "invalid_image_format"),
        (f"data:;base64,{PNG}", "invalid_image_format"),
        (f"data:image/png,{PNG}", "invalid_image_format"),
        (f"data:image/png;hex,{PNG}", "invalid_image_format"),
        (f"data:image/png;charset=x;base64,{PNG}", "invalid_image_format"),
        (f"data:image/png;base64{PNG}", "invalid_image_format"),
        ("data:", "invalid_image_format"),
        ("data:,", "invalid_image_format"),
        ("data:image/png;base64,", "invalid_base64"),
        ("data:image/png;base64,!!!!", "invalid_base64"),
        ("data:image/png;base64,QQ", "invalid_base64"),
        ("data:image/png;base64,QQ==QQ==", "invalid_base64"),
        (f"data:image/png;base64,{PNG}\n", "invalid_base64"),
        ("data:image/png;base64,QUJD QUJD", "invalid_base64"),
        ("data:image/png;base64,é", "invalid_base64"),
        ("data:image/png;base64,_-_-", "invalid_base64"),
    ],
)
def test_inline_image_that_is_none(url: str, code: str) -> None:
    assert refused(url) == code


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.png",
        "HTTPS://Example.COM:8443/a.png?x=1#y",
        "https://my_bucket.s3.example.com/a.png",
        "https://xn--mnchen-3ya.de/a.png",
        "https://8.8.8.8/a.png",
        "https://[2606:4700:4700::1111]/a.png",
        "https://example.com./a.png",
        "https://1.example.com",
    ],
)
def test_public_image(url: str) -> None:
    assert image(url) == ImageUrl(url)


@pytest.mark.parametrize(
    "url",
    [
        # not https
        "http://example.com/a.png",
        "ftp://example.com/a.png",
        "file:///etc/passwd",
        "//example.com/a.png",
        "example.com/a.png",
        "https:///a.png",
        "https://",
        "javascript:alert(1)",
        # this machine and this network
        "https://localhost/a.png",
        "https://localhost./a.png",
        "https://LOCALHOST/a.png",
        "https://app.localhost/a.png",
        "https://letta/a.png",
        "https://printer.local/a.png",
        "https://metadata.google.internal/a.png",
        "https://127.0.0.1/a.png",
        "https://127.0.0.1./a.png",
        "https://0.0.0.0/a.png",
        "https://10.0.0.1/a.png",
        "https://172.16.0.1/a.png",
        "https://192.168.1.1:8443/a.png",
        "https://100.64.0.1/a.png",
        "https://169.254.169.254/latest/meta-data",
        "https://224.0.0.1/a.png",
        "https://255.255.255.255/a.png",
        "https://[::]/a.png",
        "https://[::1]/a.png",
        "https://[fe80::1]/a.png",
        "https://[fe80::1%25eth0]/a.png",
        "https://[fd00::1]/a.png",
        "https://[ff02::1]/a.png",
        # the same, in disguise
        "https://[::ffff:127.0.0.1]/a.png",
        "https://[::ffff:169.254.169.254]/a.png",
        "https://[::127.0.0.1]/a.png",
        "https://[64:ff9b::a9fe:a9fe]/a.png",
        "https://[2002:7f00:1::]/a.png",
        "https://2130706433/a.png",
        "https://127.1/a.png",
        "https://0x7f.0.0.1/a.png",
        "https://0x7f000001/a.png",
        "https://0177.0.0.1/a.png",
        "https://127.0.0.0x1/a.png",
        "https://127%2e0%2e0%2e1/a.png",
        "https://app.loc%61lhost/a.png",
        "https://app.localhost%2e/a.png",
        "https://127。0。0。1/a.png",
        "https://app.localhost。/a.png",
        "https://\uff11\uff12\uff17.0.0.1/a.png",
        "https://127.0.0.1\\.example.com/a.png",
        "https://user@example.com/a.png",
        "https://user:secret@example.com/a.png",
        "https://@example.com/a.png",
        "https://example.com\\@127.0.0.1/a.png",
        # not a URL
        "https://exam\nple.com/a.png",
        "https://example.com/a b.png",
        "https://example.com/\0",
        "https://example..com/a.png",
        "https://example.com:port/a.png",
        "https://example.com:99999/a.png",
        "https://[::1/a.png",
        "https://[example.com]/a.png",
    ],
)
def test_image_that_letta_must_not_fetch(url: str) -> None:
    assert refused(url) == "invalid_image_url"


def test_inline_image_of_the_name_that_browsers_have_for_jpeg() -> None:
    assert image("data:image/jpg;base64,AAAA") == ImageData("image/jpeg", "AAAA")


def test_message_does_not_quote_the_image() -> None:
    with pytest.raises(InvalidRequest) as raised:
        image("data:image/png;base64,!" + "x" * 1_000_000)
    assert len(raised.value.message) < 200


def test_inline_image_of_many_megabytes_is_checked_to_its_end() -> None:
    data = base64.b64encode(bytes(10_000_000)).decode()
    assert image(f"data:image/png;base64,{data}") == ImageData("image/png", data)
    assert refused(f"data:image/png;base64,{data[:-4]}****") == "invalid_base64"


@given(url=st.text(alphabet="https:/[]@.0127xlocal:%\\#?\uff05\u3002é \n", max_size=40).map("https://".__add__))
def test_any_url_is_taken_or_refused(url: str) -> None:
    try:
        assert image(url) == ImageUrl(url)
    except InvalidRequest as error:
        assert error.code == "invalid_image_url"  # noqa: PT017 - either may happen


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("plain", "plain"),
        ("a\0b\0", "a\ufffdb\ufffd"),
        ("\ud83d\ude00", "\U0001f600"),
        ("\ud83d", "\ufffd"),
        ("\ude00\ud83dx", "\ufffd\ufffdx"),
        ("\u202e\u200b\ufeff\U0010ffff\uffff", "\u202e\u200b\ufeff\U0010ffff\uffff"),
        ("", ""),
    ],
)
def test_what_no_database_takes_is_replaced(given: str, kept: str) -> None:
    assert content.replaced(given) == kept
    kept.encode()
