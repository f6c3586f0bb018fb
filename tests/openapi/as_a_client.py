"""A hook: whole numbers are written without a fraction, as a client would.

To JSON Schema 5.0 is an integer. To contextd it is a wrong type (§1), which a description cannot say.
"""

from typing import Any

import schemathesis


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """The body, with whole numbers as such."""
    if isinstance(body, float) and body.is_integer():
        return int(body)
    if isinstance(body, dict):
        return {name: map_body(context, value) for name, value in body.items()}
    if isinstance(body, list):
        return [map_body(context, value) for value in body]
    return body
