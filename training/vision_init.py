"""Architecture, tokenizer and processor of the bundled vision model."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from llm_accel.eval.tasks.vision.questions import NUMBERS
from llm_accel.eval.tasks.vision.scenes import COLOURS, PAIRS, PATCH, SHAPES, SIZE

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<bos>", "<eos>", "<unk>", "<image>"
SPECIALS = (PAD, BOS, EOS, UNKNOWN, IMAGE)
WORDS = (
    *SPECIALS,
    *SHAPES,
    *COLOURS,
    *NUMBERS,
    *("is", "there", "a", "what", "colour", "shape", "the", "thing", "how", "many", "things", "are"),
    *("describe", "image", "left", "or", "right", "of", "above", "below", "yes", "no", "?", ".", ","),
)
VISUAL_TOKENS = (SIZE // PATCH) ** 2
MEAN, SPREAD = 0.5, 0.25  # of pixels in 0..1, all channels alike
HIDDEN = 96
TOWER_LAYERS, FEATURE_LAYER = 5, -2
USED_LAYERS = TOWER_LAYERS + FEATURE_LAYER + 1  # of the tower, up to the one whose features are used


def model_config() -> LlavaConfig:
    """CLIP tower with a class token, MLP projector on its penultimate layer, Llama with grouped-query attention."""
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=HIDDEN,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.04,
        tie_word_embeddings=False,
        pad_token_id=WORDS.index(PAD),
        bos_token_id=WORDS.index(BOS),
        eos_token_id=WORDS.index(EOS),
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=WORDS.index(IMAGE),
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=False,
    )


class Heads(nn.Module):
    """What training alone needs: what the class token and the patch features should say of the image.

    Without ``scene`` the class token would learn nothing, and its attention would be noise. Without ``place`` the
    features forget where their patch lies, and the language model cannot tell left from right.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scene = nn.Linear(HIDDEN, PAIRS + len(SHAPES) + len(COLOURS))  # class token: what is there
        self.patch = nn.Linear(HIDDEN, 1 + PAIRS)  # patch: 0 for background, else 1 + pair
        self.place = nn.Linear(HIDDEN, 2)  # patch: its row and column, -1 to 1


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token per word and punctuation mark; bos goes in front, and decoding puts no space before punctuation."""
    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer: Any = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def build_processor() -> LlavaProcessor:
    """Puts 100 image tokens for ``<image>``, and scales pixels; an image of another size is squeezed to 80 x 80."""
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessor(
        size=size, crop_size=size, do_center_crop=False, image_mean=[MEAN] * 3, image_std=[SPREAD] * 3
    )
    return LlavaProcessor(
        images,
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def split_parameters(model: LlavaForConditionalGeneration) -> tuple[list[Tensor], list[Tensor]]:
    """The trainable hidden matrices (for Muon) and everything else that is trained (for AdamW)."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices: list[Tensor] = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    chosen = {id(p) for p in matrices}
    return matrices, [p for _, p in named if id(p) not in chosen]
