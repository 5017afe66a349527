"""Train a small masked language model whose tokens choose among attention heads, and fill in a blank with it.

    python examples/masked_language_model.py TEXT.jsonl OUT [--steps 2000]

TEXT has one JSON object {"text": ...} per line. OUT becomes a model directory.
"""

import argparse

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from bamoe.data.corpora import Corpus, read_documents
from bamoe.data.packing import PackedMixture
from bamoe.data.tokens import read_tokens
from bamoe.modeling import BamoeEncoderConfig, BamoeForMaskedLM

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text")
parser.add_argument("out")
parser.add_argument("--steps", type=int, default=2000)
given = parser.parse_args()
corpus = Corpus(name="text", path=given.text)

bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
bpe.decoder = decoders.ByteLevel()
# A mask takes the place of a word with the space before it, in training as in a text that someone writes.
special = ["<pad>", "<eos>", AddedToken("<mask>", lstrip=True)]
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
bpe.train_from_iterator(read_documents(corpus)["text"], trainer)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", mask_token="<mask>")

config = BamoeEncoderConfig(
    vocab_size=len(tokenizer),
    pad_token_id=0,
    eos_token_id=1,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_experts=32,  # heads to choose from, with one key and value for all of them
    num_attention_heads=32,
    num_attention_experts_per_tok=8,  # heads that a token chooses
    attention_scaling_factor=8.0,  # their outputs add up, as in multi-head attention; the paper's 1 learns more slowly
    head_dim=32,
)
model = BamoeForMaskedLM(config)
batch = 32
Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=given.out,
        max_steps=given.steps,
        per_device_train_batch_size=batch,
        learning_rate=2e-3,
        lr_scheduler_type="inverse_sqrt",
        warmup_steps=200,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    ),
    # The documents one after the other, cut into blocks of 64 tokens.
    train_dataset=PackedMixture([read_tokens(corpus, tokenizer)], [1.0], 64, num_blocks=batch * given.steps),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
).train()
model.save_pretrained(given.out)
tokenizer.save_pretrained(given.out)

words = read_documents(corpus)[0]["text"].split()[:12]
blank = " ".join([*words[:6], "<mask>", *words[7:]])
print(blank)
for guess in pipeline("fill-mask", model=model.eval(), tokenizer=tokenizer)(blank):
    print(f"  {guess['score']:.3f} {guess['token_str']!r}")
