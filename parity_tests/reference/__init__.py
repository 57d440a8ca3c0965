"""openpi's parameters: names, shapes and dtypes, read off its own models."""

import pathlib
import re


def shapes(table: str) -> dict[str, tuple[int, ...]]:
    """Shape by name from a table such as "jax_params_dummy"."""
    lines = (pathlib.Path(__file__).parent / f"{table}.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return {name: tuple(map(int, re.findall(r"\d+", shape))) for name, shape, *_ in rows}
