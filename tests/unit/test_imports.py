"""What a module stands on: its imports, and the C source beside them."""

from pathlib import Path

import pytest

from pipeline import imports

SOURCES = {
    "pipeline/__init__.py": "",
    "pipeline/kernel.py": "SOURCE = 1\n",
    "pipeline/kernel.c": "int twice(int x) { return 2 * x; } // doubles\n",
    "pipeline/user.py": "def use():\n    from pipeline import kernel\n",
}


@pytest.fixture
def hash_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """hash_of({...}) -> the code hash of pipeline.user with some files changed."""
    monkeypatch.setattr(imports, "ROOT", tmp_path)
    (tmp_path / "pipeline").mkdir()

    def compute(changed: dict[str, str]) -> str:
        for name, text in (SOURCES | changed).items():
            (tmp_path / name).write_text(text)
        for cached in (imports.code_hash, imports._imports, imports._what_it_does):
            cached.cache_clear()
        return imports.code_hash("pipeline.user")

    yield compute
    for cached in (imports.code_hash, imports._imports, imports._what_it_does):
        cached.cache_clear()


def test_c_source_counts_with_its_module(hash_of) -> None:
    before = hash_of({})
    assert Path("pipeline/kernel.c") in imports.imported_files("pipeline.user")
    assert hash_of({"pipeline/kernel.c": "int twice(int x) { return 3 * x; }\n"}) != before
    assert hash_of({"pipeline/kernel.c": "// other words\nint twice(int x)\n{ return 2 * x; }\n"}) == before
    assert hash_of({"pipeline/kernel.py": "SOURCE = 2\n"}) != before
    assert hash_of({"pipeline/kernel.py": "SOURCE = 1  # a comment\n"}) == before
