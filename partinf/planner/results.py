"""What a search finds: role assignments with their figures, as types; `planner.show` turns them into tables and JSON."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from partinf.cost.ledger import Entry, Ledger
from partinf.cost.memory import MemoryBudget
from partinf.cost.overlap import hide_gathers
from partinf.layout import Layout, Phase, attention_name, ffn_name, readable_name


@dataclass(frozen=True)
class PhaseResult:
    """One step of one phase under a candidate.

    Attributes:
        sizes: of the mesh axes. tokens: real tokens of the step. tokens_per_sequence: of one sequence.
        parts: entries from which its ledger is built on first use; a search looks at few of its candidates.
    """

    name: str
    layout: Layout
    sizes: Mapping[str, int]
    parts: tuple[tuple[Entry, ...], ...]
    step_seconds: float
    mfu: float
    tokens: int
    tokens_per_sequence: int

    @property
    def phase(self) -> Phase:
        return self.layout.phase(self.name)

    @cached_property
    def ffn(self) -> str:
        """The paper's name for its FFN roles."""
        return ffn_name(self.layout, self.phase, self.sizes)

    @cached_property
    def attention(self) -> str:
        """What its attention is split over, in one word."""
        return attention_name(self.phase, self.sizes)

    @cached_property
    def ledger(self) -> Ledger:
        """The step entry by entry."""
        return hide_gathers(itertools.chain.from_iterable(self.parts))


@dataclass(frozen=True)
class Candidate:
    """One role assignment with its figures.

    Attributes:
        score: what candidates are ordered by, in seconds: the step of the question's phase, or the whole workload.
        meets_bound: the latency bound holds, or there is none.
        padded_heads: query heads with padding; 0 for none.
        main: the phase by whose figures the candidate is ranked: that of the question, or decode.
    """

    layout: Layout
    phases: tuple[PhaseResult, ...]
    memory: MemoryBudget
    score: float
    main: PhaseResult
    num_chips: int
    padded_heads: int = 0
    meets_bound: bool = True
    tie_with_best: bool = False

    @cached_property
    def name(self) -> str:
        """One line for tables."""
        return readable_name(self.layout, self.main.sizes)

    @property
    def fits(self) -> bool:
        return self.memory.fits

    @property
    def seconds_per_token(self) -> float:
        """Time per token of one sequence."""
        return self.main.step_seconds / self.main.tokens_per_sequence

    @property
    def tokens_per_second(self) -> float:
        return self.main.tokens / self.main.step_seconds

    @property
    def chip_ms_per_token(self) -> float:
        return 1e3 * self.num_chips * self.main.step_seconds / self.main.tokens

    def phase(self, name: str) -> PhaseResult | None:
        """The result of a phase, if the search priced it."""
        return next((result for result in self.phases if result.name == name), None)


@dataclass(frozen=True)
class Refused:
    """Role assignments that cannot hold the model at all, by their reason."""

    reason: str
    count: int
