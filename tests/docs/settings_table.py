"""What docs/running.md must say of each setting, from the settings themselves."""

from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from contextd.settings import SECRETS, Settings, environment_name

FIELDS = {field.name: field for field in msgspec.structs.fields(Settings)}
_TYPES = get_type_hints(Settings, include_extras=True)


def cells(name: str) -> tuple[str, str, str, str]:
    """The first four cells of a setting's row: environment, option, default, values."""
    option = "" if name in SECRETS else f"`--{name.replace('_', '-')}`"
    return f"`{environment_name(name)}`", option, _default(name), _values(_TYPES[name])


def _default(name: str) -> str:
    value = FIELDS[name].default
    match value:
        case None | ():
            return ""
        case bool():
            return f"`{str(value).lower()}`"
        case int() | float():
            return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"
        case _:
            return f"`{value}`"


def _values(type_: Any) -> str:
    if get_origin(type_) is Annotated:
        base, meta = get_args(type_)
        whole = "" if base is float else "whole, "
        least = f"above {meta.gt:g}" if meta.gt is not None else f"{meta.ge:g}"
        return f"{whole}{least} to {meta.le:,}"
    if get_origin(type_) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(type_))
    if type_ is bool:
        return "`true`, `false`"
    return "names, by commas" if get_origin(type_) is tuple else "text"
