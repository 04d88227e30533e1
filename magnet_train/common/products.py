"""float32 matrix products through oneDNN, where it is exact to float32 and MKL is slow.

On a CPU, torch multiplies float32 matrices with MKL, which uses only AVX2 on processors of AMD.
oneDNN, in the same wheel, uses AVX-512 there. torch calls it at precision "medium", which allows
bfloat16; oneDNN then still computes in float32, except on CPUs with AMX, where it rounds to
bfloat16.

The choice depends on the processor alone. A timed trial chose differently from one start to the
next, and the two libraries round differently, so that a resumed run was not bit-equal.
"""

import torch

MAX_ERROR = 4.0
"""Maximum error of oneDNN's product, in multiples of the default's."""


@torch.no_grad()
def choose_products() -> str:
    """Choose between MKL and oneDNN for float32 products on the CPU; returns the name.

    Does nothing if there is a GPU, because the setting would apply to the GPU's products too.
    """
    if not torch.cuda.is_available():
        torch.set_float32_matmul_precision("highest")
        if _mkl_is_slow():
            default_error = _product_error("highest")
            if _product_error("medium") > MAX_ERROR * default_error:
                torch.set_float32_matmul_precision("highest")
    return products()


def products() -> str:
    """Library of float32 products on the CPU ("oneDNN" or "default"), for `environment.json`."""
    return "oneDNN" if torch.get_float32_matmul_precision() == "medium" else "default"


def _mkl_is_slow() -> bool:
    """Whether the processor is one of AMD with AVX-512, which MKL does not use."""
    facts = torch.cpu.get_capabilities()
    return facts.get("cpu_name", "").startswith("AMD") and bool(facts.get("avx512_f"))


def _product_error(precision: str) -> float:
    """Maximum error of one product at a precision of torch, which stays set."""
    torch.set_float32_matmul_precision(precision)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(256, 256, generator=generator)
    b = torch.randn(256, 256, generator=generator)
    return float((a @ b - a.double() @ b.double()).abs().max())
