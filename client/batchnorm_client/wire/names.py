"""What a layer may be called."""

import re
from typing import Final

from batchnorm_client.wire.errors import InvalidRequest, shown

LAYER_NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
"""What a layer may be called; torch module paths such as `layer1.0.bn1` fit."""


def check_layer_name(name: str) -> None:
    """Refuse what no layer can be called.

    Raises:
        InvalidRequest: it is no layer name.
    """
    if not LAYER_NAME_PATTERN.fullmatch(name):
        raise InvalidRequest(
            f"{shown(name)} is no layer name: 1 to 200 letters, digits, dots, underscores and hyphens, "
            "the first a letter or digit",
            field="name",
            expected=LAYER_NAME_PATTERN.pattern,
            got=name[:200],
        )
