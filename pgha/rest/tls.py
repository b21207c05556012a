"""The listener's TLS context from the `restapi` section (compatibility spec 3.1 and 5.6)."""

from __future__ import annotations

import ssl

from pgha.errors import ConfigError


class Tls:
    """The listener's context: of connections accepted from now on. Replaced on a reload."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context


def make_context(*, certfile: str, keyfile: str = "", keyfile_password: str = "", cafile: str = "", ciphers: str = "",
                 verify_client: str = "none") -> ssl.SSLContext:
    """A server context. `verify_client`: none; optional: GETs are open, changes need a certificate; required: every
    request needs one, the handshake fails without. ConfigError names the file that does not work."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_certificate(context, certfile=certfile, keyfile=keyfile, keyfile_password=keyfile_password)
    if cafile:
        try:
            context.load_verify_locations(cafile)
        except (OSError, ValueError) as error:
            raise ConfigError(f"restapi.cafile: cannot use {cafile}: {why(error)}") from error
    elif verify_client != "none":
        raise ConfigError(f"restapi.verify_client: {verify_client!r} needs restapi.cafile")
    if ciphers:
        try:
            context.set_ciphers(ciphers)
        except ssl.SSLError as error:
            raise ConfigError(f"restapi.ciphers: OpenSSL knows none of {ciphers!r}") from error
    modes = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
    if verify_client not in modes:
        raise ConfigError(f"restapi.verify_client: {verify_client!r} is none of {', '.join(modes)}")
    context.verify_mode = modes[verify_client]
    return context


def load_certificate(context: ssl.SSLContext, *, certfile: str, keyfile: str = "", keyfile_password: str = "", section: str = "restapi") -> None:
    """Load certificate and key of that section. ConfigError names the file; the context is then good for nothing, for OpenSSL may
    have taken the certificate before it saw that the key does not fit."""
    try:
        context.load_cert_chain(certfile, keyfile or None, password=keyfile_password)
    except (OSError, ValueError) as error:      # ValueError: a password that is too long for OpenSSL
        raise ConfigError(f"{section}.certfile: cannot use {certfile}{f' with {keyfile}' if keyfile else ''}: {why(error)}") from error


def why(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else "") or str(error)


def server_headers(tokens: str, *, version: str, compatible: str) -> dict[str, str]:
    """The Server header by `restapi.server_tokens`: original, minimal or productonly."""
    return {"Server": {"productonly": "Patroni", "minimal": f"Patroni/{compatible}"}.get(tokens.lower(), f"pgha/{version}")}
