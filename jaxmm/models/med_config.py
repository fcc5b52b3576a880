"""Configuration of BLIP's text transformer."""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from jaxmm.nn.transformer import TransformerConfig
from jaxmm.validation import POSITIVE, check_types, require

Part = Literal["attention", "cross_attention", "mlp"]
"""A part of a layer."""


@dataclass(frozen=True, kw_only=True)
class MedConfig:
    """A text transformer in BERT's form (post-norm). The defaults are BLIP base's."""

    transformer: TransformerConfig = field(default_factory=lambda: TransformerConfig(
        width=768, depth=12, heads=12, mlp_dim=3072, eps=1e-12, init="normal", dropout=0.1, attention_dropout=0.1))
    """Stack of layers. Its `dropout` acts on the embeddings and behind each branch."""
    vocab_size: Annotated[int | None, POSITIVE] = 30_524
    """BERT's 30,522 tokens, [DEC] and [ENC]. None: the tokens of the run's tokenizer, and these two."""
    positions: Annotated[int, POSITIVE] = 512
    """Longest text, in tokens."""
    context_width: Annotated[int, POSITIVE] = 768
    """c, width of the tokens that cross-attention reads."""
    encoder: bool = True
    """True if there is an encoder, of texts alone and of texts with an image."""
    decoder: bool = True
    """True if there is a decoder."""
    own: tuple[Part, ...] = ("attention",)
    """Parts that the decoder does not share with the encoder. The paper compares all but self-attention shared (the
    default, table 3), all but cross-attention, everything, and nothing."""
    merge_from: int | None = None
    """Index of the first layer that merges two images by a linear layer (section 4.5; BLIP: 6 of 12). Every layer then
    has one cross-attention per image, and the layers before take the mean. None: texts are read with one image."""
    pad_id: int = 0
    """Padding, hidden from attention."""
    end_id: int = 102
    """[SEP]."""
    decode_id: int = 30_522
    """[DEC], the first token of what is decoded."""
    encode_id: int = 30_523
    """[ENC], which replaces [CLS] in texts that are read with an image."""

    def __post_init__(self):
        """Check that the modes and the special tokens fit each other."""
        check_types(self, "text")
        require(self.encoder or self.decoder, "text.encoder", self.encoder, "True, if decoder is False")
        for name in ("pad_id", "end_id"):
            require(0 <= getattr(self, name) < (self.vocab_size or math.inf), f"text.{name}", getattr(self, name),
                    f"0 or more, below vocab_size = {self.vocab_size}")
        if self.merge_from is not None:
            depth = self.transformer.depth
            require(0 < self.merge_from < depth, "text.merge_from", self.merge_from,
                    f"1 to {depth - 1}, below the depth, or None")
            require(not self.decoder, "text.decoder", self.decoder, "False: with merge_from it only encodes")

    def adopt(self, trained: "MedConfig", **changes) -> "MedConfig":
        """Return `trained` with the modes of this one, with `changes`; what only training uses stays."""
        both = self.encoder and self.decoder and trained.encoder and trained.decoder
        return replace(trained, encoder=self.encoder, decoder=self.decoder, own=trained.own if both else self.own,
                       merge_from=self.merge_from, transformer=self.transformer.adopt(trained.transformer), **changes)
