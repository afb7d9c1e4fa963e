"""Compiles the kernels' own sources for the CPU: each instance is one entry of a table.

The sources are included as they are; only primitives.cuh is replaced (by device.h), and FW_* macros
choose the instance, as they do on a GPU.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import fusewise.backends.native.cuda

if TYPE_CHECKING:
    from fusewise.backends.native.instance import Instance

HERE = Path(__file__).parent
KERNELS = Path(fusewise.backends.native.cuda.__file__).parent
FLAGS = ["-std=c++17", "-Og", "-fPIC", "-ffp-contract=off", "-fno-gnu-unique", "-U_FORTIFY_SOURCE",
         "-Wno-unknown-pragmas", f"-I{HERE}"]  # fmt: skip
COPY = 0  # the table's first entry


class CopyParams(ctypes.Structure):
    """The copying kernel's parameter; library.h."""

    _fields_: ClassVar = [
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("count", ctypes.c_longlong),
        ("hasty", ctypes.c_int),
    ]


def source_of(instance: Instance, number: int) -> str:
    """The kernel's own file, included under a name of its own, and its entry of the table."""
    params = "".join(part.capitalize() for part in instance.kernel.split("_")) + "Params"
    macros = [
        *instance.defines(),
        ("FW_SHARED_SECTION", f'"shared_{number}"'),
        (instance.function, f"kernel_{number}"),
    ]
    return "\n".join(
        [
            *(f"#define {name} {value}" for name, value in macros),
            f'#include "{instance.kernel}.cu"',
            *(f"#undef {name}" for name, _ in macros),
            f'extern "C" char __start_shared_{number}[] __attribute__((weak));',
            f'extern "C" char __stop_shared_{number}[] __attribute__((weak));',
            f"extern const emulator::Kernel entry_{number} = {{",
            f"    [](const void* p) {{ kernel_{number}(*static_cast<const {params}*>(p)); }},",
            f"    sizeof({params}), __start_shared_{number}, __stop_shared_{number}}};\n",
        ]
    )


def build(instances: list[Instance], folder: Path, kernels: Path = KERNELS) -> ctypes.CDLL:
    """Compiles the instances into a library in ``folder``.

    Entry ``i + 1`` of its table is ``instances[i]``. Raises AssertionError with the compiler's
    words if a source does not compile.
    """
    sources = {path.stem: path.read_text() for path in HERE.glob("*.cpp")}
    for part in range(0, len(instances), 6):
        numbered = enumerate(instances[part : part + 6], part + 1)
        sources[f"kernels_{part}"] = '#include "device.h"\n' + "".join(
            source_of(instance, number) for number, instance in numbered
        )
    numbers = range(1, len(instances) + 1)
    sources["table"] = "\n".join(
        [
            '#include "device.h"',
            '#include "library.h"',
            *(f"extern const emulator::Kernel entry_{i};" for i in numbers),
            "const emulator::Kernel copy{copy_words, sizeof(CopyParams), nullptr, nullptr};",
            f"const emulator::Kernel* const kKernels[] = {{&copy, "
            f"{', '.join(f'&entry_{i}' for i in numbers)}}};\n",
        ]
    )
    _objects()  # before several threads want it
    library = folder / "emulator.so"
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda name: _object(sources[name], kernels), sources))
    _run(["g++", "-shared", *map(str, objects), "-o", str(library)])
    return ctypes.CDLL(str(library))


@functools.cache
def _objects() -> Path:
    """What this process has compiled: the engine is the same for every library and mutant.

    So is the header that their sources begin with, half of what a compilation costs: g++ prefers
    its compiled form, which lies beside them.
    """
    folder = Path(tempfile.mkdtemp(prefix="emulator-"))
    atexit.register(shutil.rmtree, folder)
    header = ["-x", "c++-header", str(HERE / "device.h"), "-o", str(folder / "device.h.gch")]
    _run(["g++", *FLAGS, *header])
    return folder


def _object(source: str, kernels: Path) -> Path:
    included = [*HERE.glob("*.h"), *HERE.glob("*.cuh")]
    if '.cu"' in source:
        included += [*kernels.glob("*.cu"), *kernels.glob("*.cuh")]
    texts = [source, *(path.read_text() for path in sorted(included)), *FLAGS]
    name = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    file, target = (_objects() / f"{name}.{kind}" for kind in ("cpp", "o"))
    if not target.exists():
        file.write_text(source)
        _run(["g++", *FLAGS, f"-I{kernels}", "-c", str(file), "-o", str(target)])
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
