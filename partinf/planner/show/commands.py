"""The commands that come after a plan: what serves it, and what simulates what that would do.

`plan` ends with them, and what launches a plan on machines runs the first of them there.
"""

from __future__ import annotations

from partinf.buckets import held, served_capacity, with_capacity
from partinf.cost.memory import Held
from partinf.foundation import resources
from partinf.foundation.documents import is_directory, is_file
from partinf.foundation.errors import DoesNotFit
from partinf.model.config import ModelConfig
from partinf.planner.report import PlanReport
from partinf.planner.results import Candidate
from partinf.plans import Plan
from partinf.workload import Workload


def unservable(plan: Plan) -> str | None:
    """Why a plan can be simulated but not served; None where it can be."""
    if plan.runnable:
        return plan.runnable
    return None if plan.model.family else f"weights of {plan.model.name} come in no form that is read"


def ships_weights(model: str) -> bool:
    """Whether a model is one that comes with weights wherever partinf is installed."""
    return not is_directory(model) and not is_file(model) and resources.find("models", model).is_dir()


def serve_command(file: str, plan: Plan, workload: Workload, model: str | None = None) -> list[str]:
    """`serve` of a saved plan, with as many sequences and as long a context as it was made for. On a slice of several hosts each runs it.

    Args:
        file: of the plan. model: where the model lies, if not where the plan says.
    """
    where = [] if model is None else ["--model", model]
    several = ["--multi-host"] if num_hosts(plan) > 1 else []
    return ["partinf", "serve", "--plan", file, *where, *_size(plan.model, workload), *several]


def num_hosts(plan: Plan) -> int:
    """Virtual machines of the plan's slice in the cloud."""
    cloud = plan.slice.chip.cloud
    return 1 if cloud is None else cloud.num_hosts(plan.slice.num_chips)


def commands(file: str, plan: Plan, workload: Workload, model: str) -> dict[str, list[str]]:
    """What serves a saved plan, where it can be served, and what simulates that.

    Args:
        model: by which name or path it was planned; where that has no weights, `path/to/…` stands for where they lie.
    """
    here = is_directory(model) or ships_weights(model)
    served = [] if unservable(plan) else serve_command(file, plan, workload, None if here else f"path/to/{plan.model.name}")
    return ({"serve": served} if served else {}) | {"simulate": simulate_command(file, plan, workload)}


def served_plan(plan: Plan, workload: Workload) -> Plan:
    """The plan as `serve_command` has it, with its pages and its steps.

    Raises:
        DoesNotFit: not one sequence fits in memory with the rest.
    """
    return with_capacity(plan, served_capacity(workload.batch, sum(_lengths(plan.model, workload))))


def served_memory(report: PlanReport, candidate: Candidate) -> Held | None:
    """What a device holds of the server of `serve_command`; None where no sequence fits next to the weights."""
    try:
        return held(served_plan(report.plan_of(candidate), report.workload))
    except DoesNotFit:
        return None


def simulate_command(file: str, plan: Plan, workload: Workload) -> list[str]:
    """`simulate` of what `serve_command` does, under requests of the lengths that the plan was made for."""
    prompt, output = _lengths(plan.model, workload)
    load = ["--arrivals", f"poisson:{workload.arrival_rate or 1:g}", "--lengths", f"fixed:{prompt}:{output}"]
    return ["partinf", "simulate", "--as-served", "--plan", file, *_size(plan.model, workload), *load]


def _size(model: ModelConfig, workload: Workload) -> list[str]:
    return ["--max-num-seqs", str(workload.batch), "--max-model-len", str(sum(_lengths(model, workload)))]


def _lengths(model: ModelConfig, workload: Workload) -> tuple[int, int]:
    """Tokens of a prompt and of its answer: those of the workload; where one phase alone was planned, a prompt and one token, or a context
    of which half was generated. No longer than the model's context."""
    prompt, output = workload.input_len or workload.context_len or 1, workload.output_len or 1
    if workload.phase == "decode" and not workload.output_len:
        prompt, output = workload.decode_context - workload.decode_context // 2, max(1, workload.decode_context // 2)
    most = model.longest_context or prompt + output
    output = min(output, max(1, most // 2, most - prompt))
    return max(1, min(prompt, most - output)), output
