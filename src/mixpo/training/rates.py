"""Rates of devices, from which a run's time is estimated: makers' figures for GPUs, and this machine's, measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mixpo.models.network import Precision

MEASURED_SECONDS = 0.2
"""Time for which each rate of this machine is measured."""


@dataclass(frozen=True)
class DeviceRates:
    """What a device can do, and the share of it that a run is assumed to reach."""

    name: str
    flops: dict[Precision, float]
    """Floating-point operations a second in matrix products."""
    bandwidth: float
    """Bytes a second that are read from memory."""
    memory: float
    """Bytes of memory; 0 where it is not looked up."""
    product_share: float
    """Share of the operations that passes reach."""
    bandwidth_share: float
    """Share of the bandwidth that decoding reaches."""

    def describe(self, precision: Precision) -> str:
        """The assumptions as one line."""
        return (
            f"{self.name}: {self.product_share:.0%} of {self.flops[precision] / 1e12:.3g} TFLOP/s in {precision}, and "
            f"decoding at {self.bandwidth_share:.0%} of {self.bandwidth / 1e9:,.0f} GB/s"
        )


def _make_card(name: str, bfloat16: float, float32: float, bandwidth: float, memory: float) -> DeviceRates:
    """Rates of a GPU from its data sheet: TFLOP/s (dense), TB/s and GB; the shares are assumed, not measured."""
    flops: dict[Precision, float] = {"bfloat16": bfloat16 * 1e12, "float32": float32 * 1e12}
    return DeviceRates(name, flops, bandwidth * 1e12, memory * 1e9, product_share=0.4, bandwidth_share=0.5)


CARDS = {
    "a100": _make_card("A100 80 GB", 312, 19.5, 2.04, 80),
    "h100": _make_card("H100 SXM", 989, 67, 3.35, 80),
    "h200": _make_card("H200 SXM", 989, 67, 4.8, 141),
    "b200": _make_card("B200", 2250, 75, 8.0, 180),
    "l40s": _make_card("L40S", 362, 91.6, 0.864, 48),
}
"""GPUs by the name that the command line takes."""


def measure_rates(precision: Precision) -> DeviceRates:
    """Measure this machine's rates for half a second: products of 1024 x 1024 matrices, and reading 256 MiB."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    left = torch.ones(1024, 1024, dtype=dtype)
    products = _measure_calls_per_second(lambda: left @ left)
    large = torch.ones(1 << 26)
    reads = _measure_calls_per_second(large.sum)
    flops: dict[Precision, float] = {precision: products * 2 * 1024**3}
    return DeviceRates("this machine", flops, reads * large.nbytes, 0, product_share=0.5, bandwidth_share=0.2)


def _measure_calls_per_second(work: Callable[[], object]) -> float:
    """Measure the calls of a function a second, after one that is not timed."""
    work()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < MEASURED_SECONDS:
        work()
        count += 1
    return count / (time.perf_counter() - started)
