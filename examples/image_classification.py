"""Train an image classifier with any ``--optim``, on local files or a data set of the Hub.

Offline, on the shipped Fashion-MNIST subset, a small ViT from random weights:

    python examples/image_classification.py --do_train --do_eval --optim afopt \\
        --learning_rate 1e-3 --max_steps 200 \\
        --per_device_train_batch_size 64

A pretrained checkpoint on folders of images (one sub-folder per class), or on the Hub's data:

    python examples/image_classification.py --do_train --do_eval \\
        --model_name_or_path FOLDER_OR_ID --train_dir images/train --validation_dir images/test
    python examples/image_classification.py --do_train --do_eval --label_column labels \\
        --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name beans

Needs pillow, not torchvision.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import evaluate
import torch
from classification import (
    HERE,
    DataArguments,
    check_pair,
    first_rows,
    label_config,
    load_splits,
    number_labels,
    parse_arguments,
    train_and_evaluate,
)
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessor,
    set_seed,
)

# Early releases of transformers 5 ask for torchvision where it is imported from the top.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import hf_precond  # noqa: F401  the stock Trainer then takes --optim afopt, muon, adamr, ...


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id; default: a small ViT, random weights."}
    )
    image_size: int = field(default=28, metadata={"help": "The small ViT's image side, in pixels."})
    patch_size: int = field(default=7, metadata={"help": "The small ViT's patch side, in pixels."})
    hidden_size: int = field(default=128, metadata={"help": "The small ViT's width."})
    num_hidden_layers: int = field(default=4, metadata={"help": "The small ViT's depth."})
    num_attention_heads: int = field(default=4, metadata={"help": "The small ViT's heads."})

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size={self.patch_size}: it must divide image_size={self.image_size}."
            )


@dataclass
class ImageArguments(DataArguments):
    """Which images it is trained on."""

    train_dir: str | None = field(
        default=None, metadata={"help": "Folder with one sub-folder of images per class."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "The same, evaluated on."})
    image_column: str = field(default="image", metadata={"help": "Column of the image."})

    def __post_init__(self) -> None:
        check_pair(self, "train_dir", "validation_dir")


def load_images(arguments: ImageArguments) -> datasets.DatasetDict:
    """The splits, by default those of the shipped Fashion-MNIST subset."""
    if arguments.train_dir and arguments.validation_dir:
        folders = {"train": arguments.train_dir, "validation": arguments.validation_dir}
        files = {split: str(Path(folder) / "**") for split, folder in folders.items()}
        return load_splits(arguments, "imagefolder", files)
    shipped = HERE / "data" / "fashion_mnist"
    files = {
        "train": str(shipped / "train-00000-of-00001.parquet"),
        "validation": str(shipped / "test-00000-of-00001.parquet"),
    }
    return load_splits(arguments, "parquet", files)


def load_model(arguments: ModelArguments, names: list[str]) -> tuple:
    """The model with one output per class, and the processor of its images."""
    name = arguments.model_name_or_path
    if name:
        config = AutoConfig.from_pretrained(name, **label_config(names))
        model = AutoModelForImageClassification.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True  # a head for other classes
        )  # fmt: skip
        return model, AutoImageProcessor.from_pretrained(name)
    config = ViTConfig(
        image_size=arguments.image_size,
        patch_size=arguments.patch_size,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.num_attention_heads,
        intermediate_size=4 * arguments.hidden_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **label_config(names),
    )
    side = arguments.image_size
    processor = ViTImageProcessor(size={"height": side, "width": side})
    return AutoModelForImageClassification.from_config(config), processor


def preprocess(rows: datasets.Dataset, processor, arguments: ImageArguments) -> datasets.Dataset:
    """The rows as normalised pixels and labels, computed when they are read."""

    def transform(batch):
        images = [image.convert("RGB") for image in batch[arguments.image_column]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": batch[arguments.label_column]}

    return rows.with_transform(transform)


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def main() -> dict[str, float]:
    model_arguments, data, arguments = parse_arguments(
        ModelArguments, ImageArguments, TrainingArguments
    )
    arguments.remove_unused_columns = False  # the transform reads the image column
    set_seed(arguments.seed)

    splits, names = number_labels(load_images(data), data.label_column)
    model, processor = load_model(model_arguments, names)
    metric = evaluate.load(data.metric)

    seed = arguments.data_seed
    train_rows = first_rows(splits["train"], data.max_train_samples, seed)
    eval_rows = first_rows(splits["validation"], data.max_eval_samples, seed)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=preprocess(train_rows, processor, data),
        eval_dataset=preprocess(eval_rows, processor, data),
        data_collator=collate,
        processing_class=processor,
        compute_metrics=lambda p: metric.compute(
            predictions=p.predictions.argmax(-1), references=p.label_ids
        ),
    )
    return train_and_evaluate(trainer, arguments, "image-classification")


if __name__ == "__main__":
    main()
