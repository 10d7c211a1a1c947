"""A down projection whose inputs are edited.

Invariants:
- The base layer runs as it is, and what edits write is added (edit.py), so any linear base layer works, quantized ones
  too. Only where all rows share a folded edit and the base layer is a plain `nn.Linear` is it fused into that matmul.
- What a call dials belongs to the calling thread, what is set on the model to all. Without either, at strength
  0, disabled or merged, the layer is the base layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import NeVAConfig
from .edit import Call, GeneralEdit, LayerEdit, add_folded, add_general, general_edit, same_layout
from .errors import NeVAError
from .module_edits import TENSORS, ModuleEdits, check_module, check_numbers
from .projection import can_fuse, columns, device_and_dtype, is_plain, layer_sizes, stored_weight, version
from .strengths import scale_by_units


class NeVALayer(nn.Module, BaseTunerLayer):
    """A down projection that adds the edits of its active adapters to what the base layer returns.

    Args:
        base_layer (`nn.Module`): The down projection: any module that maps `[..., d_ff]` to `[..., hidden]` linearly.
        adapter_name (`str`): The name of the first adapter.
        config ([`NeVAConfig`]): Its configuration.
        module_name (`str`): The full name of the down projection in the base model.

    Raises:
        `NeVAError`: If the module does not tell its sizes, or has fewer neurons than the config asks for.
    """

    adapter_layer_names = ("neva_shift", "neva_gain", "neva_gate_weight", "neva_gate_bias")
    other_param_names = ("neva_index", "neva_configs", "neva_strengths")

    if TYPE_CHECKING:  # what PEFT's class tells, but nn.Module makes vague
        base_layer: Any
        active_adapters: list[str]
        merged: bool

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: NeVAConfig, module_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        self.in_features, self.out_features = layer_sizes(base_layer)
        self.neva_index = BufferDict(persistent=True)
        self.neva_shift = nn.ParameterDict()
        self.neva_gain = nn.ParameterDict()
        self.neva_gate_weight = nn.ParameterDict()
        self.neva_gate_bias = nn.ParameterDict()
        self.neva_configs: dict[str, NeVAConfig] = {}
        self.neva_strengths: dict[str, list[float]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged_strengths: dict[str, list[float]] = {}
        self._before_merge: tuple[torch.Tensor, nn.Parameter | None] | None = None
        self._active_adapter = adapter_name
        self.call = Call()
        self._edit: LayerEdit | None = None
        self._stale = False
        self._kept: dict[tuple[str, str], tuple[Any, torch.Tensor]] = {}
        self.register_load_state_dict_post_hook(lambda module, _: module.refresh())
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: NeVAConfig) -> None:
        """Adds an adapter: tensors of the config's sizes that leave the base layer as it is.

        Args:
            adapter_name (`str`): Its name.
            config ([`NeVAConfig`]): Its configuration.

        Raises:
            `NeVAError`: If the config asks for more neurons than there are.
        """
        count = config.neurons_in(self.module_name)
        if count > self.in_features:
            raise NeVAError(
                f"`neurons` asks for {count} neurons in {self.module_name!r}, which has only {self.in_features}."
            )
        shape = (len(config.values), count)
        self.neva_index[adapter_name] = torch.arange(count, dtype=torch.int32)
        self.neva_shift[adapter_name] = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        if config.use_gain:
            self.neva_gain[adapter_name] = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        if config.use_gate:
            self.neva_gate_weight[adapter_name] = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
            self.neva_gate_bias[adapter_name] = nn.Parameter(torch.zeros(shape[0], dtype=torch.float32))
        self.neva_configs[adapter_name] = config
        self.neva_strengths[adapter_name] = [float(config.default_strengths.get(name, 0.0)) for name in config.values]
        # transformers fills the tensors after this by ways that call none of our hooks: make the edit when first used.
        self._stale = self._stale or any(self.neva_strengths[adapter_name])
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def fill(self, adapter_name: str, edits: ModuleEdits) -> None:
        """Copies the numbers of an adapter into its tensors.

        Args:
            adapter_name (`str`): Which adapter; it was made for a config of the map that the edits are of.
            edits ([`ModuleEdits`]): This layer's.

        Raises:
            `NeVAError`: If they are not sound, or do not fit the config.
        """
        config = self.neva_configs[adapter_name]
        check_module(self.module_name, edits, config)
        if edits.index.numel() != config.neurons_in(self.module_name):
            raise NeVAError(f"The edits of {self.module_name!r} are not of as many neurons as the map's config says.")
        with torch.no_grad():
            for kind, tensor in edits.tensors().items():
                getattr(self, f"neva_{kind}")[adapter_name].copy_(tensor)
        self.refresh()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        edit = self._edit_in_force()
        if edit is None:
            return self.base_layer(x, *args, **kwargs)
        if edit.fused is not None:
            output = nn.functional.linear(x, self.base_layer.weight, edit.fused)
        else:
            output = self.base_layer(x, *args, **kwargs)
        if edit.bias is not None:
            output = add_folded(output, edit.bias.to(output.dtype))
        for general in edit.general:
            output = add_general(output, x, general)
        return output

    def _edit_in_force(self) -> LayerEdit | None:
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return None
        if self.merged_adapters:
            return None
        if self.call.running:
            return self.call.edit
        # (A model may be offloaded after its strengths were set; then there is no weight to fuse with any more.)
        offloaded = self._edit is not None and self._edit.fused is not None and self.base_layer.weight.is_meta
        if self._stale or offloaded:
            self.refresh()
        return self._edit

    def refresh(self) -> None:
        """Makes the edit for the strengths that are set on the model, after anything that it depends on has changed."""
        if self._on_meta():
            self._stale = True
            return
        dialled = [name for name in self.active_adapters if any(self.neva_strengths.get(name, ()))]
        tables = {name: torch.tensor([self.neva_strengths[name]], dtype=torch.float32) for name in dialled}
        # (a strength may be too small for float32)
        edit = self.make_edit(tables) if any(bool(table.any()) for table in tables.values()) else None
        if self._edit is not None and edit is not None and same_layout(self._edit, edit):
            # The same tensors with other numbers: compiled graphs and CUDA graphs go on without noticing.
            with torch.no_grad():
                for old, new in zip(self._edit.tensors(), edit.tensors(), strict=True):
                    old.copy_(new)
        else:
            self._edit = edit
        self._stale = False

    def make_edit(self, tables: Mapping[str, torch.Tensor], use_gate: bool = True) -> LayerEdit:
        """Turns strengths into what this layer adds.

        Args:
            tables (`Mapping[str, torch.Tensor]`): Adapter name -> strengths `[rows, V]`, float32 on the CPU.
            use_gate (`bool`): Whether gates are used where the adapter has them.

        Returns:
            [`LayerEdit`]: On the device of the base layer.
        """
        bias: torch.Tensor | None = None
        general = []
        # Outside inference mode, since what is made here may outlive the caller's.
        with torch.inference_mode(False), torch.no_grad():
            for name, table in tables.items():
                if name not in self.neva_shift:
                    continue
                config = self.neva_configs[name]
                coefficients = scale_by_units(table, config.values, config.units)
                gated = use_gate and name in self.neva_gate_weight
                if name in self.neva_gain or gated:
                    if len(table) == 1 and not bool(coefficients.any()):
                        continue
                    general.append(self._general_edit(name, coefficients, gated))
                if gated:
                    continue
                fold = self.fold(name)
                folded = coefficients.to(fold.device) @ fold
                # -0.0 is the neutral element of addition (y + 0.0 turns y = -0.0 into 0.0).
                untouched = (coefficients == 0).all(dim=1, keepdim=True).to(fold.device)
                folded = torch.where(untouched, -0.0, folded)
                bias = folded if bias is None else bias + folded
            if bias is None:
                return LayerEdit(general=tuple(general))
            dtype = device_and_dtype(self.base_layer)[1]
            if bias.shape[0] == 1 and can_fuse(self.base_layer):
                base_bias = self.base_layer.bias
                total = bias[0] if base_bias is None else bias[0] + base_bias.float()
                return LayerEdit(fused=total.to(dtype), general=tuple(general))
            return LayerEdit(bias=bias.to(dtype), general=tuple(general))

    def _general_edit(self, name: str, coefficients: torch.Tensor, gated: bool) -> GeneralEdit:
        columns = self._keep(name, "columns", lambda: self._columns(name))
        device = columns.device

        def own(kind: str) -> torch.Tensor:
            return self.tensor(kind, name).to(device, torch.float32, copy=True)

        return general_edit(
            index=self.tensor("index", name).to(device, torch.int64),
            columns=columns,
            coefficients=coefficients.to(device),
            shift=own("shift"),
            gain=own("gain") if name in self.neva_gain else None,
            gate_weight=own("gate_weight") if gated else None,
            gate_bias=own("gate_bias") if gated else None,
            gate_logit=float(torch.logit(torch.tensor(self.neva_configs[name].gate_probability))),
            untouched=None if len(coefficients) == 1 else (coefficients == 0).all(dim=1).to(device),
            dtype=device_and_dtype(self.base_layer)[1],
        )

    def fold(self, adapter_name: str) -> torch.Tensor:
        """What each value's shift writes to the output at coefficient 1.

        Args:
            adapter_name (`str`): Which adapter.

        Returns:
            `torch.Tensor`: Float32 `[V, hidden]`, kept until weights or shifts change.
        """

        def make() -> torch.Tensor:
            written = self._columns(adapter_name)
            # Copied, since matmuls of tensors at odd addresses (mapped from files) differ in their last bits.
            return self.tensor("shift", adapter_name).to(written.device, torch.float32, copy=True) @ written

        return self._keep(adapter_name, "fold", make)

    def tensor(self, kind: str, adapter_name: str) -> torch.Tensor:
        """One of an adapter's tensors.

        Args:
            kind (`str`): Its name without `neva_`, such as `shift`.
            adapter_name (`str`): Which adapter.

        Returns:
            `torch.Tensor`: With numbers, also where accelerate has offloaded the model.
        """
        tensors = getattr(self, f"neva_{kind}")
        if tensors[adapter_name].is_meta and hasattr(tensors, "_hf_hook"):
            return tensors._hf_hook.weights_map[adapter_name]
        return tensors[adapter_name]

    def _keep(self, adapter_name: str, what: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` makes of an adapter and the base layer's weight, made again only when these change."""
        sources = (self.neva_shift[adapter_name], self.neva_index[adapter_name], stored_weight(self.base_layer))
        versions = [version(tensor) for tensor in sources]
        if (adapter_name, what) not in self._kept or self._kept[adapter_name, what][0] != versions:
            with torch.inference_mode(False), torch.no_grad():
                self._kept[adapter_name, what] = (versions, make())
        return self._kept[adapter_name, what][1]

    def _columns(self, adapter_name: str) -> torch.Tensor:
        index = self.tensor("index", adapter_name)
        # Once more, since transformers fills the tensors of an adapter that it loads without asking anyone.
        present = [kind for kind in TENSORS if adapter_name in getattr(self, f"neva_{kind}")]
        check_numbers(self.module_name, {kind: self.tensor(kind, adapter_name) for kind in present}, None)
        lowest, highest = int(index.min()), int(index.max())
        if lowest < 0 or highest >= self.in_features:
            raise NeVAError(
                f"Adapter {adapter_name!r} edits neuron {lowest if lowest < 0 else highest} of {self.module_name!r}, "
                f"which has only {self.in_features}: it was made for another model."
            )
        return columns(self.base_layer, index)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the edits at the strengths that are set on the model into the base layer's weight and bias.

        `s * shift` of all neurons becomes an output bias, and `s * gain` scales the neurons' columns.

        Args:
            safe_merge (`bool`): Whether to refuse a merge that would not be finite.
            adapter_names (`list[str]`, *optional*): Which adapters; the active ones when `None`.

        Raises:
            `NeVAError`: For gates, which depend on the token, and for base layers without a plain weight.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.neva_shift]
        strengths = self._merged_strengths | {name: self.neva_strengths[name] for name in names}
        dialled = [name for name, row in strengths.items() if any(row)]
        gated = [name for name in dialled if name in self.neva_gate_weight]
        if gated:
            raise NeVAError(
                f"Adapter {gated[0]!r} has gates, which decide per token, so it cannot be merged into weights. "
                "Keep it as an adapter, or make a map without gates."
            )
        if dialled and not is_plain(self.base_layer):
            raise NeVAError(
                f"{self.module_name!r} is a {type(self.base_layer).__name__} without a plain floating-point weight, "
                "so edits cannot be merged into it. Load the base model without quantization to merge."
            )
        # Edits add up, and gains are relative to the base weights: all adapters are merged into these at once.
        self.unmerge()
        if dialled:
            base = self.base_layer
            weight, bias = self._merged({name: strengths[name] for name in dialled})
            if safe_merge and not bool(torch.isfinite(weight).all() and torch.isfinite(bias).all()):
                raise NeVAError(f"Merging {names} into {self.module_name!r} gives numbers that are not finite.")
            self._before_merge = (base.weight.data, base.bias)
            base.weight.data, base.bias = weight, nn.Parameter(bias, requires_grad=False)
        self._merged_strengths, self.merged_adapters = strengths, list(strengths)

    def _merged(self, strengths: Mapping[str, list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
        base = self.base_layer
        weight: torch.Tensor = base.weight.data
        bias = torch.zeros(self.out_features, device=weight.device) if base.bias is None else base.bias.float()
        scale = torch.ones(self.in_features, device=weight.device)
        with torch.no_grad():
            for name, row in strengths.items():
                config = self.neva_configs[name]
                coefficients = scale_by_units(torch.tensor([row]), config.values, config.units).to(weight.device)
                bias = bias + (coefficients @ self.fold(name))[0]
                if name in self.neva_gain:
                    gain = self.tensor("gain", name).to(weight.device, torch.float32)
                    scale[self.tensor("index", name).to(weight.device, torch.int64)] += (coefficients @ gain)[0]
            if any(name in self.neva_gain for name in strengths):
                weight = (weight.float() * (scale[:, None] if isinstance(base, Conv1D) else scale)).to(weight.dtype)
            return weight, bias.to(weight.dtype)

    def unmerge(self) -> None:
        """Puts the base layer back as it was before [`merge`], bit for bit."""
        if self._before_merge is not None:
            self.base_layer.weight.data, self.base_layer.bias = self._before_merge
        self._before_merge, self._merged_strengths, self.merged_adapters = None, {}, []

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        if not self._stale:
            self.refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] != adapter_name}
        super().delete_adapter(adapter_name)
        self.refresh()

    def train(self, mode: bool = True) -> NeVALayer:
        # transformers ends the loading of an adapter with `eval()`. What is ready before the first call can be compiled.
        super().train(mode)
        if self._stale:
            self.refresh()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> NeVALayer:
        # .to(), .half(), .cuda() and the like come through here. They move the map's own tensors, but do not round them:
        # a map stays what was saved, whatever the model computes in.
        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        for child in self.children() if recurse else ():
            child._apply(fn if child is self.base_layer else move)
        if self._before_merge is not None:
            weight, bias = self._before_merge
            if bias is not None:
                bias.data = fn(bias.data)
            self._before_merge = (fn(weight), bias)
        self._kept.clear()
        self.refresh()
        return self

    def _on_meta(self) -> bool:
        """Whether there are no numbers yet, or none here because the base layer is offloaded."""
        tensors = [stored_weight(self.base_layer), *self.neva_shift.values()]
        return any(tensor.is_meta for tensor in tensors) and not hasattr(self.base_layer, "_hf_hook")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own casts to the base layer's dtype as well; shifts are small and folded once, so they stay float32.
        target = device or stored_weight(self.base_layer).device
        if target.type == "meta":
            return
        for name in (*self.adapter_layer_names, "neva_index"):
            tensors = getattr(self, name)
            if adapter_name in tensors and not tensors[adapter_name].is_meta:
                tensors[adapter_name] = tensors[adapter_name].to(target)

    def __repr__(self) -> str:
        return "neva." + super().__repr__()
