"""Writes `docs/parity.md`: runs the suite and tables what it reached.

python -m parity_tests.report [pytest's arguments]
"""

import collections
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

from parity_tests.tolerances import TOLERANCES

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "parity.md"
MARK = "<!-- what follows is generated: python -m parity_tests.report -->\n"
PACKAGES = ("jax", "flax", "torch", "numpy")


def main() -> None:
    """Runs the suite with the given pytest arguments and replaces the page's generated part."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PARITY_RECORD": folder}
        command = [sys.executable, "-m", "pytest", "-q", *sys.argv[1:]]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        reached = read(pathlib.Path(folder))
    written_by_hand, _, _ = PAGE.read_text().partition(MARK)
    PAGE.write_text(written_by_hand + MARK + render(reached))
    print(f"wrote {PAGE}")


def read(folder: pathlib.Path) -> dict[tuple[str, str, str], float]:
    """(level, dtype, who) -> the worst of all test processes."""
    worst: dict[tuple[str, str, str], float] = collections.defaultdict(float)
    for file in folder.glob("*.json"):
        for level, dtype, who, value in json.loads(file.read_text()):
            worst[level, dtype, who] = max(value, worst[level, dtype, who])
    return worst


def render(reached: dict[tuple[str, str, str], float]) -> str:
    """The generated part of the page."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    today = datetime.datetime.now(tz=datetime.UTC).date()
    bounded = [row for row in sorted(reached) if row[0] in TOLERANCES]
    shown = [row for row in sorted(reached) if row[0] not in TOLERANCES]
    lines = [
        f"\nReached on {today}, on the CPU ({platform.machine()}), {versions}.\n",
        "| level | dtype | what | reached | bound |",
        "|---|---|---|---|---|",
        *(
            f"| {level} | {dtype} | {who.replace('|', '–')} | {reached[level, dtype, who]:.1e} "
            f"| {TOLERANCES[level][dtype]:.0e} |"
            for level, dtype, who in bounded
        ),
        "\nReported, not bounded: bfloat16 beside the float32 truth.\n",
        "| what | dtype | | value |",
        "|---|---|---|---|",
        *(
            f"| {level} | {dtype} | {who.replace('|', '–')} | {reached[level, dtype, who]:.3g} |"
            for level, dtype, who in shown
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
