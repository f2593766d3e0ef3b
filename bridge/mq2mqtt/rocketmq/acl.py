"""Signing of requests (RocketMQ's ACL 1.0, which ACL 2.0 accepts too)."""

import base64
import hashlib
import hmac
from collections.abc import Mapping
from typing import Final

__all__ = ["Credentials", "signature"]

_SIGNATURE: Final = "Signature"


def signature(secret_key: str, fields: Mapping[str, str], body: bytes) -> str:
    """Return Base64(HMAC-SHA1) over the values of all fields in the order of their keys, then the body."""
    content = "".join(fields[key] for key in sorted(fields) if key != _SIGNATURE)
    digest = hmac.new(secret_key.encode(), content.encode() + body, hashlib.sha1).digest()
    return base64.b64encode(digest).decode()


class Credentials:
    """An access key and its secret. The secret is in no text that this object gives."""

    __slots__ = ("_secret_key", "_security_token", "access_key")

    def __init__(self, access_key: str, secret_key: str, *, security_token: str | None = None) -> None:
        self.access_key = access_key
        self._secret_key = secret_key
        self._security_token = security_token

    def __repr__(self) -> str:
        return f"Credentials({self.access_key!r})"

    def sign(self, fields: Mapping[str, str], body: bytes) -> dict[str, str]:
        """Return `fields` with the access key and the signature."""
        signed = {**fields, "AccessKey": self.access_key}
        if self._security_token is not None:
            signed["SecurityToken"] = self._security_token
        signed[_SIGNATURE] = signature(self._secret_key, signed, body)
        return signed
