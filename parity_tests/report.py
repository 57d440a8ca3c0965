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
PACKAGES = ("jax", "flax", "torch", "numpy")


def main() -> None:
    """Runs the suite with the given pytest arguments and replaces the page's generated part."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PARITY_RECORD": folder}
        command = [sys.executable, "-m", "pytest", "-q", *sys.argv[1:]]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        reached = read(pathlib.Path(folder))
    write_generated(PAGE, "parity_tests.report", render(reached))


def write_generated(page: pathlib.Path, module: str, text: str) -> None:
    """Replaces what stands below a page's mark, which names the module that makes it."""
    mark = f"<!-- what follows is generated: python -m {module} -->\n"
    written_by_hand, _, _ = page.read_text().partition(mark)
    page.write_text(written_by_hand + mark + text)
    print(f"wrote {page}")


def made_with() -> str:
    """Today's date, the machine and the versions, for a page."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return f"{today}, on the CPU ({platform.machine()}), {versions}"


def read(folder: pathlib.Path) -> dict[tuple[str, str, str], float]:
    """(level, dtype, who) -> the worst of all test processes."""
    worst: dict[tuple[str, str, str], float] = collections.defaultdict(float)
    for file in folder.glob("*.json"):
        for level, dtype, who, value in json.loads(file.read_text()):
            worst[level, dtype, who] = max(value, worst[level, dtype, who])
    return worst


def render(reached: dict[tuple[str, str, str], float]) -> str:
    """The generated part of the page."""
    bounded = [row for row in sorted(reached) if row[0] in TOLERANCES]
    shown = [row for row in sorted(reached) if row[0] not in TOLERANCES]
    lines = [
        f"\nReached on {made_with()}.\n",
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
