"""The choice between MKL and oneDNN for float32 products."""

import subprocess
import sys

import pytest
import torch

from magnet_train.common import products
from magnet_train.tracking.environment import environment

AMD = {"cpu_name": "AMD EPYC 9655", "avx512_f": True}


@pytest.fixture(autouse=True)
def _restore_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("facts", "error", "chosen"),
    [
        (AMD, 2e-5, "oneDNN"),
        (AMD, 0.2, "default"),  # rounded to bfloat16, as with AMX
        (AMD | {"avx512_f": False}, 2e-5, "default"),
        ({"cpu_name": "Intel Xeon 6", "avx512_f": True}, 2e-5, "default"),
        ({}, 2e-5, "default"),
    ],
)
def test_onednn_is_taken_only_where_it_is_exact_and_mkl_is_slow(monkeypatch, facts, error, chosen):
    errors = {"highest": 1e-5, "medium": error}

    def product_error(precision):
        torch.set_float32_matmul_precision(precision)
        return errors[precision]

    monkeypatch.setattr(products, "_product_error", product_error)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: facts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert products.choose_products() == chosen
    assert environment(1)["float32_products"] == chosen


def test_a_start_chooses_as_the_one_before():
    """Otherwise a resumed run rounds differently."""
    command = "from magnet_train.common.products import choose_products; print(choose_products())"
    starts = [
        subprocess.run(
            [sys.executable, "-c", command], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(3)
    ]
    assert len(set(starts)) == 1


def test_whatever_is_chosen_products_stay_exact():
    products.choose_products()
    a, b = torch.randn(300, 200), torch.randn(200, 300)
    assert torch.allclose(a @ b, (a.double() @ b.double()).float(), atol=1e-4, rtol=1e-5)
