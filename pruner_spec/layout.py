"""Weights in any of four layouts, to our named parameters and back.

The layouts are data: see `pruner_spec.layout_openpi` for the rows. Everything here is strict:
every tensor of a source is read, every parameter is written once, all shapes are checked before an
array is touched, and one error lists all that is wrong. Arrays are read and given one at a time.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  # teaches NumPy the name "bfloat16"
import numpy as np

from pruner_spec.config import Pi0Config
from pruner_spec.layout_openpi import JAX_ROWS, TORCH_ALIASES, TORCH_ROWS, TORCH_UNUSED
from pruner_spec.layout_row import LEGEND, Row
from pruner_spec.parameters import Parameter, parameter_dtype, parameter_table

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How weights are named, split and transposed in one kind of source.

    Attributes:
        name: for messages.
        rows: one a parameter family, for π0 and π0.5 alike.
        separator: between the parts of a name.
        aliases: other names of tensors, by the name in the rows.
        unused: tensors that a source may have and the model has no use for.
    """

    name: str
    rows: tuple[Row, ...]
    separator: str
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def rows_of(self, config: Pi0Config) -> tuple[Row, ...]:
        """The rows whose parameters this model has."""
        return tuple(row for row in self.rows if row.belongs_to(config))

    def shapes(self, config: Pi0Config) -> dict[str, Shape]:
        """The shape of every stored tensor by name, without aliases and unused ones."""
        return {
            name: row.shape(config) for row in self.rows_of(config) for name in row.names(config)
        }


def _our_rows(*, stacked: bool) -> tuple[Row, ...]:
    variants = ("gemma_2b_lora", "gemma_300m_lora")
    configs = [
        Pi0Config(pi05=pi05, paligemma_variant=variants[0], action_expert_variant=variants[1])
        for pi05 in (False, True)
    ]
    tables = [parameter_table(config) for config in configs]
    return tuple(_our_row(parameter, stacked) for parameter in (tables[0] | tables[1]).values())


def _our_row(parameter: Parameter, stacked: bool) -> Row:
    axes = ("d", "i o", "k i o")[len(parameter.shape) - 1]
    if stacked and parameter.layers:
        axes = f"l {axes}"
    name = parameter.name if stacked else parameter.torch_name
    return Row(name, (parameter.name,), f"{axes} -> {axes}")


OPENPI_JAX = Layout("openpi's JAX layout", JAX_ROWS, "/")
OPENPI_TORCH = Layout("openpi's PyTorch layout", TORCH_ROWS, ".", TORCH_ALIASES, TORCH_UNUSED)
JAX = Layout("our JAX layout", _our_rows(stacked=True), ".")
TORCH = Layout("our PyTorch layout", _our_rows(stacked=False), ".")
LAYOUTS = (OPENPI_JAX, OPENPI_TORCH, JAX, TORCH)


