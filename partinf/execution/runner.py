"""The runner that executes the model: fits each step into a compiled bucket, and keeps parameters and state on the devices.

What steps need is compiled before the first one (`warm_up`). A step is dispatched without waiting; `collect` waits for the oldest.

In a pipeline every call of `submit` is one tick (`partinf.transformer.stages`): the new step enters the first stage and all before it move
on by one, in one bucket that holds them all. `collect` lets the pipeline tick on when the oldest step has not come to its end yet.
"""

from __future__ import annotations

import concurrent.futures
import os
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from partinf.buckets import fit, runner_limits, smallest_first
from partinf.engine.runner import RunnerLimits
from partinf.engine.step import PromptScore, SampledToken, Step, StepOutput
from partinf.execution.place import Placed, place_step
from partinf.foundation.errors import InvalidInput
from partinf.partition.sharding import device_mesh, platform_of, put, whole
from partinf.plans import Bucket, Plan
from partinf.transformer.batch import Blank
from partinf.transformer.executables import ExecutableCache, Obtained, obtain, program_key
from partinf.transformer.masks import abstract_masks, laid_out
from partinf.transformer.page_copies import HostPages, compile_put, compile_take
from partinf.transformer.params import Params
from partinf.transformer.slots import compile_start, pack_start
from partinf.transformer.step import Out, compile_step, empty_state


