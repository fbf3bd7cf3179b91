"""Train an image classifier with any ``--optim``, on local files or a data set of the Hub.

Offline, on the shipped Fashion-MNIST subset, a small ViT from random weights:

    python examples/image_classification.py --do_train --do_eval --optim afopt \\
        --learning_rate 1e-3 --max_steps 200 --per_device_train_batch_size 64

A pretrained checkpoint on folders of images (one sub-folder per class), or on the Hub's data:

    python examples/image_classification.py --do_train --do_eval \\
        --model_name_or_path FOLDER_OR_ID --train_dir images/train --validation_dir images/test
    python examples/image_classification.py --do_train --do_eval --label_column labels \\
        --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name beans

Needs pillow, not torchvision.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import datasets
import evaluate
from common import (
    HERE,
    DataArguments,
    check_pair,
    first_rows,
    label_config,
    load_splits,
    number_labels,
    parse_arguments,
    refuse,
    train_and_evaluate,
    with_head,
)
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessor,
    default_data_collator,
    set_seed,
)
from transformers.models.auto.image_processing_auto import (
    AutoImageProcessor,
)  # wants no torchvision

import hf_precond  # noqa: F401  the stock Trainer then takes --optim afopt, muon, adamr, ...


@dataclass
class ViTArguments:
    """Which model is trained."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id; default: a small ViT, random weights."}
    )
    config_overrides: str = field(
        default="", metadata={"help": "Of the small ViT: hidden_size=192,num_hidden_layers=6."}
    )


@dataclass
class ImageArguments(DataArguments):
    """Which images it is trained on."""

    train_dir: str | None = field(
        default=None, metadata={"help": "Folder with one sub-folder of images per class."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "The same, evaluated on."})
    label_column: str = field(default="label", metadata={"help": "Column of the label."})
    image_column: str = field(default="image", metadata={"help": "Column of the image."})

    def __post_init__(self) -> None:
        check_pair(self, "train_dir", "validation_dir")


def load_images(arguments: ImageArguments) -> datasets.DatasetDict:
    """The splits, by default those of the shipped Fashion-MNIST subset."""
    if arguments.train_dir:
        folders = {"train": arguments.train_dir, "validation": arguments.validation_dir}
        return load_splits(arguments, "imagefolder", {k: f"{v}/**" for k, v in folders.items()})
    names = {"train": "train", "validation": "test"}
    shipped = HERE / "data" / "fashion_mnist"
    files = {k: str(shipped / f"{v}-00000-of-00001.parquet") for k, v in names.items()}
    return load_splits(arguments, "parquet", files)


def load_model(arguments: ViTArguments, names: list[str]) -> tuple:
    """The processor of the images, and the model with one output per class."""
    if name := arguments.model_name_or_path:
        return with_head(name, names, AutoImageProcessor, AutoModelForImageClassification)
    config = ViTConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        image_size=28, patch_size=7, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        **label_config(names),
    )  # fmt: skip
    try:
        if arguments.config_overrides:
            config.update_from_string(arguments.config_overrides)
        model = AutoModelForImageClassification.from_config(config)
    except ValueError as error:
        refuse(f"--config_overrides {arguments.config_overrides}: {error}")
    side = config.image_size
    return ViTImageProcessor(size={"height": side, "width": side}), model


def preprocess(rows: datasets.Dataset, processor, arguments: ImageArguments) -> datasets.Dataset:
    """The rows as normalised pixels and labels, computed when they are read."""

    def transform(batch):
        images = [image.convert("RGB") for image in batch[arguments.image_column]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": batch[arguments.label_column]}

    return rows.with_transform(transform)


def main() -> dict[str, float]:
    model_arguments, data, arguments = parse_arguments(
        ViTArguments, ImageArguments, TrainingArguments
    )
    arguments.remove_unused_columns = False  # the transform reads the image column
    set_seed(arguments.seed)

    splits, names = number_labels(load_images(data), data.label_column)
    processor, model = load_model(model_arguments, names)
    metric = evaluate.load(data.metric)

    train = first_rows(splits["train"], data.max_train_samples, arguments.data_seed)
    held = first_rows(splits["validation"], data.max_eval_samples, arguments.data_seed)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=preprocess(train, processor, data),
        eval_dataset=preprocess(held, processor, data),
        data_collator=default_data_collator,
        processing_class=processor,
        compute_metrics=lambda p: metric.compute(
            predictions=p.predictions.argmax(-1), references=p.label_ids
        ),
    )
    return train_and_evaluate(trainer, arguments, "image-classification")


if __name__ == "__main__":
    main()
