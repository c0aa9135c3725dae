"""Small runners, tokenizers and clocks whose behaviour can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from partinf.engine import Engine, FakeRunner, RequestOutput, RunnerLimits, SamplingParams

VOCAB = 29

ROOMY = RunnerLimits(
    max_decode_rows_per_shard=8,
    max_prefill_tokens=32,
    max_prefill_slots_per_shard=8,
    page_size=4,
    pages_per_shard=64,
    num_shards=1,
    num_slots=8,
    max_len=64,
    vocab_size=VOCAB,
)


def count_up(context: Sequence[int]) -> int:
    """The next token is the last one plus one."""
    return context[-1] + 1


def make_engine(rule: Callable[[Sequence[int]], int] | None = count_up, limits: RunnerLimits = ROOMY, **options: object) -> Engine:
    return Engine(FakeRunner(limits, rule), check_invariants=True, **options)  # type: ignore[arg-type]


def run_all(engine: Engine) -> dict[str, RequestOutput]:
    """Step until nothing is left; every request must be answered once."""
    outputs: dict[str, RequestOutput] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.id not in outputs
            outputs[output.id] = output
    return outputs


def alone(limits: RunnerLimits, prompt: Sequence[int], params: SamplingParams, request_id: str) -> RequestOutput:
    """The answer to a request on an engine of its own, with one page per token and nothing split."""
    return all_alone(limits, prompt, params, request_id)[0]


def all_alone(limits: RunnerLimits, prompt: Sequence[int], params: SamplingParams, request_id: str) -> list[RequestOutput]:
    """The same for all samples of a request; they run one after the other."""
    length = limits.max_context
    single = {"num_shards": 1, "num_sequence_shards": 1, "num_slots": 1, "num_prefill_shards": 1, "prefill_shards": ()}
    roomy = tuple(replace(group, pages_per_shard=3 * length + 8) for group in limits.windows)
    pages = {"page_size": 1, "pages_per_shard": length if limits.pages_per_shard else 0, "windows": roomy}
    engine = Engine(FakeRunner(replace(limits, max_prefill_tokens=length, **pages, **single)))
    engine.add_request(prompt, params, request_id)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return sorted(outputs, key=lambda output: output.sample)


class Pieces:
    """A tokenizer whose token t is the t-th of the given pieces; encoding reads single characters."""

    def __init__(self, pieces: Sequence[str], eos: int | None = None) -> None:
        self.pieces = list(pieces)
        self.eos_ids = frozenset() if eos is None else frozenset({eos})

    def encode(self, text: str, *, limit: int | None = None) -> list[int]:
        return [self.pieces.index(character) for character in text]

    def stream(self, *, continuation: bool) -> PieceStream:
        assert continuation
        return PieceStream(self.pieces)


class PieceStream:
    """A piece "~" is half a character: two of them make "≈"."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self._pieces = pieces
        self._half = False

    def push(self, token: int) -> str:
        piece = self._pieces[token]
        if piece == "~":
            self._half = not self._half
            return "" if self._half else "≈"
        return piece

    def finish(self) -> str:
        return "\N{REPLACEMENT CHARACTER}" if self._half else ""


LETTERS = Pieces("abcdefghijklmnopqrstuvwxyz .!")


class Ticks:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now
