"""Which of the project's files a module stands on, read from its source: for DVC's code deps and for fingerprints.

`python -m pipeline.imports` (`make deps`) writes each stage's code deps into dvc.yaml.
"""

import ast
import functools
import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "stages")
C_SUFFIXES = (".c", ".h")


def imported_files(module: str) -> list[Path]:
    """Project files that `module` imports, itself first, transitively, also inside functions; relative, sorted.

    With a module comes the C source or header of its name, if there is one.
    """
    found: dict[str, Path] = {}
    sources: list[Path] = []
    queue = [module]
    while queue:
        name = queue.pop()
        path = _file(name)
        if path is None or name in found:
            continue
        found[name] = path.relative_to(ROOT)
        beside = (path.with_suffix(suffix) for suffix in C_SUFFIXES)
        sources += [source.relative_to(ROOT) for source in beside if source.exists()]
        queue += _imports(path)
    return sorted([*found.values(), *sources])


@functools.cache
def _imports(path: Path) -> list[str]:
    """Every module that the file may name, and some that are none."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def _file(module: str) -> Path | None:
    if module.split(".")[0] not in PACKAGES:
        return None
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)


@functools.cache
def code_hash(module: str) -> str:
    """SHA-256 of what the module and its imports do: comments, docstrings and layout left out."""
    digest = hashlib.sha256()
    for path in imported_files(module):
        digest.update(f"{path.as_posix()}\0{_what_it_does(ROOT / path)}\n".encode())
    return digest.hexdigest()


@functools.cache
def _what_it_does(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix in C_SUFFIXES:
        return " ".join(re.sub(r"//.*", "", text).split())
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def with_code_deps(dvc_yaml: str) -> str:
    """The text of dvc.yaml with each stage's `deps` ending in exactly the files that `stages.NAME` imports."""
    lines: list[str] = []
    stage = section = ""
    for line in [*dvc_yaml.splitlines(), ""]:
        if not line.startswith("      ") and section == "deps":
            lines += [f"      - {path.as_posix()}" for path in imported_files(f"stages.{stage}")]
        if header := re.fullmatch(r"  (\w+):", line):
            stage = header[1]
        if not line.startswith("      "):
            section = line.strip().partition(":")[0]
        if section == "deps" and re.fullmatch(r"      - (pipeline|stages)/\S+\.(py|c|h)", line):
            continue
        lines.append(line)
    return "\n".join(lines[:-1]) + "\n"


def main() -> None:
    path = ROOT / "dvc.yaml"
    path.write_text(with_code_deps(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
