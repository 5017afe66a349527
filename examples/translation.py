"""Train a small encoder-decoder with mixtures of attention heads to translate, then translate with beam search.

    python examples/translation.py PAIRS.jsonl OUT [--source en] [--target de] [--steps 2000]

PAIRS has one JSON object per line with a sentence in both languages. OUT becomes a model directory.
"""

import argparse

from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from bamoe.modeling import BamoeEncoderDecoderConfig, BamoeForConditionalGeneration

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("pairs")
parser.add_argument("out")
parser.add_argument("--source", default="en")
parser.add_argument("--target", default="de")
parser.add_argument("--steps", type=int, default=2000)
given = parser.parse_args()
pairs = load_dataset("json", data_files=given.pairs, split="train")

# One byte-level BPE vocabulary for both languages.
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
bpe.decoder = decoders.ByteLevel()
special = ["<pad>", "<bos>", "<eos>"]
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
bpe.train_from_iterator([*pairs[given.source], *pairs[given.target]], trainer)
bpe.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 2)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")

config = BamoeEncoderDecoderConfig(
    vocab_size=len(tokenizer),
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_decoder_layers=3,
    num_attention_experts=16,  # heads to choose from, with one key and value for all of them
    num_attention_heads=16,
    num_attention_experts_per_tok=4,  # heads that a token chooses
    head_dim=48,
    label_smoothing=0.1,
)
model = BamoeForConditionalGeneration(config)
sides = {"input_ids": given.source, "labels": given.target}
examples = pairs.map(
    lambda rows: {name: tokenizer(rows[side])["input_ids"] for name, side in sides.items()},
    batched=True,
    remove_columns=pairs.column_names,
)
Seq2SeqTrainer(
    model=model,
    args=Seq2SeqTrainingArguments(
        output_dir=given.out,
        max_steps=given.steps,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler_type="inverse_sqrt",
        warmup_steps=400,
        adam_beta2=0.98,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    ),
    train_dataset=examples,
    data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
).train()
model.save_pretrained(given.out)
tokenizer.save_pretrained(given.out)

sentences = pairs[given.source][:4]
inputs = tokenizer(sentences, padding=True, return_tensors="pt", return_token_type_ids=False).to(model.device)
translations = model.eval().generate(**inputs, num_beams=4, max_new_tokens=60)
for sentence, translation in zip(
    sentences, tokenizer.batch_decode(translations, skip_special_tokens=True), strict=True
):
    print(f"{sentence}\n  {translation.strip()}")
