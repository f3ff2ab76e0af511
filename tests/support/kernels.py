"""Other kernels than this machine's own, for a subprocess: as if it ran on an old processor.

As a pytest plugin (`-p tests.support.kernels`) it refuses to run tests with any other kernels, so that no run passes
because a library did not honour its variable. What each library honours was tried out with torch 2.14,
FAISS 1.15, numpy 2.4.
"""

from __future__ import annotations

import hashlib
import os
import platform

import numpy as np
import pytest

ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "default",  # torch's own loops
    "MKL_CBWR": "COMPATIBLE",  # torch's products; MKL_ENABLE_INSTRUCTIONS has no effect on AMD
    "ONEDNN_MAX_CPU_ISA": "SSE41",  # torch's convolutions
    "OPENBLAS_CORETYPE": "Nehalem",  # numpy's and FAISS's products
    "FAISS_SIMD_LEVEL": "NONE",  # FAISS_OPT_LEVEL chooses among builds, and this wheel has one for all levels
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",  # numpy's own loops
}
WIDTH = 64


def environment() -> dict[str, str]:
    """This process's environment, for a subprocess with other kernels."""
    return os.environ | ENVIRONMENT


def differ_here() -> bool:
    """Whether this machine has other kernels than those of `ENVIRONMENT`."""
    import torch

    return platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() != "DEFAULT"


def in_use() -> dict[str, str]:
    """The kernels of this process as the libraries name them."""
    import faiss
    import torch
    from threadpoolctl import threadpool_info

    blas = sorted({item["architecture"] for item in threadpool_info() if item["internal_api"] == "openblas"})
    return {
        "torch": torch.backends.cpu.get_cpu_capability(),
        "faiss": faiss.SIMDConfig.get_level_name(),
        "openblas": ", ".join(blas),
    }


def roundings() -> dict[str, str]:
    """Digests of some products by each library: equal where the kernels are."""
    import faiss
    import torch

    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((200, WIDTH)).astype(np.float32) for _ in range(2))
    images, filters = torch.tensor(left[:192].reshape(4, 3, 32, 32)), torch.tensor(right[:27].reshape(64, 3, 3, 3))
    rotation = faiss.LinearTransform(WIDTH, WIDTH, False)
    faiss.copy_array_to_vector(right[:WIDTH].reshape(-1), rotation.A)
    rotation.is_trained = True
    found = {
        "numpy": left @ right.T,
        "torch": (torch.tensor(left) @ torch.tensor(right).T).numpy(),
        "oneDNN": torch.nn.functional.conv2d(images, filters).numpy(),
        "faiss": rotation.apply(left),
    }
    return {name: hashlib.sha256(product.tobytes()).hexdigest()[:16] for name, product in found.items()}


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run with this machine's own kernels."""
    expected = {"torch": "DEFAULT", "faiss": "NONE", "openblas": "Nehalem"}
    if (found := in_use()) != expected:
        raise pytest.UsageError(f"these are not the other kernels: expected {expected}, found {found}")
