"""The models once more in numpy, fp64, layer by layer and without any of jaxmm's code; and parameters to feed both."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import erf

ACTIVATIONS = {
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def random_like(shapes, scale=0.3):
    """A pytree of fp32 arrays of the shapes of `shapes`, each drawn by its own path; norms' scales around 1."""
    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=leaf.shape) * scale
        return jnp.asarray(values + name.endswith("['scale']"), jnp.float32)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_params(model, *inputs, scale=0.3):
    """Random parameters of a Linen module that takes `inputs`; nothing is compiled."""
    def init(key, *inputs):
        return model.init(key, *inputs, train=False)["params"]
    return random_like(jax.eval_shape(init, jax.random.key(0), *inputs), scale)


def arrays(*shapes, seed=0, scale=1.0):
    """Normally distributed fp32 arrays of these shapes."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape) * scale, jnp.float32) for shape in shapes]


def fp64(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def log_softmax(x, axis):
    x = x - x.max(axis=axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))


def norm(p, x, eps):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def attend(query, key, value, mask=None):
    """[b t h k], [b s h k] twice, [b h t s] of bools: one example, head and query after the other."""
    out = np.zeros_like(query)
    weights = np.zeros((len(query), query.shape[2], query.shape[1], key.shape[1]))
    for b, h, t in np.ndindex(*weights.shape[:3]):
        scores = key[b, :, h] @ query[b, t, h] / np.sqrt(query.shape[-1])
        if mask is not None:
            scores = np.where(np.broadcast_to(mask, weights.shape)[b, h, t], scores, -np.inf)
        weights[b, h, t] = softmax(scores)
        out[b, t, h] = weights[b, h, t] @ value[b, :, h]
    return out, weights


def attention(p, x, context, mask=None):
    def project(name, x):
        return np.einsum("btd,dhk->bthk", x, p[name]["kernel"]) + p[name].get("bias", 0.0)
    y, weights = attend(project("query", x), project("key", context), project("value", context), mask)
    return np.einsum("bthk,hkd->btd", y, p["out"]["kernel"]) + p["out"].get("bias", 0.0), weights


def mlp(p, x, activation):
    x = ACTIVATIONS[activation](x @ p["up"]["kernel"] + p["up"].get("bias", 0.0))
    return x @ p["down"]["kernel"] + p["down"].get("bias", 0.0)


def block(p, x, config, mask=None):
    y = norm(p["attention_norm"], x, config.eps)
    y, weights = attention(p["attention"], y, y, mask)
    x = x + y
    return x + mlp(p["mlp"], norm(p["mlp_norm"], x, config.eps), config.activation), weights


def encoder(p, x, config, mask=None):
    """The last tokens, all layers' tokens and all layers' attention weights."""
    hidden, weights = [], []
    for layer in range(config.depth):
        x, w = block(jax.tree.map(lambda a, i=layer: a[i], p["blocks"]), x, config, mask)
        hidden.append(x)
        weights.append(w)
    return x, np.stack(hidden), np.stack(weights)


def rms(p, x, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * p["scale"]


def igpt(p, tokens, config, hidden=None, causal=True):
    """Logits, every layer's features and class logits of iGPT; tokens where `hidden` is True are embedded as zeros."""
    stack, t = config.transformer, tokens.shape[1]
    x = p["tokens"]["embedding"][tokens]
    if hidden is not None:
        x = x * ~hidden[..., None]
    x, features = x + p["positions"][:t], []
    mask = np.tril(np.ones((t, t), bool))[None, None] if causal else None
    for layer in range(stack.depth):
        block = jax.tree.map(lambda a, i=layer: a[i], p["blocks"])
        y = rms(block["attention_norm"], x, stack.eps)
        features.append(y.mean(axis=1))
        x = x + attention(block["attention"], y, y, mask)[0]
        x = x + mlp(block["mlp"], rms(block["mlp_norm"], x, stack.eps), stack.activation)
    x = rms(p["norm"], x, stack.eps)
    classes = x.mean(axis=1) @ p["class_head"]["kernel"] if config.classes else None
    return x @ p["head"]["kernel"], np.stack(features, axis=1), classes


def map_head(p, tokens, config, mask=None):
    probe = np.broadcast_to(p["probe"], (len(tokens), 1, config.width))
    x, _ = attention(p["attention"], probe, tokens, mask)
    return (x + mlp(p["mlp"], norm(p["mlp_norm"], x, config.eps), config.activation))[:, 0]


