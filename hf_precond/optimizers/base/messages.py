"""What the optimizers say where something is wrong: the fact, and what to do about it."""

IN_A_ROW = {
    "factor": (
        "its factor could not be decomposed {limit} times in a row; it is close to singular, or "
        "holds infinities or NaN. Lower the learning rate, raise `damping` (or `eps`), clip "
        "gradients, or train in float32."
    ),
    "solver": (
        "the solver library failed at its refresh {limit} times in a row. Raise `damping` (or "
        "`eps`), lower the learning rate, or set max_dim below the layer's width."
    ),
    "out_of_memory": (
        "memory ran out at its refresh {limit} times in a row, also with this matrix alone. Lower "
        "the batch size or `max_dim`, or keep the factors in state_dtype='bfloat16'."
    ),
    "statistic": (
        "its statistics were not finite {limit} times in a row, so its activations or gradients "
        "hold infinities or NaN. If the loss is NaN too, the weights are lost: go back to a "
        "checkpoint, lower the learning rate or warm up longer, and set skip_nonfinite=True so "
        "that no bad batch reaches the weights; otherwise train in float32 or bfloat16."
    ),
    "gradient": (
        "{limit} updates of the factors in a row met a gradient that is not finite, or too large "
        "to square. If the loss is NaN, the weights are lost: go back to a checkpoint, lower the "
        "learning rate or warm up longer, and set skip_nonfinite=True so that no bad batch "
        "reaches the weights; otherwise clip gradients."
    ),
    "momentum": (
        "its momentum was not finite at {limit} steps in a row: a gradient held infinities or NaN, "
        "and the weights are lost. Go back to a checkpoint, lower the learning rate or warm up "
        "longer, and set skip_nonfinite=True so that no bad batch reaches the weights."
    ),
    "step": (
        "{limit} steps in a row had gradients that are not finite and were skipped "
        "(skip_nonfinite=True). Every batch gives them, so the weights or the data are at fault: "
        "look at the data, go back to a checkpoint, lower the learning rate or clip gradients."
    ),
}
"""Too many failures in a row, by what failed."""

