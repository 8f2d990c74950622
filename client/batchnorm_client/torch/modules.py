"""`nn.BatchNorm1d/2d/3d` as layers of the service."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm_client import Client, Layer, LayerChanges, LayerConfig, LayerOptions
from batchnorm_client.core.local import eval_step, train_step
from batchnorm_client.kernels.checks import least_values
from batchnorm_client.kernels.state import LocalState
from batchnorm_client.options import Normalize
from batchnorm_client.results import BatchStatistics, EvalResult, TrainResult
from batchnorm_client.torch.autograd import normalize, normalize_shard
from batchnorm_client.torch.groups import Compute, Group, GroupStep
from batchnorm_client.torch.kept import check_fits
from batchnorm_client.torch.running import RemoteRunningStatistics, parameters_of
from batchnorm_client.wire.statistics import STATISTICS, KindName


class RemoteBatchNorm(RemoteRunningStatistics):
    """Batch normalization whose running statistics live in the service; use `RemoteBatchNorm1d`, `2d` or `3d`.

    A drop-in replacement for torch's module: a subclass of it, with its constructor arguments, names, `state_dict()`
    and errors. In train mode the service normalizes the batch and folds its statistics exactly once, also when the call
    is retried; in eval mode it normalizes with the running statistics of all who train the layer. The backward pass is
    local.

    **Weight and bias** are parameters of this module, for any optimizer. Before each use they are sent to the service
    if they changed since this module last sent or read them, and so are `eps`, `momentum` and `track_running_stats`. If
    several modules use one layer, the last write wins, and the others do not notice: let only one of them train weight
    and bias, or keep them equal (as gradient averaging does), or use `affine=False`. Modules that only evaluate never
    write. `pull()` reads what others wrote; `push()` sends without a batch.

    **Running statistics** are not stored here. `running_mean`, `running_var` and `num_batches_tracked` are read from
    the service at each access, and assigning to them writes there; changing a tensor that was read (`.zero_()`) has no
    effect. They are not buffers, so `buffers()` and DistributedDataParallel's broadcasts do not include them. The
    module cannot be copied or pickled, because the copy would be the same layer: use `snapshot`.

    **With `compute="local"`** the batch is not sent: it is normalized by torch's kernel, and a train call sends its
    moments, 16 bytes per channel; an eval call asks whether the statistics have changed. Training uses this module's
    weight and bias and does not send them; eval, `push()` and `revert` do.

    **With a group** several processes, each with a module on the same layer, normalize their shards as one batch, as
    with `nn.SyncBatchNorm`; the service then computes the backward pass, too. All of them must run the same forward and
    backward passes in train mode, have equal weight and bias, and sum their gradients (which are sums over shards).
    If a member fails, the others get `GroupIncomplete`.

    **With `normalize="running"`** a batch in train mode is first folded, and then normalized with the running
    statistics right after its own fold, in one call, as VecNormalize and NormalizeObservation do it. Gradients flow to
    the input, weight and bias, but not through the statistics. In eval mode nothing is folded. With
    `statistics="population"`, the exact ones of all observations, a batch may have one value per channel.

    **With `at` or `expect`** the module is frozen, as torchvision's `FrozenBatchNorm2d`: in train and in eval mode it
    normalizes with the running statistics, weight, bias and eps of that kept state, and it never changes the layer.
    Gradients flow to the input. Weight and bias do not require gradients, and a module whose weight, bias or options
    were changed nevertheless raises ValueError instead of evaluating another state. `load_state_dict` accepts the
    tensors of this state only. From its construction on, the module also insists on the state's digest; with
    `compute="local"` it then makes no calls.

    Args:
        num_features: C.
        eps: added to the variance; more than 0.
        momentum: as in torch, 0 to 1; None for the cumulative average.
        affine: whether the layer has weight and bias.
        track_running_stats: whether the layer keeps running statistics.
        device: of weight and bias; it does not affect the service's device.
        dtype: torch.float32 or torch.float64. The input of a float32 module may also be float16 or bfloat16.
        bias: whether an affine module has a bias.
        client: a client of the service; this module does not close it. The layer is created at once; if it exists, its
            weight, bias, `eps`, `momentum` and `track_running_stats` are adopted.
        name: the layer's name.
        non_finite: "reject" or "allow" train batches that have NaN or infinity, or overflow. torch's module allows
            them, and its running statistics stay NaN from then on.
        compute: where batches are normalized, "remote" (in the service) or "local".
        normalize: "batch", or "running", which needs `compute="remote"`, running statistics and no group.
        statistics: "moving", torch's rule; or "population", exact mean and unbiased variance over all samples that were
            ever folded, for which `momentum` has no meaning and becomes None. `state_dict()` then also has its sums.
        group: id of a run of several processes that share their batches, such as a job's id; a new one for each run.
        group_size: the number of processes.
        group_timeout: seconds to wait for the others; 30 by default.
        at: a kept version, or the tag of a pin, to evaluate; the layer is only read.
        expect: the digest that this state, or without `at` the newest one, must have; the layer is only read.

    Attributes:
        client: as given.
        layer: the layer's handle.
        is_frozen: whether the module evaluates a kept state.

    Raises:
        LayerExists: the layer exists, and was created with another config.
        InvalidRequest: `name` or an argument is not valid.
        ValueError: `compute`, `dtype`, `normalize` or `statistics` is unknown, the layer has a bias and this module
            should have none, only one of `group` and `group_size` is given, or a group beside `at`; or what
            `normalize="running"` needs is missing; the kept state does not fit the module.
        VersionNotFound, DigestMismatch: there is no such state, or it has another digest than `expect`.
        BatchNormError: also at any later use, as `RemoteLayer`'s methods raise it.
    """

    _dimensions: Literal[1, 2, 3]
    _config: LayerConfig

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        client: Client,
        name: str,
        non_finite: Literal["reject", "allow"] = "reject",
        compute: Compute = "remote",
        normalize: Normalize = "batch",
        statistics: KindName = "moving",
        group: str | None = None,
        group_size: int | None = None,
        group_timeout: float | None = None,
        at: int | str | None = None,
        expect: str | None = None,
    ) -> None:
        shared = Group.of(group, group_size, group_timeout)
        frozen = at is not None or expect is not None
        if frozen and shared:
            raise ValueError("a module that evaluates a kept state has no group")
        _check_one_of("compute", compute, get_args(Compute))
        _check_one_of("normalize", normalize, get_args(Normalize))
        _check_one_of("statistics", statistics, tuple(STATISTICS))
        if normalize == "running" and (compute == "local" or shared or not track_running_stats):
            raise ValueError(
                'normalize="running" needs compute="remote", running statistics and no group; '
                "client.follow() makes a follower, which does it in this process"
            )
        if STATISTICS[statistics].must_be_null.get("momentum"):
            momentum = None
        dtype = dtype or torch.get_default_dtype()
        if dtype not in {torch.float32, torch.float64}:
            raise ValueError(f"dtype must be torch.float32 or torch.float64, not {dtype}; inputs may be half precision")
        super().__init__(num_features, eps, momentum, affine, False, device, dtype, **without_bias(not bias))
        self._forget_buffers()
        self.compute = compute
        self.normalize = normalize
        self.is_frozen = frozen
        self._pending = None
        self._calls = None
        self.track_running_stats = self._tracks = track_running_stats
        self.client = client
        self.state_dtype, self._device = dtype, torch.device("cpu" if device is None else device)
        self._known: dict[str, Any] = {}  # what the service has, as this module last sent or read it
        options = layer_options(self, self._dimensions, tracks=track_running_stats, dtype=dtype, non_finite=non_finite)
        options["statistics"] = statistics
        if frozen:
            kept = client.layer(name, at=at, expect=expect).inspect()
            check_fits(kept, num_features, options)
            self.layer = client.layer(name, at=at, expect=kept.digest)
            self.freeze_parameters()
        else:
            self.layer = client.create_layer(name, num_features, **options)
        self._shared = None if shared is None else GroupStep(self.layer, shared, 0, compute)
        self.pull()

    def freeze_parameters(self) -> None:
        """Make optimizers leave weight and bias as they are, until `revert`."""
        own = dict(self.named_parameters(recurse=False))
        self.trainable = [name for name, parameter in own.items() if parameter.requires_grad]
        for parameter in own.values():
            parameter.requires_grad_(False)
            parameter.grad = None

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name

    def extra_repr(self) -> str:
        """torch's representation, and the layer's name."""
        torchs = super().extra_repr()  # type: ignore[no-untyped-call]
        running = ", normalize='running'" if self.normalize == "running" else ""
        return f"{torchs}, name={self.name!r}{running}{'' if self.layer.at is None else f', at={self.layer.at!r}'}"

    @property
    def _trains(self) -> bool:
        return self.training and not self.is_frozen

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Normalize a batch: in train mode with its own statistics, which are folded; in eval with the running ones.

        With `normalize="running"`, in train mode with the running ones after its own are folded.

        Args:
            input: (N, C, *), with the ranks of torch's module; on the parameters' device.

        Returns:
            As the input in shape, dtype, device and memory format.

        Raises:
            ValueError: as in torch, if the rank is wrong, or if there is one value per channel where the batch's
                statistics are needed.
            RuntimeError: input and parameters are on different devices.
            TypeError: weight or bias were converted to another dtype.
            TooFewValues: an empty batch in train mode.
            ShapeMismatch, DtypeMismatch, NonFinite, PayloadTooLarge: as `RemoteLayer.train` and `eval`.
        """
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        own = (self._trains and self.normalize == "batch") or not self._tracks
        shared = self._shared if self._trains else None
        least = least_values(self._config) if self._trains else 2
        if (own or self._trains) and not shared and least > 1 and input.size(1) and input.numel() == input.size(1):
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
        weight, bias = self.weight, self.bias
        if weight is not None and weight.device != input.device:
            # The backward pass would raise, but after the batch was counted.
            raise RuntimeError(f"the input is on {input.device}, weight and bias are on {weight.device}")
        if input.numel() == 0 and not self._trains:
            return self._empty(input)
        if shared:
            self._shared = shared.next()
            if self._calls is not None:
                self._calls.begin()
            self.push()
            return normalize_shard(shared, input, weight, bias)
        together = self._calls is not None and self._calls.begin()
        if not self.sends_parameters:
            self._send(self._options())
        elif together:  # the pass has sent what was pending; these parameters may have changed since it began
            self._send(self._options() | self.changed_parameters())
        else:
            self.push()
        if self.compute == "local":
            return self._train_here(input) if self._trains else self._evaluate_here(input, own=own)
        return normalize(self._remote, input, weight, bias, own=own, eps=self.eps, clip=self._config.clip)

    def _remote(self, x: Tensor, statistics: bool) -> tuple[Tensor, BatchStatistics[Tensor] | None]:
        result: TrainResult[Tensor] | EvalResult[Tensor]
        if self._trains:
            result = self.layer.train(x, normalize=self.normalize, statistics=statistics)
        else:
            result = self.layer.eval(x, statistics=statistics)
        found = result.statistics
        if found and not self.affine and not (self._tracks and (self.track_running_stats or not self._trains)):
            # With a half-precision input and no float32 tensor, torch's statistics are in half precision, too.
            found = BatchStatistics(*(tensor.to(x.dtype) for tensor in (found.mean, found.var, found.invstd)))
        return result.output, found

    def _evaluate_here(self, x: Tensor, *, own: bool) -> Tensor:
        """Normalize as the service would; with torch's own gradients, unless others have written weight or bias."""
        state = (None if self._calls is None else self._calls.state(self.name)) or self.layer._state()
        if not torch.is_grad_enabled():
            return eval_step(state, x, statistics=False).output
        weight, bias = self.weight, self.bias
        if _stands_for(weight, state.weight) and _stands_for(bias, state.bias):
            here = replace(state, weight=weight, bias=bias)
            return eval_step(here, x, statistics=False, differentiable=True).output

        def evaluate(x: Tensor, statistics: bool) -> tuple[Tensor, BatchStatistics[Tensor] | None]:
            result = eval_step(state, x, statistics=statistics)
            return result.output, result.statistics

        return normalize(evaluate, x, weight, bias, own=own, eps=state.config.eps, clip=state.config.clip)

    def _train_here(self, x: Tensor) -> Tensor:
        """Normalize with the batch's statistics, with torch's own gradients; fold its moments."""
        tracks = self._tracks and self.track_running_stats
        state = LocalState(self._own_config(tracks), 0, 0, self.weight, self.bias, None, None, "")
        step = train_step(state, x, differentiable=True)
        if tracks and self._pending:
            self._pending.add(self.name, step.moments)
        elif tracks:
            self.layer.fold_moments(*step.moments)
        return step.output

    def _own_config(self, tracks: bool) -> LayerConfig:
        """The layer's config with this module's eps and tracking."""
        if (self._config.eps, self._config.track_running_stats) != (self.eps, tracks):
            self._config = self._config.model_copy(update={"eps": self.eps, "track_running_stats": tracks})
        return self._config

    def _empty(self, x: Tensor) -> Tensor:
        """An empty output with its autograd graph; the statistics do not matter."""
        mean = torch.zeros(self.num_features, dtype=self.state_dtype, device=x.device)
        return batch_norm(x, mean, torch.ones_like(mean), self.weight, self.bias, False, 0.0, self.eps)

    def push(self) -> None:
        """Send weight, bias, `eps`, `momentum` and `track_running_stats`, those that changed since they were last sent.

        `forward` does this. Call it after the last optimizer step, so that others evaluate with the final values.

        Raises:
            TypeError: weight or bias were converted to another dtype.
        """
        self.flush()
        self._send(self._options() | self._parameters_to_send())

    def unsent(self) -> dict[str, Any]:
        """What `push` would send, by name: values that differ from what this module last sent or read."""
        return self._changes(self._options() | {name: value.detach() for name, value in self.named_parameters()})

    def _changes(self, mine: dict[str, Any]) -> dict[str, Any]:
        known = self._known
        return {field: value for field, value in mine.items() if field not in known or not _same(known[field], value)}

    def _send(self, mine: dict[str, Any]) -> None:
        changes = self._changes(mine)
        if changes and self.is_frozen:
            raise ValueError(
                f"{', '.join(changes)} of this module changed, which evaluates a kept state of layer {self.name!r}; "
                "pull() takes back the change, revert(model) makes modules that can be trained"
            )
        if changes:
            known = self.forget_sent()
            self.layer.update(**cast(LayerChanges, changes))
            self._known = known | changes

    def pull(self) -> Layer:
        """Adopt the service's weight, bias, `eps`, `momentum` and `track_running_stats`. Unsent changes are lost.

        Parameters are written in place, so that optimizers keep them.

        Returns:
            The layer as it was read.

        Raises:
            ValueError: the layer has a bias, and this module was made without one.
        """
        layer = self.layer.inspect()
        self._config = layer.config
        values = parameters_of(layer, self)
        with torch.no_grad():
            for field, value in values.items():
                parameter = self.get_parameter(field)
                if not _same(value, parameter):  # an equal one is not written: a backward pass may still need it
                    parameter.copy_(value)
        self.eps, self.momentum = layer.config.eps, layer.config.momentum
        if self._tracks:
            self.track_running_stats = layer.config.track_running_stats
        self._known = self._options() | values
        return layer

    def send_state(self, state: dict[str, Tensor]) -> None:
        """Replace tensors of the layer, together with this module's weight and bias, in one call.

        Args:
            state: running statistics by name, in the layer's dtype.

        Raises:
            TypeError: weight or bias were converted to another dtype.
            ValueError: the module is frozen, and this is not its state; weight and bias are restored.
        """
        parameters = self._parameters_to_send()
        if self.is_frozen:
            self.pull()
            kept = self.layer.state_dict(as_torch=True)
            given = state | parameters
            if differ := [name for name, value in given.items() if not _same(kept[name], value)]:
                raise ValueError(
                    f"{', '.join(differ)} are not those of the state that this module evaluates, {self.layer!r}"
                )
            return
        if not state and not parameters:
            return
        self.flush()
        known = self.forget_sent()
        self.layer.load_state_dict(state | parameters)
        self._known = known | parameters

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"eps": self.eps, "momentum": self.momentum}
        if self._tracks:  # without buffers torch ignores the attribute, and the service refuses the toggle
            options["track_running_stats"] = self.track_running_stats
        return options

    @property
    def evaluates_here(self) -> bool:
        """Whether a batch is normalized in this process with the layer's running statistics."""
        return self.compute == "local" and not self._trains

    @property
    def sends_parameters(self) -> bool:
        """Whether weight and bias are sent before the module is used."""
        return self.compute != "local" or not self._trains

    def changed_parameters(self) -> dict[str, Tensor]:
        """Copies of weight and bias, on the CPU, those that changed since they were last sent or read."""
        changed = self._changes(self._parameters)
        return self._copies(changed) if changed else changed

    def forget_sent(self) -> dict[str, Any]:
        """What the service has, which is uncertain from now on, until `remember_sent`."""
        known, self._known = self._known, {}
        self._forget_state()
        return known

    def remember_sent(self, known: dict[str, Any]) -> None:
        """The service has these options and parameters."""
        self._known = known

    def _parameters_to_send(self) -> dict[str, Tensor]:
        """Copies of weight and bias, on the CPU."""
        return self._copies(self._parameters)

    def _copies(self, parameters: dict[str, Any]) -> dict[str, Tensor]:
        given: dict[str, Tensor] = {name: value for name, value in parameters.items() if value is not None}
        for name, value in given.items():
            if value.dtype != self.state_dtype:
                raise TypeError(
                    f"{name} is {value.dtype}, but layer {self.name!r} is {self.state_dtype}: leave the parameters of "
                    f"{type(self).__name__} in its dtype; only its input may be half precision"
                )
        return {name: value.detach().to("cpu", copy=True) for name, value in given.items()}


