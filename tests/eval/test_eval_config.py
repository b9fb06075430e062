from pathlib import Path

import pytest

from vc2.errors import ConfigError
from vc2.eval.config import EvaluateStage, Prompt, SampleStage, load_prompts


def test_where_prompts_lie_is_no_identity_but_what_they_say_is(tmp_path: Path) -> None:
    """The same prompts in another file are the same question; one changed word is another."""
    first, second, third = tmp_path / "a.jsonl", tmp_path / "b.txt", tmp_path / "c.txt"
    first.write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n')
    second.write_text("a cat\n\na dog\n")
    third.write_text("a cat\na hog\n")
    asked = [SampleStage(prompts_file=str(path)).with_prompts() for path in (first, second, third)]
    assert asked[0].identity() == asked[1].identity() != asked[2].identity()
    assert [prompt.id for prompt in asked[0].all_prompts()] == ["0000", "0001"]
    third.write_text("a cat\na pig\n")
    with pytest.raises(ConfigError, match="was it edited"):
        asked[2].all_prompts()


def test_a_prompt_keeps_all_that_is_known_of_it(tmp_path: Path) -> None:
    """Fields of a line beyond id and prompt become attributes."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "0007", "prompt": "2 dogs", "attributes": {"style": "ink"}, "truth": [1]}\n')
    assert load_prompts(path) == (Prompt(id="0007", text="2 dogs", attributes={"truth": [1], "style": "ink"}),)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no prompts"), ('{"id": "a"}', ":1: no prompt"), ("nonsense", ":1: no prompt"),
     ('{"id": "../x", "prompt": "a"}', ":1: no prompt"), ('{"id": "a", "prompt": "b"}\n' * 2, "given twice")],
)  # fmt: skip
def test_bad_prompt_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    """A prompt file that cannot be used says where and why."""
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_prompts(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prompts(tmp_path / "none.txt")


def test_evaluations_that_differ_in_scores_share_their_videos() -> None:
    """Metrics and mode are no part of what decides the videos; workers are no part of anything."""
    prompts = (Prompt(id="a", text="a cat"),)
    one = EvaluateStage(prompts=prompts, mode="compat", world_size=1)
    two = EvaluateStage(prompts=prompts, mode="fixed", metrics=("IS",), world_size=2)
    assert one.sampling().identity() == two.sampling().identity()
    assert one.identity() != two.identity() and one.identity() == one.evolve(world_size=4).identity()
