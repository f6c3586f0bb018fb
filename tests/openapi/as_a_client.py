"""A hook: requests as a client of this server would write them.

To JSON Schema 5.0 is an integer; to contextd it is a wrong type (§1). And a reference to a file is only
good if the file is there (§3.1). Neither can be said in a description.
"""

from typing import Any

import schemathesis

FILE = "a.txt"  # in the workspace of the server


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """The body, with whole numbers as such and with files that exist."""
    if isinstance(body, float) and body.is_integer():
        return int(body)
    if isinstance(body, dict):
        if body.get("type") == "file_reference" and isinstance(body.get("paths"), list):
            body = body | {"paths": [FILE for _ in body["paths"]]}
        return {name: map_body(context, value) for name, value in body.items()}
    if isinstance(body, list):
        return [map_body(context, value) for value in body]
    return body
