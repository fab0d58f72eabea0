"""The pinned llama.cpp's own converter, as a process: a checkpoint's folder in, one stacked GGUF out.

Run as ``python -m mobile_gguf.convert.hf.upstream_child`` by ``upstream``, with llama.cpp and its gguf-py
leading PYTHONPATH. All knowledge of architectures is the converter's. Ours is how the tensors are written:
row by row (``lazy_rows``), checked for values that are not finite, with progress; and what is known before
the first of them: the header is written first, the file is stretched to its final size, and the parent looks
at it (what it costs, what quantising it will need) before it says "go".
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from mobile_gguf.errors import install_hint

from ..child_side import ChildChannel
from .finite import NotFiniteError, require_finite
from .joined_experts import as_read
from .upstream_config import ConversionError, read_as_published, require_gating

_CHUNK_BYTES = 16 << 20  # of float32: what is converted at a time, unless one row (one expert) is more
_GPT_OSS = "GptOssForCausalLM"


def main() -> int:
    channel = ChildChannel()
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    try:
        _convert(channel)
    except MemoryError:
        channel.send(error="converting the checkpoint ran out of memory")
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        channel.send(error=f"{where}{error.strerror or error}", errno=error.errno)
        return 1
    except Exception as error:  # the converter raises whatever it likes; the user gets one line
        channel.send(error=_explain(error, channel.job))
        return 1
    return 0


def _convert(channel: ChildChannel) -> None:
    job = channel.job
    channel.send(phase="starting the converter")
    import torch

    torch.set_num_threads(max(1, int(job["threads"])))
    with torch.inference_mode():
        writer = prepared(channel, job)
        write(channel, writer, Path(job["out"]))


def prepared(channel: ChildChannel, job: dict[str, Any]) -> Any:
    """The converter's GGUF writer with all metadata and lazy tensors of the checkpoint."""
    import conversion  # type: ignore[import-not-found]
    import gguf

    _forbid_remote_code(bool(job["trust_remote_code"]))
    folder = Path(job["folder"])
    read_as_published(conversion)
    hparams = conversion.ModelBase.load_hparams(folder, False)
    architecture = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
    model_class = conversion.get_model_class(architecture)
    _adapt(conversion, model_class, architecture, job.get("pre_tokenizer"))
    model_class.no_mtp = bool(job.get("no_mtp"))
    ftype = {
        "auto": gguf.LlamaFileType.GUESSED,
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }[job["outtype"]]
    channel.send(phase="reading the checkpoint's tensors")
    _map_old_shards(channel, Path(job["out"]).parent)
    model = model_class(folder, ftype, Path(job["out"]), model_name=job.get("name"))
    model.model_tensors = as_read(model.model_tensors, architecture)
    model.prepare_tensors()
    model.prepare_metadata(vocab_only=False)
    require_gating(model.gguf_writer, architecture, folder)
    return model.gguf_writer


def _adapt(conversion: Any, model_class: Any, architecture: str, pre_tokenizer: str | None) -> None:
    """Say which tokenizer an unknown one is, and keep gpt-oss's repacking lazy in one piece."""
    text_model = conversion.TextModel
    detect = text_model.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        if pre_tokenizer:
            return pre_tokenizer
        seen = _HashListener()
        conversion.logger.setLevel(logging.WARNING)
        conversion.logger.addHandler(seen)
        try:
            return detect(self, tokenizer)
        except NotImplementedError as error:
            raise ConversionError(
                f"the tokenizer in {self.dir_model} is none that llama.cpp knows (hash {seen.hash}):"
                " if it splits text like one that it knows, name that one with --pre-tokenizer"
                " (such as gpt-2, qwen2, llama-bpe)"
            ) from error
        finally:
            conversion.logger.removeHandler(seen)

    text_model.get_vocab_base_pre = get_vocab_base_pre
    if architecture == _GPT_OSS:
        transform = model_class.transform_nibble_layout

        def transform_nibble_layout(self: Any, tensor: Any) -> Any:
            # one node instead of fourteen that lose sight of the experts' axis
            def mxfp4_layout(blocks: Any) -> Any:
                return transform(self, blocks)

            if not isinstance(tensor, conversion.LazyTorchTensor):
                return mxfp4_layout(tensor)
            return conversion.LazyTorchTensor._wrap_fn(mxfp4_layout, meta_noop=True)(tensor)

        model_class.transform_nibble_layout = transform_nibble_layout


def _map_old_shards(channel: ChildChannel, work: Path) -> None:
    """Let the converter map ``.bin`` shards of torch's old format too: they are rewritten in the present one.

    The old format cannot be mapped, so one such shard at a time is in memory, and all of them on the disk.
    """
    import torch

    load = torch.load

    def load_mapped(path: Any, **kwargs: Any) -> Any:
        try:
            return load(path, **kwargs)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
        channel.send(phase=f"rewriting {Path(path).name}, which is in PyTorch's old format")
        rewritten = work / f"{Path(path).name}.mapped"
        torch.save(load(path, **{**kwargs, "mmap": False}), rewritten)
        return load(str(rewritten), **kwargs)

    torch.load = load_mapped


class _HashListener(logging.Handler):
    """Hears the hash that the converter logs when it does not know a tokenizer."""

    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self.hash = "unknown"

    def emit(self, record: logging.LogRecord) -> None:
        before, found, after = record.getMessage().partition("chkhsh:")
        if found and "*" in before:
            self.hash = after.strip()


