"""The Trainer under FSDP2, on two CPU ranks (see test_accelerate_fsdp2): trained and resumed."""

import os

import pytest
import torch

from hf_precond import PrecondTrainer
from hf_precond.distributed.collectives import is_sharded
from tests import ranks
from tests.distributed.test_accelerate_fsdp2 import FORMATS, resumes, run_under_fsdp2
from tests.distributed.test_fsdp2 import SHARDABLE, all_full
from tests.integrations.test_resume import SAVED, trainer_of
from tests.integrations.test_trainer import losses

CASES = [(name, kind) for name in SHARDABLE for kind in FORMATS]


class Sharded(PrecondTrainer):
    """Shards on a CPU too."""

    state_dict_type = FORMATS[0]

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        run_under_fsdp2(self.accelerator, "BertLayer", self.state_dict_type)
        self.is_fsdp_enabled = True


class SavedWhole(Sharded):
    """Its checkpoints hold whole tensors."""

    state_dict_type = FORMATS[-1]


CLASSES = {FORMATS[0]: Sharded, FORMATS[-1]: SavedWhole}


def trained(folder, resume, cases):
    """Losses and whole weights, by case; the plain Trainer's losses for the case ``None``."""
    outcomes = {}
    for name, kind in cases:
        cls = CLASSES.get(kind, PrecondTrainer)
        target = os.path.join(folder, str(kind))
        trainer = trainer_of(name, "float32", target, 7 if resume else 0, 2, cls=cls)
        last = f"{trainer.args.output_dir}/checkpoint-{SAVED}"
        trainer.train(resume_from_checkpoint=last if resume else None)
        assert is_sharded(next(trainer.model.parameters())) == (kind is not None)
        outcomes[f"{name}/{kind}/losses"] = torch.tensor(losses(trainer), dtype=torch.float64)
        if kind is not None:
            weights = all_full(trainer.model)
            outcomes |= {f"{name}/{kind}/{key}": value for key, value in weights.items()}
    return outcomes


@resumes
@pytest.mark.slow
def test_under_fsdp2_it_trains_as_under_ddp_and_resumes_bit_for_bit(tmp_path):
    plain = ranks.run(trained, str(tmp_path), False, [(name, None) for name in SHARDABLE])[0]
    whole = ranks.run(trained, str(tmp_path), False, CASES)
    for name, kind in CASES:
        expected = plain[f"{name}/None/losses"]
        # Rounding decides AdamR's bases of null spaces (tests/distributed/test_ddp.py).
        compared = 3 if name == "adamr" else len(expected)
        trained_losses = whole[0][f"{name}/{kind}/losses"]
        torch.testing.assert_close(
            trained_losses[:compared], expected[:compared], rtol=1e-4, atol=0.0
        )
    for result in ranks.run(trained, str(tmp_path), True, CASES):
        assert result.keys() == whole[0].keys() and len(result) > 20 * len(CASES)
        for key, value in result.items():
            assert torch.equal(value, whole[0][key]), key
            if not key.endswith("losses"):
                assert torch.equal(value, whole[1][key]), key


def sgdph_refuses(folder):
    with pytest.raises(RuntimeError) as error:
        trainer_of("sgdph", "float32", folder, 0, 2, cls=Sharded).train()
    return str(error.value)


@pytest.mark.slow
def test_sgdph_is_refused_at_the_first_loss(tmp_path):
    for message in ranks.run(sgdph_refuses, str(tmp_path)):
        assert message.startswith("sgdph: the model is sharded (FSDP2")
        assert "train with DDP (torchrun), or choose afopt, adamr, muon or nkfac." in message
