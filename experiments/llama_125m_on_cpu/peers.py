"""The sides of the comparison: each makes calls of one type, every one a decode step of some rows after a context, or one prompt.

This file runs under the interpreter of each side and imports nothing of the library but on this library's own. A call of a side is its
fastest plain way: the compiled paged step here; `transformers` with its dynamic cache; vLLM's engine step, with its scheduler, in one
process; and `llama_decode`. All have random weights of one architecture and use all cores.

    PYTHON peers.py SIDE TYPE SHAPE        # answers `decode ROWS CONTEXT` or `prefill 1 TOKENS` with the median seconds of a few calls,
                                           # `load ROWS REQUESTS` with the seconds of one: the engine's own, where a side has an engine;
                                           # after the seconds, what it knows besides as JSON

A load is that of Orca's lengths: prompts of 32 to 512 tokens and answers of 1 to 128, all there from the beginning, ROWS of them at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

CALLS, PAGE = 3, 64
FACTS: dict[str, float] = {}  # what a side knows of its last call besides its time
Call = Callable[[], None]
Make = Callable[[str, int, int], Call]
SIDES = {"float32": ("partinf", "transformers", "vllm", "llama.cpp"), "bfloat16": ("partinf", "transformers", "vllm", "llama.cpp")}
ENGINES = ("partinf", "vllm")  # that serve a load
PROMPTS, ANSWERS = (32, 512), (1, 128)
SIDES["int8"] = ("partinf", "llama.cpp")  # q8_0 there; the others have no weights of int8 with plain activations


def lengths(requests: int) -> list[tuple[int, int]]:
    """Tokens of the prompts and answers of a load, the same for all sides."""
    draw = random.Random(0)
    return [(draw.randint(*PROMPTS), draw.randint(*ANSWERS)) for _ in range(requests)]


def partinf(dtype: str, shape: dict[str, Any]) -> Make:
    """The compiled steps of one type, each called with its own state."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from dataclasses import replace

    import jax
    import numpy as np

    from partinf import api
    from partinf.engine.engine import Engine
    from partinf.engine.request import SamplingParams
    from partinf.partition.sharding import device_mesh
    from partinf.plans import Bucket, CacheConfig
    from partinf.transformer.batch import empty_batch, pack
    from partinf.transformer.params import random_params
    from partinf.transformer.step import compile_step, empty_state
    from partinf.workload import DType, Workload

    kind = {"float32": DType.F32, "bfloat16": DType.BF16, "int8": DType.INT8}[dtype]
    plan = api.plan(shape["name"], "local", Workload(8, 255, 1, weights=kind, kv=kind.activations))
    mesh = device_mesh(plan)
    params = random_params(plan, mesh, unrolled=True)

    def load(rows: int, requests: int) -> Call:
        workload = Workload(rows, PROMPTS[1], ANSWERS[1], weights=kind, kv=kind.activations)
        runner = api.load(shape["name"], api.plan(shape["name"], "local", workload), random_weights=True).runner
        draw, vocab = random.Random(1), runner.limits.vocab_size
        prompts = [[draw.randrange(vocab) for _ in range(prompt)] for prompt, _ in lengths(requests)]
        wanted = [SamplingParams(max_tokens=answer, ignore_eos=True) for _, answer in lengths(requests)]

        def serve() -> None:
            engine = Engine(runner)
            engine.generate(prompts, wanted)
            done = engine.metrics.summary()
            tokens = done.prefill_tokens + done.decode_tokens
            FACTS.update(steps=done.iterations, rows_per_token=(tokens + done.padding_tokens) / tokens)

        return serve

    def make(phase: str, rows: int, tokens: int) -> Call:
        if phase == "load":
            return load(rows, tokens)
        pages = tokens // PAGE
        sized = replace(plan, cache=CacheConfig(PAGE, rows * pages, rows), max_len=tokens)
        bucket = Bucket(rows, pages) if phase == "decode" else Bucket(prefill_tokens=tokens, prefill_slots=1)
        step, batch = compile_step(sized, mesh, bucket, unrolled=True), empty_batch(bucket, sized)
        if phase == "decode":
            batch.decode.token[:], batch.decode.slot[:], batch.decode.position[:] = 5, np.arange(rows), tokens - 1
            batch.decode.tables[0].pages[:] = np.arange(rows * pages).reshape(rows, pages)
        else:
            batch.prefill.token[:], batch.prefill.owner[:], batch.prefill.position[:] = 3, 0, np.arange(tokens)
            batch.prefill.page[0][:] = np.arange(tokens) // PAGE
            batch.prefill.last[0], batch.prefill.slot[0] = tokens - 1, 0
        held, packed = [empty_state(sized, mesh, unrolled=True)], jax.device_put(pack([batch]))

        def call() -> None:
            held[0], out = step(params, held[0], packed)
            out.tokens.block_until_ready()

        return call

    return make


