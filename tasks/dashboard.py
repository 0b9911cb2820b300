"""Flower as `celery -A tasks flower` starts it: what its page of tasks shows, and who can reach it."""

from __future__ import annotations

import ipaddress
import os
import sys
from typing import Any

LOOPBACK = "127.0.0.1"

COLUMNS = "name,args,result,state,received,runtime,worker"
"""Columns of the page of tasks. Flower's own leave out what a task is for."""


def choose_columns() -> None:
    """Give the page of tasks our columns, unless the environment names others. Before Flower reads its options."""
    os.environ.setdefault("FLOWER_TASKS_COLUMNS", COLUMNS)


def bound_address() -> None:
    """Have Flower listen on the loopback unless told otherwise, and elsewhere only with a login.

    Flower's own default is every address of the host, without a login. Called when its options are read (environment,
    `flowerconfig.py`, command line) and nothing listens yet; in a worker it changes nothing.

    Raises:
        SystemExit: It would listen elsewhere without a login. The status is EX_CONFIG, so that no supervisor starts it
            again.
    """
    if "flower.options" not in sys.modules:
        return
    from tornado.options import options

    if options.unix_socket:  # a file of this host
        return
    options.address = options.address or LOOPBACK
    if _is_loopback(options.address) or _has_login(options):
        return
    sys.stderr.write(
        f"flower: it would listen on {options.address} without a login, and show runs, workers and queues to whoever "
        "reaches it; set FLOWER_BASIC_AUTH=user:password, or leave out the address "
        f"(--address, FLOWER_ADDRESS), which makes it {LOOPBACK}\n"
    )
    raise SystemExit(os.EX_CONFIG)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _has_login(options: Any) -> bool:
    """Whether Flower asks who is there: by passwords, each of them not empty, or by OAuth."""
    logins = options.basic_auth or ()
    if logins:
        return all(_is_login(login) for login in logins)
    return bool(options.auth)


def _is_login(login: str) -> bool:
    user, _, password = login.partition(":")
    return bool(user and password)
