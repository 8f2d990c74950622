"""A layer of the service, for `AsyncClient`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy.typing as npt

from batchnorm_client.arrays import A, to_numpy, to_torch
from batchnorm_client.core import calls, history_calls, local
from batchnorm_client.core.group_member import GroupMember
from batchnorm_client.core.samples import as_batch, as_given, checked_cast
from batchnorm_client.core.state_choice import StateChoice
from batchnorm_client.kernels.state import LocalState
from batchnorm_client.options import Cast, LayerChanges, Mode, Normalize, What
from batchnorm_client.results import EvalResult, FoldResult, Gradients, TrainResult
from batchnorm_client.wire.documents import Drift, HistoryEntry, Layer, Pin

if TYPE_CHECKING:
    import torch

    from batchnorm_client.async_client import AsyncClient
    from batchnorm_client.options import Numbers, Rows, StateDict


class AsyncRemoteLayer:
    """A handle for a layer of the service. Made by `AsyncClient.layer` and `create_layer`.

    A handle that was made with `at` or `expect` only reads the state that they name: `eval`, `eval_local`, `inverse`,
    `inspect` and `state_dict` use this state, or raise `VersionNotFound` if it is not kept any more, and
    `DigestMismatch` if it has another digest. `history`, `pins` and `drift` are those of the layer. All other methods
    raise ValueError before anything is sent.

    Where a batch is taken, one sample, (C,), may be given instead, and the output is one sample, too. `cast` is how
    float64 observations are sent to a float32 layer; without it they are refused, because precision would be lost.

    Every method may also raise `LayerNotFound`; `Unauthenticated` and `Forbidden`; `Overloaded`, `StoreUnavailable`,
    `ConnectionFailed` and `TimedOut` after all attempts; `UnexpectedAnswer`.

    Attributes:
        name: of the layer.
        at: the version or tag that is read; None for the newest state.
        expect: the digest that the state must have; None for any.
        cast: the dtype that batches are converted to; outputs have it, too. None for no conversion.
    """

    def __init__(
        self,
        client: AsyncClient,
        name: str,
        *,
        at: int | str | None = None,
        expect: str | None = None,
        cast: Cast | None = None,
    ) -> None:
        calls.layer_path(name)
        self.name = name
        self.at = at
        self.expect = expect
        self.cast = checked_cast(cast)
        self._choice = StateChoice.of(at, expect)
        self._client = client
        self._cached_state: LocalState | None = None  # of eval_local and train_local; revalidated before each use

    async def train(
        self,
        x: A,
        *,
        normalize: Normalize = "batch",
        key: str | None = None,
        statistics: bool = False,
        group: str | None = None,
        size: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the service looks at it
    ) -> TrainResult[A]:
        """Fold a batch's statistics into the running statistics, exactly once, and normalize it.

        Args:
            x: (N, C, *), or with the channels where the layer's `channel_axis` says; a numpy array or a torch tensor.
                float16, bfloat16 or float32 for a float32 layer, float64 for a float64 layer. Gradients do not flow.
            normalize: "batch", with the batch's own statistics, as in training; or "running", with the running
                statistics right after this batch was folded, as observations are normalized in reinforcement
                learning. A repeat under the same key is then normalized with the newest ones. Not in a group.
            key: an idempotency key: a repeat with the same key and batch is not counted again, whoever sends it, for as
                long as the service keeps receipts (one hour by default). By default a new one, which makes the
                client's own retries safe.
            statistics: also return the mean, biased variance and inverse standard deviation that were used.
            group: makes `x` a shard of a synchronized batch with this id, not used before: every shard is normalized
                with the statistics of all, which are folded once. A shard may be empty.
            size: how many members the group has.
            timeout: seconds to wait for the others; 30 by default. The read timeout and the deadline of this call are
                extended by as much.

        Raises:
            ShapeMismatch, DtypeMismatch: the batch does not fit the layer.
            TooFewValues: fewer than two values per channel (one, for population statistics), in all shards together.
            GroupIncomplete: not all members came in time. Nothing was folded; start again with another id.
            GroupClosed: the group is complete, or has timed out.
            GroupMismatch: the group has another size.
            InvalidRequest: "running" in a group, or for a layer that tracks no running statistics.
            NonFinite: NaN, infinity or overflow, unless the layer allows them.
            IdempotencyKeyReused: the key belongs to another batch.
            PayloadTooLarge: the batch is larger than the service takes.
            TypeError: `x` is no array, or has a dtype that cannot be sent.
        """
        self._choice.check_writable(self.name, "train")
        member, batch, key = GroupMember.of(group, size, timeout), as_batch(x, self.cast), self._client._key(key)
        result = await self._client._call(
            calls.train(self.name, batch, key=key, statistics=statistics, normalize=normalize, member=member)
        )
        return as_given(x, result)

    async def train_local(
        self,
        x: A,
        *,
        key: str | None = None,
        statistics: bool = False,
        group: str | None = None,
        size: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the service looks at it
    ) -> TrainResult[A]:
        """As `train`, but the batch is normalized here; only its moments are sent, about 16 bytes per channel.

        The arithmetic runs in a thread.

        A torch tensor is normalized by torch's kernel: on the CPU the output is bit-equal to that of `train` if torch
        uses as many threads as the service (one), and so is running_mean; running_var is within one unit in the last
        place per fold (of a float64 layer, two). A numpy array gives the same up to rounding. Weight, bias and config
        are those that the layer has when the call begins.

        Args:
            x: as for `train`.
            key: as for `train`; names the moments.
            statistics: as for `train`.
            group: as for `train`; members may use either call.
            size: as for `train`.
            timeout: as for `train`.

        Raises:
            As `train`. In a group, an output that overflows is only detected after the group was folded.
        """
        self._choice.check_writable(self.name, "train_local")
        state, member, batch = await self._state(), GroupMember.of(group, size, timeout), as_batch(x, self.cast)
        run = self._client._runtime.run
        step = await run(partial(local.train_step, state, batch)) if member is None else None
        moments = await run(partial(local.shard_moments, state, batch)) if step is None else step.moments
        done = await self._client._call(
            calls.fold_moments(self.name, moments, key=self._client._key(key), member=member)
        )
        return as_given(x, await run(partial(local.trained, state, batch, step, done, statistics=statistics)))

    async def fold_moments(
        self,
        count: int | Numbers,
        mean: Rows,
        var: Rows,
        *,
        key: str | None = None,
        group: str | None = None,
        size: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the service looks at it
    ) -> FoldResult:
        """Fold the moments of a batch into the running statistics, exactly once, without sending the batch.

        Or those of a stack of up to 65,536 batches, in their order: in one call and one commit, all or none, and much
        faster than one by one.

        Args:
            count: values per channel, N*H*W; (M,) integers for a stack.
            mean: (C,), of any float dtype; a list, numpy array or torch tensor; (M, C) for a stack.
            var: as mean; biased: divided by count.
            key: as for `train`.
            group: as for `train`; the result has count, mean and var of all shards, and count may be 0.
            size: as for `train`.
            timeout: as for `train`.

        Raises:
            As `train`. Of a stack, `fields["row"]` says which row is wrong, counted from 0.
        """
        self._choice.check_writable(self.name, "fold_moments")
        member = GroupMember.of(group, size, timeout)
        return await self._client._call(
            calls.fold_moments(self.name, (count, mean, var), key=self._client._key(key), member=member)
        )

    async def eval(self, x: A, *, statistics: bool = False) -> EvalResult[A]:
        """Normalize a batch with the running statistics, or with its own if the layer has none. Changes nothing.

        Args:
            x: as for `train`; may be empty.
            statistics: also return the mean, variance and inverse standard deviation that were used.

        Raises:
            ShapeMismatch, DtypeMismatch, PayloadTooLarge, TypeError: as for `train`.
            TooFewValues: one value per channel, and the layer has no running statistics.
        """
        batch = as_batch(x, self.cast)
        result = await self._client._call(calls.evaluate(self.name, batch, statistics=statistics, choice=self._choice))
        return as_given(x, result)

    async def eval_local(self, x: A, *, statistics: bool = False) -> EvalResult[A]:
        """As `eval`, but the batch is not sent. The layer's state is cached, and read again only if it has changed.

        The arithmetic runs in a thread.

        With `expect`, the digest is computed here from the numbers that were read. A handle with `at` and `expect`
        reads them once and makes no further calls, because another state would have another digest; so it also works
        after the pin was deleted. A handle with `at` alone asks before each use whether the tag stands for another
        state now.

        Args:
            x: as for `eval`.
            statistics: as for `eval`.

        Raises:
            As `eval`.
        """
        state, batch = await self._state(), as_batch(x, self.cast)
        result = await self._client._runtime.run(partial(local.eval_step, state, batch, statistics=statistics))
        return as_given(x, result)

    async def inverse(self, y: A) -> EvalResult[A]:
        """Undo `eval`: (y - bias) / weight * sqrt(running_var + eps) + running_mean. Clipped values are not restored.

        Args:
            y: an output of `eval`, or another batch of normalized values; as `x` of `train`.

        Raises:
            InvalidRequest: the layer has no running statistics, or a weight is 0.
            ShapeMismatch, DtypeMismatch, PayloadTooLarge, TypeError: as for `train`.
        """
        result = await self._client._call(calls.inverse(self.name, as_batch(y, self.cast), self._choice))
        return as_given(y, result)

    async def backward(
        self,
        x: A,
        grad_output: A,
        mode: Mode = "train",
        *,
        key: str | None = None,
        group: str | None = None,
        size: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the service looks at it
    ) -> Gradients[A]:
        """The gradients of a loss with respect to a batch, weight and bias. Changes nothing.

        Args:
            x: the batch, as for `train`.
            grad_output: the loss's gradient with respect to the output; as `x` in shape and dtype.
            mode: the step that made the output.
            key: as for `train`; used in a group only.
            group: makes `x` a shard: its gradient is that of the whole batch, and those of the parameters are
                sums over the shard, as with `nn.SyncBatchNorm`. Groups of backward and of train may have the same id.
            size: as for `train`.
            timeout: as for `train`.

        Raises:
            ShapeMismatch, DtypeMismatch, TooFewValues, PayloadTooLarge, TypeError: as for `train`.
            GroupIncomplete, GroupClosed, GroupMismatch: as for `train`.
            InvalidRequest: a group in eval mode, or of a layer that clips.
        """
        self._choice.check_writable(self.name, "backward")
        member = GroupMember.of(group, size, timeout)
        tensors = as_batch(x, self.cast), as_batch(grad_output, self.cast)
        found = await self._client._call(
            calls.backward(self.name, *tensors, mode=mode, key=self._client._key(key), member=member)
        )
        return as_given(x, found, "grad_input")

    async def inspect(self) -> Layer:
        """The layer's config, counters, state and digest, as of its newest commit, or of the state that is read."""
        return await self._client._call(calls.inspect(self.name, self._choice))

    async def drift(self) -> Drift:
        """How far the batches that come in are from the running statistics, smoothed over the batches.

        Returns:
            Its `score` is the part of the shift of the worst channel that noise does not explain; `drifting` is whether
            it has passed the service's threshold.
        """
        return await self._client._call(calls.drift(self.name))

    async def update(self, *, if_match: int | None = None, **changes: Unpack[LayerChanges]) -> Layer:
        """Set `eps`, `momentum`, `track_running_stats`, `non_finite`, `half_life`, `clip`, `weight` or `bias`.

        Args:
            if_match: do it only if the layer has this version.
            changes: those to set; weight and bias are (C,) arrays, tensors or lists.

        Raises:
            VersionMismatch: the layer has another version than `if_match`.
            InvalidRequest, ShapeMismatch, NonFinite: a value does not fit; nothing was set.
        """
        self._choice.check_writable(self.name, "update")
        return await self._client._call(calls.update(self.name, changes, if_match))

    async def reset(
        self, what: What = "running_stats", *, key: str | None = None, if_match: int | None = None
    ) -> Layer:
        """Reset running statistics ("running_stats"), weight and bias ("parameters") or both ("all"), as torch does.

        Args:
            what: to reset.
            key: an idempotency key, as in `train`.
            if_match: do it only if the layer has this version.

        Raises:
            VersionMismatch: the layer has another version than `if_match`.
            IdempotencyKeyReused: the key belongs to another call.
        """
        self._choice.check_writable(self.name, "reset")
        return await self._client._call(calls.reset(self.name, what, self._client._key(key), if_match))

    @overload
    async def state_dict(self, *, as_torch: Literal[False] = False) -> dict[str, npt.NDArray[Any]]: ...
    @overload
    async def state_dict(self, *, as_torch: Literal[True]) -> dict[str, torch.Tensor]: ...
    @overload
    async def state_dict(self, *, as_torch: bool) -> dict[str, npt.NDArray[Any]] | dict[str, torch.Tensor]: ...
    async def state_dict(self, *, as_torch: bool = False) -> dict[str, npt.NDArray[Any]] | dict[str, torch.Tensor]:
        """The layer's tensors, by their names in torch's `nn.BatchNorm*.state_dict()`.

        A population layer also has `samples_tracked`, `population_mean` and `population_m2`.

        Args:
            as_torch: torch tensors, on the CPU, for `module.load_state_dict`; numpy arrays otherwise.
        """
        tensors = await self._client._call(calls.state(self.name, self._choice))
        if as_torch:
            return {name: to_torch(tensor) for name, tensor in tensors.items()}
        return {name: to_numpy(tensor) for name, tensor in tensors.items()}

    async def load_state_dict(self, state_dict: StateDict, *, if_match: int | None = None) -> Layer:
        """Replace the tensors that are given. Others are kept.

        Args:
            state_dict: of a torch module or of another layer; numpy arrays or torch tensors.
            if_match: do it only if the layer has this version. Without it, a call whose response was lost is not
                repeated, because that would undo batches that others trained since; it raises, with
                `outcome_unknown` set.

        Raises:
            VersionMismatch: the layer has another version than `if_match`.
            InvalidRequest, ShapeMismatch, DtypeMismatch, NonFinite: a tensor does not fit; nothing was replaced.
        """
        self._choice.check_writable(self.name, "load_state_dict")
        return await self._client._call(calls.replace_state(self.name, state_dict, if_match))

    async def history(self, *, limit: int | None = None, before: int | None = None) -> AsyncIterator[HistoryEntry]:
        """The newest state and those that the service keeps, newest first: `async for state in layer.history()`.

        Pages are requested as they are needed.

        Args:
            limit: at most so many states.
            before: only states with versions below this.
        """
        while limit is None or limit > 0:
            page = await self._client._call(history_calls.page(self.name, limit, before))
            for state in page.history:
                yield state
            before = page.next
            if before is None:
                return
            if limit is not None:
                limit -= len(page.history)

    async def rollback(self, to: int | str, *, key: str | None = None, if_match: int | None = None) -> Layer:
        """Go back to a kept state: its tensors, counters and options get a new version. The state before is kept, too.

        Args:
            to: a version, or the tag of a pin.
            key: an idempotency key, as in `train`.
            if_match: do it only if the layer has this version.

        Raises:
            VersionNotFound: this state is not kept.
            VersionMismatch: the layer has another version than `if_match`.
            IdempotencyKeyReused: the key belongs to another call.
        """
        self._choice.check_writable(self.name, "rollback")
        return await self._client._call(history_calls.rollback(self.name, to, self._client._key(key), if_match))

    async def pin(self, tag: str, *, version: int | None = None, key: str | None = None) -> Pin:
        """Keep a state under a tag, unchanged, until `unpin`. Repeating the call for the same state changes nothing.

        Args:
            tag: as a layer name, with at least one character that is no digit.
            version: of the newest or a kept state; by default the newest.
            key: an idempotency key: a repeat with it returns the same pin, even if the layer was changed meanwhile.

        Returns:
            The pin, whose `tag` and `digest` name the state: `client.layer(name, at=tag, expect=digest)` reads it.

        Raises:
            PinExists: the tag stands for another state.
            VersionNotFound: this version is not kept.
            TooManyPins: the layer has as many pins as the service allows.
            IdempotencyKeyReused: the key belongs to another call.
        """
        self._choice.check_writable(self.name, "pin")
        return await self._client._call(history_calls.pin(self.name, tag, version, self._client._key(key)))

    async def pins(self) -> list[Pin]:
        """All pins of the layer, by tag."""
        return await self._client._call(history_calls.pins(self.name))

    async def unpin(self, tag: str) -> None:
        """Delete a pin. Its state is then kept as long as others without a pin.

        A call whose response was lost is not repeated, because the tag may stand for another state by then; if there
        still is a pin, it raises, with `outcome_unknown` set.

        Raises:
            VersionNotFound: there is no such pin.
        """
        self._choice.check_writable(self.name, "unpin")
        await self._client._call(history_calls.unpin(self.name, tag))

    async def delete(self, *, if_match: int | None = None, with_pins: bool = False) -> None:
        """Delete the layer, its receipts and its history.

        Args:
            if_match: do it only if the layer has this version. Without it, a call whose response was lost is not
                repeated, because another layer may have the name by then; if the layer still exists, it raises, with
                `outcome_unknown` set.
            with_pins: also if the layer has pins, which are deleted, too.

        Raises:
            LayerPinned: the layer has pins.
            VersionMismatch: the layer has another version than `if_match`.
        """
        self._choice.check_writable(self.name, "delete")
        await self._client._call(calls.delete(self.name, if_match, with_pins=with_pins))

    async def _state(self) -> LocalState:
        if self._cached_state is None or not self._choice.is_constant:
            self._cached_state = await self._client._call(calls.revalidate(self.name, self._cached_state, self._choice))
        return self._cached_state

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}{self._choice.arguments} at {self._client.base_url})"
