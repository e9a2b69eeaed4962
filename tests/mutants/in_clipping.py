"""Faults of clipping, of the loss that it relies on, and of what one record can move."""

from .mutant import Mutant

STEP = "fedtune/training/dp_step.py"
DEVICES = "fedtune/training/devices.py"
OF_STEP = ("tests/training/test_step_faults.py",)
OF_DEVICES = "tests/training/test_devices.py"
LOOP = (
    "    for name, contribution in _in_cells(gradients, max_grad_norm):\n"
    "        # Exact in float64: fewer than 2**29 whole numbers of at most 2**24 each.\n"
    "        totals[name] = contribution.sum(dim=0)\n"
    "        squares.append(_exact_squares(contribution))\n"
)
CHECK = (
    "    if not (usable := _within_clip_norm(squares)).all():\n"
    "        add_clipped(sums, {name: gradient[usable] for name, gradient in gradients.items()}, max_grad_norm)\n"
    "        return\n"
)
IN_CELLS = "_in_cells(gradients, max_grad_norm)"
AS_IT_IS = 'div_(cell(max_grad_norm), rounding_mode="trunc")'
WITHIN = "    return _added(squares) <= CLIP_NORM_CELLS**2\n"

CLIPPING = (
    Mutant(
        name="no-clipping",
        fault="Gradients are summed as they are; noise and epsilon stay.",
        file=STEP,
        old=LOOP + CHECK,
        new=LOOP.replace(IN_CELLS, f"((name, _rows(one).{AS_IT_IS}) for name, one in gradients.items())"),
        tests=OF_STEP,
    ),
    Mutant(
        name="clipping-of-the-batch-sum",
        fault="A micro-batch's summed gradient is clipped instead of each example's, as by gradient clipping in plain "
        "training: one record can turn the whole sum.",
        file=STEP,
        old="add_clipped(sums, gradients.of(batch), max_grad_norm)",
        new="add_clipped(\n"
        "            sums,\n"
        "            {name: each.sum(dim=0, keepdim=True) for name, each in gradients.of(batch).items()},\n"
        "            max_grad_norm,\n"
        "        )",
        tests=OF_STEP,
    ),
    Mutant(
        name="clipping-by-layer",
        fault="Each tensor is clipped to the whole clip norm by itself, and the noise is that of one norm over all of "
        "them: with k tensors the sensitivity is larger by the root of k.",
        file=STEP,
        old=LOOP + CHECK,
        new=LOOP.replace(
            IN_CELLS, "(one for name in gradients for one in _in_cells({name: gradients[name]}, max_grad_norm))"
        ),
        tests=OF_STEP,
    ),
    Mutant(
        name="head-left-out-of-the-norm",
        fault="The norm is taken over the LoRA tensors alone; the head is scaled by their factor.",
        file=STEP,
        old=LOOP + CHECK,
        new='    others = {name: one for name, one in gradients.items() if name != "head.weight"} or gradients\n'
        "    cells = _norms(others).clamp(min=max_grad_norm)[:, None] * 2.0**-GRID_BITS\n"
        + LOOP.replace(
            IN_CELLS, '((name, _rows(one).div_(cells, rounding_mode="trunc")) for name, one in gradients.items())'
        ),
        tests=OF_STEP,
    ),
    Mutant(
        name="a-layer-outside-clipping",
        fault="The head is trained, noised and released, but its gradients are added without being scaled.",
        file=STEP,
        old=LOOP + CHECK,
        new=LOOP.replace(
            IN_CELLS,
            f"((n, _rows(gradients[n]).{AS_IT_IS} if n == 'head.weight' else one) for n, one in {IN_CELLS})",
        ),
        tests=OF_STEP,
    ),
    Mutant(
        name="a-tensor-outside-the-clipped-set",
        fault="A tensor trains that is neither clipped nor noised: it is left out of what the step knows of.",
        file="fedtune/tasks/task_model.py",
        old="for name, one in self.adapter_parameters().items() if one.requires_grad}",
        new='for name, one in self.adapter_parameters().items() if "layer.1.output" not in name}',
        tests=(f"{OF_STEP[0]}::test_every_step_of_a_round_draws_anew_and_every_tensor_is_covered",),
    ),
    Mutant(
        name="not-finite-kept",
        fault="A gradient that is not finite is kept, and one record turns the whole update into NaN, which tells that "
        "it was there.",
        file=STEP,
        old=WITHIN,
        new="    return ~(_added(squares) > CLIP_NORM_CELLS**2)\n",
        tests=(f"{OF_STEP[0]}::test_a_gradient_that_is_not_finite_counts_as_zero_and_no_other_does",),
    ),
    Mutant(
        name="norms-in-float32",
        fault="Norms are taken in float32: over many like values they come out too small, and too much passes.",
        file=STEP,
        old="torch.linalg.vector_norm(rows, dim=1)",
        new="torch.linalg.vector_norm(rows.float(), dim=1).double()",
        tests=OF_STEP,
    ),
    Mutant(
        name="token-mean-loss",
        fault="The loss is a mean over the batch's tokens, as a Transformers model returns it: one record's length "
        "rescales the gradients of the others.",
        file="fedtune/tasks/causal_lm.py",
        old="[total / len(places) for",
        new="[total / (batch.targets != UNSUPERVISED).sum() for",
        tests=OF_STEP,
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
        fault="What a pass found that failed half-way stays, and is added to what the next one finds.",
        file="fedtune/training/per_example.py",
        old="            self.found.clear()  # also what a pass found that failed half-way\n",
        new="            pass\n",
        tests=("tests/training/test_per_example.py",),
    ),
    Mutant(
        name="gradients-of-the-rounds-first-adapter",
        fault="What stands for the parameters in a forward pass is read once: where they lie in other memory "
        "later, gradients are those at an adapter that is no longer there.",
        file="fedtune/training/per_example.py",
        old='    vars(constant)["_parameters"] = _values(module)  # as they are now, after a step or whatever else\n',
        new="",
        tests=("tests/training/test_per_example.py::test_after_a_step_gradients_are_those_at_the_new_adapter",),
    ),
    Mutant(
        name="frozen-product-not-transposed-on-the-way-back",
        fault="A gradient goes back through a frozen module by its weights as they are, which fit where it is square.",
        file="fedtune/model/products.py",
        old="_multiply(gradients[0], weight.t(), None)",
        new="_multiply(gradients[0], weight if len(weight) == weight.shape[1] else weight.t(), None)",
        tests=("tests/model/test_products.py",),
    ),
    Mutant(
        name="coarse-products-of-exact-numbers",
        fault="Where a CPU has no instructions for bfloat16, a mixed model multiplies what it was given, unrounded: "
        "sites of one run train different models.",
        file="fedtune/model/products.py",
        old="exact = product(rounded.float(), ",
        new="exact = product(values, ",
        tests=("tests/model/test_products.py",),
    ),
    Mutant(
        name="scores-in-bfloat16",
        fault="A mixed model multiplies everywhere in bfloat16, also in the layer whose scores the loss reads.",
        file="fedtune/model/base_model.py",
        old="round_products(layer_stack(model)[1])",
        new="round_products(model)",
        tests=("tests/model/test_products.py",),
    ),
    Mutant(
        name="four-bit-layers-hand-no-gradient-back",
        fault="A layer in four bits gives its input no gradient, as a library's product for evaluation does: what "
        "trains below it learns from the wrong gradients, which a loop over single records confirms.",
        file="fedtune/model/four_bit.py",
        old="        if not ctx.needs_input_grad[0]:\n",
        new="        if True:\n",
        tests=("tests/training/test_four_bit.py",),
    ),
    Mutant(
        name="four-bit-layers-not-tried-at-random",
        fault="The trial before a run draws random weights, but layers in four bits keep their own, which "
        "somebody chose.",
        file="fedtune/training/preflight.py",
        old="            for layer in in_four_bits:\n",
        new="            for layer in in_four_bits[:0]:\n",
        tests=("tests/training/test_four_bit.py",),
    ),
    Mutant(
        name="four-bit-layers-stay-random",
        fault="After the trial before a run, layers in four bits keep the random weights that it put there.",
        file="fedtune/training/preflight.py",
        old="*(each for layer in in_four_bits for each in layer.buffers())",
        new="*[each for layer in in_four_bits for each in layer.buffers()][:0]",
        tests=("tests/training/test_four_bit.py",),
    ),
    Mutant(
        name="four-bit-scores",
        fault="Four bits also for the output layer, whose scores the loss reads.",
        file="fedtune/model/base_model.py",
        old="keep_in_four_bits(layer_stack(model)[1], device=device)",
        new="keep_in_four_bits(model, device=device)",
        tests=("tests/model/test_four_bit.py",),
    ),
    Mutant(
        name="a-module-used-twice-counts-once",
        fault="Of a module that a forward pass uses twice the later gradient stands in place of both.",
        file="fedtune/training/per_example.py",
        old="each if known is None else known + each",
        new="each",
        tests=("tests/training/test_per_example.py",),
    ),
    Mutant(
        name="divided-by-the-true-count",
        fault="The step divides by the sampling rate times the true number of records, which the update then tells.",
        file=STEP,
        old="plan.sampling_rate * records.declared_size / cell",
        new="plan.sampling_rate * max(1, records.count) / cell",
        tests=OF_STEP,
    ),
    Mutant(
        name="divided-by-the-batch-size",
        fault="The step divides by the size of the batch that was drawn: one record more rescales sum and noise.",
        file=STEP,
        old="plan.sampling_rate * records.declared_size / cell",
        new="max(1, len(sampled)) / cell",
        tests=OF_STEP,
    ),
    Mutant(
        name="rounded-to-the-nearest-cell",
        fault="A contribution is rounded to the nearest cell instead of towards zero: of many small values it comes "
        "out longer than the clip norm, and the check in whole numbers alone keeps it out.",
        file=STEP,
        old='.div_(cells, rounding_mode="trunc")',
        new=".div_(cells).round_()",
        tests=OF_STEP,
    ),
    Mutant(
        name="rounded-up-a-cell",
        fault="A contribution is rounded away from zero: each of many values that are next to nothing becomes a cell.",
        file=STEP,
        old='_rows(gradient).div_(cells, rounding_mode="trunc")',
        new="(lambda one: one.abs().ceil() * one.sign())(_rows(gradient).div_(cells))",
        tests=OF_STEP,
    ),
    Mutant(
        name="floats-decide",
        fault="Nothing checks in whole numbers what floats clipped: where their norm came out too small, a unit adds "
        "more than the clip norm.",
        file=STEP,
        old=WITHIN,
        new="    return _added(squares).isfinite()\n",
        tests=OF_STEP,
    ),
    Mutant(
        name="no-smallest-norm",
        fault="A gradient that is next to nothing but rounding is scaled up to a whole tiny clip norm.",
        file=STEP,
        old=".clamp(min=max(bound, SMALLEST_NORM))",
        new=".clamp(min=bound)",
        tests=OF_STEP,
    ),
    Mutant(
        name="sums-in-float32",
        fault="Contributions are added up in float32, which rounds by the company that they are in: more than one unit "
        "is moved by one.",
        file=STEP,
        old="contribution.sum(dim=0)",
        new="contribution.float().sum(dim=0)",
        tests=OF_STEP,
    ),
    Mutant(
        name="norms-added-up-by-torch",
        fault="The tensors' squares are added up in an order that goes by the number of rows: a norm's last bit, and "
        "so a cell or two of a contribution, follows a unit's company.",
        file=STEP,
        old="_added(_norm_of_rows(_rows(gradient)).square() for gradient in gradients.values()).sqrt()",
        new="torch.stack([_norm_of_rows(_rows(one)) for one in gradients.values()]).square().sum(dim=0).sqrt()",
        tests=("tests/training/test_exact_sum.py",),
    ),
    Mutant(
        name="kept-states-not-tried",
        fault="The try computes what frozen layers make of an example once, and never in other company: a mixing one "
        "passes.",
        file="fedtune/training/preflight.py",
        old="self._again = self._ready(made_up, (part for parts in self._smaller.values() for part in parts))",
        new="self._again = self._examples",
        tests=("tests/training/test_preflight.py",),
    ),
    Mutant(
        name="kept-states-tried-at-the-most-rows-alone",
        fault="The try computes what frozen layers make of the examples as a data set is cut, in as few micro-batches "
        "as they fit: a layer that rounds otherwise at a smaller number of rows passes.",
        file="fedtune/training/preflight.py",
        old="examples.keep_frozen_states(self._model, parts=parts, lenient=False)",
        new="examples.keep_frozen_states(self._model, lenient=False)",
        tests=("tests/training/test_preflight.py::test_frozen_layers_are_tried_at_every_number_of_rows",),
    ),
    Mutant(
        name="padded-to-the-longest",
        fault="A micro-batch is padded to its longest example, so that an example's kernels are chosen by its company.",
        file="fedtune/training/examples.py",
        old="shape=(part.rows, part.length))",
        new="shape=(part.rows, int(self._dataset.lengths[part.places].max())))",
        tests=OF_STEP,
    ),
    Mutant(
        name="no-empty-rows",
        fault="A micro-batch has as many rows as it has examples.",
        file="fedtune/training/examples.py",
        old="shape=(part.rows, part.length))",
        new="shape=(len(part.places), part.length))",
        tests=OF_STEP,
    ),
    Mutant(
        name="no-row-for-padding",
        fault="A micro-batch of the longest examples has no empty row where they fill it: attention without any "
        "padding takes another path, so one shorter example changes how all others are rounded.",
        file="fedtune/data/shapes.py",
        old="        return rows - (length == self.full)\n",
        new="        return rows\n",
        tests=OF_STEP,
    ),
    Mutant(
        name="tried-for-closeness",
        fault="The try before a run compares with a tolerance, so a machine on which an example's last bits depend on "
        "its company passes for an exact one.",
        file="fedtune/training/preflight.py",
        old="torch.equal(ones[name], others[name])",
        new="torch.allclose(ones[name], others[name], rtol=1e-3, atol=1e-3)",
        tests=("tests/training/test_preflight.py::test_one_last_bit_of_one_gradient_value_is_enough",),
    ),
    Mutant(
        name="not-projected-after-a-step",
        fault="What a step learnt may leave the site's bound on values, and the next round's adapter is refused.",
        file="fedtune/training/local.py",
        old="            step()\n            project(parameters, work.max_adapter_value)\n",
        new="            step()\n",
        tests=OF_STEP,
    ),
    Mutant(
        name="not-projected-at-the-start",
        fault="An adapter that came with values beyond the site's bound meets the records as it is.",
        file="fedtune/training/local.py",
        old="    project(model.trainable(), work.max_adapter_value)\n",
        new="",
        tests=OF_STEP,
    ),
    Mutant(
        name="tried-alone-in-another-shape",
        fault="Where an example of a micro-batch fails, the others are computed in batches of one row: so they are "
        "rounded in another way than without it.",
        file="fedtune/data/batching.py",
        old="_computed(compute, alone(batch, row))",
        new="_computed(compute, Batch(*(x[[row]] for x in (batch.input_ids, batch.attention_mask, batch.targets))))",
        tests=OF_STEP,
    ),
    Mutant(
        name="a-failing-example-ends-the-step",
        fault="An example that cannot be computed ends the step, so that whether a site answers tells of a record.",
        file="fedtune/training/per_example.py",
        old="        except ConfigError:\n            raise\n",
        new="        except (ConfigError, RuntimeError):\n            raise\n",
        tests=OF_STEP,
    ),
    Mutant(
        name="what-rests-is-trained",
        fault="Where A and B take turns, both are clipped and noised in each round: the average is not exact, and "
        "noise is added to twice the values.",
        file="fedtune/tasks/task_model.py",
        old="                parameter.requires_grad_(False)\n",
        new="                parameter.requires_grad_(True)\n",
        tests=("tests/training/test_local.py::test_a_and_b_take_turns",),
    ),
    Mutant(
        name="a-device-s-sum-added-twice",
        fault="The first device's sum is added to the total of all devices, of which it is a part: each of its records "
        "moves the step by two clip norms.",
        file=DEVICES,
        old="        _fill(sums, total)\n",
        new="        _fill(sums, total + _flat(sums))\n",
        tests=(f"{OF_DEVICES}::test_several_devices_release_what_one_does",),
    ),
    Mutant(
        name="devices-tried-until-they-agree",
        fault="Devices that came to other bits are tried again at each request, until a draw finds none that differ.",
        file=DEVICES,
        old="            _differ.add(self._facts)\n",
        new="",
        tests=(f"{OF_DEVICES}::test_who_asks_again_gets_no_other_draw_of_the_devices_try",),
    ),
    Mutant(
        name="devices-not-compared",
        fault="Devices that round in other ways share a step, so that a record's contribution follows from its device.",
        file=DEVICES,
        old="(self._facts in _differ or set(self._crew.answers()) != {expected}):\n",
        new="not self._crew.answers():\n",
        tests=(f"{OF_DEVICES}::test_a_device_that_computes_other_bits_is_refused",),
    ),
    Mutant(
        name="devices-left-in-a-failed-step",
        fault="After a step that failed on the first device the others still wait for its values, and take the next "
        "step's for these.",
        file=DEVICES,
        old="        return bool(self._asked) or not self.end.alive or",
        new="        return not self.end.alive or",
        tests=(f"{OF_DEVICES}::test_a_failure_of_the_first_device_leaves_no_step_half_done",),
    ),
    Mutant(
        name="a-unit-on-no-device",
        fault="The step does not count the units that the other devices added: one that is on none is never missed.",
        file="fedtune/training/dp_step.py",
        old='    assert seen == len(sampled), "each sampled record counts exactly once"\n',
        new="",
        tests=(f"{OF_DEVICES}::test_a_unit_that_no_device_adds_is_missed",),
    ),
    Mutant(
        name="a-rest-by-untried-kernels",
        fault="In a round in which A or B rests, its products are other kernels' than those that were tried.",
        file="fedtune/training/per_example.py",
        old="    trained = {id(parameter) for parameter in model.trainable().values()}",
        new="    trained = {id(parameter) for parameter in model.trained_now().values()}",
        tests=("tests/training/test_preflight.py::test_no_round_multiplies_by_what_was_not_tried",),
    ),
    Mutant(
        name="a-failing-record-needs-more",
        fault="Where a record of a micro-batch fails, what was found for the one before is kept while the next is "
        "computed: a step that just fits in memory ends for want of it, and that tells of the record.",
        file="fedtune/training/per_example.py",
        old="            del found  # which",
        new="            # which",
        tests=("tests/training/test_step_memory.py::test_a_record_that_fails_or_is_no_number_takes_no_more",),
    ),
)
