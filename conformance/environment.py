"""Where a verdict was reached: the fingerprint of machine and software that every report carries.

Taken inside the worker, where the framework is loaded anyway. A fact that cannot be found out is left out.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

PACKAGES = (
    "attnspec",
    "numpy",
    "torch",
    "triton",
    "jax",
    "jaxlib",
    "onnx",
    "onnxruntime",
    "transformers",
    "tinygrad",
    "ml_dtypes",
)


def fingerprint(framework: str, device: str) -> dict[str, str]:
    """Name to text: framework with version, device with its name, platform, CPU, cores, threads, package
    versions."""
    facts = {
        "framework": framework,
        "version": _version(framework) or "unknown",
        "device": device,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": str(_cores()),
    }
    if framework == "torch":
        facts |= _torch(device)
    for package in PACKAGES:
        version = _version(package)
        if version is not None:
            facts[package] = version
    for variable in ("TRITON_INTERPRET", "JAX_ENABLE_X64", "NVIDIA_TF32_OVERRIDE"):
        if variable in os.environ:
            facts[variable] = os.environ[variable]
    return {name: text for name, text in facts.items() if text}


def _torch(device: str) -> dict[str, str]:
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    facts = {
        "threads": str(torch.get_num_threads()),
        "cpu_capability": str(torch.backends.cpu.get_cpu_capability()),
    }
    if device == "cuda" and torch.cuda.is_available():
        facts["gpu"] = str(torch.cuda.get_device_name())
        facts["cuda"] = str(torch.version.cuda or torch.version.hip or "")
        facts["tf32"] = str(torch.backends.cuda.matmul.allow_tf32)
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    with contextlib.suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
