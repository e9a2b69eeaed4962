"""Faults of clipping, of the loss that it relies on, and of what one record can move."""

from .mutant import Mutant

STEP = "fedtune/training/dp_step.py"
OF_STEP = ("tests/training/test_dp_step.py",)
ADDED = "sums[name] += (weights @ kept.double()).reshape(sums[name].shape)"

CLIPPING = (
    Mutant(
        name="no-clipping",
        fault="Gradients are summed as they are; noise and epsilon stay.",
        file=STEP,
        old="weights = torch.where(usable, bound / norms.clamp(min=bound), torch.zeros_like(norms))",
        new="weights = usable.double()",
        tests=OF_STEP,
    ),
    Mutant(
        name="clipping-of-the-batch-sum",
        fault="A micro-batch's summed gradient is clipped instead of each example's, as by gradient clipping in plain "
        "training: one record can turn the whole sum.",
        file=STEP,
        old="add_clipped(sums, gradients.of(batch), plan.max_grad_norm)",
        new="add_clipped(\n"
        "            sums,\n"
        "            {name: each.sum(dim=0, keepdim=True) for name, each in gradients.of(batch).items()},\n"
        "            plan.max_grad_norm,\n"
        "        )",
        tests=OF_STEP,
    ),
    Mutant(
        name="clipping-by-layer",
        fault="Each tensor is clipped to the whole clip norm by itself, and the noise is that of one norm over all of "
        "them: with k tensors the sensitivity is larger by the root of k.",
        file=STEP,
        old=ADDED,
        new="own = torch.linalg.vector_norm(kept, dim=1, dtype=torch.float64)\n"
        "        alone = usable.double() * (bound / own.clamp(min=bound))\n"
        "        sums[name] += (alone @ kept.double()).reshape(sums[name].shape)",
        tests=OF_STEP,
    ),
    Mutant(
        name="head-left-out-of-the-norm",
        fault="The norm is taken over the LoRA tensors alone; the head is scaled by their factor.",
        file=STEP,
        old="for gradient in flat.values()]",
        new='for name, gradient in flat.items() if name != "head.weight" or len(flat) == 1]',
        tests=OF_STEP,
    ),
    Mutant(
        name="a-layer-outside-clipping",
        fault="The head is trained, noised and released, but its gradients are added without being scaled.",
        file=STEP,
        old="(weights @ kept.double())",
        new='((usable.double() if name == "head.weight" else weights) @ kept.double())',
        tests=OF_STEP,
    ),
    Mutant(
        name="a-tensor-outside-the-clipped-set",
        fault="A tensor trains that is neither clipped nor noised: it is left out of what the step knows of.",
        file="fedtune/model/task.py",
        old="for name, parameter in self.adapter_parameters().items() if parameter.requires_grad}",
        new='for name, parameter in self.adapter_parameters().items() if "layer.1.output" not in name}',
        tests=("tests/training/test_local.py",),
    ),
    Mutant(
        name="not-finite-kept",
        fault="A gradient that is not finite is kept, and one record turns the whole update into NaN, which tells that "
        "it was there.",
        file=STEP,
        old="usable = norms <= _LARGEST_NORM",
        new="usable = norms < torch.inf",
        tests=OF_STEP,
    ),
    Mutant(
        name="norms-in-float32",
        fault="Norms are taken in float32: over many like values they come out too small, and too much passes.",
        file=STEP,
        old="torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float64)",
        new="torch.linalg.vector_norm(gradient, dim=1).double()",
        tests=OF_STEP,
    ),
    Mutant(
        name="token-mean-loss",
        fault="The loss is a mean over the batch's tokens, as a Transformers model returns it: one record's length "
        "rescales the gradients of the others.",
        file="fedtune/model/task.py",
        old="supervised.sum(dim=1).clamp(min=1)",
        new="supervised.sum().clamp(min=1)",
        tests=("tests/model/test_task.py", *OF_STEP),
    ),
    Mutant(
        name="mean-over-the-batch",
        fault="Losses are averaged over the micro-batch before the gradients of each example are taken.",
        file="fedtune/training/per_example.py",
        old="self._model.losses(batch).sum().backward()",
        new="self._model.losses(batch).mean().backward()",
        tests=OF_STEP,
    ),
    Mutant(
        name="gradients-not-cleared",
        fault="Per-example gradients of the micro-batch before stay, and are added to those of the next.",
        file="fedtune/training/per_example.py",
        old="            parameter.grad_sample = None",
        new="            pass",
        tests=("tests/training/test_per_example.py", *OF_STEP),
    ),
    Mutant(
        name="divided-by-the-true-count",
        fault="The step divides by the sampling rate times the true number of records, which the update then tells.",
        file=STEP,
        old="denominator=plan.sampling_rate * records.declared_size",
        new="denominator=plan.sampling_rate * max(1, records.count)",
        tests=OF_STEP,
    ),
    Mutant(
        name="divided-by-the-batch-size",
        fault="The step divides by the size of the batch that was drawn: one record more rescales sum and noise.",
        file=STEP,
        old="denominator=plan.sampling_rate * records.declared_size",
        new="denominator=max(1, len(sampled))",
        tests=OF_STEP,
    ),
)
