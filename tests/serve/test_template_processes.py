"""Templates that would never end, or fill the memory, end alone: at once for the server, and soon for the client that sent them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from partinf.foundation.errors import Overloaded
from partinf.serve.chat_template import ChatTemplate, TemplateRefusal
from partinf.serve.template_processes import TemplateBounds, TemplateProcesses

T = TypeVar("T")
BOUNDS = TemplateBounds(seconds=0.4, waiting_seconds=20)
MESSAGES = [{"role": "user", "content": "hi"}]
GOOD = "{% if messages[0].content == 'hi' %}good{% endif %}"
BIG = {"big": 10**9, "nine": 9}
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = [
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    ENDLESS,
    "{% set m = namespace(x='x') %}{% for i in range(64) %}{% set m.x = m.x ~ m.x %}{% endfor %}{{ m.x|length }}",
    "{{ 'x' * big }}",
    "{{ 'x'|center(big) }}",
    "{{ ('x' * big)|length }}",
    "{{ nine ** (nine ** nine) }}",
    "{{ ('%' ~ big ~ 'd')|format(1) }}",
    "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(200) }}",
    "{% set all = [[0] * big] * big %}{{ all|tojson }}",
    "{{ (range(99999)|list * big)|length }}",
]


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


async def rendered(source: str, *sources: str, bounds: TemplateBounds = BOUNDS) -> list[str]:
    """What one server's processes make of a message that selects one of these templates, one after the other."""
    whole = "".join(f"{{% if which == {place} %}}{one}{{% endif %}}" for place, one in enumerate((source, *sources)))
    processes = TemplateProcesses(ChatTemplate(whole), bounds)
    found = []
    try:
        for place in range(1 + len(sources)):
            try:
                found.append(await processes.render(processes.read(MESSAGES, True, BIG | {"which": place})))
            except TemplateRefusal as refusal:
                found.append(f"refused: {refusal}")
    finally:
        processes.close()
    return found


def test_templates_that_take_too_much_are_ended_and_good_ones_go_on() -> None:
    started = time.monotonic()
    found = run(rendered(GOOD, *[source for hostile in HOSTILE for source in (hostile, GOOD)]))
    assert found[::2] == ["good"] * (len(HOSTILE) + 1)
    assert [one[:80] for one in found[1::2] if not one.startswith("refused: the model's chat template")] == []
    assert time.monotonic() - started < 60


def test_why_a_template_was_ended() -> None:
    endless, large, long, half = run(
        rendered(ENDLESS, "{{ 'x'|center(10 ** 9)|length }}", "{% for i in range(9) %}{{ 'x' * 10 ** 6 }}{% endfor %}", r"{{ '\ud83d' }}")
    )
    assert "more than 0.4 s" in endless
    assert "too much memory" in large
    assert "more than 8388608 characters" in long
    assert r"writes \ud83d, half of a surrogate pair" in half


@pytest.mark.parametrize("constant", ["{{ 9 ** (9 ** 9) }}", "{{ 'x'|center(10 ** 9)|center(10 ** 9) }}"])
def test_what_takes_too_much_when_a_template_is_compiled(constant: str) -> None:
    """Jinja works out constants beforehand."""
    started = time.monotonic()
    (found,) = run(rendered(constant))
    assert found.startswith("refused: the model's chat template takes")
    assert time.monotonic() - started < 10


def test_the_event_loop_is_free_while_a_template_runs() -> None:
    async def main() -> tuple[float, float]:
        started = time.monotonic()
        task = asyncio.create_task(rendered(ENDLESS))
        slowest = 0.0
        while not task.done():
            before = time.monotonic()
            await asyncio.sleep(0.002)
            slowest = max(slowest, time.monotonic() - before)
        return slowest, time.monotonic() - started

    slowest, whole = run(main())
    assert whole > 0.3
    assert slowest < 0.3


def test_waiting_too_long_for_a_process_is_reported() -> None:
    async def main() -> list[str | BaseException]:
        bounds = TemplateBounds(seconds=1.0, processes=1, waiting_seconds=0.2)
        processes = TemplateProcesses(ChatTemplate(ENDLESS), bounds)
        try:
            conversation = processes.read(MESSAGES, True, {})
            return await asyncio.gather(processes.render(conversation), processes.render(conversation), return_exceptions=True)
        finally:
            processes.close()

    first, second = run(main())
    assert isinstance(first, TemplateRefusal)
    assert isinstance(second, Overloaded)


def test_closing_ends_what_is_in_the_middle() -> None:
    async def main() -> float:
        processes = TemplateProcesses(ChatTemplate(ENDLESS), TemplateBounds(seconds=60))
        asking = asyncio.create_task(processes.render(processes.read(MESSAGES, True, {})))
        await asyncio.sleep(0.5)
        started = time.monotonic()
        processes.close()
        with pytest.raises(TemplateRefusal):
            await asking
        return time.monotonic() - started

    assert run(main()) < 5


@pytest.mark.parametrize("source", [GOOD, ENDLESS])
def test_no_process_outlives_a_server_that_is_killed(tmp_path: Path, root: Path, source: str) -> None:
    script = tmp_path / "server.py"
    script.write_text(
        "import asyncio, os\n"
        "from partinf.serve.chat_template import ChatTemplate\n"
        "from partinf.serve.template_processes import TemplateBounds, TemplateProcesses\n"
        "async def main():\n"
        f"    processes = TemplateProcesses(ChatTemplate({source!r}), TemplateBounds(seconds=1.0))\n"
        f"    asking = asyncio.create_task(processes.render(processes.read({MESSAGES!r}, True, {{}})))\n"
        "    await asyncio.sleep(0.5)\n"
        "    print(next(iter((*processes._idle, *processes._busy)))._child.pid, flush=True)\n"
        "    os._exit(0)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=True
    )
    pid, deadline = int(done.stdout), time.monotonic() + 20
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_jax_in_the_process(root: Path) -> None:
    code = "import sys, partinf.serve.template_process; print([name for name in ('jax', 'numpy', 'asyncio') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_busy_machine_does_not_make_a_template_slow() -> None:
    """What counts is time of a core: a process that does not get one for longer than its bound answers when it does."""

    async def check() -> str:
        processes = TemplateProcesses(ChatTemplate(GOOD), BOUNDS)
        try:
            conversation = processes.read(MESSAGES, True, {})
            await processes.render(conversation)
            child = processes._idle[0]._child
            child.send_signal(signal.SIGSTOP)
            rendering = asyncio.ensure_future(processes.render(conversation))
            await asyncio.sleep(3 * BOUNDS.seconds)
            child.send_signal(signal.SIGCONT)
            return await rendering
        finally:
            processes.close()

    assert run(check()) == "good"
