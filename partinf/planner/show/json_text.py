"""The text of a report as JSON, equal to that of `report_json`. The candidates of a search have tens of thousands of entries and few
different ones: each is encoded once, and the text is put together from them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from partinf.cost.ledger import Collective, Entry, Ledger
from partinf.planner.report import PlanReport
from partinf.planner.show.as_json import collective_json, entry_json, report_json

_COMPACT = (",", ":")


def report_text(report: PlanReport, proofs: Mapping[int, dict[str, Any]], more: dict[str, Any]) -> str:
    """The report in one line.

    Args:
        proofs: as for `report_json`. more: fields that follow those of the report.
    """
    texts = _Texts()
    return texts.into(json.dumps(report_json(report, proofs, texts) | more, separators=_COMPACT))


class _Texts:
    """Parts of ledgers as text; in data a mark stands for each, a word that nothing else contains."""

    def __init__(self) -> None:
        self._mark = f"{secrets.token_hex(16)} "
        self._entries: dict[Entry, str] = {}
        self._collectives: dict[Collective, str] = {}
        self._texts: list[str] = []

    def entries(self, ledger: Ledger) -> str:
        return self._later([self._entries.get(entry) or self._entry(entry) for entry in ledger.entries])

    def collectives(self, ledger: Ledger) -> str:
        return self._later([self._collectives.get(one) or self._collective(one) for one in ledger.collectives])

    def _entry(self, entry: Entry) -> str:
        text = self._entries[entry] = json.dumps(entry_json(entry), separators=_COMPACT)
        return text

    def _collective(self, one: Collective) -> str:
        text = self._collectives[one] = json.dumps(collective_json(one), separators=_COMPACT)
        return text

    def _later(self, texts: list[str]) -> str:
        self._texts.append(f"[{','.join(texts)}]")
        return f"{self._mark}{len(self._texts) - 1}"

    def into(self, text: str) -> str:
        """The text with what its marks stand for."""
        first, *rest = text.split(f'"{self._mark}')
        found = [first]
        for piece in rest:
            number, _, after = piece.partition('"')
            found += (self._texts[int(number)], after)
        return "".join(found)
