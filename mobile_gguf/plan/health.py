"""What is wrong with this machine or this installation, and what to do: rules over ``facts``, nothing else.

A finding is wrong if nothing can run or what runs would be ended, a warning if something is slow or will fail
later. Each of both says what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from mobile_gguf.device.ask import LIBRARY_VARIABLE
from mobile_gguf.sizes import GIB, MIB, format_bytes

from .facts import CACHE, Facts, Folder

OK, WARNING, WRONG = "ok", "warning", "wrong"

_MIN_MEMORY = 320 * MIB  # the demo model's dense weights, a small context and a few experts
_LITTLE_MEMORY = 2 * GIB
_MIN_ADDRESS_SPACE = 8 * GIB  # the store reserves the addresses of all experts
_MIN_FREE = 64 * MIB  # plans, sessions, logs
_LITTLE_FREE = 5 * GIB
_SLOW_READS = 150e6  # bytes per second, of a good disk that turns
_BUILD = "run `mobile-gguf engine build`"
_WHEEL = "install the engine's wheel, which needs no compiler (docs/release.md)"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ``status`` is OK, WARNING or WRONG; ``advice`` is empty if it is OK."""

    name: str
    status: str
    text: str
    advice: str = ""

    def to_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def examine(facts: Facts) -> list[Finding]:
    """Every finding, in the order in which they are read."""
    return [finding for rule in _RULES for finding in rule(facts)]


def is_well(findings: list[Finding]) -> bool:
    """Whether nothing is wrong; there may be warnings."""
    return all(finding.status != WRONG for finding in findings)


def _processor(facts: Facts) -> Iterator[Finding]:
    text = f"{facts.processor}, {_count(facts.processors, 'processor')}, {facts.system}"
    sets = facts.instruction_sets
    if facts.machine in ("x86_64", "amd64") and sets and "avx2" not in sets:
        yield Finding(
            "processor", WARNING, f"{text}, without AVX2",
            "it computes several times slower: processors have AVX2 since 2013 (AMD: 2015), and a virtual "
            "machine passes it on if its CPU model is `host`",
        )  # fmt: skip
        return
    best = next((name for name in ("amx_int8", "avx512f", "avx2", "sve", "asimddp") if name in sets), "")
    yield Finding("processor", OK, f"{text}{f', {best}' if best else ''}")


def _quota(facts: Facts) -> Iterator[Finding]:
    if facts.cpu_quota is not None and facts.cpu_quota < 1:
        yield Finding(
            "processor", WARNING, f"a cgroup lets this process have {facts.cpu_quota:.2f} of a processor",
            "give the container one processor or more (docker: --cpus)",
        )  # fmt: skip


def _memory(facts: Facts) -> Iterator[Finding]:
    memory = facts.memory
    text = (
        f"{format_bytes(memory.available_bytes)} of {format_bytes(memory.total_bytes)} available "
        f"(says {memory.source})"
    )
    more = _more_memory(facts)
    if memory.available_bytes < _MIN_MEMORY:
        advice = f"{more}: below {format_bytes(_MIN_MEMORY)} not even the demo model runs"
        yield Finding("memory", WRONG, text, advice)
    elif memory.available_bytes < _LITTLE_MEMORY:
        yield Finding(
            "memory",
            WARNING,
            text,
            f"{more}, or choose small models: `mobile-gguf plan MODEL` says what fits",
        )
    else:
        yield Finding("memory", OK, text)


def _more_memory(facts: Facts) -> str:
    if facts.memory.is_capped:
        return "raise the limit of the container or unit (docker: --memory, systemd: MemoryMax=)"
    return "end what else takes memory"


def _address_space(facts: Facts) -> Iterator[Finding]:
    if facts.address_space is not None and facts.address_space < _MIN_ADDRESS_SPACE:
        yield Finding(
            "memory", WRONG, f"this process may have {format_bytes(facts.address_space)} of addresses",
            "`ulimit -v unlimited`: the store reserves addresses for all experts and takes memory for few",
        )  # fmt: skip
    if facts.never_overcommits:
        yield Finding(
            "memory", WARNING, "the kernel promises no memory that it lacks (vm.overcommit_memory is 2)",
            "`sysctl vm.overcommit_memory=0`, or budgets below what is free: all of the store counts at once",
        )  # fmt: skip


