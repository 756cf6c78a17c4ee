"""`eigenzoo adapt` on a user's own texts and images, and `eigenzoo rebuild` of what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("datasets")

import transformers
from adapt_cases import QUICKLY, Call, bundle_of, done, rows, text_words, vit, write_images, write_table

from eigenzoo.integrations import classification


@pytest.mark.parametrize("kind", [pytest.param("bert", marks=pytest.mark.slow), "llama"])
def test_texts(text_zoo: Callable[[str], Path], tmp_path: Path, call: Call, kind: str) -> None:
    """Every format gives the same file; a process too; and the rebuilt model answers as the adapted one."""
    zoo, files = text_zoo(kind), []
    for suffix in (".csv", ".jsonl", ".json", ".parquet"):
        data = write_table(tmp_path / f"reviews{suffix}", rows())
        files.append(tmp_path / f"{suffix[1:]}.safetensors")
        words = text_words(zoo, data, files[-1])
        if suffix == ".csv":
            found = json.loads(done(*words))
        else:
            code, out, err = call(*words)
            assert (code, err) == (0, ""), err
            found = json.loads(out)
        assert found["classes"] == ["bad", "good"]
        assert (found["num_train"], found["num_test"]) == (96, 24)
        assert found["num_besides"] == (34 if kind == "bert" else 32)
        assert found["accuracy"]["adapted"] > max(found["accuracy"]["start"] + 0.2, 0.85)
        assert files[-1].read_bytes() == files[0].read_bytes()
    code, _, err = call("rebuild", bundle_of(zoo), files[0], "-o", tmp_path / "model")
    assert code == 0, err
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert model.config.id2label == {0: "bad", 1: "good"}
    # One at a time: neither padding nor the code of this project has a part in it.
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        answers = [int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()) for row in rows()]
    right = [model.config.id2label[answer] == row["label"] for answer, row in zip(answers, rows(), strict=True)]
    assert sum(right) > 0.85 * len(right)


@pytest.mark.slow
def test_a_head_of_other_classes_is_drawn_and_trained(
    text_zoo: Callable[[str], Path], tmp_path: Path, call: Call
) -> None:
    zoo, file = text_zoo("bert"), tmp_path / "task.safetensors"
    (tmp_path / "reviews").mkdir()
    write_table(tmp_path / "reviews" / "train.csv", rows(90, ("good", "bad", "odd")))
    write_table(tmp_path / "reviews" / "test.csv", rows(30, ("good", "bad", "odd")))
    words = text_words(zoo, tmp_path / "reviews", file)
    without = [word for word in words if word not in ("--besides", "classifier.*")]
    code, _, err = call(*without)
    assert code == 2
    assert "missing in the checkpoint, or of another size" in err
    assert "Add --besides 'classifier.*'" in err
    code, out, err = call(*words)
    assert code == 0, err
    found = json.loads(out)
    assert found["classes"] == ["bad", "good", "odd"]
    assert (found["num_train"], found["num_test"], found["num_besides"]) == (90, 30, 51)
    code, _, err = call("rebuild", bundle_of(zoo), file, "-o", tmp_path / "model")
    assert code == 0, err
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.config.id2label == {0: "bad", 1: "good", 2: "odd"}
    labelled = classification.read_labelled(tmp_path / "reviews", tmp_path / "model")
    # One of the 30 texts may lie at the border.
    assert classification.accuracy(model.eval(), labelled.test) == pytest.approx(
        found["accuracy"]["adapted"], abs=1 / 30 + 1e-9
    )
    code, out, err = call(*words[:-1], "--test-share", "0.5", "--force")
    assert code == 2
    assert "the data has a test part and --test-share is given too" in err


@pytest.mark.slow
def test_a_folder_of_images(digits_zoo: Callable[[str], Path], tmp_path: Path, call: Call) -> None:
    zoo, file = digits_zoo("digits-vit"), tmp_path / "task.safetensors"
    model = tmp_path / "model"
    vit(zoo / "_base").save_pretrained(model)
    size = {"height": 8, "width": 8}
    processor = transformers.AutoImageProcessor
    settings = {"image_processor_type": "ViTImageProcessor", "size": size, "image_mean": [0.5], "image_std": [0.5]}
    (model / "preprocessor_config.json").write_text(json.dumps({**settings, "do_normalize": True, "do_resize": True}))
    assert processor.from_pretrained(model) is not None
    data = write_images(tmp_path / "pictures")
    words = (bundle_of(zoo), data, "--model", model, *QUICKLY, "--test-share", "0.25", "-o", file)
    found = json.loads(done("adapt", *words, "--json"))
    assert found["classes"] == ["left", "right"]
    assert (found["num_train"], found["num_test"]) == (24, 8)
    assert found["accuracy"]["adapted"] > 0.9
    (data / "train").mkdir()
    for label in ("left", "right"):
        (data / label).rename(data / "train" / label)
    write_images(data / "test", 3)
    code, out, err = call("adapt", bundle_of(zoo), data, "--model", model, *QUICKLY, "-o", file, "--force")
    assert code == 0, err
    assert "on 32 items" in out
    assert "on 6 held-out items" in out
