"""One torch thread per test process, and no network."""

import os
import signal

os.environ.update(
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="passive",
    HF_HUB_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    WANDB_X_SERVICE_WAIT="300",
    TOKENIZERS_PARALLELISM="false",
)

import functools
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from docstring_parser.attrdoc import AttributeDocstrings
from helpers_warm import warm_python

torch.set_num_threads(1)
# A third of the time of building a parser: the source of each class is parsed once per process.
_attribute_docs = functools.cache(lambda cls: _get_attr_docs(AttributeDocstrings(), cls))
_get_attr_docs = AttributeDocstrings.get_attr_docs
AttributeDocstrings.get_attr_docs = lambda self, cls: _attribute_docs(cls)
# No deadline, because times depend on the machine's load; derandomised, so a commit cannot fail
# because of an example that it has not changed.
hypothesis.settings.register_profile(
    "busy",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("busy")


WANDB = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}


@pytest.fixture(autouse=True, scope="module")
def _own_wandb_session():
    """Remove the W&B session that a `fit` in this process sets in the environment."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ.update(WANDB)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # which a verb may change


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A `python` that has imported this package when it starts."""
    with warm_python(tmp_path_factory.mktemp("python")) as program:
        yield program


@pytest.fixture(scope="session")
def codec(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a codec that takes little time."""
    from helpers_data import make_data_codec

    return make_data_codec(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a codec, six shards of training items, and two validation items."""
    from helpers_resume import make_data

    return make_data(tmp_path_factory.mktemp("data"))


# --- the table of parity with the reference -------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption(
        "--parity-table",
        metavar="FILE",
        help="Markdown file for what was compared with the reference.",
    )


@pytest.fixture
def parity(record_property):
    """Called with case, the reference's result, our result, and the maximum difference."""
    return lambda case, theirs, ours, difference: record_property(
        "parity", [case, theirs, ours, difference]
    )


def pytest_terminal_summary(terminalreporter, config):
    passed = terminalreporter.stats.get("passed", [])
    rows = sorted(
        tuple(value)
        for report in passed
        for name, value in report.user_properties
        if name == "parity"
    )
    if not rows:
        return
    terminalreporter.section("compared with the reference, and the largest difference")
    for case, _, _, difference in rows:
        terminalreporter.write_line(f"{difference:>10}  {case}")
    if (path := config.getoption("--parity-table")) is not None:
        lines = ["| case | reference | ours | largest difference |", "|---|---|---|---|"]
        table = "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])
        with open(path, "w") as file:
            made = f"Written by `make parity`: CPU, float32, torch {torch.__version__}."
            file.write(f"# Parity with audiocraft 896ec7c\n\n{made}\n\n{table}\n")


@pytest.fixture(scope="session")
def tiny():
    """A Generator with a random network and the bundled codec and text encoder."""
    from magnet_train.codec.base import load_codec
    from magnet_train.conditioning import load_text_encoder
    from magnet_train.decoding.decode import DecodingConfig
    from magnet_train.generator import Generator
    from magnet_train.model import Magnet, MagnetConfig

    torch.manual_seed(0)
    codec, text = load_codec("demo"), load_text_encoder("demo")
    facts = codec.facts
    config = MagnetConfig(
        dim=32,
        num_heads=2,
        num_layers=2,
        num_codebooks=facts.num_codebooks,
        codebook_size=facts.codebook_size,
        text_dim=text.dim,
    )
    return Generator(
        Magnet(config).eval(),
        codec,
        text,
        DecodingConfig(decoding_steps=(3, 2, 2, 2, 2)),
        crop_s=1.0,
    )


@pytest.fixture(autouse=True)
def own_process():
    """Reset signals that a stopped run ignores, and the port of several ranks."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    ports = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")}
    yield
    for name, value in ports.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)
