"""Numbers at and beyond the ends of their ranges: answered or refused by name, never a failure, and no other request is harmed."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serve.support import Serving, events

GUARD = {"model": "demo", "prompt": "sort: d b a c =", "temperature": 0, "max_tokens": 6, "logprobs": 1}
WHOLE = [str(sign * (2**bits + more)) for bits in (31, 32, 63, 64) for more in (-1, 0, 1) for sign in (1, -1)]
WHOLE += [*map(str, (0, 1, -1, 2, 95, 96, 97, 127, 128, 129)), "1" + "0" * 400, "1" + "0" * 5000]
REAL = [*map(str, (0.0, -0.0, 1e-46, 1e-45, 1e-38, 1.2e-38, 1e-7, 0.5, 0.9999999999, 1.0000000001, 1.9999, 2.0000001))]
REAL += [*map(str, (-2, 2, 100, -100, 3.4e38, 3.5e38, 1e300, 5e-324))]
REAL += ["1e400", "-1e400", "1e-400", "NaN", "Infinity", "-Infinity", "true", "null", '"1"', "[]"]
FIELDS = ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "top_k", "n", "seed", "priority"]
FIELDS += ["max_tokens", "logprobs", "stop_token_ids", "logit_bias"]


def raw_body(rng: random.Random) -> tuple[bytes, set[str]]:
    """A body, and the fields in it whose values are unusual."""
    chosen = rng.sample(FIELDS, rng.choice((1, 1, 2, 3)))
    values = {"temperature": "1", "max_tokens": "2"}
    for name in chosen:
        value = rng.choice(WHOLE + REAL)
        values[name] = {"stop_token_ids": f"[{value}]", "logit_bias": f'{{"5":{value}}}'}.get(name, value)
        if name == "logit_bias" and rng.random() < 0.3:
            values[name] = f'{{"{rng.choice(WHOLE)}":1}}'
    fields = {"model": '"demo"', "prompt": '"sort: b a ="', "stream": rng.choice(("true", "false"))} | values
    return ("{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}").encode(), set(chosen)


def check_bodies(serving: Serving, count: int, seed: int) -> dict[int, int]:
    """Post them, every fourth time alongside a guard, from eight clients at once; returns how often each status came."""
    rng, statuses = random.Random(seed), dict[int, int]()
    status, content, _ = serving.post("/v1/completions", GUARD)
    assert status == 200
    want = content["choices"]
    bodies = [raw_body(rng) for _ in range(count)]

    def one(number: int) -> int:
        if number % 4 == 0:
            status, content, _ = serving.post("/v1/completions", GUARD)
            assert (status, content["choices"]) == (200, want)
        body, names = bodies[number]
        status, content, _ = serving.post("/v1/completions", body)
        assert status in (200, 400), (body, content)
        if status == 400:
            named = {str(each["param"]).split("[")[0].split(".")[0] for each in content["error"].get("offences", [content["error"]])}
            assert named <= names | {"None"}, (body, content)
        elif isinstance(content, str):
            assert all("error" not in event for event in events(content)), (body, content)
        else:
            assert json.dumps(content, allow_nan=False)
        return status

    with ThreadPoolExecutor(8) as pool:
        for status in pool.map(one, range(count)):
            statuses[status] = statuses.get(status, 0) + 1
    serving.wait_idle()
    return statuses


@pytest.mark.parametrize("top_k", [2**31 - 1, 2**31, 2**32, 2**64])
def test_a_top_k_beyond_the_vocabulary_is_answered_as_none(demo: Serving, top_k: int) -> None:
    body = {"model": "demo", "prompt": "sort: b a =", "temperature": 1, "seed": 3, "max_tokens": 4}
    status, content, _ = demo.post("/v1/completions", body | {"top_k": top_k})
    assert (status, content["choices"]) == (200, demo.post("/v1/completions", body)[1]["choices"])


def test_a_top_p_that_is_no_float32_takes_the_likeliest(demo: Serving) -> None:
    for top_p in (1e-38, 1e-46, 5e-324):
        body = {"model": "demo", "prompt": "sort: b a =", "temperature": 1, "top_p": top_p, "max_tokens": 4}
        assert (
            demo.post("/v1/completions", body)[1]["choices"][0]["text"]
            == demo.post("/v1/completions", body | {"temperature": 0})[1]["choices"][0]["text"]
        )


def test_bodies_at_the_ends_of_ranges(demo: Serving) -> None:
    statuses = check_bodies(demo, 150, 1)
    assert statuses.keys() == {200, 400}


@pytest.mark.slow
def test_many_bodies_at_the_ends_of_ranges(demo: Serving) -> None:
    statuses = check_bodies(demo, 2500, 2)
    print(f"answers by status: {statuses}")  # shown with pytest -s
    assert statuses.keys() == {200, 400}
