"""BLIP (Li et al. 2022): a picture encoder, and a text transformer that encodes, matches, writes and compares."""

from dataclasses import dataclass, field, replace

from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxmm.models.clip import normalise
from jaxmm.models.med import Context, Med, MedConfig
from jaxmm.models.vit import ViT, ViTConfig, vit
from jaxmm.nn.precision import widened
from jaxmm.validation import check_types, require


@dataclass(frozen=True, kw_only=True)
class BLIPConfig:
    """Which parts there are. The defaults are those of pre-training, base."""

    vision: ViTConfig
    text: MedConfig = field(default_factory=MedConfig)
    answer: MedConfig | None = None
    """A decoder that sees what the image-grounded encoder made of a question, for answers (section 4.4); None: none."""
    embed_dim: int | None = 256
    """e, the size of the space in which pictures and texts are compared; None: they are not."""
    matching: bool = True
    """Whether there is a head that tells whether picture and text belong together."""
    temperature: float | None = 0.07
    """Initial value of the learned temperature; None: there is none, as in files for inference."""
    encode_token: bool = True
    """Whether [ENC] takes the place of the first token where a text is read with a picture, as in training. False:
    [CLS] stays, as in transformers and in the authors' class for matching."""

    def __post_init__(self):
        """Checks that the parts fit each other."""
        check_types(self)
        require(not self.vision.classes, "vision.classes", self.vision.classes, "None: a tower has no head")
        width = self.vision.transformer.width
        require(self.text.context_width == width, "text.context_width", self.text.context_width,
                f"the picture encoder's width = {width}")
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


class BLIP(nn.Module):
    """The parts of a `BLIPConfig`; a method for each thing they do."""

    config: BLIPConfig

    def setup(self):
        """Declares the parts."""
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

    def see(self, image: Float[Array, "b H W 3"], *, train: bool) -> Float[Array, "b n c"]:
        """A picture's tokens behind the last norm, which everything else looks at; computed once for all of it."""
        return self.vision(image, train=train).tokens

    def see_two(self, image: Float[Array, "b 2 H W 3"], *, train: bool
                ) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
        """The tokens of the first and of the second pictures, which are encoded as one batch of twice as many."""
        b = len(image)
        seen = self.see(image.reshape(2 * b, *image.shape[2:]), train=train)
        seen = seen.reshape(b, 2, *seen.shape[1:])
        return seen[:, 0], seen[:, 1]

    def embed_image(self, seen: Float[Array, "b n c"]) -> Float[Array, "b e"]:
        """Pictures in the shared space, length 1, fp32."""
        return normalise(self.vision_projection(widened(seen[:, 0])))

    def embed_text(self, tokens: Int[Array, "b t"], *, train: bool) -> Float[Array, "b e"]:
        """Texts in the shared space, length 1, fp32: the unimodal encoder."""
        first = self.text.encode(tokens, train=train)[:, 0]
        return normalise(self.text_projection(widened(first)))

    def read(
        self, tokens: Int[Array, "b t"], seen: Context, *, train: bool, mask: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Texts read in view of pictures, or of two each: the image-grounded encoder.

        A text is read with the picture of its own row, or with fewer pictures than texts, as many texts in turn with
        each.
        """
        mask = tokens != self.config.text.pad_id if mask is None else mask
        if self.config.encode_token:
            tokens = tokens.at[:, 0].set(self.config.text.encode_id)
        return self.text.encode(tokens, seen, train=train, mask=mask)

    def match(self, tokens: Int[Array, "b t"], seen: Float[Array, "r n c"], *, train: bool) -> Float[Array, "b 2"]:
        """Logits of "do not belong together" and "belong together", fp32, of texts with the pictures of `read`."""
        read = self.read(tokens, seen, train=train)
        return self.matching_head(widened(read[:, 0]))

    def compare(
        self, tokens: Int[Array, "b t"], first: Float[Array, "b n c"], second: Float[Array, "b n c"], *, train: bool,
    ) -> Float[Array, "b 2"]:
        """Logits of "false" and "true" of what each text says of two pictures, fp32 (section 4.5)."""
        read = self.read(tokens, (first, second), train=train)
        return self.pair_head(nn.relu(self.pair_hidden(widened(read[:, 0]))))

    def write(
        self, tokens: Int[Array, "b t"], context: Float[Array, "b n c"], *, train: bool,
        context_mask: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, "b t v"]:
        """Logits of the token after each, fp32: the image-grounded decoder, or that of answers."""
        decoder = getattr(self, self.config.decoder_name)
        return decoder.decode(tokens, context, train=train, context_mask=context_mask)

    def __call__(self, image: Float[Array, "b *p H W 3"], tokens: Int[Array, "b t"], *, train: bool
                 ) -> dict[str, Array]:
        """Everything that the parts do, of pictures (where they are compared, two each) and texts side by side."""
        if self.config.pair:
            return {"compare": self.compare(tokens, *self.see_two(image, train=train), train=train)}
        config, seen = self.config, self.see(image, train=train)
        found: dict[str, Array] = {}
        if config.embed_dim:
            found |= {"image": self.embed_image(seen), "text": self.embed_text(tokens, train=train)}
        if config.matching:
            found["match"] = self.match(tokens, seen, train=train)
        if config.reads_questions:
            seen = self.read(tokens, seen, train=train)
        if config.decoder is not None:
            found["logits"] = self.write(tokens, seen, train=train)
        return found


def blip(size: str = "base", *, image_size: int = 224, stack: dict | None = None, **overrides) -> BLIPConfig:
    """BLIP base or large (its picture encoder; the text transformer is BERT base in both).

    `stack` holds fields of both towers' `TransformerConfig`, `overrides` fields of `BLIPConfig`.
    """
    require(size in ("base", "large"), "size", size, "base or large")
    vision = vit({"base": "B/16", "large": "L/16"}[size], image_size=image_size,
                 stack={"eps": 1e-6, "init": "normal", "drop_path": 0.1 if size == "large" else 0.0} | (stack or {}))
    text = MedConfig(context_width=vision.transformer.width)
    if stack:
        text = replace(text, transformer=replace(text.transformer, **stack))
    return BLIPConfig(**{"vision": vision, "text": text} | overrides)


