"""Model cards: metadata as the hub reads them, what is known of the full model, and nothing that is private."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_hub import metadata_problems
from huggingface_hub import ModelCard

import moeopt
from moeopt.errors import ExportError
from moeopt.exporting.base import BASE_CARD
from moeopt.plan import Plan
from moeopt.showing import public_command
from moeopt.tasks import TextTask

STOCK = Plan.one_hot([[0, 2, 5]] * 3, experts=6, k=2)


def card_of(folder: Path) -> ModelCard:
    text = (folder / "README.md").read_text()
    assert metadata_problems(text) == []
    return ModelCard(text)


@pytest.mark.parametrize(
    ("files", "licence", "told"),
    [
        ({"README.md": "---\nlicense: mit\n---\nall of it"}, ("mit", None), "Its licence: `mit`, as its README.md"),
        (
            {"README.md": "---\nlicense: other\nlicense_name: x-1\nlicense_link: LICENSE\n---\n", "LICENSE": "be good"},
            ("other", "LICENSE"), "See `LICENSE`",
        ),
        ({"README.md": "no metadata", "LICENSE.txt": "be good"}, ("other", "LICENSE.txt"), "as its LICENSE.txt says"),
        ({"README.md": "---\nlicense: [a: b\n---\n"}, (None, None), "licence the full model has is not known"),
        ({}, (None, None), "licence the full model has is not known"),
    ],
)  # fmt: skip
def test_the_licence_is_the_full_models_or_not_known(
    files: dict[str, str], licence: tuple[str | None, str | None], told: str, full: Any, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / "full" / name).write_text(text)
    small = moeopt.export(STOCK, tmp_path / "small", model=full)
    card = card_of(small)
    assert (card.data.license, card.data.get("license_link")) == licence
    assert told in card.text
    assert (small / BASE_CARD).exists() == ("README.md" in files)
    if "README.md" in files:
        assert (small / BASE_CARD).read_text() == files["README.md"]
    assert card.data.base_model is None
    assert "which model of the hub that is, nothing there says" in card.text
    assert "**Not judged**" in card.text
    link = tmp_path / "full" / "README.md"
    link.unlink(missing_ok=True)
    (tmp_path / "secret").write_text("---\nlicense: secret\n---\n")
    link.symlink_to(tmp_path / "secret")
    assert "secret" not in str(card_of(moeopt.export(STOCK, tmp_path / "again", model=full)).data)


def test_numbers_of_the_card_are_those_of_the_files(full: Any, tmp_path: Path) -> None:
    small = moeopt.export(STOCK, tmp_path / "small", model=full, base_model="org/full")
    model = moeopt.load(small)[0]
    text = card_of(small).text
    assert f"| parameters | {full.num_parameters():,} | {model.num_parameters():,} |" in text
    assert f"| bytes of weights | {2 * full.num_parameters():,} | {2 * model.num_parameters():,} |" in text
    uneven = Plan.one_hot([[0, 1], [0, 1, 2], [3, 4, 5, 1]], experts=6, k=2)
    assert "Experts of each layer: 2, 3, 4." in card_of(moeopt.export(uneven, tmp_path / "u", model=full)).text
    assert card_of(small).data.base_model == "org/full"
    with pytest.raises(ExportError, match="must be the id of a model on the hub, as org/name, got 'a b'"):
        moeopt.export(STOCK, tmp_path / "x", model=full, base_model="a b")


def test_texts_of_a_study_cannot_break_out_and_private_ones_stay_here(
    full: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    task = TextTask(
        "t`\n# A title\x1b[2J", search=["one text that is long enough", "another one, also long"], window=32
    )
    objective = moeopt.Objective(full, tiny_tokenizer, task, moeopt.PruneSpace.of(full, keep=3))
    study = moeopt.create_study("s`|<b>", objective=objective, storage=None, sampler="random")
    study.optimize(objective, n_trials=2)
    storage = "postgresql://jo:secret@db.example/x"
    study.set_user_attr("command", f"cd {tmp_path} && moeopt search {tmp_path}/full --storage {storage} --trials 2")
    command = f"moeopt export {tmp_path}/full {tmp_path}/small --storage={storage} --plan '{tmp_path}/a plan.x'"
    small = moeopt.export(study.trials[0], tmp_path / "small", study=study, model=full, command=command)
    text = (small / "README.md").read_text()
    assert "\n# A title" not in text
    assert "\x1b" not in text
    assert "study `s'|<b>`, trial 0 of 2; task `t'\\n# A title" in text
    assert "$ moeopt search full --trials 2" in text
    assert "$ moeopt export full small --plan 'a plan.x'" in text
    assert "**Not judged** against the full model on examples that the search never saw" in text
    assert f"| {study.trials[0].value:.4f} |" in text
    card_of(small)
    for file in small.iterdir():
        if file.name != ".source.json":
            assert not any(
                private in file.read_bytes() for private in (str(tmp_path).encode(), b"secret", b"db.example")
            )


def test_an_export_of_an_export_names_what_it_is_of(full: Any, tmp_path: Path) -> None:
    first = moeopt.export(STOCK, tmp_path / "first", model=full, base_model="org/full")
    second = moeopt.export(Plan.one_hot([[0, 1]] * 3, experts=3, k=2), tmp_path / "second", model=first)
    card = card_of(second)
    assert card.data.base_model is None
    assert "`first`, from a folder" in card.text
    assert (second / BASE_CARD).read_text() == (first / "README.md").read_text()
    cached = tmp_path / "models--org--first" / "snapshots" / "abc"
    shutil.copytree(first, cached)
    third = moeopt.export(Plan.one_hot([[0, 1]] * 3, experts=3, k=2), tmp_path / "third", model=cached)
    assert card_of(third).data.base_model == "org/first"
    assert "revision `abc`" in card_of(third).text


def test_a_command_that_is_none_is_shown_all_the_same() -> None:
    assert public_command("moeopt 'not closed --storage sqlite:////home/jo/x.db") == "moeopt 'not closed --storage ***"