def patchify(image, patch):
    """[b n p*p*c], one patch after the other."""
    _, height, width, _ = image.shape
    corners = [(y, x) for y in range(0, height, patch) for x in range(0, width, patch)]
    return np.stack([image[:, y : y + patch, x : x + patch].reshape(len(image), -1) for y, x in corners], axis=1)


def sincos(rows, columns, width):
    """One position and one frequency after the other."""
    table, quarter = np.zeros((rows * columns, width)), width // 4
    for n in range(rows * columns):
        y, x = divmod(n, columns)
        for i in range(quarter):
            wavelength = 10_000 ** (i / (quarter - 1))
            for part, value in enumerate((np.sin(x / wavelength), np.cos(x / wavelength),
                                          np.sin(y / wavelength), np.cos(y / wavelength))):
                table[n, part * quarter + i] = value
    return table


def vit(p, image, config):
    """(tokens, pooled, logits, hidden, attention) of a vision transformer."""
    stack, width = config.transformer, config.transformer.width
    kernel = p["patches"]["kernel"].reshape(-1, width)
    x = patchify(image, config.patch) @ kernel + p["patches"].get("bias", 0.0)
    side = config.image_size // config.patch
    slot = config.class_token and config.position_class
    if config.positions == "sincos":
        positions = sincos(side, side, width)
        if slot:
            positions = np.concatenate([np.zeros((1, width)), positions])
    else:
        positions = p["positions"]
    x = x + positions[-side * side:]
    special = []
    if config.class_token:
        special.append(p["class_token"] + positions[0] if slot else p["class_token"])
    special.extend(p.get("registers", ()))
    if special:
        x = np.concatenate([np.tile(np.stack(special), (len(x), 1, 1)), x], axis=1)
    if config.pre_norm:
        x = norm(p["pre_norm"], x, stack.eps)
    x, hidden, weights = encoder(p["encoder"], x, stack)
    tokens = norm(p["norm"], x, stack.eps)
    pooled = {"cls": lambda: tokens[:, 0], "gap": lambda: tokens[:, -side * side:].mean(axis=1),
              "map": lambda: map_head(p["map_head"], tokens, stack)}[config.pool]()
    if config.pre_logits:
        pooled = np.tanh(pooled @ p["pre_logits"]["kernel"] + p["pre_logits"]["bias"])
    logits = pooled @ p["head"]["kernel"] + p["head"]["bias"] if config.classes else None
    return tokens, pooled, logits, hidden, weights


def grid_scores(p, side, scores):
    """[h n n] position scores of attention over a grid: one head, query and key after the other."""
    heads = len(p["inverse_spread"]) if "centers" in p else p["row_scores"]["kernel"].shape[1]
    result = np.zeros((heads, side * side, side * side))
    for h, q, k in np.ndindex(*result.shape):
        down, right = k // side - q // side, k % side - q % side
        if scores.startswith("learned"):
            result[h, q, k] = sum(p[f"{name}_embedding"][offset + side - 1] @ p[f"{name}_scores"]["kernel"][:, h]
                                  for name, offset in (("row", down), ("column", right)))
            continue
        apart, spread = np.array([down, right]) - p["centers"][h], p["inverse_spread"][h]
        precision = spread**2 * np.eye(2) if scores == "quadratic" else spread @ spread.T
        result[h, q, k] = -apart @ precision @ apart / 2
    return result


def grid_attention(p, x, side, scores):
    """The output and the weights [b h n n] of attention over a grid."""
    positions = grid_scores(p, side, scores)
    weights, out = np.zeros((len(x), *positions.shape)), np.zeros((*x.shape[:2], len(p["projection"]["bias"])))
    for b, h in np.ndindex(*weights.shape[:2]):
        content = 0.0
        if scores == "learned_content":
            query, key = (x[b] @ p[name]["kernel"][:, h] + p[name]["bias"][h] for name in ("query", "key"))
            content = query @ key.T / np.sqrt(query.shape[-1])
        weights[b, h] = softmax(positions[h] + content)
        out[b] += weights[b, h] @ x[b] @ p["out"]["kernel"][h]
    return (out + p["out"]["bias"]) @ p["projection"]["kernel"] + p["projection"]["bias"], weights


