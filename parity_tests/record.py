"""Checks a measured error against the table, and remembers what was reached."""

import json
import pathlib

from parity_tests.tolerances import tolerance

_reached: dict[str, float] = {}


def check(level: str, dtype: str, who: str, measured: float, case: str = "") -> None:
    """Asserts that an error is within the table's bound, and records the worst of each kind.

    Args:
        level: a row of the table.
        dtype: a column.
        who: what was compared, such as "jax | torch".
        measured: the error.
        case: for the message.
    """
    key = json.dumps([level, dtype, who])
    _reached[key] = max(measured, _reached.get(key, 0.0))
    bound = tolerance(level, dtype)
    assert measured <= bound, (
        f"{level} {dtype} {who} {case}: {measured:.2e}, expected <= {bound:.0e}"
    )


def report(level: str, dtype: str, who: str, value: float) -> None:
    """Remembers a number that is shown, and not bounded."""
    _reached[json.dumps([level, dtype, who])] = value


def write(path: pathlib.Path) -> None:
    """Writes what was reached as JSON: a list of [level, dtype, who, value]."""
    rows = [[*json.loads(key), value] for key, value in sorted(_reached.items())]
    path.write_text(json.dumps(rows, indent=1) + "\n")
