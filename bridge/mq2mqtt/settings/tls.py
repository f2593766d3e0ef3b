"""`tls:` of a connection: how to verify the server and what to show it; to RocketMQ also a yes or no."""

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from mq2mqtt.errors import ConfigError
from mq2mqtt.settings.fields import Section

__all__ = ["Tls", "TlsSettings", "client_context", "tls_context"]


class TlsSettings(Section):
    """How servers are verified, and what they are shown."""

    ca_file: Path | None = Field(
        default=None,
        description="Certificates (PEM) of the authorities that servers are verified against; `null`: the system's.",
    )
    check_hostname: bool = Field(
        default=True,
        description="Whether a server's certificate must name the address that is connected to. Brokers announce IP "
        "addresses: `false` where their certificates do not hold them.",
    )
    cert_file: Path | None = Field(
        default=None, description="This client's own certificate (PEM), for servers that ask for one; with `key_file`."
    )
    key_file: Path | None = Field(default=None, description="Its private key (PEM, without a password).")

    @model_validator(mode="after")
    def _both_files(self) -> "TlsSettings":
        if (self.cert_file is None) != (self.key_file is None):
            missing = "cert_file" if self.cert_file is None else "key_file"
            raise ValueError(f"cert_file and key_file go together, {missing} is missing; set both or neither")
        return self


def _kind(value: Any) -> Literal["flag", "mapping"]:  # noqa: ANN401 - whatever was written
    return "mapping" if isinstance(value, Mapping | TlsSettings) else "flag"


# An error's location names the tag after `tls`.
Tls = Annotated[Annotated[bool, Tag("flag")] | Annotated[TlsSettings, Tag("mapping")], Discriminator(_kind)]


def tls_context(tls: bool | TlsSettings) -> bool | ssl.SSLContext:  # noqa: FBT001 - the setting's value
    """Return what a driver needs to know: whether TLS is used, or the context to use.

    Raises:
        ConfigError: a file cannot be read, or does not hold what it should.
    """
    if isinstance(tls, bool):
        return tls
    return client_context(tls, field="rocketmq.tls")


def client_context(tls: TlsSettings, *, field: str) -> ssl.SSLContext:
    """Return the context for connections; `field` is the setting's name.

    Raises:
        ConfigError: a file cannot be read, or does not hold what it should.
    """
    context = ssl.create_default_context() if tls.ca_file is None else _trusting(tls.ca_file, field)
    context.check_hostname = tls.check_hostname
    if tls.cert_file is not None and tls.key_file is not None:
        _load_own(context, tls.cert_file, tls.key_file, field)
    return context


def _trusting(file: Path, field: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=file)
    except ssl.SSLError:
        raise ConfigError(f"{field}.ca_file: {file} holds no certificate in PEM form") from None
    except OSError as error:
        raise ConfigError(f"{field}.ca_file: {file} cannot be read: {error.strerror}") from error


def _load_own(context: ssl.SSLContext, certificate: Path, key: Path, field: str) -> None:
    for name, file in (("cert_file", certificate), ("key_file", key)):
        try:
            file.read_bytes()
        except OSError as error:
            raise ConfigError(f"{field}.{name}: {file} cannot be read: {error.strerror}") from error
    try:
        # Without the empty answer OpenSSL would ask the terminal for the password of an encrypted key.
        context.load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise ConfigError(
            f"{field}: {certificate} and {key} are no certificate and its key, in PEM form and without a "
            f"password ({reason})"
        ) from None