def attention_conv(p, image, config):
    """(tokens, pooled, logits, hidden, attention) of self-attention as convolution."""
    kernel = p["patches"]["kernel"].reshape(-1, config.width)
    x, hidden, attention = patchify(image, config.patch) @ kernel + p["patches"]["bias"], [], []
    for layer in range(config.depth):
        block = jax.tree.map(lambda a, i=layer: a[i], p["encoder"]["blocks"])
        y, weights = grid_attention(block["attention"], x, config.image_size // config.patch, config.scores)
        x = norm(block["attention_norm"], x + y, 1e-12)
        x = norm(block["mlp_norm"], x + mlp(block["mlp"], x, "gelu"), 1e-12)
        hidden.append(x)
        attention.append(weights)
    pooled = x.mean(axis=1)
    return x, pooled, pooled @ p["head"]["kernel"] + p["head"]["bias"], np.stack(hidden), np.stack(attention)


def text_tower(p, tokens, config):
    """The pooled vectors of texts."""
    stack = config.transformer
    b, t = tokens.shape
    x = p["tokens"]["embedding"][tokens] + p["positions"][:t]
    seen = np.ones((b, t), bool) if config.pad_id is None else tokens != config.pad_id
    mask = np.zeros((b, 1, t, t), bool)
    for i, row, column in np.ndindex(b, t, t):
        mask[i, 0, row, column] = seen[i, column] and not (config.causal and column > row)
    x = norm(p["norm"], encoder(p["encoder"], x, stack, mask)[0], stack.eps)
    if config.pool == "map":
        return map_head(p["map_head"], x, stack, seen[:, None, None, :])
    if config.pool == "mean":
        return np.stack([row[here].mean(axis=0) for row, here in zip(x, seen, strict=True)])
    at = {"argmax": lambda row: row.tolist().index(max(row)), "eos": lambda row: row.tolist().index(config.eos_id),
          "last": lambda row: t - 1, "first": lambda row: 0}[config.pool]
    return np.stack([x[i, at(row)] for i, row in enumerate(tokens)])


def unit(x):
    return x / np.sqrt((x**2).sum(axis=-1, keepdims=True))


def clip(p, image, tokens, config):
    """Normalised embeddings of both."""
    x = vit(p["vision"], image, config.vision)[1]
    if config.vision_projection:
        x = x @ p["vision_projection"]["kernel"]
    y = text_tower(p["text"], tokens, config.text) @ p["text_projection"]["kernel"]
    return unit(x), unit(y + p["text_projection"].get("bias", 0.0))


def med_layer(p, x, config, own, mask, context, context_mask=None, shares=None):
    """One layer behind whose branches the norms are; `own` maps the parts to the names that this mode uses."""
    def add(part, x, y):
        return norm(p[f"{own[part]}_norm"], x + y, config.eps)
    x = add("attention", x, attention(p[own["attention"]], x, x, mask)[0])
    if context is not None:
        y, weights = attention(p[own["cross_attention"]], x, context, context_mask)
        x = add("cross_attention", x, y)
        if shares is not None:
            shares.append(weights)
    return add("mlp", x, mlp(p[own["mlp"]], x, config.activation))


def med(p, tokens, config, context=None, *, causal=False, keep=None, shares=None):
    """States of a text transformer with norms behind its branches; `keep` [b t]: tokens that are there; `shares`: a
    list that takes each layer's weights of cross-attention."""
    stack = config.transformer
    table, places = p["embedding"]["tokens"]["embedding"], p["embedding"]["positions"]
    x = norm(p["embedding"]["norm"], table[tokens] + places[:tokens.shape[1]], stack.eps)
    b, t = tokens.shape
    keep = tokens != config.pad_id if keep is None else keep
    mask = np.zeros((b, 1, t, t), bool)
    for i, row, column in np.ndindex(b, t, t):
        mask[i, 0, row, column] = keep[i, column] and not (causal and column > row)
    both = config.encoder and causal
    own = {part: f"causal_{part}" if both and part in config.own else part
           for part in ("attention", "cross_attention", "mlp")}
    for layer in range(stack.depth):
        x = med_layer(jax.tree.map(lambda a, i=layer: a[i], p["blocks"]), x, stack, own, mask, context, shares=shares)
    return x


def language_head(p, x, config):
    """Logits of the next token."""
    head, stack = p["head"], config.transformer
    y = ACTIVATIONS[stack.activation](x @ head["transform"]["kernel"] + head["transform"]["bias"])
    return norm(head["norm"], y, stack.eps) @ p["embedding"]["tokens"]["embedding"].T + head["bias"]
