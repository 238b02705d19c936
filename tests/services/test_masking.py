"""Secrets are taken out of what is logged, wherever they stand in it."""

import logging
from collections.abc import Iterator

import pytest

from app.config import Settings
from app.logging import configure
from app.masking import mask

KEY = "ls_abcdEFGH" + "0123456789_-" * 3 + "abcdefg"


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:], root.level = handlers, level


def test_keys_and_passwords_of_urls() -> None:
    assert len(KEY) == 54
    assert mask(f"Bearer {KEY}.") == "Bearer ls_abcdEFGH…."
    assert mask("at redis://:p%40ss@h:1/0, a") == "at redis://:***@h:1/0, a"
    assert mask("postgresql+psycopg://me:pw@h/x?a=b&password=pw2&c=d") == (
        "postgresql+psycopg://me:***@h/x?a=b&password=***&c=d"
    )
    plain = "https://host:8000/v1/models?x=a@b mail@host ls_short"
    assert mask(plain) == plain


@pytest.mark.parametrize("format_", ["json", "text"])
def test_no_secret_reaches_the_log(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str], format_: str
) -> None:
    secrets = ['data/base"pw', "broker-pw-1", "s3-secret-1"]
    configure(
        Settings(
            database_url="postgresql://me:data%2Fbase%22pw@h/x",
            broker_url="sentinel://:broker-pw-1@h1:1;sentinel://h2:2",
            s3_secret_access_key=secrets[2],
            log_format=format_,
        ),
        "api",
    )
    log = logging.getLogger("test")
    for secret in [*secrets, "data%2Fbase%22pw", KEY]:
        try:
            raise RuntimeError(f"cannot log in with {secret}")
        except RuntimeError:
            log.exception("refused: %s", secret, extra={"given": {"password": secret}})
    written = capsys.readouterr().err
    assert written.count("refused") == 5
    assert "RuntimeError: cannot log in with" in written
    for secret in [*secrets, "data%2Fbase", 'data/base\\"pw', "base", KEY[11:]]:
        assert secret not in written
