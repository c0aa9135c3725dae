"""Structures of untrusted clients, compiled where their cost harms no other request.

A process compiles every structure first; the kernel bounds its time and its memory (`process`). A structure that compiles quickly there
is compiled here too, within limits that leave a token some milliseconds (`grammars.QUICK`), and the calling thread computes its masks. An
answer that meets these limits, and later answers of its structure, go on in a process for the rest of their lives: a thread would not do,
since a hostile grammar holds the interpreter's lock for seconds per token.

Every thread that asks has a process of its own, started when it is needed first. A process may be ended at any time: it knows nothing that
is not known here, and answers are built again from their tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import signal
import subprocess
import threading

import msgspec

from partinf.foundation import bounded_process
from partinf.foundation.bounded_process import LENGTH
from partinf.foundation.errors import Costly, InvalidInput
from partinf.structured.grammars import QUICK, Answer, Compiled, Grammars, Kept, Tokenizer, TooComplex
from partinf.structured.messages import Bounds, Found, MaskRequest
from partinf.structured.structure import Structure

_ENDING_SECONDS = 10.0
_STARTING_SECONDS = 20.0  # for a process to import what it needs and to read a vocabulary, on a machine that is busy


class Isolated(Grammars):
    """`Grammars` for structures of untrusted clients. Call `close` at the end."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, bounds: Bounds | None = None) -> None:
        """
        Raises:
            InvalidInput: as `Grammars`.
        """
        super().__init__(tokenizer, vocab_size, QUICK)
        self.bounds = bounds or Bounds()
        self._given = pickle.dumps((tokenizer, vocab_size, self.bounds))
        self._own = threading.local()
        self._processes: set[_Process] = set()
        self._numbers = itertools.count(1)
        self._closing = threading.Lock()
        self._closed = False

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        """Those that have been started and not ended."""
        with self._closing:
            return [process.child for process in self._processes]

    def close(self) -> None:
        """End all processes, in the middle of what they do; their waiters are notified that they ended."""
        with self._closing:
            self._closed = True
            processes = list(self._processes)
        for process in processes:
            process.close()

    def ask(self, request: MaskRequest) -> Found:
        """What this thread's process says.

        Raises:
            Ended: it was ended by this question.
        """
        process: _Process | None = getattr(self._own, "process", None)
        if process is None:
            with self._closing:
                if self._closed:
                    raise Ended("the server is closing")
                process = self._own.process = _Process(self._given, self.bounds)
                self._processes.add(process)
        try:
            found = process.ask(request)
        except Ended:
            self._drop(process)
            raise
        if found.full:
            process.close()
            self._drop(process)
        return found

    def answer(self, structure: Structure, quick: Answer | None) -> IsolatedAnswer:
        return IsolatedAnswer(self, next(self._numbers), structure, quick)

    def _make(self, structure: Structure) -> Kept:
        try:
            found = self.ask(MaskRequest(0, 0, (), structure))
        except Ended as error:
            raise InvalidInput(f"{structure.kind}: {error}") from None
        if found.offences or found.mask is None:
            raise InvalidInput(found.offences or f"{structure.kind}: {found.error}")
        quick = None
        if found.seconds <= self.bounds.quick_seconds:
            try:
                quick = self.compile(structure)
            except InvalidInput:  # within the limits of a step
                quick = None
        return _Structure(self, structure, found.mask, quick)

    def _drop(self, process: _Process) -> None:
        self._own.process = None
        with self._closing:
            self._processes.discard(process)


class _Structure:
    """A compiled structure, as `Kept` has it.

    Attributes:
        quick: the same within `QUICK`, until an answer met these limits.
    """

    worn = False

    def __init__(self, home: Isolated, structure: Structure, first_mask: bytes, quick: Compiled | None) -> None:
        self._home, self._structure, self.first_mask, self.quick = home, structure, first_mask, quick

    def start(self) -> IsolatedAnswer:
        quick = self.quick
        if quick is not None and quick.worn:
            quick = self.quick = None
        return self._home.answer(self._structure, None if quick is None else quick.start())


class IsolatedAnswer:
    """The state of one answer (`partinf.engine.constraint.Constraint`)."""

    def __init__(self, home: Isolated, number: int, structure: Structure, quick: Answer | None) -> None:
        self._home, self._number, self._structure, self._quick = home, number, structure, quick
        self._tokens: list[int] = []

    def accept(self, token: int, quick: bool = False) -> bytes | None:
        """As the protocol has it.

        Raises:
            Costly: a process has to be queried, which it does if it is called again.
            RuntimeError: what may follow takes too much to find out, or is nothing that the vocabulary can write.
        """
        if self._quick is not None:
            try:
                mask = self._quick.accept(token)
            except TooComplex:
                self._quick = None
            else:
                self._tokens.append(token)
                return mask
        if quick:
            raise Costly
        self._tokens.append(token)
        found = self._home.ask(MaskRequest(self._number, len(self._tokens), (token,), None))
        if found.unknown:
            found = self._home.ask(MaskRequest(self._number, len(self._tokens), tuple(self._tokens), self._structure))
        if found.error or found.offences:
            raise RuntimeError(found.error or found.offences[0])
        return found.mask


class Ended(RuntimeError):
    """A process ended instead of answering: for what it took, or with the server."""


class _Process:
    """One process and the socket to it. Whatever goes wrong with it, it is not used again."""

    def __init__(self, given: bytes, bounds: Bounds) -> None:
        """Starts it, which does not wait until it has come up."""
        self.child, self._socket = bounded_process.start("partinf.structured.process")
        self._bounds = bounds
        self._unsent = bounded_process.framed(given)
        self._asking = threading.Lock()

    def ask(self, request: MaskRequest) -> Found:
        """
        Raises:
            Ended: the process ended instead.
        """
        with self._asking:
            # The process is ended in time by the kernel; this is for one that does not run at all.
            self._socket.settimeout(self._bounds.patience + (_STARTING_SECONDS if self._unsent else 0.0))
            try:
                self._socket.sendall(self._unsent + bounded_process.framed(pickle.dumps(request)))
                self._unsent = b""
                (length,) = LENGTH.unpack(self._read(LENGTH.size))
                return msgspec.msgpack.decode(self._read(length), type=Found)
            except TimeoutError:
                self._end()
                raise Ended(f"no process had a core for the structure within {self._bounds.patience:g} s; send it again later") from None
            except (OSError, EOFError):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.child.wait(_ENDING_SECONDS)  # its socket closes before it can be reported how it ended
                raise Ended(self._why(self._end(), request)) from None

    def close(self) -> None:
        """End it, from any thread."""
        self.child.kill()
        with self._asking:
            self._end()

    def _read(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self._socket.recv(min(count - len(parts), 1 << 20))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    def _end(self) -> int:
        code = bounded_process.end(self.child)
        self._socket.close()
        return code

    def _why(self, code: int, request: MaskRequest) -> str:
        """What ended the process, for the client."""
        if code in (-signal.SIGPROF, -signal.SIGKILL):
            bounds = self._bounds
            if request.structure is None:
                return f"the structure takes more than {bounds.mask_seconds:g} s of a core to find out what may follow"
            return f"the structure takes more than {bounds.compile_seconds:g} s of a core to compile"
        if code == -signal.SIGABRT:
            return "the structure takes too much memory"
        return "what may follow cannot be found out for this structure (its process ended)"
