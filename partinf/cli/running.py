"""What commands that run a model of the user's share: their flags, their texts, the plan, and loading it with a progress bar."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from partinf import documents
from partinf.cli.arguments import add_where, named_layout, named_slice
from partinf.errors import InvalidInput, collect, raise_offences

if TYPE_CHECKING:
    from collections.abc import Mapping

    from partinf.api import Model
    from partinf.hardware.slices import Slice
    from partinf.hosts import Group
    from partinf.layout import Layout
    from partinf.model.config import ModelConfig
    from partinf.plans import Plan


def add_arguments(parser: argparse.ArgumentParser, length: str = "--max-len") -> None:
    """The model, where it runs, and how it is stored; `length` is the flag of the longest context."""
    parser.add_argument("--model", required=True, metavar="DIR|NAME", help="a Hugging Face directory, or a shipped model with weights")
    add_where(parser, "devices to run on: local (those that are here), cpu:2x2x2 for virtual ones, h200:8, v5e:2x2, …")
    parser.add_argument("--weights", choices=("f32", "bf16", "int8"), help="storage of the weights (default: f32 on CPU, bf16 elsewhere)")
    parser.add_argument("--kv", choices=("f32", "bf16", "int8"), help="storage of the KV cache (default: as the activations)")
    parser.add_argument(
        length, dest="max_len", type=int, default=0, metavar="N", help="longest context to serve (default: the model's, at most 2048)"
    )
    parser.set_defaults(max_len_flag=length)


def read_lines(given: list[str] | None, file: str | None, flag: str) -> list[str]:
    """The texts that were given, or the lines of a file (`-` is standard input) that are not blank.

    Raises:
        InvalidInput: no such file, no text in UTF-8, or nothing in it.
    """
    if given:
        return list(given)
    where = f"{flag} {file}"
    if file == "-":
        text = documents.read_stream(sys.stdin.buffer, where)
    else:
        text = documents.read_text(Path(str(file)), where)
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise InvalidInput(f"{where}: nothing in it; one text per line is expected")
    return lines


class Running:
    """A model and a place for it, checked before any device is touched.

    Attributes:
        offences: everything that is wrong so far; the command adds its own and calls `plan`.
    """

    def __init__(self, args: argparse.Namespace, num_processes: int = 1) -> None:
        from partinf import api
        from partinf.cli import devices

        self.args = args
        self.offences: list[str] = []
        self._target: Slice | None = collect(self.offences, lambda: named_slice(args.slice, args.mesh, args.hardware))
        devices.prepare(self._target, num_processes=num_processes)
        self._layout: Layout | None = collect(self.offences, lambda: named_layout(args.layout))
        self._config: ModelConfig | None = collect(self.offences, lambda: api.check_loadable(args.model))
        if args.max_len < 0:
            self.offences.append(f"{args.max_len_flag} {args.max_len}; it must not be negative")

    def plan(self, rows: int, random: bool, prefill_tokens: int = 256, rich: bool = False) -> Plan:
        """A plan for so many texts at once, and so many prompt tokens per step.

        Raises:
            InvalidInput: all offences so far, or why there is no plan.
        """
        raise_offences(self.offences)
        from partinf import api
        from partinf.buckets import Capacity
        from partinf.workload import DType, Workload

        args, config = self.args, self._config
        assert config is not None
        where = self._target if self._target is not None else api.find_slice("local", args.mesh, args.hardware)
        dtype = DType(args.weights or where.chip.platform.default_type)
        kv = DType(args.kv) if args.kv else dtype.activations
        max_len = args.max_len or min(config.longest_context or 2048, 2048)
        workload = Workload(batch=rows, input_len=max(1, max_len // 2), output_len=max_len // 2, weights=dtype, kv=kv)
        capacity = Capacity(max_rows=rows, max_len=max_len, prefill_tokens=min(prefill_tokens, max_len), random=random, rich=rich)
        return api.plan(config, where, workload, layout=self._layout, capacity=capacity)

    def load(self, plan: Plan, compile_steps: bool = True, group: Group | None = None) -> Model:
        """The model on its devices, and on those of the other processes of a group."""
        from partinf import api
        from partinf.cli.progress import progress_bar
        from partinf.cost.calibration import calibration_for

        print(f"{plan.model.name} on {plan.slice.name} ({plan.slice.mesh}): {plan.note or 'layout as given'}", file=sys.stderr)
        if plan.slice.chip.rates is not None:
            print(f"rates: {calibration_for(plan.slice.chip).source}", file=sys.stderr)
        with progress_bar("compiling", len(plan.buckets) if compile_steps else 1) as advance:
            model = api.load(self.args.model, plan, on_compiled=lambda *_: advance(1), compile_steps=compile_steps, group=group)
        if model.tokenizer is not None and model.tokenizer.eos_note:
            print(model.tokenizer.eos_note, file=sys.stderr)
        return model


def tell_failures(what: str, errors: Mapping[int, BaseException]) -> int:
    """Say on standard error which prompts or texts failed and why, by their index; returns the exit code."""
    for index, error in errors.items():
        print(f"partinf: error: {what} {index + 1}: {error}", file=sys.stderr)
    return 1 if errors else 0
