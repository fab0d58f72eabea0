"""``mobile-gguf plan`` as a user meets it, and predictions beside runs."""

import dataclasses
import json
import shlex
from types import SimpleNamespace

import pytest
from fake_backend import FakeBackend, fake_info, scripted
from gguf_samples import write_sample
from layout_files import write_per_expert

from mobile_gguf.cli import main
from mobile_gguf.errors import MobileError
from mobile_gguf.generate.answer.receipt import Receipt, Speculation
from mobile_gguf.gguf.info import read_gguf_info
from mobile_gguf.options import LoadOptions
from mobile_gguf.plan import compare_run, machine, measure, measure_prompts, predict_cached, steps
from mobile_gguf.plan.disk import read_size
from mobile_gguf.plan.machine import Measurements, Rate, read_measurements
from mobile_gguf.plan.measure import LIMIT_S, Step, expected_seconds, steps_for
from mobile_gguf.plan.workload import count_weights, read_workload
from mobile_gguf.sizes import Size


@pytest.fixture
def sample(tmp_path):
    return write_sample(tmp_path / "sample.gguf", kind="Q8_0")


@pytest.fixture
def quick(monkeypatch):
    """Measures as always, but only for a moment."""
    for name in ("PRODUCT_S", "_DISK_S", "_OVERHEAD_S", "_LINK_S"):
        monkeypatch.setattr(measure, name, 0.005)
    monkeypatch.setattr(measure_prompts, "PRODUCT_S", 0.005)
    for module in (measure, steps):
        monkeypatch.setattr(module, "WEIGHTS_BYTES", 1 << 20)
    monkeypatch.setattr(steps, "_MAX_STACKS", 4)
    # a step that a busy machine holds up is not left out
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=lambda: 0.0))


@pytest.fixture
def command(capfd):
    def run(*argv):
        try:
            code = main([str(word) for word in argv])
        except SystemExit as end:
            code = end.code
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_the_transcript_without_a_measurement(command, sample):
    code, out, err = command("plan", sample, "--no-measure", "--ram-budget", "100%")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert [line.split("  ")[0] for line in lines] == [
        "model", "memory", "dense weights", "context", "experts in RAM", "speed", "1 GiB more buys", "",
        lines[-1],
    ]  # fmt: skip
    assert lines[4].split("  ")[-1].strip().endswith("all of them")
    assert lines[5].endswith("not measured")
    assert lines[-1] == f"mobile-gguf run {sample} --ram-budget 100% -c 64 -ub 512"


def test_measuring_through_the_engine_predicts_every_mode_and_is_kept(command, sample, quick):
    code, out, err = command("plan", sample, "--ram-budget", "60%", "--json", "-t", 1)
    assert code == 0
    assert err.startswith("measuring this machine, about ")
    found = json.loads(out)
    assert [one["mode"] for one in found["predictions"]] == ["exact", "big-little", "little"]
    for one in found["predictions"]:
        assert 0 < one["low"] < one["predicted_tps"] < one["high"]
    assert [one["n_tokens"] for one in found["prompts"]] == [found["n_ctx"]]
    assert 0 < found["prompts"][0]["low"] < found["prompts"][0]["predicted_tps"] < found["prompts"][0]["high"]
    assert found["fits"] is True
    assert 0 < found["ram_share"] < 1
    assert found["notes"] == []
    assert found["measured"]
    # the second time there is nothing left to measure
    code, again, err = command("plan", sample, "--ram-budget", "60%", "--json", "-t", 1)
    assert (code, err) == (0, "")
    assert json.loads(again)["predictions"] == found["predictions"]
    info = read_gguf_info(sample)
    cached = predict_cached(info, LoadOptions(ram_budget=Size(fraction=0.6), threads=1))
    assert cached is not None
    assert cached.predicted_tps == pytest.approx(found["predictions"][0]["predicted_tps"], rel=1e-6)


def test_the_command_it_suggests_is_one_that_can_be_given(command, sample):
    from mobile_gguf.cli import make_parser, parse

    _, out, _ = command("plan", sample, "--no-measure", "--ram-budget", "60%", "-c", 32, "-t", 2)
    words = shlex.split(out.splitlines()[-1])
    args = parse(make_parser(), [*words[1:], "hi"])
    assert (args.n_ctx, args.n_ubatch, args.threads) == (32, 512, 2)


GIVEN = [
    "--mode", "big-little", "--gamma", "0.5", "--importance", "confidence", "--head-threshold", "0.25",
    "--little-k", "1", "--miss", "cpu", "--placement", "cache", "--prefetch", "off", "--io", "direct",
    "--eviction", "lru", "-b", "64", "-tb", "2", "--io-threads", "3", "-fa", "-s", "7",
]  # fmt: skip


