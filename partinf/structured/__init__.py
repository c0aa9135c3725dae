"""Structured output: JSON schemas, regular expressions, choices and grammars, compiled by llguidance to what the engine holds answers to.

* `asked` says what an answer shall be: `Structure`.
* `grammars` compiles that for the vocabulary of one model: `Grammars(...)(structure)` is a `SamplingParams.constraint`.

llguidance is imported when a `Grammars` is made, and nowhere else in the library.
"""

from partinf.structured.asked import Kind, Structure
from partinf.structured.grammars import Grammars, missing

__all__ = ["Grammars", "Kind", "Structure", "missing"]
