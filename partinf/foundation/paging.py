"""Pages that a window of positions needs: counted here for the engine, which holds them, and for the planner, which sizes the pool.

Pages hold S positions each; a window of W positions is what a query sees, its own position included. The pages of a sequence are
distributed round-robin over `ways` sequence shards, and counts are of the fullest of them.
"""

from __future__ import annotations

from partinf.foundation.rounding import ceil_div, round_up

PAGE_SIZE = 16  # positions of a page, unless another size is chosen


def first_page(position: int, window: int, page_size: int) -> int:
    """The first page of a sequence that a query at this position sees; later ones see none before it."""
    return max(0, position - window + 1) // page_size


def most_pages(num_positions: int, page_size: int) -> int:
    """On how many pages so many positions in a row lie at most, wherever they begin."""
    return ceil_div(num_positions - 1, page_size) + 1 if num_positions > 0 else 0


def window_pages(window: int, num_positions: int, page_size: int, ways: int = 1) -> int:
    """Pages per part that one sequence of so many positions keeps at most: those that its next query sees, and one before them, so that
    other samples of the request find the window at the last whole page of the prompt that they share."""
    return ceil_div(min(most_pages(window, page_size) + 1, ceil_div(num_positions, page_size)), ways)


def chunk_pages(num_tokens: int, num_chunks: int, page_size: int, ways: int = 1) -> int:
    """Pages per part that the chunks of one step, of so many tokens together, take beyond the windows of their sequences at most: a chunk
    of c tokens takes ⌈(c - 1) / S⌉ pages more than one token does."""
    pages = num_tokens // page_size + num_chunks
    return ceil_div(pages, ways) + (num_chunks if ways > 1 else 0)


def table_pages(num_positions: int, page_size: int, ways: int, multiple: int) -> int:
    """Columns of a page table that holds the pages of so many positions in a row wherever they begin: it begins with a page of the first
    part, and has a multiple of `multiple` columns."""
    return round_up(most_pages(num_positions, page_size) + ways - 1, multiple) if num_positions > 0 else 0


def table_start(position: int, window: int, page_size: int, ways: int) -> int:
    """The page with which the table of a query at this position begins; see `table_pages`."""
    return first_page(position, window, page_size) // ways * ways
