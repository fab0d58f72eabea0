"""``mobile-gguf doctor``: what this machine has, what is wrong, and what to do."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from mobile_gguf.files.paths import models_dir
from mobile_gguf.wording import columns, plain

if TYPE_CHECKING:
    from mobile_gguf.plan.facts import LocalModel
    from mobile_gguf.plan.health import Finding

_DESCRIPTION = """Look at processor, memory, engine, devices, settings, folders, models and disk, and say what
each has and what to do where something is amiss. It takes seconds and changes nothing. The exit status is 1
if something is wrong; a warning is not."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "doctor", help="say what this machine has, what is wrong, and what to do", description=_DESCRIPTION
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from mobile_gguf.hub.cache import cache_root
    from mobile_gguf.plan import facts, health

    places = (models_dir(), cache_root())
    files = (path for place in places for path in place.rglob("*.gguf"))
    findings = health.examine(facts.gather(files, _models()))
    well = health.is_well(findings)
    if args.json:
        print(json.dumps({"ok": well, "findings": [finding.to_dict() for finding in findings]}))
    else:
        for line in lines(findings):
            print(line)
    return 0 if well else 1


def _models() -> list[LocalModel]:
    """The models of ``list``, as a run with this configuration would find them."""
    from mobile_gguf.config import VERBS, read_defaults, values_of
    from mobile_gguf.errors import MobileError
    from mobile_gguf.hub.listing import list_models
    from mobile_gguf.options import LoadOptions, make_options
    from mobile_gguf.plan.facts import LocalModel
    from mobile_gguf.plan.known import Here

    try:
        options = make_options(LoadOptions, values_of(read_defaults("run", VERBS), LoadOptions))
    except MobileError:  # which is a finding of its own
        options = LoadOptions()
    entries = list_models(Here(options.rpc, options))
    # the demo that was not made yet has no file
    return [LocalModel(entry.name, entry.problem, entry.refusal) for entry in entries if entry.path]


def lines(findings: list[Finding]) -> list[str]:
    """For people: a line for each finding, and below it what to do."""
    rows = columns([(finding.status, finding.name, plain(finding.text)) for finding in findings])
    made = []
    for row, finding in zip(rows, findings, strict=True):
        made.append(row)
        if finding.advice:
            made.append(f"  -> {plain(finding.advice)}")
    return made
