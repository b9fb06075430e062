import subprocess
import sys
from pathlib import Path

import pytest

from vc2.data.config import FolderSource, SampleForm, ShardStage, WebVidSource, source_digest
from vc2.errors import SourceError


def folder_source(root: Path) -> FolderSource:
    return FolderSource(name="mine", media="image", folder=str(root))


def test_what_is_asked_for_does_not_depend_on_where_the_files_lie(tmp_path: Path) -> None:
    """Paths, workers and addresses are knobs: moving a source changes neither identity nor digest."""
    digests, identities = set(), []
    for place in ("a", "b"):
        table = tmp_path / place / "rows.csv"
        table.parent.mkdir()
        table.write_text("videoid,name,page_dir\n1,a dog,000_001\n")
        source = WebVidSource(table=str(table), videos=str(table.parent))
        digests.add(source_digest(source))
        identities.append(ShardStage(source=source, workers=len(place)).identity())
    assert len(digests) == 1
    assert identities[0] == identities[1]
    table.write_text("videoid,name,page_dir\n1,a cat,000_001\n")
    assert source_digest(source) not in digests


def test_a_folder_is_told_apart_by_its_files_and_captions(tmp_path: Path) -> None:
    """Own data without a table: names and sizes of the files and the bytes of the captions make the digest."""
    (tmp_path / "one.jpg").write_bytes(b"12345")
    (tmp_path / "one.txt").write_text("a boat")
    before = source_digest(folder_source(tmp_path))
    assert before == source_digest(folder_source(tmp_path))
    (tmp_path / "one.txt").write_text("a ship")
    assert source_digest(folder_source(tmp_path)) != before


@pytest.mark.parametrize(
    "source",
    [
        WebVidSource(table="/nowhere/rows.csv"),
        FolderSource(name="mine", media="video", folder="/nowhere"),
    ],
)
def test_a_wrong_path_is_one_clear_line(source: WebVidSource | FolderSource) -> None:
    """A path that is not there names itself and the source."""
    with pytest.raises(SourceError, match="nowhere") as caught:
        source_digest(source)
    assert "\n" not in str(caught.value)


def test_impossible_stages_are_refused_at_birth() -> None:
    """Images have one frame; strides are in order."""
    with pytest.raises(ValueError, match="must be 1"):
        ShardStage(source=FolderSource(name="mine", media="image", folder="."), form=SampleForm(num_frames=2))
    with pytest.raises(ValueError, match="above max_stride"):
        SampleForm(min_stride=4, max_stride=2)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("vc2.data.config", {"torch", "ray", "av", "decord", "pyarrow", "aiohttp", "webdataset", "numpy"}),
        ("vc2.data.loader", {"torch", "ray", "av", "decord", "aiohttp", "webdataset"}),
        ("vc2.data.prepare", {"torch", "ray", "av", "decord", "aiohttp", "webdataset"}),
    ],
)
def test_imports_are_cheap(module: str, absent: set[str]) -> None:
    """What heavy packages are needed for is imported where it is done."""
    code = f"import sys, {module}; print(*[n for n in {sorted(absent)} if n in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == []
