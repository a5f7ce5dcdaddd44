"""Running text: what is held out."""

from __future__ import annotations


def test_text_file_holds_out_its_end(example, tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("0123456789" * 10)
    assert example("common.running_text").load_texts(str(path)) == (["0123456789" * 9], ["0123456789"])
