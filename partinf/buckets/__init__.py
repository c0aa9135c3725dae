"""How large the steps of a plan are: what an engine should hold (`capacity`), the few padded shapes that are compiled before anything is
served (`shapes`), the KV pages that memory has room for with them (`pages`), and which shape a step runs in (`choice`). Both the runner
and the simulator ask here.
"""

from partinf.buckets.capacity import PROMPT_TOKENS, Capacity, capacity_for, served_capacity
from partinf.buckets.choice import fit, runner_limits, smallest_first, wanted_by
from partinf.buckets.pages import group_page_bytes, held, largest_step, serving_steps, with_capacity, with_window_pages
from partinf.buckets.shapes import num_programs, shape_of, split_of

__all__ = [
    "PROMPT_TOKENS",
    "Capacity",
    "capacity_for",
    "fit",
    "group_page_bytes",
    "held",
    "largest_step",
    "num_programs",
    "runner_limits",
    "served_capacity",
    "serving_steps",
    "shape_of",
    "smallest_first",
    "split_of",
    "wanted_by",
    "with_capacity",
    "with_window_pages",
]
