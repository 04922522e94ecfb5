"""Hosts made of namespaces, so that what is done to hosts can be tried on one machine.

    this process ── bridge ─┬─ desk   no part of the cluster: where a person types `ray up`
                            ├─ a      the first process of each is an sshd; processes, files,
                            ├─ b      /dev/shm, name and address are a host's own
                            └─ c

A host sees this machine's programs, this checkout and its environment, and nothing that another
host writes. Ending its first process ends all others of it, and takes its files along: `ray stop`
in a host stops that host's Ray, as it would on a machine of its own. UCX finds that two hosts have
no processes in common, and takes TCP.

Needs root, or what it may do (CAP_SYS_ADMIN, CAP_NET_ADMIN); HostsError says what is not allowed.
"""

import pwd
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from tests.engines import ROOT
from tests.namespaces import Namespaces, NamespacesError, namespaces
from tests.namespaces import remains as namespaces_left
from tests.processes import ProcessGroup

NETWORK = "control"  # one network for everything, as most machines have
BOOT = Path(__file__).parent / "boot.sh"
HOME = pwd.getpwuid(0).pw_dir
SHM_BYTES = 1 << 30  # of each host: Ray's object store and a slab
BOOT_LIMIT_S = 30.0  # a host boots in a tenth of a second
COMMAND_LIMIT_S = 120.0  # of a command on a host: Python, Ray and an answer, on a busy machine
POLL_S = 0.05
SSH_PORT = 22
UNSHARE = ("unshare", "--kill-child", "--fork", "--pid", "--mount-proc", "--uts", "--ipc")
NOT_ALLOWED = 77  # boot.sh's exit status
PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "ssh", "ssh-keygen", "sshd", "rsync")
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TAIL_CHARS = 3_000  # of what a command that failed has said


class HostsError(Exception):
    """Hosts can not be made here; the text says why."""


class CommandError(Exception):
    """A command on a host failed; the text has the end of what it said."""


