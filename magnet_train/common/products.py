"""float32 matrix products through oneDNN, where that is exact to float32 and faster.

On a CPU, torch multiplies float32 matrices with MKL, which uses only AVX2 on processors that are
not made by Intel. oneDNN, in the same wheel, uses AVX-512 there. torch calls it at precision
"medium", which allows bfloat16; oneDNN then still computes in float32, except on CPUs with AMX,
where it rounds to bfloat16. So a trial product decides.
"""

import time

import torch
from torch import Tensor

MAX_ERROR = 4.0
"""Maximum error of oneDNN's product, in multiples of the default's."""
MAX_TIME = 2 / 3
"""Maximum time of oneDNN's product, as a share of the default's. It is far from 1 and from 0.45, as
measured on a Zen 5, so that chance does not change the choice and thus a run's rounding."""


@torch.no_grad()
def choose_products() -> str:
    """Choose between MKL and oneDNN for float32 products on the CPU; returns the name.

    Does nothing if there is a GPU, because the setting would apply to the GPU's products too.
    """
    if torch.cuda.is_available():
        return products()
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1024, 256, generator=generator)
    b = torch.randn(256, 1024, generator=generator)
    exact = a.double() @ b.double()
    error, seconds = _trial(a, b, exact, "highest")
    other_error, other_seconds = _trial(a, b, exact, "medium")
    is_better = other_error <= MAX_ERROR * error and other_seconds <= MAX_TIME * seconds
    torch.set_float32_matmul_precision("medium" if is_better else "highest")
    return products()


def products() -> str:
    """Library of float32 products on the CPU ("oneDNN" or "default"), for `environment.json`."""
    return "oneDNN" if torch.get_float32_matmul_precision() == "medium" else "default"


def _trial(a: Tensor, b: Tensor, exact: Tensor, precision: str) -> tuple[float, float]:
    """Maximum error of a product, and the minimum of five CPU times in seconds.

    On a busy machine, times on the clock change from one call to the next, and the choice with
    them, so that a resumed run would round differently.
    """
    torch.set_float32_matmul_precision(precision)
    error = float((a @ b - exact).abs().max())
    seconds = []
    for _ in range(5):
        start = time.process_time()
        torch.mm(a, b)
        seconds.append(time.process_time() - start)
    return error, min(seconds)
