"""BLIP (Li et al. 2022): an image encoder, and a text transformer that encodes, matches, decodes and judges pairs."""

import re
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxmm.models.clip import normalise
from jaxmm.models.med import Med
from jaxmm.models.med_config import MedConfig
from jaxmm.models.med_layer import Context
from jaxmm.models.vit import ViT, ViTConfig, vit
from jaxmm.nn.precision import widened
from jaxmm.validation import check_types, require


@dataclass(frozen=True, kw_only=True)
class BLIPConfig:
    """The parts of a BLIP. The defaults are those of pre-training, base."""

    vision: ViTConfig
    text: MedConfig = field(default_factory=MedConfig)
    answer: MedConfig | None = None
    """Decoder of answers, which reads the states of the image-grounded encoder on a question (section 4.4)."""
    embed_dim: int | None = 256
    """e, size of the space in which images and texts are compared; None: they are not."""
    matching: bool = True
    """True if there is a head that tells whether image and text belong together."""
    temperature: float | None = 0.07
    """Initial value of the learned temperature; None: there is none, as in files for inference."""
    encode_token: bool = True
    """True if [ENC] replaces the first token of texts that are read with an image, as in training. False: [CLS] stays,
    as in transformers and in the authors' class for matching."""

    def __post_init__(self):
        """Check that the parts fit each other."""
        check_types(self)
        require(not self.vision.classes, "vision.classes", self.vision.classes, "None: a tower has no head")
        width = self.vision.transformer.width
        require(self.text.context_width == width, "text.context_width", self.text.context_width,
                f"the image encoder's width = {width}")
        require(self.text.encoder or not (self.matching or self.embed_dim or self.answer), "text.encoder", False,
                "True, for embed_dim, matching or answer")
        require(not self.pair or not (self.matching or self.embed_dim or self.answer or self.temperature),
                "text.merge_from", self.text.merge_from, "None, for embed_dim, matching, answer or temperature")
        if self.answer is not None:
            width = self.text.transformer.width
            require(self.answer.context_width == width, "answer.context_width", self.answer.context_width,
                    f"the question encoder's width = {width}")

    @property
    def pair(self) -> bool:
        """True if texts are read with two images and a head tells whether they are true (section 4.5)."""
        return self.text.merge_from is not None

    @property
    def reads_questions(self) -> bool:
        """True if a question is read before the decoder writes (section 4.4)."""
        return self.answer is not None

    @property
    def decoder_name(self) -> str | None:
        """Name of the part that writes: `answer` if questions are read, else `text`; None: nothing is written."""
        return "answer" if self.reads_questions else "text" if self.text.decoder else None

    @property
    def decoder(self) -> MedConfig | None:
        """Configuration of the part that writes; None: nothing is written."""
        return self.decoder_name and getattr(self, self.decoder_name)

    @property
    def tower(self) -> ViTConfig:
        """The image tower."""
        return self.vision

    def adopt(self, trained: Any, image_size: int) -> "BLIPConfig | None":
        """Return the parts of this model with the sizes and the vocabulary of `trained`, or the image tower of a ViT.

        To read two images, cross-attention to one becomes that to both. None if `trained` is another model, or neither
        reads nor writes as this one does.
        """
        if trained.tower is trained:
            vision = self.vision.adopt(trained, image_size)
            return replace(self, vision=replace(vision, distillation_head=False))
        if not isinstance(trained, BLIPConfig) or (trained.pair and not self.pair):
            return None
        if not (self.text.encoder and trained.text.encoder) and None in (self.decoder, trained.decoder):
            return None
        vision = self.vision.adopt(trained, image_size)
        answer = self.answer and self.answer.adopt(trained.answer or trained.text,
                                                   context_width=trained.text.transformer.width)
        return replace(self, vision=vision, text=self.text.adopt(trained.text), answer=answer,
                       embed_dim=self.embed_dim and (trained.embed_dim or self.embed_dim),
                       encode_token=trained.encode_token)

    def trained_path(self, path: str, trained: Any) -> str | None:
        """Return the path in `trained` of the parameter at `path`; None if it starts anew."""
        part, _, rest = path.partition("/")
        if part == "vision":
            return self.vision.trained_path(rest, trained)
        if trained.tower is trained:
            return None
        return self._trained_text_path(part, rest, trained) if part in ("text", "answer") else path

    def _trained_text_path(self, part: str, path: str, trained: "BLIPConfig") -> str | None:
        """Return the path in `trained` of a parameter of the text transformer `part`.

        A branch of a layer is called `causal_X` if the decoder does not share X with the encoder, and the
        cross-attentions of a model that reads two images `first_X` and `second_X`.
        """
        config = getattr(self, part)
        branch = re.match(r"blocks/(causal_)?(attention|(?:first_|second_)?cross_attention|mlp)(_norm)?/", path)
        decodes = not config.encoder or path.startswith("head/") or bool(branch and branch[1])
        source = trained.decoder if decodes else trained.text
        reads_other_width = part == "answer" and source and source.context_width != config.context_width
        if reads_other_width and re.match(r"blocks/cross_attention/(key|value)/kernel$", path):
            return None
        if decodes and trained.answer is not None:
            return f"answer/{path.replace('causal_', '', 1)}"
        if not (trained.text.decoder if decodes else trained.text.encoder):
            return None
        if branch:
            name = branch[2] if trained.pair else re.sub("^(first|second)_", "", branch[2])
            causal = decodes and trained.text.encoder and name in trained.text.own
            path = f"blocks/{'causal_' if causal else ''}{name}{branch[3] or ''}/{path[branch.end():]}"
        return f"text/{path}"


