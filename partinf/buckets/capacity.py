"""What an engine should hold at once: sequences, tokens of prompts per step, and what requests may ask of sampling."""

from __future__ import annotations

from dataclasses import dataclass

from partinf.foundation.paging import PAGE_SIZE
from partinf.foundation.rounding import ceil_div
from partinf.plans import Plan
from partinf.workload import SERVED_PROMPT_TOKENS, Workload

PROMPT_TOKENS = 512  # prompt tokens per step unless a capacity says otherwise: enough to be limited by compute on every chip


@dataclass(frozen=True)
class Capacity:
    """What an engine should hold at once.

    Attributes:
        max_rows: sequences decoded together, those of all pipeline stages, rounded up to what the plan's axes divide.
        max_len: longest context in tokens, prompt and output together; 0 takes the model's, or what the pages hold of one sequence if that
            is less.
        prefill_tokens: prompt tokens per step, rounded up likewise.
        page_size: tokens per KV page.
        random: whether requests may sample; False compiles greedy selection alone.
        extended: whether requests may use extended sampling: penalties, logit biases, `top_logprobs` and log-probabilities of their
            prompts. The programs are as many and larger; every slot keeps counts and biases of the whole vocabulary on the devices.
        constrained: whether requests may be held to a grammar, by a mask of the tokens that may come next.
        max_prompt_len: longest prompt that will come; one step then holds such a prompt whole on every shard that prefills. 0: any prompt
            may come, and those that are longer than a shard's share of a step are cut over several.
        max_residents: sequences that may hold pages, where some policy gives one's place to another; 0 for those decoded together.
        kv_pages: pages per shard; 0 for as many as memory holds.
        memory_share: share of the memory left by weights, programs and activations that becomes pages; 0 for the platform's.
    """

    max_rows: int = 32
    max_len: int = 0
    prefill_tokens: int = 128
    page_size: int = PAGE_SIZE
    random: bool = True
    extended: bool = False
    constrained: bool = False
    max_prompt_len: int = 0
    max_residents: int = 0
    kv_pages: int = 0
    memory_share: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of one step on one shard that prefills."""
        return max(self.prefill_tokens, self.max_prompt_len)


def capacity_for(plan: Plan, workload: Workload) -> Capacity:
    """What an engine for this workload should hold."""
    needed = max(workload.max_context, 1)
    longest = min(needed, plan.model.longest_context or needed)
    return Capacity(max_rows=workload.batch, max_len=longest, prefill_tokens=prompt_tokens_of(workload, plan.num_stages))


def served_capacity(rows: int, max_len: int, prompt_tokens: int = SERVED_PROMPT_TOKENS) -> Capacity:
    """What a server holds that takes whatever a request may ask for.

    Args:
        max_len: longest context; 0 for the model's. prompt_tokens: per step.
    """
    prompts = min(prompt_tokens, max_len or prompt_tokens)
    return Capacity(max_rows=rows, max_len=max_len, prefill_tokens=prompts, extended=True, constrained=True)


def prompt_tokens_of(workload: Workload, num_stages: int) -> int:
    """Prompt tokens per step. With stages a tick is as long as its longest step, so every step takes what a steady batch sees of them."""
    if num_stages == 1 or not workload.output_len:
        return min(max(workload.input_len, 1), PROMPT_TOKENS)
    share = ceil_div(workload.batch * workload.input_len, workload.output_len * num_stages)
    return min(max(share, 1), PROMPT_TOKENS)
