"""Make an untrained language model of attention experts, for `bamoe train`.

    python examples/language_model.py TEXT.jsonl models/moa
    bamoe train train.yaml        # with `model: models/moa`

TEXT has one JSON object {"text": ...} per line; the tokenizer is made from it.
"""

import argparse

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, set_seed

from bamoe import BamoeConfig, BamoeForCausalLM
from bamoe.data.corpora import Corpus, read_documents

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text")
parser.add_argument("out")
parser.add_argument("--seed", type=int, default=0)
given = parser.parse_args()

bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
bpe.train_from_iterator(read_documents(Corpus(name="text", path=given.text))["text"], trainer)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")

config = BamoeConfig(
    vocab_size=len(tokenizer),
    eos_token_id=0,
    pad_token_id=0,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_experts=1,  # a plain feed-forward
    num_attention_experts=16,
    num_attention_heads=16 * 2,  # an expert is a group of two heads
    num_key_value_heads=2,  # and all experts share two keys and values, whatever their number
    head_dim=16,
    attention_key_value="shared",
    attention_routing="top_k",
    num_attention_experts_per_tok=4,
    tie_word_embeddings=True,
    max_position_embeddings=1024,
)
set_seed(given.seed)
BamoeForCausalLM(config).save_pretrained(given.out)
tokenizer.save_pretrained(given.out)
print(f"{given.out}: see it with `bamoe inspect {given.out}`, train it with `bamoe train`")