def test_the_command_it_suggests_has_every_option_that_was_given(command, sample):
    from mobile_gguf.cli import make_parser, parse
    from mobile_gguf.flags import given
    from mobile_gguf.options import defaults

    _, out, _ = command("plan", sample, "--no-measure", *GIVEN)
    words = shlex.split(out.splitlines()[-1])
    options = given(parse(make_parser(), [*words[1:], "hi"]), LoadOptions)
    asked = given(parse(make_parser(), ["run", str(sample), *GIVEN, "hi"]), LoadOptions)
    assert {name: options[name] for name in asked} == asked
    # what it adds of its own, and nothing that is as usual
    assert set(options) - set(asked) == {"ram_budget", "n_ctx", "n_ubatch"}
    assert all(value != defaults(LoadOptions)[name] for name, value in asked.items())


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--ram-budget", "1MiB"], 0, ""),
        (["--ram-budget", "1K"], 1, "too small: the smallest legal budget for this model is"),
        (["-c", "16000000"], 1, "sample.gguf does not fit"),
        (["--vram-budget", "1G"], 1, "--vram-budget 1.00 GiB: this engine has no device here"),
        (["--vram-budget", "1Q"], 2, "is not a size"),
        (["--measure", "--no-measure"], 2, "give --measure or --no-measure, not both"),
        (["--rpc", "127.0.0.1:1"], 4, "127.0.0.1:1"),
        (["--rpc", "127.0.0.1:1", "--vram-budget", "off"], 2, "--vram-budget off uses none"),
    ],
)
def test_refusals_are_one_line(command, sample, argv, code, words, monkeypatch):
    found, out, err = command("plan", sample, *argv, *([] if "--measure" in argv else ["--no-measure"]))
    assert found == code
    if code:
        assert out == ""
        assert err.startswith("mobile-gguf: error: ")
        assert words in err
        assert len(err.splitlines()) == 1


def test_the_wrong_file_is_said_as_everywhere(command, tmp_path):
    assert command("plan", tmp_path / "none.gguf")[0] == 3
    (tmp_path / "bad.gguf").write_bytes(b"no")
    assert command("plan", tmp_path / "bad.gguf")[0] == 1


