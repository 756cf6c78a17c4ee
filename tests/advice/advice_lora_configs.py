"""Messages about what `adapter_config.json` asks for beyond s·B·A: each made by PEFT, and its advice followed with PEFT."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from advice_adapters import assert_rebuilt, edit_config
from advice_case import Case
from tiny_llama import (
    adapter_answers,
    answers,
    assert_same,
    checkpoint_answers,
    make_llama,
    quiet,
    save_adapter,
    write_zoo,
)
from torch import nn

import eigenzoo as ez

UNFOLLOWED = {
    "megatron_config": "needs Megatron and its process groups",
    "enable_lora": "only PEFT before 0.3 wrote it, which runs with no supported transformers",
}
"""Entries whose advice no test follows, and why."""

MERGE = "erge it into its base model (merge_and_unload) and open that as a checkpoint"
RETRAIN = "rain the adapter without it"


def make_mixtral() -> nn.Module:
    """A Mixtral of three experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=40, initializer_range=0.15, **sizes, **experts)).eval()


def merge_all(root: Path, make: Callable[[], nn.Module]) -> None:
    """Merge every adapter of a zoo by PEFT; the merged checkpoints, rebuilt at full rank, answer as PEFT with the adapters."""
    from peft import PeftModel

    expected = {}
    for path in sorted((root / "zoo").iterdir()):
        with quiet():
            model = PeftModel.from_pretrained(make(), path).eval()
            expected[path.name] = answers(model)
            model.merge_and_unload().save_pretrained(root / "merged" / path.name)
    space = ez.fit(ez.open_zoo(root / "merged"), rank=1.0)
    base = answers(make())
    for name, answer in expected.items():
        assert_same(checkpoint_answers(space.rebuild(name).save(root / "rebuilt" / name)), answer, base)


def mergeable(
    entry: str, name: str, make: Callable[[], nn.Module] = make_llama, *, slow: bool = False, **settings: Any
) -> Case:
    """A case whose advice is to merge."""

    def provoke(root: Path) -> None:
        write_zoo(root / "zoo", make=make, **settings)
        ez.open_zoo(root / "zoo")

    def follow(root: Path) -> None:
        """The test merged the adapters by PEFT. The rebuilt checkpoints answer in transformers as the adapters in PEFT."""
        merge_all(root, make)

    return Case(name, provoke, (entry, MERGE), follow, slow)


def retrained(entry: str, name: str, *, slow: bool = False, **settings: Any) -> Case:
    """A case of what PEFT cannot merge, or not exactly."""

    def provoke(root: Path) -> None:
        write_zoo(root / "zoo", **settings)
        ez.open_zoo(root / "zoo")

    def follow(root: Path) -> None:
        """PEFT does not merge these. The test made the adapters without the setting; rebuilt, they answer in PEFT as before."""
        shutil.rmtree(root / "zoo")
        write_zoo(root / "zoo")
        assert_rebuilt(root, root / "zoo")

    return Case(name, provoke, (entry, RETRAIN), follow, slow)


def open_arrow(root: Path) -> None:
    from peft import ArrowConfig, create_arrow_model

    experts = [str(path) for path in write_zoo(root / "experts")]
    with quiet():
        create_arrow_model(make_llama(), experts, ArrowConfig(top_k=1)).save_pretrained(root / "zoo")
    (root / "zoo" / "README.md").unlink()
    ez.open_zoo(root / "zoo")


def leave_the_router_out(root: Path) -> None:
    """The test left the router out; the rebuilt experts answer in PEFT as the originals."""
    shutil.rmtree(root / "zoo" / "arrow_router")
    assert_rebuilt(root, root / "zoo")


def open_pissa(root: Path) -> None:
    for seed, kind in enumerate(("pissa", "olora")):
        peft = _untrained(kind)
        save_adapter(peft, root / "initial" / kind)
        save_adapter(_train(peft, seed), root / "zoo" / kind)
    ez.open_zoo(root / "zoo")


def convert(root: Path) -> None:
    """The test saved the adapters again by PEFT in that way; the rebuilt ones answer in PEFT as the trained models did."""
    expected = {}
    shutil.rmtree(root / "zoo")
    for seed, kind in enumerate(("pissa", "olora")):
        peft = _train(_untrained(kind), seed)
        expected[kind] = answers(peft)
        with quiet():
            peft.save_pretrained(
                root / "zoo" / kind,
                path_initial_model_for_weight_conversion=str(root / "initial" / kind),
                save_embedding_layers=False,
            )
    space = ez.fit(ez.open_zoo(root / "zoo"), rank=1.0)
    for kind, answer in expected.items():
        assert_same(adapter_answers(space.rebuild(kind).save(root / "rebuilt" / kind)), answer)


