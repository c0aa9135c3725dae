"""Write the README of this experiment from `results.json` and `proven.json`: `python -m experiments.experts_by_batch.table`."""

from __future__ import annotations

from typing import Any

from experiments.results import next_to, read

_SPLITS = "does not split"

_USERS = """## For users

For a mixture of experts let the planner choose anew for your batch: split d_ff of the experts while few requests run, and split the experts
themselves from some 64 to 256 sequences on. A layout that was chosen for one request can cost several times as much under load."""


def main() -> None:
    found = read(__file__) | {"proven": read(__file__, "proven.json")}
    next_to(__file__, "README.md").write_text(page(found))


def page(found: dict[str, Any]) -> str:
    return (
        "\n\n".join(
            [
                _head(found["date"]),
                _steps(found["steps"]),
                _steps_text(found["steps"]),
                _published(found),
                _proven(found["proven"]),
                _r1(found["r1"]),
                _USERS,
            ]
        )
        + "\n"
    )


def _head(date: str) -> str:
    return f"""# Experts, tensors or copies, by the batch

    python -m experiments.experts_by_batch.measure        # half a minute, writes results.json
    python -m experiments.experts_by_batch.table          # writes this page from it

The planner's best layout of a decode step (context 2048, bf16, uniform routing) for four mixtures of experts on four slices, found {date}.
`X`, `E` and `F` are the experts, and the d_model and d_ff of each; milliseconds. "All experts" and "all d_ff" have every axis splitting one
thing under tensor-parallel attention; "copies" are copies of the dense weights with whole requests split over all axes and experts over all
of them, rows gathered or exchanged, whether they fit or not. In brackets a best layout that does not fit."""


def _ms(value: float | None) -> str:
    return _SPLITS if value is None else f"{value:g}"


