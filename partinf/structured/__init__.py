"""Structured output: JSON schemas, regular expressions, choices and grammars, compiled by llguidance to what the engine holds answers to.

* `structure` describes what an answer must match: `Structure`.
* `grammars` compiles that for the vocabulary of one model: `Grammars(...)(structure)` is a `SamplingParams.constraint`.
* `isolated` does the same for structures of untrusted clients, in processes (`process`, `messages`) that are held to time and memory.

llguidance is imported when a `Grammars` is made, and nowhere else in the library.
"""

from partinf.structured.grammars import Grammars, missing
from partinf.structured.isolated import Isolated
from partinf.structured.structure import Kind, Structure

__all__ = ["Grammars", "Isolated", "Kind", "Structure", "missing"]
