"""The library's front door: `plan` a layout, `load` a model by it, and generate.

    import partinf

    plan = partinf.plan("demo", "local")
    model = partinf.load("demo", plan)
    print(model.generate(["sort: d b a c ="])[0].text)

jax is imported by what needs devices, when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partinf import planner
from partinf.buckets import PROMPT_TOKENS, Capacity, capacity_for, runner_limits, with_capacity
from partinf.checkpoint.described import read_model as read_model
from partinf.checkpoint.described import weights_directory as weights_directory
from partinf.engine.admission import Prompt, RequestCheck
from partinf.engine.engine import Engine, OnToken
from partinf.engine.request import RequestOutput, SamplingParams
from partinf.engine.streams import RequestStream
from partinf.foundation.errors import InvalidInput, collect, raise_offences
from partinf.foundation.extras import RUN, need
from partinf.hardware.hardware_file import check_devices, read_hardware, slice_of
from partinf.hardware.slices import Slice
from partinf.layout import Layout
from partinf.layout.files import load_layout
from partinf.model.config import ModelConfig
from partinf.plans import Bucket, Plan, layout_for
from partinf.workload import DType, Workload

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from partinf.checkpoint.tokenizer import Tokenizer
    from partinf.execution.score import Scores
    from partinf.hosts import Group

DEFAULT_WORKLOAD = Workload(batch=32, input_len=64, output_len=64)


def find_slice(slice_: str | Slice, mesh: str | None = None, hardware: str | Path | None = None) -> Slice:
    """A slice by name; `local` stands for the devices of this machine.

    Args:
        hardware: a file of `partinf calibrate` that says what the slice's chips are; for `local`, the user's own if not given.

    Raises:
        InvalidInput: as `parse_slice` and `read_hardware`, or a file of other devices.
    """
    if isinstance(slice_, Slice):
        return slice_ if mesh is None else slice_.with_mesh(mesh)
    if slice_ != "local":
        return slice_of(slice_, mesh, hardware)
    need(RUN, "a plan for the devices of this machine (local)")
    from partinf.partition.sharding import local_slice

    found = local_slice(mesh, None if hardware is None else read_hardware(Path(hardware)))
    check_devices(found.chip, found.num_devices)
    return found


def plan(
    model: str | Path | ModelConfig,
    slice_: str | Slice = "local",
    workload: Workload = DEFAULT_WORKLOAD,
    *,
    layout: Layout | str | Path | None = None,
    mesh: str | None = None,
    capacity: Capacity | None = None,
    hardware: str | Path | None = None,
) -> Plan:
    """Choose how `model` is split over a slice for a workload, and fix the shapes of the steps.

    Args:
        model: a shipped name, a directory or .toml file, or a `ModelConfig`.
        slice_: `v4:4x4x4`, `h200:8`, `cpu:2x2x2`, a cloud's name such as `v5litepod-16` or `h100x8`, `local`, …
        layout: bind this layout instead of choosing one: a `Layout`, the name of a shipped one, or a layout file. Where the slice has other
            axes, they take its roles (`partinf.plans.layout_for`).
        mesh: a factorisation of the slice's axes; for a slice that is named, a finer one than its own is chosen where that is faster.
        capacity: what an engine should hold; from the workload if not given.
        hardware: a file of `partinf calibrate`, see `find_slice`.

    The cache has as many pages as fit in memory after weights, programs and the activations of those steps; where that is less than the
    workload's sequences need at full length, some of them wait, or are preempted and swapped by a scheduler that does so.

    Raises:
        InvalidInput: everything that does not fit together, or an installation without jax and a slice that is `local`.
    """
    config = model if isinstance(model, ModelConfig) else read_model(model)
    target = find_slice(slice_, mesh, hardware)

    def sized(bound: Plan) -> Plan:
        return with_capacity(bound, capacity or capacity_for(bound, workload))

    if layout is not None:
        given = layout if isinstance(layout, Layout) else load_layout(str(layout))
        return sized(Plan(config, target, layout_for(target, given), weights=workload.weights, kv=workload.kv))
    named = isinstance(slice_, str) and slice_ != "local"
    chunk = workload.chunk or (capacity.prompt_tokens if capacity is not None else PROMPT_TOKENS)
    return planner.plan(config, target, replace(workload, chunk=chunk), sized=sized, finer=named and mesh is None)


def load(
    model: str | Path,
    plan: Plan | None = None,
    *,
    random_weights: bool = False,
    on_compiled: Callable[[Bucket, int, int], None] | None = None,
    unrolled: bool | None = None,
    compile_steps: bool = True,
    buckets: Collection[Bucket] | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    group: Group | None = None,
    num_host_pages: int = 0,
) -> Model:
    """Read a model's weights onto the devices of its plan and compile its steps.

    Args:
        model: a directory with weights, or the name of a shipped one.
        plan: from `plan`; for the local devices if not given.
        random_weights: run without weights, with random ones.
        on_compiled: called with (bucket, number done, number in all) as steps are compiled.
        unrolled: compile layer by layer instead of as a loop; by default on CPU, where it is faster, unless the plan has
            pipeline stages.
        compile_steps: compile the steps now rather than when they are first needed. buckets: those of the plan that are compiled now, if
            not all (`partinf.buckets.wanted_by`).
        seed: of random weights and of requests that name none.
        cache: directory of compiled steps, which the next start loads; `off` for none. By default that of $PARTINF_CACHE_DIR, or the
            user's own (~/.cache/partinf); where that cannot be used, a warning says so and nothing is stored.
        group: the processes that have the plan's devices together, from `partinf.hosts.join`; each reads only its own devices' part of
            the weights. The first then uses the model as usual, the others `group.follow(model.engine)`.
        num_host_pages: KV pages that may be stored in host memory, for policies that swap.

    Raises:
        InvalidInput: no weights, weights that are not the model's, fewer devices than the plan needs, or an installation without jax.
        JobEnded: a process of the group is gone, or has another plan.
    """
    need(RUN, "running a model")
    from partinf.checkpoint.hf import load_hf
    from partinf.execution.runner import JaxRunner
    from partinf.partition.sharding import device_mesh
    from partinf.transformer.executables import open_cache
    from partinf.transformer.kernels import choices
    from partinf.transformer.params import abstract_params, random_params

    check_loadable(model, random_weights)
    executables = open_cache(cache)
    if plan is None:
        plan = _default_plan(model)
    if group is not None:
        # What the programs follow from: hosts may differ a little in the memory that they find.
        group.agree("the plan", (plan.slice.name, plan.slice.mesh, plan.as_dict("slice", "predicted", "note")))
        if plan.slice.chip.platform.products is not None:
            choices.adopt(choices.from_json(group.share(choices.to_json(choices.of_this_machine()) if group.leads else "")))
    directory = weights_directory(model)
    tokenizer, eos_ids = _texts(model, plan.model)
    mesh = device_mesh(plan)
    if unrolled is None:
        unrolled = plan.unrolled
    runner = JaxRunner(plan, None, mesh, num_host_pages=num_host_pages, executables=executables, unrolled=unrolled)
    if random_weights or directory is None:
        runner.params = random_params(plan, mesh, unrolled, seed)
        if compile_steps:
            runner.warm_up(on_compiled, buckets)
    else:
        with ThreadPoolExecutor(1) as background:  # compilers take cores, and reading the disk and memory
            reading = background.submit(load_hf, directory, plan.model, abstract_params(plan, mesh, unrolled), plan.padded_heads)
            if compile_steps:
                runner.warm_up(on_compiled, buckets)
            runner.params = reading.result()
    replicas = None if group is None else group.replicas
    engine = Engine(runner if group is None else group.runner(runner), tokenizer=tokenizer, eos_ids=eos_ids, seed=seed, replicas=replicas)
    return Model(plan, mesh, runner.params, runner, engine, tokenizer)


def check_loadable(model: str | Path, random_weights: bool = False) -> ModelConfig:
    """The architecture of a model that `load` can run; reads headers only and touches no device.

    Raises:
        InvalidInput: an architecture that cannot be run, no weights, or weights that are not the model's; all at once.
    """
    need(RUN, "running a model")
    from partinf.checkpoint.hf import check_hf

    config, directory = read_model(model), weights_directory(model)
    if directory is None and not random_weights:
        raise InvalidInput(f"model {config.name} comes without weights; give a Hugging Face directory")
    if directory is not None and not random_weights:
        check_hf(directory, config)
    return config


def check_prompts(model: str | Path, plan: Plan, prompts: Sequence[Prompt], params: SamplingParams) -> list[int]:
    """The lengths of prompts in tokens; touches no device.

    Raises:
        InvalidInput: every reason why an engine of this plan would refuse any of them.
    """
    tokenizer, eos_ids = _texts(model, plan.model)
    check = RequestCheck(runner_limits(plan), tokenizer, seed=0, eos_ids=eos_ids)
    offences: list[str] = []
    found = [collect(offences, partial(check, prompt, params, str(number), number, 0.0)) for number, prompt in enumerate(prompts, start=1)]
    raise_offences(offences)
    return [len(request.prompt) for request in found if request is not None]


def _texts(model: str | Path, config: ModelConfig) -> tuple[Tokenizer | None, frozenset[int]]:
    """The tokenizer of a model, and where it has none the token ids that end a text."""
    from partinf.checkpoint.tokenizer import ends_by_id, find_tokenizer

    directory = weights_directory(model)
    tokenizer = None if directory is None else find_tokenizer(directory)
    return tokenizer, frozenset() if directory is None or tokenizer is not None else ends_by_id(directory, config.vocab_size)


def _default_plan(model: str | Path) -> Plan:
    config = read_model(model)
    length = min(config.longest_context or 2048, 2048)
    workload = Workload(batch=16, input_len=length // 2, output_len=length // 2, weights=DType.BF16)
    return plan(config, "local", workload, capacity=Capacity(max_rows=16, max_len=length))


class Model:
    """A model on its devices, ready to answer.

    Attributes:
        plan: how it is split. mesh: its devices. params: its weights, a plain pytree.
        runner: compiled steps and state. engine: the batching engine; use it for requests that come and go.
        tokenizer: None for an architecture without files.
    """

    def __init__(self, plan: Plan, mesh: Mesh, params: Any, runner: Any, engine: Engine, tokenizer: Any) -> None:
        self.plan = plan
        self.mesh = mesh
        self.params = params
        self.runner = runner
        self.engine = engine
        self.tokenizer = tokenizer
        self._scorer: Any = None

    def __repr__(self) -> str:
        return f"<Model by {self.plan!r}, {self.runner.num_compiled} programs compiled, {self.runner.num_loaded} loaded>"

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_token: OnToken | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts, batched iteration by iteration; see `Engine.generate`."""
        return self.engine.generate(prompts, params, on_token=on_token)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestStream:
        """Answer one prompt token by token, with `for` or `async for`; see `Engine.stream`."""
        return self.engine.stream(prompt, params)

    def score(self, texts: Sequence[Prompt]) -> Scores:
        """Log-probabilities of every token of the texts after the first, by prefill alone; the first call compiles.

        Raises:
            InvalidInput: every text that is too short or too long, or holds ids outside the vocabulary.
        """
        from partinf.execution.score import Scorer

        if self._scorer is None:
            self._scorer = Scorer(self.plan, self.params, self.mesh)
        tokens = [list(self.tokenizer.encode(text)) if isinstance(text, str) else list(text) for text in texts]
        return self._scorer.score(tokens)