def _engine(facts: Facts) -> Iterator[Finding]:
    info = facts.engine
    if info is None:
        advice = f"{_BUILD} --force" if not facts.build_problem else _WHEEL
        yield Finding("engine", WRONG, facts.engine_problem, advice)
        return
    installed = info["installed"]
    make = (
        _BUILD if not facts.build_problem else f"{_WHEEL}; it cannot be compiled here: {facts.build_problem}"
    )
    if installed is None:
        yield Finding("engine", WRONG, "it is not installed", make)
        return
    version = installed["version"]
    if not installed["patched"]:
        yield Finding("engine", WRONG, f"llama-cpp-python {version} is installed and is not ours", make)
        return
    abi, wanted = info["abi_version"], info["abi_version_expected"]
    if abi not in (None, wanted):
        yield Finding("engine", WRONG, f"ABI version {abi}, and this package needs {wanted}", make)
        return
    if info["problem"] or not info["library"]:
        advice = f"take {LIBRARY_VARIABLE} out of the environment" if facts.other_library else make
        yield Finding("engine", WRONG, info["problem"] or "its library is missing", advice)
        return
    target = installed["target"]
    kind = f"for any processor ({target})" if target else "compiled for this machine"
    text = f"{version} ({', '.join(installed['backends'])}), {kind}"
    missing = _missing_sets(facts)
    if missing:
        text = f"compiled for another processor: this one has no {', '.join(missing)}"
        yield Finding("engine", WRONG, text, make)
    elif not info["current"]:
        yield Finding("engine", WARNING, f"{text}, of other patches or options than this package's", make)
    else:
        yield Finding("engine", OK, text)


def _missing_sets(facts: Facts) -> list[str]:
    """Instruction sets that the engine was compiled for and this processor lacks."""
    installed = (facts.engine or {}).get("installed") or {}
    compiled = set((installed.get("instruction_sets") or "").split())
    return sorted(compiled - facts.instruction_sets) if facts.instruction_sets else []


def _devices(facts: Facts) -> Iterator[Finding]:
    if facts.engine is None or "devices" not in facts.engine:
        return
    devices = facts.engine["devices"]
    if not any(device["type"] == "cpu" for device in devices):
        yield Finding(
            "devices", WRONG, "the engine finds no kernels for this processor beside its library",
            "`pip install --force-reinstall` of its wheel again, or `mobile-gguf engine build --force`",
        )  # fmt: skip
        return
    others = [device for device in devices if device["type"] != "cpu"]
    if not others:
        yield Finding("devices", OK, "none beside the processor")
    for device in others:
        free, total = format_bytes(device["memory_free"]), format_bytes(device["memory_total"])
        yield Finding("devices", OK, f"{device['name']}: {device['description']}, {free} of {total} free")


def _folders(facts: Facts) -> Iterator[Finding]:
    for folder in facts.folders:
        yield _folder(folder)


def _folder(folder: Folder) -> Finding:
    variable = "XDG_CACHE_HOME" if folder.name == CACHE else "XDG_DATA_HOME"
    elsewhere = f"set {variable} to a folder on another disk"
    if folder.problem:
        text = f"nothing can be written to {folder.path} ({folder.problem})"
        return Finding(folder.name, WRONG, text, f"make it writable, or {elsewhere}")
    text = f"{folder.path}, {format_bytes(folder.free_bytes)} free"
    if folder.free_bytes < _MIN_FREE:
        return Finding(
            folder.name, WRONG, text, f"free some (`mobile-gguf list`, `mobile-gguf rm`), or {elsewhere}"
        )
    if folder.free_bytes < _LITTLE_FREE and folder.name != CACHE:
        return Finding(folder.name, WARNING, text, f"a model takes gigabytes: free some, or {elsewhere}")
    return Finding(folder.name, OK, text)


def _settings(facts: Facts) -> Iterator[Finding]:
    settings = facts.settings
    if settings.problem:
        yield Finding("settings", WRONG, settings.problem, "correct it or take it out (docs/config.md)")
    elif settings.exists:
        yield Finding("settings", OK, str(settings.path))
    else:
        yield Finding("settings", OK, f"as built in: there is no {settings.path}")
    for problem in settings.presets:
        yield Finding("presets", WARNING, problem, "correct it or remove the file")


def _models(facts: Facts) -> Iterator[Finding]:
    for model in facts.models:
        if model.problem:
            yield Finding(
                "model", WARNING, f"{model.name} cannot be used: {model.problem}",
                "download or convert it again, or remove it with `mobile-gguf rm`",
            )  # fmt: skip
        elif model.refusal:
            yield Finding(
                "model", WARNING, f"{model.name} cannot be loaded: {model.refusal}",
                f"{_more_memory(facts)}, or choose a smaller one: `mobile-gguf plan MODEL` says what fits",
            )  # fmt: skip


def _reads(facts: Facts) -> Iterator[Finding]:
    reads = facts.reads
    if reads.problem:
        yield Finding("disk", OK if reads.path is None else WARNING, reads.problem,
                      "" if reads.path is None else "put models on a disk that can be read")  # fmt: skip
        return
    text = f"{reads.bytes_per_second / 1e6:.0f} MB/s in reads of experts ({reads.path})"
    if reads.bytes_per_second < _SLOW_READS:
        yield Finding(
            "disk", WARNING, text,
            "a model that does not fit waits for this disk: put models on an SSD of this machine",
        )  # fmt: skip
    else:
        yield Finding("disk", OK, text)


_RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _processor, _quota, _memory, _address_space, _engine, _devices, _settings, _folders, _models, _reads,
)  # fmt: skip


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
