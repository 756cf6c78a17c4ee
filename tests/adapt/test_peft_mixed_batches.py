"""`adapter_names=`: each row of a batch is computed with its own adapter, as it is alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("peft")

from peft_models import FITS, KINDS, Made, shake, tuned

from eigenzoo.errors import UsageError
from eigenzoo.integrations.peft_tuner import EigenzooConfig
from tolerance import tolerance

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*layers of the bundle are no weights of linear layers"),
]
ADAPTERS = [name for name, fit in FITS.items() if fit.of == "adapters"]
CLOSE = {"atol": tolerance(64, dtype=torch.float32, scale=4), "rtol": 2e-5}


def rows(case: Made, order: list[int]) -> dict[str, torch.Tensor]:
    return {name: values[order] for name, values in KINDS[case.kind].inputs.items()}


@pytest.mark.parametrize("name", list(FITS))
def test_rows_are_computed_with_their_adapters(made: Callable[[str], Made], name: str) -> None:
    """Adapters of one basis, with and without the mean, and the base."""
    case = made(name)
    model = tuned(case, start="m0")
    for adapter, start in {"second": "m1", "third": "zero", "fourth": "m3"}.items():
        model.add_adapter(adapter, EigenzooConfig(bundle=str(case.bundle), start=start))
    shake(model)
    model.eval()
    names = ["second", "__base__", "default", "third", "second", "fourth"]
    batch = rows(case, [0, 1, 2, 0, 1, 2])
    with torch.no_grad():
        found = model(**batch, adapter_names=names)
        found = getattr(found, "logits", found)
        for row, adapter in enumerate(names):
            if adapter == "__base__":
                with model.disable_adapter():
                    alone = model(**batch)
            else:
                model.set_adapter(adapter)
                alone = model(**batch)
            expected = getattr(alone, "logits", alone)[row]
            if adapter == "__base__":
                assert torch.equal(found[row], expected)
            torch.testing.assert_close(found[row], expected, **CLOSE)
    assert float((found[0] - found[4]).abs().max()) > 1e-3


def test_generation_with_beams(made: Callable[[str], Made]) -> None:
    case = made("llama-sides")
    model = tuned(case, start="m0")
    model.add_adapter("second", EigenzooConfig(bundle=str(case.bundle), start="m1"))
    model.eval()
    batch, names = rows(case, [0, 1, 2]), ["second", "__base__", "default"]
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    found = model.generate(**batch, **how, adapter_names=names)
    for row, adapter in enumerate(names):
        one = {name: values[row : row + 1] for name, values in batch.items()}
        alone = model.generate(**one, **how, adapter_names=[adapter])
        assert torch.equal(found[row : row + 1], alone)


def test_names_that_no_layer_has_training_and_merged_adapters_are_refused(made: Callable[[str], Made]) -> None:
    case = made("llama-sides")
    model = tuned(case, start="m0")
    batch = rows(case, [0, 1, 2])
    with pytest.raises(ValueError, match="adapter_names has 'other', which no layer of the model has"):
        model(**batch, adapter_names=["default", "other", "default"])
    with pytest.raises(UsageError, match="gets 3 rows, but 2 models are named"):
        model(**batch, adapter_names=["default", "default"])
    model.train()
    with pytest.raises(ValueError, match="adapter_names is given in training mode"):
        model(**batch, adapter_names=["default"] * 3)
    model.eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters are merged. Call unmerge_adapter\(\) first"):
        model(**batch, adapter_names=["default"] * 3)
