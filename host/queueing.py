"""What a node refuses of the values typed into it, said when the graph is queued and not after other nodes have drawn."""

import inspect
from collections.abc import Callable

ABSENT = object()  # default of a socket in validate_inputs: nothing is connected; None is what ComfyUI gives for a link


def refusal(node, rules: tuple[Callable, ...], **given) -> bool | str:
    """True, or the sentence of the first of `rules` that refuses; what validate_inputs of a node returns.

    Rules are those that execute calls; their parameters are inputs by name, and node_id. One is asked when all that it
    requires is known, which a linked input is not before the run. ComfyUI leaves bounds and options of the inputs that
    validate_inputs names unchecked, so they are checked here first.
    """
    schema = node.define_schema()
    known = {"node_id": schema.node_id}
    for one in schema.inputs:
        value = given.get(one.id)
        if value is ABSENT:
            known[one.id] = None
        elif value is not None and not _wrong_type(one, value):
            if not _allowed(one, value):
                return f"{schema.node_id}: {one.id} is {value!r}; {_bounds(one)}."
            known[one.id] = value
    try:
        for rule in rules:
            wanted = inspect.signature(rule).parameters.values()
            if all(one.name in known or one.default is not one.empty for one in wanted):
                rule(**{one.name: known[one.name] for one in wanted if one.name in known})
    except ValueError as error:
        return str(error)
    return True


def _wrong_type(one, value) -> bool:
    """Text where a number belongs: ComfyUI has said so."""
    return getattr(one, "min", None) is not None and not isinstance(value, int | float)


def _allowed(one, value) -> bool:
    if getattr(one, "options", None) is not None:
        return value in one.options
    low, high = getattr(one, "min", None), getattr(one, "max", None)
    return (low is None or not value < low) and (high is None or not value > high)


def _bounds(one) -> str:
    if getattr(one, "options", None) is not None:
        return f"choose one of {', '.join(map(str, one.options))}"
    return f"give a number from {one.min} to {one.max}"
