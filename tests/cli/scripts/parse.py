"""A script that only parses its arguments, as every example of transformers begins."""

from transformers import HfArgumentParser, TrainingArguments

if __name__ == "__main__":
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    print("parsed", args.optim.value)