class _Submitted:
    """A step on its way through the stages.

    Attributes:
        passed: it has come out of the last stage. out: what came out; None for a step that only moves pages.
        placed, padded_tokens: as it was in its last tick.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.passed = False
        self.out: Out | None = None
        self.placed: Placed | None = None
        self.padded_tokens = 0
        self._bucket: Bucket | None = None

    def place(self, bucket: Bucket, blank: Blank, plan: Plan, limits: RunnerLimits) -> Placed:
        """The step in the bucket of a tick, which is mostly that of the tick before."""
        if self.placed is None or bucket != self._bucket:
            self.placed, self._bucket, self.padded_tokens = place_step(self.step, bucket, plan, limits, blank), bucket, bucket.num_tokens
        return self.placed


class JaxRunner:
    """Runs the steps of an engine on the devices of a plan.

    Attributes:
        plan, mesh, params: as given. num_compiled, num_loaded: programs compiled so far, and found in the cache.
        compile_seconds: wall time of `warm_up`.
    """

    def __init__(
        self,
        plan: Plan,
        params: Params | None,
        mesh: Mesh | None = None,
        num_host_pages: int = 0,
        executables: ExecutableCache | None = None,
        unrolled: bool | None = None,
    ) -> None:
        """
        Args:
            plan: with buckets (`partinf.buckets.with_capacity`).
            params: on the devices of `mesh`, as `abstract_params` describes them; a tuple of layers runs unrolled, stacked ones in a scan.
                None where they come later, into the attribute, before the first step.
            num_host_pages: KV pages that may be stored in host memory.
            executables: where compiled steps are stored for the next start; None compiles at every start.
            unrolled: how the layers of parameters that come later lie.
        """
        if not plan.buckets:
            raise InvalidInput(f"the plan for {plan.model.name} has no buckets; give it some with partinf.buckets.with_capacity")
        _check_ticks(plan)
        self.plan = plan
        self.mesh = mesh if mesh is not None else device_mesh(plan)
        self.num_compiled = 0
        self.num_loaded = 0
        self.compile_seconds = 0.0
        self.params: Any = params
        self._executables = executables
        self._unrolled = bool(unrolled) if params is None else isinstance(params["layers"], tuple)
        self._steps: dict[Bucket, Any] = {}
        self._blanks = {bucket: Blank(bucket, plan) for bucket in plan.buckets}
        self._batch_sharding = whole(self.mesh)
        self._in_host_memory = platform_of(self.mesh).virtual
        self._masks: dict[int, bytes] = {}  # that lie on the devices, by slot
        self._mask_sharding = abstract_masks(plan, self.mesh).sharding
        self._in_flight: deque[_Submitted] = deque()  # not collected
        self._pipeline: deque[_Submitted | None] = deque([None] * plan.num_stages, maxlen=plan.num_stages)  # by stage
        self._buckets = smallest_first(plan.buckets)
        self._limits = runner_limits(plan, num_host_pages)
        self._host_pages: tuple[HostPages, ...] = ()  # by group of the cache
        self._start_slot: Any = None
        self._state = empty_state(plan, self.mesh, self._unrolled)

    @property
    def limits(self) -> RunnerLimits:
        return self._limits

    @property
    def _swaps(self) -> bool:
        return all(group.num_host_pages for group in self._limits.groups)

    def warm_up(self, on_compiled: Callable[[Bucket, int, int], None] | None = None, buckets: Collection[Bucket] | None = None) -> Obtained:
        """Load or compile every bucket that is not ready yet, as many at once as there are cores; says what it did.

        Args:
            on_compiled: called with (bucket, number done, number in all) after each. buckets: these alone; the others are made when a
                step first needs them.
        """
        missing = [bucket for bucket in self._buckets if bucket not in self._steps and (buckets is None or bucket in buckets)]
        started, done = time.perf_counter(), Obtained()
        with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            compile_one = lambda bucket: compile_step(self.plan, self.mesh, bucket, self._unrolled)  # noqa: E731
            futures = {pool.submit(self._obtain, partial(compile_one, bucket), bucket, self._unrolled): bucket for bucket in missing}
            for number, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                self._steps[futures[future]], obtained = future.result()
                done += obtained
                if on_compiled is not None:
                    on_compiled(futures[future], number, len(missing))
        if self._swaps and not self._host_pages:
            kept = []
            for group in range(len(self._limits.groups)):
                programs = []
                for name, compile_copy in (("take", compile_take), ("put", compile_put)):
                    compile_one_copy = partial(compile_copy, self.plan, self.mesh, self._unrolled, group)
                    program, obtained = self._obtain(compile_one_copy, name, self._unrolled, group)
                    programs.append(program)
                    done += obtained
                kept.append(HostPages(self.plan, self.mesh, self._unrolled, group, *programs))
            self._host_pages = tuple(kept)
        if self.plan.extended and self._start_slot is None:
            self._start_slot, obtained = self._obtain(partial(compile_start, self.plan, self.mesh), "start")
            done += obtained
        self.num_compiled += done.compiled
        self.num_loaded += done.loaded
        self.compile_seconds += time.perf_counter() - started
        return done

    def _obtain(self, compile_program: Callable[[], Any], *program: Any) -> tuple[Any, Obtained]:
        key = "" if self._executables is None else program_key(self.plan, self.mesh, *program)
        return obtain(self._executables, key, self.mesh, compile_program)

    @property
    def needed_bytes(self) -> int:
        """What the largest of the compiled steps needs on one device, arguments, temporaries and the code of all of them; 0 where the
        compiler does not say."""
        found = [step.memory_analysis() for step in self._steps.values()]
        if not found or any(each is None for each in found):
            return 0
        code = sum(each.generated_code_size_in_bytes for each in found)
        return code + max(
            each.argument_size_in_bytes + each.temp_size_in_bytes + max(0, each.output_size_in_bytes - each.alias_size_in_bytes)
            for each in found
        )

    def submit(self, step: Step) -> None:
        submitted = _Submitted(step)
        self._in_flight.append(submitted)
        self._tick(submitted)

    def _tick(self, entering: _Submitted | None) -> None:
        """Let a step enter, and all others move on by one stage. What a step asks of a stage happens when it is there, in order."""
        self._pipeline.appendleft(entering)
        for stage, submitted in enumerate(self._pipeline):
            if submitted is not None and (submitted.step.swap_out or submitted.step.swap_in):
                self._copy(submitted.step, stage)
        steps = [submitted.step for submitted in self._pipeline if submitted is not None and submitted.step.num_rows]
        leaving = self._pipeline[-1]
        if steps:
            bucket = self.bucket_of(*steps)
            if bucket not in self._steps:
                self.warm_up(buckets=(bucket,))
            for start in leaving.step.starts if leaving is not None else ():
                packed = put(pack_start(*start, self.plan.max_len), self._batch_sharding)
                self._state = replace(self._state, slots=self._start_slot(self._state.slots, packed))
            # Read where tokens are chosen, on the last stage.
            masks = {} if leaving is None else {row.slot: row.mask for row in leaving.step.rows if row.mask is not None}
            if not masks.items() <= self._masks.items():  # mostly they are the same within a text in quotes
                self._masks = masks
                self._state = replace(self._state, masks=self._on_devices(laid_out(masks, self.plan), self._mask_sharding))
            blank = self._blanks[bucket]
            placed = [None if each is None else each.place(bucket, blank, self.plan, self._limits) for each in self._pipeline]
            packed = np.stack([blank.copy()[0] if each is None else each.vector for each in placed])
            self._state, out = self._steps[bucket](self.params, self._state, self._on_devices(packed, self._batch_sharding))
            if leaving is not None and leaving.step.num_rows:
                leaving.out = out
        if leaving is not None:
            leaving.passed = True

    def _on_devices(self, array: np.ndarray, target: NamedSharding) -> Any:
        """What a program takes in the place of this array. It puts one on a single device in a fraction of the time of `put`."""
        return array if self.mesh.size == 1 else put(array, target)

    def collect(self) -> StepOutput:
        submitted = self._in_flight.popleft()
        while not submitted.passed:
            self._tick(None)
        if submitted.out is None or submitted.placed is None:
            return StepOutput()
        out, placed, extended = submitted.out, submitted.placed, submitted.placed.batch.extended
        wanted = None if extended is None or not extended.alternatives.any() else extended.alternatives.tolist()
        scored = extended is not None and (extended.target >= 0).any()
        tokens, logprobs = self._fetch(out.tokens, out.logprobs)
        top_tokens, top_logprobs = self._fetch(out.top_tokens, out.top_logprobs) if wanted else ([], [])
        scores = self._fetch(out.prompt_logprobs, out.prompt_top_tokens, out.prompt_top_logprobs) if scored else []

        def sampled(row: int) -> SampledToken:
            if wanted is None or not wanted[row]:
                return SampledToken(tokens[row], logprobs[row])
            return SampledToken(tokens[row], logprobs[row], tuple(zip(top_tokens[row], top_logprobs[row], strict=True))[: wanted[row]])

        return StepOutput(
            decode=tuple(map(sampled, placed.decode_rows)),
            prefill=tuple(None if row is None else sampled(row) for row in placed.prefill_rows),
            prompt_scores=tuple(tuple(map(PromptScore, *(part[span] for part in scores))) for span in placed.scored) if scored else (),
            padded_tokens=submitted.padded_tokens,
        )

    def _fetch(self, *arrays: jax.Array | None) -> list[Any]:
        """Arrays of a step's output as lists. `jax.device_get` takes several times as long."""
        there = [array for array in arrays if array is not None]
        if not self._in_host_memory:
            for array in there:  # all on their way at once
                array.copy_to_host_async()
        return [np.asarray(array).tolist() for array in there]

    def bucket_of(self, *steps: Step) -> Bucket:
        """The bucket in which a step runs, or a tick in which the stages hold these steps."""
        return fit(self._buckets, self._limits, *steps)

    def reset(self) -> None:
        """Forget what is in flight. The state is made anew: a step that failed may have consumed the donated one."""
        self._in_flight.clear()
        self._pipeline.extend([None] * self.plan.num_stages)
        for kept in self._host_pages:
            kept.clear()
        self._masks = {}
        self._state = empty_state(self.plan, self.mesh, self._unrolled)

    def _copy(self, step: Step, stage: int) -> None:
        """Move a stage's part of pages to host memory and back, in the order of the devices' work; the host does not wait."""
        if not self._host_pages:
            self.warm_up()
        assert self._host_pages, "pages are swapped by a runner without pages of host memory"
        for copy in step.swap_out:
            self._host_pages[copy.group].out(self._state.kv[copy.group], copy.pages, copy.host_pages, stage)
        for copy in step.swap_in:
            held = list(self._state.kv)
            held[copy.group] = self._host_pages[copy.group].back(held[copy.group], copy.pages, copy.host_pages, stage)
            self._state = replace(self._state, kv=tuple(held))


def _check_ticks(plan: Plan) -> None:
    """Raise `InvalidInput` where stages may hold steps of two buckets and no bucket holds both."""
    most = Bucket(**{size.name: max(getattr(bucket, size.name) for bucket in plan.buckets) for size in fields(Bucket)})
    if plan.num_stages > 1 and not any(bucket.holds(most) for bucket in plan.buckets):
        raise InvalidInput(f"no bucket of the plan holds what all others hold, as a tick of {plan.num_stages} stages may need: {most}")
