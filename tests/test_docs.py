import importlib.util
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_picture_of_the_network_is_the_network() -> None:
    """Drawn anew, it is what stands in the documentation."""
    spec = importlib.util.spec_from_file_location("draw_network", DOCS / "draw_network.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.draw() == (DOCS / "network.svg").read_text(), "run python docs/draw_network.py"
