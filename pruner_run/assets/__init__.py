"""What ships with the package, so that it can be tried without any download.

`aloha_transfer_cube` is one simulated episode, and the tokenizer is a stand-in for PaliGemma's (see
`make_demo_tokenizer` here). The episode's states and actions are those of

    pruner record --env aloha_sim --episodes 1 --settle_seconds 8 --output DIR

with gym-aloha 0.1.5, dm-control 1.0.41 and mujoco 3.8.1; its videos have a key frame in ten, not in
two, and are smaller. `show.html` is the template of the page that
`pruner_run.show_page` makes.
"""

from pathlib import Path

DEMO_EPISODE = Path(__file__).parent / "aloha_transfer_cube"
DEMO_TOKENIZER = Path(__file__).parent / "demo_tokenizer.model"
SHOW_PAGE = Path(__file__).parent / "show.html"