def flatten(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Names joined by "/" and their leaves, from a tree that is nested, flat, or both.

    What only wraps the weights goes: "params" above everything (Flax), "model" (LeRobot), and
    "value" below everything (nnx states, older checkpoints of openpi).
    """
    flat = dict(_leaves(tree))
    for wrapper in (r"^params[./]", r"^model[./]", r"[./]value$"):
        if flat and all(re.search(wrapper, name) for name in flat):
            flat = {re.sub(wrapper, "", name): leaf for name, leaf in flat.items()}
    return flat


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = prefix + ("/".join(map(str, key)) if isinstance(key, tuple) else str(key))
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}/")
        else:
            yield name, value


def detect(names: Iterable[str]) -> Layout:
    """The layout that knows the most of these names, which are as `flatten` gives them.

    Raises:
        ValueError: no layout knows any.
    """
    names = list(names)
    counts = [len(_families(names, layout) & _known(layout)) for layout in LAYOUTS]
    if not any(counts):
        raise ValueError(
            f"expected the weights of a π0 or π0.5 model, got {len(names)} arrays, "
            f"none with a known name: {sorted(names)[:5]}"
        )
    return LAYOUTS[counts.index(max(counts))]


def to_named(
    source: Mapping[Any, Any],
    config: Pi0Config,
    *,
    missing: Sequence[str] = (),
    ignored: Sequence[str] = (),
) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters from weights in any layout.

    A tensor that holds two of our parameters matches a pattern where both do.

    Args:
        source: a tree (nested or flat, see `flatten`) of arrays, or of anything that has a shape
            and that NumPy can read as an array.
        config: the model the weights are for.
        missing: regular expressions; a parameter in whose name (ours) one is found is given only if
            the source has it.
        ignored: the same; such a parameter is not given, whatever the source has of it.

    Returns:
        Pairs of name and array [layers, ...], each read when it is asked for. Arrays have the
        source's dtype, and may be views of its arrays.

    Raises:
        ValueError: the weights are not this model's; lists every missing, extra and misshapen
            tensor. Raised by the call, before anything is read.
    """
    flat = flatten(source)
    layout = detect(flat)
    flat = _without_ignored(flat, layout, ignored)
    layout = _without_absent(layout, flat, [*missing, *ignored])
    return _read(_resolve(flat, layout, config), layout, config)


def _without_ignored(
    flat: Mapping[str, Any], layout: Layout, patterns: Sequence[str]
) -> dict[str, Any]:
    """The tensors but those of rows that match."""
    ignored = {row.theirs for row in layout.rows if _matches(row, patterns)}
    return {k: v for k, v in flat.items() if not _rows_named([k], layout) & ignored}


def _without_absent(layout: Layout, names: Iterable[str], patterns: Sequence[str]) -> Layout:
    """The layout but for rows that match and of which there is no tensor."""
    there = _rows_named(names, layout)
    rows = (row for row in layout.rows if row.theirs in there or not _matches(row, patterns))
    return dataclasses.replace(layout, rows=tuple(rows))


def _matches(row: Row, patterns: Sequence[str]) -> bool:
    """Whether a pattern is found in the name of each of its parameters."""
    return all(any(re.search(pattern, name) for pattern in patterns) for name in row.ours)


def _rows_named(names: Iterable[str], layout: Layout) -> set[str]:
    """The names of the rows that tensors belong to, if they do."""
    return {layout.aliases.get(name, name) for name in _families(names, layout)}


def from_named(
    named: Mapping[str, Any], config: Pi0Config, layout: Layout
) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `to_named`: pairs of a name in the layout and the tensor.

    An alias is given too, with the tensor of its row itself: a file needs only one of them.

    Args:
        named: our parameters by name, [layers, ...].
        config: the model they are of.
        layout: the one to write, such as `OPENPI_TORCH`.

    Raises:
        ValueError: they are not this model's parameters; as in `to_named`.
    """
    return _write(_resolve(named, JAX, config), layout, config)


def stored(
    named: Iterable[tuple[str, np.ndarray]], config: Pi0Config
) -> Iterator[tuple[Parameter, np.ndarray]]:
    """Every parameter of a model with its array [layers, ...], in the dtype the model keeps it in.

    Raises:
        ValueError: they are not exactly the model's parameters; raised when the pairs are through,
            since only then it is known which are missing.
    """
    table = parameter_table(config)
    given: dict[str, Shape] = {}
    for name, array in named:
        given[name] = array.shape
        if name in table and array.shape == table[name].stacked_shape:
            dtype = np.dtype(parameter_dtype(name, config.dtype))
            yield table[name], array.astype(dtype, copy=False)
    check(given, JAX, config)


def renamed(tensors: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Tensors by names in the layout's spelling, from names as `flatten` gives them."""
    return {_spelled(name, layout): tensor for name, tensor in tensors.items()}


def by_row(tensors: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Tensors by the names of the layout's rows, from names as `renamed` gives them.

    A table that is stored under an alias gets its row's name too. Where both are stored, the
    alias's tensor counts: they are one tensor in openpi's model, and two in LeRobot's, which
    trains `embed_tokens` and leaves the other as it was.
    """
    found = dict(tensors)
    for alias, name in layout.aliases.items():
        if alias in found:
            found[name] = found[alias]
    return found


def _spelled(name: str, layout: Layout) -> str:
    return re.sub(r"[./]", layout.separator, name)


def _known(layout: Layout) -> set[str]:
    return {row.theirs for row in layout.rows} | set(layout.aliases)


def _families(names: Iterable[str], layout: Layout) -> set[str]:
    """The names as rows have them: `{layer}` in the place of a number."""
    canonical = (_spelled(name, layout) for name in names)
    return {re.sub(r"(?<=\.)\d+(?=\.)", "{layer}", name) for name in canonical}


def _resolve(flat: Mapping[str, Any], layout: Layout, config: Pi0Config) -> dict[str, Any]:
    """The tensors by the names in the rows, after checking that they are exactly the model's."""
    tensors = renamed(flat, layout)
    check({name: np.shape(tensor) for name, tensor in tensors.items()}, layout, config)
    return by_row(tensors, layout)


def _read(
    tensors: Mapping[str, Any], layout: Layout, config: Pi0Config
) -> Iterator[tuple[str, np.ndarray]]:
    for row in layout.rows_of(config):
        parts = [row.split(np.asarray(tensors[name]), config) for name in row.names(config)]
        for name, layers in zip(row.ours, zip(*parts, strict=True), strict=True):
            yield name, np.stack(layers) if row.is_per_layer else layers[0]


def _write(
    named: Mapping[str, Any], layout: Layout, config: Pi0Config
) -> Iterator[tuple[str, np.ndarray]]:
    names_of_alias = {name: alias for alias, name in layout.aliases.items()}
    for row in layout.rows_of(config):
        arrays = [np.asarray(named[name]) for name in row.ours]
        for layer, name in enumerate(row.names(config)):
            parts = [array[layer] for array in arrays] if row.is_per_layer else arrays
            tensor = row.merge(parts, config)
            yield name, tensor
            if name in names_of_alias:
                yield names_of_alias[name], tensor


def check(found: Mapping[str, Shape], layout: Layout, config: Pi0Config) -> None:
    """Holds tensors to a model.

    Args:
        found: shapes by names as `renamed` gives them.
        layout: theirs.
        config: the model's.

    Raises:
        ValueError: they are not exactly the model's; lists all that is wrong with their names and
            shapes.
    """
    expected = layout.shapes(config)
    aliases = {alias: expected[name] for alias, name in layout.aliases.items()}
    given = {layout.aliases.get(name, name) for name in found}
    allowed = expected | aliases
    missing = [name for name in expected if name not in given]
    extra = [name for name in found if name not in allowed and name not in layout.unused]
    misshapen = [name for name in allowed if name in found and found[name] != allowed[name]]
    if not (missing or extra or misshapen):
        return
    lines = [f"the weights, read in {layout.name}, are not those of this config's model"]
    lines += _hints(extra, layout, config)
    lines += [f"missing: {name}: expected {expected[name]}, got none" for name in missing]
    lines += [f"extra: {name}: expected none, got {found[name]}" for name in extra]
    lines += [f"shape: {name}: expected {allowed[name]}, got {found[name]}" for name in misshapen]
    raise ValueError("\n".join(lines))


def _hints(extra: Iterable[str], layout: Layout, config: Pi0Config) -> Iterator[str]:
    """What probably is the matter with a source that has these tensors too many."""
    families = _families(extra, layout)
    other = {row.theirs for row in layout.rows if not row.belongs_to(config)}
    if {name for name in families & other if "lora" not in name.lower()}:
        source, model = ("π0", "π0.5") if config.pi05 else ("π0.5", "π0")
        yield f"hint: these look like weights of {source}, and pi05={config.pi05} means {model}"
    if any("lora" in name.lower() for name in extra):
        yield (
            "hint: these are LoRA adapters, and this config's model has other ones or none: name "
            "the variants they are of, such as 'gemma_2b_lora', or merge them into the weights"
        )


def markdown() -> str:
    """The rows as the page `docs/layout.md`: `python -m pruner_spec.layout > docs/layout.md`."""
    axes = "\n".join(f"| `{letter}` | {meaning} |" for letter, meaning in LEGEND.items())
    return "\n".join([_INTRODUCTION.format(axes=axes), *map(_section, (OPENPI_JAX, OPENPI_TORCH))])


_INTRODUCTION = """\
# The weight map

Generated from the rows in `pruner_spec/layout_openpi.py` by
`python -m pruner_spec.layout > docs/layout.md`.

A pattern leads from the tensor as openpi stores it to our array, in the notation of einops; the way
back is the same pattern reversed. Our names are those of the JAX modules, where layers are stacked
on the first axis; `{{layer}}` in openpi's name means a tensor a layer, and the pattern is one
layer's. Kernels of ours are [inputs, outputs].

| axis | |
|---|---|
{axes}
"""


def _section(layout: Layout) -> str:
    rows = "\n".join(
        f"| `{row.theirs}` | {'<br>'.join(f'`{name}`' for name in row.ours)} | `{row.pattern}` |"
        for row in layout.rows
    )
    notes = [f"`{alias}` is another name of `{name}`." for alias, name in layout.aliases.items()]
    notes += [f"`{name}` is never used, and ignored." for name in layout.unused]
    paragraphs = "".join(f"\n{note}\n" for note in notes)
    return f"## {layout.name}\n\n| openpi | ours | pattern |\n|---|---|---|\n{rows}\n{paragraphs}"


if __name__ == "__main__":
    print(markdown(), end="")
