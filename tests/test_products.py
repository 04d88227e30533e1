"""The choice between MKL and oneDNN for float32 products."""

import time

import pytest
import torch

from magnet_train.common import products
from magnet_train.tracking.environment import environment


@pytest.mark.parametrize(
    ("error", "seconds", "chosen"),
    [
        (2e-5, 0.4, "oneDNN"),
        (2e-5, 0.9, "default"),  # hardly faster
        (0.2, 0.1, "default"),  # rounded to bfloat16, as with AMX
    ],
)
def test_onednn_is_taken_only_if_exact_and_faster(monkeypatch, error, seconds, chosen):
    trials = {"highest": (1e-5, 1.0), "medium": (error, seconds)}
    monkeypatch.setattr(products, "_trial", lambda a, b, exact, precision: trials[precision])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert products.choose_products() == chosen
    assert environment(1)["float32_products"] == chosen


def test_waiting_for_a_processor_does_not_count(monkeypatch):
    """Otherwise a run that is resumed on a busy machine rounds differently."""
    product = torch.mm

    def wait(a, b):
        time.sleep(0.05)
        return product(a, b)

    monkeypatch.setattr(torch, "mm", wait)
    a = torch.eye(8)
    assert products._trial(a, a, a.double(), "highest")[1] < 0.04


def test_whatever_is_chosen_products_stay_exact():
    products.choose_products()
    a, b = torch.randn(300, 200), torch.randn(200, 300)
    assert torch.allclose(a @ b, (a.double() @ b.double()).float(), atol=1e-4, rtol=1e-5)
