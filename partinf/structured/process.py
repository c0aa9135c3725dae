"""The process that compiles structures and computes masks that take long.

`foundation.bounded_process` starts `python -m partinf.structured.process` and talks to it. The first frame is the tokenizer, the size of
the vocabulary and the bounds; every other frame is a `MaskRequest`, answered by one `Found`. The kernel ends the process where it takes
more time of a core or more memory than the bounds allow. It runs at low priority.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal
import sys
import time
from collections import OrderedDict
from pathlib import Path

import msgspec

from partinf.foundation.bounded_process import bound_memory, connect, framed, next_frame
from partinf.foundation.errors import InvalidInput
from partinf.structured.grammars import Answer, Compiled, Grammars
from partinf.structured.messages import Bounds, Found, MaskRequest

_NICENESS = 10  # a tenth of a core where others want all of them
_ANSWERS = 256  # that are remembered, and are built again from their tokens where they were not


class Answers:
    """Answers in the middle, by number."""

    def __init__(self, grammars: Grammars, bounds: Bounds) -> None:
        self._grammars, self._bounds = grammars, bounds
        self._known: OrderedDict[int, tuple[int, Answer]] = OrderedDict()
        self._idle = _resident()

    def find(self, request: MaskRequest) -> Found:
        """What was requested."""
        structure = request.structure
        # A new answer may be one whose structure has to be compiled again, and its tokens taken.
        _bound_time(self._bounds.mask_seconds if structure is None else self._bounds.compile_seconds)
        started = time.process_time()
        try:
            if structure is not None and not request.answer:
                found = Found(self._grammars(structure).first_mask)
            else:
                found = self._next(request)
        except InvalidInput as error:
            found = Found(offences=list(error.offences))
        except (RuntimeError, MemoryError) as error:
            found = Found(error=str(error) or "it takes too much memory")
        _bound_time(0.0)
        found.seconds = time.process_time() - started
        found.full = _resident() - self._idle > self._bounds.memory // 2
        return found

    def _next(self, request: MaskRequest) -> Found:
        if request.structure is None:
            count, state = self._known.get(request.answer, (-1, None))
            if state is None or count != request.count - 1:
                return Found(unknown=True)
        else:
            compiled = self._grammars(request.structure)
            assert isinstance(compiled, Compiled)
            state = compiled.start()
            for token in request.tokens[:-1]:
                state.skip(token)
        mask = state.accept(request.tokens[-1])
        self._known[request.answer] = request.count, state
        self._known.move_to_end(request.answer)
        if mask is None:
            del self._known[request.answer]
        elif len(self._known) > _ANSWERS:
            self._known.popitem(last=False)
        return Found(mask)


def main() -> None:
    with connect() as server, server.makefile("rb") as frames:
        tokenizer, vocab_size, bounds = pickle.loads(next_frame(frames))  # from the process that started this one
        answers = Answers(Grammars(tokenizer, vocab_size), bounds)
        with contextlib.suppress(OSError):
            os.nice(_NICENESS)
        bound_memory(bounds.memory)
        while body := next_frame(frames):
            server.sendall(framed(msgspec.msgpack.encode(answers.find(pickle.loads(body)))))


def _bound_time(seconds: float) -> None:
    """Seconds of a core, after which the kernel ends the process; 0 lifts the bound."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _resident() -> int:
    """Bytes that this process has, or has had at most where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    main()
