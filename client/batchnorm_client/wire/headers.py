"""Headers of requests and responses that HTTP itself does not define."""

import re
from typing import Final

DIGEST: Final = "Batchnorm-Digest"
IDEMPOTENCY_KEY: Final = "Idempotency-Key"
IDEMPOTENT_REPLAY: Final = "Idempotent-Replay"
NUM_BATCHES_TRACKED: Final = "Num-Batches-Tracked"
REQUEST_ID: Final = "X-Request-ID"
VERSION: Final = "Batchnorm-Version"

KEY_PATTERN: Final = re.compile(r"[\x21-\x7e]{1,200}")
"""The valid values of Idempotency-Key and X-Request-ID."""
