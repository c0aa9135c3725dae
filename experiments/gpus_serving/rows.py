"""Measured rows: tensor-parallel serving of dense models on H100, H200 and B200, from AIConfigurator's file or the selection held here.

AIConfigurator (NVIDIA, Apache-2.0; package `aiconfigurator-core` 0.12.0) holds `systems/silicon_sample.csv`: mean time to the first token
and per output token of serving engines at a number of concurrent requests of one length. `measured.csv` is a selection of it, whose `id`
is that of the row there. A row says nothing of how requests arrive or of what a cache of prefixes answers, so two rules decide what is
compared:

* a row whose requests do not fit into memory together is left out: how many ran at once is not reported;
* a campaign (chip, model, engine with version, type) of which any row is faster than the maker's figures allow for the work that it
  states is left out whole: part of its prompts must have been answered without being computed.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from partinf.cost.calibration import ROOFLINE, Calibration
from partinf.cost.pricing import Pricing
from partinf.cost.program import TENSOR_PARALLEL, Program
from partinf.cost.split import Shares, StepShape, StepSplit
from partinf.cost.step import step_ledger
from partinf.hardware.chips import chips
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.config import ModelConfig
from partinf.model.load import load_model_config
from partinf.model.weights import num_params
from partinf.workload import DType

SELECTION = Path(__file__).with_name("measured.csv")
MODELS = {
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3-8b",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "llama-3-8b",
    "meta-llama/Llama-3.1-70B": "llama-3-70b",
    "Qwen/Qwen3-32B": "qwen-3-32b",
}
CHIPS = {"h100_sxm": "h100", "h200_sxm": "h200", "b200_sxm": "b200"}
TYPES = {"": "bf16", "bf16": "bf16", "fp8": "fp8", "fp8_block": "fp8"}
# Requests of 70B that were answered without waiting would fill more than the memory of their GPUs with a cache of two bytes per element.
ONE_BYTE_CACHE = ("llama-3-70b",)
MEMORY_SHARE, BESIDE = 0.9, 3e9  # what the engines use of a GPU's memory by default; buffers and code
COLUMNS = ("id", "backend", "backend_version", "model_path", "system", "isl", "osl", "gemm_quant_mode", "batch_size", "tp_size")
TIMES = ("silicon_ttft_ms", "silicon_tpot_ms")


@dataclass(frozen=True)
class Row:
    """One measured configuration.

    Attributes:
        version: of the engine, as far as it is stated. type: in which products with weights are made, and weights stored.
        ways: GPUs, over which every layer is split. requests: that are there at any time. tpot: seconds per output token of each.
    """

    id: str
    engine: str
    version: str
    model: str
    chip: str
    type: str
    ways: int
    requests: int
    input_len: int
    output_len: int
    ttft: float
    tpot: float

    @property
    def campaign(self) -> tuple[str, str, str, str, str]:
        return self.chip, self.model, self.engine, self.version, self.type

    @property
    def config(self) -> ModelConfig:
        return _config(self.model)

    @property
    def weights(self) -> DType:
        return DType.INT8 if self.type == "fp8" else DType.BF16

    @property
    def kv(self) -> DType:
        return DType.INT8 if self.type == "fp8" and self.model in ONE_BYTE_CACHE else DType.BF16

    @cached_property
    def fits(self) -> bool:
        """Whether all requests lie in memory at their full length."""
        model, memory = self.config, chips()[self.chip].hbm
        free = self.ways * (MEMORY_SHARE * memory - BESIDE) - num_params(model) * self.weights.num_bytes
        per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * self.kv.num_bytes
        return self.requests * (self.input_len + self.output_len) * per_token <= free

    @property
    def prompts_per_token(self) -> float:
        """Prompts of others that pass while one token of a request is made: as many requests as are there begin while one lasts."""
        return (self.requests - 1) / (self.output_len - 1)

    def seconds(self, shape: StepShape, calibration: Calibration, program: Program = TENSOR_PARALLEL) -> float:
        """One step under these constants, without what the engine takes."""
        slice_ = parse_slice(f"{self.chip}:{self.ways}")
        pricing = Pricing(slice_, calibration, program=program)
        layout = make_layout(dict.fromkeys(slice_.axis_sizes, "ffn"), dict.fromkeys(slice_.axis_sizes, "heads"))
        phase = layout.decode if shape.decode_rows else layout.prefill
        return step_ledger(StepSplit(self.config, layout, phase, shape, pricing, self.weights, self.kv, Shares(1.0))).seconds

    def work(self, calibration: Calibration, program: Program = TENSOR_PARALLEL) -> float:
        """Seconds per output token: a step that decodes all requests halfway through their output, and the prompts that pass meanwhile."""
        decode = StepShape(decode_rows=self.requests, decode_context=self.input_len + self.output_len // 2)
        prompt = StepShape(prefill_tokens=self.input_len, prefill_slots=1)
        return self.seconds(decode, calibration, program) + self.prompts_per_token * self.seconds(prompt, calibration, program)

    @cached_property
    def floor(self) -> float:
        """Seconds per output token by the maker's figures alone: products at the peak of their type, nothing else."""
        chip = chips()[self.chip]
        peak = chip.peak_int8 / chip.peak_bf16 if self.type == "fp8" else 1.0
        return self.work(Calibration(ROOFLINE.name, peak, 1.0, 1.0, 0.0, False, 1.0, ROOFLINE.source))


