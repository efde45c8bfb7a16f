"""The demo model before training: its tokenizer, its processor and its architecture."""

from random import Random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from genbundle.builder.demo.scenes import questions, random_scene

IMAGE_SIZE, PATCH = 60, 10
PATCHES = IMAGE_SIZE // PATCH
PAD, END, USER, ASSISTANT, IMAGE = SPECIAL_TOKENS = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<image>"]
MAX_LENGTH, MAX_NEW_TOKENS = 512, 48
CHAT_TEMPLATE = """\
{%- for message in messages if message.role in ['user', 'assistant'] -%}
    {{- '<|' + message.role + '|>' -}}
    {%- if message.content is string -%}
        {{- message.content | trim -}}
    {%- else -%}
        {#- Pictures go first whatever their order, as in training. -#}
        {%- for part in message.content if part.type == 'image' -%}
            {{- '<image>' -}}
        {%- endfor -%}
        {%- for part in message.content if part.type == 'text' -%}
            {{- part.text | trim -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which each word of the questions and answers is one token and any other text is bytes."""
    rng = Random(0)
    corpus = [text for _ in range(400) for pair in questions(random_scene(rng)) for text in pair]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus + [in_haste(text) for text in corpus],
        trainers.BpeTrainer(
            vocab_size=640,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def make_processor() -> LlavaProcessor:
    """CLIP's picture preparation at this model's size, with the chat template beside this file."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        ),
        tokenizer=make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops again
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """An untrained model: three vision layers, a projector, four decoder layers."""
    end, pad, image = (SPECIAL_TOKENS.index(token) for token in (END, PAD, IMAGE))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            projection_dim=96,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=pad,
        ),
        image_token_index=image,
        image_seq_length=PATCHES**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=end, pad_token_id=pad
    )
    return model


def in_haste(text: str) -> str:
    """The same text as people type it in a hurry."""
    return text.lower().rstrip(".?")
