"""`eigenzoo adapt` and `eigenzoo rebuild` of what it writes: digits, texts and images, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("datasets")

import datasets
import transformers
from peft import PeftModel
from PIL import Image

import eigenzoo as ez
from eigenzoo import adapt, nursery
from eigenzoo.cli import adapt as command
from eigenzoo.cli.app import main
from eigenzoo.integrations import classification
from eigenzoo.nursery import digits
from eigenzoo.nursery.making import make_zoo
from eigenzoo.nursery.recipe import Schedule, plan_zoo
from eigenzoo.nursery.silence import quietly

TASK = "5-against-5:0,2,4,6,8"
QUICKLY = ("--steps", "40", "--batch-size", "32")

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command line inside this process: exit code, standard output, standard error on one line."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["eigenzoo", *map(str, words)])
        out, err, code = io.StringIO(), io.StringIO(), None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as leave:
                code = leave.code
        assert isinstance(code, int)
        return code, out.getvalue(), " ".join(err.getvalue().split())

    return run


def process(*words: object) -> subprocess.Popen[str]:
    """The command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "eigenzoo.cli.app", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def done(*words: object) -> str:
    """What a process that ends well prints; on standard error it says nothing."""
    running = process(*words)
    out, err = running.communicate(timeout=120)
    assert (running.returncode, err) == (0, ""), err
    return out


@pytest.fixture(scope="module")
def digits_zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Zoos of six hastily trained models, each with its bundle of rank 4 in `<kind>-bundle` beside it."""
    root = tmp_path_factory.mktemp("digits")

    def make(kind: str) -> Path:
        if not (root / kind).exists():
            plan = plan_zoo(kind, 6, 0, False, False, None)
            hasty = replace(plan, schedule=replace(plan.schedule, steps=60))
            if plan.pretraining is not None:
                hasty = replace(hasty, pretraining=Schedule(200, 64, 5e-3))
            make_zoo(hasty, root / kind, False, None)
            head = ["classifier.*"] if kind == "digits-vit" else []
            ez.fit(ez.open_zoo(root / kind, exclude=head), 4).save(root / f"{kind}-bundle")
        return root / kind

    return make


def bundle_of(zoo: Path) -> Path:
    return zoo.with_name(f"{zoo.name}-bundle")


def vit(folder: Path) -> Any:
    return transformers.ViTForImageClassification.from_pretrained(folder).eval()


def adapted_logits(zoo: Path, file: Path, start: str = "mean") -> Tensor:
    """What a model with the file's coefficients answers to the test images."""
    from eigenzoo.integrations.transformers_names import saved_names

    model = vit(zoo / "_base")
    adapted = adapt.attach(model, ez.load(bundle_of(zoo)), start=start, names=saved_names(model))
    adapt.load(file, adapted)
    with torch.no_grad():
        return model(digits.load().test_images).logits


