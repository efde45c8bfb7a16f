"""A tokenizer as small as the tiny models' vocabulary."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '>' }}{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def chat_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Printable ASCII, one token a character, then filler words; ids 0 to 4 are special."""
    special = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>"]
    letters = [chr(code) for code in range(33, 127)]
    # A byte-level tokenizer spells a space so.
    tokens = [*special, "Ġ", "Ċ", *letters]
    tokens += [f"filler{index}" for index in range(vocabulary - len(tokens))]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
