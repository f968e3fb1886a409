"""Load full values into a sharded model, of which each rank takes its shard; adapters from disk."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tpkernels.errors import PlanError
from tpkernels.layers.reference import Ref
from tpkernels.plan.adapters.apply import cut_loaded
from tpkernels.shard import mark_shard, shard_info

PREFIX = "base_model.model."  # in front of names in files of peft


def take_shards(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
) -> None:
    """Pre-hook of load_state_dict of a sharded model: replace full values by this rank's shards.

    Args:
        module, state, prefix, metadata, strict, lists: as torch passes them; `state` is changed. Shards stay.
    """
    cut_loaded(module, {name.removeprefix(prefix) for name in state if name.startswith(prefix)})
    for name, parameter in module.named_parameters(prefix.removesuffix("."), remove_duplicate=False):
        info, value = shard_info(parameter), state.get(name)
        if info is None or not isinstance(value, Tensor) or value.shape == parameter.shape:
            continue
        if value.shape == info.full_shape(parameter):
            state[name] = info.part(value)
            mark_shard(state[name], info)


class LoadAdapter:
    """`load_adapter` of a sharded model of transformers, in the place of its own, which loads full matrices."""

    def __init__(self, model: nn.Module) -> None:
        self._model = Ref(model)

    def __call__(
        self,
        peft_model_id: str | None = None,
        adapter_name: str | None = None,
        peft_config: Any = None,
        adapter_state_dict: dict[str, Tensor] | None = None,
        *,
        low_cpu_mem_usage: bool = False,
        is_trainable: bool = False,
        hotswap: bool | str = "auto",
        adapter_kwargs: dict[str, Any] | None = None,
        **download: Any,
    ) -> Any:
        """Add an adapter and load its values; it needs no cut_adapters.

        Args:
            peft_model_id, adapter_name, peft_config, adapter_state_dict, is_trainable, adapter_kwargs: as in
                transformers.
            low_cpu_mem_usage: not used, adapters are small.
            hotswap: must not be True.
            download: options of peft's load_peft_weights, such as token.

        Raises:
            PlanError: hotswap is True, or the adapter is refused as in cut_adapters.
            ValueError: there is neither a path nor a config with values.
        """
        from peft import PeftConfig, set_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import load_peft_weights

        model: Any = self._model.target
        if hotswap is True:
            raise PlanError("load_adapter: hotswap does not work on a cut model: load it under another name")
        if peft_model_id is None and (peft_config is None or adapter_state_dict is None):
            raise ValueError("load_adapter: give peft_model_id, or peft_config and adapter_state_dict")
        download |= adapter_kwargs or {}
        name = adapter_name or "default"
        config = peft_config or PeftConfig.from_pretrained(str(peft_model_id), **download)
        if hasattr(config, "inference_mode"):
            config.inference_mode = not is_trainable
        weights = adapter_state_dict or load_peft_weights(str(peft_model_id), device="cpu", **download)
        model.add_adapter(config, name)
        weights = {key.removeprefix(PREFIX): value for key, value in weights.items()}
        found = set_peft_model_state_dict(model, weights, name)
        if not is_trainable:
            model.eval()
            for module in model.modules():
                if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module):
                    module.requires_grad_(False)
        return found
