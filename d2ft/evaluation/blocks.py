"""Compare many boxes with some others in a bounded memory."""

from collections.abc import Iterator

# Pairs that are compared at once; each takes some 100 bytes meanwhile.
_PAIRS_AT_ONCE = 1_000_000


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yield consecutive parts of the rows of a table, a million cells each."""
    step = max(1, _PAIRS_AT_ONCE // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