@cache
def _config(model: str) -> ModelConfig:
    return load_model_config(model)


def read(path: Path) -> Iterator[Row]:
    """The rows of a file that are of these chips, models and types, whole on their GPUs."""
    with path.open() as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            names = (
                row["model_path"] in MODELS,
                row["system"] in CHIPS,
                row["gemm_quant_mode"] in TYPES,
                row["batch_size"],
                row["tp_size"],
            )
            if not all(names) or row.get("mode", "agg") != "agg":
                continue
            yield Row(
                row["id"],
                row["backend"],
                row["backend_version"],
                MODELS[row["model_path"]],
                CHIPS[row["system"]],
                TYPES[row["gemm_quant_mode"]],
                *(int(row[name]) for name in ("tp_size", "batch_size", "isl", "osl")),
                *(float(row[name]) / 1e3 for name in TIMES),
            )


def compared(rows: Iterable[Row]) -> tuple[list[Row], dict[tuple[str, ...], str]]:
    """The rows that are compared, and of every campaign or part of one that is not, why."""
    found = list(rows)
    fitting = [row for row in found if row.fits]
    answered = {row.campaign for row in fitting if row.tpot < row.floor}
    why: dict[tuple[str, ...], str] = {}
    for campaign in sorted({row.campaign for row in found}):
        own = [row for row in found if row.campaign == campaign]
        if campaign in answered:
            kept = [row for row in own if row.fits]
            faster = sum(row.tpot < row.floor for row in kept)
            least = min(row.tpot / row.floor for row in kept)
            why[campaign] = (
                f"left out: {faster} of {len(kept)} rows are faster than the work that they state can be done, down to {least:.2f}"
            )
        elif short := sum(not row.fits for row in own):
            why[campaign] = f"{short} of {len(own)} rows left out: their requests do not fit into memory together"
    return [row for row in fitting if row.campaign not in answered], why


def select(path: Path) -> str:
    """The text of the selection: of every campaign, rows over its sizes of batch and GPUs at a few lengths."""
    wanted, _ = compared(read(path))
    ids = {row.id for row in wanted if row.requests in (8, 16, 32, 128, 512) and _kept(row)}
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["id"] in ids]
    lines = [
        "# A selection of systems/silicon_sample.csv of aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0); TTFT and TPOT in ms. See rows.py.",
        ",".join((*COLUMNS, *TIMES)),
    ]
    lines += [",".join([*(row[name] for name in COLUMNS), *(f"{float(row[name]):.5g}" for name in TIMES)]) for row in rows]
    return "\n".join(lines) + "\n"


def _kept(row: Row) -> bool:
    lengths = {(1024, 512), (4096, 512), (1024, 1024), (8192, 1024), (1000, 1000), (1000, 500), (2000, 1000)}
    return (row.input_len, row.output_len) in lengths or (row.ways == 1 and row.output_len in (128, 8192))