def _forbid_remote_code(trusted: bool) -> None:
    """Run Python files of the checkpoint only where the user said so; the converter might without asking."""
    import transformers

    classes: tuple[Any, ...] = (transformers.AutoTokenizer, transformers.AutoConfig)
    for auto in classes:
        original = auto.from_pretrained.__func__

        def from_pretrained(cls: Any, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
            kwargs["trust_remote_code"] = trusted
            return _original(cls, *args, **kwargs)

        auto.from_pretrained = classmethod(from_pretrained)


def write(channel: ChildChannel, writer: Any, out: Path) -> None:
    tensors = writer.tensors[0]
    writer.write_header_to_file(path=out)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    total = sum(writer.ggml_pad(info.nbytes, writer.data_alignment) for info in tensors.values())
    file.flush()
    file.truncate(file.tell() + total)
    channel.send(plan={"n_tensors": len(tensors), "n_bytes": file.tell() + total})
    channel.wait_for_go()
    source = _Checkpoint()
    done, whole = 0, []
    for index, (name, info) in enumerate(tensors.items()):
        for chunk in source.chunks(info.tensor, name):
            file.write(chunk)
            done += len(chunk)
            channel.send(tensor=index + 1, name=name, done=done, total=total)
        if source.n_whole:
            whole.append(name)
        writer.write_padding(file, info.nbytes)
        done += writer.ggml_pad(info.nbytes, writer.data_alignment) - info.nbytes
        info.tensor = None  # its graph held what it was made of
    if done != total:
        raise ConversionError(f"the converter wrote {done} bytes of tensors and promised {total}")
    file.flush()
    os.fsync(file.fileno())
    writer.close()
    channel.send(done=done, total=total, whole=whole)


class _Checkpoint:
    """Reads the checkpoint's tensors for the evaluation of the converter's graphs."""

    def __init__(self) -> None:
        self.n_whole = 0
        self._name = ""

    def chunks(self, tensor: Any, name: str) -> Any:
        """The bytes of one output tensor, some rows at a time."""
        from .lazy_rows import RowEvaluator

        self.n_whole, self._name = 0, name
        shape = tuple(tensor.shape)
        if not hasattr(tensor, "_meta") or not shape:
            yield from self._eager(tensor)
            return
        evaluator = RowEvaluator(self.read_rows, frozenset({"mxfp4_layout"}), self.checked)
        row_values = max(1, _product(shape[1:]))
        n_rows = max(1, _CHUNK_BYTES // (4 * row_values))
        for start in range(0, shape[0], n_rows):
            rows = evaluator.rows(tensor, start, min(shape[0], start + n_rows))
            require_finite(rows, f"tensor {name}: a value does not fit {rows.dtype}")
            yield _bytes_of(rows)
            del rows
        self.n_whole = evaluator.n_whole

    def _eager(self, tensor: Any) -> Any:
        from .lazy_rows import RowEvaluator

        if hasattr(tensor, "tofile") and not hasattr(tensor, "_meta") and hasattr(tensor, "_chunks"):
            yield from _chunked(tensor)
            return
        array = RowEvaluator(self.read_rows, checked=self.checked).whole(tensor)
        require_finite(array, f"tensor {self._name}: not all values are finite")
        yield _bytes_of(array)

    def read_rows(self, node: Any, start: int, stop: int) -> Any:
        """Rows of a safetensors tensor, read, not mapped: mapped pages would count as memory of ours."""
        import numpy as np
        import torch

        if len(node._args) != 1 or not hasattr(node._args[0], "data_range"):
            return None
        place = node._args[0].data_range
        shape, dtype = tuple(node._meta.shape), node._meta.dtype
        n_bytes = place.size // shape[0] if shape else place.size
        n_rows = stop - start if shape else 1
        raw = np.fromfile(place.filename, np.uint8, n_bytes * n_rows, offset=place.offset + n_bytes * start)
        if raw.size != n_bytes * n_rows:
            raise ConversionError(f"{place.filename} has become shorter while it was read")
        rows = torch.from_numpy(raw).view(dtype)
        return self.checked(rows.reshape((n_rows, *shape[1:]) if shape else ()), node)

    def checked(self, rows: Any, node: Any) -> Any:
        """The rows of a source tensor if they are all finite."""
        place = getattr(node._args[0], "data_range", None) if node._args else None
        file = f" in {Path(place.filename).name}" if place is not None else ""
        require_finite(rows, f"the weights of {self._name}{file} hold NaN or infinite values")
        return rows


def _chunked(tensor: Any) -> Any:
    """The converter's own way to write a large tensor in chunks."""
    from gguf.quants import quantize

    for load in tensor._chunks:
        chunk = load()
        yield _bytes_of(chunk if tensor._qtype is None else quantize(chunk, tensor._qtype))


def _bytes_of(rows: Any) -> memoryview:
    import numpy as np

    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= int(size)
    return result


def _explain(error: Exception, job: dict[str, Any]) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, (ConversionError, NotFiniteError)):
        return text
    folder = job.get("folder")
    if "Weights only load failed" in text:
        return f"a .bin shard in {folder} is damaged, or holds code and not only weights: it is not loaded"
    if "trust_remote_code" in text:
        return f"{folder} brings Python code of its own: read it, and if you trust it say --trust-remote-code"
    if isinstance(error, ImportError):
        return f"the converter needs a package that is missing ({text}): {install_hint('convert')}"
    if isinstance(error, KeyError):
        text = f"config.json has no {text}, or in another form"
    if not text:  # an assertion without words: its line is all there is to say
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"
    if len(text) > 600:
        text = text[:600] + " ..."
    return f"the converter of the pinned llama.cpp cannot use {folder}: {type(error).__name__}: {text}"


if __name__ == "__main__":
    raise SystemExit(main())
