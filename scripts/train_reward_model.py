"""Trains a reward model on preference pairs: `python -m scripts.train_reward_model PAIRS --out DIR`.

PAIRS is a file in the format of HH-RLHF (.jsonl or .jsonl.gz). Four fifths of the dialogues train TRL's RewardTrainer, which
maximises log sigmoid(r(chosen) - r(rejected)) (Bradley-Terry). The rest say how good it is: the share of pairs whose chosen
answer gets the larger reward, with a 95 % interval of Wilson's, beside the share that the shorter answer alone would get.

The folder is what the reward `classifier` loads, with the same `form` and `max_length`; accuracy.json in it has the figures,
which are the last line of the output too.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from scipy.stats import binomtest
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from rewards.embedding import packaged
from rewards.local_model import Texts, load_texts
from rewards.model import Classifier
from rollout.dialogues import Pair, pairs

FORMS = ("text", "completion")


def main() -> None:
    """Train, measure, save."""
    options = parse()
    base = options.base or packaged()
    texts = load_texts(base, "")
    train = pairs(options.pairs, "train")[: options.limit]
    trainer = make_trainer(base, texts, tokenised(train, texts, options.form, options.max_length), options)
    trainer.train()
    trainer.save_model(options.out)
    texts.tokenizer.save_pretrained(options.out)
    held_out = pairs(options.pairs, "evaluation")[: options.limit]
    figures = {"trained on": len(train), **accuracy(options.out, held_out, options.form, options.max_length)}
    (Path(options.out) / "accuracy.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", help="file of dialogues, chosen and rejected")
    parser.add_argument("--out", required=True, help="folder to write the model to")
    parser.add_argument("--base", default="", help="folder or hub name of an encoder; default all-MiniLM-L6-v2, packaged")
    parser.add_argument("--form", choices=FORMS, default="text", help="what it reads: question and answer, or the answer")
    parser.add_argument("--max-length", type=int, default=128, help="tokens read (default 128)")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--batch", type=int, default=16, help="pairs per step (default 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="pairs of each split that are used at most")
    return parser.parse_args()


def tokenised(found: Sequence[Pair], texts: Texts, form: str, max_length: int) -> Dataset:
    """Token ids of both answers, cut and framed exactly as `rewards.model.Classifier` will."""
    frame = texts.frame(pair=False)
    longest = texts.longest(max_length, frame)
    prompts = texts.tokens([pair.prompt if form == "text" else "" for pair in found], special=True)

    def rows(answers: Sequence[str]) -> list[list[int]]:
        ids = texts.tokens(answers, special=False)
        return [frame.fit(*both, longest).ids for both in zip(prompts, ids, strict=True)]

    chosen, rejected = rows([pair.chosen for pair in found]), rows([pair.rejected for pair in found])
    lengths = [max(len(a), len(b)) for a, b in zip(chosen, rejected, strict=True)]
    return Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected, "length": lengths})


def make_trainer(base: str, texts: Texts, data: Dataset, options: argparse.Namespace) -> RewardTrainer:
    """TRL's trainer of an encoder with one output; batches of like length, since most of a mixed one is padding."""
    torch.manual_seed(options.seed)  # of the output layer, which the base has not
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, trust_remote_code=False)
    settings = RewardConfig(
        output_dir=f"{options.out}/checkpoints",
        per_device_train_batch_size=options.batch,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        warmup_steps=0.1,
        lr_scheduler_type="linear",
        center_rewards_coefficient=0.01,
        max_length=None,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,  # the trainer would take `length` for one
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
    )
    return RewardTrainer(model=model, args=settings, train_dataset=data, processing_class=texts.tokenizer)


def accuracy(model: str, held_out: Sequence[Pair], form: str, max_length: int) -> dict:
    """Pair accuracy, scored by the reward that will use the model; and that of preferring the shorter answer."""
    reward = Classifier(model, "none", form=form, max_length=max_length)
    prompts = [pair.prompt for pair in held_out]
    chosen = reward(prompts, [pair.chosen for pair in held_out])
    rejected = reward(prompts, [pair.rejected for pair in held_out])
    return {
        "held-out pairs": len(held_out),
        "accuracy": share(a > b for a, b in zip(chosen, rejected, strict=True)),
        "accuracy of the shorter answer": share(len(pair.chosen) < len(pair.rejected) for pair in held_out),
    }


def share(outcomes) -> dict[str, float]:
    """Share of the true ones with its 95 % interval (Wilson)."""
    outcomes = list(outcomes)
    interval = binomtest(sum(outcomes), len(outcomes)).proportion_ci(method="wilson")
    return {"share": sum(outcomes) / len(outcomes), "low": float(interval.low), "high": float(interval.high)}


if __name__ == "__main__":
    main()
