"""Sizes: every accepted spelling, every refused one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobile_gguf.errors import UsageError
from mobile_gguf.sizes import AUTO, Size, format_bytes, parse_size, size_flag


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("512MiB", 512 << 20),
        ("512mib", 512 << 20),
        ("2G", 2 << 30),
        ("2Gi", 2 << 30),
        ("2GB", 2 * 10**9),
        ("1.5 GiB", 3 << 29),
        (".5k", 512),
        ("7", 7),
        ("7B", 7),
        ("1TiB", 1 << 40),
        (12345, 12345),
    ],
)
def test_bytes(text, n_bytes):
    assert parse_size(text) == Size(n_bytes=n_bytes)


@pytest.mark.parametrize(("text", "fraction"), [("40%", 0.4), ("100%", 1.0), ("12.5 %", 0.125)])
def test_shares(text, fraction):
    assert parse_size(text) == Size(fraction=fraction)


@pytest.mark.parametrize("text", ["auto", "AUTO", " auto "])
def test_auto(text):
    assert parse_size(text) is AUTO
    assert AUTO.is_auto


def test_a_size_stays_what_it_is():
    size = Size(fraction=0.25)
    assert parse_size(size) is size


@pytest.mark.parametrize(
    "value",
    [
        "",
        "G",
        "2X",
        "two",
        "-1",
        "0",
        "0%",
        "100.1%",
        "-5%",
        "1e9",
        "nan",
        "inf",
        "2 G B",
        0,
        -3,
        True,
        None,
        0.4,
    ],
)
def test_refused_in_one_line_that_names_it(value):
    with pytest.raises(UsageError) as caught:
        parse_size(value)
    assert "\n" not in str(caught.value)
    assert str(value).strip() in str(caught.value)


@given(st.text(max_size=12))
def test_no_text_does_anything_but_parse_or_be_refused(text):
    try:
        size = parse_size(text)
    except UsageError:
        return
    assert size.is_auto or (size.n_bytes or 0) > 0 or 0 < (size.fraction or 0) <= 1


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (12_897_485, "12.3 MiB"),
        (2 << 30, "2.00 GiB"),
        (1 << 40, "1.00 TiB"),
    ],
)
def test_format(n_bytes, text):
    assert format_bytes(n_bytes) == text


def test_sizes_print_as_people_write_them():
    assert [str(parse_size(text)) for text in ("auto", "40%", "512MiB")] == ["auto", "40%", "512.0 MiB"]


def test_a_share_is_read_again_as_it_was():
    """All shares to a hundredth of a percent; 0.65 / 100 as floats is more than 0.0065."""
    for hundredths in range(1, 10_001):
        share = parse_size(f"{hundredths / 100}%")
        assert parse_size(size_flag(share)) == share
