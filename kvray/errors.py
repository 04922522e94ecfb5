"""Every error that kvray raises, in one tree.

    KVRayError
     ├── ConfigError            a setting is wrong; nothing has been started or allocated
     ├── ArgumentError          what a caller handed over is not what is taken; a ValueError as well
     ├── NotAttachedError       an engine can not be attached, or is not
     ├── MissingPackageError    a package is not installed; an ImportError as well
     ├── UntrustedError         a folder, file or socket that another user could have put there
     ├── SlabError              the slab can not be made, locked or adopted
     │    └── SlabBusyError     another process works on it
     ├── RemoteProtocolError    the other side said something that it must not say
     │    ├── VersionMismatchError
     │    └── NamespaceMismatchError
     ├── NodeLostError          a node or an actor is gone
     └── LinkError              a transfer between two slabs failed

A miss, a full store, a stale hint and an unknown node are values, not errors. A bug is an assert.
"""


class KVRayError(Exception):
    """Base of all errors of kvray. The text says what was expected, what was found, what to do."""


class ConfigError(KVRayError):
    """A setting is unknown, out of range or does not fit this machine."""


class ArgumentError(KVRayError, ValueError):
    """An argument of a public method is not what it takes. Nothing was done."""


class NotAttachedError(KVRayError):
    """An engine can not be attached (busy, unknown version or mode), or is not attached."""


class MissingPackageError(KVRayError, ImportError):
    """What was asked for needs a package that is not installed; the text names what to install."""


class UntrustedError(KVRayError):
    """Something lies where only this user may put things, and is not this user's own."""


class SlabError(KVRayError):
    """The slab can not be created, locked in memory or adopted."""


class SlabBusyError(SlabError):
    """Another process holds the lock of this slab. kvray waits or fails; it never takes over."""


class RemoteProtocolError(KVRayError):
    """The other side of a socket or call broke the protocol; its connection is dropped."""


class VersionMismatchError(RemoteProtocolError):
    """The other side speaks another version of the wire or slab format."""


class NamespaceMismatchError(RemoteProtocolError):
    """Two engines whose cached bytes differ tried to share a name."""


class NodeLostError(KVRayError):
    """A node, its NodeStore or the directory does not answer any more."""


class LinkError(KVRayError):
    """A transfer between two slabs could not be started or ended badly."""
