"""The judge of losses is made by a command: its text from packages, and its training."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'mobile-gguf[convert]'")
import transformers  # noqa: E402

from mobile_gguf.bench import train_judge  # noqa: E402
from mobile_gguf.bench.judge_corpus import PACKAGES, Corpus, Package, cut_corpus  # noqa: E402
from mobile_gguf.bench.train_judge import Training, config_of, ids_of, learn_tokenizer, train  # noqa: E402
from mobile_gguf.errors import UsageError  # noqa: E402

TEXT = "".join(f"Line {i} of a text, which says that {i} and {i * i} are numbers.\n" for i in range(10_000))


def config(n_vocab: int) -> transformers.Qwen3MoeConfig:
    """The judge's, of less."""
    small = config_of(n_vocab)
    small.update({"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_experts": 8})
    small.update({"num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 1})
    return small


def test_what_is_held_out_is_not_trained_on() -> None:
    corpus = cut_corpus(TEXT)
    again = cut_corpus(TEXT)
    assert corpus == again
    assert len(corpus.first) == len(corpus.second) == 200_000
    held = [corpus.first, corpus.second]
    assert not any(part in text for part in corpus.trained for text in held)
    assert sum(map(len, [*corpus.trained, *held])) == len(TEXT) // 20_000 * 20_000


def test_a_corpus_that_leaves_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(UsageError, match="400000 characters"):
        cut_corpus(TEXT[:400_000])


def test_texts_of_a_package_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    files = {
        "a-1/docs/b.txt": b"second",
        "a-1/docs/a/a.txt": b"first",
        "a-1/docs/c.txt": b"\xff, no UTF-8",
        "a-1/docs/d.py": b"another kind",
        "a-1/b.txt": b"in no folder",
        "a-1/code/e.py": b"third",
    }
    archive = tmp_path / "a-1.tar.gz"
    with tarfile.open(archive, "w:gz") as made:
        for name, data in reversed(files.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    package = Package(PACKAGES[0].pin, {"docs": (".txt",), "code": (".py",)})
    assert sorted(package.texts(archive)) == ["first", "second", "third"]
    assert list(package.texts(archive)) == ["third", "first", "second"]


def test_packages_are_pinned() -> None:
    assert all(len(package.pin.sha256) == 64 and package.pin.size > 0 for package in PACKAGES)


def test_training_is_counted_seeded_and_learns() -> None:
    torch.set_num_threads(1)
    parts = [TEXT[i : i + 2000] for i in range(0, 40_000, 2000)]
    tokenizer = learn_tokenizer(parts, 400)
    assert tokenizer.decode(tokenizer.encode(parts[0]).ids) == parts[0]
    ids, held = ids_of(tokenizer, parts[:-2]), ids_of(tokenizer, parts[-2:])
    said: list[str] = []
    training = Training(steps=200, batch=4, length=32)

    def weights(seed: int = 1) -> dict[str, Any]:
        made = train(config(400), ids, held, Training(3, 4, 32, seed), said.append)
        return made.state_dict()

    first, second, other = weights(), weights(), weights(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    said.clear()
    model = train(config(400), ids, held, training, said.append)
    assert len(said) == 2
    assert said[-1].startswith("step 200 of 200")
    assert train_judge.held_loss(model, held, 32) < 0.7 * np.log(400)


def test_the_rate_rises_and_falls() -> None:
    rates = [Training(steps=1000).rate(step) for step in range(1000)]
    assert rates[0] < 0.02 * max(rates)
    assert max(rates) == pytest.approx(2e-3, rel=0.05)
    assert 1e-4 < rates[-1] < 1.1e-4
    assert rates.index(max(rates)) in range(90, 110)


def test_the_command_writes_a_checkpoint_and_its_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = cut_corpus(TEXT)
    few = Corpus(corpus.trained[:4], corpus.first[:4000], corpus.second[:4000])
    monkeypatch.setattr(train_judge, "read_corpus", lambda narrate: few)
    monkeypatch.setattr(train_judge, "config_of", lambda: config(4096))
    out = tmp_path / "judge"
    assert train_judge.main([str(out), "--steps", "1", "-t", "1"]) == 0
    assert "step 1 of 1" in capsys.readouterr().err
    assert (out / "first.txt").read_text() == few.first
    assert (out / "second.txt").read_text() == few.second
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float16
    assert not model.config.output_router_logits
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("Line 1 of a text")["input_ids"]) == "Line 1 of a text"
    with pytest.raises(SystemExit):
        train_judge.main([str(out)])  # it is not empty
