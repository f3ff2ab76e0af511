"""The shape of the code: who imports whom, who touches files, and how long things are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cli import main

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "training", "jobs")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in MODULES}
MAY_IMPORT = {"pipeline": {"pipeline"}, "training": {"pipeline", "training"}, "jobs": set(PACKAGES)}

MAX_MODULE_LINES = 420
MAX_FUNCTION_LINES = 60
LONGER_MODULES: dict[str, int] = {}
MAX_MODULES = 14  # of a package
MAX_PARAMETERS = 6  # of a function, without `self` and `cls`
MOST_CONFIG_PARAMETERS = 38  # functions that take the whole config; lower it when there are fewer
SHORTER_MODULES = {"pipeline/backfill/driver.py": 150}  # what a newcomer reads first

Function = ast.FunctionDef | ast.AsyncFunctionDef


def imported(name: str, at_import_time: bool = False) -> set[str]:
    """The dotted names that a module imports, anywhere or only where they are imported with it."""
    found = set()
    for node in at_top(TREES[name]) if at_import_time else ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def at_top(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run when the module is imported: none inside a function or `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            continue
        yield node
        yield from at_top(node)


def calls(name: str) -> Iterator[tuple[str, int]]:
    """The dotted names that a module calls, with their lines; of a method only its own name after a dot."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            text = ast.unparse(node.func)
            yield (text if text.replace(".", "").isidentifier() else f".{text.rpartition('.')[2]}"), node.lineno


