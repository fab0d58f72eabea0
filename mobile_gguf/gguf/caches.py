"""What a context of a model keeps between tokens, by the header alone: keys, values, indexers, states.

The rules are those of the pinned llama.cpp: ``llama_model::create_memory`` says which layers have what,
``llama_kv_cache``, ``llama_memory_recurrent``, ``llama_kv_cache_dsa``, ``_msa``, ``_dsv4`` and
``llama_memory_hybrid_idx`` how large it is, each architecture's ``load_arch_hparams`` which layers are which.
For contexts as ours are made: one sequence, sliding windows at the context's full size (``swa_full``).
A test holds all of it against what llama.cpp allocates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from mobile_gguf.options.words import F16, Q4_0, Q8_0

from .facts import Facts

_F32 = 4
_BLOCK = 32  # values of a quantisation block
_BLOCK_BYTES = {F16: 64, Q8_0: 34, Q4_0: 18}
_ALIGNMENT = 32  # of a tensor in a buffer of the CPU
CONTEXT_MULTIPLE = 256  # that llama.cpp pads contexts and compressed caches to

# embedding models and those that denoise: nothing is kept
_NOTHING = frozenset(
    {
        "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3",
        "eurobert", "wavtokenizer-dec", "gemma-embedding", "dream", "llada", "llada-moe", "rnd1",
    }
)  # fmt: skip
_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
# hybrids: every n-th layer attends, or those that have heads for keys, or all both attend and remember
_BY_INTERVAL = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4, "minimax-01": 8}
_BY_HEADS = frozenset(
    {
        "jamba", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "kimi-linear", "kimi-k3", "bailingmoe3",
        "glm5-next",
    }
)  # fmt: skip
_NEMOTRON = frozenset({"nemotron_h", "nemotron_h_moe"})
_ALL_BOTH = "falcon-h1"
# keys of an indexer beside a cache: that of DeepSeek-V3.2, of MiniMax-M3, and of hybrids
DSA, MSA, QSA, DSV4 = "dsa", "msa", "qsa", "dsv4"
_DSA = frozenset({"glm-dsa", "deepseek32", "dots3note", "hy_v4"})
_MSA, _HYBRID_INDEXED, _COMPRESSED = "minimax-m3", frozenset({"qwen4exp", "glm5-next"}), "deepseek4"
_CSA_RATIO, _HCA_RATIO = 4, 128
_GLM_5_2_CONTEXT = 1 << 20
_GEMMA_3N_LAYERS = 20  # of gemma3n have keys of their own


class KvTypes(NamedTuple):
    """What keys and values are kept as: f16, or in blocks with a scale each."""

    keys: str = F16
    values: str = F16


F16_KV = KvTypes()


@dataclass(frozen=True)
class CacheRows:
    """Values of one position in all layers of one kind of cache.

    ``padded``: of values without flash attention, where every layer is as wide as the widest.
    ``positions``: how many share a row, where they are compressed.
    """

    keys: int = 0
    values: int = 0
    padded: int = 0
    positions: int = 1

    def row_bytes(self, flash_attn: bool, kv: KvTypes = F16_KV) -> int:
        values = self.values if flash_attn else self.padded
        return (self.keys * _BLOCK_BYTES[kv.keys] + values * _BLOCK_BYTES[kv.values]) // _BLOCK

    def n_bytes(self, n_ctx: int, flash_attn: bool, kv: KvTypes = F16_KV) -> int:
        """Of a context of ``n_ctx`` tokens, a multiple of 256."""
        rows = n_ctx
        if self.positions > 1:
            rows = _up(max(1, -(-n_ctx // self.positions)), CONTEXT_MULTIPLE)
        return rows * self.row_bytes(flash_attn, kv)


NO_ROWS = CacheRows()


@dataclass(frozen=True)
class Sparse:
    """How a token chooses positions to attend to: what kind of cache, an indexer's heads, how many."""

    kind: str = ""  # DSA, MSA, QSA or DSV4; empty: it attends to all
    n_head: int = 0
    top_k: int = 0


NOT_SPARSE = Sparse()


