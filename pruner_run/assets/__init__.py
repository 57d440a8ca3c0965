"""What ships with the package, so that it can be tried without any download.

`aloha_transfer_cube` is one simulated episode (see `pruner_run.simulation.record_demo`), and the
tokenizer is a stand-in for PaliGemma's (see `make_demo_tokenizer` here).
"""

from pathlib import Path

DEMO_EPISODE = Path(__file__).parent / "aloha_transfer_cube"
DEMO_TOKENIZER = Path(__file__).parent / "demo_tokenizer.model"
