"""Clients of other projects, each installed in a virtual environment of its own, once, and stored in the checkout's cache.

Their dependencies exclude each other and ours, so none of them is imported by a test: tests run their programs and commands.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "clients"
_UNREACHABLE = re.compile(r"connection broken by|Temporary failure in name resolution|Network is unreachable|ConnectTimeout|ProxyError")
# What pip has to install. Versions are those that docs/clients.md names; what they need is free.
REQUIREMENTS = {
    "openai-1": ["openai==1.109.1"],
    "openai-2": ["openai==2.54.0"],
    "openai-3": ["openai==3.57.0"],
    "langchain-openai": ["langchain-openai==1.7.4"],
    "inspect-ai": ["inspect-ai==0.3.285", "openai==3.57.0"],
    "guidellm": ["guidellm==0.8.1", "sentencepiece"],
    "aiperf": ["aiperf==0.13.0", "sentencepiece"],
    "lm-eval": ["lm-eval[api]==0.4.13", "transformers", "sentencepiece", "protobuf"],
}


def environment(name: str) -> Path:
    """The folder of a client's commands, `python` among them. Skips the test where packages cannot be had, because of the network."""
    digest = hashlib.sha256(repr((REQUIREMENTS[name], sys.version_info[:2])).encode()).hexdigest()[:8]
    place = _CACHE / f"{name}-{digest}"
    ready = place / "ready"
    if not ready.exists():
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", place], check=True, stdin=subprocess.DEVNULL, timeout=300)
        command = [place / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "--retries", "2", *REQUIREMENTS[name]]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1800, check=False)
        if done.returncode:
            shutil.rmtree(place)
            if _UNREACHABLE.search(done.stderr):
                pytest.skip(f"{name} cannot be installed: the package index is out of reach")
            raise AssertionError(done.stderr)
        ready.touch()
    return place / "bin"