@dataclass(frozen=True)
class Caches:
    """What a context keeps: rows that grow with it, and a state that does not.

    ``windows``: some layers attend to a sliding window. ``latent``: values of one position from which MLA
    makes keys and values, 0 without it. ``head_sizes`` are those of keys, and of values, that there are.
    """

    attention: CacheRows = NO_ROWS
    indexers: CacheRows = NO_ROWS
    compressed: tuple[CacheRows, ...] = ()
    state_bytes: int = 0
    windows: bool = False
    latent: int = 0
    sparse: Sparse = NOT_SPARSE
    head_sizes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    @property
    def rows(self) -> tuple[CacheRows, ...]:
        return (self.attention, self.indexers, *self.compressed)

    def n_bytes(self, n_ctx: int, flash_attn: bool, kv: KvTypes = F16_KV) -> int:
        """Of a context of ``n_ctx`` tokens, padded as the engine pads it."""
        n_ctx = padded_context(n_ctx)
        return sum(rows.n_bytes(n_ctx, flash_attn, kv) for rows in self.rows) + self.state_bytes

    def token_bytes(self, flash_attn: bool, kv: KvTypes = F16_KV) -> float:
        """What one more token of context takes."""
        return sum(rows.row_bytes(flash_attn, kv) / rows.positions for rows in self.rows)

    def problem_of(self, kv: KvTypes) -> str:
        """Why keys and values cannot be kept so, which would end the process; empty if they can."""
        if kv == F16_KV:
            return ""
        if self.indexers != NO_ROWS or self.compressed or self.sparse.kind:
            return "a model that chooses positions, or compresses them, keeps f16"
        if self.latent and kv.keys != kv.values:
            return "its keys and values are one, so both have the same type"
        for name, sizes in zip(kv, self.head_sizes, strict=True):
            odd = [size for size in sizes if size % _BLOCK]
            if name != F16 and odd:
                return f"{name} has blocks of {_BLOCK}, and a head of this model {odd[0]} values"
        return ""

    def read_bytes(self, n_positions: int) -> float:
        """What a token reads and writes of it, with ``n_positions`` before it."""
        return n_positions * self.token_bytes(True) + 2 * self.state_bytes


NO_CACHES = Caches()


def padded_context(n_ctx: int) -> int:
    """The context as the engine makes it."""
    return _up(n_ctx, CONTEXT_MULTIPLE)


def layers_that_run(facts: Facts, names: Iterable[str]) -> int:
    """Layers of the model's graph: blocks behind them are for the prediction of several tokens (MTP).

    names: of all tensors.
    """
    n_block = facts.integer("block_count")
    n_layer = max(0, n_block - facts.integer("nextn_predict_layers"))
    if facts.architecture == _COMPRESSED and f"blk.{n_layer}.nextn.eh_proj.weight" not in set(names):
        return n_block  # its header counts blocks that the file may not have
    return n_layer


def read_caches(facts: Facts, n_layer: int) -> Caches:
    """The caches of a model of ``n_layer`` layers that run (``layers_that_run``)."""
    if facts.architecture in _NOTHING:
        return NO_CACHES
    return _Reading(facts, n_layer).read()


def with_blocks(facts: Facts, n_layer: int) -> Caches:
    """The same with the cache of the blocks behind the layers (MTP), which attend to all, or to a window."""
    reading = _Reading(facts, n_layer)
    own, rows = reading.read(), reading.rows(range(n_layer, reading.n_block))
    kept = own.attention
    attention = CacheRows(kept.keys + rows.keys, kept.values + rows.values, kept.padded + rows.padded)
    return replace(own, attention=attention)


