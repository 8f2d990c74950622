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

_LONGEST: Final = 200
_RULE: Final = f"1 to {_LONGEST} letters, digits, dots, underscores and hyphens, the first a letter or digit"
TAG_RULE: Final = f"tag: {_RULE}, and not only digits"
STATE_RULE: Final = f"version or tag: a tag is {_RULE}"
"""The patterns in words, to follow "is no"."""


def check_layer_name(name: str) -> None:
    """Check a layer name.

    Raises:
        InvalidRequest: the name is not valid.
    """
    if not LAYER_NAME_PATTERN.fullmatch(name):
        raise _invalid("name", name, f"layer name: {_RULE}", LAYER_NAME_PATTERN)


def check_tag(tag: str) -> None:
    """Check a tag.

    Raises:
        InvalidRequest: the tag is not valid.
    """
    if len(tag) > _LONGEST or not TAG_PATTERN.fullmatch(tag):
        raise _invalid("tag", tag, TAG_RULE, TAG_PATTERN)


def check_state_name(at: str) -> None:
    """Check what names a state of a layer.

    Raises:
        InvalidRequest: it is neither a version in decimal nor a tag.
    """
    if len(at) > _LONGEST or not STATE_PATTERN.fullmatch(at):
        raise _invalid("at", at, STATE_RULE, STATE_PATTERN)


def _invalid(field: str, got: str, what: str, pattern: re.Pattern[str]) -> InvalidRequest:
    return InvalidRequest(f"{shown(got)} is no {what}", field=field, expected=pattern.pattern, got=got[:_LONGEST])
