"""The description of an experiment: model, slice, layout, requests, policy and capacity in one TOML file.

All requests are there from the beginning and no policy that looks at the clock is allowed, so the schedule follows from the file alone:
every process of a run makes the same steps, and a simulation makes them too.
"""

from __future__ import annotations

import random
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any

from partinf.buckets import Capacity
from partinf.engine.policies.registry import POLICIES, TIMELESS
from partinf.foundation import documents
from partinf.foundation.documents import Table
from partinf.foundation.errors import collect, raise_offences
from partinf.foundation.limits import MAX_BATCH, MAX_DEVICES, MAX_LEN, MAX_PAGES, MAX_PROMPT_TOKENS, MAX_REQUESTS, outside
from partinf.foundation.paging import PAGE_SIZE
from partinf.hardware.hardware_file import slice_of
from partinf.hardware.slices import Slice
from partinf.layout import Layout
from partinf.layout.files import load_layout
from partinf.model.config import ModelConfig
from partinf.model.load import load_model_config
from partinf.plans import Plan
from partinf.simulation.arrivals import parse_lengths
from partinf.workload import DType, Workload

# Least and most of the whole numbers of a description. Every step is timed `rounds` times.
RANGES = {
    "processes": (1, MAX_DEVICES),
    "requests": (1, MAX_REQUESTS),
    "seed": (0, (1 << 63) - 1),
    "max_batch": (1, MAX_BATCH),
    "prefill_tokens": (1, MAX_LEN),
    "page_size": (1, MAX_LEN),
    "kv_pages": (0, MAX_PAGES),
    "rounds": (0, 10_000),
}


@dataclass(frozen=True)
class DrawnRequest:
    """One request: its prompt as token ids, and how many tokens it generates."""

    prompt: tuple[int, ...]
    output_len: int


@dataclass(frozen=True)
class Experiment:
    """A description that was read and checked.

    Attributes:
        processes: how many local processes share the devices of the slice.
        requests: how many; lengths: as of `--lengths`. scheduler: one of `TIMELESS`.
        kv_pages: per shard; 0 for as many as memory holds. memory_share: as of `Capacity`.
        rounds: how often every step and every entry of the ledgers is timed; 0 for not at all.
    """

    name: str
    model: str
    slice: str
    mesh: str | None = None
    layout: str = "auto"
    weights: str = "bf16"
    kv: str | None = None
    random_weights: bool = False
    hardware: str | None = None
    processes: int = 1
    requests: int = 16
    lengths: str = "uniform:4-24:4-24"
    seed: int = 0
    scheduler: str = "fcfs"
    max_batch: int = 8
    prefill_tokens: int = 128
    page_size: int = PAGE_SIZE
    kv_pages: int = 0
    memory_share: float = 0.0
    rounds: int = 7

    def target(self) -> Slice:
        """The slice, of a chip as a hardware file says where one is named.

        Raises:
            InvalidInput: no slice, or a file of another chip or number of devices.
        """
        return slice_of(self.slice, self.mesh, self.hardware)

    def config(self) -> ModelConfig:
        return load_model_config(self.model)

    def drawn(self) -> list[DrawnRequest]:
        """The requests, from the seed.

        Raises:
            InvalidInput: more prompt tokens in all than are drawn.
        """
        draw, rng, vocab = parse_lengths(self.lengths), random.Random(self.seed), self.config().vocab_size
        lens = [draw(rng) for _ in range(self.requests)]
        raise_offences(outside("requests and lengths: prompt tokens in all", sum(inputs for inputs, _ in lens), 1, MAX_PROMPT_TOKENS))
        return [DrawnRequest(tuple(rng.choices(range(vocab), k=inputs)), outputs) for inputs, outputs in lens]

    def plan(self) -> Plan:
        """The plan of its layout, or of the planner's choice, with buckets; the same wherever it is made.

        Raises:
            InvalidInput: requests or a layout that do not fit.
        """
        from partinf.api import plan

        requests = self.drawn()
        prompt = max(len(request.prompt) for request in requests)
        longest = max(len(request.prompt) + request.output_len for request in requests)
        kv = self.kv or (self.weights if self.weights != DType.INT8 else DType.BF16)
        workload = Workload(self.max_batch, prompt, longest - prompt, weights=DType(self.weights), kv=DType(kv))
        capacity = Capacity(
            self.max_batch,
            longest,
            self.prefill_tokens,
            self.page_size,
            random=False,
            max_prompt_len=prompt,
            kv_pages=self.kv_pages,
            memory_share=self.memory_share,
        )
        return plan(self.config(), self.target(), workload, layout=self._layout(), capacity=capacity)

    def _layout(self) -> Layout | None:
        return None if self.layout == "auto" else load_layout(self.layout)


def read_experiment(path: Path) -> Experiment:
    """Read and check a description; no device is touched.

    Raises:
        InvalidInput: no such file, or everything that is wrong with it.
    """
    offences: list[str] = []
    table = Table(documents.read_toml(path, f"experiment {path}"), str(path), offences)
    found = {field.name: _value(table, field, path.stem) for field in fields(Experiment)}
    table.refuse_unknown()
    raise_offences(offences)
    experiment = Experiment(**found)
    raise_offences(f"{path}: {offence}" for offence in _offences(experiment))
    return experiment


def _value(table: Table, field: Field[Any], stem: str) -> Any:
    """A field of an experiment from its key; `name` is by default the file's."""
    default = {"default": stem} if field.name == "name" else {} if field.default is MISSING else {"default": field.default}
    if field.type == "int":
        low, high = RANGES[field.name]
        return table.whole(field.name, low=low, high=high, **default)
    if field.type == "float":
        return table.number(field.name, high=1.0, **default)
    return (table.flag if field.type == "bool" else table.text)(field.name, **default)


def _offences(experiment: Experiment) -> list[str]:
    offences: list[str] = []
    if experiment.scheduler not in TIMELESS:
        why = "looks at the clock, which differs from process to process" if experiment.scheduler in POLICIES else "is unknown"
        offences.append(f"scheduler '{experiment.scheduler}' {why}; valid: {', '.join(TIMELESS)}")
    for key in ("weights", "kv"):
        value: Any = getattr(experiment, key)
        if value is not None and value not in list(DType):
            offences.append(f"{key} = {value!r}; valid: {', '.join(DType)}")
    slice_ = collect(offences, experiment.target)
    if slice_ is not None and slice_.num_devices % experiment.processes:
        offences.append(f"processes = {experiment.processes}; the {slice_.num_devices} devices of {slice_.name} cannot be divided evenly")
    collect(offences, experiment.config)
    collect(offences, lambda: parse_lengths(experiment.lengths))
    collect(offences, experiment._layout)
    if not offences:
        collect(offences, experiment.plan)
    return offences