def transformers(dtype: str, shape: dict[str, Any]) -> Make:
    """transformers with its dynamic cache, cut back to the context after every call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    model = LlamaForCausalLM(LlamaConfig(**_config(shape))).to(getattr(torch, dtype)).eval()
    vocab = shape["vocab_size"]

    @torch.inference_mode()
    def make(phase: str, rows: int, tokens: int) -> Call:
        if phase == "prefill":
            prompt = torch.randint(0, vocab, (1, tokens))
            return torch.inference_mode()(lambda: model(prompt, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1))
        past = model(torch.randint(0, vocab, (1, tokens - 1)), use_cache=True, logits_to_keep=1).past_key_values
        past.batch_repeat_interleave(rows)
        token = torch.randint(0, vocab, (rows, 1))

        @torch.inference_mode()
        def call() -> None:
            model(token, past_key_values=past, use_cache=True).logits[:, -1].argmax(-1)
            past.crop(tokens - 1 - past.get_seq_length())  # a negative number of tokens to take off

        return call

    return make


def vllm(dtype: str, shape: dict[str, Any]) -> Make:
    """Steps of vLLM's engine in this process; sequences grow by a token with every call."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "3",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams

    folder = Path(tempfile.mkdtemp())
    config = _config(shape) | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config))
    limits = {"max_model_len": 4096, "max_num_batched_tokens": 4096, "max_num_seqs": 64}
    llm = LLM(str(folder), dtype=dtype, load_format="dummy", skip_tokenizer_init=True, seed=0, **limits)
    engine, running, number = llm.llm_engine, [], iter(range(1 << 30))

    def ask(tokens: int, new: int) -> None:
        running.append(str(next(number)))
        prompt = {"prompt_token_ids": [random.randrange(10, shape["vocab_size"]) for _ in range(tokens)]}
        params = SamplingParams(temperature=0.0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
        engine.add_request(running[-1], prompt, params)

    def begin(rows: int, tokens: int, new: int) -> None:
        engine.abort_request(list(running))
        running.clear()
        while engine.has_unfinished_requests():
            engine.step()
        for _ in range(rows):
            ask(tokens, new)

    def serve(rows: int, requests: int) -> None:
        """As many at once as rows: the next one is requested when one has ended."""
        waiting, open_ = lengths(requests), 0
        while waiting or open_:
            for _ in range(min(rows - open_, len(waiting))):
                ask(*waiting.pop(0))
                open_ += 1
            open_ -= sum(output.finished for output in engine.step())
        running.clear()

    case: list[tuple[int, int]] = []

    def make(phase: str, rows: int, tokens: int) -> Call:
        def decode() -> None:
            if case != [(rows, tokens)]:
                case[:] = [(rows, tokens)]
                begin(rows, tokens - 1, 1024)
                started: set[str] = set()
                while len(started) < rows:
                    started |= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
                raise _Again
            engine.step()

        def prefill() -> None:
            case.clear()
            begin(1, tokens, 1)
            raise _Timed(engine.step)

        def load() -> None:
            case.clear()
            begin(0, 0, 0)
            raise _Timed(lambda: serve(rows, tokens))

        return {"decode": decode, "prefill": prefill, "load": load}[phase]

    return make


def llama_cpp(dtype: str, shape: dict[str, Any]) -> Make:
    """`llama_decode` with all logits that are needed, and the least token found; each case has a context of its own."""
    import llama_cpp as llama
    import numpy as np

    path = _gguf(dtype, shape)
    llama.llama_backend_init()
    options = llama.llama_model_default_params()
    options.use_extra_bufts = dtype != "int8"  # its AMX form of q8_0 ends with an illegal instruction on an Emerald Rapids
    model = llama.llama_model_load_from_file(str(path).encode(), options)
    threads, vocab = os.cpu_count() or 1, shape["vocab_size"]

    def fill(batch: Any, rows: list[tuple[int, int, bool]]) -> None:
        batch.n_tokens = len(rows)
        for i, (sequence, position, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = 5, position, 1, wanted
            batch.seq_id[i][0] = sequence

    def make(phase: str, rows: int, tokens: int) -> Call:
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = rows * (tokens + PAGE), rows, tokens, 512
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        params.type_k = params.type_v = llama.GGML_TYPE_F32 if dtype == "float32" else llama.GGML_TYPE_F16  # what it is fastest with
        context = llama.llama_init_from_model(model, params)
        memory, batch = llama.llama_get_memory(context), llama.llama_batch_init(max(tokens, rows), 0, 1)
        if phase == "decode":
            for sequence in range(rows):
                fill(batch, [(sequence, position, False) for position in range(tokens - 1)])
                assert llama.llama_decode(context, batch) == 0
            fill(batch, [(sequence, tokens - 1, True) for sequence in range(rows)])
        else:
            fill(batch, [(0, position, position == tokens - 1) for position in range(tokens)])

        def call() -> None:
            assert llama.llama_decode(context, batch) == 0
            found = llama.llama_get_logits(context)
            np.ctypeslib.as_array(found, (rows if phase == "decode" else 1, vocab)).argmax(-1)
            for sequence in range(rows):
                llama.llama_memory_seq_rm(memory, sequence, tokens - 1 if phase == "decode" else 0, -1)

        return call

    return make


class _Again(Exception):
    """The call only prepared: it is to be called again."""


class _Timed(Exception):
    """What was called prepared what is to be timed."""


def _config(shape: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["embed_dim"],
        "intermediate_size": shape["ffn_dim"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["num_heads"],
        "num_key_value_heads": shape["num_kv_heads"],
        "head_dim": shape["head_dim"],
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


def _gguf(dtype: str, shape: dict[str, Any]) -> Path:
    """A file of random weights as llama.cpp reads them; made by its own `gguf` package."""
    import gguf
    import numpy as np

    kind = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}[dtype]
    path = Path(tempfile.mkdtemp()) / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    embed, hidden, size = shape["embed_dim"], shape["ffn_dim"], shape["head_dim"]
    writer.add_context_length(4096)
    writer.add_embedding_length(embed)
    writer.add_block_count(shape["num_layers"])
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(shape["num_heads"])
    writer.add_head_count_kv(shape["num_kv_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    rng, quantized = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns), np.float32) * columns**-0.5
        writer.add_tensor(name, gguf.quants.quantize(values, quantized), raw_dtype=quantized)

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(embed, np.float32))

    matrix("token_embd.weight", shape["vocab_size"], embed)
    matrix("output.weight", shape["vocab_size"], embed)
    ones("output_norm.weight")
    for layer in range(shape["num_layers"]):
        heads, kv = shape["num_heads"] * size, shape["num_kv_heads"] * size
        for name, rows, columns in (
            ("attn_q", heads, embed),
            ("attn_k", kv, embed),
            ("attn_v", kv, embed),
            ("attn_output", embed, heads),
            ("ffn_gate", hidden, embed),
            ("ffn_up", hidden, embed),
            ("ffn_down", embed, hidden),
        ):
            matrix(f"blk.{layer}.{name}.weight", rows, columns)
        ones(f"blk.{layer}.attn_norm.weight")
        ones(f"blk.{layer}.ffn_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def seconds_of(call: Call) -> float:
    """One call; what it has to prepare is not counted."""
    while True:
        started = time.perf_counter()
        try:
            call()
        except _Again:
            continue
        except _Timed as prepared:
            (timed,) = prepared.args
            started = time.perf_counter()
            timed()
        return time.perf_counter() - started


def main() -> None:
    side, dtype, shape = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like
    with contextlib.redirect_stdout(sys.stderr):
        make = cache(
            {"partinf": partinf, "transformers": transformers, "vllm": vllm, "llama.cpp": llama_cpp}[side](dtype, json.loads(shape))
        )
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            phase, rows, tokens = line.split()
            call = make(phase, int(rows), int(tokens))
            if phase != "load":
                seconds_of(call)
            found = [seconds_of(call) for _ in range(1 if phase == "load" else CALLS)]
            print(statistics.median(found), json.dumps(FACTS), file=answers, flush=True)
            FACTS.clear()


if __name__ == "__main__":
    main()