def public(tree: ast.Module) -> Iterator[Function | ast.ClassDef]:
    """Public functions, classes, and their methods."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            yield from public(node) if isinstance(node, ast.ClassDef) else ()  # type: ignore[arg-type] - has a body


# Each package may import itself and what stands before it.
ORDER = ["pipeline"]
ORDER += [
    f"pipeline.{name}" for name in ("storage", "config", "manifest", "models", "embedding", "sampling", "planning")
]
ORDER += [f"pipeline.{name}" for name in ("index", "serving", "evaluation", "reporting", "backfill")]
ORDER += ["training.fitting", "training.simulation", "training", "jobs.shell", "jobs.steps", "jobs.upkeep", "jobs"]
APART = {"pipeline.manifest", "pipeline.models"}  # these two do not import each other


def package_of(name: str) -> str:
    return name.rpartition("/")[0].replace("/", ".")


def test_imports_between_packages_go_one_way() -> None:
    modules = {name.removesuffix(".py").replace("/", "."): package_of(name) for name in TREES}
    found = []
    for name in TREES:
        own = package_of(name)
        for item in imported(name):
            module = item if item in modules else item.rpartition(".")[0]
            other = modules.get(module, own)
            if ORDER.index(other) > ORDER.index(own) or (own != other and {own, other} == APART):
                found.append(f"{name} imports {module}")
    assert found == []


def test_every_package_is_in_the_order_and_has_at_most_14_modules() -> None:
    modules = Counter(package_of(name) for name in TREES if not name.endswith("__init__.py"))
    assert set(modules) == set(ORDER)
    assert max(modules.values()) <= MAX_MODULES


def test_packages_have_an_empty_init() -> None:
    assert [name for name, tree in TREES.items() if name.endswith("__init__.py") and tree.body] == []


def test_imports_flow_from_pipeline_over_training_to_jobs() -> None:
    for name in TREES:
        ours = {module.split(".")[0] for module in imported(name)} & {*PACKAGES, "tests", "benchmarks"}
        assert ours <= MAY_IMPORT[name.split("/")[0]], name


def test_no_two_modules_import_each_other() -> None:
    """At import time; a module that is asked for inside a function is found whole."""
    modules = {name.removesuffix(".py").replace("/", "."): name for name in TREES}
    graph = {
        module: {
            other for other in modules if other != module and any(is_of(item, other) for item in imported(name, True))
        }
        for module, name in modules.items()
    }
    done: set[str] = set()
    while ready := {module for module, needs in graph.items() if module not in done and needs <= done}:
        done |= ready
    assert set(graph) == done, f"a circle among {sorted(set(graph) - done)}"


def is_of(item: str, module: str) -> bool:
    return item == module or item.rpartition(".")[0] == module


def test_benchmarks_of_one_kind_import_no_other_kind() -> None:
    """`speed`, `quality` and `scale` share what lies above them; that imports none of the three."""
    for path in (ROOT / "benchmarks").rglob("*.py"):
        own = path.relative_to(ROOT).parts[1:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks."):
                folder = tuple(str(node.module).split(".")[1:2])
                assert folder == own or (ROOT / "benchmarks" / f"{folder[0]}.py").exists(), f"{path}: {node.module}"


def test_no_test_module_imports_another() -> None:
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests"):
                modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
                found += [f"{path}: {item}" for item in modules if item.rpartition(".")[2].startswith("test_")]
    assert found == [], "move what they share to tests/support"


def test_only_the_index_and_the_neighbours_of_policies_import_faiss() -> None:
    users = {name for name in TREES if any(module.split(".")[0] == "faiss" for module in imported(name))}
    assert users <= {
        "pipeline/index/segment.py",
        "pipeline/index/codebook.py",
        "pipeline/index/train_codebook.py",
        "pipeline/knn.py",
    }


# Storage, and what lies below it.
STORES = {f"pipeline/storage/{name}.py" for name in ("interface", "local", "retrying_store", "objects", "parquet")}
STORES |= {"pipeline/storage/s3_client.py", "pipeline/storage/s3_reader.py"}


def test_only_storage_talks_to_stores() -> None:
    clients = {"boto3", "botocore", "s3fs", "fsspec", "obstore", "aiobotocore"}
    for name in set(TREES) - STORES:
        for module in imported(name):
            assert module.split(".")[0] not in clients, f"{name}: {module}"
            assert not module.startswith("pyarrow.fs"), f"{name}: {module}"


# Reads and writes of files; what is allowed outside storage, and why.
FILE_CALLS = {
    "open",
    "io.open",
    "os.open",
    "os.remove",
    "os.unlink",
    "os.rename",
    "os.replace",
    "os.link",
    "os.makedirs",
}
FILE_CALLS |= {"os.mkdir", "os.listdir", "os.walk", "os.scandir", "os.stat", "os.path.exists", "os.path.isfile"}
FILE_CALLS |= {"os.path.isdir", "os.path.getsize", "np.save", "np.load", "np.savez", "pq.read_table", "pq.write_table"}
FILE_CALLS |= {"pq.ParquetFile", "pq.ParquetWriter", "pa.OSFile", "pa.memory_map"}
FILE_METHODS = {"read_text", "write_text", "read_bytes", "write_bytes", "unlink", "mkdir", "touch", "rename", "rglob"}
FILE_METHODS |= {"iterdir", "glob", "is_file", "is_dir", "exists", "savefig", "rmdir", "symlink_to"}
FILE_MODULES = ("shutil.", "tempfile.")
ALLOWED = {
    ("pipeline/config/load.py", "open"),  # the config file comes before there is a run, and may be a pipe
    ("pipeline/config/load.py", "os.open"),
    ("pipeline/reporting/report.py", ".read_text"),  # the page's template, which lies beside the module
    ("pipeline/reporting/plots.py", "figure.savefig"),  # into memory
    ("jobs/shell/ray_session.py", "open"),  # /dev/null
    ("jobs/shell/command.py", "os.open"),  # /dev/null
    ("jobs/shell/failures.py", "os.open"),  # /dev/null
    ("jobs/demo.py", "folder.mkdir"),  # the demo writes its data and its config as a user would
    ("jobs/demo.py", "pq.write_table"),
    *(("jobs/demo.py", f"{name}.exists") for name in ("root", "folder", "config")),  # and looks for what is a user's
    *(("jobs/demo.py", call) for call in ("root.is_dir", "folder.is_dir", "folder.iterdir", "config.is_file")),
    ("jobs/demo.py", ".write_text"),
    ("jobs/search.py", "np.load"),  # a query file on the user's machine
    ("training/fitting/trainer.py", "tempfile.TemporaryDirectory"),  # Ray Train's checkpoints are folders
}


def test_only_storage_opens_files() -> None:
    users = set(TREES) - STORES
    found = [(name, call, line) for name in users for call, line in calls(name) if opens_files(call)]
    assert [item for item in found if item[:2] not in ALLOWED] == []


def opens_files(call: str) -> bool:
    owner, dot, method = call.rpartition(".")
    return (
        call in FILE_CALLS
        or call.startswith(FILE_MODULES)
        or bool(dot and owner not in ("storage", "objects", "parquet") and method in FILE_METHODS)
    )


def test_every_exception_to_the_rule_on_files_is_still_needed() -> None:
    assert {(name, call) for name in TREES for call, _ in calls(name)} >= ALLOWED


def test_every_module_says_what_it_is() -> None:
    for name, tree in TREES.items():
        assert ast.get_docstring(tree) or not tree.body, name


def test_every_public_function_and_class_says_what_it_does() -> None:
    mute = []
    for name, tree in TREES.items():
        for node in public(tree):
            if not ast.get_docstring(node) and node.name != "forward":  # nn.Module's own
                mute.append(f"{name}:{node.lineno}: {node.name}")
    assert mute == []


def test_nothing_is_too_long_to_read() -> None:
    too_long = []
    for path in MODULES:
        name = path.relative_to(ROOT).as_posix()
        most = LONGER_MODULES.get(name, SHORTER_MODULES.get(name, MAX_MODULE_LINES))
        lines = len(path.read_text().splitlines())
        if lines > most:
            too_long.append(f"{name}: {lines} lines, at most {most}")
        for node in ast.walk(TREES[name]):
            if isinstance(node, Function) and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES:
                too_long.append(f"{name}:{node.lineno}: {node.name} is over {MAX_FUNCTION_LINES} lines")
    assert too_long == []


def parameters(function: Function) -> list[ast.arg]:
    """All parameters of a function, without `self` and `cls`."""
    given = function.args
    extra = [item for item in (given.vararg, given.kwarg) if item is not None]
    found = [*given.posonlyargs, *given.args, *given.kwonlyargs, *extra]
    return [item for item in found if item.arg not in ("self", "cls")]


def functions() -> Iterator[tuple[str, Function]]:
    """All functions and methods, with their module and line."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{name}:{node.lineno}: {node.name}", node


