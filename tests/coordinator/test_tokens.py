"""What is kept of enrolment tokens."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey_coordinator.tokens import KEEP_S, TokenBook, TokenRecord, token_hash
from covey_shared.errors import ConfigError
from covey_shared.messages import DeviceId

Secret = st.binary(min_size=16, max_size=16)


def record(device: str = "pi-1", made: int = 1000, **fields: object) -> TokenRecord:
    return TokenRecord(
        device=DeviceId(device),
        made_unix=made,
        expires_unix=made + 100,
        **fields,  # type: ignore[arg-type]
    )


@pytest.fixture
def book(tmp_path: Path) -> TokenBook:
    return TokenBook(tmp_path / "tokens")


@given(Secret, Secret)
def test_a_hash_tells_secrets_apart_and_does_not_show_them(one: bytes, other: bytes):
    assert (token_hash(one) == token_hash(other)) == (one == other)
    assert len(token_hash(one)) == 64
    assert one.hex() not in token_hash(one)


def test_a_token_is_found_by_its_secret_alone(book: TokenBook, tmp_path: Path):
    assert book.find(bytes(16)) is None
    assert book.all() == {}
    book.add(bytes(16), record())
    assert book.find(bytes(16)) == (token_hash(bytes(16)), record())
    assert book.find(b"\1" * 16) is None
    assert (tmp_path / "tokens").stat().st_mode & 0o777 == 0o700
    (path,) = (tmp_path / "tokens").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert bytes(16) not in path.read_bytes()
    assert "0" * 32 not in path.read_text()


def test_what_was_used_is_kept_and_what_was_not_is_replaced(book: TokenBook):
    book.add(b"a" * 16, record(used_by="11" * 32))
    book.add(b"b" * 16, record())
    book.add(b"c" * 16, record("pi-2"))
    book.add(b"d" * 16, record())
    assert book.find(b"a" * 16)
    assert book.find(b"b" * 16) is None
    assert book.find(b"c" * 16)
    assert [r.device for r in book.open(1050)] in (["pi-1", "pi-2"], ["pi-2", "pi-1"])
    assert book.open(1100) == []


def test_what_ended_long_ago_is_forgotten(book: TokenBook):
    book.add(b"a" * 16, record(used_by="11" * 32))
    book.add(b"b" * 16, record("pi-2", made=1100 + KEEP_S))
    assert book.find(b"a" * 16)
    book.add(b"c" * 16, record("pi-3", made=1101 + KEEP_S))
    assert book.find(b"a" * 16) is None
    assert book.find(b"b" * 16)


def test_withdrawing(book: TokenBook):
    book.add(b"a" * 16, record(used_by="11" * 32))
    book.add(b"b" * 16, record())
    book.add(b"c" * 16, record("pi-2"))
    book.withdraw("pi-1")
    assert [bool(book.find(s * 16)) for s in (b"a", b"b", b"c")] == [True, False, True]


@pytest.mark.parametrize("data", [b"", b"{", b'{"device": 3}', b'{"device": "pi-1", "x": 1}'])
def test_a_damaged_one_is_named(book: TokenBook, tmp_path: Path, data: bytes):
    book.add(bytes(16), record())
    (path,) = (tmp_path / "tokens").iterdir()
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"{path} is damaged .*; remove it"):
        book.find(bytes(16))
