"""Loading a cubin and launching it with as little Python per call as there can be.

Kernels are loaded and described through ``cuda.core`` and ``cuda.bindings``; a call goes to the
driver's own ``cuLaunchKernelEx`` by ctypes, which makes no object. Everything a shape fixes is
prepared once; a call writes a few pointers. Knows no protocol.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fusewise.backends.native.cuda.build import cubin
from fusewise.backends.native.cuda.cubin_cache import CubinCache
from fusewise.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fusewise.backends.native.instance import Instance
    from fusewise.backends.native.variants import LaunchShape


class Kernels:
    """The instances one device has loaded.

    Args:
        sm: the device's architecture, 90 for sm_90.
        multiprocessors: how many it has.
        cache: where cubins are kept.
    """

    def __init__(self, sm: int, multiprocessors: int, cache: CubinCache | None = None) -> None:
        self.sm, self._multiprocessors = sm, multiprocessors
        self._cache = cache or CubinCache()
        self._loaded: dict[Instance, Any] = {}

    def load(self, instance: Instance) -> Any:
        """The kernel, compiled and loaded at first use; also while a graph is captured.

        Raises:
            UnavailableError: it cannot be compiled or loaded.
        """
        found = self._loaded.get(instance)
        if found is None:
            from cuda.core import ObjectCode

            code = self.machine_code(instance)
            with _relaxed_capture():
                found = ObjectCode.from_cubin(code).get_kernel(instance.function)
                self._loaded[instance] = found
        return found

    def machine_code(self, instance: Instance) -> bytes:
        """The instance's cubin, from the cache or compiled now."""
        return cubin(instance, self.sm, self._cache)

    def prepare(
        self, shape: LaunchShape, parameters: ctypes.Structure, ranks_here: int = 1
    ) -> PreparedLaunch:
        """A launch of ``shape`` with ``parameters``, on a grid that fits the device at once.

        Args:
            shape: instance, threads and wanted workers.
            parameters: the kernel's only argument; read anew at every call.
            ranks_here: blockIdx.y: virtual ranks that share this device, in a cooperative launch.
        """
        prepared, resident = self._prepared(shape, parameters, ranks_here)
        if shape.instance.one_pass and shape.workers > resident:
            prepared, _ = self._prepared(shape.looped(), parameters, ranks_here)
        return prepared

    def _prepared(
        self, shape: LaunchShape, parameters: ctypes.Structure, ranks_here: int
    ) -> tuple[PreparedLaunch, int]:
        """The launch, and how many row workers fit on the device at once."""
        from cuda.bindings import driver

        kernel = self.load(shape.instance)
        function = driver.CUfunction(int(kernel.handle))
        config = driver.CUlaunchConfig()
        config.blockDimX, config.blockDimY, config.blockDimZ = shape.threads, 1, 1
        config.gridDimX, config.gridDimY, config.gridDimZ = shape.instance.blocks, ranks_here, 1
        attributes = _attributes(shape, cooperative=ranks_here > 1)
        config.attrs, config.numAttrs = attributes, len(attributes)
        resident = self._resident_workers(function, config, shape) // ranks_here
        config.gridDimX = shape.grid(resident)
        return PreparedLaunch(function, config, parameters, kernel), resident

    def _resident_workers(self, function: Any, config: Any, shape: LaunchShape) -> int:
        """Row workers, each all the blocks of a row or tile, that fit on the device at once."""
        from cuda.bindings import driver

        if shape.instance.cluster > 1:
            return int(_checked(driver.cuOccupancyMaxActiveClusters(function, config)))
        blocks = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, shape.threads, 0)
        return int(_checked(blocks)) * self._multiprocessors // shape.instance.blocks


class PreparedLaunch:
    """One kernel with its grid and its parameters; calling it enqueues it on a raw stream.

    The driver copies the parameters during the call, so they may be changed for the next one.
    """

    __slots__ = ("_arguments", "_arguments_at", "_config", "_config_at", "_function", "_kernel",
                 "_launch", "_stream", "output", "parameters")  # fmt: skip

    def __init__(
        self, function: Any, config: Any, parameters: ctypes.Structure, kernel: Any
    ) -> None:
        self.parameters = parameters
        self.output: Any = getattr(parameters, "output", None)  # a view, made once
        self._function, self._kernel = int(function), kernel  # the kernel keeps its code loaded
        self._config, self._config_at = config, config.getPtr()
        self._arguments = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        self._arguments_at = ctypes.addressof(self._arguments)
        self._launch = driver_launch()
        self._stream = -1

    def __call__(self, stream: int) -> None:
        """Enqueues the kernel.

        Raises:
            UnavailableError: the driver refused the launch.
        """
        if stream != self._stream:
            self._set_stream(stream)
        if status := self._launch(self._config_at, self._function, self._arguments_at, None):
            raise _refused("the native kernel was not launched", status)

    def _set_stream(self, stream: int) -> None:
        from cuda.bindings import driver

        self._config.hStream = driver.CUstream(stream)
        self._stream = stream


@lru_cache(maxsize=1)
def driver_launch() -> Callable[[int, int, int, None], int]:
    """The driver's ``cuLaunchKernelEx(config, function, arguments, extra)``; returns a CUresult.

    Releases the interpreter's lock: where a stream's queue is full, the call waits for the device.
    """
    found = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx  # loaded by torch long before
    found.argtypes = (ctypes.c_void_p,) * 4
    return found


def _attributes(shape: LaunchShape, cooperative: bool) -> list[Any]:
    from cuda.bindings import driver

    kinds = driver.CUlaunchAttributeID
    attributes = []
    if shape.dependent_launch and not cooperative:
        dependent = driver.CUlaunchAttribute()
        dependent.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        dependent.value.programmaticStreamSerializationAllowed = 1
        attributes.append(dependent)
    if shape.instance.cluster > 1:
        cluster = driver.CUlaunchAttribute()
        cluster.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x = shape.instance.cluster
        cluster.value.clusterDim.y = cluster.value.clusterDim.z = 1
        attributes.append(cluster)
    if cooperative:
        together = driver.CUlaunchAttribute()
        together.id = kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        together.value.cooperative = 1
        attributes.append(together)
    return attributes


def _checked(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if status:
        raise _refused("the CUDA driver refused", status)
    return values[0] if values else None


def _refused(what: str, status: int) -> UnavailableError:
    from cuda.bindings import driver

    names = {int(one): one.name for one in driver.CUresult}
    return UnavailableError(what, got=names.get(int(status), str(status)))


@contextmanager
def _relaxed_capture() -> Iterator[None]:
    """Lets this thread load code although some stream is being captured."""
    from cuda.bindings import driver

    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = _checked(driver.cuThreadExchangeStreamCaptureMode(relaxed))
    try:
        yield
    finally:
        _checked(driver.cuThreadExchangeStreamCaptureMode(before))
