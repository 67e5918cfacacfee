"""The prose lint finds private words where people read them, and only there."""

import pytest

from tests.support.prose import in_code, in_document


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ('"""Mend it."""', "Mend"),
        ('def f():\n    """Return it.\n\n    Then it goes on with the rest."""', "goes on with"),
        ('raise ValueError(f"{x}: nobody answers")', "nobody"),
        ('log.warning("written anew")', "anew"),
        ('class A:\n    """Of a worker."""', "Of ..."),
    ],
)
def test_a_private_word_is_found(source, word):
    (finding,) = in_code("file.py", source)
    assert finding.word == word
    assert str(finding).startswith(f"file.py:{source.count(chr(10)) + 1}: ")


@pytest.mark.parametrize("source", ['x = "anew"', "nobody = 1", '"""Recommend a tendency."""', "# anew"])
def test_other_text_is_left_alone(source):
    assert list(in_code("file.py", source)) == []


def test_code_in_a_document_is_no_prose():
    text = "It stands still.\n\n    mend it\n\n```\nanew\n```\nThe `mend` column.\n"
    assert [(finding.line, finding.word) for finding in in_document("a.md", text)] == [(1, "stands still")]