class _Reading:
    def __init__(self, facts: Facts, n_layer: int) -> None:
        self.facts = facts
        self.architecture = facts.architecture
        self.n_layer = n_layer
        self.n_block = n = facts.integer("block_count")
        heads = facts.per_layer("attention.head_count", n)
        self.n_head = heads[0] if heads else 0
        self.n_embd = facts.integer("embedding_length")
        width = self.n_embd // self.n_head if self.n_head else 0
        self.heads = facts.per_layer("attention.head_count_kv", n, max(heads, default=0))
        if f"{self.architecture}.attention.head_count_kv" not in facts.metadata:
            self.heads = heads
        self.key_length = facts.integer("attention.key_length", width) if self.n_head else 0
        self.value_length = facts.integer("attention.value_length", width) if self.n_head else 0
        self.keys_swa = facts.integer("attention.key_length_swa", self.key_length)
        self.values_swa = facts.integer("attention.value_length_swa", self.value_length)
        self.windowed = facts.flags("attention.sliding_window_pattern", n)
        if self.architecture == _COMPRESSED:
            self.windowed = (True,) * n
        # keys hold all there is to know of a position: no values are kept
        self.only_keys = all(facts.integer(f"attention.{kind}_length_mla") for kind in ("key", "value"))
        self.recurrent = self.recurrent_layers()

    def read(self) -> Caches:
        if self.architecture == _COMPRESSED:
            return self.compressed()
        attending = [] if self.architecture in _RECURRENT else self.attending_layers()
        attention = self.rows(attending)
        if self.architecture == "graniteswitch":  # one more layer, of one head: it finds the adapter
            extra = CacheRows(self.key_length, self.value_length, self.value_length)
            attention = CacheRows(
                attention.keys + extra.keys, attention.values + extra.values, attention.padded + extra.padded
            )
        states = [layer for layer in range(self.n_layer) if self.recurrent[layer]]
        return Caches(
            attention, self.indexers(attending), (), self.state_bytes(states),
            self.has_windows(), self.key_length if self.only_keys else 0, self.sparse(), self.head_sizes(),
        )  # fmt: skip

    def head_sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        keys, values = {self.key_length, self.keys_swa}, {self.value_length, self.values_swa}
        return tuple(sorted(keys)), () if self.only_keys else tuple(sorted(values))

    def has_windows(self) -> bool:
        """Whether some layers see a window (or, of Llama 4, a chunk) of the context."""
        window = self.facts.integer("attention.sliding_window", int(self.architecture == "llama4"))
        return window > 0

    def sparse(self) -> Sparse:
        names, facts = self.architecture, self.facts
        n_head, top_k = (facts.integer(f"attention.indexer.{key}") for key in ("head_count", "top_k"))
        if not n_head or not top_k:
            return NOT_SPARSE
        if names == "qwen4exp" and not any(facts.per_layer("attention.compress_ratios", self.n_block)):
            return NOT_SPARSE
        kinds = (
            {_MSA: MSA, _COMPRESSED: DSV4} | dict.fromkeys(_DSA, DSA) | dict.fromkeys(_HYBRID_INDEXED, QSA)
        )
        return Sparse(kinds[names], n_head, top_k) if names in kinds else NOT_SPARSE

    # which layers

    def recurrent_layers(self) -> list[bool]:
        """Of all blocks, whether they keep a state; those behind the last layer that runs never do."""
        names, n = self.architecture, self.n_block
        if names in _RECURRENT or names == _ALL_BOTH:
            return [True] * n
        if names in _BY_INTERVAL:
            told = self.facts.flags("attention.recurrent_layers", n)
            if told is not None:
                return list(told)
            interval = max(1, self.facts.integer("full_attention_interval", _BY_INTERVAL[names]))
            return [i < self.n_layer and (i + 1) % interval != 0 for i in range(n)]
        if names in _BY_HEADS:
            return [i < self.n_layer and self.kv_heads(i) == 0 for i in range(n)]
        if names in _NEMOTRON:
            return [i < self.n_layer and self.kv_heads(i) == 0 and self.n_ff(i) == 0 for i in range(n)]
        return [False] * n

    def attending_layers(self) -> list[int]:
        names, n = self.architecture, self.n_block
        if names == _ALL_BOTH:
            return list(range(n))
        if names in _BY_INTERVAL or names == "glm5-next":
            return [i for i in range(self.n_layer) if not self.recurrent[i]]
        if names in _NEMOTRON:
            return [i for i in range(n) if not self.recurrent[i] and self.n_ff(i) == 0]
        if names in _BY_HEADS:
            return [i for i in range(n) if not self.recurrent[i]]
        if names == "gemma3n":
            return list(range(min(n, _GEMMA_3N_LAYERS)))
        if names == "gemma4":  # the last ones use the keys and values of earlier ones
            n = max(0, n - self.facts.integer("attention.shared_kv_layers"))
        return list(range(min(n, self.n_layer or n)))

    def kv_heads(self, layer: int) -> int:
        return self.heads[layer] if layer < len(self.heads) else 0

    def n_ff(self, layer: int) -> int:
        sizes = self.facts.per_layer("feed_forward_length", self.n_block)
        return sizes[layer] if layer < len(sizes) else 0

    # how large

    def key_width(self, layer: int) -> int:
        return self.kv_heads(layer) * self.of_window(layer, self.key_length, self.keys_swa)

    def value_width(self, layer: int) -> int:
        return self.kv_heads(layer) * self.of_window(layer, self.value_length, self.values_swa)

    def of_window(self, layer: int, full: int, swa: int) -> int:
        if self.windowed is not None:
            return swa if self.windowed[layer] else full
        return full if full == swa else max(full, swa)

    def rows(self, layers: Iterable[int]) -> CacheRows:
        layers = list(layers)
        keys = sum(map(self.key_width, layers))
        if self.only_keys:
            return CacheRows(keys)
        widest = max(map(self.value_width, range(self.n_block)), default=0)
        return CacheRows(keys, sum(map(self.value_width, layers)), len(layers) * widest)

    def indexers(self, attending: list[int]) -> CacheRows:
        """Keys by which a token finds the positions that it attends to."""
        length = self.facts.integer("attention.indexer.key_length")
        if not length:
            return NO_ROWS
        if self.architecture == _MSA:  # made like any other cache, so with values that nobody uses
            first = self.facts.integer("leading_dense_block_count")
            n = len([layer for layer in attending if layer >= first])
            return CacheRows(n * length, n * self.value_length, n * self.value_length)
        if self.architecture in _HYBRID_INDEXED:
            pooled = 3 if self.facts.integer("attention.indexer.kpool") else 1
            own = self.own_indexers() if self.architecture == "glm5-next" else lambda _: True
            return CacheRows(pooled * length * len([layer for layer in attending if own(layer)]))
        if self.architecture not in _DSA or not self.facts.integer("attention.indexer.top_k", 1):
            return NO_ROWS
        own = self.own_indexers()
        n = len([layer for layer in attending if layer < self.n_layer and own(layer)])
        if self.only_keys:
            return CacheRows(n * length)
        return CacheRows(n * length, n * self.value_length, n * self.value_length)

    def own_indexers(self) -> Callable[[int], bool]:
        """Whether a layer has an indexer of its own, and does not take what an earlier one found."""
        told = self.facts.flags("attention.indexer.types", self.n_block)
        if told is not None:
            return lambda layer: told[layer]
        if self.architecture == "glm-dsa" and self.facts.integer("context_length") >= _GLM_5_2_CONTEXT:
            return lambda layer: layer < 2 or layer % 4 == 2
        return lambda _: self.architecture != "hy_v4"

    def state_bytes(self, layers: list[int]) -> int:
        """Convolution and recurrent state of ``layers``, float32."""
        facts = self.facts
        kernel = facts.integer("ssm.conv_kernel")
        inner, state = facts.integer("ssm.inner_size"), facts.integer("ssm.state_size")
        kda, wkv = facts.integer("kda.head_dim"), facts.integer("wkv.head_size")
        shortconv = facts.integer("shortconv.l_cache")
        convolution = max(0, kernel - 1) * (inner + 2 * facts.integer("ssm.group_count") * state)
        recurrent = state * inner
        if wkv:
            convolution, recurrent = facts.integer("token_shift_count", 2) * self.n_embd, self.n_embd * wkv
        elif shortconv:
            convolution = self.n_embd * (shortconv - 1)
        elif kda:
            convolution = 3 * (kernel - 1 if kernel else 3) * self.n_head * kda
            recurrent = kda * kda * self.n_head
        elif self.architecture == "minimax-01":
            recurrent = self.key_length**2 * self.n_head
        total = len(layers) * (_tensor(convolution) + _tensor(recurrent))
        return total + self.n_gram_bytes(layers)

    def n_gram_bytes(self, layers: list[int]) -> int:
        """What an n-gram embedding remembers of the tokens before."""
        if self.architecture != "qwen4exp":
            return 0
        value = self.facts.metadata.get("qwen4exp.ple.layers")
        own = [layer for layer in value or () if layer in layers] if isinstance(value, list) else []
        kernel, n_gram = self.facts.integer("ple.conv_kernel"), self.facts.integer("ple.ngram_size")
        streams = self.facts.integer("hyper_connection.count")
        return len(own) * _tensor(max(0, kernel - 1) * n_gram * streams * self.n_embd)

    def compressed(self) -> Caches:
        """DeepSeek-V4: keys of all positions, and of every 4 or 128 of them together."""
        facts = self.facts
        ratios = facts.per_layer("attention.compress_ratios", self.n_block)
        self.only_keys = True
        by_ratio = {
            ratio: [i for i in range(self.n_block) if i < len(ratios) and ratios[i] == ratio]
            for ratio in (_CSA_RATIO, _HCA_RATIO)
        }
        csa, hca = by_ratio[_CSA_RATIO], by_ratio[_HCA_RATIO]
        indexer, keys = facts.integer("attention.indexer.key_length"), self.keys_swa
        states = 0
        for layers, length, rows in (
            (csa, 2 * keys, 2 * _CSA_RATIO),
            (hca, keys, _HCA_RATIO),
            (csa, 2 * indexer, 2 * _CSA_RATIO),
        ):
            states += 2 * _tensor(length * rows) * len([layer for layer in layers if layer < self.n_layer])
        return Caches(
            self.rows(range(self.n_block)),
            CacheRows(len(csa) * indexer, positions=_CSA_RATIO),
            (
                CacheRows(self.rows(csa).keys, positions=_CSA_RATIO),
                CacheRows(self.rows(hca).keys, positions=_HCA_RATIO),
            ),
            states,
            windows=True,
            sparse=self.sparse(),
        )


def _tensor(n_values: int) -> int:
    """Bytes of a float32 tensor in its buffer."""
    return _up(n_values * _F32, _ALIGNMENT)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
