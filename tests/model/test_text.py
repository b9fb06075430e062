import pytest
import torch

from vc2.errors import ConfigError, WeightsError
from vc2.model.config import TextConfig
from vc2.model.text import TextEncoder

SMALL = TextConfig(width=64, heads=4, layers=3, layers_used=2, vocab_size=50)
SEEDED = TextConfig(width=32, heads=4, layers=2, layers_used=2, context_length=16, seed=7)


@pytest.fixture(scope="module")
def seeded_tower() -> TextEncoder:
    return TextEncoder(SEEDED)


@pytest.mark.parametrize(("layers_used", "output"), [(2, "out.penultimate"), (3, "out.last")])
def test_features_equal_the_recorded_with_and_without_the_last_layer(golden, layers_used, output):
    recorded = golden("text/text_small.npz")
    encoder = TextEncoder.from_released(SMALL.evolve(layers_used=layers_used), recorded.state)
    torch.testing.assert_close(encoder.encode_tokens(recorded["in.tokens"]), recorded[output], rtol=0, atol=2e-5)


def test_released_names_load_with_their_prefix_and_nothing_is_left_out(golden, name_table):
    recorded = golden("text/text_small.npz")
    prefixed = {f"cond_stage_model.model.{name}": tensor for name, tensor in recorded.state.items()}
    TextEncoder.from_released(SMALL, prefixed)
    del prefixed["cond_stage_model.model.ln_final.bias"]
    with pytest.raises(WeightsError, match=r"1 missing: ln_final\.bias"):
        TextEncoder.from_released(SMALL, prefixed)


def test_the_full_size_is_the_released_tower(name_table):
    rows = name_table("text_encoder_state_dict.tsv")
    with torch.device("meta"):
        released = {row["name"]: torch.empty([int(n) for n in row["shape"].split("x") if n]) for row in rows}
        encoder = TextEncoder.from_released(TextConfig(), released)
    assert len(encoder.tower.transformer.resblocks) == 23


def test_captions_are_framed_padded_with_zeros_and_cut_before_the_end_token(seeded_tower):
    short, empty, long = seeded_tower.tokenize(["a dog", "", "dog " * 40]).tolist()
    assert short == [49406, 320, 1929, 49407] + [0] * 12
    assert empty == [49406, 49407] + [0] * 14
    assert long == [49406] + [1929] * 14 + [49407]


def test_a_seed_names_one_tower(seeded_tower):
    again, other = TextEncoder(SEEDED), TextEncoder(SEEDED.evolve(seed=8))
    captions = ["a red ball moves left"]
    assert torch.equal(again.encode(captions), seeded_tower.encode(captions))
    assert not torch.allclose(other.encode(captions), seeded_tower.encode(captions), atol=0.1)


def test_seeded_words_stay_what_they_are_and_unlike_words_unlike(seeded_tower):
    red_ball, ball_red = seeded_tower.encode(["red ball", "ball red"])
    same_word = torch.cosine_similarity(red_ball[1], ball_red[2], dim=0)
    same_place = torch.cosine_similarity(red_ball[1], ball_red[1], dim=0)
    assert same_word > 0.7 and same_place < 0.5


def test_a_token_knows_what_came_before_it_not_what_comes_after(seeded_tower):
    left, right = seeded_tower.encode(["a ball moves left now", "a ball moves right now"])
    assert torch.equal(left[:4], right[:4])
    assert not torch.allclose(left[5], right[5], atol=1e-3)


def test_a_tower_whose_vocabulary_is_too_small_says_so():
    with pytest.raises(ConfigError, match="vocab_size=50 is smaller"):
        TextEncoder(SMALL).encode(["a dog"])