@dataclass(frozen=True)
class Host:
    """first_pid, pid_space: its first process and its pid namespace, as this machine names them."""

    name: str
    address: str
    first_pid: int
    pid_space: str
    net: Namespaces

    def command(self, *words: str) -> list[str]:
        """What runs `words` there, with the environment that it is given. Descriptors that are
        passed on arrive, and the process group stays this machine's.
        """
        enter = ["nsenter", f"--target={self.first_pid}", "--all", "--root", f"--wdns={ROOT}"]
        return [*enter, "--", *words]

    def run(
        self,
        *words: str,
        environment: Mapping[str, str] = MappingProxyType({}),
        limit_s: float = COMMAND_LIMIT_S,
    ) -> str:
        """What a command there has printed. Raises CommandError."""
        try:
            done = subprocess.run(
                self.command(*words),
                env=host_environment() | dict(environment),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            said = (exc.stdout or b"").decode(errors="replace")
            raise CommandError(
                f"{shlex.join(words)} on host {self.name} did not end within {limit_s:.0f} s:\n"
                f"{said[-TAIL_CHARS:]}"
            ) from exc
        if done.returncode:
            said = (done.stdout + done.stderr)[-TAIL_CHARS:]
            raise CommandError(
                f"{shlex.join(words)} on host {self.name} ended with {done.returncode}:\n{said}"
            )
        return done.stdout

    def received_bytes(self) -> int:
        """All that came over its one interface, by the kernel's counter."""
        return self.net.received_bytes(self.name, NETWORK)

    def processes(self) -> list[str]:
        """Command lines of all but its sshd, and who is logged in by it."""
        found = _processes_in(self.pid_space)
        return [line for _, line in found if not line.startswith("sshd:")]


@dataclass(frozen=True)
class Hosts:
    folder: Path
    by_name: dict[str, Host]

    def __getitem__(self, name: str) -> Host:
        return self.by_name[name]

    @property
    def key(self) -> str:
        """The private key that lets in at each of them; they all see it."""
        return str(self.folder / "key")


def host_environment() -> dict[str, str]:
    """Of whoever is logged in."""
    return {
        "HOME": HOME,
        "USER": "root",
        "LANG": "C.UTF-8",
        "PATH": PATH,
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",  # tests ask nobody outside
    }


@contextmanager
def running_hosts(*names: str, folder: Path) -> Iterator[Hosts]:
    """Hosts with these names, sshd included; nothing of them is left afterwards. folder: empty, and
    with a short path. Raises HostsError.
    """
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        raise HostsError(
            f"{', '.join(missing)} not found: `make test-cluster` as root installs the packages of "
            "requirements/cluster-packages.txt"
        )
    tried = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise HostsError(tried.stderr.strip())
    try:
        with namespaces(*names, networks=[NETWORK]) as net:
            groups: dict[str, ProcessGroup] = {}
            try:
                addresses = {name: net.address(name, NETWORK) for name in names}
                _prepare(folder, addresses)
                for name in names:
                    groups[name] = _boot(net, name, folder)
                yield Hosts(folder, {n: _booted(groups[n], n, addresses[n], net) for n in names})
            finally:
                for group in groups.values():
                    group.kill()  # the kernel ends what a host's first process leaves
    except NamespacesError as exc:
        raise HostsError(str(exc)) from exc


def remains(hosts: Hosts) -> list[str]:
    """What this machine has of them, once they have ended."""
    names = list(hosts.by_name)
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return [
        *(f"network {what}" for what in namespaces_left(names)),
        *(
            f"process {pid} of host {name}: {line}"
            for name, host in hosts.by_name.items()
            for pid, line in _processes_in(host.pid_space)
        ),
        *(f"mount {line}" for line in mounts if str(hosts.folder) in line),
        *([f"folder {hosts.folder}"] if hosts.folder.exists() else []),
    ]


def wait_for(condition: Callable[[], bool], *, limit_s: float, poll_s: float = POLL_S) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(poll_s)
    return True


def _prepare(folder: Path, addresses: dict[str, str]) -> None:
    """What boot.sh and sshd read."""
    for name in ("key", "host_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, timeout=BOOT_LIMIT_S)
    lines = ["127.0.0.1 localhost", *(f"{there} {name}" for name, there in addresses.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    exports = [f"export {k}={shlex.quote(v)}" for k, v in host_environment().items()]
    (folder / "bashrc").write_text("\n".join(exports) + "\n")
    settings = {
        "Port": str(SSH_PORT),
        "HostKey": f"{folder}/host_key",
        "AuthorizedKeysFile": f"{folder}/key.pub",
        "StrictModes": "no",  # the folder of the key is not below the user's home
        "PasswordAuthentication": "no",
        "UsePAM": "no",
        "PidFile": "none",
    }
    (folder / "sshd_config").write_text("".join(f"{k} {v}\n" for k, v in settings.items()))


def _boot(net: Namespaces, name: str, folder: Path) -> ProcessGroup:
    seen = {ROOT, *(Path(place).resolve() for place in (sys.prefix, sys.base_prefix))}
    command = net.command(
        name,
        # Should this process be killed, the host ends all the same.
        *("setpriv", "--pdeathsig", "KILL"),
        *UNSHARE,
        *("bash", "-c", 'hostname "$0" && exec "$@"', name),
        *(str(BOOT), str(folder), str(SHM_BYTES), HOME, *map(str, sorted(seen))),
    )
    return ProcessGroup(command, environment=host_environment(), log=folder / f"{name}.log")


def _booted(group: ProcessGroup, name: str, address: str, net: Namespaces) -> Host:
    """Once its sshd answers."""

    def answers() -> bool:
        if group.exit_status() == NOT_ALLOWED:
            raise HostsError(f"host {name}: {group.log_tail()}")
        assert group.exit_status() is None, f"host {name} did not boot:\n{group.log_tail()}"
        try:
            with socket.create_connection((address, SSH_PORT), timeout=1):
                return True
        except OSError:
            return False

    is_up = wait_for(answers, limit_s=BOOT_LIMIT_S)
    assert is_up, f"host {name} has no sshd after {BOOT_LIMIT_S:.0f} s:\n{group.log_tail()}"
    (first_pid,) = (pid for pid in group.members() if _is_first(pid))
    return Host(name, address, first_pid, _pid_space(first_pid), net)


def _is_first(pid: int) -> bool:
    """Whether it is process 1 of a pid namespace of its own."""
    (line,) = re.findall(r"NSpid:(.*)", Path(f"/proc/{pid}/status").read_text())
    return bool(line.split()[1:] and line.split()[-1] == "1")


def _pid_space(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/pid").readlink())


def _processes_in(space: str) -> Iterator[tuple[int, str]]:
    """(pid, command line) of the processes of a pid namespace. A zombie has no command line."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended meanwhile
                if str((entry / "ns/pid").readlink()) != space:
                    continue
                line = (entry / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
                if line:
                    yield int(entry.name), line