def test_no_function_has_more_than_6_parameters() -> None:
    """A command has one for each of its options."""
    found = [
        where
        for where, function in functions()
        if len(parameters(function)) > MAX_PARAMETERS
        and not any("command(" in ast.unparse(mark) for mark in function.decorator_list)
    ]
    assert found == []


def test_few_functions_take_the_whole_config() -> None:
    """The others take their own sections of it."""
    takers = [where for where, function in functions() if any(takes_config(item) for item in parameters(function))]
    assert len(takers) <= MOST_CONFIG_PARAMETERS, takers


def takes_config(parameter: ast.arg) -> bool:
    return parameter.annotation is not None and bool(re.search(r"\bConfig\b", ast.unparse(parameter.annotation)))


def test_there_are_no_catch_all_modules() -> None:
    names = {path.stem for path in MODULES}
    assert not names & {"utils", "util", "common", "core", "manager", "helpers", "misc"}


def test_nothing_is_unpickled_and_no_weights_are_loaded_with_code() -> None:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            assert call not in ("pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads"), name
            if call == "torch.load":
                words = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert words.get("weights_only") == "True", f"{name}:{node.lineno}"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("jobs.cli", ("torch", "ray", "faiss", "pyarrow", "torchvision", "matplotlib", "numpy")),
        ("pipeline.embedding.stream", ("torch", "torchvision", "faiss")),
        ("pipeline.planning.build", ("torch", "torchvision", "faiss")),
        ("pipeline.embedding.decode", ("torch", "torchvision", "ray", "faiss")),
        ("pipeline.serving.searcher", ("torch", "ray", "torchvision")),
    ],
)
def test_module_does_not_import_heavy_packages(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(sorted(set(sys.modules) & set({heavy!r})))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_torchvision_is_loaded_only_where_it_is_needed() -> None:
    slow = {name for name in TREES if any(item.split(".")[0] == "torchvision" for item in imported(name, True))}
    assert slow == set(), "torchvision takes seconds to import: import it inside the function that needs it"


def test_every_command_is_listed() -> None:
    commands = set()
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            marks = [ast.unparse(mark) for mark in node.decorator_list] if isinstance(node, Function) else []
            if any(mark.startswith(("command(", "click.command(")) for mark in marks):
                commands.add(Path(name).stem)
    assert set(main.commands) == commands
