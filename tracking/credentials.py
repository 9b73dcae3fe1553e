"""Owns names and passwords in addresses: they leave the environment's addresses, and what people read.

Refuses to know MLflow, so that a command can call it before it loads anything.
"""

import re
import urllib.parse
from collections.abc import MutableMapping

from qlora.config import InputError

_TRACKING, _REGISTRY = "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"
_NAME, _PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
_NONE = ("", "")


def hide_credentials(environment: MutableMapping[str, str]) -> None:
    """Move name and password from servers' addresses into the variables that MLflow has for them.

    Whatever prints an address afterwards prints none of them. Raises InputError for addresses that would need
    different ones: MLflow has one name and one password for both.
    """
    addresses, credentials, hosts = {}, {}, set()
    for variable in (_TRACKING, _REGISTRY):
        address = environment.get(variable, "")
        if address.lower().startswith(("http://", "https://")):
            addresses[variable], host, credentials[variable] = _taken_apart(variable, address)
            hosts.add(host)
    needed = set(credentials.values())
    given = needed - {_NONE}
    if len(given) > 1 or (given and _NONE in needed and len(hosts) > 1):
        raise InputError(
            _REGISTRY, f"must need the same name and password as {_TRACKING}, or none be in either"
        )
    for found in given:
        environment[_NAME], environment[_PASSWORD] = found
        environment.update(addresses)


def _taken_apart(variable: str, address: str) -> tuple[str, str, tuple[str, str]]:
    """Return an address without credentials, its host, and its (name, password)."""
    scheme, _, rest = address.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    path = rest[len(authority) :]
    if "@" in path:
        raise InputError(variable, "has an @ behind its host; in a password, / ? # must read %2F %3F %23")
    user, at, host = authority.rpartition("@")
    name, _, password = (urllib.parse.unquote(part) for part in user.partition(":"))
    if at and not (name and password):
        raise InputError(
            variable, "must have name and password before the @; a token is MLFLOW_TRACKING_TOKEN"
        )
    return f"{scheme}://{host}{path}", host, (name, password) if at else _NONE
