"""The YAML file of `--config`: names of flags and their values, taken as they are written."""

from collections.abc import Collection, Mapping

import yaml

from tracin_beam.errors import InputError
from tracin_beam.storage import files

_LARGEST = 1 << 20  # bytes
_TRUE, _FALSE, _NOTHING = ("true", "yes", "on"), ("false", "no", "off"), ("", "~", "null")


def read(path: str, known: Mapping[str, str], repeated: Collection[str] = ()) -> list[str]:
    """Reads a file of flags.

    A value counts as it is written, as on the command line: `010` is ten and not eight, `1:30` no
    number of seconds, `no` no boolean unless the flag is a switch. A list gives its items with
    commas between them, or one by one to a flag that may be given several times. A flag without a
    value, or with `null`, is not given.

    Args:
      path: of the file.
      known: by name of a flag that is known, the word that turns it on, if it is a switch; empty
        for a flag that takes values.
      repeated: names of the flags that may be given several times.

    Returns:
      The flags as words of a command line.

    Raises:
      InputError: the file cannot be read or holds something else.
    """
    try:
        with files.open_read(path) as handle:
            content = handle.read(_LARGEST + 1)
    except OSError as error:
        raise InputError(f"--config={path} cannot be read: {error}") from None
    if len(content) > _LARGEST:
        raise InputError(
            f"--config={path} is larger than {_LARGEST:,} bytes, which no file of flags is."
        )
    try:
        root = yaml.compose(content.decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"--config={path} is not valid YAML: {error}") from None
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"--config={path} must be a mapping of flag names to values.")
    given: dict[str, int] = {}
    words = []
    for key, value in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith(":str"):
            raise InputError(
                f"--config={path}, line {line}: must be a mapping of flag names to values."
            )
        name = key.value
        if name in given:
            raise InputError(
                f"--config={path}, line {line}: {name} is given twice, first on line {given[name]}."
            )
        given[name] = line
        where = f"--config={path}, line {line}: {name}"
        words += _words(where, name, value, known.get(name), name in repeated)
    return words


def _words(
    where: str, name: str, value: yaml.Node, switch: str | None, repeated: bool
) -> list[str]:
    """A flag as words of a command line; `switch` is None for a flag that is not known."""
    _check_tag(where, value)
    if isinstance(value, yaml.SequenceNode):
        items = [_text(where, item) for item in value.value]
        if switch:
            raise InputError(f"{where} must be true or false, not a list.")
        if repeated:
            return [f"--{name}={item}" for item in items]
        return [f"--{name}={','.join(items)}"]
    text = _text(where, value)
    plain = isinstance(value, yaml.ScalarNode) and value.style is None
    if plain and text.lower() in _NOTHING:
        return []
    is_boolean = plain and value.tag.endswith(":bool")
    if switch or (switch is None and is_boolean):
        if text.lower() not in _TRUE + _FALSE:
            raise InputError(f"{where} must be true or false, not {text!r}.")
        return [switch or f"--{name}"] if text.lower() in _TRUE else []
    return [f"--{name}={text}"]


def _text(where: str, node: yaml.Node) -> str:
    """What is written as a value or as an item of a list."""
    if not isinstance(node, yaml.ScalarNode):
        kind = "mapping" if isinstance(node, yaml.MappingNode) else "list in a list"
        raise InputError(f"{where} must be a value or a list of values, not a {kind}.")
    _check_tag(where, node)
    return node.value


def _check_tag(where: str, node: yaml.Node) -> None:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if not kind.isalpha():  # Python's objects have a colon, other types a "!"
        raise InputError(f"{where} must be a plain value, not one of the type {node.tag}.")