def test_an_interrupt_keeps_what_was_measured(command, sample, quick, monkeypatch):
    def interrupted(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure_reads", interrupted)
    code, out, err = command("plan", sample, "-t", 1)
    assert (code, out) == (130, "")
    assert "what was measured is kept" in err
    kept = read_measurements().entries
    assert any(name.startswith("cpu.1.") for name in kept)
    assert not any("read" in name for name in kept)


def test_what_fails_or_takes_too_long_is_left_out_and_said(monkeypatch):
    def slow(check):
        check()
        monkeypatch.setattr(measure.time, "monotonic", lambda: 1e12)
        check()
        return {}

    known = Measurements({"machine": "test"})
    steps = [Step("a", 1.0, "a", lambda check: {"a": Rate(1, 1, 1)}), Step("b", 1.0, "b", slow)]
    said = measure.measure(known, [*steps, Step("c", 2 * LIMIT_S, "c", lambda check: {})])
    assert list(known.entries) == ["a"]
    assert [text.split()[0] for text in said] == ["b", "c"]


def test_measurements_that_cannot_be_kept_are_said_and_used(monkeypatch):
    def refused(_measurements):
        raise MobileError("cannot write x: read-only")

    monkeypatch.setattr(measure, "write_measurements", refused)
    known = Measurements({"machine": "test"})
    said = measure.measure(known, [Step("a", 1.0, "a", lambda _check: {"a": Rate(1, 1, 1)})])
    assert said == ["the measurements are not kept: cannot write x: read-only"]
    assert list(known.entries) == ["a"]


def test_a_plan_takes_less_than_a_minute(sample):
    info = read_gguf_info(sample)
    steps = steps_for(info, read_workload(info), [1, 2], 2)
    assert 0 < expected_seconds(Measurements({}), steps) <= LIMIT_S


@pytest.mark.parametrize("merged", [False, True])
def test_the_workload_counts_every_weight_that_a_token_meets(tmp_path, merged):
    path = write_sample(tmp_path / "m.gguf", merged=merged)
    info, work = read_gguf_info(path), read_workload(read_gguf_info(path))
    layer = info.expert_layers[0]
    assert work.expert_bytes == layer.file_bytes / layer.n_expert
    # routers, and the embedding, which is the output matrix as well
    assert work.dense_bytes == 4 * (2 * 4 * 32 + info.n_vocab * 32)
    assert 4 * count_weights(info) == info.tensor_bytes


@pytest.mark.parametrize("alignment", [32, 4096])
def test_pieces_that_begin_at_a_sector_are_read_without_one_more(tmp_path, alignment):
    path = write_sample(tmp_path / "m.gguf")
    if alignment == 4096:
        path = write_per_expert(path, tmp_path / "per-expert.gguf")
    experts = read_workload(read_gguf_info(path)).experts
    assert {product.aligned for product in experts} == {alignment == 4096}
    assert read_size(18432, aligned=False) == 6 * 4096
    assert read_size(18432, aligned=True) == 5 * 4096


# beside a run


def known_machine(monkeypatch) -> None:
    info = fake_info()
    work = read_fake_workload()
    known = read_measurements()
    for threads in (1, 2):
        for product in (*work.dense, *work.experts):
            for name in (
                f"cpu.{threads}.usual.{product.type_id}.x",
                f"cpu.{threads}.plain.{product.type_id}.x",
            ):
                known.put(name, Rate(1e9, 0.9e9, 1.1e9))
    from mobile_gguf.plan import known as rooms
    from mobile_gguf.plan import planner

    monkeypatch.setattr(rooms, "read_workload", lambda _info: work)
    monkeypatch.setattr(rooms, "read_hotness", lambda _info: None)
    monkeypatch.setattr(planner, "disk_name", lambda _path: "disk.1")
    for n_threads in (1, 4):
        known.put(f"disk.1.read.36864.{n_threads}", Rate(1e-4, 0.9e-4, 1.1e-4))
    machine.write_measurements(known)
    assert info.n_expert


def read_fake_workload():
    from mobile_gguf.plan.workload import Product, Workload

    return Workload((Product(8, 64, 512, 8, 34816),), (Product(8, 64, 32, 2, 32768),))


def test_run_json_has_no_plan_without_a_measurement(command, fake_load):
    fake_load(FakeBackend(scripted("Hello.")))
    code, out, err = command("run", "m.gguf", "hi", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["plan"] is None


def test_run_shows_the_prediction_beside_the_speed(command, fake_load, monkeypatch):
    known_machine(monkeypatch)
    fake_load(FakeBackend(scripted("Hello, world.")))
    _, out, _ = command("run", "m.gguf", "hi", "--json", "-t", 1)
    plan = json.loads(out)["plan"]
    assert set(plan) == {"predicted_tps", "low", "high", "actual_tps"}
    assert plan["low"] < plan["predicted_tps"] < plan["high"]
    assert plan["actual_tps"] == pytest.approx(json.loads(out)["timings"]["predicted_per_second"], abs=1e-3)
    _, out, err = command("run", "m.gguf", "hi", "-t", 1)
    assert out == "Hello, world.\n"
    assert " tok/s | predicted " in err
    assert err.rstrip().endswith(" tok/s")


def test_a_run_corrects_the_next_prediction_of_its_model_and_mode(monkeypatch):
    known_machine(monkeypatch)
    info, options = fake_info(), LoadOptions(threads=1)
    receipt = Receipt(mode="exact", n_expert_used=8, little_k=4, tokens_big=64)
    first = compare_run(info, options, receipt, 64, 1.0)
    assert first is not None
    slower = first.predicted_tps / 1.5
    for _ in range(3):
        compare_run(info, options, receipt, 64, slower)
    taught = compare_run(info, options, receipt, 64, slower)
    assert taught is not None
    assert taught.predicted_tps == pytest.approx(slower, rel=0.1)
    other = compare_run(info, options, dataclasses.replace(receipt, mode="little"), 64, slower, teach=False)
    assert other is not None
    assert other.predicted_tps > first.predicted_tps * 0.9


def test_too_short_an_answer_teaches_nothing(monkeypatch):
    known_machine(monkeypatch)
    info, options = fake_info(), LoadOptions(threads=1)
    receipt = Receipt(mode="exact", n_expert_used=8, little_k=4)
    found = [compare_run(info, options, receipt, 4, 1.0) for _ in range(3)]
    assert found[0] is not None
    assert found[0] == found[2]
    assert compare_run(info, options, receipt, 1, 1.0) is None


def test_an_answer_that_was_drafted_teaches_nothing(monkeypatch):
    """How often drafts are right is the text's."""
    known_machine(monkeypatch)
    info, options = fake_info(), LoadOptions(threads=1)
    receipt = Receipt(mode="exact", n_expert_used=8, little_k=4, tokens_big=64)
    first = compare_run(info, options, receipt, 64, 1.0, teach=False)
    drafted = dataclasses.replace(receipt, speculation=Speculation("ngram", drafted=9, accepted=8))
    for _ in range(3):
        compare_run(info, options, drafted, 64, 1.0)
    assert compare_run(info, options, receipt, 64, 1.0, teach=False) == first
    idle = dataclasses.replace(receipt, speculation=Speculation("ngram"))
    for _ in range(3):
        compare_run(info, options, idle, 64, 1.0)
    assert compare_run(info, options, receipt, 64, 1.0, teach=False) != first


def test_a_list_of_models_never_measures_and_never_fails(sample, monkeypatch):
    info = read_gguf_info(sample)
    assert predict_cached(info) is None
    known_machine(monkeypatch)
    assert predict_cached(info, LoadOptions(n_ctx=1 << 24)) is None
    sample.unlink()
    monkeypatch.undo()
    assert predict_cached(info) is None
