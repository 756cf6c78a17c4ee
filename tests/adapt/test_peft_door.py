"""`import eigenzoo.integrations` is all that a process needs before PEFT loads an adapter; each test is a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from guard import HANG

ORDERS = {
    "before PEFT": "import eigenzoo.integrations\nfrom peft import PeftModel",
    "after PEFT": "from peft import PeftModel\nimport eigenzoo.integrations",
    "through another engine": "from eigenzoo.integrations.transformers_names import saved_names\nfrom peft import PeftModel",
}


def run(code: str, *words: object) -> str:
    """What a fresh interpreter prints; whatever it warns of on standard error is shown where it fails."""
    called = [sys.executable, "-W", "ignore::FutureWarning", "-c", code, *map(str, words)]
    done = subprocess.run(called, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "order", [*list(ORDERS)[:1], *(pytest.param(order, marks=pytest.mark.slow) for order in list(ORDERS)[1:])]
)
@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")
def test_a_fresh_process_loads_what_peft_has_saved(made: Callable[[str], object], tmp_path: Path, order: str) -> None:
    pytest.importorskip("peft")
    import torch
    from peft_models import TOKENS, shake, tuned

    case = made("llama-sides")
    model = tuned(case)
    shake(model)
    case.base().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "saved")
    code = f"""
import sys
{ORDERS[order]}
import torch, transformers
model = PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[3])).logits, sys.argv[4])
"""
    torch.save(TOKENS["input_ids"], tmp_path / "tokens.pt")
    run(code, tmp_path / "base", tmp_path / "saved", tmp_path / "tokens.pt", tmp_path / "found.pt")
    assert torch.equal(torch.load(tmp_path / "found.pt"), case.outputs(model))


def test_the_door_is_light_and_opens_without_peft(tmp_path: Path) -> None:
    """Nothing of PEFT is imported before the user does it, and nothing fails where it is not installed or too old."""
    light = "import eigenzoo.integrations, sys; print(*sorted({'peft', 'transformers', 'torch'} & set(sys.modules)))"
    assert run(light).strip() == ""
    missing = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")
sys.meta_path.insert(0, Missing())
import eigenzoo.integrations
try:
    import peft
except ModuleNotFoundError as error:
    print(error)
"""
    assert run(missing).strip() == "No module named 'peft'"
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("value = 7\n")
    old = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
import eigenzoo.integrations
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft
print(peft.value, *[str(each.message).split(":")[0] for each in caught if "eigenzoo" in str(each.message)])
"""
    assert run(old, tmp_path).startswith("7 eigenzoo cannot be a method of this PEFT")
