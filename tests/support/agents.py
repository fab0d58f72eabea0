"""Agents tried for real, by hand: each against ``mobile-gguf serve`` and a written model that calls its tool.

    python tests/support/agents.py FOLDER [codex | claude | opencode ...]

FOLDER is where ``npm install @openai/codex opencode-ai @anthropic-ai/claude-code`` was done. For each agent
the model says thoughts and a call of the agent's own shell, which makes a file; once it has the result, it
says so. An agent works if the file is there and the model's last words are on its screen. What it sent is
kept in FOLDER/sent, one file a connection, for tests/data/agents.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from said_texts import TOLD, saying

from mobile_gguf.demo import ensure_demo

SECONDS = 1500
MADE = "made-by-an-agent"
PROMPT = "Make the file."


@dataclass(frozen=True)
class Agent:
    """How one is run: its shell's name, the field of the command, its command line, files and environment."""

    tool: str
    arguments: dict[str, Any]
    command: tuple[str, ...]
    files: dict[str, str]
    environment: dict[str, str]


def _agents(url: str, binaries: Path) -> dict[str, Agent]:
    shell = f"echo done > {MADE}"
    codex = f"""model = "demo"
model_provider = "local"
model_context_window = 32768

[model_providers.local]
name = "mobile-gguf"
base_url = "{url}/v1"
wire_api = "responses"
stream_idle_timeout_ms = 3600000
"""
    models = {"demo": {"name": "demo", "limit": {"context": 32768, "output": 4096}}}
    options = {"baseURL": f"{url}/v1", "apiKey": "none"}
    local = {"npm": "@ai-sdk/openai-compatible", "name": "mobile-gguf", "options": options, "models": models}
    opencode = {
        "$schema": "https://opencode.ai/config.json",
        "model": "local/demo",
        "provider": {"local": local},
    }
    return {
        "codex": Agent(
            "exec_command",
            {"cmd": shell},
            (
                str(binaries / "codex"), "exec", "--skip-git-repo-check",
                "--dangerously-bypass-approvals-and-sandbox", PROMPT,
            ),
            {".codex/config.toml": codex},
            {},
        ),
        "claude": Agent(
            "Bash",
            {"command": shell, "description": "Make it"},
            (str(binaries / "claude"), "-p", PROMPT, "--allowedTools", "Bash"),
            {},
            {
                "ANTHROPIC_BASE_URL": url,
                "ANTHROPIC_API_KEY": "none",
                "ANTHROPIC_MODEL": "demo",
                "ANTHROPIC_DEFAULT_HAIKU_MODEL": "demo",
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
                "API_TIMEOUT_MS": str(SECONDS * 1000),
            },
        ),
        "opencode": Agent(
            "bash",
            {"command": shell},
            (str(binaries / "opencode"), "run", PROMPT),
            {".config/opencode/opencode.json": json.dumps(opencode)},
            {},
        ),
    }  # fmt: skip


class Tee:
    """Passes bytes on to a server, and keeps what clients sent."""

    def __init__(self, port: int, folder: Path) -> None:
        self._port, self._folder = port, folder
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        for i in range(1 << 30):
            client, _ = self._listening.accept()
            server = socket.create_connection(("127.0.0.1", self._port))
            kept = (self._folder / f"{i}").open("wb", buffering=0)
            threading.Thread(target=_pass, args=(client, server, kept), daemon=True).start()
            threading.Thread(target=_pass, args=(server, client, None), daemon=True).start()


def _pass(source: socket.socket, target: socket.socket, kept: Any) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            if kept is not None:
                kept.write(data)
            target.sendall(data)
    for one in (source, target):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def run(name: str, folder: Path, family: str) -> bool:
    """Try one agent; says what came of it."""
    home, sent = folder / f"home-{name}", folder / "sent" / name
    for path in (home, sent):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    port = _free_port()
    tee = Tee(port, sent)
    agent = _agents(f"http://127.0.0.1:{tee.port}", folder / "node_modules" / ".bin")[name]
    model = saying(family, ensure_demo(), agent.tool, agent.arguments, back=0)
    command = [
        sys.executable,
        "-m",
        "mobile_gguf",
        "serve",
        str(model),
        "--alias",
        "demo",
        "--port",
        str(port),
    ]
    with (folder / f"server-{name}.log").open("w") as log:
        server = subprocess.Popen([*command, "-t", "2"], stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert server.stdout is not None
        server.stdout.readline()
        for path, text in agent.files.items():
            (home / path).parent.mkdir(parents=True, exist_ok=True)
            (home / path).write_text(text)
        work = home / "work"
        work.mkdir()
        kept = {key: one for key, one in os.environ.items() if not key.startswith(("XDG_", "ANTHROPIC_"))}
        own = {"HOME": str(home), "PWD": str(work)} | agent.environment
        begun = time.monotonic()
        done = subprocess.run(
            agent.command, cwd=work, env=kept | own, text=True,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        seconds = time.monotonic() - begun
        (folder / f"agent-{name}.log").write_text(done.stdout + "\n-----\n" + done.stderr)
        has_run, has_said = (work / MADE).is_file(), TOLD in done.stdout
        version = subprocess.run([agent.command[0], "--version"], capture_output=True, text=True, check=False)
        print(f"{name} {re.sub('[^0-9.]', '', version.stdout)}, {family}: exit code {done.returncode}, "
              f"tool {'run' if has_run else 'NOT run'}, answer {'shown' if has_said else 'NOT shown'}, "
              f"{seconds:.0f} s", flush=True)  # fmt: skip
        return has_run and has_said
    finally:
        server.terminate()
        server.wait(60)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("agents", nargs="*")
    parser.add_argument("--family", default="qwen3")
    asked = parser.parse_args()
    names = asked.agents or list(_agents("", Path()))
    worked = [run(name, asked.folder.resolve(), asked.family) for name in names]
    return 0 if all(worked) else 1


if __name__ == "__main__":
    sys.exit(main())
