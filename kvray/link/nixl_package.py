"""Which of NIXL's packages is loaded: one for each CUDA, of which `nixl` chooses one.

To choose, `import nixl` asks what CUDA torch was built for, and of a torch that was built for none
it asks torch itself (NIXL 1.5.1): a second of a core and 190 MiB in every NodeStore, at the moment
when peers wait for one that has come back. With such a torch any of the packages will do.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

_ANY_CUDA = ("nixl_cu13", "nixl_cu12")  # in the order in which `nixl` takes one where there is none


def load_nixl() -> Any:  # noqa: ANN401 (NIXL has no types)
    """The package, with its _api and its _bindings. Raises ImportError as `import nixl` does."""
    if "nixl" not in sys.modules and "torch" not in sys.modules and _is_torch_without_cuda():
        for name in _ANY_CUDA:
            if find_spec(name) is not None:
                return import_module(name)
    return import_module("nixl")


def _is_torch_without_cuda() -> bool:
    """By the name of its build, without loading it."""
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False
