"""WordNet's nouns: what is read, what is missing."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.fixture
def wordnet(example) -> ModuleType:
    return example("common.wordnet")


def test_wordnet_lines(wordnet):
    lines = [
        "  1 This software and database is being provided",
        '00001740 03 n 01 entity 0 000 | that which is perceived; "an example; of it"; "more"  ',
        "00002137 07 n 02 flat_coat 0 sheen 0 000 | a coat | or two; shiny  ",
    ]
    assert wordnet.glosses(wordnet.entries("\n".join(lines))) == [
        ("that which is perceived", "03"),
        ("a coat | or two; shiny", "07"),
    ]


@pytest.mark.parametrize("name", ["data.noun", "somewhere/data.noun"])
def test_missing_wordnet_says_where_it_comes_from(wordnet, tmp_path, name):
    with pytest.raises(ValueError, match="wordnet-base"):
        wordnet.read_nouns(str(tmp_path / name))
