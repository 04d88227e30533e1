"""The fast implementations equal the slow reference: logits, gradients and decoded codes."""

import json

import pytest
import torch

from magnet_train.__main__ import main
from magnet_train.common.errors import UserError
from magnet_train.decoding.decode import DecodingConfig, Networks, decode, item_noise
from magnet_train.dense import dense_logits, dense_networks
from magnet_train.loss import masked_cross_entropy
from magnet_train.model import Magnet, MagnetConfig

SIZE, T = 64, 77


OPTIONS = [
    {"context": 5},
    {"context": 5, "positions": "rotary"},
    {"context": 5, "positions": "both"},
    {"context": 5, "convolution": 7},
    {"context": (-1, 9, 2, 0), "positions": "rotary", "convolution": 3},
]


@pytest.fixture(params=OPTIONS, ids=["published", "rotary", "both", "convolution", "all"])
def model(request) -> Magnet:
    return Magnet(
        MagnetConfig(
            dim=32, num_heads=2, num_layers=3, codebook_size=SIZE, text_dim=16, **request.param
        )
    )


def text(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions of different lengths; the last is empty."""
    tokens = torch.arange(6)[None] < torch.tensor([6, 2, 0][:batch])[:, None]
    return torch.randn(batch, 6, 16) * tokens[..., None], tokens


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("padded", [False, True])
def test_logits_and_gradients(model, stage, padded):
    codes, (states, tokens) = torch.randint(SIZE + 1, (3, 4, T)), text(3)
    valid = (
        torch.arange(T)[None] < torch.tensor([[T], [50], [13]])
        if padded
        else torch.ones(3, T, dtype=torch.bool)
    )
    masked = (torch.rand(3, T) < 0.5) & valid
    targets = torch.randint(SIZE, (3, T))
    features = model.trunk(
        codes,
        model.config.stage(stage),
        model.encode_text(states, tokens),
        valid if padded else None,
    )
    slow = dense_logits(model, codes, stage, states, tokens, valid if padded else None)[:, stage]
    assert torch.allclose(model.logits(features, stage)[valid], slow[valid], atol=1e-5)
    gradients = []
    for logits in (model.logits(features[masked], stage), slow[masked]):
        loss = masked_cross_entropy(logits, targets, masked).mean()
        gradients.append(
            torch.autograd.grad(
                loss, list(model.parameters()), retain_graph=True, materialize_grads=True
            )
        )
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("arrangement", ["nonoverlap", "stride1"])
def test_decoded_codes(model, arrangement):
    states, tokens = text(3)
    config = DecodingConfig(decoding_steps=(4, 3, 2, 2), span_arrangement=arrangement)
    noise = item_noise(0, ["a", "b", "c"], 11, T)
    # With rotary positions and all frames masked, all frames are equal and rounding breaks ties, so
    # a few codes are given.
    codes = torch.randint(SIZE, (3, 4, T))
    fixed = torch.rand(3, T) < 0.1
    memory = model.encode_text(states, tokens)
    fast = decode(
        Networks(
            lambda c, s: model(c, model.config.stage(s), memory),
            lambda c, s: model(c, model.config.stage(s), None),
        ),
        codes,
        fixed,
        SIZE,
        config,
        noise,
    )
    assert torch.equal(
        fast,
        decode(Networks(*dense_networks(model, states, tokens)), codes, fixed, SIZE, config, noise),
    )


def test_bench_prints_a_table_and_writes_its_lines(tmp_path, capsys):
    file = tmp_path / "records" / "cpu.json"
    args = ["--num_frames", "64", "--repeats", "1", "--threads", "1", "--json", str(file)]
    assert main(["bench", "--only", "training", *args]) == 0
    lines = json.loads(file.read_text())
    assert [line["name"] for line in lines] == [
        "training step, stage 0",
        "training step, stages 1 and up",
    ]
    for line in lines:
        assert line["median_s"] > 0
        assert line["flop"] > 1e6
        assert line["ratio"] > 0
        assert line["peak_mb"] is not None
        assert line["min_s"] <= line["median_s"] <= line["max_s"]
        limit = 1e9 * line["settings"]["limit_gflops"]  # rounded
        assert line["share_of_limit"] == pytest.approx(
            line["flop"] / line["median_s"] / limit, rel=0.05
        )
    assert "training step, stage 0" in capsys.readouterr().out


def test_mistakes_of_bench_are_named():
    from magnet_train.checks.bench import bench
    from magnet_train.checks.measure import BenchOptions

    with pytest.raises(UserError, match="--only dancing: on cpu choose from start"):
        bench(BenchOptions(only=["dancing"]))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU here"):
            bench(BenchOptions(device="cuda"))
    with pytest.raises(UserError, match="--only gpu: on cpu choose from start"):
        bench(BenchOptions(only=["gpu"]))


def test_the_lines_of_a_gpu_come_out_on_a_cpu_too(monkeypatch):
    """The GPU benchmark with a tiny model and a compiler without code generation."""
    from magnet_train.checks import bench
    from magnet_train.checks.measure import BenchOptions
    from magnet_train.decoding.decode import DecodingConfig

    def forward(function, **_):
        return torch._dynamo.optimize("aot_eager", nopython=True)(function)

    monkeypatch.setattr(torch, "compile", forward)
    monkeypatch.setattr(bench, "DecodingConfig", lambda: DecodingConfig((2, 1, 1, 1)))
    monkeypatch.setattr(
        Magnet, "compile_blocks", lambda self: [b.compile(backend="aot_eager") for b in self.blocks]
    )
    config = MagnetConfig(dim=32, num_heads=2, num_layers=1, codebook_size=SIZE, text_dim=16)
    lines = list(bench.gpu(BenchOptions(num_frames=96, repeats=1, threads=1), 1e9, config))
    assert [line.name.split(",")[0] for line in lines] == [
        "codes of one prompt",
        "codes of 16 prompts",
        "training step",
        "training step",
    ]
    assert all(line.flop and line.share_of_limit for line in lines)
    torch._dynamo.reset()


def test_flop_that_count_are_those_of_the_products(model):
    """Compared with torch's count for a forward pass of stage 0, which has no window."""
    from magnet_train.checks.cost import useful_flop
    from magnet_train.checks.measure import count_flop

    states, tokens = torch.randn(1, 6, 16), torch.ones(1, 6, dtype=torch.bool)
    codes = torch.zeros(1, 4, T, dtype=torch.long)
    counted = count_flop(
        lambda: model(codes, model.config.stage(0), model.encode_text(states, tokens))
    )
    assert useful_flop(model.config, T, 0, T, 6) == pytest.approx(counted, rel=1e-6)
    assert useful_flop(model.config, T, 1, T, 6) < counted
