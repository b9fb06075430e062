"""Floors, doors and cheap imports: the rules that keep the house standing, held by looking at the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted([*ROOT.glob("vc2/**/*.py"), *ROOT.glob("flows/**/*.py")])

FLOORS = [  # from the ground up; a module may import its own part and the floors below
    {"ground"},
    {"vc2.data", "vc2.model"},
    {"vc2.train", "vc2.eval"},
    {"vc2.miniature"},
    {"vc2.pipeline"},
    {"vc2.cli", "flows"},
]

DOORS = {  # framework -> where alone it may be imported
    "prefect": ("flows/",),
    "ray": ("vc2/data/prepare.py", "vc2/ray_session.py", "vc2/ray_jobs.py"),
    "deepspeed": ("vc2/train/engine.py",),
    "boto3": ("vc2/storage.py",),
    "botocore": ("vc2/storage.py",),
    "webdataset": ("vc2/data/shards.py",),
    "decord": ("vc2/data/media.py",),
    "av": ("vc2/data/decode.py", "vc2/data/media.py", "vc2/data/video_files.py"),
    "open_clip": ("vc2/model/text.py", "vc2/model/image.py", "vc2/eval/"),
    "diffusers": ("vc2/model/", "vc2/eval/"),
    "peft": ("vc2/model/",),
    "transformers": ("vc2/model/", "vc2/eval/"),
}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(module: str) -> str:
    if module.startswith("flows"):
        return "flows"
    names = module.split(".")
    packages = {"data", "model", "train", "eval", "miniature", "pipeline", "cli"}
    return f"vc2.{names[1]}" if len(names) > 1 and names[1] in packages else "ground"


def floor_of(part: str) -> int:
    return next(level for level, parts in enumerate(FLOORS) if part in parts)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    own = part_of(module_name(path))
    for name in imported(path):
        if name.split(".")[0] in ("vc2", "flows"):
            other = part_of(name)
            assert other == own or floor_of(other) < floor_of(own), f"{module_name(path)} imports {name}"


@pytest.mark.parametrize("framework", DOORS)
def test_each_framework_has_one_door(framework: str) -> None:
    doors = DOORS[framework]
    for path in MODULES:
        place = path.relative_to(ROOT).as_posix()
        if not place.startswith(doors):
            found = [name for name in imported(path) if name.split(".")[0] == framework]
            assert not found, f"{place} imports {found}; the door of {framework} is {doors}"


def test_packages_import_nothing() -> None:
    for path in MODULES:
        if path.name == "__init__.py":
            assert not list(imported(path)), path


HEAVY = ("torch", "ray", "prefect", "deepspeed", "diffusers", "transformers", "decord")


def loaded_by(code: str) -> set[str]:
    probe = f"import sys\n{code}\nprint('LOADED', *{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split("LOADED")[1].split())


@pytest.mark.parametrize(
    "module", ["vc2.data.config", "vc2.model.config", "vc2.train.config", "vc2.eval.config", "vc2.miniature.config",
               "vc2.pipeline.recipes", "vc2.pipeline.driver", "vc2.pipeline.stages"]
)  # fmt: skip
def test_configuration_is_cheap_to_import(module: str) -> None:
    assert not loaded_by(f"import {module}").intersection(HEAVY)


def test_help_loads_hardly_anything() -> None:
    loaded = loaded_by("from vc2.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass")
    assert not loaded.intersection({*HEAVY, "numpy", "pydantic", "boto3", "pyarrow", "rich"})


def test_looking_at_artifacts_loads_no_engine(tmp_path: Path) -> None:
    for command in (["plan", "--store", f"{tmp_path}/s"], ["show", f"{tmp_path}/s/shards/x/y"],
                    ["verify", f"{tmp_path}/s/shards/x/y"]):  # fmt: skip
        assert not loaded_by(f"from vc2.cli import main\nmain({command!r})").intersection(HEAVY)
