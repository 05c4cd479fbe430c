"""Makes a small language model to train with rewards: `python -m scripts.make_text_policy DIALOGUES --task TASK --out DIR`.

No model of the hub is needed: a Llama of one million parameters learns from the training split of a file in the format of
HH-RLHF alone, in minutes on two cores. It is a stand-in for a real model, and speaks like one that has read little.

* `answer`: to answer a person's turn, from all exchanges of the dialogues, preferred or not.
* `rewrite`: to copy a sentence while it leaves out words at random; what is worth leaving out is for the rewards to say.
"""

import argparse
import random
from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from rollout.dialogues import exchanges, rewriting

CONTEXT = 160  # tokens
VOCABULARY = 2048
LEFT_OUT = 0.3  # at most, of the words of a sentence that is copied; each copy draws its own share
Example = tuple[str, str]  # prompt and completion


def main() -> None:
    """Make the examples, train, save."""
    options = parse()
    spoken = exchanges(options.dialogues, "train")[: options.limit]
    tokenizer = make_tokenizer([text for example in spoken for text in example])
    rng = random.Random(options.seed)
    copies = (copy for _ in range(options.copies) for copy in rewrites(spoken, rng))
    data = tokenised(spoken if options.task == "answer" else copies, tokenizer, options.longest)
    print(f"{len(data)} examples, {sum(map(len, data['input_ids']))} tokens", flush=True)
    trainer = make_trainer(make_model(len(tokenizer), options.seed), tokenizer, data, options)
    trainer.train()
    trainer.save_model(options.out)
    tokenizer.save_pretrained(options.out)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dialogues", help="file of dialogues (.jsonl or .jsonl.gz)")
    parser.add_argument("--task", choices=("answer", "rewrite"), required=True)
    parser.add_argument("--out", required=True, help="folder to write the model to")
    parser.add_argument("--epochs", type=float, default=6.0)
    parser.add_argument("--copies", type=int, default=4, help="of every sentence, for rewrite: each leaves out other words")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=64, help="examples per step (default 64)")
    parser.add_argument("--longest", type=int, default=48, help="tokens of a completion; longer ones are not learned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="exchanges that are used at most")
    return parser.parse_args()


def rewrites(spoken: Sequence[Example], rng: random.Random) -> Iterator[Example]:
    """Sentences of people and of the assistant, each with a copy that lacks some words."""
    for example in spoken:
        for text in example:
            words = text.removeprefix("Human:").removesuffix("Assistant:").split()[:20]
            share = rng.uniform(0, LEFT_OUT)
            kept = [word for word in words if rng.random() >= share]
            if kept:
                yield rewriting(" ".join(words)), f" {' '.join(kept)}"


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the texts, with `<eos>` and `<pad>`, which no text can spell."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def make_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """An untrained Llama, float32: 4 layers of width 128, one embedding for input and output."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=1, do_sample=True, temperature=1.0, top_k=0)
    return model


def tokenised(examples, tokenizer: PreTrainedTokenizerFast, longest: int) -> Dataset:
    """Token ids and which of them are learned; without examples that are too long to be learned whole."""
    examples = list(examples)
    before = tokenizer([prompt for prompt, _ in examples]).input_ids
    after = [[*ids, tokenizer.eos_token_id] for ids in tokenizer([completion for _, completion in examples]).input_ids]
    pairs = zip(before, after, strict=True)
    fitting = [(a, b) for a, b in pairs if len(b) <= longest and len(a) + len(b) <= CONTEXT]
    masks = [[0] * len(prompt) + [1] * len(completion) for prompt, completion in fitting]
    return Dataset.from_dict({"input_ids": [a + b for a, b in fitting], "completion_mask": masks})


def make_trainer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Dataset, options) -> SFTTrainer:
    """TRL's supervised trainer, batches of like length."""
    settings = SFTConfig(
        output_dir=f"{options.out}/checkpoints",
        per_device_train_batch_size=options.batch,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        warmup_steps=100,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        train_sampling_strategy="group_by_length",
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
    )
    return SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)


if __name__ == "__main__":
    main()
