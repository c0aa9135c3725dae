"""The description of an experiment: model, slice, layout, requests, policy and capacity in one TOML file.

All requests are there from the beginning and no policy that looks at the clock is allowed, so the schedule follows from the file alone:
every process of a run makes the same steps, and a simulation makes them too.
"""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from partinf.buckets import Capacity
from partinf.engine.policies.registry import POLICIES
from partinf.errors import InvalidInput, collect, nearest, raise_offences
from partinf.hardware.hardware_file import check_devices, read_hardware
from partinf.hardware.slices import Slice, parse_slice
from partinf.layout import Layout, layout_from_toml
from partinf.model.config import ModelConfig, load_model_config
from partinf.plans import Plan
from partinf.resources import find
from partinf.simulation.arrivals import parse_lengths
from partinf.workload import DType, Workload

TIMELESS = ("request-level", "fastertransformer", "orca", "fcfs", "fcfs-chunked")


@dataclass(frozen=True)
class Request:
    """One request: its prompt as token ids, and how many tokens it generates."""

    prompt: tuple[int, ...]
    output_len: int


@dataclass(frozen=True)
class Experiment:
    """A description that was read and checked.

    Attributes:
        processes: how many local processes the devices of the slice are dealt to.
        requests: how many; lengths: as of `--lengths`. scheduler: one of `TIMELESS`.
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
    page_size: int = 16
    rounds: int = 7

    def target(self) -> Slice:
        """The slice, of a chip as a hardware file says where one is named.

        Raises:
            InvalidInput: no slice, or a file of another chip or number of devices.
        """
        chip = None if self.hardware is None else read_hardware(Path(self.hardware))
        slice_ = parse_slice(self.slice, self.mesh, chip)
        if chip is not None and slice_.chip is not chip:
            raise InvalidInput(f"hardware = {self.hardware!r} is of {chip.name}, slice of {slice_.chip.name}")
        check_devices(slice_.chip, slice_.num_devices)
        return slice_

    def config(self) -> ModelConfig:
        return load_model_config(self.model)

    def drawn(self) -> list[Request]:
        """The requests, from the seed."""
        draw, rng, vocab = parse_lengths(self.lengths), random.Random(self.seed), self.config().vocab_size
        lens = [draw(rng) for _ in range(self.requests)]
        return [Request(tuple(rng.choices(range(vocab), k=inputs)), outputs) for inputs, outputs in lens]

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
        capacity = Capacity(self.max_batch, longest, self.prefill_tokens, self.page_size, random=False, max_prompt_len=prompt)
        return plan(self.config(), self.target(), workload, layout=self._layout(), capacity=capacity)

    def _layout(self) -> Layout | None:
        if self.layout == "auto":
            return None
        path = Path(self.layout) if Path(self.layout).is_file() else find("layouts", self.layout)
        return layout_from_toml(path.read_text(), str(path))[0]


def read_experiment(path: Path) -> Experiment:
    """Read and check a description; no device is touched.

    Raises:
        InvalidInput: no such file, or everything that is wrong with it.
    """
    if not path.is_file():
        raise InvalidInput(f"experiment {path}: no such file")
    try:
        table = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: no TOML file: {error}") from None
    table.setdefault("name", path.stem)
    kinds = {field.name: str(field.type) for field in fields(Experiment)}
    offences = [f"{path}: unknown key '{key}'{nearest(key, kinds)}" for key in table if key not in kinds]
    offences += [f"{path}: '{key}' is missing" for key in ("model", "slice") if key not in table]
    for key, value in table.items():
        wanted = kinds.get(key, "")
        types: dict[str, type] = {"str": str, "str | None": str, "int": int, "bool": bool}
        if key in kinds and type(value) is not types[wanted]:
            offences.append(f"{path}: {key} = {value!r}; expected {types[wanted].__name__}")
    raise_offences(offences)
    experiment = Experiment(**table)
    found = _offences(experiment)
    raise_offences(f"{path}: {offence}" for offence in found)
    return experiment


def _offences(experiment: Experiment) -> list[str]:
    offences: list[str] = []
    least = {"processes": 1, "requests": 1, "max_batch": 1, "prefill_tokens": 1, "page_size": 1, "rounds": 0, "seed": 0}
    offences += [
        f"{key} = {getattr(experiment, key)}; it must be at least {low}" for key, low in least.items() if getattr(experiment, key) < low
    ]
    if experiment.scheduler not in TIMELESS:
        why = "looks at the clock, which differs from process to process" if experiment.scheduler in POLICIES else "is unknown"
        offences.append(f"scheduler '{experiment.scheduler}' {why}; valid: {', '.join(TIMELESS)}")
    for key in ("weights", "kv"):
        value: Any = getattr(experiment, key)
        if value is not None and value not in list(DType):
            offences.append(f"{key} = {value!r}; valid: {', '.join(DType)}")
    slice_ = collect(offences, experiment.target)
    if slice_ is not None and slice_.num_devices % experiment.processes:
        offences.append(f"processes = {experiment.processes}; the {slice_.num_devices} devices of {slice_.name} are not dealt evenly")
    collect(offences, experiment.config)
    collect(offences, lambda: parse_lengths(experiment.lengths))
    collect(offences, experiment._layout)
    if not offences:
        collect(offences, experiment.plan)
    return offences
