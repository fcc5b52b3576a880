import math

import numpy as np
import pytest
from PIL import Image

from jaxmm.config import ImageConfig
from jaxmm.data.augment import OPERATIONS, rand_augment
from jaxmm.data.transforms import center_crop, eval_image, random_box, train_image


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8))


def bicubic(array, size):
    """Antialiased bicubic along the first axis, from its definition (Keys, a = -0.5, support grows with the scale)."""
    length = len(array)
    scale = max(1.0, length / size)
    rows = []
    for i in range(size):
        centre = (i + 0.5) * length / size
        x = np.abs((np.arange(length) + 0.5 - centre) / scale)
        weight = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1,
                          np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
        rows.append(np.tensordot(weight / weight.sum(), array, 1))
    return np.clip(np.stack(rows), 0, 255)


@pytest.mark.parametrize("size", [9, 40])
def test_squash_is_antialiased_bicubic(size):
    image = picture(23, 31)
    rows = np.rint(bicubic(np.asarray(image, float).swapaxes(0, 1), size)).swapaxes(0, 1)
    expected = bicubic(rows, size)
    got = eval_image(image, ImageConfig(size=size, eval_crop="squash"))
    assert got.shape == (size, size, 3) and got.dtype == np.uint8
    assert np.abs(got - expected).max() <= 1


@pytest.mark.parametrize("image_size, size, resize, resized, left, top", [
    ((45, 65), 22, 1.0, (22, 31), 0, 4),      # int(22 * 65 / 45) = 31; round(4.5) = 4
    ((65, 45), 22, 1.0, (31, 22), 4, 0),
    ((50, 37), 28, 8 / 7, (43, 32), 8, 2),    # 32 the shorter side, int(32 * 50 / 37) = 43; round(7.5) = 8
    ((10, 10), 16, 1.0, (16, 16), 0, 0),
])
def test_center_crop_by_hand(image_size, size, resize, resized, left, top):
    image = picture(*image_size)
    resized_image = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    got = eval_image(image, ImageConfig(size=size, eval_resize=resize))
    np.testing.assert_array_equal(got, resized_image[top:top + size, left:left + size])
    left, top = (resized[0] - size) // 2, (resized[1] - size) // 2      # 7 instead of 8 in the third
    got = eval_image(image, ImageConfig(size=size, eval_resize=resize, eval_crop="center_floor"))
    np.testing.assert_array_equal(got, resized_image[top:top + size, left:left + size])


def test_squash_may_leave_a_border_and_interpolation_is_chosen():
    image = picture(23, 31)
    config = ImageConfig(size=14, eval_crop="squash", eval_resize=16 / 14, interpolation="bilinear")
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))[1:15, 1:15]
    np.testing.assert_array_equal(eval_image(image, config), expected)
    centre = ImageConfig(size=14, interpolation="bilinear")
    expected = np.asarray(image.resize((14, 18), Image.Resampling.BILINEAR))[2:16]
    np.testing.assert_array_equal(eval_image(image, centre), expected)
    train = ImageConfig(size=14, train_crop="center", flip=False, interpolation="bilinear")
    np.testing.assert_array_equal(train_image(image, train, np.random.default_rng(0)), expected)


def test_long_images_are_cropped_before_they_are_resized():
    y, x = np.mgrid[:130, :9]
    image = Image.fromarray((120 + 100 * np.sin(x / 4 + y / 9)[..., None] * [1, 0.5, 0.2]).astype(np.uint8))
    resized_image = np.asarray(image.resize((24, 346), Image.Resampling.BICUBIC), int)
    assert np.abs(np.asarray(center_crop(image, 24), int) - resized_image[161:185]).max() <= 1
    # 224 x 2,240,000 as a whole; every picture row is 224 rows of one colour, but for the blend at its ends
    rows = np.arange(10_000) % 251
    thin = Image.fromarray(np.repeat(rows.astype(np.uint8)[:, None, None], 3, -1))
    got = np.asarray(center_crop(thin, 224))
    assert got.shape == (224, 224, 3)
    assert abs(int(got[0, 0, 0]) - (rows[4999] + rows[5000]) / 2) <= 2 and (np.ptp(got, axis=1) == 0).all()


def test_random_box_draws_area_and_aspect_uniformly():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box((400, 400), (0.1, 0.4), (0.5, 2.0), rng) for _ in range(3000)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (right <= 400).all() and (bottom <= 400).all()
    area = (right - left) * (bottom - top) / 400**2
    aspect = np.log2((right - left) / (bottom - top))
    for values, low, high in ((area, 0.1, 0.4), (aspect, -1, 1)):
        quantiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(quantiles, np.linspace(low, high, 5), atol=0.06 * (high - low))


def test_the_aspect_ratio_is_width_over_height():
    left, top, right, bottom = random_box((400, 400), (0.1, 0.1), (2.0, 2.0), np.random.default_rng(0))
    assert abs((right - left) / (bottom - top) - 2) < 0.02


def test_random_box_falls_back_to_the_centre():
    rng = np.random.default_rng(0)
    assert random_box((10, 1000), (0.9, 1.0), (3 / 4, 4 / 3), rng) == (0, 493, 10, 506)   # round(10 / 0.75) = 13
    assert random_box((1000, 10), (0.9, 1.0), (3 / 4, 4 / 3), rng) == (493, 0, 506, 10)
    assert random_box((1, 10_000), (0.08, 1.0), (3 / 4, 4 / 3), rng)[2] == 1