def test_digits_as_processes(digits_zoo: Callable[[str], Path], tmp_path: Path) -> None:
    zoo, file = digits_zoo("digits-vit"), tmp_path / "task.safetensors"
    words = (bundle_of(zoo), TASK, "--model", zoo / "_base", *QUICKLY, "--learning-rate", "0.1")
    found = json.loads(done("adapt", *words, "-o", file, "--json"))
    assert [path.name for path in tmp_path.iterdir()] == ["task.safetensors"]
    space = ez.load(bundle_of(zoo))
    assert found["num_trained"] == sum(basis.num_coefficients for basis in space.layers.values())
    assert found["file_bytes"] == file.stat().st_size
    assert found["checkpoint_bytes"] == (zoo / "_base" / "model.safetensors").stat().st_size
    assert found["accuracy"]["adapted"] > found["accuracy"]["mean"] + 0.1
    assert found["accuracy"]["mean"] == found["accuracy"]["start"]
    assert (found["num_train"], found["num_test"], found["taken_up_at"]) == (1297, 500, 0)
    assert found["last_loss"] < found["first_loss"]

    done("rebuild", bundle_of(zoo), file, "-o", tmp_path / "model")
    assert nursery.accuracy(tmp_path / "model") == found["accuracy"]["adapted"]
    with torch.no_grad():
        rebuilt = vit(tmp_path / "model")(digits.load().test_images).logits
    assert torch.allclose(rebuilt, adapted_logits(zoo, file), rtol=0, atol=1e-5)

    again = process("adapt", *words, "-o", tmp_path / "again.safetensors", "--json")
    # However late the signal comes: what there is at that moment is what the next call begins with.
    deadline = time.monotonic() + 60
    while not (tmp_path / ".again.safetensors.checkpoint").exists():
        assert again.poll() is None, again.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.random() / 4)
    again.send_signal(signal.SIGINT)
    out, err = again.communicate(timeout=60)
    if again.returncode:
        assert (again.returncode, out) == (130, "")
        assert "so does adapt" in err
        assert sorted(path.name for path in tmp_path.iterdir() if "again" in path.name) == [
            ".again.safetensors.checkpoint"
        ]
        done("adapt", *words, "-o", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_start_zero_changes_the_model_that_is_named(
    digits_zoo: Callable[[str], Path], tmp_path: Path, call: Call
) -> None:
    zoo, file = digits_zoo("digits-vit"), tmp_path / "task.safetensors"
    code, out, err = call(
        "adapt", bundle_of(zoo), TASK, "--model", zoo / "_base", *QUICKLY, "--start", "zero", "-o", file, "--json"
    )
    assert code == 0, err
    found = json.loads(out)["accuracy"]
    base = vit(zoo / "_base")
    test_images, labels = digits.load().test_set(digits.Task.parse(TASK))
    with torch.no_grad():
        assert found["start"] == float((base(test_images).logits.argmax(-1) == labels).double().mean())
    assert found["mean"] != found["start"]
    words = ("rebuild", bundle_of(zoo), file, "-o", tmp_path / "model")
    code, _, err = call(*words)
    assert code == 2
    assert "trained from start zero" in err
    assert "Name the model with --model" in err
    other = next(path for path in sorted(zoo.iterdir()) if path.name.startswith("task-"))
    code, _, err = call(*words, "--model", other)
    assert code == 2
    assert "is not the model that was trained" in err
    code, _, err = call(*words, "--model", zoo / "_base")
    assert code == 0, err
    with torch.no_grad():
        rebuilt = vit(tmp_path / "model")(test_images).logits
    assert torch.allclose(rebuilt, adapted_logits(zoo, file, "zero"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", ["mean", "zero"])
def test_deltas_come_on_top_of_their_base(
    digits_zoo: Callable[[str], Path], tmp_path: Path, call: Call, start: str
) -> None:
    zoo, file = digits_zoo("digits-vit"), tmp_path / "task.safetensors"
    models = sorted(zoo.glob("task-*"))
    bundle = ez.fit(models, 3, view="delta", base=zoo / "_base", exclude=["classifier.*"]).save(tmp_path / "bundle")
    words = ("adapt", bundle, TASK, *QUICKLY, "--start", start, "--besides", "classifier.*", "-o", file, "--json")
    code, out, err = call(*words, "--model", zoo / "_base")
    assert code == 0, err
    code, _, err = call("rebuild", bundle, file, "--like", models[2].name, "-o", tmp_path / "model")
    assert code == 0, err
    assert nursery.accuracy(tmp_path / "model") == json.loads(out)["accuracy"]["adapted"]
    if start == "mean":
        code, _, err = call(*words, "--force", "--model", models[0])
        assert code == 2
        assert "is not the base that was subtracted" in err


def test_what_was_trained_besides_finds_its_place_under_the_names_of_the_files(
    digits_zoo: Callable[[str], Path], tmp_path: Path, call: Call
) -> None:
    """transformers calls a layer otherwise in memory than in the files that it writes."""
    zoo, file = digits_zoo("digits-vit"), tmp_path / "task.safetensors"
    exclude = ["classifier.*", "*.layer.1.*", "*.layers.1.*"]
    bundle = ez.fit(sorted(zoo.glob("task-*")), 3, exclude=exclude).save(tmp_path / "bundle")
    words = ("--model", zoo / "_base", *QUICKLY, "--besides", "*layers.1.*", "-o", file, "--json")
    code, out, err = call("adapt", bundle, TASK, *words)
    assert code == 0, err
    code, _, err = call("rebuild", bundle, file, "-o", tmp_path / "model")
    assert code == 0, err
    assert nursery.accuracy(tmp_path / "model") == json.loads(out)["accuracy"]["adapted"]


@pytest.mark.parametrize("start", ["mean", "zero"])
def test_lora_gives_an_adapter_of_the_same_function(
    digits_zoo: Callable[[str], Path], tmp_path: Path, call: Call, start: str
) -> None:
    zoo, file = digits_zoo("digits-lora"), tmp_path / "task.safetensors"
    words = ("--model", zoo / "_base", *QUICKLY, "--start", start, "-o", file, "--json")
    code, out, err = call("adapt", bundle_of(zoo), TASK, *words)
    assert code == 0, err
    code, _, err = call("rebuild", bundle_of(zoo), file, "-o", tmp_path / "adapter")
    assert code == 0, err
    accuracy = nursery.accuracy(tmp_path / "adapter", base=zoo / "_base")
    assert accuracy == json.loads(out)["accuracy"]["adapted"]
    with quietly():
        model = PeftModel.from_pretrained(vit(zoo / "_base"), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        rebuilt = model(digits.load().test_images).logits
    assert torch.allclose(rebuilt, adapted_logits(zoo, file, start), rtol=0, atol=1e-5)


def test_networks_of_the_nursery(digits_zoo: Callable[[str], Path], tmp_path: Path, call: Call) -> None:
    zoo, file = digits_zoo("digits-cnn"), tmp_path / "task.safetensors"
    model = sorted(zoo.glob("task-*.safetensors"))[0]
    code, out, err = call("adapt", bundle_of(zoo), TASK, "--model", model, *QUICKLY, "-o", file, "--json")
    assert code == 0, err
    code, _, err = call("rebuild", bundle_of(zoo), file, "-o", tmp_path / "net")
    assert code == 0, err
    (rebuilt,) = (tmp_path / "net").iterdir()
    assert nursery.accuracy(rebuilt) == json.loads(out)["accuracy"]["adapted"]


def test_the_control_is_measured_and_not_kept(
    digits_zoo: Callable[[str], Path], tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = digits_zoo("digits-vit")
    monkeypatch.chdir(tmp_path)
    words = ("adapt", bundle_of(zoo), TASK, "--model", zoo / "_base", *QUICKLY, "--random-basis")
    code, out, err = call(*words)
    assert code == 0, err
    assert "numbers trained in a random basis" in out
    assert list(tmp_path.iterdir()) == []
    code, _, err = call(*words, "-o", tmp_path / "task.safetensors")
    assert code == 2
    assert "an output for a random basis" in err


WORDS = {
    "good": ["fine", "great", "lovely", "happy"],
    "bad": ["poor", "awful", "sad", "grim"],
    "odd": ["queer", "weird"],
}
FILLING = ["the", "film", "was", "and", "plot"]


def write_text_model(folder: Path, kind: str, seed: int, num_labels: int = 2) -> Path:
    """A tiny classifier of texts with a tokenizer that cuts at white space."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["[PAD]", "[UNK]", *FILLING, *(word for group in WORDS.values() for word in group)]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    sizes: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 12,
        "num_labels": num_labels,
    }
    name = "Bert" if kind == "bert" else "Llama"
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(folder)
    padding = {"pad_token": "[PAD]"} if kind == "bert" else {"eos_token": "[PAD]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **padding).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def text_zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Five such models and their bundle of rank 3, heads left out."""
    root = tmp_path_factory.mktemp("texts")

    def make(kind: str) -> Path:
        if not (root / kind).exists():
            for number in range(5):
                write_text_model(root / kind / f"m{number}", kind, number)
            zoo = ez.open_zoo(root / kind, exclude=["classifier.*", "score.*"])
            ez.fit(zoo, 3).save(root / f"{kind}-bundle")
        return root / kind

    return make


def rows(num_rows: int = 120, classes: tuple[str, ...] = ("good", "bad")) -> list[dict[str, str]]:
    draw = random.Random(0)
    found = []
    for number in range(num_rows):
        label = classes[number % len(classes)]
        # At both ends: BERT answers at the first token, Llama at the last.
        words = [draw.choice(WORDS[label]), *draw.sample(FILLING, 3), draw.choice(WORDS[label])]
        found.append({"text": " ".join(words), "label": label})
    return found


def write_table(path: Path, table: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        lines = [",".join(table[0]), *(",".join(map(str, row.values())) for row in table)]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(table))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        datasets.Dataset.from_list(table).to_parquet(path)
    return path


def text_words(zoo: Path, data: Path, output: Path) -> tuple[object, ...]:
    head = "classifier.*" if zoo.name == "bert" else "score.*"
    model = zoo / "m0"
    training = ("--steps", "120", "--batch-size", "16", "--learning-rate", "0.05")
    return ("adapt", bundle_of(zoo), data, "--model", model, "--besides", head, *training, "-o", output, "--json")


@pytest.mark.parametrize("kind", ["bert", "llama"])
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
    assert "missing, or of another size" in err
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
    assert classification.accuracy(model.eval(), labelled.test) == found["accuracy"]["adapted"]
    code, out, err = call(*words[:-1], "--test-share", "0.5", "--force")
    assert code == 2
    assert "a test share is given beside a test part" in err


def write_images(root: Path, num_images: int = 16) -> Path:
    """Bright squares on the left or on the right."""
    draw = torch.Generator().manual_seed(0)
    for label in ("left", "right"):
        (root / label).mkdir(parents=True)
        for number in range(num_images):
            pixels = torch.randint(0, 80, (8, 8), generator=draw, dtype=torch.uint8)
            pixels[:, slice(0, 4) if label == "left" else slice(4, 8)] += 150
            Image.fromarray(pixels.numpy(), "L" if number else None).save(root / label / f"{number:02}.png")
    return root


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


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".csv", "", "cannot be read"),
        (".csv", "text,label\n", "cannot be read"),
        (".csv", "sentence,label\na,b\n", "has the columns 'sentence', 'label'"),
        (".csv", "text,label\nfilm,good\n,bad\n", "row 2 has no text ('')"),
        (".csv", "text,label\nfilm,good\nplot,\n", "row 2 has the label ''"),
        (".csv", "text,label\nfilm,good\nplot,good\n", "1 class to tell apart"),
        (".csv", "text,label\nfilm,0.5\nplot,0.25\n", "row 1 has the label '0.5'"),
        (".csv", "text,label\n1,good\n2,bad\n", "row 1 has no text ('1')"),
        (".csv", "text,label\nfilm,good\nplot,bad\n", "no class has two items"),
        (".csv", 'text,label\nfilm,good\n"plot,bad\n', "cannot be read"),
        (".csv", b"\xff\xfe\x00text", "cannot be read"),
        (".jsonl", '{"text": "film", "label": "good"}\n{"text": ', "cannot be read"),
        (".jsonl", '{"text": "film", "label": "good"}\n{"text": null, "label": "bad"}\n', "row 2 has no text ('None')"),
        (".jsonl", '{"text": "film", "label": ["good"]}\n', "row 1 has the label"),
        (".json", "[[1, 2], 3]", "Error"),
        (".parquet", b"PAR1 nothing PAR1", "cannot be read"),
        (".txt", "good film", "a file with the ending '.txt'"),
    ],
)
def test_broken_tables_are_refused_in_one_line(
    text_zoo: Callable[[str], Path], tmp_path: Path, call: Call, suffix: str, content: str | bytes, message: str
) -> None:
    data = tmp_path / f"data{suffix}"
    data.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = call(*text_words(text_zoo("bert"), data, tmp_path / "out" / "task.safetensors"))
    assert (code, out) == (2, ""), err
    assert message in err
    assert str(data) in err
    assert err.count("Error: ") <= 2, "one line: what is refused, and what another library called it"
    assert "Traceback" not in err
    assert list((tmp_path / "out").iterdir()) == []


def test_broken_images_are_refused_in_one_line(digits_zoo: Callable[[str], Path], tmp_path: Path, call: Call) -> None:
    zoo = digits_zoo("digits-vit")
    output = tmp_path / "out" / "task.safetensors"

    def refused(folder: Path) -> str:
        code, out, err = call("adapt", bundle_of(zoo), folder, "--model", zoo / "_base", "-o", output)
        assert (code, out) == (2, ""), err
        assert "Traceback" not in err
        assert list(output.parent.iterdir()) == []
        return err

    (tmp_path / "empty").mkdir()
    assert "holds no folder" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "left").mkdir()
    assert "is an empty class" in refused(tmp_path / "empty")
    good = write_images(tmp_path / "pictures")
    whole = (good / "left" / "03.png").read_bytes()
    (good / "left" / "03.png").write_bytes(whole[: len(whole) // 2])
    assert "03.png: is no image that can be read" in refused(good)
    (good / "left" / "03.png").write_bytes(b"GIF89a hello")
    assert "03.png: is no image that can be read" in refused(good)
    (good / "left" / "03.png").write_bytes(whole)
    (good / "left" / "notes.md").touch()
    assert "holds 'notes.md', which is no image" in refused(good)
    (good / "left" / "notes.md").unlink()
    assert "has no image processor" in refused(good)


def test_what_cannot_be_meant_is_refused_before_training(
    digits_zoo: Callable[[str], Path], text_zoo: Callable[[str], Path], tmp_path: Path, call: Call
) -> None:
    zoo, texts, file = digits_zoo("digits-vit"), text_zoo("bert"), tmp_path / "task.safetensors"
    data = write_table(tmp_path / "reviews.csv", rows())
    model = ("--model", zoo / "_base")
    (tmp_path / "taken.safetensors").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "bert", "hidden_size": "many"}')
    for words, message in (
        ((TASK, *model), "no output"),
        ((TASK, *model, "-o", tmp_path / "taken.safetensors"), "exists already"),
        (("5-against-5:0,1,2", *model, "-o", file), "are no task"),
        ((TASK, *model, "-o", file, "--test-share", "0.1"), "a test share for a task of the nursery"),
        ((TASK, *model, "-o", file, "--start", "nowhere"), "the start 'nowhere' is neither"),
        ((TASK, *model, "-o", file, "--besides", "nothing.*"), "matches 'nothing.*'"),
        ((TASK, *model, "-o", file, "--steps", "0"), "steps 0"),
        ((TASK, *model, "-o", file, "--learning-rate", "nan"), "learning rate nan"),
        ((TASK, *model, "-o", file, "--checkpoint", file), "is both the output and the checkpoint"),
        ((TASK, "-o", file), "Missing option '--model'"),
        ((TASK, "--model", tmp_path / "nowhere", "-o", file), "is no folder with a config.json"),
        ((TASK, "--model", tmp_path / "broken", "-o", file), "broken"),
        ((TASK, "--model", texts / "m0", "-o", file), "is no classifier of images"),
        ((data, *model, "-o", file), "has no tokenizer"),
        ((data, "--model", texts / "m0", "-o", file), "is not in the module"),
        ((data, "--model", texts / "m0", "-o", file, "--test-share", "1"), "test share 1.0"),
        (("nowhere.csv", *model, "-o", file), "there is no such file or folder"),
    ):
        code, out, err = call("adapt", bundle_of(zoo), *words)
        assert (code, out) == (2, ""), (words, err)
        assert message in err, words
        assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "reviews.csv", "taken.safetensors"]


def test_a_library_that_is_missing_is_named_with_its_extra(
    text_zoo: Callable[[str], Path], tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_table(tmp_path / "reviews.csv", rows())
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, err = call(*text_words(text_zoo("bert"), data, tmp_path / "task.safetensors"))
    assert code == 2
    assert 'not installed: datasets. Run: pip install "eigenzoo[adapt]"' in err


def test_rebuild_refuses_what_does_not_belong_together(
    digits_zoo: Callable[[str], Path], tmp_path: Path, call: Call
) -> None:
    zoo, lora = digits_zoo("digits-vit"), digits_zoo("digits-lora")
    file, out = tmp_path / "task.safetensors", tmp_path / "model"
    words = (TASK, "--model", zoo / "_base", "--steps", "2", "--besides", "classifier.*", "-o", file)
    code, _, err = call("adapt", bundle_of(zoo), *words)
    assert code == 0, err
    name = ez.load(bundle_of(zoo)).names[0]
    for arguments, message in (
        ((bundle_of(lora), file), "belongs to another basis"),
        ((bundle_of(zoo), file, "--mean-only"), "--mean-only is not for files of"),
        ((bundle_of(zoo), file, "--like", "nobody"), "no model is called 'nobody'"),
        ((bundle_of(zoo), file, "--like", name, "--model", zoo / "_base"), "leave one of them out"),
        ((bundle_of(zoo), name, "--like", name), "--model and --like are for files of"),
    ):
        code, _, err = call("rebuild", *arguments, "-o", out)
        assert code == 2, err
        assert message in err or message.capitalize() in err
        assert not out.exists()
    words = (TASK, "--model", lora / "_base", "--steps", "2", "--besides", "classifier.*", "--force", "-o", file)
    code, _, err = call("adapt", bundle_of(lora), *words)
    assert code == 0, err
    code, _, err = call("rebuild", bundle_of(lora), file, "-o", out)
    assert code == 2
    assert "was trained besides, and has no place in the zoo's format" in err


def test_the_command_line_says_what_the_library_does() -> None:
    assert command.LEARNING_RATE == adapt.LEARNING_RATE
    assert (command.STEPS, command.BATCH_SIZE) == (classification.STEPS, classification.BATCH_SIZE)


def test_the_command_itself_needs_no_library() -> None:
    code = "import sys, eigenzoo.cli.app; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "datasets", "PIL"} & set(loaded)
