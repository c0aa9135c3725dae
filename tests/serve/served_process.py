"""A server as a process of its own, on the fake runner, so that it starts at once.

Arguments: seconds per step, for draining, and for loading; and the file of a chat template, if there is to be one.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from partinf.checkpoint.tokenizer import load_tokenizer
from partinf.serve.chat_template import load_chat_template
from partinf.serve.server import Loaded, Options, listen, serve
from tests.serve.support import DEMO, LIMITS, Slow, fake_engine

if __name__ == "__main__":
    step_seconds, drain_seconds, load_seconds = map(float, sys.argv[1:4])
    template = load_chat_template(None, Path(sys.argv[4])) if sys.argv[4:] else None

    def load() -> Loaded:
        time.sleep(load_seconds)
        return Loaded(fake_engine(Slow(LIMITS, step_seconds)), load_tokenizer(DEMO), template, "nothing to compile")

    with listen("127.0.0.1", 0) as listener:
        ended = serve(listener, load, Options(["demo"], drain_seconds=drain_seconds))
    raise SystemExit(0 if ended else 3)
