"""Which weights of a model are taken, and what they are called in every process."""

import itertools
import re

import keras
from keras.src.utils.naming import to_snake_case

from tracin_beam.errors import InputError
from tracin_beam.gradients.recording import Weight


def select_weights(model: keras.Model, layers: str) -> list[Weight]:
    """The trainable weights of the chosen layers, with names that are the same in every process.

    A path is made of the layers' names from the model down, "encoder/dense_1/kernel". Where Keras
    made the name up, counting all layers of that type in the process, they are counted again
    within their parent.

    Args:
      model: a built model.
      layers: "all"; "last", the layer that owns the last trainable weight; or a regular
        expression searched for in the paths.

    Raises:
      InputError: no trainable weight is chosen, or the expression is none.
    """
    trainable = {id(v): v for v in model.trainable_variables}
    found: dict[int, Weight] = {}
    seen: set[int] = set()

    def visit(layer: keras.layers.Layer, prefix: str) -> None:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        names: set[str] = set()
        for variable in layer._trainable_variables:
            if id(variable) in trainable and id(variable) not in found:
                name = _unique(re.sub(r"_\d+$", "", variable.name), names)
                found[id(variable)] = Weight(prefix + name, variable, layer)
        names = set()
        for child in layer._layers:
            name = child.name
            automatic = to_snake_case(type(child).__name__)
            made_up = re.fullmatch(rf"((?:forward_|backward_)?{re.escape(automatic)})(_\d+)?", name)
            visit(child, f"{prefix}{_unique(made_up[1] if made_up else name, names)}/")

    visit(model, "")
    for i, (key, variable) in enumerate(trainable.items()):
        found.setdefault(key, Weight(f"{i}/{variable.name}", variable, model))
    ordered = [found[key] for key in trainable]
    if not ordered:
        raise InputError("the model has no trainable weight; is it frozen?")
    if layers == "all":
        return ordered
    if layers == "last":
        return [w for w in ordered if w.layer is ordered[-1].layer]
    try:
        chosen = [w for w in ordered if re.search(layers, w.path)]
    except re.error as error:
        raise InputError(f"--layers={layers} is not a regular expression: {error}") from None
    if not chosen:
        raise InputError(
            f"--layers={layers} matches none of the trainable weights: "
            + ", ".join(w.path for w in ordered)
        )
    return chosen


def _unique(name: str, names: set[str]) -> str:
    candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
    chosen = next(candidate for candidate in candidates if candidate not in names)
    names.add(chosen)
    return chosen
