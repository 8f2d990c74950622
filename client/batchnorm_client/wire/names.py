"""Names of layers, and tags of pins."""

import re
from typing import Final

from batchnorm_client.wire.errors import InvalidRequest, shown

LAYER_NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
"""The valid layer names. torch's module paths, such as `layer1.0.bn1`, are among them."""

TAG_PATTERN: Final = re.compile(r"([A-Za-z]|[0-9]+[A-Za-z._-])[A-Za-z0-9._-]*")
"""The valid tags, of at most 200 characters: as layer names, but not only digits, which are versions."""

STATE_PATTERN: Final = re.compile(rf"[0-9]{{1,19}}|{TAG_PATTERN.pattern}")
"""A version or a tag."""


def check_layer_name(name: str) -> None:
    """Check a layer name.

    Raises:
        InvalidRequest: the name is not valid.
    """
    if not LAYER_NAME_PATTERN.fullmatch(name):
        raise InvalidRequest(
            f"{shown(name)} is no layer name: 1 to 200 letters, digits, dots, underscores and hyphens, "
            "the first a letter or digit",
            field="name",
            expected=LAYER_NAME_PATTERN.pattern,
            got=name[:200],
        )
