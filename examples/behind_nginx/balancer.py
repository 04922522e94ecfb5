"""nginx as a child: its configuration, pid, logs and temporary files in one folder, loopback only.

Nothing of the nginx that Debian's package may run as a service is read, written or signalled.
"""

import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from behind_nginx.errors import SceneError
from behind_nginx.processes import Group

TEMPLATE = Path(__file__).with_name("nginx.conf")
INSTALL = "on Debian as root: make system-nginx, or apt-get install --no-install-recommends nginx"
SBIN = ("/usr/sbin", "/usr/local/sbin", "/sbin")  # not on the path of everybody
UP_LIMIT_S = 10.0  # it is up in 20 ms, or says within 2.5 s that it can not bind
POLL_S = 0.02


def find_nginx(path: str | None = None) -> str:
    """The program. path: as $PATH, which is the default. Raises SceneError with what to install."""
    found = shutil.which("nginx", path=path)
    if found is None and path is None:
        found = shutil.which("nginx", path=":".join(SBIN))
    if found is None:
        raise SceneError(f"expected the program nginx, found none. To install it: {INSTALL}")
    return found


def configuration(*, port: int, engine_ports: Sequence[int]) -> str:
    """nginx.conf with the port that it listens on, and those of the engines; all on loopback."""
    assert engine_ports, "a balancer of nobody"
    servers = "\n".join(f"        server 127.0.0.1:{engine};" for engine in engine_ports)
    return TEMPLATE.read_text().replace("@SERVERS@", servers).replace("@PORT@", str(port))


def start_nginx(folder: Path, *, port: int, engine_ports: Sequence[int]) -> Group:
    """Returns when it listens. folder: its own; the caller ends the group and removes the folder.

    Raises SceneError with nginx's own words if it ends instead.
    """
    program = find_nginx()
    folder.chmod(0o711)  # of root's nginx, the process that serves is `nobody`
    conf = folder / "nginx.conf"
    conf.write_text(configuration(port=port, engine_ports=engine_ports))
    command = [program, "-p", f"{folder}/", "-c", str(conf), "-e", "error.log"]
    tested = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)  # noqa: S603
    if tested.returncode != 0:
        raise SceneError(f"nginx does not take {conf}:\n{tested.stderr.strip()}")
    group = Group("nginx", command, log=folder / "nginx.log")
    end_s = time.monotonic() + UP_LIMIT_S
    pid = folder / "nginx.pid"  # written when it has its port; `nginx -t` has left an empty one
    while not pid.exists() or not pid.read_text():
        if not group.members() or time.monotonic() > end_s:
            group.end()
            said = (folder / "error.log").read_text().strip() or group.log_tail()
            raise SceneError(f"nginx did not listen on 127.0.0.1:{port}:\n{said}")
        time.sleep(POLL_S)
    return group
