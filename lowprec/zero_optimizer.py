"""Our ZeRO optimizer for stages 0-2: a subclass of DeepSpeed's, made by `zero.py`, which substitutes it by name.

DeepSpeed keeps what it does well: flattening and partitioning of parameters, gradient hooks, buckets, overlap of
reduction and backward, the engine. Ours are the numbers:

    a micro-batch's gradient -> GradientStore of the parameter (stages 0, 1; at stage 2 straight on)
    a full bucket            -> collectives.reduce_scatter in the payload's format -> GradientStores of owned fragments
    step                     -> norm and overflow over all ranks, clipping -> Updater -> working weights -> all-gather

Nothing of a gradient's or a state's full precision is kept between two steps unless the recipe says so: gradients are
decoded one parameter at a time. A bucket's numbers are sorted by destination and by place in the flat buffer, so that
the parts of a parameter that two ranks own lie side by side and share their scales.

Stage 0 is stage 1 over a group of one: every rank keeps all states, and gradients are averaged over the real group
before.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowprec import collectives
from lowprec.adamw import Tally
from lowprec.collectives import Payload, next_mu, parse_payload
from lowprec.gradients import GradientStore
from lowprec.main_grads import MainGrads
from lowprec.zero_parts import Part, Piece, Plan

_Base: Any = object  # stands for DeepSpeed's class, of which this file knows only what it overrides


class LowPrecisionZero(_Base):
    """What is ours of the optimizer: a mix-in before DeepSpeed's class. `plan` is set by `low_precision`."""

    plan: Plan

    def __init__(self, *args: Any, dp_process_group: Any, **kwargs: Any):
        if self.plan.replicas is not None:
            dp_process_group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        super().__init__(*args, dp_process_group=dp_process_group, **kwargs)
        self.updater = self.plan.updater
        self.payload = parse_payload(self.plan.gradients.payload)
        self.mu = 1.0 if self.payload.automatic else None
        # Micro-batches add up in our stores wherever gradients are not reduced at once.
        self.use_grad_accum_attribute = not self.partition_gradients
        self._new_store = lambda: GradientStore(self.plan.gradients.accumulate)
        self._accumulators: dict[int, GradientStore] = defaultdict(self._new_store)
        in_place = self.use_grad_accum_attribute and self.plan.gradients.accumulate == "fp32"
        self.main_grads = MainGrads((lambda param: self._accumulators[self.get_param_id(param)]) if in_place else None)
        self.errors: dict[int, Tensor] = {}
        self.gradient_bytes = self.sent_bytes = 0
        self._has_stepped = False
        self.accept: Callable[[float], bool] | None = None
        self.tally = Tally.nothing()
        self._saturated: list[tuple[Tensor, int]] = []
        self.pieces = list(self._cut())
        self._by_param = {(piece.group, self._id_of[piece.fragment.name]): piece for piece in self.pieces}
        self._drop_unused_masters()

    def _cut(self) -> Iterator[Piece]:
        """This rank's fragments, with fresh states."""
        self._id_of: dict[str, int] = {}
        self._places: list[dict[int, int]] = []  # of each group: id of a parameter -> its place in the flat buffer
        for index, parameters in enumerate(self.round_robin_bit16_groups):
            offsets = self.round_robin_bit16_offsets[index]
            self._places.append({self.get_param_id(p): at for p, at in zip(parameters, offsets, strict=True)})
            size = int(self.partition_size[index])
            rank = dist.get_rank(self.real_dp_process_group[index])
            working = self.parallel_partitioned_bit16_groups[index][rank]
            master = self.single_partition_of_fp32_groups[index].detach()
            decay = self.optimizer.param_groups[index]["weight_decay"] > 0
            for parameter, place in zip(parameters, offsets, strict=True):
                name = self.plan.names.get(id(parameter))
                if name is None:  # a filler
                    continue
                self._id_of[name] = self.get_param_id(parameter)
                low, high = max(place, rank * size), min(place + parameter.numel(), (rank + 1) * size)
                if low < high:
                    here = slice(low - rank * size, high - rank * size)
                    fragment = self.updater.adopt(name, low - place, master[here], working[here], decay)
                    yield Piece(fragment, index, here.start, here.stop, self._new_store())

    def _drop_unused_masters(self) -> None:
        """The base class made an FP32 copy of every partition; only master fp32 keeps it."""
        if self.updater.update.master == "fp32":
            return
        for index, group in enumerate(self.optimizer.param_groups):
            rank = dist.get_rank(self.real_dp_process_group[index])
            self.single_partition_of_fp32_groups[index] = self.parallel_partitioned_bit16_groups[index][rank]
            group["params"] = [self.single_partition_of_fp32_groups[index]]

    # What the base class would keep for its own checkpoints and accessors: it would hold on to FP32 copies.
    def _link_all_hp_params(self) -> None:
        pass

    def _create_param_mapping(self) -> list:
        return []

    def _lazy_init_hp_params_optimizer_state(self) -> None:
        pass

    # Accumulation over micro-batches (stages 0 and 1)
    def _fill_param_grad_accum_attribute(self, param: Any) -> None:
        gradient, param.grad = param.grad, None
        if gradient is not None:
            self.accumulate(param, gradient)

    def process_gradients(self, param: Any, i: int) -> None:
        if self.partition_gradients and param in self.main_grads:
            param.grad = self.main_grads.take(param)  # for the dummy
        super().process_gradients(param, i)

    def get_gradient_for_reduction(self, param: Any) -> Tensor | None:
        if not self.use_grad_accum_attribute:
            return param.grad
        store = self._accumulators.get(self.get_param_id(param))
        # Not a view, which would keep the accumulator alive when the base class lets it point into the bucket.
        return None if store is None or store.empty else store.read().view(param.shape).data

    def get_param_gradient_attribute(self, param: Any) -> Tensor | None:
        return self.get_gradient_for_reduction(param)

    def clear_grad_attribute(self, param: Any) -> None:
        param.grad = None
        self._accumulators.pop(self.get_param_id(param), None)

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Any, i: int) -> None:
        self._note_held_gradients()
        super().reduce_independent_p_g_buckets_and_remove_grads(param, i)
        if self.use_grad_accum_attribute and param.numel() <= self.reduce_bucket_size:  # it is in the bucket now
            self._accumulators.pop(self.get_param_id(param), None)

    # Under a pipeline schedule, which runs backwards that the base class knows nothing of
    def accumulate_by_hooks(self, tied: Any, group: Any) -> None:
        """Let every gradient go to its store at once, and no more; `tied`: see Engine.run_by_schedule."""
        self._tied = (tied, group)
        for hook in self._grad_acc_hooks:
            hook.remove()
        self._grad_acc_hooks.clear()
        for param in (param for params in self.bit16_groups for param in params):
            self._grad_acc_hooks.append(param.register_post_accumulate_grad_hook(self._fill_param_grad_accum_attribute))
        self.set_gradient_accumulation_boundary(True)

    def accumulate(self, param: Any, gradient: Tensor | None) -> None:
        """Add a micro-batch's gradient to the parameter's store; if its GEMM has, `gradient` says nothing."""
        if param in self.main_grads:
            gradient = self.main_grads.take(param)
        if gradient is not None:
            self._accumulators[self.get_param_id(param)].add(gradient)

    def reduce_accumulated(self) -> None:
        """Reduce what all micro-batches of the step have added up; tied copies first add up over their two ranks."""
        tied, group = self._tied
        if tied is not None:
            store = self._accumulators[self.get_param_id(tied)]
            total = store.read()
            dist.all_reduce(total, group=group)
            store.clear()
            store.add(total)
        self.setup_buckets()
        self.reduce_gradients()
        self.ready_for_gradients = False

    # Reduction
    def _gradient_reduction_buffer_dtype(self) -> torch.dtype:
        return torch.float32

    def _use_compact_grad_partition_buffer(self, group_idx: int) -> bool:
        return True

    def _build_compact_grad_partition_buffer(self, group_idx: int) -> list:
        return []  # the pieces' stores hold the partition's gradient

    def average_tensor(self, tensor: Tensor, communication_data_type: torch.dtype) -> None:
        """Reduce one bucket into the stores of the ranks that own its parts."""
        bucket = self.ipg_buckets[communication_data_type]
        with self._reduction_stream(bucket):
            if self.plan.replicas is not None:
                tensor.div_(dist.get_world_size(self.plan.replicas))
                dist.all_reduce(tensor, group=self.plan.replicas)
            self._reduce_bucket(tensor, bucket)

    def _reduction_stream(self, bucket: Any) -> AbstractContextManager:
        """Where a bucket is reduced: with overlap_comm (GPUs) beside the backward that goes on, as in the base."""
        if not self.overlap_comm:
            return nullcontext()
        stream = self.reduction_stream
        for producer in bucket.copy_streams or {torch.cuda.current_stream()}:
            stream.wait_stream(producer)
        torch.cuda.current_stream().wait_stream(stream)
        return torch.cuda.stream(stream)

    def _reduce_bucket(self, tensor: Tensor, bucket: Any) -> None:
        groups: dict[int, list[Part]] = defaultdict(list)
        start = 0
        for group, index, param_id in bucket.params:
            size = self.bit16_groups[group][index].numel()
            groups[group] += self._parts(group, param_id, start, size)
            start += size
        for group in sorted(groups):
            self._reduce(tensor, group, sorted(groups[group]))

    def _parts(self, group: int, param_id: int, start: int, size: int) -> list[Part]:
        """The bucket's range of one parameter cut at the borders of partitions."""
        place, partition = self._places[group][param_id], int(self.partition_size[group])
        borders = [place, *range(-(-place // partition) * partition, place + size, partition), place + size]
        cuts = sorted(set(borders))
        return [
            Part(low // partition, low, param_id, start + low - place, high - low)
            for low, high in zip(cuts, cuts[1:], strict=False)
        ]

    def _reduce(self, tensor: Tensor, group: int, parts: list[Part]) -> None:
        dp = self.real_dp_process_group[group]
        ranks, rank = dist.get_world_size(dp), dist.get_rank(dp)
        ordered = torch.cat([tensor[part.start : part.start + part.size] for part in parts])
        splits = [sum(part.size for part in parts if part.owner == owner) for owner in range(ranks)]
        segments, last = [], None
        for part in parts:  # the parts of one parameter lie side by side
            if part.param_id == last:
                segments[-1] += part.size
            else:
                segments.append(part.size)
            last = part.param_id
        error = self._error(parts) if self.plan.gradients.error_feedback else None
        options: dict[str, Any] = {"segments": segments, "error": error, "mu": self.mu}
        if self.plan.nodes is None:
            found = collectives.reduce_scatter(ordered, splits, dp, self.payload, **options)
        else:
            inside, between = self.plan.nodes
            found = collectives.reduce_scatter_two_level(
                ordered, splits, self.payload, inside=inside, between=between, **options
            )
        self.sent_bytes += found.sent_bytes
        if found.saturated is not None:
            self._saturated.append((found.saturated, found.elements))
        if error is not None:
            self._keep_error(parts, error)
        mine = found.result.div_(ranks)
        at = 0
        for part in parts:
            if part.owner == rank:
                self._by_param[group, part.param_id].store.add(mine[at : at + part.size])
                at += part.size

    def _error(self, parts: list[Part]) -> Tensor:
        """The residual of a bucket's parts, in their order."""
        sizes = {part.param_id: self.param_dict[part.param_id].numel() for part in parts}
        for param_id, size in sizes.items():
            if param_id not in self.errors:
                self.errors[param_id] = torch.zeros(size, dtype=torch.bfloat16, device=self.device)
        return torch.cat([self.errors[part.param_id][self._within(part, parts)] for part in parts])

    def _keep_error(self, parts: list[Part], error: Tensor) -> None:
        for part, piece in zip(parts, error.split([part.size for part in parts]), strict=True):
            self.errors[part.param_id][self._within(part, parts)] = piece

    def _within(self, part: Part, parts: list[Part]) -> slice:
        """Where a part lies in its parameter."""
        first = min(each.place for each in parts if each.param_id == part.param_id)
        return slice(part.place - first, part.place - first + part.size)

    def _note_held_gradients(self) -> None:
        """Until the first step is done: later ones hold the same, and every parameter of every step would ask."""
        if not self._has_stepped:
            stores = [*self._accumulators.values(), *(piece.store for piece in self.pieces)]
            self.gradient_bytes = max(self.gradient_bytes, sum(store.nbytes for store in stores))

    # The step
    def step(self, closure: Callable | None = None) -> None:
        """Norm and overflow over all ranks, clipping, update, new working weights everywhere.

        A norm that is not finite, or that `accept` refuses, leaves weights and states as they are.
        """
        self.micro_step_id = -1
        self._note_held_gradients()
        self._has_stepped = True
        norm = self._norm()
        self._global_grad_norm = norm if math.isfinite(norm) else float("inf")
        self.overflow = not math.isfinite(norm) or self.accept is not None and not self.accept(norm)
        self._update_scale(self.overflow)
        if not self.overflow:
            excess = (norm + 1e-6) / self.clip_grad if self.clip_grad else 0.0
            lr = self.optimizer.param_groups[0]["lr"]
            fragments = [piece.fragment for piece in self.pieces]
            gradients = [piece.store.read for piece in self.pieces]
            self.tally = self.updater.step(fragments, gradients, lr, 1.0 / max(excess, 1.0))
            self.updater.updates += 1
            self.update_lp_params()
            self._advance_mu()
        self._forget_gradients()

    def _norm(self) -> float:
        """L2 norm of the whole gradient; not finite if any rank's gradient is not."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for piece in self.pieces:
            gradient = piece.store.read()
            for owned in piece.fragment.owned():
                total += torch.linalg.vector_norm(gradient[owned], dtype=torch.float64).square()
        dist.all_reduce(total, group=self.dp_process_group)
        self._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
        return float(total.sqrt())

    def _advance_mu(self) -> None:
        if self.mu is None:
            return
        counts = torch.zeros(2, dtype=torch.float64, device=self.device)
        for saturated, elements in self._saturated:
            counts += torch.stack([saturated.reshape(()).double(), counts.new_tensor(elements)])
        # One mu for the whole model: replicas of a parameter must be quantized alike.
        self._model_parallel_all_reduce(tensor=counts, op=dist.ReduceOp.SUM)
        if counts[1] > 0:
            self.mu = next_mu(self.mu, float(counts[0] / counts[1]))

    def _forget_gradients(self) -> None:
        self._accumulators.clear()
        self._saturated.clear()
        for piece in self.pieces:
            piece.store.clear()
        for index in self.averaged_gradients:
            self.averaged_gradients[index] = self.all_grad_tensors[index] = None
        self.zero_grad(set_to_none=True)

    @torch.no_grad()
    def update_lp_params(self) -> None:
        """Round this rank's masters into its working weights, then gather everybody's."""
        if self.updater.update.master != "none":
            for piece in self.pieces:
                rank = dist.get_rank(self.real_dp_process_group[piece.group])
                working = self.parallel_partitioned_bit16_groups[piece.group][rank]
                self.updater.update.write_working(piece.fragment.tensors, working[piece.start : piece.stop])
        exact = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        payload = parse_payload(exact if self.plan.gather == "exact" else self.plan.gather)
        for index, flat in enumerate(self.bit16_groups_flat):
            self._gather(index, flat, payload)
            self._update_model_bit16_weights(index)

    def _gather(self, index: int, flat: Tensor, payload: Payload) -> None:
        dp = self.real_dp_process_group[index]
        if dist.get_world_size(dp) == 1 and payload.spec is None:
            return
        size, rank = int(self.partition_size[index]), dist.get_rank(dp)
        places = [*self.round_robin_bit16_offsets[index], len(flat)]
        segments = [high - low for low, high in zip(places, places[1:], strict=False)]
        mine = self.parallel_partitioned_bit16_groups[index][rank]
        found = collectives.all_gather(mine, [size] * dist.get_world_size(dp), dp, payload, segments=segments)
        self.sent_bytes += found.sent_bytes
        flat.copy_(found.result)


def low_precision(base: type, plan: Plan) -> type:
    """The subclass of DeepSpeed's stage 1 and 2 optimizer `base` that follows `plan`."""
    return type("LowPrecisionZeroOptimizer", (LowPrecisionZero, base), {"plan": plan})
