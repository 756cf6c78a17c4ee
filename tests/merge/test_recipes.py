"""Recipes in mergekit's YAML give what mergekit gives, and adapters among them need no base."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from builders import read_update, seeded
from eigenzoo.errors import FormatError, UnsupportedError, UsageError
from eigenzoo.merge.methods import METHODS
from eigenzoo.merge.recipe import depths, read_recipe
from eigenzoo.merge.recipe_merging import TRANSLATIONS, merge_recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

CONFIG = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=40,
    tie_word_embeddings=False,
)
CLOSE = 1e-5
"""Of the norm: mergekit computes in float32, and takes entries of nearly equal size in another order."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three fine-tunes and three adapters of it."""
    root = tmp_path_factory.mktemp("recipes")
    torch.manual_seed(0)
    base = LlamaForCausalLM(CONFIG)
    base.save_pretrained(root / "base")
    for number in range(3):
        tuned, draw = LlamaForCausalLM(CONFIG), seeded(number)
        with torch.no_grad():
            for name, values in tuned.state_dict().items():
                values.copy_(base.state_dict()[name] + 0.1 * torch.randn(values.shape, generator=draw))
        tuned.save_pretrained(root / f"m{number}")
        model = get_peft_model(
            LlamaForCausalLM.from_pretrained(root / "base"),
            LoraConfig(
                r=2 + number, lora_alpha=4, use_rslora=number == 1, target_modules=["q_proj", "v_proj", "down_proj"]
            ),
        )
        with torch.no_grad():
            for name, values in model.named_parameters():
                if "lora_B" in name:
                    values.copy_(torch.randn(values.shape, generator=draw))
        model.save_pretrained(root / f"lora{number}")
    return root


ALL_THREE = "models: [{{model: {root}/m0}}, {{model: {root}/m1}}, {{model: {root}/m2}}]\n"

RECIPES = {
    "linear, the base among the models": """
merge_method: linear
base_model: {root}/base
models:
  - {{model: {root}/base, parameters: {{weight: 0.5}}}}
  - {{model: {root}/m0, parameters: {{weight: [0.2, 1.0]}}}}
  - {{model: {root}/m1, parameters: {{weight: 0.7}}}}
dtype: float32
""",
    "ties with gradients and filters": """
merge_method: ties
base_model: {root}/base
models:
  - {{model: {root}/m0, parameters: {{density: [0.9, 0.3, 0.6], weight: [{{filter: mlp, value: 0.5}}, {{value: 1.2}}]}}}}
  - {{model: {root}/m1, parameters: {{weight: -0.3}}}}
  - {{model: {root}/m2, parameters: {{density: 0.4, weight: [{{filter: q_proj, value: [0.1, 0.9]}}, {{value: 0.8}}]}}}}
parameters: {{density: 0.5, lambda: 0.8}}
dtype: float32
""",
    "slerp over the depth": """
merge_method: slerp
base_model: {root}/base
models:
  - model: {root}/base
  - model: {root}/m0
parameters:
  t:
    - {{filter: self_attn, value: [0, 0.5, 0.3]}}
    - {{filter: mlp, value: [1, 0.5, 0.7]}}
    - value: 0.5
dtype: float32
""",
    "task arithmetic, normalised, in half precision": """
merge_method: task_arithmetic
base_model: {root}/base
models:
  - {{model: {root}/m0, parameters: {{weight: 0.6}}}}
  - {{model: {root}/m1, parameters: {{weight: 0.9}}}}
parameters: {{normalize: true, lambda: [0.5, 1.5]}}
dtype: float32
out_dtype: bfloat16
""",
    "breadcrumbs": """
merge_method: breadcrumbs
base_model: {root}/base
models:
  - {{model: {root}/m0, parameters: {{weight: 0.6, density: 0.5, gamma: 0.05}}}}
  - {{model: {root}/m1, parameters: {{weight: 0.9}}}}
parameters: {{density: 0.8}}
dtype: float32
""",
    "sce": "merge_method: sce\nbase_model: {root}/base\n"
    + ALL_THREE
    + "parameters: {{select_topk: 0.5}}\ndtype: float32\n",
    "karcher": "merge_method: karcher\n" + ALL_THREE + "parameters: {{max_iter: 20, tol: 1.0e-7}}\ndtype: float32\n",
    "model stock": "merge_method: model_stock\nbase_model: {root}/base\n" + ALL_THREE + "dtype: float32\n",
    "nuslerp": "merge_method: nuslerp\nbase_model: {root}/base\nmodels:\n  - {{model: {root}/m0, parameters: {{weight: 0.3}}}}\n"
    "  - {{model: {root}/m1, parameters: {{weight: 0.9}}}}\ndtype: float32\n",
}
OF_ADAPTERS = {
    "ties of adapters": """
merge_method: ties
base_model: {root}/base
models:
  - {{model: {root}/base+{root}/lora0, parameters: {{weight: 0.7, density: [0.9, 0.4]}}}}
  - {{model: {root}/base+{root}/lora1, parameters: {{weight: -0.3}}}}
  - {{model: {root}/base+{root}/lora2, parameters: {{weight: [{{filter: down_proj, value: 0.2}}, {{value: 1.1}}]}}}}
parameters: {{density: 0.5}}
dtype: float32
""",
    "linear of adapters, the base among the models": """
merge_method: linear
models:
  - {{model: {root}/base+{root}/lora0, parameters: {{weight: 0.5}}}}
  - {{model: {root}/base+{root}/lora1, parameters: {{weight: [0.2, 1.0]}}}}
base_model: {root}/base
parameters: {{weight: 1.0}}
dtype: float32
""",
    "task arithmetic of adapters": """
merge_method: task_arithmetic
base_model: {root}/base
models:
  - {{model: {root}/base+{root}/lora0, parameters: {{weight: 0.5}}}}
  - {{model: {root}/base+{root}/lora2, parameters: {{weight: [0.2, 1.0]}}}}
dtype: float32
""",
}