def _steps(tables: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| model, slice | batch | best: dense, experts | ms | all experts | all d_ff | copies, gathered / exchanged | skew 1.01 / 1.2 |"
    ]
    lines.append("|---" * 8 + "|")
    for title, rows in tables.items():
        for number, one in enumerate(rows):
            layout = f"{one['best'].split(', experts')[0].split(', prefill')[0]}; {one['experts']}"
            best = _ms(one["ms"]) if one["fits"] else f"({_ms(one['ms'])})"
            copies = f"{_ms(one['copies_gathering'])} / {_ms(one['copies_exchanging'])}"
            skewed = " / ".join(map(_ms, one["skewed"].values()))
            cells = [
                "" if number else title,
                str(one["batch"]),
                layout,
                best,
                _ms(one["all_experts"]),
                _ms(one["all_tensors"]),
                copies,
                skewed,
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _steps_text(tables: dict[str, list[dict[str, Any]]]) -> str:
    large = {row["batch"]: row for row in tables["qwen-3-235b-a22b on v5e:8x8"]}
    mixtral = {row["batch"]: row for row in tables["mixtral-8x7b on v5e:4x4"]}
    one, most, slower = large[1], large[1024], mixtral[256]["skewed"]["1.2"] / mixtral[256]["ms"] - 1
    shares = [row["skewed"]["1.2"] / row["ms"] for rows in tables.values() for row in rows if row["batch"] in (16, 64)]
    few = large[4]["copies_exchanging"] - large[4]["copies_gathering"]
    by_width, by_experts = one["all_tensors"], one["all_experts"]
    exchanged, gathered = most["copies_exchanging"], most["copies_gathering"]
    return f"""* **d_ff first, experts later.** A small batch hits few experts: split by d_ff, all devices read them together; split by
  experts, the device that is hit most reads alone while the others wait. One sequence of Qwen 3 235B takes {by_width:.1f} ms with d_ff over
  all axes and {by_experts:.1f} with the experts. From some 64 to 256 sequences all experts are hit, rows are what costs, and the experts
  go over the axes.
* **Copies of the dense weights come before that**, over one axis at first: attention's collectives cost more than its weights.
* **Exchange against gathering** is worth something from about a thousand rows, where a row goes to a small part of the devices: at
  1024 sequences of Qwen 3 235B {exchanged:.0f} against {gathered:.0f} ms; at 4 sequences it costs {few:.1f} ms more.
* **A skewed router is not slower everywhere.** It hits fewer experts, and while reading is what costs (16 and 64 sequences) a step with
  skew 1.2 takes {min(shares):.2f} to {max(shares):.2f} of the time; for Mixtral at 256 sequences it is {1 + slower:.2f}."""


def _published(found: dict[str, Any]) -> str:
    lines = ["| sequences | measured | floor | TP4 EP4, uniform | skew 1.01 | skew 1.2 | planner, uniform | skew 1.2 | floor, skew 1.2 |"]
    lines.append("|---" * 9 + "|")
    for one in found["published"]:
        same, best = one["tp4_ep4"], one["planner"]
        cells = [one["batch"], one["measured"], one["floor"]["0.0"], *same.values(), best["0.0"], best["1.2"], one["floor"]["1.2"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    prompts = found["prefill"]
    table = "\n".join(lines)
    few = found["published"][0]
    uniform, skewed = (few["planner"][skew] / few["measured"] for skew in ("0.0", "1.2"))
    return f"""## Beside what was published

Qwen 3 30B-A3B on v6e-4, tensor-parallel attention with experts over four chips, by a serving engine (host time and prefills between steps
are in its figures; source in `measure.py`):

{table}

The floor is what reading takes at the stated bandwidth: the cache, and all weights, of experts those that the routing hits in the mean.
At {few["batch"]} sequences the planner's layout is predicted at {uniform:.3f} of what was measured with uniform routing, which hits the
most experts, and at {skewed:.2f} with the skew that AIConfigurator saw in Qwen 3 235B.

Eight prompts of 4096 tokens: {prompts["measured"]} ms to the first token with eight in flight, in chunks of 2048; predicted for all at
once {prompts["tp4_ep4"]:g} ms with TP4 EP4, {prompts["planner"]:g} with the planner's layout; all FLOPs at the stated peak take
{prompts["floor"]:g}."""


def _proven(rows: dict[str, dict[str, Any]]) -> str:
    columns = ("layout", "planned_ms", "proven_ms", "copies_ms", "compiled_gb", "cpu_seconds", "peak_gb")
    titles = "planned layout | planned ms | proven ms | copies in that | GB per device, compiled | seconds of a core | its peak GB"
    lines = [f"| step | {titles} |", "|---" * (1 + len(columns)) + "|"]
    for name, one in rows.items():
        figures = " | ".join(str(one[key]) for key in columns)
        lines.append(f"| {name} | {figures} |")
    table, prompts = "\n".join(lines), next(one for name, one in rows.items() if "prefill" in name)
    longest = max(one["cpu_seconds"] for one in rows.values())
    copies = prompts["copies_ms"] / prompts["proven_ms"]
    return f"""## Compiled whole

`python -m experiments.experts_by_batch.proven TEXTS NAME …` compiles a step for its slice and reads it (`partinf.proof`). The products of
experts are priced by the ledger there too, so a proof tells what else the program does, and what else HBM has to carry. What compiling
and reading takes of a core and of memory stands last:

{table}

None took more than {longest:.0f} seconds of a core. For a mesh of four axes on v5e:8x8 (x0:2,x1:4,y0:4,y1:2) libtpu's compiler crashed, in
an asynchronous all-to-all; `partinf prove` reports such an end. The eight prompts pass in two such steps of both stages. {copies:.0%} of
the proven time are copies that the plan does not have.

Left to itself the compiler lays the 128 experts of gpt-oss, whose matrices of 2880 by 360 fill no whole tiles, innermost, and heads of 64
with the pages innermost, and copies both for the kernels in every step: 224 ms. So experts' matrices are placed in the order in which their
kernel reads them, filled up to whole tiles (2% more memory), and the cache has keys and values of such heads side by side."""


def _r1(rows: list[dict[str, Any]]) -> str:
    lines = ["| μs | traced | predicted | for the blocks of four that are hit | for the experts that are hit |", "|---" * 5 + "|"]
    for one in rows:
        lines.append(f"| {one['what']} | {one['traced']} | {one['all']} | {one.get('blocks', '')} | {one.get('hit', '')} |")
    products = [one for one in rows if "hit" in one]
    traced, every, own = (sum(one[key] for one in products) for key in ("traced", "all", "hit"))
    table = "\n".join(lines)
    return f"""## Beside a traced layer of DeepSeek R1

A layer on 64 chips of v5e, int8, batch 8, by the profiler trace in jax-llm-examples (`r1.py`): experts over four, their d_ff over
sixteen. Predicted is the reading of all 64 experts that a device holds; its kernel fetches them four at a time, where one of the four is
hit, and W_down for all of them while other things run. The constants of collectives on v5e come from the same trace.

{table}

The products take {traced:.0f} μs, all experts would be read in {every:.0f} ({every / traced:.2f} of that), those that are hit in
{own:.0f}: a kernel that fetches one expert at a time, as the one here does, would save {(traced - own) / 401.434:.0%} of this layer."""


if __name__ == "__main__":
    main()