def _untrained(kind: str) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(init_lora_weights=kind, r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"])
    with quiet():
        return get_peft_model(make_llama(), config).eval()


@torch.no_grad()
def _train(peft: Any, seed: int) -> Any:
    draw = torch.Generator().manual_seed(seed)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.15)
    return peft


def write_others(root: Path, **configs: Any) -> None:
    """Adapters of other types than LoRA, all that they train moved."""
    from peft import get_peft_model

    for seed, (name, config) in enumerate(configs.items()):
        with quiet():
            peft = get_peft_model(make_llama(), config).eval()
        save_adapter(_train(peft, seed), root / "zoo" / name)


def open_other_types(root: Path) -> None:
    from peft import IA3Config, LoHaConfig

    targets = ["q_proj", "up_proj"]
    write_others(
        root,
        ia3=IA3Config(target_modules=targets, feedforward_modules=["up_proj"]),
        loha=LoHaConfig(target_modules=targets, r=2),
    )
    ez.open_zoo(root / "zoo")


def merge_other_types(root: Path) -> None:
    """The test merged the adapters by PEFT. The rebuilt checkpoints answer in transformers as the adapters in PEFT."""
    merge_all(root, make_llama)


def open_prompts(root: Path) -> None:
    from peft import PromptTuningConfig

    write_zoo(root / "zoo")
    write_others(root, a9=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    ez.open_zoo(root / "zoo")


def leave_the_prompts_out(root: Path) -> None:
    """The test left it out; the rebuilt adapters answer in PEFT as the originals."""
    shutil.rmtree(root / "zoo" / "a9")
    assert_rebuilt(root, root / "zoo")


def open_unknown_entry(root: Path) -> None:
    for path in write_zoo(root / "zoo"):
        edit_config(path, use_telemetry=True)
    ez.open_zoo(root / "zoo")


def remove_the_entry(root: Path) -> None:
    """The test removed the entry, which PEFT ignores; the rebuilt adapters answer in PEFT as the originals."""
    for path in (root / "zoo").iterdir():
        edit_config(path, "use_telemetry")
    assert_rebuilt(root, root / "zoo")


def _blocks() -> Any:
    from peft.tuners.lora.config import BdLoraConfig

    return BdLoraConfig(target_modules_bd_a=["up_proj"], target_modules_bd_b=["q_proj"], nblocks=2)


def _peft_settings() -> dict[str, Any]:
    from peft.tuners.lora.config import KasaConfig, MontecloraConfig, VeloraConfig

    return {"kasa": KasaConfig(), "carlo": MontecloraConfig(), "velora": VeloraConfig(num_groups=2)}


_SETTINGS = _peft_settings()
_EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}

CASES = [
    mergeable("use_dora", "DoRA", use_dora=True),
    mergeable(
        "target_parameters",
        "LoRA on the experts of a mixture",
        make_mixtral,
        **_EXPERTS,
    ),
    mergeable("trainable_token_indices", "Trained tokens", trainable_token_indices={"embed_tokens": [1, 3, 5]}),
    mergeable("kasa_config", "KaSA", slow=True, kasa_config=_SETTINGS["kasa"]),
    mergeable("use_bdlora", "Block-diagonal LoRA", slow=True, use_bdlora=_blocks(), r=4),
    mergeable("velora_config", "VeLoRA", slow=True, velora_config=_SETTINGS["velora"]),
    mergeable("monteclora_config", "Monte Carlo LoRA", slow=True, monteclora_config=_SETTINGS["carlo"]),
    retrained("layer_replication", "Replicated layers", slow=True, layer_replication=[[0, 2], [1, 2]]),
    retrained("use_qalora", "QALoRA", slow=True, use_qalora=True, qalora_group_size=4),
    retrained("alora_invocation_tokens", "Activated LoRA", alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM"),
    Case("An Arrow router", open_arrow, ("arrow_config", "leave the router out"), leave_the_router_out),
    Case(
        "An initialisation that changes the base (PiSSA, OLoRA, CorDA, LoRA-GA)",
        open_pissa,
        ("changed the base weights", "path_initial_model_for_weight_conversion"),
        convert,
    ),
    Case("Another type of adapter", open_other_types, ("peft_type is 'IA3'", MERGE), merge_other_types),
    Case(
        "A type of adapter that changes no weight",
        open_prompts,
        ("peft_type is 'PROMPT_TUNING'", "eave it out"),
        leave_the_prompts_out,
    ),
    Case("An entry of a config that nobody knows", open_unknown_entry, ("Remove the entry",), remove_the_entry),
]
