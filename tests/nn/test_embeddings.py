import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxmm.nn.embeddings import (
    PatchEmbedding,
    TokenEmbedding,
    interpolation_matrix,
    patchify,
    resize_positions,
    sincos_positions,
)
from jaxmm.nn.pixels import CLIP_PIXELS, IMAGENET, INCEPTION
from tests import reference
from tests.reference import arrays

# torch.nn.functional.interpolate(mode="bicubic", align_corners=False) of this 3 x 3 table of 2-vectors, torch 2.13
TABLE = np.float32([[0, 7], [14, 2], [9, 16], [4, 11], [18, 6], [13, 1], [8, 15], [3, 10], [17, 5]])
RECORDED = {
    ("bicubic", (2, 4)): [
        [-0.2872, 8.12451], [10.77067, 3.50222], [15.0026, 5.71003], [9.35879, 13.15684],
        [7.28428, 14.59326], [5.72446, 11.65884], [9.95639, 6.6426], [16.93028, 3.15957]],
    ("bicubic-antialias", (2, 4)): [
        [0.46799, 8.50036], [10.89587, 4.58962], [14.88652, 5.6323], [9.93814, 10.97473],
        [6.67472, 14.02203], [7.27825, 11.03135], [11.26889, 6.25923], [16.14487, 2.69737]],
    ("bicubic", (5, 4)): [
        [-1.38888, 6.97489], [9.1204, 1.67928], [13.35233, 6.76889], [8.25711, 18.57581], [0.16093, 8.62289],
        [11.79372, 4.33759], [16.02566, 5.10309], [9.80692, 10.36774], [2.99512, 11.35889], [13.5044, 8.35107],
        [17.73633, 3.64893], [12.64111, 0.64111], [6.56574, 14.09489], [7.52507, 11.23737], [11.75701, 5.89197],
        [16.21174, 1.91093], [8.87381, 15.74289], [2.28056, 12.73508], [6.51250, 8.03293], [18.51981, 5.02511]],
    ("bicubic-antialias", (5, 4)): [
        [-1.03323, 6.95931], [8.82346, 2.48151], [12.81411, 7.10798], [8.43692, 17.93833], [0.4481, 8.48508],
        [10.94213, 4.57544], [14.93277, 5.61115], [9.91824, 10.94292], [3.26866, 11.26119], [13.12535, 8.21702],
        [17.116, 3.78297], [12.73881, 0.73881], [6.68918, 14.03731], [7.30448, 11.05283], [11.29512, 6.24156],
        [16.15933, 2.61974], [8.63799, 15.56308], [3.18654, 12.51891], [7.17719, 8.08486], [18.10814, 5.04069]],
}


def test_patchify():
    image, = arrays((2, 6, 9, 2))
    np.testing.assert_array_equal(jax.jit(patchify, static_argnums=1)(image, 3), reference.patchify(image, 3))


@pytest.mark.parametrize("bias", [True, False])
def test_patch_embedding_is_a_convolution(bias):
    image, = arrays((2, 8, 12, 3))
    module = PatchEmbedding(4, 5, bias)
    params = reference.random_like(jax.eval_shape(module.init, jax.random.key(0), image)["params"])
    assert set(params) == {"kernel"} | ({"bias"} if bias else set())
    ours = jax.jit(lambda p: module.apply({"params": p}, image))(params)
    convolved = jax.lax.conv_general_dilated(image, jnp.asarray(params["kernel"]), (4, 4), "VALID",
                                             dimension_numbers=("NHWC", "HWIO", "NHWC"))
    convolved = np.asarray(convolved).reshape(2, 6, 5)
    np.testing.assert_allclose(ours, convolved + np.asarray(params.get("bias", 0)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows, columns, width", [(3, 5, 8), (2, 2, 12)])
def test_sincos(rows, columns, width):
    expected = reference.sincos(rows, columns, width)
    np.testing.assert_allclose(sincos_positions(rows, columns, width), expected, atol=1e-6)


@pytest.mark.parametrize("width", [6, 4])
def test_sincos_refuses(width):
    with pytest.raises(ValueError, match=f"got {width}"):
        sincos_positions(2, 3, width)


METHODS = ["linear", "bicubic", "bicubic-antialias"]


@pytest.mark.parametrize("method", METHODS)
def test_same_grid_is_the_same_table(method):
    table, = arrays((1 + 16, 3))
    np.testing.assert_allclose(resize_positions(table, (4, 4), method, prefix=1), table, atol=1e-6)


@pytest.mark.parametrize("new", [(6, 3), (2, 7)])
def test_linear_is_scipys_zoom(new):
    table, = arrays((2 + 16, 3))
    expected = ndimage.zoom(np.float64(np.asarray(table)[2:]).reshape(4, 4, 3), (new[0] / 4, new[1] / 4, 1), order=1)
    out = resize_positions(table, new, "linear", prefix=2)
    np.testing.assert_array_equal(out[:2], table[:2])
    np.testing.assert_allclose(out[2:], expected.reshape(-1, 3), atol=1e-6)


@pytest.mark.parametrize("method, new", RECORDED)
def test_bicubic_is_torchs(method, new):
    np.testing.assert_allclose(resize_positions(jnp.asarray(TABLE), new, method), RECORDED[method, new], atol=2e-5)


@pytest.mark.parametrize("new", [3, 12])
def test_antialias_agrees_with_jax_image(new):
    line, = arrays((7,))
    expected = jax.image.resize(line, (new,), "cubic", antialias=True)
    ours = interpolation_matrix(7, new, "bicubic-antialias") @ np.asarray(line)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("old, new", [(7, 3), (3, 7), (4, 1), (1, 3)])
def test_weights_sum_to_one(method, old, new):
    matrix = interpolation_matrix(old, new, method)
    assert matrix.shape == (new, old)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)


def test_a_table_that_is_no_square():
    with pytest.raises(ValueError, match="17 positions with 0 for class tokens is not a square"):
        resize_positions(jnp.zeros((17, 3)), (2, 2), "linear")


def test_tokens():
    tokens = jnp.asarray([[3, 0, 6], [6, 6, 1]])
    params = {"embedding": arrays((7, 4))[0]}
    out = jax.jit(lambda p: TokenEmbedding(7, 4).apply({"params": p}, tokens))(params)
    np.testing.assert_array_equal(out, np.asarray(params["embedding"])[np.asarray(tokens)])


@pytest.mark.parametrize("pixels, white", [
    (INCEPTION, [1, 1, 1]), (IMAGENET, [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]),
    (CLIP_PIXELS, [0.51854534 / 0.26862954, 0.5421725 / 0.26130258, 0.59178929 / 0.27577711])])
def test_pixels(pixels, white):
    image = jnp.full((1, 1, 2, 3), 255, jnp.uint8).at[0, 0, 1].set(51)
    out = jax.jit(pixels)(image)
    np.testing.assert_allclose(out[0, 0, 0], white, rtol=1e-5)
    np.testing.assert_allclose(out[0, 0, 1], (0.2 - np.array(pixels.mean)) / pixels.std, rtol=1e-5, atol=1e-6)
