"""The table of the README: `python -m experiments.int8_on_demo.table` prints it from results.json."""

from __future__ import annotations

from experiments.results import read


def main() -> None:
    print("| | right answers | same first choice | logit error, root mean square | largest | parameters, kB | cache, bytes per token |")
    print("|---|---|---|---|---|---|---|")
    for name, row in read(__file__).items():
        shares, errors = (
            f"{row['right_answers']:.1%} | {row['same_first_choice']:.2%}",
            (row["root_mean_square_error"], row["largest_error"]),
        )
        sizes = f"{row['parameter_bytes'] / 1e3:.0f} | {row['cache_bytes_per_token']:.0f}"
        print(f"| {name} | {shares} | {errors[0]:.3f} | {errors[1]:.2f} | {sizes} |")


if __name__ == "__main__":
    main()
