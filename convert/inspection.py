"""What a checkpoint holds, as a person reads it."""

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.text import Text
from rich.tree import Tree

from convert.lazy_array import LazyArray
from convert.source import Source
from pruner_spec.config import GemmaVariant, Pi0Config, VisionVariant


def show(source: Source, console: Console) -> None:
    """Prints the tree of arrays and what they were recognised as."""
    title = f"[bold]{escape(str(source.place))}[/bold]"
    console.print(tree(title, source.arrays, source.side.layout.separator))
    console.print(summary(source))


def tree(title: str, arrays: Mapping[str, LazyArray], separator: str) -> Tree:
    """Names, shapes and dtypes; every branch with the numbers and bytes below it."""
    root = Tree(title)
    branches = {"": root}
    for name, array in sorted(arrays.items()):
        *parents, last = name.split(separator)
        path = ""
        for parent in parents:
            above, path = path, f"{path}{separator}{parent}"
            if path not in branches:
                below = f"{path[len(separator) :]}{separator}"
                branches[path] = branches[above].add(_total(parent, arrays, below))
        line = f"{last} {list(array.shape)} {array.dtype.name}"
        branches[path].add(Text(line, style="dim" if array.nbytes < 1 << 20 else ""))
    return root


def _total(name: str, arrays: Mapping[str, LazyArray], prefix: str) -> str:
    below = [array for path, array in arrays.items() if path.startswith(prefix)]
    return f"{escape(name)} [cyan]{_count(below)}[/cyan]"


def _count(arrays: list[LazyArray]) -> str:
    numbers = sum(array.nbytes // array.dtype.itemsize for array in arrays)
    return f"{numbers:,} numbers, {sum(array.nbytes for array in arrays) / 1e9:.3f} GB"


def summary(source: Source) -> str:
    """What the checkpoint was recognised as, a line each."""
    config = source.side.config
    dtypes = sorted({array.dtype.name for array in source.arrays.values()})
    lines = [
        f"{model_name(config)} in {source.side.layout.name}",
        f"  paligemma_variant      {variant(config.paligemma_variant)}",
        f"  action_expert_variant  {variant(config.action_expert_variant)}",
        f"  vision_variant         {variant(config.vision_variant)}",
        f"  action_dim             {config.action_dim}",
        *(f"  {name:<22} {_open(config, source, name)}" for name in _OPEN),
        f"  arrays                 {len(source.arrays)}: {_count(list(source.arrays.values()))}",
        f"  dtypes                 {', '.join(dtypes)}",
        f"  norm_stats             {', '.join(sorted(source.stats)) or 'none found'}",
    ]
    return "\n".join(map(escape, lines))


_OPEN = ("action_horizon", "max_token_len", "discrete_state_input")


def _open(config: Pi0Config, source: Source, name: str) -> str:
    assumed = " (assumed: weights do not say it)" if name in source.assumed else ""
    return f"{getattr(config, name)}{assumed}"


def model_name(config: Pi0Config) -> str:
    """Such as "π0.5 with LoRA adapters"."""
    return f"{'π0.5' if config.pi05 else 'π0'}{' with LoRA adapters' if config.has_lora else ''}"


def variant(value: str | GemmaVariant | VisionVariant) -> str:
    """A variant's name, or its sizes."""
    if isinstance(value, str):
        return value
    return ", ".join(f"{name} {size}" for name, size in vars(value).items())
