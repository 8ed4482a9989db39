"""Tokens and frames: what a person may paste wrongly, and what a stranger may send."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey_shared.enrolment import MAX_FRAME_BYTES, Token, decode_token, frame, frame_size
from covey_shared.errors import ConfigError, MalformedError

PIN, SECRET = bytes(range(32)), bytes(range(16))


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def token(
    where: str = "hub.lan:8884", *, head: str = "covey1", pin: bytes = PIN, secret: bytes = SECRET
) -> str:
    return f"{head}:{where}:{b64(pin)}:{b64(secret)}"


@given(
    st.sampled_from(["hub.lan", "10.0.0.7", "fd00::7", "h" * 255]),
    st.integers(1, 65535),
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=16, max_size=16),
)
def test_a_token_comes_back(host: str, port: int, pin: bytes, secret: bytes) -> None:
    made = Token(host, port, pin, secret)
    text = made.encode()
    assert decode_token(text) == made
    assert decode_token(f" {text[:40]}\n  {text[40:]}\n") == made  # wrapped by a terminal
    assert b64(secret) not in repr(made)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (token(head="covey2"), "no enrolment token"),
        (token(head=""), "no enrolment token"),
        (token(":8884"), "no enrolment token"),
        ("covey1", "no enrolment token"),
        (token("hub.lan:0"), "address is damaged"),
        (token("hub.lan:65536"), "address is damaged"),
        (token("hub.lan:-1"), "address is damaged"),
        (token("hub.lan:port"), "address is damaged"),
        (token("hub.lan:" + "1" * 5000), "address is damaged"),
        (token("hub.lan:\N{ARABIC-INDIC DIGIT SEVEN}"), "address is damaged"),
        (token("hub.lan:\N{SUPERSCRIPT TWO}"), "address is damaged"),
        (token("h" * 256 + ":8884"), "address is damaged"),
        (token(pin=PIN[:-1]), "cut short or damaged"),
        (token(pin=PIN + b"\0"), "cut short or damaged"),
        (token(secret=SECRET[:-1]), "cut short or damaged"),
        (token(secret=SECRET + b"\0"), "cut short or damaged"),
        (token() + "!", "cut short or damaged"),
    ],
)
def test_what_is_no_token_is_told_without_the_secret(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        decode_token(text)
    assert b64(SECRET)[:12] not in str(caught.value)


@pytest.mark.parametrize("host", ["[fd00::7", "fd00::7]"])
def test_half_a_bracket_is_part_of_the_name(host: str) -> None:
    assert decode_token(token(f"{host}:8884")).host == host


def test_the_size_of_a_frame() -> None:
    assert frame_size(frame(b"abc")[:4]) == 3
    assert frame_size(MAX_FRAME_BYTES.to_bytes(4, "big")) == MAX_FRAME_BYTES
    for prefix in (bytes(4), (MAX_FRAME_BYTES + 1).to_bytes(4, "big"), b"\x05", b"\0\0\0\0\x05"):
        with pytest.raises(MalformedError):
            frame_size(prefix)
