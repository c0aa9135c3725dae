"""A model of the user's and the place where it is to run: the flags of commands that run one, their texts, the plan, and loading it."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from partinf.cli.arguments import add_pool, add_saved_plan, add_where, named_layout, named_slice, read_pool, read_saved_plan
from partinf.cli.flags import Flags
from partinf.foundation import documents
from partinf.foundation.errors import DoesNotFit, InvalidInput, raise_offences
from partinf.foundation.limits import MAX_LEN
from partinf.workload import SERVED_PROMPT_TOKENS, DType, Workload

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from partinf.api import Model
    from partinf.buckets import Capacity
    from partinf.engine.admission import Prompt
    from partinf.hardware.slices import Slice
    from partinf.hosts import Group
    from partinf.layout import Layout
    from partinf.model.config import ModelConfig
    from partinf.plans import Bucket, Plan


_TYPICAL_LEN = 2048  # of the requests for which a layout is chosen, unless a longest context is given


def add_arguments(parser: argparse.ArgumentParser, length: str = "--max-len") -> None:
    """The model, where it runs, and how it is stored; `length` is the flag of the longest context."""
    parser.add_argument("--model", metavar="DIR|NAME", help="a Hugging Face directory, or a shipped model with weights")
    add_saved_plan(parser)
    add_where(parser, "devices to run on: local (the devices of this machine), cpu:2x2x2 for virtual ones, h200:8, v5e:2x2, …")
    types = "f32, bf16 or int8"
    parser.add_argument("--weights", metavar="TYPE", help=f"storage of the weights: {types} (default: f32 on CPU, bf16 elsewhere)")
    parser.add_argument("--kv", metavar="TYPE", help=f"storage of the KV cache: {types} (default: as the activations)")
    text = "longest context to serve (default: the model's, or as much of one sequence as the KV pages hold)"
    parser.add_argument(length, dest="max_len", default="0", metavar="N", help=text)
    add_pool(parser)


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


def as_prompts(model: str | None, lines: list[str]) -> list[Prompt]:
    """Texts as they are; where the model has no tokenizer, the token ids that each of them lists.

    Raises:
        InvalidInput: every line that is none, of a model without a tokenizer.
    """
    from partinf.checkpoint.described import weights_directory
    from partinf.checkpoint.tokenizer import has_tokenizer

    directory = None if model is None else weights_directory(model)
    if directory is None or has_tokenizer(directory):
        return list(lines)
    found, offences = [], []
    needed = "so token ids are needed, such as 1, 17, 5"
    for number, line in enumerate(lines, start=1):
        words = line.replace(",", " ").split()
        if words and all(word.isascii() and word.isdecimal() and len(word) < 10 for word in words):
            found.append([int(word) for word in words])
        else:
            offences.append(f"text {number} is {documents.shown(line)}; no tokenizer is in its directory, {needed}")
    raise_offences(offences)
    return [*found]


def as_text(prompt: Prompt, more: Sequence[int] = ()) -> str:
    """A text, or token ids with more behind them."""
    return prompt if isinstance(prompt, str) else ", ".join(map(str, (*prompt, *more)))


class ModelPlace:
    """A model and a place for it, checked before any device is touched.

    Attributes:
        flags: with everything that is wrong so far; the command adds its own and calls `plan`.
        notes: after `plan`, what its devices hold, in lines for the user; `load` prints them.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, flags: Flags, num_processes: int = 1, runs: bool = True) -> None:
        """
        Args:
            num_processes: how many have the devices together.
            runs: whether the model is to run; otherwise it is only planned for, and needs neither weights nor devices of a named slice.
        """
        from partinf import api
        from partinf.checkpoint.described import read_model
        from partinf.cli import devices

        self.flags, self.args, self._runs = flags, flags.args, runs
        args = flags.args
        self._saved: Plan | None = read_saved_plan(flags)
        self._target: Slice | None = None
        self._layout: Layout | None = None
        self._config: ModelConfig | None = None
        self._weights, self._kv = (flags.optional_member(name, DType) for name in ("weights", "kv"))
        if args.plan is None:
            self._target = flags.collect(lambda: named_slice(args.slice, args.mesh, args.hardware))
            self._layout = flags.collect(lambda: named_layout(args.layout))
        elif self._saved is not None:
            self._target, self._weights, self._kv = self._saved.slice, self._saved.weights, self._saved.kv
        if runs or self._target is None:
            flags.collect(lambda: devices.prepare(self._target, num_processes=num_processes))
        if args.model is not None and (args.plan is None or self._saved is not None):
            self._config = flags.collect(lambda: (api.check_loadable if runs else read_model)(args.model))
        self._max_len = flags.whole("max_len", high=MAX_LEN)
        self._kv_pages, self._memory_share = read_pool(flags)

    def plan(
        self,
        rows: int,
        random: bool,
        prefill_tokens: int = SERVED_PROMPT_TOKENS,
        extended: bool = False,
        constrained: bool = False,
        part_of_memory: float = 1.0,
        prefill_batch: int | None = None,
    ) -> Plan:
        """A plan for so many texts at once, and so many prompt tokens per step.

        Args:
            prefill_batch: prompts that come together, by which a layout is chosen; None for those of all texts.
            part_of_memory: that the pages take of the share that they would have.

        Raises:
            InvalidInput: all offences so far, or why there is no plan.
        """
        self.flags.check()
        from partinf import api
        from partinf.buckets import Capacity, held, with_capacity
        from partinf.hardware.slices import on_this_machine

        args, config = self.args, self._config
        assert config is not None
        where = self._target if self._target is not None else api.find_slice("local", args.mesh, args.hardware)
        where = on_this_machine(where) if self._runs else where
        share = self._memory_share or where.chip.platform.memory_share
        dtype = self._weights or DType(where.chip.platform.default_type)
        length = self._max_len or min(config.longest_context or _TYPICAL_LEN, _TYPICAL_LEN)
        kv = self._kv or dtype.activations
        workload = Workload(rows, max(1, length // 2), length // 2, weights=dtype, kv=kv, prefill_batch=prefill_batch)
        capacity = Capacity(
            max_rows=rows,
            max_len=self._max_len,
            prefill_tokens=min(prefill_tokens, self._max_len or config.longest_context or prefill_tokens),
            random=random,
            extended=extended,
            constrained=constrained,
            kv_pages=self._kv_pages,
            memory_share=self._memory_share if part_of_memory == 1.0 else part_of_memory * share,
        )
        if self._saved is not None:
            plan = with_capacity(replace(self._saved, model=config, slice=where), capacity)
        else:
            plan = api.plan(config, where, workload, layout=self._layout, capacity=capacity)
        self.notes = (f"{pool_text(plan, capacity)}: {held(plan)}",)
        longest = config.longest_context or plan.max_len
        if plan.max_len < longest and not self._max_len:
            most = f"longest context: {plan.max_len:,} tokens, all that the KV cache holds"
            self.notes += (f"{most}; {config.name} supports {longest:,}",)
        return plan

    def load(self, plan: Plan, compile_steps: bool = True, group: Group | None = None, buckets: Collection[Bucket] | None = None) -> Model:
        """The model on its devices, and on those of the other processes of a group; arguments as of `partinf.load`."""
        from partinf import api
        from partinf.cli.progress import progress_bar
        from partinf.cost.calibration import calibration_for

        print(f"{plan.model.name} on {plan.slice.name} ({plan.slice.mesh}): {plan.note or 'layout as given'}", file=sys.stderr)
        for line in (*self.notes, *_read_as(plan)):
            print(line, file=sys.stderr)
        if plan.slice.chip.rates is not None:
            print(f"rates: {calibration_for(plan.slice.chip).source}", file=sys.stderr)
        number = len(plan.buckets if buckets is None else buckets) if compile_steps else 1
        with progress_bar("compiling", number) as advance:
            model = api.load(
                self.args.model, plan, on_compiled=lambda *_: advance(1), compile_steps=compile_steps, buckets=buckets, group=group
            )
        check_programs(model)
        if model.tokenizer is None and api.weights_directory(self.args.model) is not None:
            ends = ", ".join(map(str, sorted(model.engine.eos_ids))) or "a stop token"
            print(f"no tokenizer: prompts are token ids, and a text ends at {ends} or at its maximum length", file=sys.stderr)
        elif model.tokenizer is not None and model.tokenizer.eos_note:
            print(model.tokenizer.eos_note, file=sys.stderr)
        return model


def pool_text(plan: Plan, capacity: Capacity) -> str:
    """What decides how many pages there are, in words."""
    if capacity.kv_pages:
        return f"KV cache ({capacity.kv_pages} pages per shard, as given)"
    platform = plan.slice.chip.platform
    where = "the machine's free memory" if platform.virtual else "the free memory"
    return f"KV cache (up to {capacity.memory_share or platform.memory_share:.0%} of {where})"


def check_programs(model: Model) -> None:
    """Print on standard error the memory that the compiled programs need and what a device has.

    Raises:
        DoesNotFit: they need more.
    """
    from partinf.buckets import held
    from partinf.foundation.units import readable_bytes

    needed = model.runner.needed_bytes
    if not needed:
        return
    found = held(model.plan)
    usable = found.room.usable
    text = f"compiled programs need {readable_bytes(needed)} of {readable_bytes(usable)} per device"
    if needed > usable:
        raise DoesNotFit(f"{text}; a smaller --memory-share, or fewer --kv-pages, leaves room for them")
    print(f"{text}: {readable_bytes(usable - needed)} free, {readable_bytes(found.slack)} planned", file=sys.stderr)


def tell_failures(what: str, errors: Mapping[int, BaseException]) -> int:
    """Say on standard error which prompts or texts failed and why, by their index; returns the exit code."""
    for index, error in errors.items():
        print(f"partinf: error: {what} {index + 1}: {error}", file=sys.stderr)
    return 1 if errors else 0


def _read_as(plan: Plan) -> tuple[str, ...]:
    """What a user may not expect of how the model was read: what of the file decided or is not read, and rotations that the longest
    context decides."""
    model = plan.model
    rotations = [kind.attention.rotation for kind in model.layer_kinds]
    chosen = [rotation.chosen_by(plan.max_len) for rotation in rotations if rotation is not None]
    source = [f"{model.name}: {model.source}"] if model.source.startswith("config.json; ") else []
    return (*source, *(f"{model.name}: {line}" for line in dict.fromkeys(chosen) if line))
