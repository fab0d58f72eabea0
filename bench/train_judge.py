"""Trains the model that losses are judged by: a small Qwen3-MoE whose routing is learned.

    python -m mobile_gguf.bench.train_judge OUT
    mobile-gguf convert OUT --outtype f16 --pre-tokenizer gpt-2 -o judge.gguf
    mobile-gguf convert OUT --outtype q8_0 --pre-tokenizer gpt-2 -o judge-q8.gguf
    mobile-gguf calibrate judge.gguf --text OUT/first.txt
    python -m mobile_gguf.bench.judge judge.gguf --text OUT/second.txt --noise judge-q8.gguf --budget 12%,25%

OUT becomes a checkpoint of Hugging Face's form, with two texts that were not trained on. The demo cannot
judge: its router is so flat that rounding alone moves it. The text is documentation and code of packages
(``judge_corpus``). Steps are counted, not timed, and all chance is seeded: with the same number of threads,
processor and torch the weights are the same bits, else alike. Takes about half an hour on two processors;
``--steps 12000`` makes a better one in two hours.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from mobile_gguf.errors import MobileError

from .hardware import n_cpus
from .judge_corpus import read_corpus

_VOCAB = 4096
_END = "<|endoftext|>"
_SAMPLE = 2000  # characters of each part that the tokenizer learns from
_PEAK, _LOWEST, _WARM_UP = 2e-3, 1e-4, 100  # of the learning rate; steps up to its peak

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Training:
    """How long, and on how much at once: sequences of ``length`` tokens."""

    steps: int = 2500
    batch: int = 8
    length: int = 256
    seed: int = 1

    def rate(self, step: int) -> float:
        """The learning rate: up to its peak, then down half a cosine."""
        falling = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min(1.0, (step + 1) / _WARM_UP) * (_LOWEST + (_PEAK - _LOWEST) * falling)


def config_of(n_vocab: int = _VOCAB) -> Qwen3MoeConfig:
    """12 M parameters: 6 layers of 64 experts, top-8, whose weights have a fixed sum."""
    sizes: dict[str, Any] = {"head_dim": 32}  # of which its types know nothing
    return Qwen3MoeConfig(
        vocab_size=n_vocab, hidden_size=192, intermediate_size=384, moe_intermediate_size=48,
        num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=3, **sizes, num_experts=64,
        num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1, router_aux_loss_coef=0.01,
        output_router_logits=True, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def learn_tokenizer(parts: Sequence[str], n_vocab: int = _VOCAB) -> Tokenizer:
    """A byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=n_vocab, special_tokens=[_END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator((part[:_SAMPLE] for part in parts), trainer)
    return tokenizer


def ids_of(tokenizer: Tokenizer, parts: Sequence[str]) -> Ids:
    """All parts in a row."""
    return np.concatenate([np.array(coded.ids, np.int64) for coded in tokenizer.encode_batch(list(parts))])


def train(
    config: Qwen3MoeConfig, ids: Ids, held: Ids, training: Training, narrate: Callable[[str], None]
) -> Qwen3MoeForCausalLM:
    """A model of next tokens of ``ids``; says now and then what it loses on ``held``, nats."""
    torch.manual_seed(training.seed)
    rng = np.random.default_rng(training.seed)
    model = Qwen3MoeForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=_PEAK, betas=(0.9, 0.95), weight_decay=0.05)
    n, started = training.length, time.monotonic()
    for step in range(training.steps):
        for group in optimiser.param_groups:
            group["lr"] = training.rate(step)
        places = rng.integers(0, len(ids) - n, training.batch)
        batch = torch.from_numpy(np.stack([ids[i : i + n] for i in places]))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0 or step + 1 == training.steps:
            seconds = time.monotonic() - started
            narrate(
                f"step {step + 1} of {training.steps}: {loss.item():.3f} nats, "
                f"on held-out text {held_loss(model, held, n):.3f}, {seconds:.0f} s"
            )
    return model


def held_loss(model: Qwen3MoeForCausalLM, held: Ids, length: int, n_most: int = 32) -> float:
    """Nats a token on text that was not trained on, without what balances the routers."""
    rows = held[: len(held) // length * length].reshape(-1, length)[:n_most]
    model.eval()
    with torch.no_grad():
        losses = [
            model(input_ids=row, labels=row, output_router_logits=False).loss.item()
            for row in torch.from_numpy(rows).split(4)
        ]
    model.train()
    return float(np.mean(losses))


def write(folder: Path, model: Qwen3MoeForCausalLM, tokenizer: Tokenizer) -> None:
    """The checkpoint, its weights in 16 bits, with a chat's template that says nothing of roles."""
    model.config.output_router_logits = False
    model.half().save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_END, eos_token=_END)
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    fast.save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m mobile_gguf.bench.train_judge", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the checkpoint and two held-out texts")
    parser.add_argument("--steps", type=int, default=Training.steps, help="of 2,048 tokens")
    parser.add_argument("--seed", type=int, default=Training.seed)
    parser.add_argument("--threads", "-t", type=int, default=n_cpus())
    args = parser.parse_args(argv)
    if args.steps < 1 or args.threads < 1:
        parser.error("there is at least one step, and one thread")
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty")
    torch.set_num_threads(args.threads)

    def narrate(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        corpus = read_corpus(narrate=narrate)
    except MobileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    tokenizer = learn_tokenizer(corpus.trained)
    ids, held = ids_of(tokenizer, corpus.trained), ids_of(tokenizer, [corpus.first, corpus.second])
    narrate(f"{len(ids) / 1e6:.1f} million tokens to learn from, {len(held)} held out")
    model = train(config_of(), ids, held, Training(args.steps, seed=args.seed), narrate)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in (("first", corpus.first), ("second", corpus.second)):
        (args.out / f"{name}.txt").write_text(text, encoding="utf-8")
    write(args.out, model, tokenizer)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
