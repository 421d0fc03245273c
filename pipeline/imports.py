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


def imported_files(module: str) -> list[Path]:
    """Project files that `module` imports, itself first, transitively, also inside functions; relative, sorted."""
    found: dict[str, Path] = {}
    queue = [module]
    while queue:
        name = queue.pop()
        path = _file(name)
        if path is None or name in found:
            continue
        found[name] = path.relative_to(ROOT)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                queue += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                queue += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return sorted(found.values())


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
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(f"{path.as_posix()}\0{ast.dump(tree)}\n".encode())
    return digest.hexdigest()


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
        if section == "deps" and re.fullmatch(r"      - (pipeline|stages)/\S+\.py", line):
            continue
        lines.append(line)
    return "\n".join(lines[:-1]) + "\n"


def main() -> None:
    path = ROOT / "dvc.yaml"
    path.write_text(with_code_deps(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
