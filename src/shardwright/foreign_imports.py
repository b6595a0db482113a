"""What PyTorch and Transformers import and a server seldom asks for: put off until it does, or left out.

Two thirds of what Transformers' modeling code takes to import are PyTorch's compiler, sharded tensors and SciPy, with
all that these import in turn. Of the compiler it needs three decorators, of the rest nothing before a model is trained.
Where PyTorch or Transformers come to be built otherwise, things are imported as they always were.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from threading import RLock, Thread
from types import FunctionType, ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_BY_ITSELF = "torch._dynamo._trace_wrapped_higher_order_op"
"""The one of its modules that Transformers imports, which does without the rest."""
_FOR_TRAINING = ("is_scipy_available", "is_torch_distributed_available", "is_accelerate_available")
"""Transformers' questions after what it imports to train: losses that match boxes, tensors sharded in its own way,
models spread over devices."""
_ASKS = "transformers.modeling_utils"
_SMALL_LIBRARIES = ("array", "asyncio", "csv", "markupsafe", "queue", "regex", "ssl", "unicodedata", "yaml")
"""That Transformers imports: once PyTorch's are being loaded, each waits until they are there."""


def postpone_compiler() -> None:
    """Put a module in the place of torch._dynamo that becomes it when something of it is needed.

    What code marks meanwhile, as modules do whose functions shall not be compiled, is marked when it comes.
    """
    spec = None if _COMPILER in sys.modules else importlib.util.find_spec(_COMPILER)
    import torch

    if spec is None or spec.loader is None or not hasattr(torch, "_disable_dynamo"):
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Postponed
    sys.modules[_COMPILER] = torch._dynamo = module
    with suppress(ImportError):
        import_module(_BY_ITSELF)
    if type(module) is _Postponed:
        del module.__path__  # who imports more of it asks for this first


@contextmanager
def compiler_off() -> Iterator[None]:
    """While open, torch.compile does nothing, even if it comes only now."""
    module = sys.modules.get(_COMPILER)
    if not isinstance(module, _Postponed):
        import torch

        with torch.compiler.set_stance("force_eager"):
            yield
        return
    module.num_off += 1
    try:
        yield
    finally:
        module.num_off -= 1
        if not module.num_off and type(module) is ModuleType:
            module.set_stance("default")


class _Postponed(ModuleType):
    """torch._dynamo before it is imported: the same object as afterwards, so that it does not matter who holds it."""

    _lock = RLock()
    num_off: int = 0
    """How many want that it compiles nothing."""

    def disable(self, fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        """As torch._dynamo.disable; the function that it makes imports torch._dynamo when it is called."""
        import torch

        # Such a function asks again then, and without wrapping: it would get itself.
        if options.get("wrapping", True) and (fn is None or isinstance(fn, FunctionType)):
            return torch._disable_dynamo(fn, recursive)  # type: ignore[attr-defined]  # PyTorch's own way to put it off
        return self._imported().disable(fn, recursive, **options)

    def allow_in_graph(self, fn: Any) -> Any:
        """As torch._dynamo.allow_in_graph."""
        self.__dict__.setdefault("_allowed", []).append(fn)
        return fn

    def assume_constant_result(self, fn: Any) -> Any:
        """As torch._dynamo.assume_constant_result."""
        fn._dynamo_marked_constant = True
        return fn

    def __getattr__(self, name: str) -> Any:
        with self._lock:
            if "_is_coming" in self.__dict__:  # asked for by what is just being imported
                raise AttributeError(f"module {_COMPILER!r} has no attribute {name!r} yet")
            return getattr(self._imported(), name)

    def _imported(self) -> ModuleType:
        with self._lock:
            spec = self.__spec__
            if type(self) is _Postponed and "_is_coming" not in self.__dict__:
                assert spec is not None
                assert spec.loader is not None
                assert spec.submodule_search_locations is not None
                self._is_coming = True
                self.__path__ = spec.submodule_search_locations
                try:
                    spec.loader.exec_module(self)
                    self.__class__ = ModuleType  # type: ignore[assignment]  # it has nothing to add from here on
                finally:
                    del self._is_coming
                for function in self.__dict__.pop("_allowed", []):
                    self.allow_in_graph(function)
                if self.__dict__.get("num_off"):
                    self.set_stance("force_eager")
            return self


def load_torch_ahead() -> None:
    """Begin to load PyTorch's libraries in the background: a quarter of a second in which Python can import others.

    The system's own function is called, as it is the one way to load a library without holding up Python. What cannot
    be loaded so is left to `import torch`.
    """
    spec = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or sys.platform != "linux":
        return
    for name in _SMALL_LIBRARIES:
        with suppress(ImportError):
            import_module(name)
    libraries = Path(spec.origin).parent / "lib"
    load = ctypes.CDLL(None).dlopen
    load.restype = ctypes.c_void_p

    def run() -> None:
        for name, scope in (("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch_python.so", os.RTLD_LOCAL)):
            load(os.fsencode(libraries / name), os.RTLD_NOW | scope)

    Thread(target=run, name="torch", daemon=True).start()


def leave_out_training() -> None:
    """Let Transformers believe for the rest of the process that what it trains with is not installed.

    For a process in which nobody's code runs but ours and Transformers' own, before any of its modeling code.
    """
    if _ASKS in sys.modules:
        return
    from transformers import utils
    from transformers.utils import import_utils

    for name in _FOR_TRAINING:
        if hasattr(utils, name) and hasattr(import_utils, name):
            setattr(utils, name, _never)
            setattr(import_utils, name, _never)


def _never(*args: Any, **options: Any) -> bool:
    return False