WRONG_ARGUMENTS = (
    "{name} takes parameters or groups first and everything else by name: "
    "hf_precond.create_optimizer(model, {optimizer!r}, params=groups, lr=…), or {name}(groups, "
    "lr=…) and then optimizer.attach(model)."
)
OTHER_CONFIG = (
    "{name}: config is a {other}, which is another optimizer's; pass one of this class, or fields."
)
NOT_ATTACHED = (
    "{name}: step() before the optimizer knows in which layers its parameters are; call "
    "optimizer.attach(model) before training (a Trainer does so when training begins), or build it "
    "with hf_precond.create_optimizer(model, {name!r}, params=groups)."
)
RATED_HEAD = (
    "{name}: this state is of a training whose new head ({first}, …) was stepped by its outputs, "
    "and here {fields}; resume with head='auto' and without head_lr_scale, or start anew."
)
NEW_HEAD = (
    "%s: the new head (%s) is stepped along AdamW's direction so that what varies of its outputs "
    "changes by %g a step (rms) at the peak of the schedule, whatever the learning rate; head='lr' "
    "steps it at the learning rate instead."
)
EARLIER_HEAD = (
    "%s: this state is of release 0.2, which stepped a new head by all that changes of its "
    "outputs; it goes on by what varies from input to input, in steps of another size."
)
OTHER_RANKS = (
    "{name}: this rank's model decided on {fields}, and other ranks' did not; load the weights on "
    "every rank, or set the field."
)
FOLLOWED = "%s: the training that is resumed has %s, and goes on so."
RATES_NEED_MODEL = (
    "{field}={value}: which parameters it scales is read off the model, and {name} was made from "
    "parameters alone; use hf_precond.create_optimizer(model, {name!r}, params=groups, {field}=…), "
    "or give groups an lr of their own."
)
NOT_PER_GROUP = (
    "{field} in a parameter group: under {name} it holds for all groups alike; pass it to the "
    "optimizer. A group may set {legal}."
)
MISNAMED = (
    "{key} in a parameter group: {name} does not read it; did you mean {near!r}? A group may set "
    "{legal}."
)
UNREAD = "{key} in a parameter group: {name} has no such field and ignores it; drop it."
SWITCHED = "{key}=True in a parameter group: {name} has nothing of the kind; drop it{instead}."
TWICE = (
    "{name}: a parameter stands twice in a parameter group, and would be stepped twice; give each "
    "once (model.parameters() does, tied ones too)."
)
HAND_MADE = (
    "attach: this optimizer's model structure was made by hand; build the optimizer with "
    "create_optimizer(model, …) instead."
)
NOT_IN_GROUPS = (
    "none of the matrices that {optimizer} would precondition is in the parameter groups (the "
    "first of them: {name}); pass parameters of the model's layers, of the very model that the "
    "optimizer is made for or attached to, or build with create_optimizer(model, {optimizer!r})."
)
REPLACED = (
    "{name}: its parameter is in none of the parameter groups any more. It was replaced since the "
    "optimizer was made (by load_state_dict(assign=True), say, weight_norm, or fully_shard without "
    "accelerate's prepare): build the optimizer afterwards; or taken out of its group: freeze it "
    "with requires_grad_(False) instead."
)
PARAMETRISED = (
    "{name}: {count} matrices ({first}, …) were parametrised during training and are stepped by "
    "the fallback optimizer from now on: {reason}."
)
TIED = (
    "{name} has become {other} since the optimizer was made (tie_weights): a tied weight is "
    "stepped otherwise. Tie the weights before, or build a new optimizer now."
)
LEFT_OUT = (
    "{name}: {count} parameters of the model ({first}, …) have gradients and are in none of the "
    "parameter groups: nothing steps them. Put them into a group, or freeze them with "
    "requires_grad_(False)."
)
UNFROZEN = (
    "{name}: {count} parameters ({first}, …) were frozen when the optimizer was made, have "
    "gradients now and are in none of its parameter groups: it does not train them. Call "
    "optimizer.add_param_group({{'params': […]}}) and then optimizer.attach(model), or make the "
    "optimizer before layers are frozen."
)
ADDED = (
    "{name}: {count} parameters of the model ({first}, …) were added to a group after it was read, "
    "and the fallback optimizer steps them; call optimizer.attach(model) to have matrices among "
    "them preconditioned."
)
JOINED = (
    "{name}: {count} parameters ({first}, …) train now, did not when the optimizer was made "
    "(set_adapter, add_adapter, requires_grad_), and are in none of its parameter groups. For a "
    "train() with them, set trainer.optimizer = trainer.lr_scheduler = None before it, so that the "
    "Trainer makes a new optimizer."
)
UNOBSERVED = (
    "{name}: {count} ({names}) had gradients at two steps that collect statistics and no "
    "statistics{why}, so {fallback} steps them, as optimizer.routing says, until these come. Call "
    "their layers as modules (switch off fused losses and kernels), or accept it."
)
UNOBSERVED_FEATURES = (
    "{name}: {count} ({names}) had gradients at two steps that collect statistics and no "
    "statistics of features{why}: their bases stay those of the gradients. Call their layers as "
    "modules (switch off fused losses and kernels), or accept it."
)
RESHAPED = (
    "the state {name!r} of a parameter has shape {held} and {wanted} is needed: the parameter was "
    "resized, tied or pruned after the optimizer's first step (resize_token_embeddings, "
    "tie_weights). Do that before, or build a new optimizer now."
)
COMPLEX = (
    "{name}: complex parameters are not supported (shape {shape}); store real and imaginary parts "
    "as two tensors."
)
SPARSE = (
    "{name}: sparse gradients are not supported (a parameter of shape {shape} has one); build its "
    "nn.Embedding with sparse=False."
)
NO_FALLBACK = "base={name!r}: no such fallback optimizer; choose 'adamw', 'sgd', 'adamr' or 'muon'."
