"""Characters split over tokens, stop strings split over chunks."""

from hypothesis import given
from hypothesis import strategies as st

from mobile_gguf.generate.text.text import TextStream


def pushed(pieces, stop=()):
    stream = TextStream(stop)
    texts = [stream.push(piece) for piece in pieces]
    return texts, stream.finish(), stream.stopped


def test_a_character_comes_when_its_last_byte_does():
    texts, rest, _ = pushed([bytes([byte]) for byte in "a€😀".encode()])
    assert texts == ["a", "", "", "€", "", "", "", "😀"]
    assert rest == ""


def test_bytes_that_are_no_character_are_replaced_not_fatal():
    texts, _, _ = pushed([b"a\xff", b"b"])
    assert "".join(texts) == "a\ufffdb"


def test_a_character_that_never_ends_is_dropped():
    assert pushed(["ab😀".encode()[:-1]])[:2] == (["ab"], "")


def test_a_stop_string_over_three_tokens_is_not_shown():
    assert pushed([b"one ST", b"O", b"P two"], ["STOP"]) == (["one ", "", ""], "", True)


def test_text_that_only_began_like_a_stop_string_is_given_back():
    assert pushed([b"a ST", b"ORY"], ["STOP"]) == (["a ", "STORY"], "", False)


def test_what_is_held_back_comes_at_the_end():
    assert pushed([b"a ST"], ["STOP"])[:2] == (["a "], "ST")


def test_the_earliest_of_several_stop_strings_counts():
    texts, _, stopped = pushed([b"x END STOP"], ["STOP", "END", ""])
    assert (texts, stopped) == (["x "], True)


def test_nothing_comes_after_a_stop():
    stream = TextStream(["."])
    assert stream.push(b"a.b") == "a"
    assert stream.push(b"c") + stream.finish() == ""


def test_a_stop_string_of_several_bytes_a_character():
    texts, _, stopped = pushed([bytes([byte]) for byte in "ja→nein".encode()], ["→"])
    assert ("".join(texts), stopped) == ("ja", True)


@given(
    st.text(alphabet="ab€😀", max_size=30),
    # None of these overlaps another; of those that do, the first to be complete counts.
    st.sets(st.sampled_from(["ab", "€€", "😀😀😀"])),
    st.data(),
)
def test_any_split_gives_the_same_text(text, ends, data):
    stop = sorted(ends)
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    texts, rest, stopped = pushed(pieces, stop)
    positions = [text.find(end) for end in stop if end in text]
    expected = text[: min(positions)] if positions else text
    assert "".join(texts) + rest == expected
    assert stopped == bool(positions)
