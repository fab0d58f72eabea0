"""What a notebook shows of a receipt and a reply."""

from html.parser import HTMLParser

from mobile_gguf import Receipt, Reply


class Page(HTMLParser):
    """The text of a fragment, and whether every element that was opened was closed."""

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(fragment)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.cells.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1].append(data)


RECEIPT = Receipt(
    mode="big-little",
    tokens_big=1,
    tokens_little=30,
    tokens_fallback=9,
    expert_hits=1200,
    expert_misses=34,
    bytes_read=3 << 20,
    stall_ms=12.4,
    budget_bytes=1 << 30,
)


def test_a_receipt_has_its_counts():
    page = Page(RECEIPT._repr_html_())
    assert page.open == []
    assert page.cells[1:] == [["host", "1,200", "34", "3.0 MiB read", "12 ms", "1.00 GiB"]]
    assert "30 little" in " ".join("".join(page.words).split())


def test_a_device_has_a_row_of_its_own():
    receipt = Receipt(device_hits=5, device_misses=2, bytes_uploaded=1 << 20, vram_budget_bytes=1 << 30)
    page = Page(receipt._repr_html_())
    assert [row[0] for row in page.cells[1:]] == ["device"]


def test_an_empty_receipt_is_no_error():
    page = Page(Receipt()._repr_html_())
    assert page.open == []
    assert page.cells == []


def test_a_reply_is_text_and_never_markup():
    reply = Reply("<script>alert(1)</script> & more", "stop", {}, {"predicted_per_second": 21.34}, RECEIPT)
    page = Page(reply._repr_html_())
    assert "<script>alert(1)</script> & more" in "".join(page.words)
    assert "script" not in page.open
    assert "stop, 21.3 tokens/s" in "".join(page.words)
