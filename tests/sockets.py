"""The sockets at which processes really listen, as the kernel says."""

import ipaddress
import os
import struct
from pathlib import Path


def listening(*pids):
    """(address, port) of every TCP socket at which one of the processes listens.

    Args:
      pids: by default this process alone.
    """
    inodes = set()
    for pid in pids or (os.getpid(),):
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(handle)
            except FileNotFoundError:  # closed in the meantime
                continue
            if target.startswith("socket:["):
                inodes.add(target[len("socket:[") : -1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in inodes:
                address, port = columns[1].split(":")
                found.append((_address(address), int(port, 16)))
    return found


def _address(text):
    """Hex in words of four bytes of the machine's order → as it is written."""
    words = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
    address = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    return str(getattr(address, "ipv4_mapped", None) or address)
