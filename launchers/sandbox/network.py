"""The cables: a switch inside the `site` namespace, a link from it to every node, and one to this machine.

Only the last one can be seen from outside. The switch lives in a namespace so that this machine's firewall rules
(Docker's, for one, drop what is bridged) do not reach it, and so that everything is gone once the namespaces are.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator

from encdec.errors import EncdecError
from launchers.sandbox.processes import Identity

INSIDE = "eth0"
SWITCH = "switch"
CANDIDATES = 256


def make_switch() -> None:
    """To be called inside the site's namespaces."""
    _ip(["link set lo up", f"link add {SWITCH} type bridge", f"link set {SWITCH} up"])


def take_address(address: str) -> None:
    """To be called inside a node's namespaces, once its end of the cable is there."""
    _ip(["link set lo up", f"link set {INSIDE} up", *_address(address, INSIDE)])


def plug_host(site: Identity, link: str, address: str) -> None:
    """Connect this machine, the login node, to the switch."""
    unplug_host(link)
    _ip([f"link add {link} type veth peer name login netns {site.pid}"])
    _ip([f"link set login master {SWITCH} up"], within=site)
    _ip([f"link set {link} up", *_address(address, link)])


def unplug_host(link: str) -> None:
    """Remove the link; that it is absent already is just as well."""
    subprocess.run(["ip", "link", "delete", link], check=False, capture_output=True)


def plug(site: Identity, name: str, node: Identity) -> None:
    """Connect a node to the switch, with the same hardware address at every boot (the others remember it)."""
    leftover = _enter(
        site, ["ip", "link", "delete", name]
    )  # the kernel may not have cleared a crashed node's cable yet
    subprocess.run(leftover, check=False, capture_output=True)
    hardware = "02:00:00:" + ":".join(hashlib.sha256(name.encode()).hexdigest()[i : i + 2] for i in (0, 2, 4))
    _ip([f"link add {name} type veth peer name {INSIDE} address {hardware} netns {node.pid}"], within=site)
    _ip([f"link set {name} master {SWITCH} up"], within=site)


def set_link(site: Identity, name: str, state: str) -> None:
    """Cut ("down") or restore ("up") a node's cable at the switch."""
    _ip([f"link set {name} {state}"], within=site)


def links_up(site: Identity) -> set[str]:
    """The names of the machines whose cable is not cut."""
    found = subprocess.run(_enter(site, ["ip", "-json", "link"]), capture_output=True, text=True, check=True).stdout
    return {link["ifname"] for link in json.loads(found) if "UP" in link["flags"]}


@contextlib.contextmanager
def choosing() -> Iterator[None]:
    """One sandbox of this machine at a time: what ``free_subnet`` finds is free until it is in use."""
    handle = os.open("/run", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def free_subnet(seed: str) -> str:
    """A /24 (its first three numbers) that this machine does not use yet; the first choice depends on the seed only."""
    routes = subprocess.run(["ip", "-4", "route", "show", "table", "all"], capture_output=True, text=True, check=True)
    first = int(hashlib.sha256(seed.encode()).hexdigest(), 16)
    for i in range(CANDIDATES):
        subnet = f"10.77.{(first + i) % CANDIDATES}"
        if f"{subnet}." not in routes.stdout:
            return subnet
    raise EncdecError("A sandbox needs a free network 10.77.x.0/24", found="none", remedy="Take other sandboxes down")


def _address(address: str, link: str) -> list[str]:
    """The `ip` commands that give a link its address, with routes that acknowledge at once.

    Slurm's daemons send each message in two parts; with delayed acknowledgements every exchange then costs 40 ms, and
    `sacctmgr show` takes 356 ms instead of 10.
    """
    subnet = address.rsplit(".", 1)[0]
    prompt = f"src {address} quickack 1"
    return [
        f"address add {address}/24 dev {link}",
        f"route replace {subnet}.0/24 dev {link} proto kernel scope link {prompt}",
        f"route replace local {address} dev {link} table local proto kernel scope host {prompt}",
    ]


def _enter(site: Identity, argv: list[str]) -> list[str]:
    return ["nsenter", "--target", str(site.pid), "--net", "--", *argv]


def _ip(commands: list[str], *, within: Identity | None = None) -> None:
    argv = ["ip", "-batch", "-"]
    argv = _enter(within, argv) if within else argv
    done = subprocess.run(argv, check=False, input="\n".join(commands), capture_output=True, text=True)
    if done.returncode != 0:
        raise EncdecError(f"`ip {commands[0]}` must succeed", found=done.stderr.strip(), remedy="Run up again")