def _check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, not {value!r}")


def layer_options(
    module: _BatchNorm,
    dimensions: Literal[1, 2, 3],
    *,
    tracks: bool,
    dtype: torch.dtype,
    non_finite: Literal["reject", "allow"],
) -> LayerOptions:
    """The options of a layer for a module, torch's or a remote one."""
    return {
        "eps": module.eps,
        "momentum": module.momentum,
        "affine": module.affine,
        "track_running_stats": tracks,
        "dimensions": dimensions,
        "dtype": "float64" if dtype == torch.float64 else "float32",
        "non_finite": non_finite,
    }


def without_bias(leave_out: bool) -> dict[str, bool]:
    """torch's argument for a module without bias, which older versions do not have."""
    return {"bias": False} if leave_out else {}


def _stands_for(parameter: Tensor | None, value: Any) -> bool:
    """Whether a parameter has the value that a state has; none stands for zeros."""
    if parameter is None or value is None:
        return parameter is None and (value is None or not value.any())
    return torch.equal(parameter, torch.as_tensor(value).to(parameter))


def _same(known: Any, value: Any) -> bool:
    if isinstance(known, Tensor):
        # Compared by value: autograd's version of a parameter does not count changes through `.data`.
        return value.dtype == known.dtype and torch.equal(known, value if value.is_cpu else value.to(known))
    return bool(known == value)
