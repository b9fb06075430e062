import numpy as np

from vc2.miniature.degrade import WATERMARK_OPACITY, footage, soften, stamp, watermark_alpha

GREY = np.full((48, 80, 3), 100, np.uint8)


def test_the_watermark_keeps_its_place_when_a_frame_is_cropped_to_five_by_three() -> None:
    tall, flat = watermark_alpha(160, 128), watermark_alpha(160, 96)
    assert np.allclose(tall[16:-16], flat)
    assert 0.02 < flat.mean() < 0.2 and flat.max() == 1


def test_a_stamp_pulls_towards_white_where_the_watermark_is_and_nowhere_else() -> None:
    alpha, stamped = watermark_alpha(80, 48), stamp(GREY).astype(float)
    assert np.all(stamped[alpha == 0] == 100)
    assert np.allclose(stamped[..., 0], 100 + WATERMARK_OPACITY * alpha * 135, atol=1.5)


def test_softening_keeps_the_mean_and_lowers_contrast() -> None:
    noisy = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    soft = soften(noisy)
    assert abs(soft.mean() - noisy.mean()) < 1 and soft.std() < 0.6 * noisy.std()


def test_footage_has_the_noise_asked_for_and_it_changes_from_frame_to_frame() -> None:
    first, second = footage([GREY, GREY], np.random.default_rng(0), 5.0)
    bare = watermark_alpha(80, 48) == 0
    bare[0] = bare[-1] = False
    clear = bare & np.roll(bare, 1, 0) & np.roll(bare, -1, 0) & np.roll(bare, 1, 1) & np.roll(bare, -1, 1)
    for frame in (first, second):
        assert abs(frame[clear].astype(float).std() - 5) < 0.7
    assert (first != second).mean() > 0.7