class BLIPOutput(NamedTuple):
    """Outputs of all parts of a BLIP; None for those that it does not have."""

    image: Float[Array, "b e"] | None = None
    """Image embeddings, of length 1."""
    text: Float[Array, "b e"] | None = None
    """Text embeddings, of length 1."""
    match_logits: Float[Array, "b 2"] | None = None
    """Logits of "do not belong together" and "belong together"."""
    pair_logits: Float[Array, "b 2"] | None = None
    """Logits of "false" and "true"."""
    token_logits: Float[Array, "b t v"] | None = None
    """Logits of the token after each one."""
    image_attention: Float[Array, "l i h n n"] | None = None
    """Attention weights of the image encoder; i is b, or 2b for pairs."""
    encoder_attention: Float[Array, "l b h t n"] | None = None
    """Cross-attention weights of the image-grounded encoder; None for pairs."""
    decoder_attention: Float[Array, "l b h t m"] | None = None
    """Cross-attention weights of the decoder, over image tokens or a question's states."""


class BLIP(nn.Module):
    """The parts of a `BLIPConfig`, with a method for each mode."""

    config: BLIPConfig

    def setup(self):
        """Declare the parts."""
        config = self.config
        self.vision = ViT(config.vision)
        self.text = Med(config.text)
        if config.answer is not None:
            self.answer = Med(config.answer)
        if config.embed_dim:
            self.vision_projection = nn.Dense(config.embed_dim, kernel_init=nn.initializers.normal(0.02))
            self.text_projection = nn.Dense(config.embed_dim, kernel_init=nn.initializers.normal(0.02))
        if config.matching:
            self.matching_head = nn.Dense(2, kernel_init=nn.initializers.normal(0.02))
        if config.pair:
            self.pair_hidden = nn.Dense(config.text.transformer.width, kernel_init=nn.initializers.normal(0.02))
            self.pair_head = nn.Dense(2, kernel_init=nn.initializers.normal(0.02))
        if config.temperature is not None:
            self.temperature = self.param("temperature", nn.initializers.constant(config.temperature), ())

    def encode_image(self, images: Float[Array, "b H W 3"], *, train: bool) -> Float[Array, "b n c"]:
        """Return the image tokens behind the last norm, which all other parts read."""
        return self.vision(images, train=train).tokens

    def encode_image_pair(self, images: Float[Array, "b 2 H W 3"], *, train: bool
                          ) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
        """Return the image tokens of the first and of the second images, encoded as one batch of 2b."""
        b = len(images)
        image_tokens = self.encode_image(images.reshape(2 * b, *images.shape[2:]), train=train)
        image_tokens = image_tokens.reshape(b, 2, *image_tokens.shape[1:])
        return image_tokens[:, 0], image_tokens[:, 1]

    def embed_image(self, images: Float[Array, "b H W 3"], *, train: bool) -> Float[Array, "b e"]:
        """Return image embeddings in the shared space, of length 1, fp32."""
        return self.project_image(self.encode_image(images, train=train))

    def project_image(self, image_tokens: Float[Array, "b n c"]) -> Float[Array, "b e"]:
        """Return image embeddings in the shared space, of length 1, fp32, from image tokens."""
        return normalise(self.vision_projection(widened(image_tokens[:, 0])))

    def embed_text(self, tokens: Int[Array, "b t"], *, train: bool) -> Float[Array, "b e"]:
        """Return text embeddings in the shared space, of length 1, fp32, by the unimodal encoder."""
        return normalise(self.text_projection(widened(self.text.encode(tokens, train=train)[:, 0])))

    def encode_text_with_image(
        self, tokens: Int[Array, "b t"], image_tokens: Context, *, train: bool, mask: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Return the states of the image-grounded encoder, of texts with one image each, or two.

        Row r of `tokens` reads image r * images // b. `mask` is False for tokens to ignore; None: padding is ignored.
        """
        mask = tokens != self.config.text.pad_id if mask is None else mask
        return self.text.encode(self._with_encode_token(tokens), image_tokens, train=train, mask=mask)

    def _with_encode_token(self, tokens):
        return tokens.at[:, 0].set(self.config.text.encode_id) if self.config.encode_token else tokens

    def match(self, tokens: Int[Array, "b t"], image_tokens: Float[Array, "r n c"], *, train: bool
              ) -> Float[Array, "b 2"]:
        """Return the logits of "do not belong together" and "belong together", fp32.

        Row r of `tokens` reads image r * images // b.
        """
        states = self.encode_text_with_image(tokens, image_tokens, train=train)
        return self.matching_head(widened(states[:, 0]))

    def classify_pair(
        self, tokens: Int[Array, "b t"], first: Float[Array, "b n c"], second: Float[Array, "b n c"], *, train: bool,
    ) -> Float[Array, "b 2"]:
        """Return the logits of "false" and "true" for each text about two images, fp32 (section 4.5)."""
        states = self.encode_text_with_image(tokens, (first, second), train=train)
        return self.pair_head(nn.relu(self.pair_hidden(widened(states[:, 0]))))

    def decode(
        self, tokens: Int[Array, "b t"], context: Float[Array, "r n c"], *, train: bool,
        context_mask: Bool[Array, "r n"] | None = None,
    ) -> Float[Array, "b t v"]:
        """Return the logits of the token after each one, fp32: the image-grounded decoder, or that of answers.

        Row r of `tokens` reads context r * contexts // b.
        """
        return self._decoder.decode(tokens, context, train=train, context_mask=context_mask)

    @property
    def _decoder(self) -> Med:
        return getattr(self, self.config.decoder_name)

    def __call__(self, images: Float[Array, "b *p H W 3"], tokens: Int[Array, "b t"], *, train: bool,
                 attention: bool = False) -> BLIPOutput:
        """Run every part on images (two each, for pairs) and the texts of the same rows.

        `attention` requests the attention weights too, without dropout, which costs a second pass through the text
        transformer.
        """
        config = self.config
        if config.pair:
            out = BLIPOutput(pair_logits=self.classify_pair(tokens, *self.encode_image_pair(images, train=train),
                                                            train=train))
            return self._with_attention(out, images, tokens, None, None) if attention else out
        image_tokens = self.encode_image(images, train=train)
        image = text = match_logits = token_logits = None
        context = image_tokens
        if config.embed_dim:
            image, text = self.project_image(image_tokens), self.embed_text(tokens, train=train)
        if config.matching:
            match_logits = self.match(tokens, image_tokens, train=train)
        if config.reads_questions:
            context = self.encode_text_with_image(tokens, image_tokens, train=train)
        if config.decoder is not None:
            token_logits = self.decode(tokens, context, train=train)
        out = BLIPOutput(image, text, match_logits, None, token_logits)
        return self._with_attention(out, images, tokens, image_tokens, context) if attention else out

    def _with_attention(self, out, images, tokens, image_tokens, context):
        images = images.reshape(-1, *images.shape[-3:])
        weights = {"image_attention": self.vision(images, train=False, attention=True).attention}
        if self.config.text.encoder and not self.config.pair:
            weights["encoder_attention"] = self.text.cross_attention_weights(
                self._with_encode_token(tokens), image_tokens, causal=False)
        if self.config.decoder is not None:
            weights["decoder_attention"] = self._decoder.cross_attention_weights(tokens, context, causal=True)
        return out._replace(**weights)


def blip(size: str = "base", *, image_size: int = 224, stack: dict | None = None, **overrides) -> BLIPConfig:
    """Return the configuration of BLIP base or large (the image encoder; the text transformer is BERT base in both).

    `stack` holds fields of both towers' `TransformerConfig`, `overrides` fields of `BLIPConfig`.
    """
    require(size in ("base", "large"), "size", size, "base or large")
    vision = vit({"base": "B/16", "large": "L/16"}[size], image_size=image_size,
                 stack={"eps": 1e-6, "init": "normal", "drop_path": 0.1 if size == "large" else 0.0} | (stack or {}))
    text = MedConfig(context_width=vision.transformer.width)
    if stack:
        text = replace(text, transformer=replace(text.transformer, **stack))
    return BLIPConfig(**{"vision": vision, "text": text} | overrides)
