"""Where accelerate puts the weights of a model that is spread over several devices."""

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory, get_max_memory
from torch import nn
from transformers import PreTrainedModel

from auto_mmround.errors import UserError, several
from auto_mmround.model import devices

OUTSIDE = {"cpu", "disk"}  # what an accelerator has no room for
HELP = (
    "load it without offloading, or name its folder and use --stream, which reads blocks when their"
    " turn comes"
)


def placed(
    model: PreTrainedModel, name: str, dtype: torch.dtype
) -> dict[str, int | str | torch.device]:
    """Module -> device, for a model without weights. name: as accelerate knows it: auto, balanced,
    sequential ..

    Raises UserError where a part would lie in host memory beside accelerators, or on disk.
    """
    whole, memory = model._no_split_modules, get_max_memory()
    ours = [] if any(isinstance(key, int) for key in memory) else devices.accelerators()
    memory |= {device.index: devices.free_memory(device) for device in ours}
    memory["cpu"] = memory.pop("cpu", 0)  # the last one to be filled
    if name != "sequential":
        low = name == "balanced_low_0"
        memory = get_balanced_memory(model, memory, whole, dtype=dtype, low_zero=low)
    places = infer_auto_device_map(
        model, max_memory=memory, no_split_module_classes=whole, dtype=dtype
    )
    spelled = {device.index: str(device) for device in ours}  # that accelerate has no number for
    places = {module: spelled.get(place, place) for module, place in places.items()}
    used = {str(place) for place in places.values()}
    left = [
        module
        for module, place in places.items()
        if str(place) in (OUTSIDE if len(used) > 1 else {"disk"})
    ]
    if left:
        raise UserError(
            f"device_map {name}: the devices have no room for {left[0]}{several(left)}; leave it"
            " out and use --stream, which reads blocks when their turn comes"
        )
    return places


def check_present(model: nn.Module) -> None:
    """Raises UserError where accelerate holds weights of the model elsewhere and hands them out for
    a forward pass."""
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise UserError(
            f"model: {left[0]}{several(left)} is not in memory, accelerate has offloaded it; {HELP}"
        )
