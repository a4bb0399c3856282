"""How kernels are compiled: one at a time where Python calls it, as a part of its callers where another kernel does.

Numba's `njit` makes machine code and an entry from Python for every function, and optimises it with all that it calls.
In a tree of 250 kernels, four or five deep, that does the same work over and over: more than half of the time. A
function under `kernel` is translated once for its callers, without either; whatever Python calls is optimised as a
whole, and only that is kept on disk. Nobody else can call the parts of such a whole, so that LLVM may drop what they
do not read: a kernel hands on dozens of arrays, each of them six or more arguments.

References are not counted either, where a kernel makes no arrays: its caller holds all that it works on. Copying a row
of an array into another (`a[i] = b[j]`), sorting and reducing are making one to Numba; it refuses them at compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba.core import codegen, compiler
from numba.core.registry import CPUDispatcher

_ENTRY = {"nopython": True, "nogil": True}
_PART = _ENTRY | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


class _PartLibrary(codegen.JITCodeLibrary):
    """LLVM code that waits to be linked into that of an entry."""

    def _optimize_final_module(self) -> None:
        """Left to the entry."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0

    @property
    def codegen(self) -> Any:
        """Where Numba puts the environment of a function into machine code: there is none yet, see `_Entry`."""
        return self

    def set_env(self, name: str, env: Any) -> None:
        """See `codegen`."""


class _EntryLibrary(codegen.JITCodeLibrary):
    """Machine code of an entry, whose parts are its own."""

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            if function.linkage.name == "linkonce_odr":
                function.linkage = "internal"
        super()._optimize_final_module()


class _PartCompiler(compiler.Compiler):  # type: ignore[misc]
    _library: type[codegen.JITCodeLibrary] = _PartLibrary

    def compile_extra(self, func: Callable[..., Any]) -> Any:
        self.state.library = library = self._library(self.state.targetctx.codegen(), func.__qualname__)
        library.enable_object_caching()
        return super().compile_extra(func)


class _EntryCompiler(_PartCompiler):
    _library = _EntryLibrary


class _Entry(CPUDispatcher):  # type: ignore[misc]
    """A kernel as Python calls it, with its parts inside."""

    def add_overload(self, cres: Any) -> None:
        super().add_overload(cres)
        for environment in cres._find_referenced_environments():  # of the parts
            cres.target_context.codegen().set_env(environment.env_name, environment)


class Kernel(CPUDispatcher):  # type: ignore[misc]
    """A function that kernels take as a part and Python calls as an entry."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__(function, targetoptions=_PART | options, pipeline_class=_PartCompiler)
        self._entry = _Entry(function, targetoptions=_ENTRY | options, pipeline_class=_EntryCompiler)
        self._entry.enable_caching()

    def __call__(self, *args: Any) -> Any:
        """Runs machine code, made or loaded at the first call."""
        return self._entry(*args)


def kernel(function: Callable[..., Any] | None = None, *, allocates: bool = False, **options: Any) -> Any:
    """Decorator of a compiled function.

    Args:
        function: what is compiled.
        allocates: whether it makes arrays. The others count no references to those that they are given.
        **options: those of `numba.njit`, which always gets `nogil`.
    """
    if function is None:
        return lambda function: kernel(function, allocates=allocates, **options)
    return function if numba.config.DISABLE_JIT else Kernel(function, options | {"_nrt": allocates})
