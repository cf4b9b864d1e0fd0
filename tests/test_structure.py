"""Imports flow one way, the command line starts light, and nothing unsafe is called (E7)."""

import ast
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "undertow"

# Lower layers first; a module may import from its own layer and those before it.
LAYERS = [
    {"errors"},
    {"cache", "config", "registry", "sites", "stats"},
    {"fetch"},
    {"texts", "models", "saes"},
    {"behaviours", "constraints", "defences", "solvers"},
    {"attacks", "features", "metrics", "tasks"},
    {"controls", "measurement", "runlog", "setting", "report", "summary"},
    {"verdict"},
    {"audit", "preflight"},
    {"arguments", "options"},
    {"cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("undertow"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


def test_imports_flow_one_way():
    wrong = []
    for path in SOURCE.rglob("*.py"):
        own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in RANK, f"{own} has no layer yet"
        wrong += [f"{path.name} ({own}) imports {other}" for other in imports(path) if RANK[other] > RANK[own]]
    assert not wrong


def test_siblings_of_an_axis_do_not_know_each_other():
    """The concrete parts of an axis import their base, never one another."""
    for axis in ("tasks", "behaviours"):
        for path in (SOURCE / axis).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"undertow.{axis}."):
                    assert node.module == f"undertow.{axis}.base", path


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['undertow', '--help']\n"
        "import undertow.cli\n"
        "try: undertow.cli.main()\n"
        "except SystemExit: pass\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'numpy', 'pydantic', 'statsmodels'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "HEAVY []" in output


def test_nothing_unsafe_is_called():
    """E7: no pickle, no code from checkpoints, no unsafe YAML, no fixed device."""
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            # What stands in a string, such as a command shown to the user, is not called.
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = ""
        code = ast.unparse(tree)
        forbidden_words = ("torch.load", "import pickle", "trust_remote_code=True", "allow_pickle=True", "yaml.load(", ".cuda(")
        for forbidden in (*forbidden_words, "eval("):
            assert forbidden not in code.replace(".eval(", ""), f"{forbidden} in {path}"