def test_random_crop_resizes_its_box():
    image, config = picture(61, 47), ImageConfig(size=16, flip=False)
    box = random_box(image.size, config.scale, config.ratio, np.random.default_rng(5))
    expected = np.asarray(image.crop(box).resize((16, 16), Image.Resampling.BICUBIC), int)
    got = train_image(image, config, np.random.default_rng(5))
    # away from the box's edge, where the resize sees what lies outside
    assert np.abs(got.astype(int) - expected)[4:-4, 4:-4].max() <= 1
    np.testing.assert_array_equal(got, train_image(image, config, np.random.default_rng(5)))
    assert (got != train_image(image, config, np.random.default_rng(6))).any()


def test_pad_shifts_by_up_to_an_eighth():
    image, config = picture(16, 16), ImageConfig(size=16, train_crop="pad", flip=False)
    padded = np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0)))
    shifts = {padded[y:y + 16, x:x + 16].tobytes(): (x, y) for y in range(5) for x in range(5)}
    rng = np.random.default_rng(0)
    corners = {shifts[train_image(image, config, rng).tobytes()] for _ in range(400)}
    assert len(corners) == 25


def test_half_of_the_images_are_mirrored():
    image, config = picture(16, 16), ImageConfig(size=16, train_crop="center")
    rng = np.random.default_rng(0)
    got = [train_image(image, config, rng) for _ in range(400)]
    mirrored = [np.array_equal(g, np.asarray(image)[:, ::-1]) for g in got]
    plain = [np.array_equal(g, np.asarray(image)) for g in got]
    assert sum(mirrored) + sum(plain) == 400 and 160 < sum(mirrored) < 240


def apply(name, image, level, seed=0):
    return np.asarray(OPERATIONS[name](image, level, np.random.default_rng(seed)))


def test_the_operations_are_big_visions():
    assert len(OPERATIONS) == 16
    image = picture(14, 10)
    x = np.asarray(image).astype(int)
    np.testing.assert_array_equal(apply("invert", image, 1.0), 255 - x)
    np.testing.assert_array_equal(apply("posterize", image, 1.0), x // 16 * 16)          # 4 bits stay
    np.testing.assert_array_equal(apply("posterize", image, 0.5), x // 64 * 64)
    np.testing.assert_array_equal(apply("solarize", image, 0.5), np.where(x < 128, x, 255 - x))
    np.testing.assert_array_equal(apply("solarize", image, 1.0), x)
    np.testing.assert_array_equal(apply("solarize_add", image, 1.0), np.where(x < 128, np.minimum(x + 110, 255), x))
    assert np.abs(apply("brightness", image, 1.0) - np.clip(1.9 * x, 0, 255)).max() <= 1
    grey = np.asarray(image.convert("L"))[..., None].astype(int)
    assert np.abs(apply("color", image, 0.0) - (grey + 0.1 * (x - grey))).max() <= 1
    assert np.abs(apply("contrast", image, 0.5) - x).max() <= 1                          # factor 0.1 + 0.9
    low, high = x.min((0, 1)), x.max((0, 1))
    assert np.abs(apply("auto_contrast", image, 1.0) - (x - low) * 255 / (high - low)).max() <= 1


def test_geometric_operations_by_hand():
    image = picture(14, 10)
    x = np.asarray(image)
    step = 100 / 224 * 14 * 0.16                                                         # one pixel
    assert math.isclose(step, 1)
    left, right = np.full_like(x, 128), np.full_like(x, 128)
    left[:, :-1], right[:, 1:] = x[:, 1:], x[:, :-1]
    got = [apply("translate_x", image, 0.16, seed) for seed in range(20)]
    assert {np.array_equal(g, left) for g in got} == {True, False}
    assert all(np.array_equal(g, left) or np.array_equal(g, right) for g in got)
    square = picture(15, 15)
    np.testing.assert_array_equal(apply("rotate", square, 0.0), np.asarray(square))
    turned = apply("rotate", square, 3.0)                                                # 90 degrees
    assert any(np.array_equal(turned, np.rot90(np.asarray(square), k)) for k in (1, 3))
    sheared = apply("shear_x", image, 1.0)
    np.testing.assert_array_equal(sheared[0], x[0])
    assert (sheared[-1] == 128).all(-1).sum() in (2, 3)                                  # 0.3 x 9.5 pixels
    cut = apply("cutout", picture(56, 56), 1.0)                                          # up to 20 x 20
    assert 10 * 10 <= ((cut == 128).all(-1)).sum() <= 20 * 20 + 5


def test_rand_augment_applies_as_many_as_asked():
    image = picture(14, 10)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        expected = image
        for operation in rng.integers(16, size=3):
            expected = list(OPERATIONS.values())[operation](expected, 1.5, rng)
        got = rand_augment(image, 3, 15.0, np.random.default_rng(seed))
        assert got.size == (14, 10) and got.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def test_train_image_augments_last():
    image = picture(20, 20)
    config = ImageConfig(size=16, train_crop="squash", flip=False, randaugment_layers=2)
    squashed = image.resize((16, 16), Image.Resampling.BICUBIC)
    expected = rand_augment(squashed, 2, 10.0, np.random.default_rng(3))
    np.testing.assert_array_equal(train_image(image, config, np.random.default_rng(3)), np.asarray(expected))
