"""Bearer tokens: what a token allows, how it is stored, and the file of stored tokens.

Imports neither torch nor HTTP, so that the command `batchnorm-service token` starts at once.
"""

from batchnorm_service.tokens.file import TokenFile, add_token, create_file, describe_user, load_tokens, revoke_token
from batchnorm_service.tokens.grants import EVERYTHING, Grant, Scope
from batchnorm_service.tokens.stored import MAX_TOKEN_BYTES, StoredToken, TokenFileError, find_token

__all__ = [
    "EVERYTHING",
    "MAX_TOKEN_BYTES",
    "Grant",
    "Scope",
    "StoredToken",
    "TokenFile",
    "TokenFileError",
    "add_token",
    "create_file",
    "describe_user",
    "find_token",
    "load_tokens",
    "revoke_token",
]
