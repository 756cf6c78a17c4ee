"""What `eigenzoo adapt` and `eigenzoo rebuild` refuse, and how they say so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("datasets")

from adapt_cases import TASK, Call, bundle_of, rows, text_words, write_images, write_table

import eigenzoo as ez
from eigenzoo import adapt
from eigenzoo.cli import adapt as command
from eigenzoo.integrations import classification


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".csv", "", "cannot be read"),
        (".csv", "text,label\n", "cannot be read"),
        (".csv", "sentence,label\na,b\n", "has the columns 'sentence', 'label'"),
        (".csv", "text,label\nfilm,good\n,bad\n", "row 2 has no text ('')"),
        (".csv", "text,label\nfilm,good\nplot,\n", "row 2 has an invalid label ''"),
        (".csv", "text,label\nfilm,good\nplot,good\n", "the data has 1 class"),
        (".csv", "text,label\nfilm,0.5\nplot,0.25\n", "row 1 has an invalid label '0.5'"),
        (".csv", "text,label\n1,good\n2,bad\n", "row 1 has no text ('1')"),
        (".csv", "text,label\nfilm,good\nplot,bad\n", "no class has two items"),
        (".csv", 'text,label\nfilm,good\n"plot,bad\n', "cannot be read"),
        (".csv", b"\xff\xfe\x00text", "cannot be read"),
        (".jsonl", '{"text": "film", "label": "good"}\n{"text": ', "cannot be read"),
        (".jsonl", '{"text": "film", "label": "good"}\n{"text": null, "label": "bad"}\n', "row 2 has no text ('None')"),
        (".jsonl", '{"text": "film", "label": ["good"]}\n', "row 1 has an invalid label"),
        (".json", "[[1, 2], 3]", "Error"),
        (".parquet", b"PAR1 nothing PAR1", "cannot be read"),
        (".txt", "good film", "files with suffix '.txt' are not supported"),
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


@pytest.mark.slow
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
    assert "this folder has no subfolders" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "left").mkdir()
    assert "this class is empty" in refused(tmp_path / "empty")
    good = write_images(tmp_path / "pictures")
    whole = (good / "left" / "03.png").read_bytes()
    (good / "left" / "03.png").write_bytes(whole[: len(whole) // 2])
    assert "03.png: this image cannot be read" in refused(good)
    (good / "left" / "03.png").write_bytes(b"GIF89a hello")
    assert "03.png: this image cannot be read" in refused(good)
    (good / "left" / "03.png").write_bytes(whole)
    (good / "left" / "notes.md").touch()
    assert "'notes.md' is not an image" in refused(good)
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
        ((TASK, *model), "--output is missing"),
        ((TASK, *model, "-o", tmp_path / "taken.safetensors"), "exists already"),
        (("5-against-5:0,1,2", *model, "-o", file), "are not a task"),
        ((TASK, *model, "-o", file, "--test-share", "0.1"), "a test share does not apply to a task of the nursery"),
        ((TASK, *model, "-o", file, "--start", "nowhere"), "the start 'nowhere' is neither"),
        ((TASK, *model, "-o", file, "--besides", "nothing.*"), "matches 'nothing.*'"),
        ((TASK, *model, "-o", file, "--steps", "0"), "steps 0"),
        ((TASK, *model, "-o", file, "--learning-rate", "nan"), "learning rate nan"),
        ((TASK, *model, "-o", file, "--checkpoint", file), "output and checkpoint are the same file"),
        ((TASK, "-o", file), "Missing option '--model'"),
        ((TASK, "--model", tmp_path / "nowhere", "-o", file), "this is not a folder with a config.json"),
        ((TASK, "--model", tmp_path / "broken", "-o", file), "broken"),
        ((TASK, "--model", texts / "m0", "-o", file), "is not a classifier of images"),
        ((data, *model, "-o", file), "has no tokenizer"),
        ((data, *model, "-o", file), "Save it there: tokenizer.save_pretrained("),
        ((data, "--model", texts / "m0", "-o", file), "are not in the module: "),
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
    assert "not installed: datasets. In eigenzoo's checkout run: pip install -c constraints.txt -e '.[adapt]'" in err


@pytest.mark.slow
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
        ((bundle_of(zoo), file, "--mean-only"), "--mean-only does not apply to files from"),
        ((bundle_of(zoo), file, "--like", "nobody"), "no model is called 'nobody'"),
        (
            (bundle_of(zoo), file, "--like", name, "--model", zoo / "_base"),
            "both --model and --like (model=, like=) are given",
        ),
        ((bundle_of(zoo), name, "--like", name), "--model and --like apply only to files from"),
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


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path: Path, call: Call, device: str) -> None:
    words = ("adapt", tmp_path / "nothing", TASK, "--model", tmp_path, "-o", tmp_path / "out", "--device", device)
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert f"device '{device}'" in err