def written(text: str, folder: Path, path: Path) -> Path:
    path.write_text(text.format(root=folder))
    return path


def by_mergekit(recipe: Path, out: Path) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own use of numpy and transformers
        _run_mergekit(recipe, out)
    return weights_of(out)


def _run_mergekit(recipe: Path, out: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    config = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
    run_merge(
        config, str(out), MergeOptions(copy_tokenizer=False, quiet=True, lora_merge_cache=str(out.parent / "cache"))
    )


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: each for file in sorted(folder.glob("*.safetensors")) for name, each in load_file(file).items()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_what_mergekit_gives(name: str, folder: Path, tmp_path: Path) -> None:
    recipe = written(RECIPES[name], folder, tmp_path / "recipe.yml")
    merge_recipe(recipe).save(tmp_path / "ours")
    found, wanted = weights_of(tmp_path / "ours"), by_mergekit(recipe, tmp_path / "theirs")
    assert found.keys() == wanted.keys()
    base = weights_of(folder / "base")
    for tensor, values in wanted.items():
        assert found[tensor].dtype == values.dtype, tensor
        lost = (found[tensor].double() - values.double()).norm()
        if values.dtype == torch.bfloat16:
            # One unit in the last place, where both round a number near the middle.
            assert float((found[tensor].double() - values.double()).abs().max()) <= 2**-8 * float(values.abs().max())
            continue
        assert float(lost) <= CLOSE * float((values - base[tensor]).double().norm()), tensor
    assert (tmp_path / "ours" / "merge_recipe.yml").read_text() == recipe.read_text()
    LlamaForCausalLM.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("name", OF_ADAPTERS)
def test_adapters_of_a_recipe_stay_adapters_and_need_no_base(name: str, folder: Path, tmp_path: Path) -> None:
    recipe = written(OF_ADAPTERS[name], folder, tmp_path / "recipe.yml")
    wanted = by_mergekit(recipe, tmp_path / "theirs")
    base = weights_of(folder / "base")
    away = shutil.copytree(folder, tmp_path / "away", ignore=shutil.ignore_patterns("base"))
    merge_recipe(written(OF_ADAPTERS[name], away, tmp_path / "away.yml"), rank="full").save(tmp_path / "ours")
    changed = 0
    for tensor, values in wanted.items():
        module = tensor.removesuffix(".weight")
        difference = (values - base[tensor]).double()
        if module.rpartition(".")[2] not in ("q_proj", "v_proj", "down_proj"):
            assert float(difference.norm()) <= CLOSE * float(base[tensor].norm())
            continue
        changed += 1
        assert float((read_update(tmp_path / "ours", module) - difference).norm()) <= CLOSE * float(
            difference.norm()
        ), tensor
    assert changed == 9


def test_the_command_takes_a_recipe(folder: Path, tmp_path: Path, call: object) -> None:
    recipe = written(OF_ADAPTERS["ties of adapters"], folder, tmp_path / "recipe.yml")
    code, out, err = call("merge", "--recipe", recipe, "-o", tmp_path / "out", "--rank", "4", "--quiet")  # type: ignore[operator]
    assert code == 0, err
    assert "method ties, semantics mergekit, space full" in out
    code, _, err = call("merge", "--recipe", recipe, "-o", tmp_path / "other")  # type: ignore[operator]
    assert code == 2
    assert "no rank is given" in err
    code, _, err = call("merge", folder / "m0", "--recipe", recipe, "-o", tmp_path / "other")  # type: ignore[operator]
    assert code == 2
    assert "models beside a recipe" in err


def test_translations_name_options_that_exist() -> None:
    for name, translation in TRANSLATIONS.items():
        options = METHODS[name].options(translation.defaults)
        assert set(translation.parameters.values()) <= set(options), name


def test_depth_counts_blocks() -> None:
    assert depths(["a", "h.0.x", "h.1.x"]) == {"a": 0.0, "h.0.x": 0.0, "h.1.x": 1.0}
    assert depths(["h.0.x"]) == {"h.0.x": 1.0}


REFUSED = {
    "merge_method: ties\nslices: []": (UnsupportedError, "entry 'slices'. Stacking layers"),
    "merge_method: ties\nmodules: {}\nmodels: [a]": (UnsupportedError, "entry 'modules'"),
    "merge_method: ties\ntokenizer_source: union\nmodels: [a]": (UnsupportedError, "entry 'tokenizer_source'"),
    "merge_method: ties\nmodels: [a]\nmodel: b": (FormatError, "the unknown entry 'model'"),
    "models: [a]": (FormatError, "names no merge_method"),
    "merge_method: ties": (FormatError, "lists no models"),
    "merge_method: ties\nmodels: &x [a]\nparameters: {w: *x}": (FormatError, "is not YAML: aliases"),
    "merge_method: [": (FormatError, "is not YAML in line"),
    "- a": (FormatError, "is not a recipe"),
    "merge_method: ties\nmodels: [a+]": (FormatError, "models[0] is 'a+'"),
    "merge_method: ties\nmodels: [a]\nbase_model: a+b": (FormatError, "base_model is 'a+b'"),
    "merge_method: ties\nmodels: [a]\ndtype: int8": (FormatError, "dtype is 'int8'"),
    "merge_method: ties\nmodels: [a]\nparameters: {density: big}": (FormatError, "parameter 'density' has 'big'"),
    "merge_method: ties\nmodels: [a]\nparameters: {density: .nan}": (FormatError, "parameter 'density' has 'nan'"),
    "merge_method: ties\nmodels: [a]\nparameters: {density: [1, {value: 2}]}": (
        FormatError,
        "mixes numbers and filters",
    ),
    "merge_method: ties\nmodels: [a]\nparameters: {density: [{filter: 3, value: 2}]}": (FormatError, "has filter '3'"),
    "merge_method: ties\nmodels: [a]\nparameters: {density: []}": (FormatError, "has 0 values"),
    "merge_method: passthrough\nmodels: [a]": (UnsupportedError, "method 'passthrough'. Recipes have linear"),
    "merge_method: ties\nmodels: [a]\nparameters: {densty: 1}": (UsageError, "parameter 'densty'. It has density"),
    "merge_method: ties\nmodels: [a]": (FormatError, "names no base_model"),
    "merge_method: ties\nbase_model: a\nmodels: [a+b, c]": (
        UnsupportedError,
        "adapters and whole models in one recipe",
    ),
    "merge_method: ties\nbase_model: a\nmodels: [a+b, c+d]": (UnsupportedError, "adapters on 2 bases"),
    "merge_method: karcher\nmodels: [a+b, a+c]": (UnsupportedError, "method karcher of adapters"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_a_recipe_cannot_say_is_refused_by_name(text: str, tmp_path: Path) -> None:
    kind, message = REFUSED[text]
    (tmp_path / "recipe.yml").write_text(text)
    with pytest.raises(kind, match=re.escape(message)):
        merge_recipe(tmp_path / "recipe.yml")


def test_parameters_that_are_missing_or_not_supported(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    start = f"merge_method: ties\nbase_model: {folder}/base\nmodels: [{folder}/m0, {folder}/m1]\n"
    recipe.write_text(start)
    with pytest.raises(FormatError, match="needs the parameter weight for every model"):
        merge_recipe(recipe)
    recipe.write_text(start + "parameters: {weight: 1, rescale: true}")
    with pytest.raises(UnsupportedError, match="rescale: True"):
        merge_recipe(recipe)
    recipe.write_text(start + "parameters: {weight: 1}")
    with pytest.raises(UsageError, match="a rank or budget for full weights"):
        merge_recipe(recipe, rank=4)
    assert read_recipe(recipe).parameter_names == {"weight"}
