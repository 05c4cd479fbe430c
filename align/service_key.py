"""The key of a service that this machine offers: nobody else's without one."""

import os
import secrets

from align.config.rollout_rules import is_loopback


def service_key(host: str, variable: str, danger: str) -> str:
    """The key in the environment; on loopback one is made up, and shown, where there is none.

    Args:
        host: Address that the service listens on.
        variable: Of the environment, here and where the trainer runs.
        danger: What a stranger could do, for the error.

    Raises:
        ValueError: Others can reach it, and there is no key.
    """
    if key := os.environ.get(variable, "").strip():
        return key
    if not is_loopback(host):
        raise ValueError(
            f"--host {host} can be reached from elsewhere, and {danger}: set {variable} to a secret here and where the "
            "trainer runs, or listen on 127.0.0.1"
        )
    key = secrets.token_urlsafe(32)
    print(f"Start the trainer with\nexport {variable}={key}", flush=True)
    return key
