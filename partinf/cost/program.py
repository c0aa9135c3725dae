"""Kinds of programs, as data: what a priced step does beyond the plainest one, and what overlaps what.

The plain program runs every collective by itself, scatters axis by axis, and lets all prompt tokens of a shard attend to each other under a
mask: that is what a traced jaxpr is compared with. The tiled program is what the JAX column runs: the same with attention tile by tile, in
which a prompt sees itself alone. It is priced by default. Two published programs are described as well, to
hold the model of cost to what was timed: the one that the paper measured, as its released code and its appendix describe it
(`Program.looped`), and that of jax-llm-examples for Llama 3, which keeps the residual whole and compiles its layers one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from partinf.hardware.chips import Chip


class Residual(StrEnum):
    """How activations are split between sublayers. SPLIT: E over all axes that split weights, so that a sublayer begins with an all-gather,
    ends with a reduce-scatter, and a norm sums over devices. WHOLE: E over the axes that split it in the stored weights, so that a
    sublayer ends with an all-reduce over F's axes, and nothing else passes between devices."""

    SPLIT = "split"
    WHOLE = "whole"


@dataclass(frozen=True)
class Program:
    """What the priced program does beyond the plainest one.

    Attributes:
        per_prompt_attention: prompt tokens attend within their own prompt only, instead of to all tokens of the shard under a mask.
        blocked_attention: scores are made block by block and never stored whole.
        skips_windows: attention leaves out what lies before the windows that layers have, instead of masking it.
        looped: the paper's program (Pope et al., 2023, section 3.5, and its released code):
            * a collective goes around one ring, so over one axis, at a time;
            * with the product of W_in (fused with W_Q in a parallel block), and with that of W_out (W_O), one of them is unrolled
              into partial products and runs behind them (`partinf.cost.overlap`);
            * queries are reduce-scattered over E's axes in the loop of F, whatever attention does with them next;
            * gathers of weights run behind the compute of the layer before;
            * a norm's sums are taken when all but the looped axis have been gathered;
            * int8 weights have float32 scales, so what was scaled travels as float32: into W_out and W_O, and out of them;
            * the table of logits is split as W_in is, V over F's axes and E over E's.
        norm_sums: norms add squares up over devices, and values where there is a mean, whatever the rows; ours gathers what every device
            has found of few.
        residual: see `Residual`. either_residual: a phase may have it whole instead (`Phase.whole`).
        unrolled: layers are compiled one by one, so that the weights of a product come from HBM while the core does something else that
            leaves HBM alone: a layer takes the longer of the core's time and HBM's. In a loop over layers every product reads its own.
        either_layers: layers are compiled one by one where the platform prefers that for the plan (`Plan.unrolled`), in a loop otherwise.
        gathers_overlap: gathers of a parallel block's weights are overlapped with products where the platform's compiler does that.
        fetched_bytes: of a layer's weights in an unrolled program, those that are read before their product begins, at most: they lie in
            VMEM until then.
        fetched_matrix: the largest matrix that is; a larger one is read by its product.
        decode_kernel: decode's core is a kernel that takes time for every row, whatever it reads; the chip says how much
            (`Calibration.kernel_seconds`).
        tile_writes: in decode a kernel puts every row's keys and values into the cache: it fetches the tiles that they belong to and sends
            them back.
        small_operations: of a layer, as a multiple of those of the program whose trace gave their time (`Calibration.layer_seconds`), which
            has a dozen: ours has some 26 of rotations, norms, residuals, and of what finds pages.
        exchanges_overlap: exchanges of heads that the platform's compiler starts early run behind products that do not wait for them: keys
            and values behind W_Q, what the cache wants behind the core, and all of a parallel block behind its feed-forward.
        head_by_head: W_Q and W_KV make one head after the other, so that a head narrower than the matrix unit leaves the rest of it idle.
        passes_elements: the small operations of many rows take the longer, the more they pass over (`Calibration.element_seconds`).
        tile_loop: a prompt's core goes over tiles of queries and keys in a loop, which skips fully masked tiles
            (`partinf.hardware.platform.Tiles`); the chip says what a tile and its scores take (`Calibration.score_seconds`).
        position_seconds: what else is done for one position of one row in one layer, filled or not.
    """

    name: str
    per_prompt_attention: bool
    blocked_attention: bool
    skips_windows: bool = True
    looped: bool = False
    norm_sums: bool = False
    residual: Residual = Residual.SPLIT
    either_residual: bool = False
    unrolled: bool = False
    either_layers: bool = False
    gathers_overlap: bool = False
    fetched_bytes: float = 0.0
    fetched_matrix: float = math.inf
    decode_kernel: bool = False
    tile_writes: bool = False
    small_operations: float = 1.0
    exchanges_overlap: bool = False
    head_by_head: bool = False
    passes_elements: bool = False
    tile_loop: bool = False
    position_seconds: float = 0.0


PLAIN = Program("plain", per_prompt_attention=False, blocked_attention=False, skips_windows=False)
TILED = Program(
    "tiled",
    per_prompt_attention=True,
    blocked_attention=True,
    either_residual=True,
    either_layers=True,
    gathers_overlap=True,
    exchanges_overlap=True,
    head_by_head=True,
    # Of what nine compiled programs read ahead: the largest matrix has 42 MB (PaLM 540B on 64 v4), the smallest that is left to its product
    # 50 MB (Qwen 3 8B on 4 v6e). With 16 MiB in a layer their decode steps are met within 18 % (experiments/tpu_steps, planner_and_proof).
    fetched_bytes=2.0**24,
    fetched_matrix=45e6,
    decode_kernel=True,
    tile_writes=True,
    small_operations=26 / 12,
    passes_elements=True,
    tile_loop=True,
)
LOOPED = Program("looped", per_prompt_attention=True, blocked_attention=True, looped=True, norm_sums=True)
JAX_LLM_EXAMPLES = Program(
    "jax-llm-examples",
    per_prompt_attention=True,
    blocked_attention=True,
    residual=Residual.WHOLE,
    unrolled=True,
    fetched_bytes=2.0**25,  # a quarter of the VMEM of the chip that it was timed on
    decode_kernel=True,
    # Its profiler trace: 15.2 us per layer to bring the scales of 16 x 8192 positions into the kernel's form.
    position_seconds=15.2e-6 / (16 * 8192),
)
# What serving engines run: the residual whole, layers in a loop or too many small pieces for anything to be fetched ahead.
TENSOR_PARALLEL = Program("tensor-parallel", per_prompt_attention=True, blocked_attention=True, residual=Residual.WHOLE, decode_kernel=True)
PROGRAMS = {program.name: program for program in (PLAIN, TILED, LOOPED, JAX_LLM_EXAMPLES, TENSOR_PARALLEL)}


def program_for(chip: Chip) -> Program:
    """The program that is priced by default, when a layout is chosen and when it is simulated: the one that runs on the
    chip's platform."""
    return PROGRAMS[chip.platform.default_program]
