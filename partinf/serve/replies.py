"""A model's text as the message that it is: reasoning, text and tool calls, separated as it arrives."""

from __future__ import annotations

from partinf.engine.detokenize import longest_beginning
from partinf.serve.forced_calls import NamedCall
from partinf.serve.tool_calls import CallReader, Part

THINK, THOUGHT = "<think>", "</think>"  # around reasoning, in the templates of models that reason


class ReplyReader:
    """Reads one answer.

    Reasoning stands at the beginning, between its marks, of which the prompt may hold the first. Blank lines around it are no text.
    """

    def __init__(self, thinks: bool, inside: bool, calls: CallReader | NamedCall | None) -> None:
        """
        Args:
            thinks: the answer may begin with reasoning. inside: the prompt has begun it. calls: reads the text after it.
        """
        self._calls = calls
        self._pending = ""
        self._thinks = "inside" if inside else "perhaps" if thinks else "no"
        self._blank = thinks or inside  # nothing but blanks so far, of what is read now

    @property
    def num_calls(self) -> int:
        return 0 if self._calls is None else self._calls.count

    def push(self, text: str) -> Part:
        """What more text adds to the message."""
        part = Part()
        self._read(text, part, last=False)
        return part

    def finish(self, part: Part) -> None:
        """No more text comes; the rest joins the part."""
        self._read("", part, last=True)
        if self._calls is not None:
            self._calls.finish(part)

    def _read(self, text: str, part: Part, last: bool) -> None:
        if self._thinks == "no":
            self._after(text, part)
            return
        self._pending += text
        if self._thinks == "perhaps":
            lead = self._pending.lstrip()
            if lead.startswith(THINK):
                self._thinks, self._pending = "inside", lead[len(THINK) :]
            elif THINK.startswith(lead) and not last:
                return
            else:
                self._thinks, rest, self._pending, self._blank = "no", self._pending, "", False
                self._after(rest, part)
                return
        self._think(part, last)

    def _think(self, part: Part, last: bool) -> None:
        at = self._pending.find(THOUGHT)
        known = at if at >= 0 else len(self._pending) - (0 if last else longest_beginning(self._pending, THOUGHT))
        sure = self._pending[:known].rstrip()
        part.reasoning += sure.lstrip() if self._blank else sure
        self._blank = self._blank and not sure
        if at >= 0:
            rest, self._pending, self._thinks, self._blank = self._pending[at + len(THOUGHT) :], "", "no", True
            self._after(rest, part)
        else:
            self._pending = self._pending[len(sure) :]

    def _after(self, text: str, part: Part) -> None:
        """Text that is no reasoning."""
        if self._blank and self._thinks == "no":
            text = text.lstrip("\r\n")
            self._blank = not text
        if self._calls is None:
            part.content += text
        else:
            self._calls.push(text, part)
