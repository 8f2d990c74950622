"""The examples of docs/extending.md are taken from the page, registered and used."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.statistics import STATISTICS, Kind
from batchnorm_service.engine.accumulators import ACCUMULATORS
from batchnorm_service.layers import Layers
from batchnorm_service.store.memory import MemoryStore
from layers.conftest import batch, evaluate, serving, train

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/extending.md"
ACCUMULATORS_PACKAGE = "batchnorm_service.engine.accumulators"
MOMENTUM, CHANNELS = 0.3, 3


def _blocks(section: str) -> list[str]:
    """The Python code of a section, as it stands in its files."""
    text = PAGE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return [
        textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    ]


def _entries(line: str, names: dict[str, Any]) -> dict[str, Any]:
    """Lines of a table."""
    return eval(f"{{{line}}}", names)


@pytest.fixture
def debiased(tmp_path: Path) -> Iterator[None]:
    """The kind of the page, registered as long as the test runs."""
    code, line, row = _blocks("A kind of statistics")
    (tmp_path / "debiased.py").write_text(code)
    name = f"{ACCUMULATORS_PACKAGE}.debiased"
    spec = importlib.util.spec_from_file_location(name, tmp_path / "debiased.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        for table, entries in (
            (ACCUMULATORS, _entries(line, vars(module))),
            (STATISTICS, _entries(row, {"Kind": Kind})),
        ):
            for kind, entry in entries.items():
                patch.setitem(table, kind, entry)
        LayerConfig.model_rebuild(force=True)  # in the source, the table is complete when the class is made
        yield
    LayerConfig.model_rebuild(force=True)


def _expected(batches: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    weights = MOMENTUM * (1 - MOMENTUM) ** np.arange(len(batches))[::-1]
    weights /= weights.sum()
    return weights @ [one.mean(0) for one in batches], weights @ [one.var(0, ddof=1) for one in batches]


async def _running(layers: Layers) -> tuple[np.ndarray, np.ndarray]:
    tensors = (await layers.get("a")).tensors
    return tensors["running_mean"].numpy(), tensors["running_var"].numpy()


async def _train_and_evaluate() -> None:
    batches = [batch(seed) for seed in range(1, 7)]
    config = LayerConfig(num_features=CHANNELS, statistics="debiased", momentum=MOMENTUM)
    store = MemoryStore(exclusive=False)
    async with serving(store) as layers, serving(store) as elsewhere:  # which reads what the first has written
        await layers.create("a", config)
        for one in batches[:3]:
            await train(layers, "a", one)
        np.testing.assert_allclose(await _running(layers), _expected(batches[:3]), rtol=1e-5)
        await asyncio.gather(*(train(layers, "a", one) for one in batches[3:]))  # they wait together
        mean, var = _expected(batches)
        output = (await evaluate(elsewhere, "a", batches[0])).output.numpy()
        np.testing.assert_allclose(output, (batches[0] - mean) / np.sqrt(var + config.eps), rtol=1e-4, atol=1e-5)
        assert (await layers.get("a")).num_batches_tracked == 6
        await layers.reset("a", "running_stats", None, None)
        np.testing.assert_array_equal(await _running(layers), [[0] * CHANNELS, [1] * CHANNELS])
        await train(layers, "a", batches[0])
        np.testing.assert_allclose(await _running(layers), _expected(batches[:1]), rtol=1e-5)


def test_a_layer_of_the_pages_kind_trains_and_evaluates(debiased: None) -> None:
    asyncio.run(_train_and_evaluate())


def test_the_pages_kind_is_checked_and_listed_like_the_others(debiased: None) -> None:
    assert LayerConfig(num_features=1, statistics="debiased").momentum == 0.1
    with pytest.raises(ValidationError, match="debiased statistics have a momentum"):
        LayerConfig(num_features=1, statistics="debiased", half_life=2.0)
    with pytest.raises(ValidationError, match="Input should be 'moving', 'population' or 'debiased'"):
        LayerConfig(num_features=1, statistics="biased")
    assert LayerConfig.model_json_schema()["properties"]["statistics"]["enum"] == list(STATISTICS)


def test_a_kind_that_is_not_registered_is_refused() -> None:
    with pytest.raises(ValidationError, match="Input should be 'moving' or 'population'"):
        LayerConfig(num_features=1, statistics="debiased")


def test_the_files_that_the_page_names_are_there() -> None:
    named = re.findall(r"`((?:service|client|tests|docs)/[\w/]+\.(?:py|md))`", PAGE.read_text())
    assert len(named) > 3
    for path in named:
        assert path.endswith("/debiased.py") or (ROOT / path).exists(), path
