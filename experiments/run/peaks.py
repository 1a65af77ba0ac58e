"""The peak FLOP/s of devices that are known."""

import re

# Of device_kind: the peaks, without sparsity, of products of bfloat16 and of float32 as
# JAX computes them by default: on Ampere and newer GPUs in TF32, on TPUs in bfloat16.
# None: the device has no such products.
# Sources: NVIDIA's data sheets and architecture papers of H100, H200, A100, L4, V100
# and T4, whose figures with sparsity are halved here; Google's pages of TPU v4, v5e,
# v5p and v6e, "peak compute per chip (bf16)". A part of a GPU (MIG) is not in the
# table.
_PEAKS: dict[str, tuple[float | None, float]] = {
    r"NVIDIA H100 \d+GB HBM3|NVIDIA H200": (989.4e12, 494.7e12),
    r"NVIDIA H100 NVL|NVIDIA H200 NVL": (835.5e12, 417.5e12),
    r"NVIDIA H100 PCIe": (756e12, 378e12),
    r"(NVIDIA )?A100-(SXM4|PCIE)-\d+GB|NVIDIA A100 80GB PCIe": (312e12, 156e12),
    r"NVIDIA L4": (121e12, 60e12),
    r"Tesla V100-SXM[23]-\d+GB(-LS)?": (None, 15.7e12),
    r"Tesla V100-PCIE-\d+GB": (None, 14e12),
    r"Tesla T4": (None, 8.1e12),
    r"TPU v4": (275e12, 275e12),
    r"TPU v5 lite|TPU v5e": (197e12, 197e12),
    r"TPU v5|TPU v5p": (459e12, 459e12),
    r"TPU v6 lite|TPU v6e": (918e12, 918e12),
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the peak FLOP/s of one device for matrix products, None if unknown.

    Args:
        device_kind: ``jax.Device.device_kind``.
        dtype: "bfloat16" or "float32", of the factors.

    Example:
        >>> peak_flops("NVIDIA H100 80GB HBM3", "bfloat16")
        989400000000000.0
        >>> peak_flops("cpu", "float32") is None
        True
    """
    for pattern, (bfloat16, float32) in _PEAKS.items():
        if re.fullmatch(pattern, device_kind):
            return bfloat16 if dtype == "bfloat16" else float32
    return None
