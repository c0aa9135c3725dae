"""Random bodies at the ends of ranges against `partinf serve`, alongside guards that must not notice. Writes http.json.

    python -m experiments.hostile_inputs.http --count 2500

The server is the one that users start, with the demo model on one CPU device. Eight clients send the bodies of `bodies.py`; guards ask all
the time, one for whole answers, one for streams and one for /health. A guard is harmed if its answer is not the one that it gets
alone. Exits with 1 for any status of 500 or above, any guard harmed, any answer after 30 s, or 1 GiB more than the idle server takes.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from experiments.hostile_inputs.bodies import bodies

CLIENTS, MOST_SECONDS, MOST_BYTES = 8, 30.0, 1 << 30
GUARD = {"model": "demo", "prompt": "sort: d b a c =", "temperature": 0, "max_tokens": 12}
WANTED = " a b c d"


def ask(port: int, path: str, body: bytes | None) -> tuple[int, bytes]:
    """Status and content; an answer that never comes raises."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with contextlib.closing(connection):
        connection.request("GET" if body is None else "POST", path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def streamed(content: bytes) -> str:
    """The text of a stream, or what stands in the place of one."""
    lines = [line[6:] for line in content.decode().split("\n\n") if line]
    if not lines or lines[-1] != "[DONE]":
        return f"cut: {content[-200:]!r}"
    return "".join(json.loads(line)["choices"][0]["text"] if "choices" in line else line for line in lines[:-1])


class Guards:
    """Clients with one question each, again and again until the end."""

    def __init__(self, port: int) -> None:
        self.port, self.ended = port, threading.Event()
        self.checks, self.harmed, self.slowest = 0, list[str](), 0.0
        asks = (self._whole, self._streamed, self._health)
        self._threads = [threading.Thread(target=self._run, args=(one,)) for one in asks]
        for thread in self._threads:
            thread.start()

    def _whole(self) -> str:
        status, content = ask(self.port, "/v1/completions", json.dumps(GUARD).encode())
        return json.loads(content)["choices"][0]["text"] if status == 200 else f"{status}: {content[:200]!r}"

    def _streamed(self) -> str:
        status, content = ask(self.port, "/v1/completions", json.dumps(GUARD | {"stream": True}).encode())
        return streamed(content) if status == 200 else f"{status}: {content[:200]!r}"

    def _health(self) -> str:
        status, content = ask(self.port, "/health", None)
        return WANTED if status == 200 else f"health {status}: {content[:200]!r}"

    def _run(self, one: Any) -> None:
        while not self.ended.is_set():
            started = time.monotonic()
            try:
                answer = one()
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            self.checks += 1
            self.slowest = max(self.slowest, time.monotonic() - started)
            if answer != WANTED:
                self.harmed.append(answer)
            time.sleep(0.01)

    def end(self) -> None:
        self.ended.set()
        for thread in self._threads:
            thread.join()


class Memory:
    """Resident bytes of a process and its children, looked at all the time."""

    def __init__(self, pid: int) -> None:
        self._process, self.ended = psutil.Process(pid), threading.Event()
        self.idle = self.most = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _now(self) -> int:
        total = 0
        for process in (self._process, *self._process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def _watch(self) -> None:
        while not self.ended.wait(0.05):
            self.most = max(self.most, self._now())

    def end(self) -> None:
        self.ended.set()
        self._thread.join()


@contextlib.contextmanager
def served(*more: str) -> Any:
    """A server that is warm: its process and port."""
    command = [sys.executable, "-m", "partinf", "serve", "--model", "demo", "--slice", "cpu:1", "--port", "0", *more]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert child.stderr is not None
    rest = None  # reads what it says later, to its end
    try:
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", child.stderr.readline())
        assert found is not None, child.stderr.read()
        for line in child.stderr:
            if "ready" in line:
                break
        rest = threading.Thread(target=collections.deque, args=(child.stderr, 0))
        rest.start()
        yield child, int(found.group(1))
    finally:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if rest is not None:
            rest.join()
        child.stderr.close()


def measure(count: int, seed: int) -> dict[str, Any]:
    """What became of so many bodies."""
    statuses: collections.Counter[str] = collections.Counter()
    bad, slowest = list[str](), 0.0
    with served() as (child, port):
        for path, body in (
            ("/v1/completions", GUARD),
            ("/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": "a"}]}),
        ):
            ask(port, path, json.dumps(body).encode())  # idle is a server that has answered each kind once
        memory, guards = Memory(child.pid), Guards(port)

        def one(given: tuple[str, bytes]) -> tuple[str, float, str | None]:
            started = time.monotonic()
            try:
                status, content = ask(port, *given)
                failed = status >= 500 or b'"server_error"' in content or b'"service_unavailable_error"' in content
                name = str(status)
            except Exception as error:
                failed, name, content = True, type(error).__name__, str(error).encode()
            failure = f"{given[0]} {given[1][:300]!r}: {name} {content[:200]!r}" if failed else None
            return name, time.monotonic() - started, failure

        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            for name, seconds, failure in pool.map(one, bodies(seed, count)):
                statuses[name] += 1
                slowest = max(slowest, seconds)
                bad += [failure] * (failure is not None)
        guards.end()
        memory.end()
        alive = child.poll() is None
    return {
        "bodies": count,
        "seed": seed,
        "statuses": dict(sorted(statuses.items())),
        "failures": len(bad),
        "first_failures": bad[:10],
        "slowest_answer_seconds": round(slowest, 2),
        "guards_checked": guards.checks,
        "guards_harmed": len(guards.harmed),
        "first_harmed": guards.harmed[:10],
        "slowest_guard_seconds": round(guards.slowest, 2),
        "idle_mib": memory.idle >> 20,
        "most_above_idle_mib": (memory.most - memory.idle) >> 20,
        "alive_at_the_end": alive,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = measure(args.count, args.seed)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    print(text)
    Path(__file__).with_name("http.json").write_text(text + "\n")
    seconds = max(found["slowest_answer_seconds"], found["slowest_guard_seconds"])
    good = not found["failures"] and not found["guards_harmed"] and found["alive_at_the_end"]
    return 0 if good and seconds < MOST_SECONDS and found["most_above_idle_mib"] < MOST_BYTES >> 20 else 1


if __name__ == "__main__":
    sys.exit(main())
